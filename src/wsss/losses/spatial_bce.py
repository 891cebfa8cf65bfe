"""Spatial-BCE: a classification loss that every pixel has its own part of.

Wu et al., Adaptive Spatial-BCE Loss for Weakly Supervised Semantic Segmentation (ECCV 2022). Its
text was not at hand: its abstract and the behaviour of its published code were. The formulas here
are that code's, written out anew. Of our own making are the treatment of padding, of empty groups
of pixels, and the exact logarithm where the code cuts off at 1e-8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.distributed import normalised_sum

#: thresholds stay this far from 0 and 1, so that a parabola has a finite slope
EPSILON = 1e-4


def spatial_bce_loss(
    scores: Tensor, labels: Tensor, threshold: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Push each pixel of a present class away from a threshold, and absent classes down.

    With ``p = sigmoid(score)`` and a threshold t, the loss of a pixel is

    - ``1 - ((p - t) / (1 - t))^2`` above t: the least at p = 1, foreground;
    - ``1 - ((t - p) / t)^2`` up to t: the least at p = 0, background;
    - ``-log(1 - p)`` of a class that is not in the image.

    At t both parabolas are 1 and flat: a pixel that is undecided is left alone at first.

    Args:
        scores: (B, C, h, w) CAM logits.
        labels: (B, C) 0/1.
        threshold: (B, C) in (0, 1); gets no gradient.
        valid: (B, h, w) bool, False on padding, which has no say; None: no padding.

    Returns:
        0-dimensional float tensor, mean over images, classes and positions.
    """
    scores, valid = _prepared(scores, valid)
    p, t = scores.sigmoid(), _between(threshold.detach().to(scores))
    present = labels.bool()[:, :, None, None]
    loss = torch.where(present, _undecided(p, t), F.softplus(scores))
    return normalised_sum((loss * valid).sum(), valid.sum() * scores.shape[1])


def threshold_loss(
    scores: Tensor, labels: Tensor, threshold: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The same parabolas as a loss of the threshold: it should part the pixels well.

    Args:
        scores: (B, C, h, w) CAM logits; get no gradient.
        labels: (B, C) 0/1.
        threshold: (B, C) in (0, 1); carries the gradient.
        valid: (B, h, w) bool, False on padding; None: no padding.

    Returns:
        0-dimensional float tensor: the mean over all pixels of present classes up to their
        threshold plus the mean over those above; 0 for a side without pixels.
    """
    scores, valid = _prepared(scores.detach(), valid)
    p, t = scores.sigmoid(), _between(threshold.to(scores))
    loss = _undecided(p, t)
    counted = (labels.bool()[:, :, None, None] & valid).expand_as(p)
    above = p > t
    below = counted & ~above
    above = counted & above
    return normalised_sum((loss * below).sum(), below.sum()) + normalised_sum(
        (loss * above).sum(), above.sum()
    )


def area_loss(scores: Tensor, labels: Tensor, area: Tensor, valid: Tensor | None = None) -> Tensor:
    """Keep the mean probability of a present class near the share of the image it is thought to be.

    The Kullback-Leibler divergence of ``(m, 1 - m)``, m the mean of ``sigmoid(score)`` over the
    image, from ``(area, 1 - area)``. Without it all pixels could end on one side of a threshold.

    Args:
        scores: (B, C, h, w) CAM logits.
        labels: (B, C) 0/1.
        area: (B, C) in [0, 1].
        valid: (B, h, w) bool, False on padding; None: no padding.

    Returns:
        0-dimensional float tensor, mean over the present classes of all images.
    """
    scores, valid = _prepared(scores, valid)
    pixels = valid.sum((-2, -1)).clamp(min=1)
    tiny = torch.finfo(scores.dtype).tiny
    mean = (scores.sigmoid() * valid).sum((-2, -1)) / pixels
    rest = ((-scores).sigmoid() * valid).sum((-2, -1)) / pixels
    a = area.detach().to(scores).clamp(EPSILON, 1 - EPSILON)
    divergence = mean * (mean.clamp(min=tiny) / a).log()  # x log x is 0 at 0
    divergence = divergence + rest * (rest.clamp(min=tiny) / (1 - a)).log()
    counted = labels.bool() & valid.any(-1).any(-1)
    return normalised_sum((divergence * counted).sum(), counted.sum())


def area_threshold(scores: Tensor, area: Tensor, valid: Tensor | None = None) -> Tensor:
    """The threshold that leaves a given share of the image above it.

    Args:
        scores: (B, C, h, w) CAM logits.
        area: (B, C) in [0, 1].
        valid: (B, h, w) bool, False on padding; None: no padding.

    Returns:
        (B, C) probability of the pixel with ``int(area * pixels)`` larger ones before it, without
        gradient; 0 where an image is all padding.
    """
    scores, valid = _prepared(scores.detach(), valid)
    ranked = (scores.sigmoid() * valid).flatten(2).sort(-1, descending=True).values
    pixels = valid.flatten(2).sum(-1)
    place = torch.minimum((area * pixels).long(), pixels - 1).clamp(min=0)
    return ranked.gather(2, place[..., None])[..., 0]


def _undecided(p: Tensor, t: Tensor) -> Tensor:
    """1 at the threshold, 0 at p = 0 and p = 1."""
    return 1 - torch.where(p > t, (p - t) / (1 - t), (t - p) / t).square()


def _between(threshold: Tensor) -> Tensor:
    return threshold.clamp(EPSILON, 1 - EPSILON)[:, :, None, None]


def _prepared(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in float32 (float64 stays), and (B, 1, h, w) bool."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if valid is None:
        valid = torch.ones_like(scores[:, 0], dtype=torch.bool)
    return scores, valid[:, None]
