"""Label map of an image from logits of rectangles of it, pixel by pixel."""

from __future__ import annotations

import math

from torch import Tensor

from tests.oracle.resize import bilinear

Placed = tuple[int, int, int, int, Tensor]
"""Top, left, height and width in the image, and logits (K, h, w) of any size."""


def mean_logits(placed: list[Placed], y: int, x: int, resized: list[Tensor]) -> list[float]:
    """Mean over the rectangles that hold pixel (y, x), of their logits at their own size."""
    sums: list[float] = []
    count = 0
    for (top, left, height, width, _), logits in zip(placed, resized, strict=True):
        if top <= y < top + height and left <= x < left + width:
            values = [float(v) for v in logits[:, y - top, x - left]]
            sums = [a + b for a, b in zip(sums, values, strict=True)] if count else values
            count += 1
    assert count, f"pixel ({y}, {x}) is in no rectangle"
    return [value / count for value in sums]


def label_map(
    height: int, width: int, placed: list[Placed]
) -> tuple[list[list[int]], list[int], list[float]]:
    """Winning label of each pixel; pixels and mean softmax probability of each label."""
    resized = [bilinear(logits.double(), h, w) for _, _, h, w, logits in placed]
    num_labels = placed[0][4].shape[0]
    mask, area, total = [], [0] * num_labels, [0.0] * num_labels
    for y in range(height):
        line = []
        for x in range(width):
            values = mean_logits(placed, y, x, resized)
            winner = values.index(max(values))
            line.append(winner)
            area[winner] += 1
            total[winner] += math.exp(values[winner]) / sum(math.exp(v) for v in values)
        mask.append(line)
    return mask, area, [t / a if a else 0.0 for t, a in zip(total, area, strict=True)]
