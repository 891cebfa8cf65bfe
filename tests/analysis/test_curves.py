"""Counts and curves against pixels looked at one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from tests.oracle import analysis as oracle
from tests.oracle.analysis import Pixel
from tests.oracle.labels import perplexity
from wsss.analysis.counts import DISTANCE_RATIO, ConfidenceCounts
from wsss.analysis.curves import (
    AccuracyBin,
    ThresholdScore,
    accuracy,
    accuracy_by_confidence,
    accuracy_by_perplexity,
    accuracy_of_share,
    best_threshold,
    confidence_histogram,
    confusion,
    mean_iou,
    rank_correlation,
    region_score,
    reliability_by_label,
    scores_by_threshold,
    separation,
    threshold_score,
)

C = 3
VOID = 255


def random_pixels(number: int = 600, seed: int = 0) -> list[Pixel]:
    """Confident pixels are right more often; some are void; class 3 is never true."""
    generator = torch.Generator().manual_seed(seed)
    nu = torch.rand(number, generator=generator).square().tolist()
    strongest = torch.randint(0, C, (number,), generator=generator).tolist()
    chance = torch.rand(number, generator=generator).tolist()
    other = torch.tensor([0, 1, 2, VOID])[torch.randint(0, 4, (number,), generator=generator)]
    pixels = []
    for n, s, p, o in zip(nu, strongest, chance, other.tolist(), strict=True):
        true = (s + 1 if s < 2 else 0) if p < n else 0 if p < 0.7 else o
        pixels.append((n, s, true))
    # Bin edges belong to the bin above; nothing is beyond either end.
    return [*pixels, (0.0, 0, 0), (0.0, 1, 1), (0.5, 1, 2), (0.45, 0, 1), (1.0, 1, 2)]


def counted(pixels: list[Pixel], xi: float, **kwargs: float) -> ConfidenceCounts:
    """In two calls, of one map and of a flat one."""
    counts = ConfidenceCounts(C, xi, **kwargs)
    nu, strongest, true = (torch.tensor(column) for column in zip(*pixels, strict=True))
    half = len(pixels) // 4 * 2
    shape = (2, half // 2)
    counts.update(nu[:half].view(shape), strongest[:half].view(shape), true[:half].view(shape))
    counts.update(nu[half:], strongest[half:], true[half:])
    return counts


def single(xi: float) -> float:
    """As the threshold of a checkpoint is: in single precision."""
    return float(torch.tensor(xi))


XI = [single(xi) for xi in (0.2, 0.377, 0.5, 0.81)]
PIXELS = random_pixels()


@pytest.fixture(params=XI)
def xi(request: pytest.FixtureRequest) -> float:
    value: float = request.param
    return value


# --- labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.01, XI[1], 0.45, 0.5, 0.99])
def test_label_scores_at_any_threshold(threshold: float) -> None:
    counts = counted(PIXELS, XI[1])
    score = threshold_score(counts, threshold)
    assert score.threshold == threshold
    assert score.accuracy == pytest.approx(oracle.accuracy(PIXELS, threshold), abs=1e-12)
    assert score.miou == pytest.approx(oracle.mean_iou(PIXELS, threshold, C), abs=1e-12)


def test_confusion_has_truth_in_rows(xi: float) -> None:
    expected = torch.zeros(C + 1, C + 1, dtype=torch.int64)
    for pixel in oracle.scored(PIXELS):
        expected[pixel[2], oracle.label(pixel, xi)] += 1
    assert expected[3].sum() == 0  # mIoU must still count the class that is only predicted
    assert torch.equal(confusion(counted(PIXELS, xi), xi), expected)


def test_a_class_of_neither_truth_nor_prediction_is_left_out() -> None:
    assert mean_iou(torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])) == pytest.approx(
        (6 / 8 + 2 / 4) / 2
    )
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64)))
    assert math.isnan(accuracy(torch.zeros(3, 3, dtype=torch.int64)))


def test_a_threshold_that_cuts_a_bin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold=0\.1234567 is no edge"):
        threshold_score(counted(PIXELS, XI[0]), 0.1234567)


def test_scores_by_threshold_and_the_best() -> None:
    scores = scores_by_threshold(counted(PIXELS, XI[1]))
    assert [s.threshold for s in scores] == [i / 100 for i in range(1, 100)]
    values = [oracle.mean_iou(PIXELS, i / 100, C) for i in range(1, 100)]
    assert [s.miou for s in scores] == pytest.approx(values, abs=1e-12)
    best = best_threshold(scores)
    assert best.miou == max(s.miou for s in scores)
    tied = [ThresholdScore(0.3, 0.2, 0.9), ThresholdScore(0.4, 0.5, 0.1)]
    tied += [ThresholdScore(0.5, 0.5, 0.9), ThresholdScore(0.6, 0.4, 1.0)]
    assert best_threshold(tied).threshold == 0.4


# --- bins ----------------------------------------------------------------------------------


def assert_bins(
    bins: list[AccuracyBin], groups: Iterator[list[Pixel]], xi: float, total: int
) -> None:
    seen = 0
    for found, group in zip(bins, groups, strict=True):
        assert found.pixels == len(group)
        assert found.share == pytest.approx(len(group) / total)
        assert found.accuracy == pytest.approx(oracle.accuracy(group, xi), nan_ok=True)
        seen += len(group)
    assert seen == total


@pytest.mark.parametrize("num_bins", [20, 10])
def test_accuracy_by_confidence(xi: float, num_bins: int) -> None:
    bins = accuracy_by_confidence(counted(PIXELS, xi), num_bins)
    edges = [i / num_bins for i in range(num_bins + 1)]
    assert [b.low for b in bins] == edges[:-1]
    assert [b.high for b in bins] == edges[1:]
    edges[-1] = 2.0  # the last bin holds 1
    groups = (oracle.between(PIXELS, lambda nu: nu, low, high) for low, high in pairwise(edges))
    assert_bins(bins, groups, xi, len(oracle.scored(PIXELS)))


def test_bins_that_would_cut_counted_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="divisor of 100"):
        accuracy_by_confidence(counted(PIXELS, XI[0]), 30)


@pytest.mark.parametrize("label", ["all", "foreground", "background"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1.0), (0.5, 2.0), (0.9, 0.5)])
def test_accuracy_by_perplexity(xi: float, alpha: float, beta: float, label: str) -> None:
    bins = accuracy_by_perplexity(counted(PIXELS, xi, alpha=alpha, beta=beta), label)
    assert len(bins) == 17
    assert bins[0].low == pytest.approx(perplexity(1.0, xi, alpha, beta))
    assert bins[-1].high == math.inf
    for previous, following in pairwise(bins):
        assert previous.high == following.low
        assert previous.high ** (1 / beta) - previous.low ** (1 / beta) == pytest.approx(0.25)
    # A pixel on the threshold itself is infinitely perplexing: see below.
    everything = [p for p in PIXELS if p[0] != xi]
    side = {"all": (0.0, 2.0), "foreground": (xi, 2.0), "background": (0.0, xi)}[label]
    pixels = oracle.between(everything, lambda nu: nu, *side)

    def value(nu: float) -> float:
        return perplexity(nu, xi, alpha, beta)

    # The least perplexity may come out a rounding error below the first edge.
    lows = [0.0, *(b.low for b in bins[1:])]
    groups = (
        oracle.between(pixels, value, low, b.high if b.high < math.inf else 1e9)
        for low, b in zip(lows, bins, strict=True)
    )
    counts = counted(everything, xi, alpha=alpha, beta=beta)
    assert_bins(accuracy_by_perplexity(counts, label), groups, xi, len(pixels))


def test_a_pixel_on_the_threshold_is_of_the_highest_perplexity() -> None:
    bins = accuracy_by_perplexity(counted([(0.5, 0, 1), (0.5, 0, 1)], 0.5), "foreground")
    assert [b.pixels for b in bins] == [0] * 16 + [2]
    assert bins[-1].accuracy == 1


def test_unknown_kind_of_label() -> None:
    with pytest.raises(ValueError, match="label='void'"):
        accuracy_by_perplexity(counted(PIXELS, XI[0]), "void")


def test_histogram_splits_by_truth() -> None:
    bins = confidence_histogram(counted(PIXELS, XI[1]), 25)
    for i, found in enumerate(bins):
        assert (found.low, found.high) == (i / 25, (i + 1) / 25)
        high = 2.0 if i == 24 else found.high
        group = oracle.between(PIXELS, lambda nu: nu, found.low, high)
        assert found.background == sum(true == 0 for _, _, true in group)
        assert found.foreground == sum(true != 0 for _, _, true in group)


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1.0), (0.5, 2.0), (0.9, 0.5)])
def test_reliability_by_label(xi: float, alpha: float, beta: float) -> None:
    # In the middle of bins of 0.01, in which all pixels weigh the same; the threshold's apart.
    pixels = [(min(nu, 0.99) // 0.01 * 0.01 + 0.005, s, t) for nu, s, t in PIXELS]
    pixels = [p for p in pixels if abs(p[0] - xi) > 0.02]
    rows = reliability_by_label(counted(pixels, xi, alpha=alpha, beta=beta))
    assert [row.label for row in rows] == [0, 1, 2, 3]
    for row in rows:
        own = [p for p in pixels if p[2] == row.label]
        assert row.pixels == len(own)
        assert row.right == pytest.approx(oracle.accuracy(own, xi), nan_ok=True)
        expected = oracle.reliability_of_label(pixels, xi, row.label, alpha, beta)
        found = (row.right_by_weight, row.weight_right, row.weight_wrong)
        assert found == pytest.approx(expected, rel=0.03, nan_ok=True)
    assert math.isnan(rows[3].right)  # never true
    # The mean weight of all pixels is 1.
    total = sum(
        row.pixels * (row.right * row.weight_right + (1 - row.right) * row.weight_wrong)
        for row in rows[:3]
    )
    assert total == pytest.approx(sum(row.pixels for row in rows))


# --- regions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "alpha", "beta"), [(1.0, 0.8, 1.0), (0.5, 0.8, 1.0), (2, 0.7, 2)]
)
def test_low_perplexity_region(xi: float, limit: float, alpha: float, beta: float) -> None:
    counts = counted(PIXELS, xi, max_perplexity=limit, alpha=alpha, beta=beta)
    member = oracle.low_perplexity(PIXELS, xi, limit, alpha, beta)
    nu = torch.tensor([p[0] for p in PIXELS])
    assert counts.is_low_perplexity(nu).tolist() == member
    inside = [p for p, m in zip(PIXELS, member, strict=True) if m]
    assert 0 < len(inside) < len(PIXELS)
    found = region_score(counts, "own", 1000, counts.low_perplexity)
    assert found.region == "own"
    assert found.pixels == len(oracle.scored(inside))
    assert found.share == pytest.approx(found.pixels / 1000)
    assert found.accuracy == pytest.approx(oracle.accuracy(inside, xi))
    assert found.miou == pytest.approx(oracle.mean_iou(inside, xi, C))


def test_a_limit_below_the_least_perplexity_leaves_nothing() -> None:
    counts = counted(PIXELS, 0.5, max_perplexity=0.2)  # -log 0.8 = 0.22
    assert not counts.low_perplexity.any()
    found = region_score(counts, "own", len(PIXELS), counts.low_perplexity)
    assert found.pixels == 0
    assert math.isnan(found.accuracy)


def test_pixels_may_be_left_out() -> None:
    nu, strongest, true = (torch.tensor(column) for column in zip(*PIXELS, strict=True))
    keep = torch.arange(len(PIXELS)) % 3 == 0
    counts = ConfidenceCounts(C, 0.5)
    counts.update(nu, strongest, true, keep)
    assert torch.equal(counts.counts, counted_alone(PIXELS[::3]).counts)


def counted_alone(pixels: list[Pixel]) -> ConfidenceCounts:
    counts = ConfidenceCounts(C, 0.5)
    for nu, strongest, true in pixels:
        counts.update(torch.tensor([nu]), torch.tensor([strongest]), torch.tensor([true]))
    return counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, r"threshold=0\.0"),
        ({"threshold": 1.0}, r"threshold=1\.0"),
        ({"threshold": 0.5, "alpha": 1.0}, r"alpha=1\.0"),
    ],
)
def test_values_outside_their_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfidenceCounts(C, **arguments)  # type: ignore[arg-type]


# --- does perplexity tell right from wrong? --------------------------------------------------


def levelled_pixels(xi: float) -> list[Pixel]:
    """Each in the middle of one of the 100 steps of distance: ties are exactly those of the steps.

    Two pixels of equal distance on both sides have equal perplexity only up to rounding; the
    distances of one side are therefore odd, of the other even.
    """
    generator = torch.Generator().manual_seed(3)
    pixels = []
    for _ in range(150):
        level = int(torch.randint(0, 100, (), generator=generator))
        d = (level + 0.5) / 100
        nu = xi + d * (1 - xi) if level % 2 else xi - d * xi
        right = float(torch.rand((), generator=generator)) < 0.3 + 0.6 * d
        true = (1 if nu >= xi else 0) if right else 2
        pixels.append((nu, 0, true))
    return [*pixels, *pixels[:40]]  # ties


@pytest.mark.parametrize("share", [0.2, -0.2, 0.07, -0.55, 1.0])
def test_accuracy_of_the_most_and_the_least_reliable(xi: float, share: float) -> None:
    pixels = levelled_pixels(xi)
    expected = oracle.accuracy_of_share(_rounded(pixels, xi), xi, share, 0.8, 1.0)
    assert accuracy_of_share(counted(pixels, xi), share) == pytest.approx(expected)


def test_separation(xi: float) -> None:
    pixels = levelled_pixels(xi)
    expected = oracle.separation(_rounded(pixels, xi), xi, 0.8, 1.0)
    assert 0.5 < expected < 1
    assert separation(counted(pixels, xi)) == pytest.approx(expected)


def _rounded(pixels: list[Pixel], xi: float) -> list[Pixel]:
    """The same pixels with exactly equal confidences wherever they are meant to be equal."""
    return [(round(nu, 12), strongest, true) for nu, strongest, true in pixels]


def test_separation_of_the_extremes() -> None:
    right, wrong = (0.99, 0, 1), (0.55, 0, 2)
    assert separation(counted([right, wrong, right], 0.5)) == 1
    assert separation(counted([(0.99, 0, 2), (0.55, 0, 1)], 0.5)) == 0
    assert separation(counted([right, (0.99, 0, 2)], 0.5)) == 0.5
    assert math.isnan(separation(counted([right, right], 0.5)))


def test_one_atom_of_pixels_is_shared_out() -> None:
    # 10 pixels of no activation, 7 of them right: a fifth of all is 7/10 right.
    pixels = [(0.0, 0, 0)] * 7 + [(0.0, 0, 1)] * 3 + [(0.6, 0, 2)] * 5
    counts = counted([*pixels, (0.6, 0, VOID)], 0.5)
    assert accuracy_of_share(counts, 0.2) == pytest.approx(0.7)
    assert accuracy_of_share(counts, 0.8) == pytest.approx(7 / 12)
    assert accuracy_of_share(counts, -0.2) == 0


def test_rank_correlation() -> None:
    def bins(*accuracies: float) -> list[AccuracyBin]:
        return [AccuracyBin(i, i + 1, 5, 0.1, a) for i, a in enumerate(accuracies)]

    assert rank_correlation(bins(0.9, 0.7, 0.4)) == pytest.approx(-1)
    assert rank_correlation(bins(0.1, 0.3, 0.2, 0.4)) == pytest.approx(0.8)
    empty = AccuracyBin(9, 10, 0, 0.0, math.nan)
    assert rank_correlation([empty, *bins(0.9, 0.7, 0.4), empty]) == pytest.approx(-1)
    assert math.isnan(rank_correlation(bins(0.9, 0.7)))
    assert math.isnan(rank_correlation(bins(0.9, 0.9, 0.9)))


def test_perplexity_bins_are_a_quarter_apart() -> None:
    assert -math.log(DISTANCE_RATIO) == pytest.approx(0.25)


def test_counts_do_not_grow_with_pixels() -> None:
    counts = counted(PIXELS, 0.377)
    size = counts.counts.shape
    counts.update(torch.rand(5000), torch.zeros(5000).long(), torch.zeros(5000).long())
    assert counts.counts.shape == size
    assert len(size) == 3
    assert size[0] < 400
    assert counts.counts.sum() == len(oracle.scored(PIXELS)) + 5000
