"""A made batch, and a step's total, for the tests of all methods."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wsss.data.batch import Batch
from wsss.methods.base import Method


def batch(height: int = 48, width: int = 64, labels: list[list[int]] | None = None) -> Batch:
    """Two images of noise, three classes; the left quarter of the second is padding."""
    generator = torch.Generator().manual_seed(1)
    weak = torch.rand(2, 3, height, width, generator=generator)
    valid = torch.ones(2, height, width, dtype=torch.bool)
    valid[1, :, : width // 4] = False
    return Batch(
        weak=weak,
        strong=weak * 0.8,
        labels=torch.tensor(labels or [[1, 0, 0], [0, 1, 1]], dtype=torch.float32),
        valid=valid,
        names=["a", "b"],
        index=torch.arange(2),
    )


def total(method: Method, terms: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum that training minimises."""
    weights = method.loss_weights()
    return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
