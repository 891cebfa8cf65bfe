"""Losses, one a file: pure functions of tensors."""

from wsss.losses.affinity import contrastive_affinity_loss
from wsss.losses.cam2seg import cam2seg_loss
from wsss.losses.classification import classification_loss
from wsss.losses.contrastive_separation import contrastive_separation_loss
from wsss.losses.dense_energy import dense_energy_loss
from wsss.losses.distribution import distribution_loss
from wsss.losses.feature_similarity import feature_similarity_loss
from wsss.losses.importance_sampling import importance_sampling_loss
from wsss.losses.pixel_affinity import pixel_affinity_loss
from wsss.losses.seg2cam import seg2cam_loss
from wsss.losses.token_contrast import token_contrast_loss

__all__ = [
    "cam2seg_loss",
    "classification_loss",
    "contrastive_affinity_loss",
    "contrastive_separation_loss",
    "dense_energy_loss",
    "distribution_loss",
    "feature_similarity_loss",
    "importance_sampling_loss",
    "pixel_affinity_loss",
    "seg2cam_loss",
    "token_contrast_loss",
]
