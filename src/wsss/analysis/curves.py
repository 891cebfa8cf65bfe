"""Curves and scores of the CAM pseudo-labels that were counted; nothing here sees an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from wsss.analysis.counts import DISTANCE_RATIO, PERPLEXITY_BINS, STEPS, ConfidenceCounts
from wsss.pseudo.perplexity import perplexity

CONFIDENCE_BINS = 20
HISTOGRAM_BINS = 50
LABELS = ("all", "foreground", "background")


class AccuracyBin(NamedTuple):
    """Pixels whose confidence (or perplexity) is in [low, high); accuracy NaN of none.

    ``share`` is that of all pixels of the same kind.
    """

    low: float
    high: float
    pixels: int
    share: float
    accuracy: float


class HistogramBin(NamedTuple):
    """True background and foreground pixels whose confidence is in [low, high)."""

    low: float
    high: float
    background: int
    foreground: int


class ThresholdScore(NamedTuple):
    """Quality of the CAM pseudo-label at one threshold."""

    threshold: float
    miou: float
    accuracy: float


class RegionScore(NamedTuple):
    """Quality of the CAM pseudo-label on a part of the pixels."""

    region: str
    pixels: int
    share: float
    accuracy: float
    miou: float


class LabelReliability(NamedTuple):
    """What RAW makes of the pixels of one true label (0: background); NaN where there are none.

    Attributes:
        label: 0..C.
        pixels: whose true label it is.
        right: share of them whose pseudo-label it is.
        right_by_weight: the same with each pixel counted by its weight, over the whole label: a
            balanced CAM2Seg takes the mean of pixels labelled foreground and background apart.
        weight_right: mean weight of the right ones; 1 is the mean over all pixels.
        weight_wrong: of the others. Where it is the larger one, RAW teaches the mistake.
    """

    label: int
    pixels: int
    right: float
    right_by_weight: float
    weight_right: float
    weight_wrong: float


# --- scores of a label map -----------------------------------------------------------------------


def confusion(counts: ConfidenceCounts, threshold: float, region: Tensor | None = None) -> Tensor:
    """Confusion matrix of the CAM pseudo-label at a threshold (eq. 3).

    Args:
        counts: pixels.
        threshold: an edge of the bins.
        region: (K,) bool, bins that count; None: all.

    Returns:
        (C + 1, C + 1) int64, truth in rows.
    """
    table = counts.counts.cpu()
    if region is not None:
        table = table * region[:, None, None]
    above = counts.above(threshold)
    matrix = torch.zeros((counts.num_classes + 1,) * 2, dtype=torch.int64)
    matrix[:, 1:] = table[above].sum(0).T
    matrix[:, 0] = table[~above].sum((0, 1))
    return matrix


def accuracy(matrix: Tensor) -> float:
    """Share of right pixels of a confusion matrix; NaN of an empty one."""
    return _ratio(int(matrix.diagonal().sum()), int(matrix.sum()))


def mean_iou(matrix: Tensor) -> float:
    """mIoU of a confusion matrix over the labels that truth or prediction holds."""
    both = matrix.diagonal().double()
    either = matrix.sum(0) + matrix.sum(1) - both
    return float((both / either)[either > 0].mean())


def region_score(
    counts: ConfidenceCounts, name: str, total: int, region: Tensor | None = None
) -> RegionScore:
    """Score at the counts' own threshold; ``total`` pixels are the whole of the share."""
    matrix = confusion(counts, counts.threshold, region)
    pixels = int(matrix.sum())
    return RegionScore(name, pixels, _ratio(pixels, total), accuracy(matrix), mean_iou(matrix))


# --- accuracy by confidence and by perplexity ----------------------------------------------------


def pixels_and_right(counts: ConfidenceCounts) -> tuple[Tensor, Tensor]:
    """(K,) int64 each: pixels of every bin, and those whose label at xi is the true one."""
    table = counts.counts.cpu()
    as_class = table[:, :, 1:].diagonal(dim1=1, dim2=2).sum(1)
    as_background = table[:, :, 0].sum(1)
    above = counts.above(counts.threshold)
    return table.sum((1, 2)), torch.where(above, as_class, as_background)


def accuracy_by_confidence(
    counts: ConfidenceCounts, num_bins: int = CONFIDENCE_BINS
) -> list[AccuracyBin]:
    """Accuracy of the label at xi in equal bins of confidence (Fig. 3a of the paper).

    Args:
        counts: pixels.
        num_bins: a divisor of 100, so that no counted bin is cut.
    """
    edges = [i / num_bins for i in range(num_bins + 1)]
    return _accuracy_bins(counts, _equal_bins(counts, num_bins), edges)


def accuracy_by_perplexity(counts: ConfidenceCounts, label: str = "all") -> list[AccuracyBin]:
    """Accuracy of the label at xi in bins of perplexity (Fig. 3c of the paper).

    The bins are equal steps of ``-log(alpha d)``, from the least possible upwards; the last one
    has no upper end.

    Args:
        counts: pixels.
        label: ``all`` pixels, or those whose pseudo-label is ``foreground`` or ``background``.

    Raises:
        ValueError: unknown ``label``.
    """
    if label not in LABELS:
        raise ValueError(f"label='{label}': choose one of {', '.join(LABELS)}.")
    index = (counts.distance.log() / math.log(DISTANCE_RATIO)).floor().long()
    index = index.clamp(0, PERPLEXITY_BINS - 1)
    least, step = -math.log(counts.alpha), -math.log(DISTANCE_RATIO)
    edges = [(least + i * step) ** counts.beta for i in range(PERPLEXITY_BINS)]
    above = counts.above(counts.threshold)
    region = {"all": None, "foreground": above, "background": ~above}[label]
    return _accuracy_bins(counts, index, [*edges, math.inf], region)


def reliability_by_label(counts: ConfidenceCounts) -> list[LabelReliability]:
    """Reliability weights (eq. 5) of right and wrong pixels of every true label, at xi.

    A pixel has the weight of the middle of its bin, and the mean runs over all images at once, not
    over a batch.
    """
    table = counts.counts.cpu().double()
    reliability = perplexity(counts.middle, counts.threshold, counts.alpha, counts.beta) ** -1
    weight = reliability / (reliability * table.sum((1, 2))).sum() * table.sum()
    above = counts.above(counts.threshold)
    rows = []
    for label in range(counts.num_classes + 1):
        pixels = table[:, :, label].sum(1)
        right = table[:, label - 1, label] * above if label else pixels * ~above
        all_pixels, all_weight = float(pixels.sum()), float((pixels * weight).sum())
        right_pixels, right_weight = float(right.sum()), float((right * weight).sum())
        rows.append(
            LabelReliability(
                label,
                int(all_pixels),
                _ratio(right_pixels, all_pixels),
                _ratio(right_weight, all_weight),
                _ratio(right_weight, right_pixels),
                _ratio(all_weight - right_weight, all_pixels - right_pixels),
            )
        )
    return rows


def accuracy_of_share(counts: ConfidenceCounts, share: float) -> float:
    """Accuracy at xi of the ``share`` of the pixels with the lowest perplexity (highest: < 0).

    Pixels within 0.01 of normalised distance count as equal; where the border falls among equals,
    as many of them are taken as are needed, each as likely as the other.

    Args:
        counts: pixels.
        share: in [-1, 1], not 0.
    """
    pixels, right = (t.double() for t in _by_perplexity_level(counts))
    if share < 0:
        pixels, right = pixels.flip(0), right.flip(0)
    wanted = abs(share) * pixels.sum()
    taken_before = pixels.cumsum(0) - pixels
    taken = torch.minimum(pixels, (wanted - taken_before).clamp(min=0))
    return float((right * taken / pixels.clamp(min=1)).sum() / wanted)


def separation(counts: ConfidenceCounts) -> float:
    """How often a right pixel has a lower perplexity than a wrong one (area under the ROC curve).

    0.5 says that perplexity tells nothing of accuracy, 1 that a limit on it keeps the right pixels
    alone. Pixels within 0.01 of normalised distance count as equal, and equals as one half. NaN
    where all pixels are right or all wrong.
    """
    pixels, right = (t.double() for t in _by_perplexity_level(counts))
    wrong = pixels - right
    wrong_higher = wrong.sum() - wrong.cumsum(0)
    won = (right * (wrong_higher + wrong / 2)).sum()
    return _ratio(float(won), float(right.sum() * wrong.sum()))


def rank_correlation(bins: Sequence[AccuracyBin]) -> float:
    """Spearman's correlation of position and accuracy over the bins with pixels; NaN of < 3."""
    found = [(i, b.accuracy) for i, b in enumerate(bins) if b.pixels]
    if len(found) < 3 or len({a for _, a in found}) < 2:
        return math.nan
    return float(spearmanr(*zip(*found, strict=True)).statistic)


# --- thresholds ----------------------------------------------------------------------------------


def confidence_histogram(
    counts: ConfidenceCounts, num_bins: int = HISTOGRAM_BINS
) -> list[HistogramBin]:
    """True background and foreground in equal bins of confidence; ``num_bins`` divides 100."""
    table = counts.counts.cpu()
    index = _equal_bins(counts, num_bins)
    background = _sum_by(index, table[:, :, 0].sum(1), num_bins).tolist()
    foreground = _sum_by(index, table[:, :, 1:].sum((1, 2)), num_bins).tolist()
    return [
        HistogramBin(i / num_bins, (i + 1) / num_bins, int(background[i]), int(foreground[i]))
        for i in range(num_bins)
    ]


def threshold_score(counts: ConfidenceCounts, threshold: float) -> ThresholdScore:
    """Score of the CAM pseudo-label at a threshold, an edge of the bins."""
    matrix = confusion(counts, threshold)
    return ThresholdScore(threshold, mean_iou(matrix), accuracy(matrix))


def scores_by_threshold(counts: ConfidenceCounts) -> list[ThresholdScore]:
    """Scores at the fixed thresholds 0.01, 0.02 ... 0.99."""
    return [threshold_score(counts, k / STEPS) for k in range(1, STEPS)]


def best_threshold(scores: Sequence[ThresholdScore]) -> ThresholdScore:
    """The score with the largest mIoU; the lowest threshold of equals."""
    return max(scores, key=lambda score: (score.miou, -score.threshold))


# --- helpers -------------------------------------------------------------------------------------


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def _equal_bins(counts: ConfidenceCounts, num_bins: int) -> Tensor:
    """(K,) which of ``num_bins`` equal bins each counted bin is part of."""
    if STEPS % num_bins:
        raise ValueError(f"num_bins={num_bins}: choose a divisor of {STEPS}.")
    return (counts.middle * num_bins).floor().long()


def _sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=values.dtype).index_add_(0, index, values)


def _by_perplexity_level(counts: ConfidenceCounts) -> tuple[Tensor, Tensor]:
    """(100,) pixels and right pixels, from the lowest perplexity (largest distance) upwards."""
    level = (STEPS - 1) - (counts.distance * STEPS).floor().long().clamp(max=STEPS - 1)
    pixels, right = pixels_and_right(counts)
    return _sum_by(level, pixels, STEPS), _sum_by(level, right, STEPS)


def _accuracy_bins(
    counts: ConfidenceCounts,
    index: Tensor,
    edges: Sequence[float],
    region: Tensor | None = None,
) -> list[AccuracyBin]:
    pixels, right = pixels_and_right(counts)
    if region is not None:
        pixels, right = pixels * region, right * region
    size = len(edges) - 1
    total = int(pixels.sum())
    in_bin = _sum_by(index, pixels, size).tolist()
    correct = _sum_by(index, right, size).tolist()
    return [
        AccuracyBin(low, high, int(n), _ratio(n, total), _ratio(r, n))
        for low, high, n, r in zip(edges[:-1], edges[1:], in_bin, correct, strict=True)
    ]
