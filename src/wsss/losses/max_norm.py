"""Max-normalised CAMs, as SEAM and FSL publish them."""

from __future__ import annotations

import torch
from torch import Tensor

#: keeps the division finite, as published
EPSILON = 1e-5


def max_norm(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """``relu(r - min r - 1e-5) / (max r - min r + 1e-5)`` with ``r = relu(maps)``.

    Minimum and maximum are those of each image and channel, with gradient.

    Args:
        maps: (B, C, h, w). Computed in float32, float64 stays.
        valid: (B, h, w) bool, False where a map's minimum is not looked for; maps are 0 there.

    Returns:
        (B, C, h, w) from 0 to 1.
    """
    positive = (maps if maps.dtype == torch.float64 else maps.float()).relu()
    high = positive.amax((2, 3), keepdim=True)
    inside = positive if valid is None else positive.where(valid[:, None], high)
    low = inside.amin((2, 3), keepdim=True)
    return (positive - low - EPSILON).relu() / (high - low + EPSILON)
