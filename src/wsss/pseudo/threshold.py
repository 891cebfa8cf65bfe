"""Background thresholds found from the distribution of CAM confidences (CoSA, eq. 6).

Three estimators of the value that separates two groups. ``otsu`` and ``min_error`` are exact on
a histogram with cumulative sums and stay on the device; ``gmm`` fits scikit-learn's mixture.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from wsss.distributed import sum_over_ranks

NUM_BINS = 256
_GMM_SAMPLES = 4000


def confidence_histogram(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Counts of ``values`` in 256 equal bins over [0, 1]; (256,) float32 on the same device."""
    values = values.detach().float()
    if valid is not None:
        values = torch.where(valid, values, -1.0)  # histc leaves out what is outside its range
    return torch.histc(values, bins=NUM_BINS, min=0.0, max=1.0)


def _split_statistics(histogram: Tensor) -> tuple[Tensor, ...]:
    """Weight, mean and variance of both sides of every cut between two bins, (bins - 1,) each."""
    counts = histogram.double()
    p = counts / counts.sum().clamp(min=1)
    x = (torch.arange(NUM_BINS, device=p.device, dtype=p.dtype) + 0.5) / NUM_BINS
    w = p.cumsum(0)
    m = (p * x).cumsum(0)
    s = (p * x * x).cumsum(0)
    # Background is what lies below the cut. Sums of the other side are taken from the total.
    w0, m0, s0 = w[:-1], m[:-1], s[:-1]
    w1, m1, s1 = w[-1] - w0, m[-1] - m0, s[-1] - s0
    safe0, safe1 = w0.clamp(min=1e-12), w1.clamp(min=1e-12)
    mean0, mean1 = m0 / safe0, m1 / safe1
    var0 = (s0 / safe0 - mean0 * mean0).clamp(min=0)
    var1 = (s1 / safe1 - mean1 * mean1).clamp(min=0)
    return w0, w1, mean0, mean1, var0, var1


def _best_cut(criterion: Tensor, allowed: Tensor) -> Tensor:
    """Middle of the bin edges whose criterion is largest; NaN when no cut is allowed.

    Empty bins make whole runs of cuts equal; their middle does not favour either side.
    """
    criterion = torch.where(allowed, criterion, -torch.inf)
    best = criterion.max()
    tied = (criterion >= best - 1e-12 * best.abs().clamp(max=1e12)) & allowed
    edges = torch.arange(1, NUM_BINS, device=criterion.device, dtype=torch.float64) / NUM_BINS
    value = (edges * tied).sum() / tied.sum()  # 0 / 0 is the NaN that says "degenerate"
    return value.float()


def _otsu(histogram: Tensor) -> Tensor:
    w0, w1, mean0, mean1, _, _ = _split_statistics(histogram)
    between = w0 * w1 * (mean1 - mean0).square()
    return _best_cut(between, (w0 > 1e-9) & (w1 > 1e-9))


def _min_error(histogram: Tensor) -> Tensor:
    w0, w1, _, _, var0, var1 = _split_statistics(histogram)
    # A side within one bin has no spread that the histogram could measure: not a Gaussian.
    floor = 1.0 / (12 * NUM_BINS**2)
    allowed = (w0 > 1e-9) & (w1 > 1e-9) & (var0 > floor) & (var1 > floor)
    safe = [torch.where(allowed, v, 1.0) for v in (w0, w1, var0, var1)]
    log_w0, log_w1, log_v0, log_v1 = (v.log() for v in safe)
    error = w0 * log_v0 + w1 * log_v1 - 2 * (w0 * log_w0 + w1 * log_w1)
    return _best_cut(-error, allowed)


def otsu_threshold(values: Tensor) -> Tensor:
    """Otsu's threshold: eq. 6 with equal weights and one shared variance.

    Args:
        values: in [0, 1], any shape.

    Returns:
        0-dimensional float tensor; NaN when all values fall into one bin.
    """
    return _otsu(confidence_histogram(values))


def min_error_threshold(values: Tensor) -> Tensor:
    """Kittler-Illingworth's minimum-error threshold: eq. 6 with free weights and variances.

    Each side's Gaussian has the weight, mean and variance of the values on that side. On CAMs
    that are not bimodal one Gaussian may swallow all; see :class:`DynamicThreshold` for guards.

    Args:
        values: in [0, 1], any shape.

    Returns:
        0-dimensional float tensor; NaN when no cut has spread on both sides.
    """
    return _min_error(confidence_histogram(values))


def _fit_gaussian_mixture(
    values: np.ndarray, covariance: str, start: np.ndarray | None = None
) -> tuple[float, np.ndarray | None]:
    """Crossing and means of a two-component mixture; (NaN, None) when the fit is degenerate.

    Args:
        values: (N,) in [0, 1].
        covariance: ``tied`` or ``full``.
        start: (2,) means of the previous fit; a fit that fails from there is tried afresh.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if values.size < 2 or float(np.ptp(values)) < 1.0 / NUM_BINS:
        return math.nan, None
    starts = [np.quantile(values, [0.1, 0.9])]
    if start is not None:
        starts.insert(0, start)
    for means_init in starts:
        mixture = GaussianMixture(
            2,
            covariance_type=covariance,
            means_init=means_init[:, None],
            random_state=0,
            max_iter=50,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(values.reshape(-1, 1))
        order = np.argsort(mixture.means_[:, 0])
        means, weights = mixture.means_[order, 0], mixture.weights_[order]
        if covariance == "tied":
            variances = np.repeat(np.ravel(mixture.covariances_)[:1], 2)
        else:
            variances = mixture.covariances_[order, 0, 0]
        crossing = _posterior_crossing(means, variances, weights)
        if math.isfinite(crossing):
            return crossing, means
    return math.nan, None


def _posterior_crossing(means: np.ndarray, variances: np.ndarray, weights: np.ndarray) -> float:
    """Where both components' posteriors are 1/2, between the means; NaN if nowhere."""
    low, high = means
    if high - low < 1.0 / NUM_BINS or min(weights) <= 0:
        return math.nan
    v0, v1 = variances
    # log pi0 N0(x) = log pi1 N1(x) is a quadratic a x^2 + b x + c = 0.
    a = 0.5 / v1 - 0.5 / v0
    b = low / v0 - high / v1
    c = 0.5 * high**2 / v1 - 0.5 * low**2 / v0
    c += math.log(weights[0] / weights[1]) + 0.5 * math.log(v1 / v0)
    roots = [-c / b] if abs(a) < 1e-12 * abs(b) else np.roots([a, b, c])
    inside = [float(np.real(r)) for r in roots if abs(np.imag(r)) < 1e-9 and low < r.real < high]
    return inside[0] if len(inside) == 1 else math.nan


def gmm_threshold(values: Tensor, covariance: str = "tied") -> Tensor:
    """Threshold where the posteriors of a two-Gaussian mixture cross, between the means.

    Args:
        values: in [0, 1], any shape.
        covariance: ``"tied"`` (one shared variance) or ``"full"``.

    Returns:
        0-dimensional float tensor; NaN for constant values or without a crossing.
    """
    if covariance not in ("tied", "full"):
        raise ValueError(f"covariance='{covariance}': choose 'tied' or 'full'.")
    crossing, _ = _fit_gaussian_mixture(values.detach().float().flatten().cpu().numpy(), covariance)
    return torch.tensor(crossing, dtype=torch.float32, device=values.device)


def samples_of(histogram: Tensor) -> np.ndarray:
    """At most ``_GMM_SAMPLES`` bin centres at even steps of the cumulative histogram.

    scikit-learn's mixture takes no weights; even steps keep the share of a thin foreground.
    """
    cumulative = histogram.detach().double().cpu().numpy().cumsum()
    number = int(min(cumulative[-1], _GMM_SAMPLES))
    picks = (np.arange(number) + 0.5) / max(number, 1) * cumulative[-1]
    return (np.searchsorted(cumulative, picks, side="right") + 0.5) / NUM_BINS


class HistogramQueue(nn.Module):
    """A ring of the confidence histograms of the last batches, of all ranks together.

    Args:
        queue_length: batches in the queue.
        stride: every ``stride``-th pixel of a (B, H, W) map enters, in both directions.

    Raises:
        ValueError: a queue without a batch.
    """

    ring: Tensor
    count: Tensor

    def __init__(self, queue_length: int = 100, stride: int = 1) -> None:
        super().__init__()
        if queue_length < 1:
            raise ValueError(f"threshold queue={queue_length}: keep at least one batch.")
        self.queue_length = queue_length
        self.stride = stride
        self.register_buffer("ring", torch.zeros(queue_length, NUM_BINS))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def enqueue(self, confidence: Tensor, valid: Tensor | None = None) -> Tensor:
        """Add one batch; the histogram (256,) of all batches in the queue.

        Args:
            confidence: nu in [0, 1], (B, H, W) or any shape.
            valid: bool, same shape; False leaves a pixel out.
        """
        if self.stride > 1 and confidence.dim() >= 2:
            offset = self.stride // 2 if min(confidence.shape[-2:]) > self.stride // 2 else 0
            pick = (..., slice(offset, None, self.stride), slice(offset, None, self.stride))
            confidence = confidence[pick]
            valid = None if valid is None else valid[pick]
        histogram = sum_over_ranks(confidence_histogram(confidence, valid))
        # index_copy with the counter on the device: no read-back, the step is not held up.
        self.ring.index_copy_(0, (self.count % self.queue_length)[None], histogram[None])
        self.count += 1
        return self.ring.sum(0)


def check_momentum(momentum: float) -> None:
    """Raise a ValueError unless it can smooth a threshold."""
    if not 0 <= momentum < 1:
        raise ValueError(f"threshold momentum={momentum}: choose a value from 0 to below 1.")


class DynamicThreshold(HistogramQueue):
    """Background threshold that follows the CAMs of the last batches (CoSA, eq. 6).

    A ring holds the confidence histograms of the last ``queue_length`` batches (all ranks
    together); each update fits the estimator to their sum. The fit is kept inside
    [``minimum``, ``maximum``] and smoothed, because real CAMs are often not bimodal; a
    degenerate fit leaves the threshold as it was. All state lives in buffers, so it is saved
    with a checkpoint and equal on all ranks.

    Args:
        estimator: ``otsu``, ``gmm`` (tied covariance), ``gmm_full`` or ``min_error``.
        queue_length: batches in the queue.
        minimum: lower bound of the threshold.
        maximum: upper bound of the threshold.
        momentum: of the smoothing; the first fit counts whole.
        initial: value before the first fit.
        stride: every ``stride``-th pixel of a (B, H, W) map enters, in both directions.

    Raises:
        ValueError: unknown estimator, an empty queue, a momentum outside [0, 1), or bounds that
            are not 0 < minimum <= maximum < 1.
    """

    value: Tensor
    fitted: Tensor
    raw: Tensor
    means: Tensor

    ESTIMATORS = ("otsu", "gmm", "gmm_full", "min_error")

    def __init__(
        self,
        estimator: str = "otsu",
        queue_length: int = 100,
        minimum: float = 0.1,
        maximum: float = 0.9,
        momentum: float = 0.99,
        initial: float = 0.5,
        stride: int = 1,
    ) -> None:
        super().__init__(queue_length, stride)
        if not 0 < minimum <= maximum < 1:
            raise ValueError(
                f"threshold minimum={minimum}, maximum={maximum}: need 0 < minimum <= maximum < 1."
            )
        check_momentum(momentum)
        self.minimum = minimum
        self.maximum = maximum
        self.momentum = momentum
        if estimator not in self.ESTIMATORS:
            raise ValueError(f"threshold estimator '{estimator}': choose one of {self.ESTIMATORS}.")
        self.estimator = estimator
        self.register_buffer("value", torch.tensor(float(initial)))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("raw", torch.tensor(math.nan))
        # where the next mixture fit starts; NaN: nowhere yet
        self.register_buffer("means", torch.full((2,), math.nan, dtype=torch.float64))

    def _fit(self, histogram: Tensor) -> Tensor:
        """The estimator's threshold, NaN when degenerate."""
        if self.estimator == "otsu":
            return _otsu(histogram)
        if self.estimator == "min_error":
            return _min_error(histogram)
        covariance = "tied" if self.estimator == "gmm" else "full"
        start = self.means.double().cpu().numpy()
        crossing, means = _fit_gaussian_mixture(
            samples_of(histogram), covariance, start if np.isfinite(start).all() else None
        )
        if means is not None:
            self.means.copy_(torch.from_numpy(means))
        return torch.tensor(crossing, dtype=torch.float32, device=histogram.device)

    @torch.no_grad()
    def update(self, confidence: Tensor, valid: Tensor | None = None) -> Tensor:
        """Enqueue one batch and return the threshold, 0-dimensional, on the device.

        Args:
            confidence, valid: see :meth:`HistogramQueue.enqueue`.
        """
        raw = self._fit(self.enqueue(confidence, valid))
        bounded = raw.clamp(self.minimum, self.maximum)
        momentum = torch.where(self.fitted, self.momentum, 0.0)
        moved = momentum * self.value + (1 - momentum) * bounded
        usable = torch.isfinite(raw)
        self.value.copy_(torch.where(usable, moved, self.value))
        self.raw.copy_(raw)
        self.fitted.logical_or_(usable)
        return self.value.clone()


class Constant(nn.Module):
    """Numbers that a checkpoint holds and does not change: those of the configuration count."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._given = value
        self.register_buffer("value", value.clone())
        self.register_load_state_dict_post_hook(Constant._keep)

    @staticmethod
    def _keep(module: nn.Module, keys: object) -> None:
        assert isinstance(module, Constant)
        module.value.copy_(module._given)

    def update(self, confidence: Tensor, valid: Tensor | None = None) -> Tensor:
        """The numbers; the confidences are not looked at."""
        return self.value.clone()


class FixedThreshold(Constant):
    """A constant threshold behind the interface of :class:`DynamicThreshold`."""

    def __init__(self, threshold: float = 0.45) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold}: choose a value between 0 and 1.")
        super().__init__(torch.tensor(float(threshold)))
