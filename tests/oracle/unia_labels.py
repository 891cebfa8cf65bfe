"""UniA's labels P1, P2, P3 and P in loops (section III-D), from this folder's parts.

Activations, affinity and images are read as float64; labels are int64 tensors (B, H, W).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle.labels import two_threshold
from tests.oracle.refine import pixel_adaptive_refinement
from tests.oracle.resize import bilinear
from tests.oracle.unia_affinity import mutual_complement, random_walk

IGNORE = 255
NORM_EPS = 1e-5
#: of PAR as published: its weights sum to 1 + W2, and it runs so often
W2, ITERATIONS = 0.01, 10


@dataclass
class Mutual:
    """The labels, and the maps that P1, P2 and P3 were cut from."""

    p1: Tensor
    p2: Tensor
    p3: Tensor
    label: Tensor
    maps: list[Tensor]


def reweighted(activations: Tensor, high: float) -> Tensor:
    """Eq. 8: M_re = M_CAM [M_CAM > lambda]."""
    out = torch.zeros_like(activations)
    images, classes, height, width = activations.shape
    for b in range(images):
        for c in range(classes):
            for y in range(height):
                for x in range(width):
                    value = float(activations[b, c, y, x])
                    if value > high:
                        out[b, c, y, x] = value
    return out


def _all(maps: Tensor, height: int, width: int) -> Tensor:
    return torch.stack([bilinear(image, height, width) for image in maps])


def par(activations: Tensor, images: Tensor, scale: float, renormalise: bool) -> Tensor:
    """Refined on the smaller image, without PAR's growth, at the size of the activations."""
    height, width = activations.shape[2:]
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    refined = pixel_adaptive_refinement(
        _all(images, *small), _all(activations, *small), iterations=ITERATIONS, w2=W2
    )
    for _ in range(ITERATIONS):
        refined = refined / (1 + W2)
    if renormalise:
        stretch(refined)
    return _all(refined, height, width)


def cell_means(maps: Tensor, height: int, width: int) -> Tensor:
    """Mean of the pixels that a cell of the grid touches."""
    images, classes, rows, columns = maps.shape
    out = torch.zeros(images, classes, height, width, dtype=maps.dtype)
    for b in range(images):
        for c in range(classes):
            for i in range(height):
                for j in range(width):
                    inside = [
                        float(maps[b, c, y, x])
                        for y in range(i * rows // height, math.ceil((i + 1) * rows / height))
                        for x in range(j * columns // width, math.ceil((j + 1) * columns / width))
                    ]
                    out[b, c, i, j] = math.fsum(inside) / len(inside)
    return out


def stretch(maps: Tensor) -> None:
    """Bring each map of each image to [0, 1], in place."""
    for image in maps:
        for c in range(len(image)):
            values = [float(v) for v in image[c].flatten()]
            low, high = min(values), max(values)
            image[c] = (image[c] - low) / (high - low + NORM_EPS)


def walk(
    activations: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    power: float,
    steps: int,
    renormalise: bool,
) -> Tensor:
    """Random walk on the grid, at the size of the activations."""
    maps = random_walk(cell_means(activations, *grid), affinity, power, steps)
    if renormalise:
        stretch(maps)
    return _all(maps, activations.shape[2], activations.shape[3])


def present_only(activations: Tensor, labels: Tensor) -> Tensor:
    """Absent classes 0, as those who call promise."""
    out = activations.clone()
    for b in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            if labels[b, c] == 0:
                out[b, c] = 0
    return out


def par_label(
    activations: Tensor,
    images: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    high: float,
    low: float,
    par_scale: float,
    renormalise: bool,
) -> tuple[Tensor, Tensor]:
    """The label of PAR alone, and the maps that it was cut from."""
    maps = par(present_only(activations.double(), labels), images.double(), par_scale, renormalise)
    return two_threshold(maps, low, high, valid), maps


def mutual(
    activations: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    images: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    high: float,
    low: float,
    walk_power: float,
    walk_steps: int,
    renormalise: bool,
    par_scale: float,
) -> Mutual:
    """All labels; every class of the data set is computed, whether an image holds it or not."""
    known = present_only(activations.double(), labels)
    strong = reweighted(known, high)
    maps = [
        strong,
        par(strong, images.double(), par_scale, renormalise),
        walk(known, affinity.double(), grid, walk_power, walk_steps, renormalise),
    ]
    p1, p2, p3 = (two_threshold(m, low, high, valid) for m in maps)
    label = torch.full_like(p1, IGNORE)
    for b in range(label.shape[0]):
        for y in range(label.shape[1]):
            for x in range(label.shape[2]):
                if valid is None or valid[b, y, x]:
                    label[b, y, x] = mutual_complement(
                        int(p1[b, y, x]), int(p2[b, y, x]), int(p3[b, y, x]), labels.shape[1]
                    )
    return Mutual(p1, p2, p3, label, maps)
