"""``contrastive_separation_loss`` against its oracle (eq. 9 and 10)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import losses as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.losses import contrastive_separation_loss

CLASSES = 3
CASES = [
    "mixed",
    "some_ignored",
    "non_square",
    "one_image",
    "background_only",
    "all_different",
    "two_labels",
    "one_position",
    "one_position_left",
    "all_ignored",
    "all_perplexed",
    "one_image_empty",
    "constant_cam",
    "one_class",
]


def _inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(cam, label, perplexity) of a case; about half of the positions pass perplexity 1."""
    generator = torch.Generator().manual_seed(0)
    images, height, width = {
        "one_image": (1, 4, 4),
        "non_square": (2, 2, 6),
        "one_position": (2, 1, 1),
        "all_different": (1, 2, 2),
    }.get(name, (2, 3, 4))
    classes = 1 if name == "one_class" else CLASSES
    cam = torch.randn(images, classes, height, width, generator=generator, dtype=torch.float64)
    label = torch.randint(0, classes + 1, (images, height, width), generator=generator)
    perplexity = torch.rand(label.shape, generator=generator, dtype=torch.float64) * 2
    if name == "some_ignored":
        label[torch.rand(label.shape, generator=generator) < 0.3] = 255
        perplexity *= 0.5
    elif name == "background_only":
        label.zero_()
    elif name == "all_different":
        label = torch.arange(4).view(1, 2, 2)
        perplexity.zero_()
    elif name == "two_labels":
        label = (label > 0).long()
        perplexity *= 0.5
    elif name == "one_position":
        perplexity.zero_()
    elif name == "one_position_left":
        perplexity.fill_(1.5)
        perplexity[:, 1, 1] = 0.5
    elif name == "all_ignored":
        label.fill_(255)
    elif name == "all_perplexed":
        perplexity += 1.1
    elif name == "one_image_empty":
        perplexity[0] = 5.0
        perplexity[1] *= 0.5
    elif name == "constant_cam":
        cam = torch.full_like(cam, 0.7)
    return cam, label, perplexity


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    cam, label, perplexity = _inputs(name)
    assert_matches_oracle(
        lambda m: contrastive_separation_loss(m, label, perplexity),
        lambda m: oracle.contrastive_separation(m, label, perplexity),
        cam,
    )


@pytest.mark.parametrize("max_perplexity", [0.5, 1.5, math.inf])
@pytest.mark.parametrize("temperature", [0.02, 0.5, 3.0])
def test_options(max_perplexity: float, temperature: float) -> None:
    """A temperature of 0.02 needs log space: exp(50) next to exp(-50)."""
    cam, label, perplexity = _inputs("some_ignored")
    assert_matches_oracle(
        lambda m: contrastive_separation_loss(m, label, perplexity, max_perplexity, temperature),
        lambda m: oracle.contrastive_separation(m, label, perplexity, max_perplexity, temperature),
        cam,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "some_ignored", "all_ignored", "one_position"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    cam, label, perplexity = _inputs(name)
    perplexity = perplexity.float()
    assert_matches_oracle(
        lambda m: contrastive_separation_loss(m, label, perplexity),
        lambda m: oracle.contrastive_separation(m, label, perplexity),
        cam,
        dtype,
    )


def test_autocast_changes_nothing() -> None:
    cam, label, perplexity = _inputs("some_ignored")
    cam, perplexity = cam.float(), perplexity.float()

    def under(cast: bool) -> Any:
        def loss(m: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                return contrastive_separation_loss(m, label, perplexity)

        return value_and_gradient(loss, cam)

    for found, expected in zip(under(True), under(False), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_the_limit_itself_is_inside() -> None:
    cam, label, _ = _inputs("two_labels")
    on_the_limit = torch.ones(label.shape, dtype=torch.float64)
    found = contrastive_separation_loss(cam, label, on_the_limit, max_perplexity=1.0)
    expected = contrastive_separation_loss(cam, label, on_the_limit * 0)
    torch.testing.assert_close(found, expected)
    assert found.item() > 0


@pytest.mark.parametrize(
    "name", ["background_only", "all_different", "one_position", "all_ignored", "all_perplexed"]
)
def test_nothing_to_contrast_is_zero_with_a_zero_gradient(name: str) -> None:
    cam, label, perplexity = _inputs(name)
    value, gradient = value_and_gradient(
        lambda m: contrastive_separation_loss(m, label, perplexity), cam
    )
    assert value.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_constant_cams_cost_the_log_of_the_negatives() -> None:
    """Four of a label and two of another, all alike: log(1 + negatives) each."""
    cam = torch.ones(1, 3, 2, 3, dtype=torch.float64)
    label = torch.tensor([[[0, 0, 0], [0, 2, 2]]])
    loss = contrastive_separation_loss(cam, label, torch.zeros(1, 2, 3))
    assert loss.item() == pytest.approx((4 * math.log(3) + 2 * math.log(5)) / 6)


def test_scale_of_the_cams_does_not_matter() -> None:
    cam, label, perplexity = _inputs("two_labels")
    torch.testing.assert_close(
        contrastive_separation_loss(cam * 37, label, perplexity),
        contrastive_separation_loss(cam, label, perplexity),
    )


def test_images_do_not_see_each_other() -> None:
    cam, label, perplexity = _inputs("two_labels")
    alone = [
        contrastive_separation_loss(cam[b : b + 1], label[b : b + 1], perplexity[b : b + 1])
        for b in range(2)
    ]
    together = contrastive_separation_loss(cam, label, perplexity)
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_vectors_stay_finite(dtype: torch.dtype) -> None:
    cam, label, perplexity = _inputs("two_labels")
    cam[:, :, 0] = 0
    value, gradient = value_and_gradient(
        lambda m: contrastive_separation_loss(m, label, perplexity), cam.to(dtype)
    )
    expected = oracle.contrastive_separation(cam.to(dtype).double(), label, perplexity)
    assert value.item() == pytest.approx(
        expected.item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-5
    )
    assert gradient.isfinite().all()


def test_all_zero_cams_stay_finite() -> None:
    _, label, perplexity = _inputs("two_labels")
    value, gradient = value_and_gradient(
        lambda m: contrastive_separation_loss(m, label, perplexity), torch.zeros(2, 3, 3, 4)
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_perplexity_may_be_infinite() -> None:
    cam, label, perplexity = _inputs("mixed")
    huge = torch.where(perplexity > 1, torch.inf, perplexity)
    torch.testing.assert_close(
        contrastive_separation_loss(cam, label, huge),
        contrastive_separation_loss(cam, label, perplexity),
    )


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_memory_grows_with_pairs_not_triples() -> None:
    images, positions = 2, 10 * 12
    generator = torch.Generator().manual_seed(0)
    cam = torch.randn(images, CLASSES, 10, 12, generator=generator, requires_grad=True)
    label = torch.randint(0, CLASSES + 1, (images, 10, 12), generator=generator)
    with _LargestTensor() as seen:
        contrastive_separation_loss(cam, label, torch.zeros(images, 10, 12)).backward()
    assert seen.largest <= images * positions**2


def test_gradcheck() -> None:
    cam, label, perplexity = _inputs("two_labels")
    assert torch.autograd.gradcheck(
        lambda m: contrastive_separation_loss(m, label, perplexity), cam.requires_grad_()
    )
