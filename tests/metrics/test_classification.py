"""``ClassificationScores`` against walking down rankings, and against scikit-learn."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from tests.metrics.ranks import compute_on_ranks
from tests.oracle import classification as oracle
from tests.oracle.metrics import mean
from wsss.metrics import ClassificationScores, average_precision


def _set(images: int, classes: int, seed: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    """(scores, labels); every class has a positive, and the first image has no label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(images, classes, generator=generator) < 0.3
    labels[torch.arange(classes) % (images - 1) + 1, torch.arange(classes)] = True
    labels[0] = False
    scores = torch.randn(images, classes, generator=generator) + labels
    return (scores * 2).round() if ties else scores, labels.float()


def _check(found: dict[str, Tensor], scores: Tensor, labels: Tensor) -> None:
    ap, image_ap = oracle.per_class(scores, labels), oracle.per_image(scores, labels)
    assert set(found) == {"ap", "map", "image_ap"}
    assert found["ap"].view(-1).tolist() == pytest.approx(ap, rel=1e-12, nan_ok=True)
    assert found["map"].item() == pytest.approx(mean(ap), rel=1e-12, nan_ok=True)
    assert found["image_ap"].item() == pytest.approx(mean(image_ap), rel=1e-12, nan_ok=True)
    assert found["map"].dim() == found["image_ap"].dim() == 0


def _of(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    metric = ClassificationScores(scores.shape[1])
    metric.update(scores, labels)
    return metric.compute()


# --- against the oracle and scikit-learn -------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("images", "classes"), [(2, 2), (40, 5), (9, 30), (60, 1)])
def test_one_set(images: int, classes: int, ties: bool) -> None:
    for seed in range(3):
        pair = _set(images, classes, seed, ties)
        _check(_of(*pair), *pair)


@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn(ties: bool) -> None:
    scores, labels = _set(50, 6, seed=3, ties=ties)
    found = _of(scores, labels)
    s, y = scores.numpy(), labels.numpy()
    ap = [average_precision_score(y[:, c], s[:, c]) for c in range(6)]
    image_ap = [average_precision_score(y[i], s[i]) for i in range(50) if y[i].any()]
    assert found["ap"].tolist() == pytest.approx(ap)
    assert found["map"].item() == pytest.approx(np.mean(ap))
    assert found["image_ap"].item() == pytest.approx(np.mean(image_ap))
    assert len(image_ap) < 50


def test_one_update_equals_many() -> None:
    scores, labels = _set(23, 4, seed=4)
    often = ClassificationScores(4)
    for part in torch.arange(23).split(5):
        often.update(scores[part], labels[part])
    for name, value in _of(scores, labels).items():
        torch.testing.assert_close(often.compute()[name], value, rtol=0, atol=1e-15)


def test_reset_forgets() -> None:
    metric = ClassificationScores(3)
    metric.update(*_set(10, 3, seed=5))
    metric.reset()
    pair = _set(12, 3, seed=6)
    metric.update(*pair)
    _check(metric.compute(), *pair)


def test_compute_twice_with_an_update_between() -> None:
    (s1, y1), (s2, y2) = _set(10, 3, seed=7), _set(12, 3, seed=8)
    metric = ClassificationScores(3)
    metric.update(s1, y1)
    _check(metric.compute(), s1, y1)
    metric.update(s2, y2)
    _check(metric.compute(), torch.cat([s1, s2]), torch.cat([y1, y2]))


# --- by hand -----------------------------------------------------------------------------------


def test_two_ways_of_the_same_scores() -> None:
    """Perfect within each image, wrong over the set: the scores of images do not compare."""
    scores = torch.tensor([[9.0, 8.0], [1.0, 2.0]])
    labels = torch.tensor([[1, 0], [0, 1]])
    found = _of(scores, labels)
    assert found["image_ap"].item() == 1
    assert found["ap"].tolist() == [1, 0.5]
    assert found["map"].item() == 0.75


def test_ranking_by_hand() -> None:
    """Positives at ranks 1, 3 and 4: (1/1 + 2/3 + 3/4) / 3."""
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.2, 0.1]), torch.tensor([1, 0, 1, 1, 0])
    expected = (1 + 2 / 3 + 3 / 4) / 3
    assert average_precision(scores, labels).item() == pytest.approx(expected)
    assert average_precision(-scores, labels).item() == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)


def test_equal_scores_count_as_one_whatever_their_order() -> None:
    scores = torch.tensor([3.0, 1, 1, 1, 0])
    for labels in ([1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0]):
        found = average_precision(scores, torch.tensor(labels)).item()
        assert found == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)


def test_all_scores_equal() -> None:
    """The share of positives, and no credit for the order of the classes."""
    labels = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]])
    found = average_precision(torch.zeros(2, 4), labels)
    assert found.tolist() == [0.25, 0.5]


def test_all_labels() -> None:
    found = _of(torch.randn(4, 3, generator=torch.Generator().manual_seed(9)), torch.ones(4, 3))
    assert found["ap"].tolist() == [1, 1, 1]
    assert found["image_ap"].item() == 1


def test_only_the_order_counts() -> None:
    """Large logits, of which a sigmoid would make ties, and infinite ones."""
    scores, labels = _set(30, 4, seed=10)
    expected = _of(scores, labels)
    for other in (scores * 100, scores + 50, scores.sigmoid(), scores.exp()):
        for name, value in _of(other, labels).items():
            assert torch.equal(value, expected[name])
    scores = torch.tensor([math.inf, 2.0, -math.inf, -math.inf])
    assert average_precision(scores, torch.tensor([0, 1, 1, 0])).tolist() == pytest.approx(0.5)


# --- what is left out --------------------------------------------------------------------------


def test_a_class_without_a_positive_is_left_out_and_named() -> None:
    scores, labels = _set(20, 4, seed=11)
    labels[:, 2] = 0
    metric = ClassificationScores(4, class_names=["bird", "boat", "cat", "dog"])
    metric.update(scores, labels)
    with pytest.warns(UserWarning, match=r"means: cat\."):
        found = metric.compute()
    assert found["ap"].isnan().tolist() == [False, False, True, False]
    _check(found, scores, labels)
    with pytest.warns(UserWarning, match=r"means: 2\."):
        _of(scores, labels)


def test_nothing_to_warn_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _of(*_set(20, 4, seed=12))


def test_an_image_without_labels_is_a_negative_of_every_class() -> None:
    scores, labels = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[0, 0], [1, 1]])
    found = _of(scores, labels)
    assert found["ap"].tolist() == [0.5, 0.5]
    assert found["image_ap"].item() == 1  # of the second image alone


@pytest.mark.filterwarnings("ignore:classes without a positive")
def test_one_image() -> None:
    scores, labels = torch.tensor([[0.1, 0.4, 0.3]]), torch.tensor([[1, 0, 1]])
    found = _of(scores, labels)
    assert found["ap"].tolist() == pytest.approx([1, math.nan, 1], nan_ok=True)
    assert found["image_ap"].item() == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.filterwarnings("ignore:classes without a positive")
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_an_empty_set() -> None:
    never = ClassificationScores(3)
    empty = ClassificationScores(3)
    empty.update(torch.zeros(0, 3), torch.zeros(0, 3))
    for metric in (never, empty):
        found = metric.compute()
        assert found["ap"].isnan().tolist() == [True] * 3
        assert math.isnan(found["map"].item())
        assert math.isnan(found["image_ap"].item())
    assert average_precision(torch.zeros(0), torch.zeros(0)).isnan()


# --- types, devices, ranks ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("label_dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_types(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    """Coarse types make ties, which are those of the scores as given."""
    scores, labels = _set(40, 4, seed=13)
    scores = (scores * 4).to(dtype)
    if dtype != torch.float64:
        assert len(scores.unique()) < scores.numel()
    metric = ClassificationScores(4)
    metric.update(scores, labels.to(label_dtype))
    # Ranks gather them, and must agree on their type.
    assert {state.dtype for state in [*metric.scores, *metric.labels]} == {torch.float32}
    _check(metric.compute(), scores.double(), labels)


def test_scores_with_a_gradient() -> None:
    """What is kept holds no graph, and with it no activations."""
    scores, labels = _set(10, 3, seed=14)
    metric = ClassificationScores(3)
    metric.update(scores.requires_grad_(), labels)
    assert not any(state.requires_grad for state in metric.scores)
    _check(metric.compute(), scores.detach(), labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device() -> None:
    scores, labels = _set(30, 4, seed=15, ties=True)
    metric = ClassificationScores(4).cuda()
    metric.update(scores.cuda(), labels.cuda())
    found = metric.compute()
    assert found["map"].is_cuda
    _check({k: v.cpu() for k, v in found.items()}, scores, labels)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Seven images in batches of two; one process has three of them, in another run none."""
    pairs = [_set(n, 4, seed) for seed, n in enumerate([2, 2, 3], start=16)]
    scores, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    expected = _of(scores, labels)
    for name, ranks in {"uneven": [pairs[:2], pairs[2:]], "none": [pairs, []]}.items():
        (tmp_path / name).mkdir()
        for (found,) in compute_on_ranks([ClassificationScores(4)], ranks, tmp_path / name):
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-15, atol=0)


def test_the_default_type_does_not_matter() -> None:
    """A run in bfloat16 sets it; a rank without images must still send what the others do."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        metric = ClassificationScores(4)
    finally:
        torch.set_default_dtype(torch.float32)
    pair = _set(12, 4, seed=19)
    metric.update(*pair)
    assert {state.dtype for state in [*metric.scores, *metric.labels]} == {metric.dtype}
    _check(metric.compute(), *pair)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "labels"), [((4, 3), (4, 2)), ((4, 2), (4, 2)), ((3,), (3,)), ((4, 3), (5, 3))]
)
def test_shapes_are_checked(scores: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(images, 3\)"):
        ClassificationScores(3).update(torch.zeros(scores), torch.zeros(labels))


def test_nan_has_no_rank() -> None:
    scores, labels = _set(5, 3, seed=20)
    scores[2, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        ClassificationScores(3).update(scores, labels)


@pytest.mark.parametrize("value", [0.5, -1, 255])
def test_labels_are_zero_or_one(value: float) -> None:
    scores, labels = _set(5, 3, seed=21)
    labels[2, 1] = value
    with pytest.raises(ValueError, match="0 or 1"):
        ClassificationScores(3).update(scores, labels)


def test_names_are_those_of_the_foreground() -> None:
    with pytest.raises(ValueError, match="background"):
        ClassificationScores(2, class_names=["background", "cat", "dog"])
