"""``cam2seg_loss`` against its oracle (eq. 5, plain and balanced)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.oracle import losses as oracle
from tests.oracle.compare import TOLERANCE, assert_matches_oracle, value_and_gradient
from wsss.losses import cam2seg_loss
from wsss.losses.cam2seg import upsample_log_softmax

DTYPES = list(TOLERANCE)
CLASSES = 3  # foreground


@dataclass
class Case:
    logits: Tensor
    label: Tensor
    weight: Tensor


def _labels(kind: str, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    if kind == "background_only":
        return torch.zeros(shape, dtype=torch.int64)
    if kind == "foreground_only":
        return torch.randint(1, CLASSES + 1, shape, generator=generator)
    if kind == "all_ignored":
        return torch.full(shape, 255)
    label = torch.randint(0, CLASSES + 1, shape, generator=generator)
    if kind == "some_ignored":
        label[torch.rand(shape, generator=generator) < 0.4] = 255
    return label


def _case(name: str) -> Case:
    """Label kind @ (label size) <- (logit size)."""
    generator = torch.Generator().manual_seed(0)
    kind, size, grid = {
        "all_classes": ("all_classes", (5, 7), (5, 7)),
        "some_ignored": ("some_ignored", (6, 4), (6, 4)),
        "background_only": ("background_only", (4, 5), (4, 5)),
        "foreground_only": ("foreground_only", (4, 5), (4, 5)),
        "all_ignored": ("all_ignored", (3, 4), (3, 4)),
        "one_pixel": ("foreground_only", (1, 1), (1, 1)),
        "one_token": ("all_classes", (4, 6), (1, 1)),
        "upsampled": ("some_ignored", (8, 12), (2, 3)),
        "upsampled_unevenly": ("all_classes", (7, 5), (3, 2)),
        "constant": ("all_classes", (4, 4), (2, 2)),
        "all_ignored_upsampled": ("all_ignored", (4, 4), (2, 2)),
    }[name]
    label = _labels(kind, (2, *size), generator)
    if kind == "all_classes":
        label[:, 0, : CLASSES + 1] = torch.arange(CLASSES + 1)
    logits = torch.randn(2, CLASSES + 1, *grid, generator=generator, dtype=torch.float64) * 3
    if name == "constant":
        logits = torch.full_like(logits, 1.5)
    weight = torch.rand(label.shape, generator=generator, dtype=torch.float64) * 2
    return Case(logits, label, weight)


CASES = [
    "all_classes",
    "some_ignored",
    "background_only",
    "foreground_only",
    "all_ignored",
    "one_pixel",
    "one_token",
    "upsampled",
    "upsampled_unevenly",
    "constant",
    "all_ignored_upsampled",
]


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, weighted: bool, balanced: bool) -> None:
    case = _case(name)
    weight = case.weight if weighted else None
    assert_matches_oracle(
        lambda s: cam2seg_loss(s, case.label, weight, balanced),
        lambda s: oracle.cam2seg(s, case.label, weight, balanced),
        case.logits,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("name", ["some_ignored", "upsampled", "all_ignored"])
def test_low_precision(name: str, balanced: bool, dtype: torch.dtype) -> None:
    case = _case(name)
    weight = case.weight.float()
    assert_matches_oracle(
        lambda s: cam2seg_loss(s, case.label, weight, balanced),
        lambda s: oracle.cam2seg(s, case.label, weight, balanced),
        case.logits,
        dtype,
    )


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_all_ignored_is_zero_with_a_zero_gradient(balanced: bool) -> None:
    case = _case("all_ignored_upsampled")
    value, gradient = value_and_gradient(
        lambda s: cam2seg_loss(s, case.label, case.weight, balanced), case.logits
    )
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([1e4, -1e4, 0.0, 3e4]).view(1, 4, 1, 1)
    label = torch.tensor([[[1]]])
    assert cam2seg_loss(logits, label).item() == pytest.approx(4e4)


def test_equal_logits_cost_log_of_the_channels() -> None:
    label = torch.tensor([[[0, 1], [2, 255]]])
    for balanced in (False, True):
        loss = cam2seg_loss(torch.zeros(1, 4, 2, 2), label, balanced=balanced)
        assert loss.item() == pytest.approx(math.log(4))


def test_balanced_counts_an_empty_side_as_zero() -> None:
    loss = cam2seg_loss(torch.zeros(1, 4, 2, 2), torch.ones(1, 2, 2).long(), balanced=True)
    assert loss.item() == pytest.approx(0.5 * math.log(4))


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_ones_as_weights_change_nothing(balanced: bool) -> None:
    case = _case("some_ignored")
    ones = torch.ones_like(case.weight)
    with_ones = cam2seg_loss(case.logits, case.label, ones, balanced)
    torch.testing.assert_close(with_ones, cam2seg_loss(case.logits, case.label, balanced=balanced))


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_linear_in_the_weights(balanced: bool) -> None:
    case = _case("upsampled")
    once = cam2seg_loss(case.logits, case.label, case.weight, balanced)
    thrice = cam2seg_loss(case.logits, case.label, 3 * case.weight, balanced)
    torch.testing.assert_close(thrice, 3 * once)


def test_weights_of_ignored_pixels_have_no_say() -> None:
    case = _case("some_ignored")
    other = torch.where(case.label == 255, torch.full_like(case.weight, 1e6), case.weight)
    torch.testing.assert_close(
        cam2seg_loss(case.logits, case.label, other),
        cam2seg_loss(case.logits, case.label, case.weight),
    )


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_gradcheck(balanced: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=generator)
    label = torch.tensor([[[0, 1, 255, 2], [2, 0, 1, 1], [0, 0, 255, 2]]])
    weight = torch.rand(label.shape, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(
        lambda s: cam2seg_loss(s, label, weight, balanced), logits.requires_grad_()
    )


def test_shared_log_probabilities_change_nothing() -> None:
    logits = torch.randn(2, 4, 3, 5)
    label = torch.randint(0, 4, (2, 9, 10))
    log_p = upsample_log_softmax(logits, (9, 10))
    torch.testing.assert_close(
        cam2seg_loss(log_p, label, normalised=True), cam2seg_loss(logits, label)
    )
