"""AffinityNet's loss, its labels and its score against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracle import pixel_affinity as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.losses import pixel_affinity as module
from wsss.losses import pixel_affinity_loss
from wsss.losses.pixel_affinity import grid_labels, pair_hits
from wsss.metrics.pairs import PairAccuracy

GRIDS = [(4, 7), (6, 3), (1, 5), (5, 1), (1, 1)]


def _features(grid: tuple[int, int], depth: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, depth, *grid, generator=generator, dtype=torch.float64)


def _labels(kind: str, grid: tuple[int, int]) -> Tensor:
    """Two images of background, two classes and unknown cells, or of some of these."""
    generator = torch.Generator().manual_seed(3)
    draw = torch.randint(0, 4, (2, *grid), generator=generator)
    table = {
        "all": [0, 1, 2, 255],
        "no foreground": [0, 0, 0, 255],
        "no background": [1, 2, 1, 2],
        "one class": [2, 2, 2, 2],
        "unknown": [255] * 4,
    }[kind]
    return torch.tensor(table)[draw]


KINDS = ["all", "no foreground", "no background", "one class", "unknown"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_loss(grid: tuple[int, int], kind: str) -> None:
    labels = _labels(kind, grid)
    assert_matches_oracle(
        lambda f: pixel_affinity_loss(f, labels, 3),
        lambda f: oracle.loss(f, labels, 3),
        _features(grid),
    )


@pytest.mark.parametrize("radius", [2, 4, 5])
def test_radius(radius: int) -> None:
    grid = (6, 9)
    labels = _labels("all", grid)
    assert_matches_oracle(
        lambda f: pixel_affinity_loss(f, labels, radius),
        lambda f: oracle.loss(f, labels, radius),
        _features(grid, depth=2),
    )
    if radius == 5:
        default = pixel_affinity_loss(_features(grid), labels)
        assert default == pixel_affinity_loss(_features(grid), labels, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    labels = _labels("all", (4, 7))
    assert_matches_oracle(
        lambda f: pixel_affinity_loss(f, labels, 3),
        lambda f: oracle.loss(f, labels, 3),
        _features((4, 7)).to(dtype).double(),
        dtype,
    )


def test_under_autocast_it_is_computed_in_float32() -> None:
    features, labels = _features((4, 7)).float(), _labels("all", (4, 7))
    expected = value_and_gradient(lambda f: pixel_affinity_loss(f, labels), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradient(lambda f: pixel_affinity_loss(f, labels), features)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constant_and_huge_features_are_finite(kind: str, dtype: torch.dtype) -> None:
    labels = _labels(kind, (4, 7))
    for features in (torch.ones(2, 3, 4, 7), _features((4, 7)) * 1e6):
        value, gradient = value_and_gradient(
            lambda f: pixel_affinity_loss(f, labels, 3), features.to(dtype)
        )
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_by_hand() -> None:
    """Two channels; a class twice at distance 1, then background at 0.5 and 0.25."""
    features = torch.tensor([[0.0, 2.0, 2.0, 2.5], [0.0, 0.0, 1.0, 1.0]]).double()[None, :, None]
    labels = torch.tensor([[[1, 1, 0, 0]]])
    eps = 1e-5
    foreground = -math.log(math.exp(-1) + eps)
    background = -math.log(math.exp(-0.25) + eps)
    negative = -math.log(1 - math.exp(-0.5) + eps)
    expected = foreground / 4 + background / 4 + negative / 2
    assert float(pixel_affinity_loss(features, labels, 2)) == pytest.approx(expected, rel=1e-12)


def test_a_small_distance_is_not_rounded_away() -> None:
    features = torch.tensor([0.0, 1e-9]).view(1, 1, 1, 2)
    loss = pixel_affinity_loss(features, torch.tensor([[[1, 2]]]))
    assert float(loss) == pytest.approx(-math.log(1e-5 + 1e-9) / 2, rel=1e-6)


def test_ranks_share_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over two ranks is the loss of both batches together."""
    features, labels = _features((4, 7)), _labels("all", (4, 7))
    labels[0, :2] = 255
    whole = pixel_affinity_loss(features, labels, 3)
    counts: list[Tensor] = []
    parts: list[Tensor] = []

    def collect(totals: Tensor, count: Tensor) -> Tensor:
        parts.append(totals)
        counts.append(count)
        return totals

    def finish(totals: Tensor, count: Tensor) -> Tensor:
        return totals / (torch.stack(counts).double().mean(0))

    monkeypatch.setattr(module, "normalised_sum", collect)
    for rank in range(2):
        pixel_affinity_loss(features[rank : rank + 1], labels[rank : rank + 1], 3)
    assert not torch.equal(counts[0], counts[1])
    monkeypatch.setattr(module, "normalised_sum", finish)
    ranks = [pixel_affinity_loss(features[r : r + 1], labels[r : r + 1], 3) for r in range(2)]
    torch.testing.assert_close(torch.stack(ranks).mean(), whole)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, D, h, w\) and \(B, h, w\)"):
        pixel_affinity_loss(torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="radius=1"):
        pixel_affinity_loss(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5), 1)


# --- labels of cells -----------------------------------------------------------------------


@pytest.mark.parametrize("cell", [(2, 2), (3, 2), (1, 1), (4, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 1)], ids=str)
def test_grid_labels(size: tuple[int, int], cell: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0, 0, 1, 2, 255])
    for _ in range(4):
        mask = values[torch.randint(0, 6, (2, *size), generator=generator)]
        found = grid_labels(mask, cell)
        assert found.dtype == mask.dtype
        assert found.tolist() == [oracle.grid_labels(one, cell) for one in mask]


def test_half_is_not_enough() -> None:
    mask = torch.tensor([[[1, 1, 7, 7, 0, 0], [0, 0, 7, 1, 0, 255]]])
    assert grid_labels(mask, (2, 2)).tolist() == [[[255, 7, 0]]]


# --- score ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pair_accuracy(grid: tuple[int, int], kind: str) -> None:
    features, labels = _features(grid) * 0.7, _labels(kind, grid)
    metric = PairAccuracy(3)
    for i in range(2):
        metric.update(features[i : i + 1], labels[i : i + 1])
    found = metric.compute()
    expected = oracle.shares(features, labels, 3)
    assert list(found) == ["foreground", "background", "negative", "balanced_accuracy"]
    for name, share in zip(found, expected, strict=False):
        assert float(found[name]) == pytest.approx(
            math.nan if share is None else share, nan_ok=True
        )
    known = [share for share in expected if share is not None]
    mean = sum(known) / len(known) if known else math.nan
    assert float(found["balanced_accuracy"]) == pytest.approx(mean, nan_ok=True)


def test_pairs_are_counted_once() -> None:
    labels = torch.zeros(1, 6, 9, dtype=torch.int64)
    hits, counts = pair_hits(torch.zeros(1, 2, 6, 9), labels)
    assert hits.tolist() == counts.tolist() == [0, len(oracle.pairs(6, 9, 5)), 0]


def test_an_affinity_that_never_changes_scores_two_thirds() -> None:
    labels, metric = _labels("all", (6, 9)), PairAccuracy()
    metric.update(torch.zeros(2, 2, 6, 9), labels)
    assert float(metric.compute()["balanced_accuracy"]) == pytest.approx(2 / 3)
