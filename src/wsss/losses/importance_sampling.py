"""Importance sampling loss: classify an image by pixels drawn from its own class maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def importance_sampling_loss(
    scores: Tensor,
    labels: Tensor,
    num_samples: int = 10,
    generator: torch.Generator | None = None,
    posterior: str = "binomial",
    valid: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of pixels drawn in proportion to their posterior (ISL, eq. 15 and 18).

    For every image and class ``num_samples`` pixels are drawn with replacement from
    ``p = (b + 1e-5) / sum (b + 1e-5)``; b is the posterior of that class, and the small number
    lets a map that is 0 everywhere be sampled as well. The drawn posteriors are then held
    to the label of the image. No gradient passes through the drawing.

    ``posterior="binomial"`` is ``b = sigmoid(s)`` (eq. 14). ``"multinomial"``, for the ablation, is
    the softmax over the classes and a background (eq. 5). The published code lets the network
    score the background; here its score is 0, which takes nothing from the model, as the
    softmax knows differences of scores only, and makes both posteriors equal for a single class.

    Args:
        scores: (B, C, h, w) logits of the classes. Computed in float32, float64 stays.
        labels: (B, C), 1 for the classes in the image and 0 for the others.
        num_samples: pixels per image and class.
        generator: what to draw with, on the device of ``scores``; None takes torch's own.
        posterior: "binomial" or "multinomial".
        valid: (B, h, w) bool, False on padding, which is never drawn; None: no padding.

    Returns:
        0-dimensional float tensor, mean over samples, classes and images. An image without a
        valid pixel adds 0.

    Raises:
        ValueError: shapes do not fit together, or an option is out of range.

    Source: Jonnarth, Zhang, Felsberg, High-fidelity Pseudo-labels for Boosting
    Weakly-Supervised Segmentation (WACV 2024).
    """
    _check(scores, labels, num_samples, posterior, valid)
    if scores.dtype != torch.float64:
        scores = scores.float()
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], 0)  # whatever padding holds, NaN included
    scores = scores.flatten(2)
    images, classes, _ = scores.shape

    with torch.no_grad():
        weights = scores.sigmoid() if posterior == "binomial" else _with_background(scores)
        # A loss that is not finite stops training with advice; drawing from it would crash first.
        weights = weights.nan_to_num(nan=1.0) + 1e-5
        counted = torch.ones(images, dtype=torch.bool, device=scores.device)
        if valid is not None:
            valid = valid.flatten(1)
            counted = valid.any(1)
            # an image of padding alone is drawn from too, as nothing else has its shape
            weights = weights * (valid | ~counted[:, None])[:, None]
        pixels = torch.multinomial(
            weights.flatten(0, 1), num_samples, replacement=True, generator=generator
        )
    pixels = pixels.view(images, classes, num_samples)

    if posterior == "binomial":
        logits = scores.gather(2, pixels)
    else:
        logits = _multinomial_logits(scores, pixels)
    target = labels.to(scores.dtype)[:, :, None].expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * counted[:, None, None]).mean()


def _with_background(scores: Tensor) -> Tensor:
    """(B, C, N) multinomial posteriors of the classes, next to a background of score 0."""
    return F.pad(scores, (0, 0, 1, 0)).softmax(1)[:, 1:]


def _multinomial_logits(scores: Tensor, pixels: Tensor) -> Tensor:
    """(B, C, samples) log odds of the posterior of class c at its drawn pixels.

    ``log(a / (1 - a)) = s_c - log(1 + sum of e^s over the other classes)``: from the scores, as a
    posterior that has rounded to 1 has lost its gradient.
    """
    images, classes, samples = pixels.shape
    everywhere = pixels.view(images, 1, classes * samples).expand(-1, classes, -1)
    vectors = scores.gather(2, everywhere).view(images, classes, classes, samples)
    own = torch.eye(classes, dtype=torch.bool, device=scores.device)[None, :, :, None]
    others = F.pad(vectors.masked_fill(own, -torch.inf), (0, 0, 0, 0, 1, 0))
    return vectors.diagonal(dim1=1, dim2=2).transpose(1, 2) - others.logsumexp(1)


def _check(
    scores: Tensor, labels: Tensor, num_samples: int, posterior: str, valid: Tensor | None
) -> None:
    if scores.dim() != 4 or labels.shape != scores.shape[:2]:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and labels of shape {tuple(labels.shape)}: "
            "they must be (B, C, h, w) and (B, C)."
        )
    if valid is not None and valid.shape != (len(scores), *scores.shape[2:]):
        raise ValueError(
            f"valid of shape {tuple(valid.shape)}: scores of {tuple(scores.shape)} need "
            f"{(len(scores), *scores.shape[2:])}."
        )
    if num_samples < 1:
        raise ValueError(f"num_samples {num_samples}: it must be at least 1.")
    if posterior not in ("binomial", "multinomial"):
        raise ValueError(f'posterior "{posterior}": it must be "binomial" or "multinomial".')
