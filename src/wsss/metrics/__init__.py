"""Scores and the protocols they are taken under."""

from wsss.metrics.boundary import BoundaryScores, boundary_f
from wsss.metrics.classification import ClassificationScores, average_precision
from wsss.metrics.segmentation import GroupDice, SegmentationScores

__all__ = [
    "BoundaryScores",
    "ClassificationScores",
    "GroupDice",
    "SegmentationScores",
    "average_precision",
    "boundary_f",
]
