"""SEAM's losses and pixel correlation in loops (CVPR 2020), one number at a time.

Maps are float64 tensors; losses come out as 0-dim float64 tensors that autograd can differentiate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-5


def _relu(x: Tensor) -> Tensor:
    return x if x.item() > 0 else x * 0.0


def max_norm(maps: Tensor) -> list[list[list[list[Tensor]]]]:
    """relu, less the minimum and 1e-5, over maximum - minimum + 1e-5, of each image and channel."""
    images, channels, height, width = maps.shape
    out = []
    for b in range(images):
        planes = []
        for c in range(channels):
            positive = [[_relu(maps[b, c, y, x]) for x in range(width)] for y in range(height)]
            flat = [value for row in positive for value in row]
            low, high = min(flat, key=Tensor.item), max(flat, key=Tensor.item)
            planes.append(
                [
                    [_relu(v - low - EPSILON) / (high - low + EPSILON) for v in row]
                    for row in positive
                ]
            )
        out.append(planes)
    return out


def equivariant(large: Tensor, small: Tensor, labels: Tensor) -> Tensor:
    """Mean of |large - small| over images, classes and pixels; absent classes are 0."""
    images, classes, height, width = large.shape
    one, two = max_norm(large), max_norm(small)
    total = (large * 0.0).sum()
    for b in range(images):
        for c in range(classes):
            for y in range(height):
                for x in range(width):
                    total = total + float(labels[b, c]) * abs(one[b][c][y][x] - two[b][c][y][x])
    return total / large.numel()


def cross_target(cam: Tensor, labels: Tensor) -> Tensor:
    """(B, C + 1, h, w): background 1 - max, then the largest class of each pixel, others 0."""
    images, classes, height, width = cam.shape
    normalised = max_norm(cam)
    target = torch.zeros(images, classes + 1, height, width, dtype=torch.float64)
    for b in range(images):
        for y in range(height):
            for x in range(width):
                values = [
                    float(normalised[b][c][y][x]) * float(labels[b, c]) for c in range(classes)
                ]
                largest = max(values)
                target[b, 0, y, x] = 1 - largest
                for c in range(classes):
                    if values[c] == largest:
                        target[b, c + 1, y, x] = values[c]
    return target


def equivariant_cross(cam: Tensor, refined: Tensor, labels: Tensor, share: float) -> Tensor:
    """One half of ECR: the refined maps of one branch against the CAM of the other.

    ``refined`` has the background first. Mean over images of the mean of the largest ``share`` of
    all absolute differences of an image.
    """
    images, channels, height, width = refined.shape
    target, found = cross_target(cam.detach(), labels), max_norm(refined)
    kept = max(1, int(channels * height * width * share))
    total = (refined * 0.0).sum()
    for b in range(images):
        differences = []
        for c in range(channels):
            present = 1.0 if c == 0 else float(labels[b, c - 1])
            for y in range(height):
                for x in range(width):
                    differences.append(abs(target[b, c, y, x] - found[b][c][y][x] * present))
        differences.sort(key=Tensor.item, reverse=True)
        total = total + sum(differences[:kept]) / kept
    return total / images


def min_pooling(refined: Tensor, labels: Tensor, share: float) -> Tensor:
    """Mean of the lowest ``share`` of each image's largest present activation."""
    images, classes, height, width = refined.shape
    kept = max(1, int(height * width * share))
    total = (refined * 0.0).sum()
    for b in range(images):
        largest = []
        for y in range(height):
            for x in range(width):
                values = [refined[b, c, y, x] * float(labels[b, c]) for c in range(classes)]
                largest.append(max(values, key=Tensor.item))
        largest.sort(key=Tensor.item)
        total = total + sum(_relu(value) for value in largest[:kept]) / kept
    return total / images


def suppressed(cam: Tensor) -> Tensor:
    """What the correlation module refines: (B, C + 1, h, w), background first.

    relu, max-normalised; at each pixel only the largest class stays.
    """
    images, classes, height, width = cam.shape
    out = torch.zeros(images, classes + 1, height, width, dtype=torch.float64)
    for b in range(images):
        highest = [max(0.0, float(cam[b, c].max())) for c in range(classes)]
        for y in range(height):
            for x in range(width):
                values = [
                    max(0.0, float(cam[b, c, y, x]) - EPSILON) / (highest[c] + EPSILON)
                    for c in range(classes)
                ]
                out[b, 0, y, x] = 1 - max(values)
                for c in range(classes):
                    out[b, c + 1, y, x] = values[c] if values[c] == max(values) else 0.0
    return out


def correlate(maps: Tensor, embedding: Tensor) -> Tensor:
    """Each pixel's mean of ``maps`` over all pixels, weighted by the relu'd cosine similarity."""
    images, channels, height, width = maps.shape
    out = torch.zeros_like(maps)
    pixels: Sequence[tuple[int, int]] = [(y, x) for y in range(height) for x in range(width)]
    for b in range(images):
        unit = {}
        for y, x in pixels:
            vector = embedding[b, :, y, x].tolist()
            length = sum(v * v for v in vector) ** 0.5 + EPSILON
            unit[y, x] = [v / length for v in vector]
        for j in pixels:
            weights = {
                i: max(0.0, sum(p * q for p, q in zip(unit[i], unit[j], strict=True)))
                for i in pixels
            }
            whole = sum(weights.values()) + EPSILON
            for c in range(channels):
                out[b, c, j[0], j[1]] = (
                    sum(weights[i] * float(maps[b, c, i[0], i[1]]) for i in pixels) / whole
                )
    return out
