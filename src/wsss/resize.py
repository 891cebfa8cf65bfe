"""Resizing, cheaper where more is known: of small maps, of a function of pixels, of labels.

Bilinear: ``align_corners=False``, without antialiasing, as ``torch.nn.functional.interpolate``. Its
backward is the most expensive part of CoSA's losses on a CPU, and not deterministic on a GPU;
for small maps two small matrices do the same in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def bilinear_taps(size: int, target: int) -> tuple[Tensor, Tensor]:
    """The two source positions of each target position and the weight of the second.

    Returns:
        positions (target, 2) int64 and weight (target,) float64, on the CPU.
    """
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * (size / target) - 0.5
    centre = centre.clamp(min=0)
    first = centre.floor().long().clamp(max=size - 1)
    second = (first + 1).clamp(max=size - 1)
    return torch.stack([first, second], dim=1), centre - first


@lru_cache(maxsize=64)
def bilinear_matrix(size: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(target, size) matrix that resizes one axis."""
    positions, weight = bilinear_taps(size, target)
    matrix = torch.zeros(target, size, dtype=torch.float64)
    matrix.scatter_add_(1, positions, torch.stack([1 - weight, weight], dim=1))
    return matrix.to(device=device, dtype=dtype)


def resize_small(x: Tensor, height: int, width: int) -> Tensor:
    """Resize (..., h, w) maps with small h and w to (..., height, width).

    Args:
        x: float32 or float64; computed in its own precision, also under autocast.
    """
    if x.shape[-2:] == (height, width):
        return x
    rows = bilinear_matrix(x.shape[-2], height, x.dtype, x.device)
    columns = bilinear_matrix(x.shape[-1], width, x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        # The wide axis last: the large result is written once.
        return torch.matmul(torch.matmul(rows, x), columns.T)


def resize_after(
    function: Callable[[Tensor], Tensor], x: Tensor, height: int, width: int
) -> Tensor:
    """``resize(function(x))``, with ``function`` computed only at the pixels that are looked at.

    Bilinear downsampling reads two rows and two columns for each target position, whatever the
    factor: from 448 to a grid of 28 that is one pixel in 64.

    Args:
        function: of single pixels: keeps the last two dimensions and mixes nothing along them.
        x: (..., H, W), floating point.
        height, width: target size.

    Returns:
        (..., height, width) in the function's precision.
    """
    rows, row_weight = bilinear_taps(x.shape[-2], height)
    columns, column_weight = bilinear_taps(x.shape[-1], width)
    picked = x.index_select(-2, rows.flatten().to(x.device))
    y = function(picked.index_select(-1, columns.flatten().to(x.device)))
    y = y.unflatten(-1, (width, 2))
    y = torch.lerp(y[..., 0], y[..., 1], column_weight.to(y))
    y = y.unflatten(-2, (height, 2))
    return torch.lerp(y[..., 0, :], y[..., 1, :], row_weight.to(y)[:, None])


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) of any dtype to (..., height, width): target i from ``floor(i * H / height)``."""
    rows = torch.arange(height, device=x.device) * x.shape[-2] // height
    columns = torch.arange(width, device=x.device) * x.shape[-1] // width
    return x[..., rows[:, None], columns]


def cell_centres(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) of any dtype to (..., h, w): the pixel at each cell's centre.

    A map that was enlarged from that grid comes back, which :func:`nearest`, at a cell's first
    pixel, would move by half a cell.
    """
    (height, width), (h, w) = x.shape[-2:], size
    rows = (2 * torch.arange(h, device=x.device) + 1) * height // (2 * h)
    columns = (2 * torch.arange(w, device=x.device) + 1) * width // (2 * w)
    return x[..., rows[:, None], columns]


def valid_on_grid(valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a grid have their centre on the image: (B, H, W) bool to (B, h, w)."""
    return valid if valid.shape[-2:] == size else cell_centres(valid, size)
