"""Scores and the protocols they are taken under."""

from wsss.metrics.segmentation import GroupDice, SegmentationScores

__all__ = ["GroupDice", "SegmentationScores"]
