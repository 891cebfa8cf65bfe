"""From activations and affinity to UniA's pseudo-labels: P1, P2, P3 and what they make together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.pseudo.affinity import mutual_complement, random_walk
from wsss.pseudo.labels import PresentChannels, two_threshold_label
from wsss.pseudo.multi_scale import normalise_cam
from wsss.pseudo.refine import PixelAdaptiveRefinement


class MutualLabels(NamedTuple):
    """Labels (B, H, W), int64: 0 background, 1..C, 255 undecided and on padding.

    Attributes:
        p1: of the reweighted activations.
        p2: of these after pixel-adaptive refinement.
        p3: of the activations after the random walk.
        label: P, see :func:`~wsss.pseudo.mutual_complement`.
    """

    p1: Tensor
    p2: Tensor
    p3: Tensor
    label: Tensor


class MutualRefinement:
    """Mutual complementing refinement (UniA, section III-D).

    Reweighted activations are those above ``high``, all others 0 (eq. 8). A label has a class from
    ``high`` on, background below ``low``, and 255 in between. What the paper leaves open:

    - Pixel-adaptive refinement and the random walk average, so that a peak of few pixels sinks
      below ``high``, and a class that the image holds has no pixel in the label. ``renormalise``
      brings their maps to [0, 1] again before the thresholds, which were chosen for maps that
      reach 1.
    - Pixel-adaptive refinement runs on a smaller image (``par_scale``), as in ToCo.

    Args:
        high, low: thresholds.
        walk_power, walk_steps: of :func:`~wsss.pseudo.random_walk`.
        renormalise: see above.
        par_scale: factor of the image's size at which pixels are compared.

    Raises:
        ValueError: thresholds that are no two numbers of [0, 1] in order, or another option out of
            range.

    Source: Yang et al., Tackling Ambiguity from Perspective of Uncertainty Inference and Affinity
    Diversification for Weakly Supervised Semantic Segmentation (arXiv 2404.08195).
    """

    def __init__(
        self,
        high: float = 0.7,
        low: float = 0.25,
        walk_power: float = 2.0,
        walk_steps: int = 1,
        renormalise: bool = False,
        par_scale: float = 0.5,
    ) -> None:
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low={low}, high={high}: give 0 <= low <= high <= 1.")
        if walk_power <= 0 or walk_steps < 0:
            raise ValueError(
                f"walk_power={walk_power}, walk_steps={walk_steps}: give more than 0, and 0 or "
                "more."
            )
        if not 0 < par_scale <= 1:
            raise ValueError(f"par_scale={par_scale}: give more than 0, and 1 at most.")
        self.high, self.low = high, low
        self.walk_power, self.walk_steps = walk_power, walk_steps
        self.renormalise = renormalise
        self.par_scale = par_scale
        self._par = PixelAdaptiveRefinement()

    @torch.no_grad()
    def __call__(
        self,
        activations: Tensor,
        affinity: Tensor,
        grid: tuple[int, int],
        images: Tensor,
        labels: Tensor,
        valid: Tensor | None = None,
    ) -> MutualLabels:
        """All labels of a batch, at the size of ``activations``.

        Args:
            activations: (B, C, H, W) in [0, 1], absent classes 0.
            affinity: (B, N, N), N = h w.
            grid: h and w, of the affinity's positions.
            images: (B, 3, H', W') RGB.
            labels: (B, C) 0/1.
            valid: (B, H, W) bool, False on padding.
        """
        present = PresentChannels(labels)
        few = present.take(_precise(activations))
        reweighted = self.reweighted(few)
        p1 = self._label(reweighted)
        p2 = self._label(self.refined(reweighted, images))
        p3 = self._label(self.walked(few, affinity, grid))
        found = (present.names(p, valid) for p in (p1, p2, p3, mutual_complement(p1, p2, p3)))
        return MutualLabels(*found)

    @torch.no_grad()
    def label(
        self,
        activations: Tensor,
        images: Tensor,
        labels: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Label (B, H, W) after pixel-adaptive refinement alone, of all activations."""
        present = PresentChannels(labels)
        return present.names(
            self._label(self.refined(present.take(_precise(activations)), images)), valid
        )

    def reweighted(self, activations: Tensor) -> Tensor:
        """Activations above ``high``, all others 0 (eq. 8)."""
        activations = _precise(activations)
        return activations * (activations > self.high)

    def refined(self, activations: Tensor, images: Tensor) -> Tensor:
        """Activations (B, K, H, W) after pixel-adaptive refinement, at their own size."""
        size = (activations.shape[-2], activations.shape[-1])
        small = (max(1, round(size[0] * self.par_scale)), max(1, round(size[1] * self.par_scale)))
        refined = self._par(_resize(images, small), _resize(activations, small))
        # Its weights sum to more than 1, so that every value grows with every iteration.
        refined = refined / (1 + self._par.w2) ** self._par.num_iterations
        return _resize(normalise_cam(refined) if self.renormalise else refined, size)

    def walked(self, activations: Tensor, affinity: Tensor, grid: tuple[int, int]) -> Tensor:
        """Activations (B, K, H, W) after the random walk on the grid, at their own size."""
        maps = F.interpolate(activations.float(), grid, mode="area")
        maps = random_walk(maps, affinity, self.walk_power, self.walk_steps)
        if self.renormalise:
            maps = normalise_cam(maps)
        return _resize(maps, (activations.shape[-2], activations.shape[-1]))

    def _label(self, activations: Tensor) -> Tensor:
        return two_threshold_label(activations, self.low, self.high)


def _precise(x: Tensor) -> Tensor:
    """In bf16 the thresholds themselves would be rounded."""
    return x if x.dtype == torch.float64 else x.float()


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
