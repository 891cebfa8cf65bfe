"""Low and high threshold of a CAM pseudo-label that leaves pixels undecided (CoSA, release)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wsss.pseudo.threshold import (
    NUM_BINS,
    Constant,
    DynamicThreshold,
    FixedThreshold,
    HistogramQueue,
    check_momentum,
    samples_of,
)


class FixedThresholds(Constant):
    """Two constants behind the interface of :class:`MixtureThresholds`.

    Raises:
        ValueError: not 0 < low <= high < 1.
    """

    def __init__(self, low: float, high: float) -> None:
        if not 0 < low <= high < 1:
            raise ValueError(f"threshold=[{low}, {high}]: need 0 < low <= high < 1.")
        super().__init__(torch.tensor([float(low), float(high)]))


class MixtureThresholds(HistogramQueue):
    """Low and high threshold from a mixture of three Gaussians over the last confidences.

    The outer two components are what is surely background and surely object; their means are the
    thresholds. Values below ``floor``, the bulk of a CAM, are left out of the fit. Both thresholds
    are kept inside [``minimum``, ``maximum``] and smoothed; a degenerate fit leaves them as they
    were. The mixture is scikit-learn's, on the CPU, started from the last fit.

    Args:
        queue_length: batches in the queue.
        minimum, maximum: bounds of both thresholds.
        momentum: of the smoothing; the first fit counts whole.
        initial: low and high before the first fit.
        floor: smaller values are left out.
        stride: see :class:`HistogramQueue`.

    Raises:
        ValueError: an empty queue, a momentum outside [0, 1), or bounds that are not
            0 < minimum <= maximum < 1.
    """

    value: Tensor
    fitted: Tensor
    raw: Tensor
    means: Tensor

    def __init__(
        self,
        queue_length: int = 100,
        minimum: float = 0.1,
        maximum: float = 0.9,
        momentum: float = 0.99,
        initial: tuple[float, float] = (0.25, 0.7),
        floor: float = 0.05,
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
        self.floor = floor
        self.register_buffer("value", torch.tensor([float(v) for v in initial]))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("raw", torch.full((2,), math.nan))
        self.register_buffer("means", torch.full((3,), math.nan, dtype=torch.float64))

    @torch.no_grad()
    def update(self, confidence: Tensor, valid: Tensor | None = None) -> Tensor:
        """Enqueue one batch and return (2,) low and high, on the device.

        Args:
            confidence, valid: see :meth:`HistogramQueue.enqueue`.
        """
        histogram = self.enqueue(confidence, valid).clone()
        histogram[: math.ceil(self.floor * NUM_BINS)] = 0
        means = self._fit(samples_of(histogram))
        if means is None:
            self.raw.fill_(math.nan)
            return self.value.clone()
        self.means.copy_(torch.from_numpy(means))
        raw = self.means[[0, 2]].to(self.value)
        bounded = raw.clamp(self.minimum, self.maximum)
        momentum = torch.where(self.fitted, self.momentum, 0.0)
        self.value.copy_(momentum * self.value + (1 - momentum) * bounded)
        self.raw.copy_(raw)
        self.fitted.fill_(True)
        return self.value.clone()

    def _fit(self, values: np.ndarray) -> np.ndarray | None:
        """Means of the three components in order; None when the values do not tell them apart."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        if values.size < 3 or len(np.unique(values)) < 3:
            return None
        start = self.means.cpu().numpy()
        if not np.isfinite(start).all():
            start = np.quantile(values, [0.1, 0.5, 0.9])
        mixture = GaussianMixture(3, means_init=start[:, None], random_state=0, max_iter=50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(values.reshape(-1, 1))
        means = np.sort(mixture.means_[:, 0])
        return means if np.isfinite(means).all() else None


def make_threshold(
    threshold: str | float | Sequence[float],
    queue_length: int = 100,
    minimum: float = 0.1,
    maximum: float = 0.9,
    momentum: float = 0.99,
    stride: int = 1,
) -> FixedThreshold | FixedThresholds | DynamicThreshold | MixtureThresholds:
    """The threshold that a configuration names.

    Args:
        threshold: a number; ``[low, high]``; ``gmm3``, :class:`MixtureThresholds`; or an estimator
            of :class:`DynamicThreshold`.
        queue_length, minimum, maximum, momentum, stride: of those that follow the confidences.

    Raises:
        ValueError: numbers out of range or not one or two, or an unknown estimator.
    """
    if isinstance(threshold, int | float):
        return FixedThreshold(threshold)
    if not isinstance(threshold, str):
        if len(threshold) != 2:
            raise ValueError(f"threshold={list(threshold)}: give one number, or low and high.")
        return FixedThresholds(*threshold)
    settings = (queue_length, minimum, maximum, momentum)
    if threshold == "gmm3":
        return MixtureThresholds(*settings, stride=stride)
    if threshold not in DynamicThreshold.ESTIMATORS:
        known = ", ".join((*DynamicThreshold.ESTIMATORS, "gmm3"))
        raise ValueError(f"threshold='{threshold}': choose {known}, a number, or [low, high].")
    return DynamicThreshold(threshold, *settings, stride=stride)
