"""From activations to pseudo-labels."""

from wsss.pseudo.labels import (
    IGNORE_INDEX,
    cam_pseudo_label,
    segmentation_pseudo_label,
    two_threshold_label,
)
from wsss.pseudo.multi_scale import MultiScaleOutput, multi_scale, normalise_cam
from wsss.pseudo.perplexity import perplexity, reliability_weight
from wsss.pseudo.threshold import (
    DynamicThreshold,
    FixedThreshold,
    gmm_threshold,
    min_error_threshold,
    otsu_threshold,
)

__all__ = [
    "IGNORE_INDEX",
    "DynamicThreshold",
    "FixedThreshold",
    "MultiScaleOutput",
    "cam_pseudo_label",
    "gmm_threshold",
    "min_error_threshold",
    "multi_scale",
    "normalise_cam",
    "otsu_threshold",
    "perplexity",
    "reliability_weight",
    "segmentation_pseudo_label",
    "two_threshold_label",
]
