"""Average precision by walking down the ranking one score at a time."""

from __future__ import annotations

import math

from torch import Tensor


def average_precision(scores: list[float], labels: list[int]) -> float:
    """Sum over thresholds of the gain in recall times the precision; NaN without a positive.

    A threshold takes in all equal scores at once.
    """
    positives = sum(labels)
    if positives == 0:
        return math.nan
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        precision, recall = sum(taken) / len(taken), sum(taken) / positives
        total += (recall - recall_before) * precision
        recall_before = recall
    return total


def per_class(scores: Tensor, labels: Tensor) -> list[float]:
    """Of each class over all images, of scores and labels (N, C)."""
    s, y = scores.tolist(), labels.int().tolist()
    return [
        average_precision([row[c] for row in s], [row[c] for row in y])
        for c in range(scores.shape[1])
    ]


def per_image(scores: Tensor, labels: Tensor) -> list[float]:
    """Of each image over all classes."""
    return [
        average_precision(row, wanted)
        for row, wanted in zip(scores.tolist(), labels.int().tolist(), strict=True)
    ]
