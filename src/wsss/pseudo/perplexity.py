"""Perplexity of CAM pseudo-labels and the reliability weights made of it (CoSA, eq. 4 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss.distributed import mean_over_ranks

_TINY = 1e-6


def perplexity(
    confidence: Tensor, threshold: float | Tensor, alpha: float = 0.8, beta: float = 1.0
) -> Tensor:
    """Per-pixel perplexity of a CAM pseudo-label (CoSA, eq. 4).

    With ``d = (nu - xi) / (1 - xi)`` from the threshold upwards and ``(xi - nu) / xi`` below it,
    ``P = (-log(alpha d)) ** beta``: large near the threshold, small far from it.

    Args:
        confidence: nu in [0, 1], any shape: the largest activation of each pixel.
        threshold: xi in (0, 1).
        alpha: sets the smallest value, ``(-log alpha) ** beta``; in (0, 1).
        beta: sharpness, positive.

    Returns:
        Same shape, finite and positive: d is clamped away from 0.

    Raises:
        ValueError: ``alpha`` outside (0, 1), for which reliability would be infinite or undefined.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha={alpha}: choose a value between 0 and 1 (CoSA uses 0.8).")
    confidence = confidence if confidence.dtype == torch.float64 else confidence.float()
    threshold = torch.as_tensor(threshold, dtype=confidence.dtype, device=confidence.device)
    threshold = threshold.clamp(_TINY, 1 - _TINY)
    above = (confidence - threshold) / (1 - threshold)
    below = (threshold - confidence) / threshold
    distance = torch.where(confidence >= threshold, above, below).clamp(_TINY, 1.0)
    negative_log = -(distance * alpha).log()
    return negative_log if beta == 1.0 else negative_log.pow(beta)


def reliability_weight(perplexity: Tensor, valid: Tensor | None = None) -> Tensor:
    """Reliability based adaptive weighting, RAW: ``(1 / P) / mean(1 / P)``.

    The mean runs over all valid pixels of the (global) batch, so the weights average 1 there.

    Args:
        perplexity: positive, any shape.
        valid: bool, same shape; invalid pixels get weight 0.

    Returns:
        Same shape, no gradient.
    """
    reliability = perplexity.detach().reciprocal()
    if valid is None:
        mean = mean_over_ranks(reliability.mean())
    else:
        reliability = torch.where(valid, reliability, 0.0)
        totals = mean_over_ranks(
            torch.stack([reliability.sum(), valid.sum().to(reliability.dtype)])
        )
        mean = totals[0] / totals[1].clamp(min=1)
    return reliability / mean.clamp(min=torch.finfo(reliability.dtype).tiny)
