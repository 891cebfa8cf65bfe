"""Threshold estimators against exhaustive searches, and the queue around them.

The histogram estimators are compared on values that sit on the centres of 256 bins, where a
histogram loses nothing; :data:`TOLERANCE` is a bin and a half.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu
from torch import Tensor

from tests.oracle import thresholds as oracle
from wsss.pseudo import (
    DynamicThreshold,
    gmm_threshold,
    min_error_threshold,
    otsu_threshold,
)

BINS = 256
TOLERANCE = 1.5 / BINS
HISTOGRAM_ESTIMATORS = [otsu_threshold, min_error_threshold]
ALL_ESTIMATORS = [*HISTOGRAM_ESTIMATORS, gmm_threshold]
#: name: (background mean, deviation, share), (foreground mean, deviation)
MIXTURES = {
    "balanced": ((0.25, 0.06), (0.70, 0.06), 0.5),
    "mostly_background": ((0.15, 0.05), (0.65, 0.09), 0.8),
    "mostly_foreground": ((0.30, 0.04), (0.80, 0.05), 0.2),
    "close": ((0.35, 0.06), (0.62, 0.07), 0.6),
    # overlapping and unequal: here the shares in the criterion move the best cut by 6 bins
    "overlapping": ((0.30, 0.08), (0.60, 0.08), 0.85),
    "narrow_foreground": ((0.30, 0.10), (0.65, 0.06), 0.85),
}


def _mixture(name: str, count: int = 500, seed: int = 0) -> np.ndarray:
    (m0, s0), (m1, s1), share = MIXTURES[name]
    rng = np.random.default_rng(seed)
    background = round(count * share)
    values = [rng.normal(m0, s0, background), rng.normal(m1, s1, count - background)]
    return np.clip(np.concatenate(values), 0, 1)


def _on_bins(values: np.ndarray) -> Tensor:
    """Moved to the centre of their bin; exact in float32."""
    bins = np.clip(np.floor(values * BINS), 0, BINS - 1)
    return torch.tensor((bins + 0.5) / BINS, dtype=torch.float32)


def _assert_in(found: Tensor, cut: tuple[float, float]) -> None:
    assert found.dim() == 0
    assert found.dtype == torch.float32
    low, high = cut
    assert low - TOLERANCE <= found.item() <= high + TOLERANCE


@pytest.mark.parametrize("name", MIXTURES)
def test_otsu_is_the_best_of_all_cuts(name: str) -> None:
    values = _on_bins(_mixture(name))
    cut = oracle.otsu(values.tolist())
    found = otsu_threshold(values)
    _assert_in(found, cut)
    # exact on bin centres: the same pixels are foreground
    assert cut[0] < found.item() <= cut[1]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("seed", [1, 2])
def test_otsu_is_scikit_images(name: str, seed: int) -> None:
    """On raw values: with 0 and 1 among them both histograms have the same bins.

    Cuts within an empty gap are equally good and both libraries choose another one, so the
    criterion must be equal and the thresholds only where nothing lies between them.
    """
    values = np.concatenate([_mixture(name, 4000, seed), [0.0, 1.0]])
    theirs = threshold_otsu(values, nbins=BINS)
    ours = otsu_threshold(torch.tensor(values)).item()
    low, high = sorted((ours, theirs))
    between = np.mean((values > low + TOLERANCE) & (values < high - TOLERANCE))
    assert between == 0


def test_otsu_of_one_broad_hump_is_scikit_images() -> None:
    """No gap, no plateau: CAM-like values that pile up at 0."""
    values = np.append(np.random.default_rng(3).beta(0.6, 1.8, 20000), [0.0, 1.0])
    found = otsu_threshold(torch.tensor(values))
    assert found.item() == pytest.approx(threshold_otsu(values, nbins=BINS), abs=TOLERANCE)


@pytest.mark.parametrize("name", MIXTURES)
def test_min_error_is_the_best_of_all_cuts(name: str) -> None:
    values = _on_bins(_mixture(name))
    cut = oracle.min_error(values.tolist())
    found = min_error_threshold(values)
    _assert_in(found, cut)


#: With free variances EM crawls on overlapping groups, and where it stops is a matter of taste.
GMM_CASES = [(name, "tied") for name in MIXTURES] + [
    (name, "full") for name in MIXTURES if name not in ("overlapping", "narrow_foreground")
]


@pytest.mark.parametrize(("name", "covariance"), GMM_CASES)
def test_gmm_is_where_the_posteriors_cross(name: str, covariance: str) -> None:
    values = _mixture(name)
    expected = oracle.gmm_crossing(values.tolist(), tied=covariance == "tied", grid=5000)
    found = gmm_threshold(torch.tensor(values), covariance)
    assert found.dim() == 0
    assert found.item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS)
@pytest.mark.parametrize(
    "values", [torch.full((3, 4), 0.3), torch.zeros(2, 5, 5), torch.ones(7), torch.tensor(0.4)],
    ids=["constant", "zeros", "ones", "one_value"],
)  # fmt: skip
def test_nothing_to_separate_is_nan(estimator: Callable[[Tensor], Tensor], values: Tensor) -> None:
    found = estimator(values)
    assert found.dim() == 0
    assert found.isnan()


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS)
def test_two_values_are_separated_or_refused(estimator: Callable[[Tensor], Tensor]) -> None:
    found = estimator(torch.tensor([0.2, 0.2, 0.8, 0.8, 0.8])).item()
    assert math.isnan(found) or 0.2 < found <= 0.8


def test_otsu_of_zeros_and_ones() -> None:
    """A CAM that is already a mask; 0 and 1 themselves belong to the range."""
    assert 0 < otsu_threshold(torch.tensor([0.0] * 9 + [1.0])).item() <= 1


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_precision(estimator: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    values = torch.tensor(_mixture("balanced", 2000), dtype=dtype)
    found, expected = estimator(values), estimator(values.float())
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS)
def test_shape_and_order_do_not_matter(estimator: Callable[[Tensor], Tensor]) -> None:
    values = torch.tensor(_mixture("mostly_background", 480))
    shuffled = values[torch.randperm(480, generator=torch.Generator().manual_seed(0))]
    expected = estimator(values).item()
    for same in (values.view(2, 12, 20), values.view(480, 1), shuffled):
        assert estimator(same).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS)
def test_repetition_does_not_matter(estimator: Callable[[Tensor], Tensor]) -> None:
    values = torch.tensor(_mixture("mostly_background", 480))
    expected = estimator(values).item()
    assert estimator(values.repeat(7)).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS)
@pytest.mark.parametrize("name", MIXTURES)
def test_the_mirrored_values_have_the_mirrored_threshold(
    name: str, estimator: Callable[[Tensor], Tensor]
) -> None:
    values = _on_bins(_mixture(name))
    found = estimator(1 - values).item()
    assert found == pytest.approx(1 - estimator(values).item(), abs=TOLERANCE)


# ---------------------------------------------------------------------------- the queue

FITS: dict[str, Callable[[Tensor], Tensor]] = {
    "otsu": otsu_threshold,
    "min_error": min_error_threshold,
    "gmm": gmm_threshold,
}


def _batches(count: int, shape: tuple[int, ...] = (2, 6, 7)) -> list[Tensor]:
    """Batches whose two groups drift upwards."""
    rng = np.random.default_rng(7)
    out = []
    for i in range(count):
        size = math.prod(shape)
        foreground = rng.random(size) < 0.4
        middle = np.where(foreground, 0.55 + 0.04 * i, 0.15 + 0.03 * i)
        out.append(_on_bins(np.clip(rng.normal(middle, 0.05), 0, 1)).view(shape))
    return out


def _queue(estimator: str = "otsu", **options: float) -> oracle.Queue:
    def fit(values: list[float]) -> float:
        return FITS[estimator](torch.tensor(values)).item()

    length = int(options.pop("queue_length", 100))
    return oracle.Queue(fit, length, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("estimator", "tolerance"), [("otsu", 1e-5), ("min_error", 1e-5), ("gmm", 5e-3)]
)
def test_updates_follow_the_queue(estimator: str, tolerance: float, masked: bool) -> None:
    """Seven batches through a queue of three; the fit is the function on all values in it."""
    options = {"queue_length": 3, "momentum": 0.8}
    threshold = DynamicThreshold(estimator, **options)  # type: ignore[arg-type]
    queue = _queue(estimator, **options)
    generator = torch.Generator().manual_seed(0)
    for batch in _batches(7):
        valid = torch.rand(batch.shape, generator=generator) < 0.7 if masked else None
        found = threshold.update(batch, valid)
        assert found.dim() == 0
        assert found.item() == pytest.approx(queue.update(batch, valid), abs=tolerance)
        assert found.item() == pytest.approx(float(threshold.value))


@pytest.mark.parametrize("batch_shape", [(5,), (1, 4, 9), (2, 1, 6, 3)])
def test_any_shape_enters_the_queue(batch_shape: tuple[int, ...]) -> None:
    flat, shaped = DynamicThreshold(), DynamicThreshold()
    for batch in _batches(2, batch_shape):
        assert flat.update(batch.flatten()) == shaped.update(batch)


def test_batches_of_different_size_count_by_their_pixels() -> None:
    small, large = _batches(1, (1, 3, 3))[0], _batches(4, (2, 9, 9))[3]
    threshold, queue = DynamicThreshold(momentum=0.0), _queue(momentum=0.0)
    for batch in (small, large):
        assert threshold.update(batch).item() == pytest.approx(queue.update(batch), abs=1e-5)


def test_only_the_last_batches_count() -> None:
    """Without smoothing the threshold is a function of the queue alone."""
    history = _batches(7)
    long, short = (DynamicThreshold(queue_length=2, momentum=0.0) for _ in range(2))
    for batch in history:
        last = long.update(batch)
    for batch in history[-2:]:
        expected = short.update(batch)
    assert last == expected


@pytest.mark.parametrize("estimator", FITS)
def test_module_and_function_agree(estimator: str) -> None:
    batch = _batches(1)[0]
    found = DynamicThreshold(estimator).update(batch)
    assert found.item() == pytest.approx(FITS[estimator](batch).item(), abs=1e-3)


@pytest.mark.parametrize("estimator", FITS)
@pytest.mark.parametrize("share", [0.005, 0.05])
def test_module_and_function_agree_on_a_thin_foreground(estimator: str, share: float) -> None:
    """Early in training few pixels are active, and those spread over many bins."""
    rng = np.random.default_rng(11)
    active = round(50_000 * share)
    values = [rng.normal(0.1, 0.03, 50_000 - active), rng.uniform(0.4, 1, active)]
    batch = torch.tensor(np.clip(np.concatenate(values), 0, 1))
    found = DynamicThreshold(estimator).update(batch)
    assert found.item() == pytest.approx(FITS[estimator](batch).item(), abs=1e-2)


def test_the_first_fit_replaces_the_initial_value() -> None:
    batch = _batches(1)[0]
    found = DynamicThreshold(initial=0.9, momentum=0.99).update(batch)
    assert found.item() == pytest.approx(otsu_threshold(batch).item(), abs=1e-6)


def test_smoothing_by_hand() -> None:
    low, high = torch.tensor([0.1, 0.3] * 8), torch.tensor([0.5, 0.9] * 8)
    first, second = otsu_threshold(low).item(), otsu_threshold(high).item()
    threshold = DynamicThreshold(queue_length=1, momentum=0.9)
    threshold.update(low)
    assert threshold.update(high).item() == pytest.approx(0.9 * first + 0.1 * second, abs=1e-6)


@pytest.mark.parametrize(("values", "bound"), [([0.0, 0.04], 0.1), ([0.95, 1.0], 0.9)])
def test_fits_stay_inside_the_range(values: list[float], bound: float) -> None:
    threshold = DynamicThreshold()
    assert threshold.update(torch.tensor(values * 10)).item() == pytest.approx(bound)


def test_the_fit_is_clamped_and_not_the_smoothed_value() -> None:
    threshold = DynamicThreshold(queue_length=1, minimum=0.3, maximum=0.6, momentum=0.5)
    threshold.update(torch.tensor([0.9, 1.0] * 5))
    assert threshold.value.item() == pytest.approx(0.6)
    threshold.update(torch.tensor([0.0, 0.1] * 5))
    assert threshold.value.item() == pytest.approx(0.45)


@pytest.mark.parametrize("estimator", FITS)
def test_a_degenerate_fit_keeps_the_last_value(estimator: str) -> None:
    threshold = DynamicThreshold(estimator, queue_length=1, momentum=0.5, initial=0.37)
    constant, empty = torch.full((2, 3, 3), 0.8), torch.zeros(2, 6, 7, dtype=torch.bool)
    assert threshold.update(constant).item() == pytest.approx(0.37)
    first, second = _batches(2)
    fitted = threshold.update(first).item()
    assert fitted == pytest.approx(FITS[estimator](first).item(), abs=1e-3)
    assert threshold.update(constant).item() == fitted
    assert threshold.update(second, empty).item() == fitted
    assert threshold.update(second).item() != fitted


@pytest.mark.parametrize("estimator", [*FITS, "gmm_full"])
def test_state_survives_a_checkpoint_bit_for_bit(estimator: str) -> None:
    """A resumed run must equal one that never stopped, whatever the estimator."""
    history = _batches(9)
    whole = DynamicThreshold(estimator, queue_length=4, momentum=0.6)
    for batch in history[:6]:
        whole.update(batch)
    resumed = DynamicThreshold(estimator, queue_length=4, momentum=0.6)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed.value, whole.value)
    for batch in history[6:]:
        assert torch.equal(resumed.update(batch), whole.update(batch))


def test_returned_values_are_not_views_of_the_state() -> None:
    first, second = _batches(2)
    threshold = DynamicThreshold(momentum=0.5)
    found = threshold.update(first)
    before = found.item()
    threshold.update(second)
    assert found.item() == before


def test_updates_carry_no_gradient() -> None:
    batch = _batches(1)[0].requires_grad_()
    assert not DynamicThreshold().update(batch).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_update_takes_other_precisions(dtype: torch.dtype) -> None:
    batch = _batches(1)[0].to(dtype)
    expected = DynamicThreshold().update(batch.float())
    assert DynamicThreshold().update(batch) == expected


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="kmeans"):
        DynamicThreshold("kmeans")
