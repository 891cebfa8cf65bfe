"""``seg2cam_loss`` against its oracle (eq. 8)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracle import losses as oracle
from tests.oracle.compare import TOLERANCE, assert_matches_oracle, value_and_gradient
from wsss.losses import seg2cam_loss

DTYPES = list(TOLERANCE)
# name: (foreground classes, CAM grid, SPL size)
SIZES = {
    "same_size": (3, (4, 4), (4, 4)),
    "non_square": (2, (2, 4), (8, 16)),
    "uneven_ratio": (2, (3, 2), (7, 9)),
    "one_pixel": (3, (1, 1), (1, 1)),
    "one_token": (2, (1, 1), (4, 6)),
    "spl_smaller": (2, (4, 6), (2, 3)),
    "one_class": (1, (2, 3), (4, 6)),
}


def _inputs(name: str) -> tuple[Tensor, Tensor]:
    classes, grid, size = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    cam = torch.randn(2, classes, *grid, generator=generator, dtype=torch.float64) * 3
    logits = torch.randn(2, classes + 1, *size, generator=generator, dtype=torch.float64) * 3
    return cam, torch.softmax(logits, dim=1)


@pytest.mark.parametrize("relu", [False, True], ids=["paper", "relu"])
@pytest.mark.parametrize("name", SIZES)
def test_value_and_gradient(name: str, relu: bool) -> None:
    cam, spl = _inputs(name)
    assert_matches_oracle(
        lambda m: seg2cam_loss(m, spl, relu), lambda m: oracle.seg2cam(m, spl, relu), cam
    )


@pytest.mark.parametrize("relu", [False, True], ids=["paper", "relu"])
@pytest.mark.parametrize("target", ["background", "foreground", "one_hot"])
def test_hard_targets(target: str, relu: bool) -> None:
    """An image without foreground, one of all foreground, and one-hot maps of every class."""
    cam, spl = _inputs("non_square")
    if target == "one_hot":
        spl = torch.nn.functional.one_hot(spl.argmax(1), spl.shape[1]).movedim(-1, 1).double()
    else:
        spl = torch.zeros_like(spl)
        spl[:, 0 if target == "background" else 1] = 1
    assert_matches_oracle(
        lambda m: seg2cam_loss(m, spl, relu), lambda m: oracle.seg2cam(m, spl, relu), cam
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["paper", "relu"])
def test_low_precision(relu: bool, dtype: torch.dtype) -> None:
    cam, spl = _inputs("non_square")
    spl = spl.float()
    assert_matches_oracle(
        lambda m: seg2cam_loss(m, spl, relu), lambda m: oracle.seg2cam(m, spl, relu), cam, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    cam = torch.tensor([500.0, -500.0], dtype=torch.float64).view(1, 2, 1, 1)
    spl = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert_matches_oracle(
        lambda m: seg2cam_loss(m, spl), lambda m: oracle.seg2cam(m, spl), cam, dtype
    )


def test_zero_logits_cost_log_two() -> None:
    cam, spl = _inputs("non_square")
    assert seg2cam_loss(torch.zeros_like(cam), spl).item() == pytest.approx(math.log(2))


def test_the_background_channel_has_no_say() -> None:
    cam, spl = _inputs("same_size")
    other = spl.clone()
    other[:, 0] = 0.123
    torch.testing.assert_close(seg2cam_loss(cam, other), seg2cam_loss(cam, spl))


def test_relu_stops_the_gradient_below_zero() -> None:
    cam, spl = _inputs("same_size")
    _, gradient = value_and_gradient(lambda m: seg2cam_loss(m, spl, relu=True), cam)
    assert torch.equal(gradient[cam < 0], torch.zeros_like(gradient[cam < 0]))
    assert (gradient[cam > 0] != 0).all()


def test_gradcheck() -> None:
    cam, spl = _inputs("uneven_ratio")
    assert torch.autograd.gradcheck(lambda m: seg2cam_loss(m, spl), cam.requires_grad_())
