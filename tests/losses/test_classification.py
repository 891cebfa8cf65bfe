"""``classification_loss`` against its oracle (eq. 1)."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracle import losses as oracle
from tests.oracle.compare import TOLERANCE, assert_matches_oracle
from wsss.losses import classification_loss

DTYPES = list(TOLERANCE)
LABELS = {
    "mixed": [[1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 1]],
    "none": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "all": [[1, 1, 1, 1]],
    "one_class": [[1], [0]],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LABELS)
def test_value_and_gradient(case: str, dtype: torch.dtype) -> None:
    labels = torch.tensor(LABELS[case], dtype=torch.float32)
    logits = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0)) * 4
    assert_matches_oracle(
        lambda z: classification_loss(z, labels),
        lambda z: oracle.classification(z, labels),
        logits.double(),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1.0, 0.0]])
    logits = torch.tensor([[-1000.0, 1000.0]], dtype=torch.float64)
    assert_matches_oracle(
        lambda z: classification_loss(z, labels),
        lambda z: oracle.classification(z, labels),
        logits,
        dtype,
    )


def test_zero_logits_cost_log_two() -> None:
    loss = classification_loss(torch.zeros(3, 5), torch.eye(5)[:3])
    assert loss.item() == pytest.approx(math.log(2))


def test_gradcheck() -> None:
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: classification_loss(z, labels), logits.requires_grad_()
    )
