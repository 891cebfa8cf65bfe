"""Pixel-adaptive refinement (PAR) one pixel and one neighbour at a time, in Python floats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

STD_EPS = 1e-8
Grid = list[list[float]]


def resize_corners(grid: Grid, height: int, width: int) -> Grid:
    """Bilinear, the corner pixels' centres on each other (``align_corners=True``)."""

    def taps(target: int, size_in: int, size_out: int) -> tuple[int, int, float]:
        position = target * (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
        first = min(math.floor(position), size_in - 1)
        return first, min(first + 1, size_in - 1), position - first

    result = []
    for y in range(height):
        top, bottom, v = taps(y, len(grid), height)
        row = []
        for x in range(width):
            left, right, u = taps(x, len(grid[0]), width)
            upper = (1 - u) * grid[top][left] + u * grid[top][right]
            lower = (1 - u) * grid[bottom][left] + u * grid[bottom][right]
            row.append((1 - v) * upper + v * lower)
        result.append(row)
    return result


def neighbours(
    y: int, x: int, height: int, width: int, dilations: Sequence[int]
) -> list[tuple[int, int, float]]:
    """(row, column, distance); outside the image the nearest border pixel stands in.

    The distance is that of the position asked for, not of the border pixel.
    """
    found = []
    for d in dilations:
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy, dx) != (0, 0):
                    row = min(max(y + dy * d, 0), height - 1)
                    column = min(max(x + dx * d, 0), width - 1)
                    found.append((row, column, math.hypot(dy * d, dx * d)))
    return found


def _softmax(values: Sequence[float]) -> list[float]:
    largest = max(values)
    exponentials = [math.exp(v - largest) for v in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def affinity(
    channels: Sequence[Grid], y: int, x: int, dilations: Sequence[int], w1: float, w2: float
) -> list[float]:
    """Weights of one pixel's neighbours, in the order of :func:`neighbours`."""
    around = neighbours(y, x, len(channels[0]), len(channels[0][0]), dilations)
    colour = [0.0] * len(around)
    for channel in channels:
        values = [channel[row][column] for row, column, _ in around]
        std = statistics.stdev(values) + STD_EPS
        for n, value in enumerate(values):
            colour[n] -= (abs(value - channel[y][x]) / std / w1) ** 2 / len(channels)
    distances = [distance for _, _, distance in around]
    std = statistics.stdev(distances) + STD_EPS
    position = _softmax([-((distance / std / w1) ** 2) for distance in distances])
    return [c + w2 * p for c, p in zip(_softmax(colour), position, strict=True)]


def pixel_adaptive_refinement(
    image: Tensor,
    mask: Tensor,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """(B, K, H, W) float64: every pixel becomes a weighted sum of its neighbours, repeatedly."""
    height, width = image.shape[2:]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    images = []
    for b in range(image.shape[0]):
        channels = image[b].double().tolist()
        weights = {(y, x): affinity(channels, y, x, dilations, w1, w2) for y, x in pixels}
        maps = []
        for grid in mask[b].double().tolist():
            current = resize_corners(grid, height, width)
            for _ in range(iterations):
                following = [[0.0] * width for _ in range(height)]
                for y, x in pixels:
                    around = neighbours(y, x, height, width, dilations)
                    for weight, (row, column, _) in zip(weights[y, x], around, strict=True):
                        following[y][x] += weight * current[row][column]
                current = following
            maps.append(current)
        images.append(maps)
    return torch.tensor(images, dtype=torch.float64).view(*mask.shape[:2], height, width)
