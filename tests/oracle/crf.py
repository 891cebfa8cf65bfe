"""Mean-field inference in a fully connected CRF, every pair of pixels one by one.

Krähenbühl and Koltun, NIPS 2011: exact Gaussian kernels, Potts labels. As their code does, each
kernel ``k`` is normalised on both sides by the square root of its row sums, and those sums and the
message to a pixel include the pixel itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Pixel = tuple[int, int]
Kernel = Callable[[Pixel, Pixel], float]
Maps = list[list[list[float]]]


def gaussian(sxy: float) -> Kernel:
    """Neighbouring pixels take the same label."""

    def kernel(p: Pixel, q: Pixel) -> float:
        return math.exp(-((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2) / (2 * sxy**2))

    return kernel


def bilateral(sxy: float, srgb: float, image: Sequence[Sequence[Sequence[int]]]) -> Kernel:
    """Pixels that are near and alike in colour take the same label."""

    def kernel(p: Pixel, q: Pixel) -> float:
        space = (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2
        a, b = image[p[0]][p[1]], image[q[0]][q[1]]
        colour = sum((u - v) ** 2 for u, v in zip(a, b, strict=True))
        return math.exp(-space / (2 * sxy**2) - colour / (2 * srgb**2))

    return kernel


def _softmax(values: Sequence[float]) -> list[float]:
    largest = max(values)
    exponentials = [math.exp(v - largest) for v in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def mean_field(unary: Maps, terms: Sequence[tuple[float, Kernel]], iterations: int) -> Maps:
    """Probabilities (C, H, W) from energies (C, H, W) and (compatibility, kernel) pairs."""
    classes, height, width = len(unary), len(unary[0]), len(unary[0][0])
    pixels = [(y, x) for y in range(height) for x in range(width)]
    energies = {p: [unary[c][p[0]][p[1]] for c in range(classes)] for p in pixels}
    belief = {p: _softmax([-e for e in energies[p]]) for p in pixels}
    weights: dict[tuple[Pixel, Pixel], float] = dict.fromkeys(
        ((p, q) for p in pixels for q in pixels), 0.0
    )
    for compatibility, kernel in terms:
        values = {(p, q): kernel(p, q) for p in pixels for q in pixels}
        row = {p: math.fsum(values[p, q] for q in pixels) for p in pixels}
        for (p, q), value in values.items():
            weights[p, q] += compatibility * value / math.sqrt(row[p] * row[q])
    for _ in range(iterations):
        following = {}
        for p in pixels:
            message = [
                math.fsum(weights[p, q] * belief[q][c] for q in pixels) for c in range(classes)
            ]
            following[p] = _softmax([m - e for m, e in zip(message, energies[p], strict=True)])
        belief = following
    return [
        [[belief[y, x][c] for x in range(width)] for y in range(height)] for c in range(classes)
    ]
