"""Pixels counted by confidence, strongest class and truth: all that the analysis keeps of images.

A CAM pseudo-label, at whatever threshold, and its perplexity depend on nothing but the largest
activation of a pixel (its confidence nu) and the class that has it. So one table of counts gives
every figure exactly, as long as the thresholds in question are edges of its bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wsss.pseudo.labels import IGNORE_INDEX

#: equal steps of the confidence, and of the distance to the threshold on either side of it
STEPS = 100
#: factor of the distance between two bins of perplexity: equal steps of -log(alpha d)
DISTANCE_RATIO = math.exp(-0.25)
#: bins of perplexity; the last one has no upper end
PERPLEXITY_BINS = 17


class ConfidenceCounts:
    """Counts of pixels over (confidence bin, strongest class, truth).

    The bins' edges are the multiples of 0.01, the threshold, and on both sides of it the
    confidences that bound equal steps of distance to it, the bins of perplexity and the
    low-perplexity region. A bin holds its lower edge, not its upper one.

    Args:
        num_classes: C foreground classes.
        threshold: xi in (0, 1) of the CAM pseudo-label (eq. 3).
        alpha, beta: of the perplexity (eq. 4).
        max_perplexity: epsilon of the low-perplexity region Omega (below eq. 9).
        device: of the counts.

    Attributes:
        counts: (K, C, C + 1) int64, K confidence bins.
        low, high: (K,) float64 edges of the bins, from 0 to 1, on the CPU.

    Raises:
        ValueError: ``threshold`` or ``alpha`` outside (0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        threshold: float,
        alpha: float = 0.8,
        beta: float = 1.0,
        max_perplexity: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("threshold", threshold), ("alpha", alpha)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name}={value}: choose a value between 0 and 1.")
        self.num_classes = num_classes
        self.threshold = threshold
        self.alpha = alpha
        self.beta = beta
        self.max_perplexity = max_perplexity
        #: distance from which on the perplexity is at most epsilon; above 1: nowhere
        self.least_distance = math.exp(-(max_perplexity ** (1 / beta))) / alpha
        distances = [
            self.least_distance,
            *(k / STEPS for k in range(1, STEPS)),
            *(DISTANCE_RATIO**k for k in range(1, PERPLEXITY_BINS)),
        ]
        edges = [
            threshold,
            *(k / STEPS for k in range(1, STEPS)),
            *(threshold + d * (1 - threshold) for d in distances),
            *(threshold - d * threshold for d in distances),
        ]
        # In the precision of the confidences, so that `>= threshold` means the same here and there.
        inner = torch.tensor([e for e in edges if 0 < e < 1], dtype=torch.float32).unique()
        self.edges = inner.to(device)
        self.low = torch.cat([torch.zeros(1), inner]).double()
        self.high = torch.cat([inner, torch.ones(1)]).double()
        self.counts = torch.zeros(
            (len(self.low), num_classes, num_classes + 1), dtype=torch.int64, device=device
        )

    def update(
        self,
        confidence: Tensor,
        strongest: Tensor,
        target: Tensor,
        keep: Tensor | None = None,
    ) -> None:
        """Count pixels; those whose target is 255 are left out.

        Args:
            confidence: nu in [0, 1], any shape.
            strongest: same shape, int64, class 0..C-1 that has it.
            target: same shape, int64, true label 0..C or 255.
            keep: same shape, bool; False leaves a pixel out.
        """
        kept = target != IGNORE_INDEX if keep is None else (target != IGNORE_INDEX) & keep
        index = self.bins(confidence[kept]) * self.num_classes + strongest[kept]
        index = index * (self.num_classes + 1) + target[kept]
        self.counts += torch.bincount(index, minlength=self.counts.numel()).view_as(self.counts)

    def bins(self, confidence: Tensor) -> Tensor:
        """Bin of each confidence, int64."""
        return torch.bucketize(confidence.float(), self.edges, right=True)

    def is_low_perplexity(self, confidence: Tensor) -> Tensor:
        """Whether each pixel is in Omega: perplexity at most epsilon."""
        return self.low_perplexity.to(confidence.device)[self.bins(confidence)]

    # --- what the bins are ---------------------------------------------------------------------

    @property
    def middle(self) -> Tensor:
        """(K,) middles of the bins, which are off every edge."""
        return (self.low + self.high) / 2

    @property
    def distance(self) -> Tensor:
        """(K,) normalised distance d in [0, 1] of each bin from the threshold (eq. 4)."""
        xi, nu = self.threshold, self.middle
        return torch.where(nu >= xi, (nu - xi) / (1 - xi), (xi - nu) / xi)

    @property
    def low_perplexity(self) -> Tensor:
        """(K,) bool, bins of Omega."""
        return self.distance >= self.least_distance

    def above(self, threshold: float) -> Tensor:
        """(K,) bool, bins whose label is a class at this threshold (nu >= threshold).

        Raises:
            ValueError: the threshold cuts through a bin.
        """
        value = float(torch.tensor(threshold, dtype=torch.float32))
        if value not in self.low:
            raise ValueError(f"threshold={threshold} is no edge of the confidence bins.")
        return self.low >= value
