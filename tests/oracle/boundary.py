"""Boundary F by visiting every pixel, and by comparing every pair of boundary pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

Pixels = set[tuple[int, int]]


def boundary(rows: list[list[int]], label: int, void: Pixels) -> Pixels:
    """Pixels (y, x) of which the right, lower or lower-right neighbour is on the other side.

    A neighbour outside the image is none; neither is one where a side of the pair is ``void``.
    """
    height, width = len(rows), len(rows[0])
    found = set()
    for y in range(height):
        for x in range(width):
            for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
                if v >= height or u >= width or (y, x) in void or (v, u) in void:
                    continue
                if (rows[y][x] == label) != (rows[v][u] == label):
                    found.add((y, x))
    return found


def close(pixel: tuple[int, int], others: Pixels, radius: int) -> bool:
    """Whether a disk of ``radius`` around ``pixel`` holds one of ``others``, rim included."""
    y, x = pixel
    return any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others)


def boundary_f(
    pairs: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    ignore_index: int = 255,
    bound: float = 0.008,
    published: bool = False,
    void_as_background: bool = True,
) -> dict[str, list[float]]:
    """F, precision and recall of each foreground class over (prediction, target) maps (H, W)."""
    scores: dict[str, list[float]] = {"f": [], "precision": [], "recall": []}
    counted = [
        _count(p.tolist(), t.tolist(), num_classes, ignore_index, bound, void_as_background)
        for p, t in pairs
    ]
    for label in range(1, num_classes):
        predicted_right, predicted, found, there = (
            sum(image[label][k] for image in counted) for k in range(4)
        )
        if predicted == 0 and there == 0:
            precision = recall = f = 1.0 if published else math.nan
        else:
            precision = predicted_right / predicted if predicted else 0.0
            recall = found / there if there else 0.0
            f = 0.0
            if precision + recall > 0:
                f = 2 * precision * recall / (precision + recall)
        for name, value in (("f", f), ("precision", precision), ("recall", recall)):
            scores[name].append(value)
    return scores


def _count(
    prediction: list[list[int]],
    target: list[list[int]],
    num_classes: int,
    ignore_index: int,
    bound: float,
    void_as_background: bool,
) -> dict[int, tuple[int, int, int, int]]:
    """Of one image and class: matched and all predicted, matched and all true boundary pixels."""
    height, width = len(target), len(target[0])
    radius = math.ceil(bound * math.sqrt(height**2 + width**2))
    void = {(y, x) for y in range(height) for x in range(width) if target[y][x] == ignore_index}
    if void_as_background:
        target = [[0 if t == ignore_index else t for t in row] for row in target]
        void = set()
    result = {}
    for label in range(1, num_classes):
        predicted, true = boundary(prediction, label, void), boundary(target, label, void)
        # Next to void a match may be missing only because it lies where nothing is known.
        judged_predicted = [p for p in predicted if not close(p, void, radius)]
        judged_true = [p for p in true if not close(p, void, radius)]
        result[label] = (
            sum(close(p, true, radius) for p in judged_predicted),
            len(judged_predicted),
            sum(close(p, predicted, radius) for p in judged_true),
            len(judged_true),
        )
    return result
