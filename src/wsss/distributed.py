"""Normalisers that make a loss on N ranks equal to the same loss on one.

DDP averages gradients over ranks. A loss ``sum / count`` whose count differs between ranks
must therefore divide by the *mean of the counts over ranks*, not by its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of ``value`` over all ranks, without gradient; ``value`` itself on one rank."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of ``value`` over all ranks, without gradient; ``value`` itself on one rank."""
    return sum_over_ranks(value) / world_size() if world_size() > 1 else value


def normalised_sum(total: Tensor, count: Tensor) -> Tensor:
    """``total / count`` with the count averaged over ranks, and 0 where nothing was counted.

    Args:
        total: sum over this rank's elements, carries the gradient.
        count: number of this rank's elements, same shape as ``total``.
    """
    count = mean_over_ranks(count.to(total.dtype))
    # 1 / world size is the smallest mean of a count that is not 0 everywhere.
    return total / torch.clamp(count, min=1.0 / world_size())
