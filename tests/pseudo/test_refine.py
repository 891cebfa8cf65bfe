"""Pixel-adaptive refinement against loops over pixels and neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import refine as oracle
from wsss.pseudo import PixelAdaptiveRefinement

#: name: (image (B, 3, H, W), mask (B, K, h, w)); the dilations reach 24 pixels
SIZES = {
    "upsampled": ((2, 3, 6, 9), (2, 2, 3, 4)),
    "same_size": ((1, 3, 5, 4), (1, 3, 5, 4)),
    "downsampled": ((1, 3, 4, 5), (1, 1, 9, 7)),
    "wide": ((1, 3, 2, 30), (1, 1, 1, 5)),
    "tall": ((1, 3, 30, 2), (1, 1, 6, 1)),
    "one_pixel": ((2, 3, 1, 1), (2, 2, 1, 1)),
    "one_pixel_of_many": ((1, 3, 1, 1), (1, 2, 3, 3)),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def _inputs(size: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, mask = (torch.rand(s, generator=generator, dtype=torch.float64) for s in SIZES[size])
    return image, mask


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_against_the_oracle(size: str, dtype: torch.dtype) -> None:
    image, mask = (x.to(dtype) for x in _inputs(size))
    found = PixelAdaptiveRefinement(num_iterations=3)(image, mask)
    expected = oracle.pixel_adaptive_refinement(image, mask, iterations=3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_defaults_are_the_published_settings() -> None:
    image, mask = _inputs("upsampled", seed=1)
    image, mask = image[:1], mask[:1, :1]
    expected = oracle.pixel_adaptive_refinement(image, mask, (1, 2, 4, 8, 12, 24), 10, 0.3, 0.01)
    torch.testing.assert_close(PixelAdaptiveRefinement()(image, mask), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"dilations": (1,)},
        {"dilations": (3, 1)},
        {"num_iterations": 1},
        {"w1": 1.5},
        {"w2": 0.5},
        {"w2": 0.0},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    image, mask = _inputs("upsampled", seed=2)
    settings = {"num_iterations": 2, **settings}
    found = PixelAdaptiveRefinement(**settings)(image, mask)
    settings["iterations"] = settings.pop("num_iterations")
    expected = oracle.pixel_adaptive_refinement(image, mask, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_no_iterations_only_resize() -> None:
    image, mask = _inputs("upsampled")
    found = PixelAdaptiveRefinement(num_iterations=0)(image, mask)
    expected = oracle.pixel_adaptive_refinement(image, mask, iterations=0)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[..., 0, 0], mask[..., 0, 0])  # corners on corners
    assert torch.equal(found[..., -1, -1], mask[..., -1, -1])


def test_grey_and_other_numbers_of_channels() -> None:
    image, mask = _inputs("upsampled", seed=3)
    image = torch.cat([image, image[:, :2].flip(-1)], dim=1)
    for channels in (1, 5):
        found = PixelAdaptiveRefinement(num_iterations=2)(image[:, :channels], mask)
        expected = oracle.pixel_adaptive_refinement(image[:, :channels], mask, iterations=2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_constant_colours_leave_only_the_distances() -> None:
    _, mask = _inputs("upsampled")
    for colour in (0.0, 0.3, 255.0):  # 0.3: its mean over 48 neighbours is not exactly 0.3
        image = torch.full((2, 3, 6, 9), colour)
        found = PixelAdaptiveRefinement(num_iterations=2)(image, mask)
        expected = oracle.pixel_adaptive_refinement(torch.zeros(2, 3, 6, 9), mask, iterations=2)
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_single_odd_pixel_stays_finite() -> None:
    image = torch.full((1, 3, 5, 5), 0.3)
    image[..., 2, 2] = 1.0  # no deviation among its neighbours, and far from all of them
    mask = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    found = PixelAdaptiveRefinement(dilations=(1, 2), num_iterations=1)(image, mask)
    expected = oracle.pixel_adaptive_refinement(image, mask, (1, 2), 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_weights_sum_to_one_and_w2() -> None:
    image, _ = _inputs("upsampled")
    par = PixelAdaptiveRefinement()
    affinity = par.affinity(image)
    assert affinity.shape == (2, 48, 6, 9)
    torch.testing.assert_close(affinity.sum(1), torch.full((2, 6, 9), 1.01, dtype=torch.float64))
    found = par(image, torch.ones(2, 1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full_like(found, 1.01**10))


def test_all_zero_mask_stays_zero() -> None:
    image, mask = _inputs("upsampled")
    assert not PixelAdaptiveRefinement()(image, torch.zeros_like(mask)).any()


def test_follows_the_edge_of_the_image() -> None:
    # the object ends at column 7, the coarse mask leaks to column 9
    image = torch.zeros(1, 3, 12, 16)
    image[..., 7:] = 0.8
    image += 0.02 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 12, 16)
    mask[..., :9] = 1.0
    found = PixelAdaptiveRefinement(dilations=(1, 2, 4))(image, mask)[0, 0]
    assert found[:, :7].min() > 0.9
    assert found[:, 7:9].max() < 0.5


@pytest.mark.parametrize("factor", [255.0, 0.01])
def test_range_and_offset_of_the_image_do_not_matter(factor: float) -> None:
    image, mask = _inputs("upsampled")
    par = PixelAdaptiveRefinement()
    expected = par(image, mask)
    torch.testing.assert_close(par(image * factor, mask), expected, rtol=0, atol=1e-4)
    scale = torch.tensor([1.0, 0.2, 5.0], dtype=torch.float64).view(3, 1, 1)
    shifted = image * scale + torch.tensor([-0.5, 3.0, 0.1]).view(3, 1, 1)
    torch.testing.assert_close(par(shifted, mask), expected, rtol=0, atol=1e-4)


def test_bytes_as_an_image() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 6, 9), generator=generator, dtype=torch.uint8)
    mask = torch.rand(1, 2, 3, 4, generator=generator)
    expected = oracle.pixel_adaptive_refinement(image, mask, iterations=2)
    found = PixelAdaptiveRefinement(num_iterations=2)(image, mask)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_half_precision_is_computed_in_single() -> None:
    image, mask = (x.bfloat16() for x in _inputs("upsampled"))
    found = PixelAdaptiveRefinement()(image, mask)
    expected = oracle.pixel_adaptive_refinement(image, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PixelAdaptiveRefinement()(image, mask), found)


def test_images_and_channels_do_not_see_each_other() -> None:
    image, mask = _inputs("upsampled")
    par = PixelAdaptiveRefinement()
    both = par(image, mask)
    for b in range(2):
        for k in range(2):
            alone = par(image[b : b + 1], mask[b : b + 1, k : k + 1])
            torch.testing.assert_close(alone[0, 0], both[b, k])


def test_inputs_are_left_alone() -> None:
    for size in ("upsampled", "same_size"):
        image, mask = _inputs(size)
        before = image.clone(), mask.clone()
        PixelAdaptiveRefinement()(image, mask)
        assert torch.equal(image, before[0])
        assert torch.equal(mask, before[1])


@pytest.mark.parametrize(("batch", "classes"), [(0, 2), (2, 0)])
def test_nothing_to_refine(batch: int, classes: int) -> None:
    found = PixelAdaptiveRefinement()(torch.rand(batch, 3, 6, 9), torch.rand(batch, classes, 3, 4))
    assert found.shape == (batch, classes, 6, 9)
    assert found.dtype == torch.float32


def test_gradient_reaches_the_mask_and_not_the_image() -> None:
    image, mask = _inputs("upsampled")
    image, mask = image[:1].requires_grad_(), mask[:1, :1].requires_grad_()
    par = PixelAdaptiveRefinement(dilations=(1, 4), num_iterations=2)
    assert torch.autograd.gradcheck(lambda m: par(image, m), mask)
    par(image, mask).sum().backward()
    assert mask.grad is not None
    assert image.grad is None


def test_it_has_no_state() -> None:
    assert not PixelAdaptiveRefinement().state_dict()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dilations": ()}, "dilations"),
        ({"dilations": (1, 0)}, "dilations"),
        ({"num_iterations": -1}, "num_iterations=-1"),
        ({"w1": 0.0}, "w1=0.0"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PixelAdaptiveRefinement(**settings)


@pytest.mark.parametrize(
    ("image", "mask"),
    [((3, 4, 4), (3, 1, 4, 4)), ((1, 3, 4, 4), (1, 4, 4)), ((2, 3, 4, 4), (1, 1, 4, 4))],
)
def test_shapes_that_do_not_fit(image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\)"):
        PixelAdaptiveRefinement()(torch.rand(image), torch.rand(mask))
