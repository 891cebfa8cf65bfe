"""The dense energy loss in loops over pairs of pixels, with its published gradient.

Inputs are float64 tensors; the output is a 0-dim float64 tensor that autograd can differentiate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracle.resize import bilinear

IGNORE = 255


def kernel(a: tuple[int, int, Tensor], b: tuple[int, int, Tensor], xy: float, rgb: float) -> float:
    """Bilateral Gaussian of two pixels, each (row, column, its three colours)."""
    far = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
    different = sum((float(p) - float(q)) ** 2 for p, q in zip(a[2], b[2], strict=True))
    return math.exp(-far / (2 * xy**2) - different / (2 * rgb**2))


def nearest(image: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) to (..., height, width): target i takes source floor(i x source / target)."""
    result = torch.empty(*image.shape[:-2], height, width, dtype=image.dtype)
    for y in range(height):
        for x in range(width):
            source_y = y * image.shape[-2] // height
            source_x = x * image.shape[-1] // width
            result[..., y, x] = image[..., source_y, source_x]
    return result


def dense_energy(
    probabilities: Tensor,
    images: Tensor,
    label: Tensor,
    valid: Tensor,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
) -> Tensor:
    """``-weight / B sum_ik S_ik gate_i (K S)_ik``; gradient ``-2 weight / B gate_i (K S)_ik``."""
    number, classes = probabilities.shape[:2]
    height = max(1, math.floor(label.shape[1] * scale))
    width = max(1, math.floor(label.shape[2] * scale))
    total = torch.zeros((), dtype=torch.float64)
    for n in range(number):
        scaled = bilinear(probabilities[n], height, width)
        image = nearest(images[n].double(), height, width)
        ignored = nearest(label[n], height, width) == IGNORE
        inside = nearest(valid[n], height, width)
        # by pixel, as numbers: neither the gate nor the filter is differentiated
        pixels = [(y, x) for y in range(height) for x in range(width)]
        segment = {}
        gate = {}
        for y, x in pixels:
            p = [float(scaled[k, y, x].detach()) for k in range(classes)]
            segment[y, x] = p if inside[y, x] else [0.0] * classes
            gate[y, x] = max(float(inside[y, x]) - max(p), 0.0)
            if ignored[y, x]:
                gate[y, x] = 1.0
        value = 0.0
        gradient = torch.zeros(classes, height, width, dtype=torch.float64)
        for y, x in pixels:
            for k in range(classes):
                filtered = 0.0
                for v, u in pixels:
                    here, there = (y, x, image[:, y, x]), (v, u, image[:, v, u])
                    filtered += kernel(here, there, sigma_xy * scale, sigma_rgb) * segment[v, u][k]
                value -= weight / number * segment[y, x][k] * gate[y, x] * filtered
                if inside[y, x]:
                    gradient[k, y, x] = -2 * weight / number * gate[y, x] * filtered
        # a plane through ``value`` with slope ``gradient``
        total = total + value + (gradient * (scaled - scaled.detach())).sum()
    return total
