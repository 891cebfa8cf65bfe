"""Affinities of neighbouring cells of a feature map, and class scores spread along them.

Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
Supervised Semantic Segmentation" (AffinityNet, CVPR 2018).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Cells nearer to each other than this are a pair, as published.
RADIUS = 5


def pair_offsets(radius: int = RADIUS) -> list[tuple[int, int]]:
    """Steps (dy, dx) from one cell of a pair to the other, each pair in one direction.

    Args:
        radius: the Euclidean distance is smaller; 34 steps for 5.

    Raises:
        ValueError: below 2 there are none.

    Example:
        >>> pair_offsets(2)
        [(0, 1), (1, -1), (1, 0), (1, 1)]
    """
    if radius < 2:
        raise ValueError(f"radius={radius}: give 2 or more.")
    return [
        (dy, dx)
        for dy in range(radius)
        for dx in range(1 - radius, radius)
        if (dy, dx) > (0, 0) and dy * dy + dx * dx < radius * radius
    ]


def pair_ends(x: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Views of all cells that a step leads from, and of those it leads to.

    Args:
        x: (..., h, w).
        offset: (dy, dx) of :func:`pair_offsets`.

    Returns:
        Two of (..., h - dy, w - abs(dx)); empty where the grid is smaller than the step.
    """
    dy, dx = offset
    height, width = max(0, x.shape[-2] - dy), max(0, x.shape[-1] - abs(dx))
    left, right = max(0, -dx), max(0, dx)
    first = x[..., :height, left : left + width]
    return first, x[..., dy : dy + height, right : right + width]


def pair_distance(features: Tensor, offset: tuple[int, int]) -> Tensor:
    """Mean absolute difference of the features of both ends of each pair.

    The affinity is ``W = exp(-distance)``. The paper writes the L1 norm; its code takes the mean
    over channels, and so do we, or W would depend on their number.

    Args:
        features: (B, D, h, w).
        offset: (dy, dx) of :func:`pair_offsets`.

    Returns:
        (B, h - dy, w - abs(dx)).
    """
    first, second = pair_ends(features, offset)
    return (first - second).abs().mean(1)


def affinity_walk(
    scores: Tensor, features: Tensor, radius: int = RADIUS, beta: float = 8.0, logt: int = 6
) -> Tensor:
    r"""Spread class scores by a random walk between cells of like features (AffinityNet).

    .. math::
        M' = M T^t, \qquad T = W^{\circ\beta} D^{-1}, \qquad t = 2^{\mathrm{logt}}

    with the affinities W of :func:`pair_distance` between cells nearer than ``radius``, 1 of a cell
    to itself and 0 elsewhere, and D the sums of the columns of :math:`W^{\circ\beta}`. Its code
    squares T ``logt`` times. Here t steps are taken one after the other, which is the same and,
    with about 4 radius^2 neighbours a cell instead of all N, less work: memory grows with N, where
    the dense matrix of a 56 x 56 grid has 10 million entries and one of 128 x 128 has 268 million.

    In its code cells near the left, right and lower border start no pair; here they do.

    Args:
        scores: (B, K, h, w) class scores, one for the background among them.
        features: (B, D, h, w) of the same grid, from AffinityNet.
        radius: see above, in cells.
        beta: higher leaves less to weak affinities.
        logt: logarithm to base 2 of the number of steps; the paper takes 8, later work 6.

    Returns:
        (B, K, h, w) float32, also under autocast; float64 for float64 features. A constant channel
        stays constant.

    Raises:
        ValueError: the grids differ, ``beta`` is not positive, ``logt`` is negative, or a radius
            below 2.
    """
    grids = [(x.shape[0], *x.shape[2:]) for x in (scores, features)]
    if scores.dim() != 4 or grids[0] != grids[1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} and features {tuple(features.shape)}: expected "
            "(B, K, h, w) and (B, D, h, w)."
        )
    if not beta > 0:
        raise ValueError(f"beta={beta}: give a positive number.")
    if logt < 0:
        raise ValueError(f"logt={logt}: give 0 or more.")
    if features.dtype != torch.float64:
        features = features.float()
    transition = _transition(features, radius, beta)[:, None]
    images, channels, height, width = scores.shape
    values, side = scores.to(features.dtype), 2 * radius - 1
    for _ in range(2**logt):
        windows = F.unfold(values.flatten(0, 1)[:, None], side, padding=radius - 1)
        windows = windows.view(images, channels, side * side, height * width)
        values = (windows * transition).sum(2).view(scores.shape)
    return values


def _transition(features: Tensor, radius: int, beta: float) -> Tensor:
    """(B, S, N): what each of N cells takes of each place of the window of side 2 radius - 1."""
    images, _, height, width = features.shape
    side, centre = 2 * radius - 1, radius - 1
    weights = features.new_zeros(images, side, side, height, width)
    weights[:, centre, centre] = 1
    for dy, dx in pair_offsets(radius):
        strength = (-beta * pair_distance(features, (dy, dx))).exp()
        # Of a pair each end takes from the other.
        pair_ends(weights[:, centre + dy, centre + dx], (dy, dx))[0].copy_(strength)
        pair_ends(weights[:, centre - dy, centre - dx], (dy, dx))[1].copy_(strength)
    weights = weights.view(images, side * side, height * width)
    return weights / weights.sum(1, keepdim=True)
