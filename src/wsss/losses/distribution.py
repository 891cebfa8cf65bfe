"""Distribution loss: features' Gaussians should tell foreground from background (UniA)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.distributed import normalised_sum
from wsss.resize import valid_on_grid

#: the logarithm of a deviation that has vanished stays finite
SMALLEST_SIGMA = 1e-6


class DistributionTerms(NamedTuple):
    """The two 0-dimensional terms of :func:`distribution_loss`, not yet weighted."""

    kl: Tensor
    regulariser: Tensor


def distribution_loss(
    mu: Tensor,
    sigma: Tensor,
    cam: Tensor,
    threshold: float = 0.7,
    num_samples: int = 50,
    generator: torch.Generator | None = None,
    epsilon: float = 0.01,
    regulariser: float = 0.01,
    valid: Tensor | None = None,
) -> Tensor:
    """Hold samples of the features' Gaussians to the CAM's certain foreground (UniA, eq. 8, 9).

    ::

        M_bin = 1 where a class of the CAM is above the threshold, else 0; clamped to [e, 1 - e]
        S_dis = sigmoid(mean of mu + eps sigma over K samples and D channels)
        loss = KL(S_dis || M_bin) + regulariser KL(N(mu, sigma^2) || N(0, 1))

    The first KL is that of two Bernoulli variables, a position each; both are means over positions,
    the second also over channels.

    The mean of K samples is ``mu + mean(eps) sigma``, value and gradient. So the mean of eps is
    drawn instead, which is normal of variance 1 / K: time and memory do not depend on K.

    Left open by the paper:

    - sigma is called a variance, but is what a standard normal is multiplied by: a deviation.
    - The mean is called a logit, so the sigmoid comes after it.
    - With a mask of 0 and 1 eq. 9 is infinite. Clamping it also sets how hard the term pulls: at
      S_dis = 0.5 the gradient by the logit is ``log(1 / e - 1) / 4``, 1.1 for 0.01, 2.9 for 1e-5.
    - Weight and normalisation of the regulariser: 0.01, and the mean. mu begins as the features
      themselves: at 1 the regulariser pulls on the encoder twice as hard as the classification
      does, features shrink and become alike (docs/unia.md).

    Args:
        mu: (B, D, h, w) means. Computed in float32, float64 stays.
        sigma: (B, D, h, w) deviations, not negative.
        cam: (B, C, H, W) in [0, 1], already multiplied by the image labels. Of another size it is
            resized to h x w (bilinear) before the threshold. Without gradient.
        threshold: lambda; "above" is strict.
        num_samples: K. 0 is "mu only" of Table V: ``S_dis = sigmoid(mean of mu)``, and sigma gets
            no gradient, from the regulariser neither.
        generator: what to draw with, on the device of ``mu``; None takes torch's own.
        epsilon: e, above 0 and below 0.5.
        regulariser: weight.
        valid: (B, H', W') bool, on the grid or larger, False on padding, which has no say; None: no
            padding.

    Returns:
        0-dimensional float tensor; 0 with a zero gradient where no position is valid.

    Raises:
        ValueError: shapes do not fit together, or an option is out of range.

    Source: Yang et al., Tackling Ambiguity from Perspective of Uncertainty Inference and Affinity
    Diversification for Weakly Supervised Semantic Segmentation (arXiv 2404.08195).

    Example:
        >>> mu, sigma, cam = torch.zeros(1, 8, 4, 4), torch.ones(1, 8, 4, 4), torch.ones(1, 3, 4, 4)
        >>> round(distribution_loss(mu, sigma, cam, num_samples=0).item(), 4)
        1.6145
    """
    terms = distribution_terms(mu, sigma, cam, threshold, num_samples, generator, epsilon, valid)
    return terms.kl + regulariser * terms.regulariser


def distribution_terms(
    mu: Tensor,
    sigma: Tensor,
    cam: Tensor,
    threshold: float = 0.7,
    num_samples: int = 50,
    generator: torch.Generator | None = None,
    epsilon: float = 0.01,
    valid: Tensor | None = None,
) -> DistributionTerms:
    """The terms of :func:`distribution_loss` apart; arguments as there."""
    _check(mu, sigma, cam, num_samples, epsilon, valid)
    if mu.dtype != torch.float64:
        mu, sigma = mu.float(), sigma.float()
    if num_samples == 0:
        sigma = sigma.detach()
        logit = mu.mean(1)
    else:
        logit = sampled_logit(mu, sigma, mean_noise(mu, num_samples, generator))
    kl = _bernoulli_kl(logit, certain_foreground(cam, threshold, logit), epsilon)
    prior = _prior_kl(mu, sigma)
    inside = torch.ones_like(kl, dtype=torch.bool)
    if valid is not None:
        inside = valid_on_grid(valid, (kl.shape[1], kl.shape[2]))
    sums = torch.stack([(term.where(inside, 0)).sum() for term in (kl, prior)])
    return DistributionTerms(*normalised_sum(sums, inside.sum().expand(2)))


def mean_noise(like: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """The mean of ``num_samples`` standard normals for each element of ``like``."""
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return noise.mul_(num_samples**-0.5)


def sampled_logit(mu: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """(B, h, w) mean over channels (and samples) from the mean noise (B, D, h, w)."""
    return torch.addcmul(mu, noise, sigma).mean(1)


def certain_foreground(cam: Tensor, threshold: float, like: Tensor) -> Tensor:
    """(B, h, w) bool, M_bin on the grid of ``like``: where some class is above the threshold."""
    size = (like.shape[-2], like.shape[-1])
    with torch.no_grad():
        cam = cam.to(like.dtype)  # resized in bf16, activations would be rounded
        if cam.shape[-2:] != size:
            cam = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)
        return cam.amax(1) > threshold


def _bernoulli_kl(logit: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """KL(sigmoid(logit) || mask clamped) of each position."""
    certain, doubtful = math.log1p(-epsilon), math.log(epsilon)
    log_mask = torch.full_like(logit, doubtful).masked_fill(mask, certain)
    log_rest = torch.full_like(logit, certain).masked_fill(mask, doubtful)
    foreground = logit.sigmoid() * (F.logsigmoid(logit) - log_mask)
    return foreground + (-logit).sigmoid() * (F.logsigmoid(-logit) - log_rest)


def _prior_kl(mu: Tensor, sigma: Tensor) -> Tensor:
    """(B, h, w) of KL(N(mu, sigma^2) || N(0, 1)), mean over channels."""
    log_sigma = sigma.clamp(min=SMALLEST_SIGMA).log()
    return ((mu.square() + sigma.square() - 1) / 2 - log_sigma).mean(1)


def _check(
    mu: Tensor,
    sigma: Tensor,
    cam: Tensor,
    num_samples: int,
    epsilon: float,
    valid: Tensor | None,
) -> None:
    if mu.dim() != 4 or sigma.shape != mu.shape:
        raise ValueError(
            f"mu of shape {tuple(mu.shape)} and sigma of shape {tuple(sigma.shape)}: both must be "
            "(B, D, h, w)."
        )
    if cam.dim() != 4 or len(cam) != len(mu):
        raise ValueError(
            f"cam of shape {tuple(cam.shape)}: mu of {tuple(mu.shape)} needs ({len(mu)}, C, H, W)."
        )
    if valid is not None and (valid.dim() != 3 or len(valid) != len(mu)):
        raise ValueError(
            f"valid of shape {tuple(valid.shape)}: mu of {tuple(mu.shape)} needs ({len(mu)}, H, W)."
        )
    if num_samples < 0 or not 0 < epsilon < 0.5:
        raise ValueError(
            f"num_samples {num_samples}, epsilon {epsilon}: at least 0, and above 0 and below 0.5."
        )
