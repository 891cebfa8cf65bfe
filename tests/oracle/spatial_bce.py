"""Spatial-BCE in loops (ECCV 2022), one pixel at a time.

Scores are float64 tensors; losses come out as 0-dim float64 tensors that autograd can
differentiate. ``inside`` lists the pixels that are no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inside(valid: Tensor | None, b: int, height: int, width: int) -> list[tuple[int, int]]:
    return [
        (y, x) for y in range(height) for x in range(width) if valid is None or bool(valid[b, y, x])
    ]


def sigmoid(score: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-score))


def area_threshold(scores: Tensor, area: Tensor, valid: Tensor | None = None) -> Tensor:
    """The probability with ``int(area * pixels)`` larger ones before it, the last at most."""
    images, classes, height, width = scores.shape
    out = torch.zeros(images, classes, dtype=torch.float64)
    for b in range(images):
        pixels = inside(valid, b, height, width)
        for c in range(classes):
            ranked = sorted((float(sigmoid(scores[b, c, y, x])) for y, x in pixels), reverse=True)
            if ranked:
                place = int(float(area[b, c]) * len(ranked))
                out[b, c] = ranked[min(place, len(ranked) - 1)]
    return out


def away(p: Tensor, t: Tensor) -> Tensor:
    """1 at the threshold, 0 at p = 0 and p = 1, a parabola on each side."""
    if float(p) > float(t):
        return 1 - ((p - t) / (1 - t)) ** 2
    return 1 - ((t - p) / t) ** 2


def spatial_bce(
    scores: Tensor, labels: Tensor, threshold: Tensor, valid: Tensor | None = None
) -> Tensor:
    images, classes, height, width = scores.shape
    total = (scores * 0.0).sum()
    count = 0
    for b in range(images):
        for y, x in inside(valid, b, height, width):
            for c in range(classes):
                p = sigmoid(scores[b, c, y, x])
                if labels[b, c]:
                    total = total + away(p, threshold[b, c].detach())
                else:
                    total = total - torch.log(1 - p)
                count += 1
    return total / max(count, 1)


def threshold_loss(
    scores: Tensor, labels: Tensor, threshold: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Mean over the pixels below their threshold plus mean over those above."""
    images, classes, height, width = scores.shape
    below, above = [], []
    for b in range(images):
        for c in range(classes):
            if not labels[b, c]:
                continue
            for y, x in inside(valid, b, height, width):
                p = sigmoid(scores[b, c, y, x]).detach()
                t = threshold[b, c]
                (above if float(p) > float(t) else below).append(away(p, t))
    total = (threshold * 0.0).sum()
    for group in (below, above):
        if group:
            total = total + sum(group) / len(group)
    return total


def area_loss(scores: Tensor, labels: Tensor, area: Tensor, valid: Tensor | None = None) -> Tensor:
    """KL divergence of the mean probability from the area, mean over present classes."""
    images, classes, height, width = scores.shape
    total = (scores * 0.0).sum()
    count = 0
    for b in range(images):
        pixels = inside(valid, b, height, width)
        if not pixels:
            continue
        for c in range(classes):
            if not labels[b, c]:
                continue
            mean = sum(sigmoid(scores[b, c, y, x]) for y, x in pixels) / len(pixels)
            a = float(area[b, c])
            total = total + mean * torch.log(mean / a)
            total = total + (1 - mean) * torch.log((1 - mean) / (1 - a))
            count += 1
    return total / max(count, 1)
