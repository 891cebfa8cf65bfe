"""Compare a loss with its oracle: value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]

#: Relative tolerances. In float64 only the order of summation may differ; bfloat16 keeps 8 bits,
#: so one rounding of the gradient on its way out is up to 2**-9 of its size.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2}


def value_and_gradient(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """The 0-dim loss at ``x`` and its gradient by ``x``."""
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def assert_matches_oracle(
    library: Loss, oracle: Loss, x: Tensor, dtype: torch.dtype = torch.float64
) -> None:
    """``library`` in ``dtype`` against ``oracle`` in float64 on the same rounded numbers.

    The loss must come back as float32 (float64 for float64 input), the gradient in ``dtype``.
    The gradient's tolerance is relative to its largest entry.
    """
    tolerance = TOLERANCE[dtype]
    rounded = x.to(dtype)
    expected, expected_gradient = value_and_gradient(oracle, rounded.double())
    value, gradient = value_and_gradient(library, rounded)
    assert value.dim() == 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance * 1e-2)
    # the floor is for gradients that cancel to rounding errors, as those of constant maps
    scale = max(expected_gradient.abs().max().item(), 1e-4)
    torch.testing.assert_close(
        gradient.double() / scale, expected_gradient / scale, rtol=0, atol=tolerance
    )
