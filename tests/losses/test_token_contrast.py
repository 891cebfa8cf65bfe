"""``token_contrast_loss`` against its oracle (ToCo)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import unia_affinity as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.losses import token_contrast as module
from wsss.losses import token_contrast_loss

CASES = [
    "mixed",
    "some_ignored",
    "non_square",
    "one_channel",
    "background_only",
    "one_class",
    "all_classes",
    "one_pixel",
    "one_pixel_left",
    "all_ignored",
    "one_image_ignored",
]


def _inputs(name: str = "mixed") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, height, width = {"non_square": (2, 2, 4), "one_pixel": (2, 1, 1)}.get(name, (2, 3, 3))
    channels = 1 if name == "one_channel" else 4
    features = torch.randn(
        images, channels, height, width, generator=generator, dtype=torch.float64
    )
    label = torch.randint(0, 3, (images, height, width), generator=generator)
    if name == "some_ignored":
        label[torch.rand(label.shape, generator=generator) < 0.3] = 255
    elif name == "background_only":
        label.zero_()
    elif name == "one_class":
        label.fill_(2)
    elif name == "all_classes":  # no two alike
        label = torch.arange(height * width).view(1, height, width).repeat(images, 1, 1)
    elif name == "one_pixel_left":
        label.fill_(255)
        label[:, 1, 1] = 1
    elif name == "all_ignored":
        label.fill_(255)
    elif name == "one_image_ignored":
        label[0] = 255
    return features, label


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    features, label = _inputs(name)
    assert_matches_oracle(
        lambda f: token_contrast_loss(f, label),
        lambda f: oracle.token_contrast(f, label),
        features,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "some_ignored", "all_ignored", "one_pixel"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    features, label = _inputs(name)
    assert_matches_oracle(
        lambda f: token_contrast_loss(f, label),
        lambda f: oracle.token_contrast(f, label),
        features,
        dtype,
    )


def test_computed_in_float32_under_autocast() -> None:
    features, label = _inputs()
    expected = value_and_gradient(lambda f: token_contrast_loss(f, label), features.float())

    def cast(f: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return token_contrast_loss(f, label)

    torch.testing.assert_close(value_and_gradient(cast, features.float()), expected)


@pytest.mark.parametrize("name", ["all_ignored", "one_pixel", "one_pixel_left"])
def test_no_pairs_are_a_half_with_no_gradient(name: str) -> None:
    features, label = _inputs(name)
    value, gradient = value_and_gradient(lambda f: token_contrast_loss(f, label), features)
    assert value.item() == 0.5
    assert not gradient.any()


def test_by_hand() -> None:
    """Two equal tokens of one label, and one of another at 60 degrees, opposite."""
    tokens = torch.tensor([[1.0, 3.0, -0.5], [0.0, 0.0, -(0.75**0.5)]]).view(1, 2, 1, 3)
    label = torch.tensor([[[0, 0, 5]]])
    # 2 positive pairs of 1, 4 negative pairs of |-0.5|
    expected = 0.5 * (1 - 2 / 3) + 0.5 * 2 / 5
    assert token_contrast_loss(tokens, label).item() == pytest.approx(expected)


def test_sums_are_of_the_batch() -> None:
    """Not means of images: an image with few decided tokens has little weight."""
    features, label = _inputs()
    label[0, 1:] = 255
    both = token_contrast_loss(features, label)
    alone = [token_contrast_loss(features[b : b + 1], label[b : b + 1]) for b in range(2)]
    assert abs(both - (alone[0] + alone[1]) / 2) > 1e-3
    torch.testing.assert_close(both, oracle.token_contrast(features, label))


def test_tokens_of_different_images_are_no_pairs() -> None:
    features, _ = _inputs()
    label = torch.full((2, 3, 3), 255)
    label[0, 0, 0], label[1, 0, 0] = 1, 1
    assert token_contrast_loss(features, label).item() == 0.5


def test_scale_and_sign_of_the_tokens_do_not_matter() -> None:
    features, label = _inputs()
    factors = torch.tensor([0.01, -5.0, 40.0], dtype=torch.float64).view(1, 1, 1, 3)
    torch.testing.assert_close(
        token_contrast_loss(features * factors, label), token_contrast_loss(features, label)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_tokens_stay_finite(dtype: torch.dtype) -> None:
    features, label = _inputs()
    for part in (features[:, :, 0], features):
        part.zero_()
        value, gradient = value_and_gradient(
            lambda f: token_contrast_loss(f, label), features.to(dtype)
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
    assert value.item() == 0.5


def test_two_ranks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over two ranks, an image each, is the loss of both; so is its gradient."""
    features, label = _inputs("some_ignored")
    expected = value_and_gradient(lambda f: token_contrast_loss(f, label), features)
    counts = torch.stack([_counts(label[b : b + 1]) for b in range(2)])
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "mean_over_ranks", lambda own: counts.mean(0).to(own))

    def ranks(f: Tensor) -> Tensor:
        return sum(token_contrast_loss(f[b : b + 1], label[b : b + 1]) for b in range(2)) / 2

    torch.testing.assert_close(value_and_gradient(ranks, features), expected)


def _counts(label: Tensor) -> Tensor:
    """Positive and negative pairs of one image."""
    known = [int(v) for v in label.flatten() if v != 255]
    equal = sum(a == b for a in known for b in known) - len(known)
    return torch.tensor([equal, len(known) * (len(known) - 1) - equal], dtype=torch.float64)


def test_gradcheck() -> None:
    features, label = _inputs("some_ignored")
    assert torch.autograd.gradcheck(
        lambda f: token_contrast_loss(f, label), features.requires_grad_()
    )


@pytest.mark.parametrize(
    ("features", "label"),
    [
        ((1, 4, 2, 3), (1, 3, 2)),
        ((2, 4, 2, 3), (1, 2, 3)),
        ((1, 4, 6), (1, 6)),
        ((1, 4, 2, 3), (1, 6)),
    ],
)
def test_shapes_that_do_not_fit(features: tuple[int, ...], label: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, D, h, w\)"):
        token_contrast_loss(torch.rand(features), torch.zeros(label, dtype=torch.int64))
