"""Bilinear resizing, pixel by pixel (``align_corners=False``, no antialiasing)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _taps(target: int, size_in: int, size_out: int) -> tuple[int, int, float]:
    """The two source indices of one output index and the weight of the second.

    Pixel centres sit at ``i + 0.5``; outside the first and last centre the edge is repeated.
    """
    position = (target + 0.5) * size_in / size_out - 0.5
    position = min(max(position, 0.0), size_in - 1.0)
    first = math.floor(position)
    second = min(first + 1, size_in - 1)
    return first, second, position - first


def bilinear(image: Tensor, height: int, width: int) -> Tensor:
    """(C, h, w) to (C, height, width); differentiable."""
    _, h, w = image.shape
    rows = []
    for y in range(height):
        y0, y1, fy = _taps(y, h, height)
        row = []
        for x in range(width):
            x0, x1, fx = _taps(x, w, width)
            top = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
            bottom = image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx
            row.append(top * (1 - fy) + bottom * fy)
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def flip(image: Tensor) -> Tensor:
    """Mirror (C, h, w) left to right."""
    width = image.shape[2]
    return torch.stack([image[:, :, width - 1 - x] for x in range(width)], dim=2)


def mean_colours(
    images: Sequence[Sequence[Sequence[Sequence[float]]]],
    valid: Sequence[Sequence[Sequence[bool]]],
    height: int,
    width: int,
) -> list[list[list[list[float]]]]:
    """Colours (B, 3, h, w) of cells as means over the pixels of the image alone.

    A pixel counts by its distance from the cell's centre, along each axis down to nothing at the
    neighbouring cells' centres; pixels that are not valid do not count.
    """

    def weight(cell: int, pixel: int, cells: int, pixels: int) -> float:
        scale = pixels / cells
        return max(0.0, 1 - abs((pixel + 0.5) - (cell + 0.5) * scale) / scale)

    result = []
    for image, inside in zip(images, valid, strict=True):
        rows, columns = len(inside), len(inside[0])
        made = [[[0.0] * width for _ in range(height)] for _ in image]
        for i in range(height):
            for j in range(width):
                total, sums = 0.0, [0.0] * len(image)
                for y in range(rows):
                    for x in range(columns):
                        share = weight(i, y, height, rows) * weight(j, x, width, columns)
                        if inside[y][x] and share:
                            total += share
                            for channel, plane in enumerate(image):
                                sums[channel] += share * plane[y][x]
                for channel in range(len(image)):
                    made[channel][i][j] = sums[channel] / total if total else 0.0
        result.append(made)
    return result
