"""Accuracy of the affinities of neighbouring cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from wsss.losses.pixel_affinity import GROUPS, pair_hits
from wsss.pseudo.pixel_affinity import RADIUS


class PairAccuracy(Metric):
    """Share of pairs whose affinity is on the right side of 0.5, by group and their mean.

    The groups are those of :func:`~wsss.losses.pixel_affinity.pixel_affinity_loss`. Most pairs are
    of background: each group counts alike, however many pairs it has. An affinity that is the same
    everywhere has two thirds or one third.

    Args:
        radius: cells nearer to each other are a pair.
    """

    full_state_update = False
    hits: Tensor
    counts: Tensor

    def __init__(self, radius: int = RADIUS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.radius = radius
        for state in ("hits", "counts"):
            zeros = torch.zeros(len(GROUPS), dtype=torch.int64)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Count the pairs of some images.

        Args:
            features: (B, D, h, w).
            labels: (B, h, w), 0 background, 1..C, 255 unknown.
        """
        hits, counts = pair_hits(features, labels, self.radius)
        self.hits += hits
        self.counts += counts

    def compute(self) -> dict[str, Tensor]:
        """``foreground``, ``background``, ``negative``: shares, NaN without a pair; their mean
        over groups with pairs as ``balanced_accuracy``. float64."""
        shares = self.hits.double() / self.counts
        return dict(zip(GROUPS, shares, strict=True)) | {"balanced_accuracy": shares.nanmean()}
