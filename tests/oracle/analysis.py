"""The analysis figures by looking at one pixel at a time; nothing is binned but what is asked for.

A pixel is (confidence nu, strongest class 0..C-1, true label 0..C or 255).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tests.oracle.labels import IGNORE, perplexity

Pixel = tuple[float, int, int]


def label(pixel: Pixel, xi: float) -> int:
    """Eq. 3 for one pixel."""
    nu, strongest, _ = pixel
    return strongest + 1 if nu >= xi else 0


def scored(pixels: Sequence[Pixel]) -> list[Pixel]:
    """The pixels that are not void."""
    return [pixel for pixel in pixels if pixel[2] != IGNORE]


def accuracy(pixels: Sequence[Pixel], xi: float) -> float:
    """Share of the pixels whose label is the true one; NaN of none."""
    kept = scored(pixels)
    right = 0
    for pixel in kept:
        if label(pixel, xi) == pixel[2]:
            right += 1
    return right / len(kept) if kept else math.nan


def mean_iou(pixels: Sequence[Pixel], xi: float, num_classes: int) -> float:
    """Mean over the labels 0..C that truth or prediction holds."""
    values = []
    for c in range(num_classes + 1):
        both = either = 0
        for pixel in scored(pixels):
            predicted, true = label(pixel, xi) == c, pixel[2] == c
            both += predicted and true
            either += predicted or true
        if either:
            values.append(both / either)
    return sum(values) / len(values) if values else math.nan


def between(
    pixels: Sequence[Pixel], value: Callable[[float], float], low: float, high: float
) -> list[Pixel]:
    """The scored pixels whose ``value(nu)`` is in [low, high)."""
    return [pixel for pixel in scored(pixels) if low <= value(pixel[0]) < high]


def low_perplexity(
    pixels: Sequence[Pixel], xi: float, limit: float, alpha: float, beta: float
) -> list[bool]:
    """Whether each pixel is in Omega (below eq. 9)."""
    return [perplexity(nu, xi, alpha, beta) <= limit for nu, _, _ in pixels]


def accuracy_of_share(
    pixels: Sequence[Pixel], xi: float, share: float, alpha: float, beta: float
) -> float:
    """Expected accuracy of the ``share`` of the pixels with the lowest perplexity.

    A negative share takes those with the highest. Where the border falls among pixels of equal
    perplexity, any of them may be taken: each counts by the chance that it is.
    """
    values = [(perplexity(p[0], xi, alpha, beta), label(p, xi) == p[2]) for p in scored(pixels)]
    values.sort(key=lambda v: v[0], reverse=share < 0)
    wanted = abs(share) * len(values)
    right = taken = 0.0
    for p in dict.fromkeys(value for value, _ in values):
        tied = [correct for value, correct in values if value == p]
        chance = min(1.0, (wanted - taken) / len(tied))
        right += chance * sum(tied)
        taken += chance * len(tied)
        if taken >= wanted - 1e-12:
            break
    return right / wanted


def separation(pixels: Sequence[Pixel], xi: float, alpha: float, beta: float) -> float:
    """How often a right pixel has a lower perplexity than a wrong one; a tie counts half."""
    right, wrong = [], []
    for pixel in scored(pixels):
        value = perplexity(pixel[0], xi, alpha, beta)
        (right if label(pixel, xi) == pixel[2] else wrong).append(value)
    if not right or not wrong:
        return math.nan
    total = 0.0
    for r in right:
        for w in wrong:
            total += 1.0 if r < w else 0.5 if r == w else 0.0
    return total / (len(right) * len(wrong))


def reliability_of_label(
    pixels: Sequence[Pixel], xi: float, true: int, alpha: float, beta: float
) -> tuple[float, float, float]:
    """Share by weight of the right pixels of a true label; mean weight of right and wrong ones.

    The weight (eq. 5) is 1 / P over its mean over all scored pixels.
    """
    kept = scored(pixels)
    reliability = [1 / perplexity(nu, xi, alpha, beta) for nu, _, _ in kept]
    mean = sum(reliability) / len(reliability)
    right, wrong = [], []
    for pixel, value in zip(kept, reliability, strict=True):
        if pixel[2] == true:
            (right if label(pixel, xi) == true else wrong).append(value / mean)
    every = sum(right) + sum(wrong)
    return (
        sum(right) / every if every else math.nan,
        sum(right) / len(right) if right else math.nan,
        sum(wrong) / len(wrong) if wrong else math.nan,
    )
