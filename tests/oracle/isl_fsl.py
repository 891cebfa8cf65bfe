"""Importance sampling and feature similarity losses in loops, from the equations of the paper.

Jonnarth, Zhang, Felsberg: High-fidelity Pseudo-labels (WACV 2024). Scores are float64 tensors;
outputs 0-dim float64 tensors that autograd can differentiate by them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _exponentials(scores: Tensor, b: int, y: int, x: int) -> list[Tensor]:
    """e^s of the background (a score of 0) and of the classes."""
    return [torch.ones((), dtype=torch.float64)] + [torch.exp(s) for s in scores[b, :, y, x]]


def posterior_at(scores: Tensor, kind: str, b: int, c: int, y: int, x: int) -> Tensor:
    """Eq. 14 (binomial), or eq. 5 with a background of score 0 (multinomial)."""
    if kind == "binomial":
        return torch.exp(scores[b, c, y, x]) / (1 + torch.exp(scores[b, c, y, x]))
    parts = _exponentials(scores, b, y, x)
    return parts[c + 1] / sum(parts)  # type: ignore[no-any-return]


def sampling_distribution(
    scores: Tensor, kind: str, b: int, c: int, valid: Tensor | None = None
) -> list[float]:
    """Eq. 15 over the pixels in reading order, 1e-5 added before normalising."""
    height, width = scores.shape[2:]
    weights = []
    for y in range(height):
        for x in range(width):
            inside = valid is None or bool(valid[b, y, x])
            p = posterior_at(scores, kind, b, c, y, x).item() + 1e-5
            weights.append(p if inside else 0.0)
    total = sum(weights)
    return [weight / total for weight in weights]


def importance_sampling(
    scores: Tensor, labels: Tensor, pixels: Tensor, kind: str, valid: Tensor | None = None
) -> Tensor:
    """Eq. 8 and 18 for the drawn (B, C, samples) pixels, numbered in reading order."""
    images, classes, _, width = scores.shape
    samples = pixels.shape[2]
    total = (scores * 0.0).sum()
    for b in range(images):
        if valid is not None and not valid[b].any():
            continue
        for c in range(classes):
            for n in range(samples):
                at = int(pixels[b, c, n])
                p = posterior_at(scores, kind, b, c, at // width, at % width)
                y = float(labels[b, c])
                total = total - y * torch.log(p) - (1 - y) * torch.log(1 - p)
    return total / (images * classes * samples)


def max_norm(scores: Tensor, b: int, c: int, valid: Tensor | None = None) -> list[list[Tensor]]:
    """Eq. 4 as published: relu, minus minimum and 1e-5, not below 0, over maximum - minimum."""
    height, width = scores.shape[2:]
    zero = torch.zeros((), dtype=torch.float64)
    positive = [
        [s if s.item() > 0 else zero for s in (scores[b, c, y, x] for x in range(width))]
        for y in range(height)
    ]
    inside = [
        positive[y][x]
        for y in range(height)
        for x in range(width)
        if valid is None or bool(valid[b, y, x])
    ]
    if not inside:
        return [[zero] * width for _ in range(height)]
    largest, smallest = inside[0], inside[0]
    for p in inside:
        largest = p if p.item() > largest.item() else largest
        smallest = p if p.item() < smallest.item() else smallest
    result = []
    for row in positive:
        above = [p - smallest - 1e-5 for p in row]
        result.append([a / (largest - smallest + 1e-5) if a.item() > 0 else zero for a in above])
    return result


def predictions(
    scores: Tensor,
    gate: str,
    labels: Tensor | None,
    background: bool,
    valid: Tensor | None,
    b: int,
) -> list[list[list[Tensor]]]:
    """Channels of rows of pixels that the gate of image b compares."""
    _, classes, height, width = scores.shape
    zero = torch.zeros((), dtype=torch.float64)
    channels = []
    for c in range(classes):
        if labels is not None and not labels[b, c]:
            channels.append([[zero] * width for _ in range(height)])
        elif gate == "max_norm":
            channels.append(max_norm(scores, b, c, valid))
        elif gate == "none":
            channels.append([list(row) for row in scores[b, c]])
        else:
            channels.append(
                [
                    [posterior_at(scores, gate, b, c, y, x) for x in range(width)]
                    for y in range(height)
                ]
            )
    if background and gate == "multinomial":
        rows = []
        for y in range(height):
            parts = [_exponentials(scores, b, y, x) for x in range(width)]
            rows.append([p[0] / sum(p) for p in parts])
        channels.append(rows)
    elif background:
        channels.append(
            [
                [1 - torch.stack([r[y][x] for r in channels]).max() for x in range(width)]
                for y in range(height)
            ]
        )
    return channels


def spatial_weight(dy: int, dx: int, sigma: float) -> float:
    """Eq. 10."""
    return math.exp(-(dy * dy + dx * dx) / (2 * sigma**2)) / (2 * math.pi * sigma**2)


def dissimilarity(first: Tensor, second: Tensor, mu: float) -> float:
    """Eq. 12 and 13 of two RGB pixels."""
    delta = 0.0
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        delta += abs(min(max(a, 0.0), 1.0) - min(max(b, 0.0), 1.0)) / 3
    return math.tanh(mu + math.log((delta + 1e-5) / (1 - delta + 1e-5)))


def feature_similarity(
    scores: Tensor,
    images: Tensor,
    labels: Tensor | None = None,
    mu: float = 2.5,
    sigma: float = 5.0,
    gate: str = "max_norm",
    window: int | None = None,
    background: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Eq. 9 over all ordered pairs of pixels, mean over images; H W counts valid pixels."""
    number, _, height, width = scores.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    total = (scores * 0.0).sum()
    for b in range(number):
        channels = predictions(scores, gate, labels, background, valid, b)
        r = [
            [torch.stack([c[y][x] for c in channels]) for x in range(width)] for y in range(height)
        ]
        inside = [(y, x) for y, x in places if valid is None or bool(valid[b, y, x])]
        for yi, xi in inside:
            for yj, xj in inside:
                dy, dx = yi - yj, xi - xj
                if window is not None and (abs(dy) > window or abs(dx) > window):
                    continue
                w = spatial_weight(dy, dx, sigma)
                f = dissimilarity(images[b, :, yi, xi], images[b, :, yj, xj], mu)
                g = ((r[yi][xi] - r[yj][xj]) ** 2).sum() / 2  # eq. 11
                total = total - w * g * f / len(inside)
    return total / number
