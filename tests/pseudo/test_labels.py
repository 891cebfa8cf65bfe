"""CPL (eq. 3), the two-threshold label and SPL (eq. 7) against their oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import labels as oracle
from wsss.pseudo import (
    cam_pseudo_label,
    segmentation_pseudo_label,
    softmax_threshold_label,
    two_threshold_label,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SIZES = {"square": (2, 3, 4, 4), "non_square": (2, 3, 2, 7), "one_pixel": (1, 3, 1, 1),
         "one_class": (2, 1, 3, 3)}  # fmt: skip


def _cam(size: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SIZES[size], generator=generator, dtype=torch.float64)


def _valid(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("size", SIZES)
def test_cpl(size: str, threshold: float, dtype: torch.dtype) -> None:
    cam = _cam(size).to(dtype)
    valid = _valid(cam[:, 0].shape)
    for keep in (None, valid):
        expected = oracle.cam_pseudo_label(cam, threshold, keep)
        found = cam_pseudo_label(cam, threshold, keep)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)
        assert torch.equal(cam_pseudo_label(cam, torch.tensor(threshold), keep), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("low", "high"), [(0.25, 0.7), (0.6, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize("size", SIZES)
def test_two_thresholds(size: str, low: float, high: float, dtype: torch.dtype) -> None:
    cam = _cam(size, seed=1).to(dtype)
    for keep in (None, _valid(cam[:, 0].shape)):
        found = two_threshold_label(cam, low, high, keep)
        assert torch.equal(found, oracle.two_threshold(cam, low, high, keep))


def test_the_thresholds_themselves_belong_to_the_upper_side() -> None:
    cam = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 6)
    assert cam_pseudo_label(cam, 0.5).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert two_threshold_label(cam, 0.25, 0.75).flatten().tolist() == [0, 0, 255, 255, 1, 1]


def test_one_threshold_leaves_no_band() -> None:
    cam = _cam("square")
    assert torch.equal(two_threshold_label(cam, 0.5, 0.5), cam_pseudo_label(cam, 0.5))


def test_no_foreground_is_all_background() -> None:
    assert not cam_pseudo_label(torch.zeros(2, 3, 4, 5), 0.1).any()


def test_every_class_can_be_found() -> None:
    cam = torch.eye(4).view(1, 4, 1, 4)
    assert cam_pseudo_label(cam, 0.5).flatten().tolist() == [1, 2, 3, 4]


def test_all_invalid_is_all_ignored() -> None:
    cam = _cam("square")
    found = cam_pseudo_label(cam, 0.5, torch.zeros(2, 4, 4, dtype=torch.bool))
    assert (found == 255).all()


LABELS = {
    "mixed": [[1, 0, 1], [0, 1, 0]],
    "none": [[0, 0, 0], [0, 0, 0]],
    "all": [[1, 1, 1], [1, 1, 1]],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("case", LABELS)
def test_spl(case: str, temperature: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.tensor(LABELS[case], dtype=torch.float32)
    expected = oracle.segmentation_pseudo_label(logits.double(), labels, temperature)
    found = segmentation_pseudo_label(logits, labels, temperature)
    # bfloat16 logits divided by 0.01 need float32 arithmetic, hence no own tolerance for them
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double().sum(1), torch.ones(2, 3, 5, dtype=torch.float64))


def test_spl_of_an_image_without_objects_is_background() -> None:
    found = segmentation_pseudo_label(torch.randn(1, 4, 2, 2), torch.zeros(1, 3))
    assert torch.equal(found[:, 0], torch.ones(1, 2, 2))
    assert not found[:, 1:].any()


def test_spl_of_constant_logits_is_uniform_over_the_kept_channels() -> None:
    found = segmentation_pseudo_label(torch.full((1, 4, 2, 2), 7.0), torch.tensor([[1.0, 0, 1]]))
    expected = torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    torch.testing.assert_close(found, expected)


def test_spl_does_not_see_absent_channels() -> None:
    logits, labels = torch.randn(1, 4, 2, 2), torch.tensor([[0.0, 1.0, 0.0]])
    other = logits.clone()
    other[:, [1, 3]] = 1e6
    torch.testing.assert_close(
        segmentation_pseudo_label(other, labels), segmentation_pseudo_label(logits, labels)
    )


def test_spl_refuses_a_wrong_number_of_classes() -> None:
    with pytest.raises(ValueError, match="4 channels"):
        segmentation_pseudo_label(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4))


def test_labels_only_make_the_cam_pseudo_label_faster() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]], dtype=torch.float32)
    cam = torch.rand(3, 5, 6, 7, generator=generator).round(decimals=1) * labels[:, :, None, None]
    valid = torch.rand(3, 6, 7, generator=generator) > 0.2
    for threshold in (0.05, 0.5, 0.9):
        expected = cam_pseudo_label(cam, threshold, valid)
        assert torch.equal(cam_pseudo_label(cam, threshold, valid, labels), expected)


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("labels", ["mixed", "none", "all"])
def test_softmax_at_half_resolution(labels: str, size: tuple[int, int]) -> None:
    present = {
        "mixed": [[1, 0, 1], [0, 1, 0]],
        "none": [[0, 0, 0], [0, 0, 0]],
        "all": [[1, 1, 1], [1, 1, 1]],
    }[labels]
    tags = torch.tensor(present, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    cam = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) * tags[:, :, None, None]
    for keep in (None, _valid(cam[:, 0].shape)):
        found = softmax_threshold_label(cam, 0.3, 0.6, tags, keep)
        assert torch.equal(found, oracle.softmax_threshold_label(cam, 0.3, 0.6, tags, keep))
        tensors = softmax_threshold_label(cam, torch.tensor(0.3), torch.tensor(0.6), tags, keep)
        assert torch.equal(found, tensors)


def test_softmax_label_of_a_smooth_map_is_that_of_two_thresholds() -> None:
    """What the softmax and the half resolution change is next to the contours."""
    ramp = torch.linspace(0, 1, 40).expand(1, 1, 40, 40).contiguous()
    tags = torch.ones(1, 1)
    found = softmax_threshold_label(ramp, 0.25, 0.7, tags)
    plain = two_threshold_label(ramp, 0.25, 0.7)
    assert (found != plain).float().mean() < 0.06
    assert set(found.unique().tolist()) == {0, 1, 255}


@pytest.mark.parametrize("labels", [[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]]], ids=str)
def test_a_pair_of_thresholds(labels: list[list[int]]) -> None:
    tags = torch.tensor(labels, dtype=torch.float32)
    cam = _cam("square", seed=5) * tags[:, :, None, None]
    pair = torch.tensor([0.3, 0.7])
    expected = oracle.two_threshold(cam, 0.3, 0.7, None)
    assert torch.equal(cam_pseudo_label(cam, pair), expected)
    assert torch.equal(cam_pseudo_label(cam, pair, labels=tags), expected)
    keep = _valid(cam[:, 0].shape)
    expected = oracle.two_threshold(cam, 0.3, 0.7, keep)
    assert torch.equal(cam_pseudo_label(cam, pair, keep, tags), expected)
