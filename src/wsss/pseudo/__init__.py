"""From activations to pseudo-labels."""

from wsss.pseudo.affinity import mutual_complement, random_walk, sinkhorn, symmetric_affinity
from wsss.pseudo.crf import CRF_PRESETS, CRFPreset, dense_crf
from wsss.pseudo.labels import (
    IGNORE_INDEX,
    cam_pseudo_label,
    segmentation_pseudo_label,
    softmax_threshold_label,
    two_threshold_label,
)
from wsss.pseudo.multi_scale import MultiScaleOutput, multi_scale, normalise_cam
from wsss.pseudo.mutual import MutualLabels, MutualRefinement
from wsss.pseudo.perplexity import perplexity, reliability_weight
from wsss.pseudo.pixel_affinity import affinity_walk
from wsss.pseudo.refine import PixelAdaptiveRefinement
from wsss.pseudo.threshold import (
    DynamicThreshold,
    FixedThreshold,
    gmm_threshold,
    min_error_threshold,
    otsu_threshold,
)
from wsss.pseudo.two_thresholds import FixedThresholds, MixtureThresholds, make_threshold

__all__ = [
    "CRF_PRESETS",
    "IGNORE_INDEX",
    "CRFPreset",
    "DynamicThreshold",
    "FixedThreshold",
    "FixedThresholds",
    "MixtureThresholds",
    "MultiScaleOutput",
    "MutualLabels",
    "MutualRefinement",
    "PixelAdaptiveRefinement",
    "affinity_walk",
    "cam_pseudo_label",
    "dense_crf",
    "gmm_threshold",
    "make_threshold",
    "min_error_threshold",
    "multi_scale",
    "mutual_complement",
    "normalise_cam",
    "otsu_threshold",
    "perplexity",
    "random_walk",
    "reliability_weight",
    "segmentation_pseudo_label",
    "sinkhorn",
    "softmax_threshold_label",
    "symmetric_affinity",
    "two_threshold_label",
]
