"""Patch-token contrast: tokens of equal labels alike, of unequal ones orthogonal (ToCo)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.distributed import mean_over_ranks, world_size
from wsss.pseudo.labels import IGNORE_INDEX


def token_contrast_loss(features: Tensor, label: Tensor) -> Tensor:
    r"""Patch-token contrast, against tokens that grow alike (ToCo, Ru et al., CVPR 2023).

    .. math::
        L = \tfrac12 \Big(1 - \frac{1}{n^+ + 1} \sum_{S^+} |\cos|\Big)
            + \tfrac12\, \frac{1}{n^- + 1} \sum_{S^-} |\cos|

    over the ordered pairs of two tokens of one image: positive with equal labels, two of
    background among them, negative with unequal ones. Tokens labelled 255 and the diagonal are
    left out. Sums and counts are of the whole batch, over all ranks, as published: an image with
    more decided tokens has more weight.

    Args:
        features: (B, D, h, w) final patch tokens; carries the gradient. Computed in float32, also
            under autocast; float64 stays.
        label: (B, h, w) label on the grid of tokens, 0 background, 1..C, 255.

    Returns:
        0-dimensional float tensor; 0.5 with a zero gradient where there are no pairs.

    Raises:
        ValueError: shapes do not fit together.
    """
    if features.dim() != 4 or label.shape != (features.shape[0], *features.shape[2:]):
        raise ValueError(
            f"features {tuple(features.shape)} and label {tuple(label.shape)}: expected "
            "(B, D, h, w) and (B, h, w)."
        )
    if features.dtype != torch.float64:
        features = features.float()
    tokens = F.normalize(features.flatten(2), dim=1, eps=1e-8)
    with torch.autocast(features.device.type, enabled=False):
        similarity = (tokens.transpose(1, 2) @ tokens).abs()  # (B, N, N)
    label = label.flatten(1)
    known = label != IGNORE_INDEX
    both = known[:, :, None] & known[:, None, :]
    both = both & ~torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    same = label[:, :, None] == label[:, None, :]
    sides = torch.stack([both & same, both & ~same])
    # The mean of counts and ones over ranks: averaged gradients are those of one rank.
    counts = mean_over_ranks(sides.flatten(1).sum(1).to(similarity.dtype)) + 1 / world_size()
    positive, negative = (similarity * sides).flatten(1).sum(1) / counts
    return 0.5 * (1 - positive) + 0.5 * negative
