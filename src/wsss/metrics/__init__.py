"""Scores and the protocols they are taken under."""

from wsss.metrics.segmentation import SegmentationScores

__all__ = ["SegmentationScores"]
