"""AffinityNet's loss: neighbouring cells of one class alike, those of two classes not.

Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
Supervised Semantic Segmentation" (CVPR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wsss.distributed import normalised_sum
from wsss.pseudo.labels import IGNORE_INDEX
from wsss.pseudo.pixel_affinity import RADIUS, pair_distance, pair_ends, pair_offsets

#: in the logarithms, as published
EPSILON = 1e-5
#: groups of pairs, and the weights of their means
GROUPS = {"foreground": 0.25, "background": 0.25, "negative": 0.5}


def grid_labels(mask: Tensor, cell: tuple[int, int]) -> Tensor:
    """Labels of the cells of a feature grid: what more than half of a cell's pixels hold, else 255.

    AffinityNet averages the soft maps of two CRFs over the cells and takes the largest; on the
    hard labels of an image with one class that is this rule. On exported masks with several
    classes it leaves cells undecided that the average would still give to one.

    Args:
        mask: (B, H, W) integers 0..C and 255.
        cell: height and width of a cell in pixels. Cells that reach over the right or lower border
            have unknown pixels there.

    Returns:
        (B, ceil(H / cell), ceil(W / cell)) of the type of ``mask``.

    Example:
        >>> grid_labels(torch.tensor([[[1, 1, 0, 2], [1, 255, 0, 2]]]), (2, 2))
        tensor([[[  1, 255]]])
    """
    tall, wide = cell
    below, right = -mask.shape[-2] % tall, -mask.shape[-1] % wide
    mask = F.pad(mask, (0, right, 0, below), value=IGNORE_INDEX)
    blocks = mask.unflatten(2, (-1, wide)).unflatten(1, (-1, tall)).transpose(2, 3).flatten(3)
    # A value that fills more than half of a sorted row also stands in its middle.
    middle = blocks.sort(-1).values[..., (tall * wide - 1) // 2]
    share = (blocks == middle[..., None]).sum(-1)
    return torch.where(2 * share > tall * wide, middle, IGNORE_INDEX)


def pixel_affinity_loss(features: Tensor, labels: Tensor, radius: int = RADIUS) -> Tensor:
    r"""Cross-entropy of the affinities of neighbouring cells (AffinityNet).

    .. math::
        L = \tfrac14 \operatorname*{mean}_{P_{fg}} -\log(W + \epsilon)
          + \tfrac14 \operatorname*{mean}_{P_{bg}} -\log(W + \epsilon)
          + \tfrac12 \operatorname*{mean}_{P_-} -\log(1 - W + \epsilon)

    with :math:`W_{ij} = \exp(-\tfrac1D \lVert f_i - f_j \rVert_1)` and :math:`\epsilon = 10^{-5}`.
    The groups are the pairs of cells nearer to each other than ``radius`` of one class, of
    background, and of unequal labels. Pairs with an unknown end are in none. All pairs of the batch
    count alike.

    The paper writes W without 1 / D and the logarithms without :math:`\epsilon`; its code has them.
    In its code cells near the left, right and lower border start no pair; here they do.

    Args:
        features: (B, D, h, w); carries the gradient. Computed in float32, float64 stays.
        labels: (B, h, w), 0 background, 1..C, 255 unknown.
        radius: in cells.

    Returns:
        0-dimensional float tensor; a group without a pair counts 0.

    Raises:
        ValueError: the grids differ, or a radius below 2.
    """
    totals = features.new_zeros(3, dtype=_precision(features)) + _precise(features)[:, :0].sum()
    counts = torch.zeros(3, dtype=torch.int64, device=features.device)
    for distance, groups in _pairs(features, labels, radius):
        affinity = (-distance).exp()
        alike = -(affinity + EPSILON).log()
        # 1 - W where W is near 1 would be rounded away.
        unlike = -(EPSILON - torch.expm1(-distance)).log()
        losses = (alike, alike, unlike)
        totals = totals + torch.stack(
            [(loss * group).sum() for loss, group in zip(losses, groups, strict=True)]
        )
        counts = counts + torch.stack([group.sum() for group in groups])
    weights = torch.tensor([*GROUPS.values()], dtype=totals.dtype, device=totals.device)
    return (weights * normalised_sum(totals, counts)).sum()


@torch.no_grad()
def pair_hits(features: Tensor, labels: Tensor, radius: int = RADIUS) -> tuple[Tensor, Tensor]:
    """How many pairs of each group lie on the right side of an affinity of 0.5, and of how many.

    Args:
        features, labels, radius: see :func:`pixel_affinity_loss`.

    Returns:
        Two (3,) int64 tensors in the order of :data:`GROUPS`.

    Raises:
        ValueError: see there.
    """
    hits = torch.zeros(3, dtype=torch.int64, device=features.device)
    counts = hits.clone()
    for distance, groups in _pairs(features, labels, radius):
        alike = distance < math.log(2)
        right = (alike, alike, ~alike)
        hits += torch.stack([(r & group).sum() for r, group in zip(right, groups, strict=True)])
        counts += torch.stack([group.sum() for group in groups])
    return hits, counts


def _pairs(
    features: Tensor, labels: Tensor, radius: int
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Distances (B, h', w') of the pairs of each offset, and which are in each of the groups."""
    if features.dim() != 4 or labels.shape != (features.shape[0], *features.shape[2:]):
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)}: expected "
            "(B, D, h, w) and (B, h, w)."
        )
    features = _precise(features)
    for offset in pair_offsets(radius):
        first, second = pair_ends(labels, offset)
        if not first.numel():
            continue
        # Computed again for the gradient: each of 34 differences is as large as the features.
        distance = checkpoint(
            pair_distance, features, offset, use_reentrant=False, preserve_rng_state=False
        )
        known = (first != IGNORE_INDEX) & (second != IGNORE_INDEX)
        same, background = first == second, first == 0
        yield distance, (known & same & ~background, known & same & background, known & ~same)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _precise(x: Tensor) -> Tensor:
    return x.to(_precision(x))
