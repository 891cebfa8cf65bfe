"""What is taken for what: the largest entries of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Confusion(NamedTuple):
    """Pixels of one class that were given to another.

    Attributes:
        truth: name of the class that they are.
        predicted: name of the class that they were given.
        share: of all pixels of the true class, in percent.
        pixels: their number.
    """

    truth: str
    predicted: str
    share: float
    pixels: int


def shares(matrix: ArrayLike) -> NDArray[np.float64]:
    """Each row as percentages of its sum, ``100 M[t, p] / sum_k M[t, k]``; NaN where that is 0.

    Args:
        matrix: (K, K) pixel counts, truth in rows.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    total = counts.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return 100 * counts / total


def top_confusions(matrix: ArrayLike, classes: Sequence[str], most: int = 10) -> list[Confusion]:
    """The largest confusions by their share of the true class's pixels, at most ``most``.

    Args:
        matrix: (K, K) pixel counts, truth in rows.
        classes: K names, background first.
        most: how many to give.

    Raises:
        ValueError: the matrix does not fit the classes.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"a matrix of {counts.shape} for {len(classes)} classes.")
    share = shares(counts)
    found = [
        Confusion(classes[t], classes[p], float(share[t, p]), int(counts[t, p]))
        for t, p in zip(*counts.nonzero(), strict=True)
        if t != p
    ]
    return sorted(found, key=lambda c: (-c.share, -c.pixels))[:most]
