"""``contrastive_affinity_loss`` against its oracle (UniA, eq. 16)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import unia_affinity as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.losses import contrastive_affinity_loss

CASES = [
    "mixed",
    "some_ignored",
    "non_square",
    "background_only",
    "one_class",
    "all_classes",
    "one_pixel",
    "one_pixel_left",
    "all_ignored",
    "one_image_ignored",
    "constant",
]
LOG = pytest.mark.parametrize("log", [False, True], ids=["share", "log"])


def _inputs(name: str) -> tuple[Tensor, Tensor]:
    """(affinity, label); the affinity is not symmetric."""
    generator = torch.Generator().manual_seed(0)
    images, height, width = {"non_square": (2, 2, 4), "one_pixel": (2, 1, 1)}.get(name, (2, 3, 3))
    count = height * width
    affinity = torch.rand(images, count, count, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (images, height, width), generator=generator)
    if name == "some_ignored":
        label[torch.rand(label.shape, generator=generator) < 0.3] = 255
    elif name == "background_only":
        label.zero_()
    elif name == "one_class":
        label.fill_(2)
    elif name == "all_classes":  # no two alike
        label = torch.arange(count).view(1, height, width).repeat(images, 1, 1)
    elif name == "one_pixel_left":
        label.fill_(255)
        label[:, 1, 1] = 1
    elif name == "all_ignored":
        label.fill_(255)
    elif name == "one_image_ignored":
        label[0] = 255
    elif name == "constant":
        affinity = torch.full_like(affinity, 1 / count)
    return affinity, label


@LOG
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, log: bool) -> None:
    affinity, label = _inputs(name)
    assert_matches_oracle(
        lambda a: contrastive_affinity_loss(a, label, log=log),
        lambda a: oracle.contrastive_affinity(a, label, log=log),
        affinity,
    )


@LOG
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 3.0])
def test_temperature(temperature: float, log: bool) -> None:
    """A temperature of 0.01 needs log space in float32: exp(100) next to exp(0)."""
    affinity, label = _inputs("some_ignored")
    for dtype in (torch.float64, torch.float32):
        assert_matches_oracle(
            lambda a: contrastive_affinity_loss(a, label, temperature, log),
            lambda a: oracle.contrastive_affinity(a, label, temperature, log),
            affinity,
            dtype,
        )


@LOG
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "some_ignored", "all_ignored", "one_pixel"])
def test_low_precision(name: str, dtype: torch.dtype, log: bool) -> None:
    affinity, label = _inputs(name)
    assert_matches_oracle(
        lambda a: contrastive_affinity_loss(a, label, log=log),
        lambda a: oracle.contrastive_affinity(a, label, log=log),
        affinity,
        dtype,
    )


def test_defaults_are_as_printed_with_the_logged_temperature() -> None:
    affinity, label = _inputs("mixed")
    torch.testing.assert_close(
        contrastive_affinity_loss(affinity, label),
        contrastive_affinity_loss(affinity, label, temperature=0.5, log=False),
    )


@LOG
@pytest.mark.parametrize(
    ("name", "share", "logarithm"),
    [
        ("background_only", -1.0, 0.0),  # no negatives: every share is 1
        ("one_class", -1.0, 0.0),
        ("all_classes", 0.0, 0.0),  # no positives
        ("one_pixel", 0.0, 0.0),
        ("one_pixel_left", 0.0, 0.0),
        ("all_ignored", 0.0, 0.0),
    ],
)
def test_nothing_to_contrast_has_no_gradient(
    name: str, share: float, logarithm: float, log: bool
) -> None:
    affinity, label = _inputs(name)
    for dtype in (torch.float64, torch.float32):
        value, gradient = value_and_gradient(
            lambda a: contrastive_affinity_loss(a, label, log=log), affinity.to(dtype)
        )
        assert value.item() == (logarithm if log else share)
        assert not gradient.any()


def test_constant_affinity_by_hand() -> None:
    """Four of a label and two of another: 16 negative pairs, all alike."""
    label = torch.tensor([[[0, 0, 0], [0, 2, 2]]])
    affinity = torch.full((1, 6, 6), 0.3)
    assert contrastive_affinity_loss(affinity, label).item() == pytest.approx(-1 / 17)
    log = contrastive_affinity_loss(affinity, label, log=True)
    assert log.item() == pytest.approx(math.log(17))


def test_affinity_of_equal_labels_is_the_minimum() -> None:
    _, label = _inputs("mixed")
    same = label.flatten(1)[:, :, None] == label.flatten(1)[:, None, :]
    for log, least in ((False, -1.0), (True, 0.0)):
        right = contrastive_affinity_loss(same.float(), label, 0.01, log)
        wrong = contrastive_affinity_loss((~same).float(), label, 0.01, log)
        assert right.item() == pytest.approx(least, abs=1e-5)
        assert wrong > right + 0.99


def test_images_do_not_see_each_other() -> None:
    affinity, label = _inputs("mixed")
    alone = [contrastive_affinity_loss(affinity[b : b + 1], label[b : b + 1]) for b in range(2)]
    together = contrastive_affinity_loss(affinity, label)
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)


def test_ignored_positions_and_the_diagonal_have_no_gradient() -> None:
    affinity, label = _inputs("some_ignored")
    _, gradient = value_and_gradient(lambda a: contrastive_affinity_loss(a, label), affinity)
    ignored = label.flatten(1) == 255
    assert ignored.any()
    assert not gradient[ignored].any()
    assert not gradient.transpose(1, 2)[ignored].any()
    assert not gradient.diagonal(dim1=1, dim2=2).any()


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@LOG
def test_memory_grows_with_pairs_not_triples(log: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    affinity = torch.rand(2, 120, 120, generator=generator, requires_grad=True)
    label = torch.randint(0, 3, (2, 10, 12), generator=generator)
    with _LargestTensor() as seen:
        contrastive_affinity_loss(affinity, label, log=log).backward()
    assert seen.largest <= 2 * 120**2


@LOG
def test_gradcheck(log: bool) -> None:
    affinity, label = _inputs("some_ignored")
    assert torch.autograd.gradcheck(
        lambda a: contrastive_affinity_loss(a, label, log=log), affinity.requires_grad_()
    )


@pytest.mark.parametrize(
    ("affinity", "label"),
    [((1, 5, 5), (1, 2, 3)), ((2, 6, 6), (1, 2, 3)), ((1, 6, 5), (1, 2, 3)), ((1, 6, 6), (1, 6))],
)
def test_shapes_that_do_not_fit(affinity: tuple[int, ...], label: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"N = h \* w"):
        contrastive_affinity_loss(torch.rand(affinity), torch.zeros(label, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.0, -0.5])
def test_impossible_temperature(temperature: float) -> None:
    affinity, label = _inputs("mixed")
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        contrastive_affinity_loss(affinity, label, temperature)
