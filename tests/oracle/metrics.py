"""Segmentation scores by counting pixels one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


def _ratio(top: float, bottom: float) -> float:
    """top / bottom, NaN where nothing was counted."""
    return top / bottom if bottom else math.nan


def segmentation_scores(
    pairs: Iterable[tuple[Tensor, Tensor]], num_classes: int, ignore_index: int = 255
) -> dict[str, list[float]]:
    """Per-class scores over a whole set of (prediction, target) maps.

    A score without a denominator is NaN, among them all scores of a class that is absent from
    targets and predictions.
    """
    tp, fp, fn = ([0] * num_classes for _ in range(3))
    for prediction, target in pairs:
        for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
            if t == ignore_index:
                continue
            if p == t:
                tp[t] += 1
            else:
                fp[p] += 1
                fn[t] += 1
    classes = range(num_classes)
    return {
        "iou": [_ratio(tp[c], tp[c] + fp[c] + fn[c]) for c in classes],
        "precision": [_ratio(tp[c], tp[c] + fp[c]) for c in classes],
        "recall": [_ratio(tp[c], tp[c] + fn[c]) for c in classes],
        "confusion_ratio": [_ratio(fp[c], tp[c]) for c in classes],
        "dice": [_ratio(2 * tp[c], 2 * tp[c] + fp[c] + fn[c]) for c in classes],
    }


def mean(values: list[float]) -> float:
    """Mean over the classes that have a score."""
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan
