"""``SegmentationScores`` against counting pixel by pixel."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from tests.oracle import metrics as oracle
from wsss.metrics import GroupDice, SegmentationScores

PER_CLASS = ["iou", "precision", "recall", "confusion_ratio", "dice"]
SHAPES = {"batch": (2, 9, 7), "one_mask": (6, 8), "flat": (50,), "one_pixel": (1, 1)}


def _maps(
    shape: tuple[int, ...], classes: int, seed: int, void: float = 0.2
) -> tuple[Tensor, Tensor]:
    """(prediction, target); about half of the pixels are right and ``void`` are 255."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, shape, generator=generator)
    guess = torch.randint(0, classes, shape, generator=generator)
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.5, target, guess)
    target = torch.where(torch.rand(shape, generator=generator) < void, 255, target)
    return prediction, target


def _check(found: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]], classes: int) -> None:
    expected = oracle.segmentation_scores(pairs, classes)
    for name in PER_CLASS:
        assert found[name].shape == (classes,)
        assert found[name].tolist() == pytest.approx(expected[name], rel=1e-6, nan_ok=True), name
        mean = found["miou" if name == "iou" else f"mean_{name}"]
        assert mean.dim() == 0
        assert mean.item() == pytest.approx(oracle.mean(expected[name]), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("classes", [2, 5, 21])
def test_scores_over_a_set(classes: int) -> None:
    """Masks of different sizes, one after the other: sums over the set, not means of images."""
    pairs = [
        _maps(shape, classes, seed) for seed, shape in enumerate([(2, 40, 30), (25, 30), (700,)])
    ]
    scores = SegmentationScores(classes)
    for prediction, target in pairs:
        scores.update(prediction, target)
    _check(scores.compute(), pairs, classes)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.filterwarnings("ignore:classes without a pixel")
def test_iou_of_any_shape(shape: tuple[int, ...]) -> None:
    pair = _maps(shape, 3, seed=4, void=0.0)
    scores = SegmentationScores(3)
    scores.update(*pair)
    found, expected = scores.compute(), oracle.segmentation_scores([pair], 3)
    for name in ("iou", "dice"):
        assert found[name].tolist() == pytest.approx(expected[name], nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_types(dtype: torch.dtype) -> None:
    """255 * num_classes does not fit into the masks' own uint8."""
    prediction, target = _maps((40, 40), 21, seed=5)
    scores = SegmentationScores(21)
    scores.update(prediction.to(dtype), target.to(dtype))
    _check(scores.compute(), [(prediction, target)], 21)


def test_one_update_equals_many() -> None:
    prediction, target = _maps((6, 20, 20), 4, seed=6)
    once, often = SegmentationScores(4), SegmentationScores(4)
    once.update(prediction, target)
    for p, t in zip(prediction, target, strict=True):
        often.update(p, t)
    for name, value in once.compute().items():
        torch.testing.assert_close(often.compute()[name], value, equal_nan=True)


def test_perfect_and_hopeless() -> None:
    target = torch.tensor([0, 1, 2, 0, 255])
    perfect, hopeless = SegmentationScores(3), SegmentationScores(3)
    perfect.update(torch.tensor([0, 1, 2, 0, 1]), target)
    hopeless.update(torch.tensor([1, 2, 0, 2, 0]), target)
    found = perfect.compute()
    assert found["miou"].item() == 1
    assert found["mean_dice"].item() == 1
    assert found["mean_precision"].item() == 1
    assert found["mean_recall"].item() == 1
    assert found["mean_confusion_ratio"].item() == 0
    found = hopeless.compute()
    for name in ("miou", "mean_dice", "mean_precision", "mean_recall"):
        assert found[name].item() == 0
    assert not (found["confusion_ratio"] < 1e6).any()  # nothing right: no finite ratio


def test_void_pixels_do_not_count_whatever_is_predicted_there() -> None:
    prediction, target = _maps((30, 30), 3, seed=7)
    other = torch.where(target == 255, (prediction + 1) % 3, prediction)
    one, two = SegmentationScores(3), SegmentationScores(3)
    one.update(prediction, target)
    two.update(other, target)
    for name, value in one.compute().items():
        torch.testing.assert_close(two.compute()[name], value)


def test_another_ignore_index() -> None:
    prediction, target = _maps((30, 30), 4, seed=8, void=0.0)
    scores = SegmentationScores(4, ignore_index=0)
    scores.update(prediction.clamp(min=1), target)
    with pytest.warns(UserWarning, match=r"\b0\b"):
        found = scores.compute()
    expected = oracle.segmentation_scores([(prediction.clamp(min=1), target)], 4, 0)
    assert found["iou"].tolist() == pytest.approx(expected["iou"], nan_ok=True)


def test_an_absent_class_is_left_out_and_named() -> None:
    """Class 2 of 4 is in no target and no prediction (only below void)."""
    pair = (torch.tensor([0, 1, 3, 3, 2]), torch.tensor([0, 1, 3, 0, 255]))
    scores = SegmentationScores(4)
    scores.update(*pair)
    with pytest.warns(UserWarning, match=r"\b2\b"):
        found = scores.compute()
    for name in PER_CLASS:
        assert found[name].isnan().tolist() == [False, False, True, False], name
    _check(found, [pair], 4)


def test_a_class_only_predicted_or_only_in_targets_counts_zero() -> None:
    scores = SegmentationScores(3)
    scores.update(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores.compute()
    assert found["iou"].tolist() == pytest.approx([1 / 3, 0, 0])
    assert found["miou"].item() == pytest.approx(1 / 9)
    assert found["dice"].tolist() == pytest.approx([1 / 2, 0, 0])
    assert found["precision"][1].item() == 0
    assert found["recall"][2].item() == 0


def test_all_void_has_no_score() -> None:
    scores = SegmentationScores(2)
    scores.update(torch.zeros(3, 3).long(), torch.full((3, 3), 255))
    with pytest.warns(UserWarning, match="0, 1"):
        found = scores.compute()
    assert math.isnan(found["miou"].item())


def test_reset_forgets() -> None:
    pair = _maps((20, 20), 3, seed=9)
    scores = SegmentationScores(3)
    scores.update(*_maps((20, 20), 3, seed=10))
    scores.reset()
    scores.update(*pair)
    _check(scores.compute(), [pair], 3)


def test_dice_follows_from_iou() -> None:
    scores = SegmentationScores(4)
    scores.update(*_maps((30, 30), 4, seed=11))
    found = scores.compute()
    torch.testing.assert_close(found["dice"], 2 * found["iou"] / (1 + found["iou"]))


def test_classes_can_be_renumbered() -> None:
    prediction, target = _maps((30, 30), 4, seed=12, void=0.0)
    order = torch.tensor([2, 0, 3, 1])
    one, two = SegmentationScores(4), SegmentationScores(4)
    one.update(prediction, target)
    two.update(order[prediction], order[target])
    torch.testing.assert_close(two.compute()["iou"][order], one.compute()["iou"])


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="size"):
        SegmentationScores(3).update(torch.zeros(4, 4).long(), torch.zeros(4, 5).long())


@pytest.mark.parametrize("value", [3, 17, 254, -1])
def test_unknown_target_values_are_refused(value: int) -> None:
    target = torch.tensor([0, 1, 2, value])
    with pytest.raises(ValueError, match=r"0\.\.2"):
        SegmentationScores(3).update(torch.tensor([0, 1, 2, 0]), target)


@pytest.mark.parametrize("value", [3, 4, 255, -1])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_unknown_prediction_values_are_refused(value: int, target: int) -> None:
    """They must not land in the count of another pair of classes."""
    with pytest.raises(ValueError, match=r"0\.\.2"):
        SegmentationScores(3).update(torch.tensor([value]), torch.tensor([target]))


def test_dice_of_groups() -> None:
    """Each group by itself, whatever the order in which its masks come; NaN where a class is
    neither in a group's targets nor in its predictions."""
    classes, owners = 4, [0, 2, 0, 1, 2]
    pairs = [_maps((12, 9), classes if owner else 3, seed) for seed, owner in enumerate(owners)]
    dice, scores = GroupDice(classes, 3), SegmentationScores(classes)
    for (prediction, target), owner in zip(pairs, owners, strict=True):
        dice.update(scores.count(prediction, target), owner)
    found = dice.compute()
    for group in range(3):
        own = [pair for pair, owner in zip(pairs, owners, strict=True) if owner == group]
        expected = oracle.segmentation_scores(own, classes)["dice"]
        assert found[group].tolist() == pytest.approx(expected, nan_ok=True)
    assert math.isnan(found[0, 3])
    assert not scores.matrix.any()  # counting for a group leaves the whole alone


def test_mean_iou_of_coexistence_classes() -> None:
    """Only of those listed, in any order; the other scores stay as they are."""
    pair = _maps((30, 30), 5, seed=13)
    plain, scores = SegmentationScores(5), SegmentationScores(5, coexistence=[4, 1])
    plain.update(*pair)
    scores.update(*pair)
    found, expected = scores.compute(), oracle.segmentation_scores([pair], 5)["iou"]
    assert found["cmiou"].item() == pytest.approx((expected[1] + expected[4]) / 2)
    assert found["cmiou"].dim() == 0
    assert found.keys() - plain.compute().keys() == {"cmiou"}
    for name, value in plain.compute().items():
        assert torch.equal(found[name], value)


def test_an_absent_coexistence_class_is_left_out() -> None:
    pair = (torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 0, 3]))
    some, none = SegmentationScores(4, coexistence=(1, 2)), SegmentationScores(4, coexistence=(2,))
    for scores in (some, none):
        scores.update(*pair)
    with pytest.warns(UserWarning, match=r"\b2\b"):
        assert some.compute()["cmiou"].item() == pytest.approx(0.5)
    with pytest.warns(UserWarning, match=r"\b2\b"):
        assert math.isnan(none.compute()["cmiou"].item())


def test_no_coexistence_classes_give_no_score() -> None:
    for coexistence in (None, [], ()):
        scores = SegmentationScores(2, coexistence=coexistence)
        scores.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
        assert "cmiou" not in scores.compute()


@pytest.mark.parametrize("coexistence", [[5], [1, -1], [1, 2, 1], [255]])
def test_unknown_coexistence_classes_are_refused(coexistence: list[int]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.4"):
        SegmentationScores(5, coexistence=coexistence)
