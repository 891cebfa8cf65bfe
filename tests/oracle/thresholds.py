"""Threshold searches (eq. 6) by trying every cut, and a plain EM for the two Gaussians.

A cut is an interval ``(low, high]``: ``low`` is the largest background value and ``high`` the
smallest foreground value, so every threshold inside it splits the data in the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Cut = tuple[float, float]


def _best_cut(values: Sequence[float], cost: Callable[[list[float], list[float]], float]) -> Cut:
    """The cut between two distinct values with the smallest cost."""
    ordered = sorted(values)
    distinct = sorted(set(ordered))
    best_cost, best = math.inf, (math.nan, math.nan)
    for low, high in pairwise(distinct):
        background = [v for v in ordered if v <= low]
        foreground = [v for v in ordered if v >= high]
        value = cost(background, foreground)
        if value < best_cost:
            best_cost, best = value, (low, high)
    return best


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


def otsu(values: Sequence[float]) -> Cut:
    """The cut with the smallest within-class variance."""
    return _best_cut(values, lambda bg, fg: len(bg) * _variance(bg) + len(fg) * _variance(fg))


def min_error(values: Sequence[float]) -> Cut:
    """The cut with the smallest Kittler-Illingworth criterion.

    J = 1 + sum over sides of P (log variance - 2 log P): minus twice the mean log-likelihood of
    eq. 6 with the parameters of the two sides, up to a constant. A side of one value has no
    Gaussian and is no cut.
    """
    count = len(values)

    def cost(background: list[float], foreground: list[float]) -> float:
        total = 1.0
        for side in (background, foreground):
            variance = _variance(side)
            if variance == 0:
                return math.inf
            share = len(side) / count
            total += share * (math.log(variance) - 2 * math.log(share))
        return total

    return _best_cut(values, cost)


def gaussian_mixture(
    values: Sequence[float], tied: bool, steps: int = 200
) -> tuple[list[float], list[float], list[float]]:
    """(weights, means, variances) of two Gaussians by EM from the halves around the middle."""
    middle = (min(values) + max(values)) / 2
    memberships = [(0.0, 1.0) if v >= middle else (1.0, 0.0) for v in values]
    weights, means, variances = [0.5, 0.5], [0.0, 1.0], [1.0, 1.0]
    for _ in range(steps):
        for k in (0, 1):
            mass = math.fsum(m[k] for m in memberships)
            weights[k] = mass / len(values)
            means[k] = math.fsum(m[k] * v for m, v in zip(memberships, values, strict=True)) / mass
            spread = math.fsum(
                m[k] * (v - means[k]) ** 2 for m, v in zip(memberships, values, strict=True)
            )
            variances[k] = spread / mass
        if tied:
            shared = weights[0] * variances[0] + weights[1] * variances[1]
            variances = [shared, shared]
        memberships = []
        for v in values:
            densities = [
                weights[k]
                / math.sqrt(variances[k])
                * math.exp(-0.5 * (v - means[k]) ** 2 / variances[k])
                for k in (0, 1)
            ]
            total = densities[0] + densities[1]
            memberships.append((densities[0] / total, densities[1] / total))
    return weights, means, variances


def gmm_crossing(values: Sequence[float], tied: bool, grid: int = 20000) -> float:
    """Where the posteriors of the fitted Gaussians cross between their means; NaN if nowhere.

    Found by walking a fine grid from the background's mean to the foreground's.
    """
    weights, means, variances = gaussian_mixture(values, tied)

    def lead(v: float) -> float:
        """Log posterior odds of foreground over background."""
        terms = [
            math.log(weights[k])
            - 0.5 * math.log(variances[k])
            - 0.5 * (v - means[k]) ** 2 / variances[k]
            for k in (0, 1)
        ]
        return terms[1] - terms[0]

    for step in range(grid):
        left = means[0] + (means[1] - means[0]) * step / grid
        right = means[0] + (means[1] - means[0]) * (step + 1) / grid
        if lead(left) < 0 <= lead(right):
            return (left + right) / 2
    return math.nan


class Queue:
    """The dynamic threshold with its queue: a list of batches, fitted anew at every update."""

    def __init__(
        self,
        fit: Callable[[list[float]], float],
        length: int,
        minimum: float = 0.1,
        maximum: float = 0.9,
        momentum: float = 0.99,
        initial: float = 0.5,
    ) -> None:
        self.fit = fit
        self.batches: deque[list[float]] = deque(maxlen=length)
        self.minimum, self.maximum, self.momentum = minimum, maximum, momentum
        self.value = initial
        self.fitted = False

    def update(self, confidence: Tensor, valid: Tensor | None = None) -> float:
        """Append the valid values, fit, clamp, smooth; a fit that is NaN changes nothing."""
        keep = torch.ones_like(confidence, dtype=torch.bool) if valid is None else valid
        self.batches.append(
            [v for v, ok in zip(confidence.flatten().tolist(), keep.flatten(), strict=True) if ok]
        )
        found = self.fit([v for batch in self.batches for v in batch])
        if not math.isnan(found):
            found = min(max(found, self.minimum), self.maximum)
            self.value = (
                self.momentum * self.value + (1 - self.momentum) * found if self.fitted else found
            )
            self.fitted = True
        return self.value
