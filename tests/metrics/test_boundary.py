"""``BoundaryScores`` and ``boundary_f`` against comparing all pairs of boundary pixels."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage.morphology import disk
from torch import Tensor

from tests.metrics.ranks import compute_on_ranks
from tests.oracle import boundary as oracle
from tests.oracle.metrics import mean
from wsss.metrics import BoundaryScores, boundary_f

PER_CLASS = ["f", "precision", "recall"]
SHAPES = {
    "square": (12, 12),
    "wide": (7, 15),
    "tall": (14, 6),
    "row": (1, 13),
    "column": (11, 1),
    "pixel": (1, 1),
}


def _maps(
    shape: tuple[int, ...], classes: int, seed: int, void: float = 0.0, cell: int = 3
) -> tuple[Tensor, Tensor]:
    """(prediction, target) of blocks of about ``cell`` pixels; a share ``void`` of pixels is 255.

    The prediction is the target moved by a pixel, with a tenth of its pixels drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    *count, height, width = shape
    coarse = (*count, height // cell + 1, width // cell + 1)
    target = torch.randint(0, classes, coarse, generator=generator)
    target = target.repeat_interleave(cell, -1).repeat_interleave(cell, -2)
    target = target[..., :height, :width].contiguous()
    guess = torch.randint(0, classes, shape, generator=generator)
    moved = target.roll((1, 1), (-2, -1))
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.1, guess, moved)
    target = torch.where(torch.rand(shape, generator=generator) < void, 255, target)
    return prediction, target


def _square(size: tuple[int, int], top: int, left: int, side: int, label: int = 1) -> Tensor:
    mask = torch.zeros(size, dtype=torch.int64)
    mask[top : top + side, left : left + side] = label
    return mask


def _check(
    found: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]], classes: int, **options: Any
) -> None:
    expected = oracle.boundary_f(pairs, classes, **options)
    assert set(found) == {*PER_CLASS, "mean"}
    for name in PER_CLASS:
        assert found[name].view(-1).tolist() == pytest.approx(expected[name], nan_ok=True), name
    assert found["mean"].dim() == 0
    assert found["mean"].item() == pytest.approx(mean(expected["f"]), nan_ok=True)


# --- against the oracle ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:classes without a boundary")
@pytest.mark.parametrize("background", [True, False], ids=["as_background", "as_void"])
@pytest.mark.parametrize("bound", [0.0, 0.008, 0.09, 0.2, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_image(shape: tuple[int, int], bound: float, background: bool) -> None:
    """Tolerances of 0 to 9 pixels, in images that hold such a disk and in those that do not."""
    for seed in range(3):
        pair = _maps(shape, 3, seed, void=0.02)
        options = {"bound": bound, "void_as_background": background}
        found = boundary_f(pair[0][None], pair[1][None], 3, **options)
        _check(found, [pair], 3, **options)


@pytest.mark.parametrize("background", [True, False], ids=["as_background", "as_void"])
def test_images_of_different_sizes(background: bool) -> None:
    """Counts are summed over the set, and each image has its own tolerance."""
    pairs = [
        _maps(shape, 4, seed, void=0.01) for seed, shape in enumerate([(9, 30), (31, 12), (16, 17)])
    ]
    options: dict[str, Any] = {"bound": 0.09, "void_as_background": background}
    scores = BoundaryScores(4, **options)
    for pair in pairs:
        scores.update(*pair)
    _check(scores.compute(), pairs, 4, **options)
    assert scores.counts.dtype == torch.int64


def test_a_batch_is_its_images() -> None:
    prediction, target = _maps((5, 14, 19), 4, seed=5, void=0.02)
    pairs = list(zip(prediction, target, strict=True))
    _check(boundary_f(prediction, target, 4, bound=0.06), pairs, 4, bound=0.06)


def test_published_tolerance_and_disk_at_the_size_of_voc() -> None:
    """The default, 5 pixels at 375 x 500 (0.008 of 625, not a hair more), through cv2."""
    prediction, target = _maps((375, 500), 4, seed=6, cell=40)
    prediction = prediction.roll((2, 3), (0, 1))
    found = boundary_f(prediction[None], target[None], 4)
    footprint = disk(5)
    for label in (1, 2, 3):
        edges = []
        for mask in (prediction == label, target == label):
            m = mask.numpy()
            edge = np.zeros_like(m)
            edge[:, :-1] |= m[:, :-1] != m[:, 1:]
            edge[:-1] |= m[:-1] != m[1:]
            edge[:-1, :-1] |= m[:-1, :-1] != m[1:, 1:]
            edges.append(edge.astype(np.uint8))
        predicted, true = edges
        precision = (predicted & cv2.dilate(true, footprint)).sum() / predicted.sum()
        recall = (true & cv2.dilate(predicted, footprint)).sum() / true.sum()
        assert 0.3 < precision < 0.95
        assert found["precision"][label - 1].item() == pytest.approx(precision)
        assert found["recall"][label - 1].item() == pytest.approx(recall)


# --- by hand -----------------------------------------------------------------------------------


def test_boundary_pixels_of_one_pixel() -> None:
    """It, its left, upper and upper-left neighbours: the four whose neighbours differ."""
    scores = BoundaryScores(2)
    scores.update(_square((5, 5), 2, 2, 1), torch.zeros(5, 5).long())
    assert scores.counts.tolist() == [[[0, 4], [0, 0]]]
    scores.reset()
    scores.update(_square((5, 5), 4, 4, 1), torch.zeros(5, 5).long())  # in the corner
    assert scores.counts.tolist() == [[[0, 3], [0, 0]]]
    scores.reset()
    scores.update(torch.zeros(5, 5).long(), _square((5, 5), 0, 0, 1))
    assert scores.counts.tolist() == [[[0, 0], [0, 1]]]


def test_the_border_of_the_image_is_no_boundary() -> None:
    full = torch.ones(1, 6, 8).long()
    with pytest.warns(UserWarning, match="without a boundary"):
        found = boundary_f(full, full, 2)
    assert math.isnan(found["mean"].item())


@pytest.mark.parametrize(("step", "inside"), [(4, True), (5, False)])
def test_shift_within_and_beyond_the_tolerance(step: int, inside: bool) -> None:
    """One vertical edge, 300 x 400: a diagonal of 500 and a tolerance of exactly 4 pixels."""
    target = torch.zeros(1, 300, 400).long()
    target[..., 200:] = 1
    found = boundary_f(target.roll(step, -1).clamp(min=0), target, 2)
    # Rolling brings a second edge, at the left of the image, that is nowhere near the first.
    share = 0.5 if inside else 0.0
    assert found["precision"].tolist() == [share]
    assert found["recall"].tolist() == [2 * share]


def test_identical_masks() -> None:
    target = _maps((2, 20, 30), 4, seed=8)[1]
    found = boundary_f(target, target, 4, bound=0.0)
    for name in PER_CLASS:
        assert found[name].tolist() == [1, 1, 1]
    assert found["mean"].item() == 1


def test_precision_is_of_the_prediction_and_recall_of_the_target() -> None:
    """Two true squares, one of them found: nothing wrong, half of it missing."""
    one, two = _square((40, 60), 10, 5, 12), _square((40, 60), 10, 40, 12)
    found = boundary_f(one[None], (one + two)[None], 2)
    assert found["precision"].item() == 1
    assert found["recall"].item() == pytest.approx(0.5)
    assert found["f"].item() == pytest.approx(2 / 3)


def test_sums_over_the_set_and_mean_over_classes() -> None:
    """Class 1: one of two equal squares found, in different images. Class 2: all of it."""
    empty = torch.zeros(40, 60).long()
    square, other = _square((40, 60), 10, 5, 12), _square((40, 60), 20, 40, 9, label=2)
    prediction = torch.stack([square + other, empty])
    target = torch.stack([square + other, square])
    found = boundary_f(prediction, target, 3)
    assert found["f"].tolist() == pytest.approx([2 / 3, 1])
    assert found["mean"].item() == pytest.approx(5 / 6)


def test_another_class_is_on_the_other_side() -> None:
    """Boundaries are those of each class by itself, also between two objects."""
    target = torch.ones(1, 20, 30).long()
    target[..., 15:] = 2
    assert boundary_f(target, target, 3)["f"].tolist() == [1, 1]
    assert boundary_f(target.clamp(max=1), target, 3)["f"].tolist() == [0, 0]


# --- absent classes ----------------------------------------------------------------------------


def test_an_absent_class_is_left_out_and_named() -> None:
    square = _square((30, 30), 5, 5, 9, label=2)
    names = ("background", "bird", "cat", "dog")
    scores = BoundaryScores(4, class_names=names)
    scores.update(square, square)
    with pytest.warns(UserWarning, match=r"means: bird, dog\."):
        found = scores.compute()
    for name in PER_CLASS:
        assert found[name].isnan().tolist() == [True, False, True]
    assert found["mean"].item() == 1
    unnamed = BoundaryScores(4)
    unnamed.update(square, square)
    with pytest.warns(UserWarning, match=r"means: 1, 3\."):
        unnamed.compute()


def test_an_absent_class_counts_one_as_published() -> None:
    square = _square((30, 30), 5, 5, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = boundary_f(torch.zeros_like(square), square, 4, published=True)
    assert found["f"].tolist() == [0, 1, 1]
    assert found["precision"].tolist() == [0, 1, 1]
    assert found["mean"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("published", [True, False])
def test_a_class_on_one_side_only_counts_zero(published: bool) -> None:
    square, empty = _square((30, 30), 5, 5, 9), torch.zeros(30, 30).long()
    for pair in ((square, empty), (empty, square)):
        found = boundary_f(*pair, num_classes=2, published=published)
        assert [found[name].tolist() for name in PER_CLASS] == [[0], [0], [0]]
        assert found["mean"].item() == 0


@pytest.mark.parametrize("background", [True, False])
def test_all_void(background: bool) -> None:
    """As background there is nothing to find; as void nothing is judged."""
    void = torch.full((30, 30), 255)
    square = _square((30, 30), 5, 5, 9)
    scores = BoundaryScores(2, void_as_background=background)
    scores.update(square, void)
    expected = scores.counts.tolist()
    assert expected == [[[0, 36], [0, 0]]] if background else [[[0, 0], [0, 0]]]
    if background:
        assert scores.compute()["mean"].item() == 0
    else:
        with pytest.warns(UserWarning, match="without a boundary"):
            assert math.isnan(scores.compute()["mean"].item())


@pytest.mark.filterwarnings("ignore:classes without a boundary")
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (5, 0)])
def test_an_empty_set(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape).long()
    assert math.isnan(boundary_f(empty, empty, 3)["mean"].item())
    assert math.isnan(BoundaryScores(3).compute()["mean"].item())


# --- void --------------------------------------------------------------------------------------


def test_void_is_background_of_the_target_alone() -> None:
    """As published: the object ends at the inner rim of the void, whatever is predicted there."""
    target = _square((60, 60), 20, 20, 20)
    ringed = _square((60, 60), 17, 17, 26, label=255)
    ringed[20:40, 20:40] = 1
    for prediction in (_square((60, 60), 19, 20, 20), _square((60, 60), 17, 17, 26)):
        found = boundary_f(prediction, ringed, 2)
        for name, value in boundary_f(prediction, target, 2).items():
            assert torch.equal(found[name], value)
        scores = BoundaryScores(2)
        scores.update(prediction, ringed)
        assert scores.compute()["f"] == found["f"]
    assert boundary_f(_square((60, 60), 19, 20, 20), ringed, 2)["f"].item() == 1
    assert boundary_f(_square((60, 60), 17, 17, 26), ringed, 2)["f"].item() < 0.1


@pytest.mark.parametrize("bound", [0.0, 0.02, 0.1])
def test_nothing_in_void_counts(bound: float) -> None:
    """With the option: neither boundary, whatever is predicted there."""
    prediction, target = _maps((40, 50), 3, seed=9, cell=10)
    target[10:25, 15:40] = 255
    other = torch.where(target == 255, (prediction + 1) % 3, prediction)
    one, two, three = (BoundaryScores(3, bound=bound, void_as_background=b) for b in (0, 0, 1))
    one.update(prediction, target)
    two.update(other, target)
    assert torch.equal(one.counts, two.counts)
    assert one.counts[..., 1].min() > 0
    three.update(prediction, target)
    assert (one.counts[..., 1] < three.counts[..., 1]).all()


def test_boundaries_near_void_match_but_do_not_count() -> None:
    """300 x 400 pixels: a tolerance of 4. The columns from 200 are void."""
    target = torch.zeros(300, 400).long()
    target[:100] = 1  # an edge along row 99 that runs into the void
    target[:, 200:] = 255
    prediction = torch.zeros(300, 400).long()
    prediction[:100, :199] = 1  # and a side at column 198, next to the void
    scores = BoundaryScores(2, void_as_background=False)
    scores.update(prediction, target)
    # Columns 0..195 are further than 4 pixels from the void.
    assert scores.counts.tolist() == [[[196, 196], [196, 196]]]
    # All of the true edge, in columns 197..198, is too near to count. It matches column 194 of the
    # predicted one, and the pixel at its left in the last row, but not column 149.
    target[:100, :198] = 0
    prediction[:] = 0
    prediction[:100, 150:195] = 1
    scores.reset()
    scores.update(prediction, target)
    assert scores.counts.tolist() == [[[101, 244], [0, 0]]]
    found = scores.compute()
    assert found["precision"].item() == pytest.approx(101 / 244)
    assert found["f"].item() == 0  # nothing to be found, a recall of 0


def test_another_ignore_index() -> None:
    prediction, target = _maps((30, 30), 3, seed=10)
    for ignore_index in (-1, 7):
        marked = target.clone()
        marked[10:14] = ignore_index
        options: dict[str, Any] = {"ignore_index": ignore_index, "bound": 0.03}
        for background in (True, False):
            options["void_as_background"] = background
            _check(
                boundary_f(prediction, marked, 3, **options), [(prediction, marked)], 3, **options
            )


# --- types, devices, ranks ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_types(dtype: torch.dtype) -> None:
    prediction, target = _maps((20, 25), 4, seed=11, void=0.01)
    found = boundary_f(prediction.to(dtype), target.to(dtype), 4, bound=0.05)
    _check(found, [(prediction, target)], 4, bound=0.05)


def test_bool_masks() -> None:
    prediction, target = _maps((20, 25), 2, seed=12)
    found = boundary_f(prediction.bool(), target.bool(), 2, bound=0.05)
    _check(found, [(prediction, target)], 2, bound=0.05)
    assert found["f"].shape == (1,)


def test_masks_that_are_views() -> None:
    prediction, target = _maps((2, 20, 25), 3, seed=13)
    found = boundary_f(prediction.mT, target.mT, 3, bound=0.05)
    for name, value in boundary_f(
        prediction.mT.contiguous(), target.mT.contiguous(), 3, bound=0.05
    ).items():
        assert torch.equal(found[name], value)


def test_inputs_stay_as_they_are() -> None:
    prediction, target = _maps((2, 20, 25), 3, seed=14, void=0.1)
    before = prediction.clone(), target.clone()
    boundary_f(prediction, target, 3)
    assert torch.equal(prediction, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device() -> None:
    prediction, target = _maps((3, 50, 40), 4, seed=15, void=0.01)
    found = boundary_f(prediction.cuda(), target.cuda(), 4)
    assert found["f"].is_cuda
    _check({k: v.cpu() for k, v in found.items()}, list(zip(prediction, target, strict=True)), 4)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Five images of different sizes, of which one process has one; every sum is exact."""
    pairs = [
        _maps(shape, 4, seed, void=0.01)
        for seed, shape in enumerate([(20, 30), (31, 22), (25, 25), (13, 40), (50, 18)])
    ]
    one = BoundaryScores(4)
    for pair in pairs:
        one.update(*pair)
    expected = one.compute()
    for (found,) in compute_on_ranks([BoundaryScores(4)], [pairs[:1], pairs[1:]], tmp_path):
        for name, value in expected.items():
            assert torch.equal(found[name], value)


# --- what is refused ---------------------------------------------------------------------------


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="size"):
        boundary_f(torch.zeros(4, 4).long(), torch.zeros(4, 5).long(), 2)


@pytest.mark.parametrize("shape", [(5,), (1, 1, 4, 4)])
def test_only_masks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        boundary_f(torch.zeros(shape).long(), torch.zeros(shape).long(), 2)


def test_probabilities_are_refused() -> None:
    mask = torch.zeros(4, 4).long()
    for pair in ((mask.float(), mask), (mask, mask.half())):
        with pytest.raises(ValueError, match="argmax"):
            boundary_f(*pair, num_classes=2)


@pytest.mark.parametrize("value", [3, 254, -1])
def test_unknown_values_are_refused(value: int) -> None:
    mask = torch.zeros(4, 4).long()
    wrong = mask.clone()
    wrong[1, 2] = value
    with pytest.raises(ValueError, match=r"target holds .* 0\.\.2"):
        boundary_f(mask, wrong, 3)
    with pytest.raises(ValueError, match=r"prediction holds .* 0\.\.2"):
        boundary_f(wrong, mask, 3)


def test_no_value_becomes_void_by_its_type() -> None:
    """255 is -1 in int8."""
    mask = torch.zeros(4, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="target holds values from -1"):
        boundary_f(mask, mask - 1, 3)


def test_void_in_a_prediction_is_refused() -> None:
    void = torch.full((4, 4), 255)
    with pytest.raises(ValueError, match="prediction holds"):
        boundary_f(void, void, 3)


@pytest.mark.parametrize("bound", [-0.1, 1.0, 5.0])
def test_tolerance_is_a_share(bound: float) -> None:
    with pytest.raises(ValueError, match="share"):
        BoundaryScores(2, bound=bound)


def test_names_include_the_background() -> None:
    with pytest.raises(ValueError, match="background"):
        BoundaryScores(3, class_names=("cat", "dog"))
