"""AffinityNet (CVPR 2018) in loops: pairs of cells, their loss, the walk, labels to train it on.

Losses and walks are float64 tensors that autograd can differentiate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.oracle.resize import bilinear

IGNORE = 255
EPSILON = 1e-5

Cell = tuple[int, int]


def near(a: Cell, b: Cell, radius: int) -> bool:
    """Whether two cells are nearer to each other than the radius."""
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2


def pairs(height: int, width: int, radius: int) -> list[tuple[Cell, Cell]]:
    """Every pair of different cells nearer than the radius, once."""
    cells = [(y, x) for y in range(height) for x in range(width)]
    return [
        (cells[i], cells[j])
        for i in range(len(cells))
        for j in range(i)
        if near(cells[i], cells[j], radius)
    ]


def group(first: int, second: int) -> int | None:
    """0 a class twice, 1 background twice, 2 different; None with an unknown end."""
    if IGNORE in (first, second):
        return None
    if first != second:
        return 2
    return 1 if first == 0 else 0


def affinity(features: Tensor, a: Cell, b: Cell) -> Tensor:
    """exp of minus the mean absolute difference of the features (D, h, w) of two cells."""
    difference = features[:, a[0], a[1]] - features[:, b[0], b[1]]
    return (-difference.abs().sum() / len(difference)).exp()


def loss(features: Tensor, labels: Tensor, radius: int) -> Tensor:
    """1/4 mean over foreground pairs + 1/4 over background pairs + 1/2 over unequal ones."""
    sums: list[list[Tensor]] = [[], [], []]
    for b in range(features.shape[0]):
        for one, other in pairs(features.shape[2], features.shape[3], radius):
            kind = group(int(labels[b][one]), int(labels[b][other]))
            if kind is None:
                continue
            w = affinity(features[b], one, other)
            right = 1 - w if kind == 2 else w
            sums[kind].append(-(right + EPSILON).log())
    result = (features * 0).sum()
    for terms, weight in zip(sums, (0.25, 0.25, 0.5), strict=True):
        if terms:
            result = result + weight * sum(terms) / len(terms)
    return result


def shares(features: Tensor, labels: Tensor, radius: int) -> list[float | None]:
    """Of each group the share of pairs whose affinity is on the right side of a half."""
    right, total = Counter[int](), Counter[int]()
    for b in range(features.shape[0]):
        for one, other in pairs(features.shape[2], features.shape[3], radius):
            kind = group(int(labels[b][one]), int(labels[b][other]))
            if kind is None:
                continue
            alike = affinity(features[b], one, other).item() > 0.5
            total[kind] += 1
            right[kind] += alike != (kind == 2)
    return [right[k] / total[k] if total[k] else None for k in range(3)]


def grid_labels(mask: Tensor, cell: tuple[int, int]) -> list[list[int]]:
    """Label of each cell of one mask (H, W): what more than half of its pixels hold.

    Cells that reach over the right or lower border have unknown pixels there.
    """
    height, width = mask.shape
    rows = []
    for top in range(0, height, cell[0]):
        row = []
        for left in range(0, width, cell[1]):
            counts: Counter[int] = Counter()
            for y in range(top, top + cell[0]):
                for x in range(left, left + cell[1]):
                    inside = y < height and x < width
                    counts[int(mask[y, x]) if inside else IGNORE] += 1
            label, most = counts.most_common(1)[0]
            row.append(label if 2 * most > cell[0] * cell[1] else IGNORE)
        rows.append(row)
    return rows


def walk(scores: Tensor, features: Tensor, radius: int, beta: float, logt: int) -> Tensor:
    """Scores (K, h, w) times T^(2^logt), T the columns of W^beta over their sums."""
    channels, height, width = scores.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    count = len(cells)
    transition = torch.zeros(count, count, dtype=torch.float64)
    for j in range(count):
        column = [
            float(affinity(features, cells[i], cells[j])) ** beta
            if near(cells[i], cells[j], radius)
            else 0.0
            for i in range(count)
        ]
        for i in range(count):
            transition[i, j] = column[i] / sum(column)
    for _ in range(logt):
        transition = transition @ transition
    return (scores.double().reshape(channels, count) @ transition).reshape(scores.shape)


def block_mean(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) averaged over equal blocks to (K, h, w)."""
    channels, height, width = scores.shape
    tall, wide = height // size[0], width // size[1]
    result = torch.zeros(channels, *size, dtype=torch.float64)
    for k in range(channels):
        for y in range(size[0]):
            for x in range(size[1]):
                block = scores[k, y * tall : (y + 1) * tall, x * wide : (x + 1) * wide]
                result[k, y, x] = block.double().mean()
    return result


def power_label(
    cam: Tensor,
    classes: Sequence[int],
    alphas: Sequence[float],
    size: tuple[int, int],
    refine: Callable[[Tensor], Tensor] | None = None,
    resize_first: bool = True,
) -> list[list[int]]:
    """Labels (H, W) of CAMs (K, h, w) with the background (1 - max)^alpha.

    The first alpha says which pixels are classes, the last which are background, and that wins;
    what neither says is undecided.
    """
    cam = bilinear(cam.double(), *size) if resize_first else cam.double()
    answers = []
    for alpha in alphas:
        background = (1 - cam.max(0).values).clamp(min=0) ** alpha
        scores = torch.cat([background[None], cam])
        scores = scores if refine is None else refine(scores)
        answers.append(bilinear(scores, *size).argmax(0))
    result = []
    for y in range(size[0]):
        row = []
        for x in range(size[1]):
            sure, maybe = int(answers[0][y, x]), int(answers[-1][y, x])
            if maybe == 0:
                row.append(0)
            else:
                row.append(classes[sure - 1] + 1 if sure > 0 else IGNORE)
        result.append(row)
    return result
