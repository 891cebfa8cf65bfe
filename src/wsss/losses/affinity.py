"""Contrastive affinity loss: affinities of equal labels above those of unequal ones (UniA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.pseudo.labels import IGNORE_INDEX


def contrastive_affinity_loss(
    affinity: Tensor, label: Tensor, temperature: float = 0.5, log: bool = False
) -> Tensor:
    r"""Contrast the affinities of an image by its pseudo-label (UniA, eq. 16).

    .. math::
        L = -\frac{1}{N^+} \sum_{q \in S^+}
            \frac{e^{q/\tau}}{e^{q/\tau} + \sum_{k \in S^-} e^{k/\tau}}

    :math:`S^+` holds the affinities of the ordered pairs of positions with equal labels, two of
    background among them, :math:`S^-` those with unequal ones. Positions labelled 255 are in
    neither. What the paper leaves open:

    - :math:`S^-` does not depend on q as printed: it holds all negative pairs of the image, not
      those of a row.
    - The diagonal is in neither set, as in ToCo: a pair is two positions, and attention of a
      position to itself spreads no label.
    - As printed a term is the share itself. A share is about one over the number of negatives, and
      so is its gradient; the logarithm (``log=True``) is InfoNCE, whose gradient does not shrink.

    Args:
        affinity: (B, N, N), N = h w; carries the gradient. Computed in float32, float64 stays.
        label: (B, h, w), 0 background, 1..C, 255.
        temperature: tau.
        log: the logarithm of each term.

    Returns:
        0-dimensional float tensor, mean over images. An image without positives counts 0; one
        with positives and no negatives has its minimum, -1 or, with ``log``, 0. Neither has a
        gradient.

    Raises:
        ValueError: shapes do not fit together, or the temperature is not positive.
    """
    images, count = label.shape[0], label.shape[1:].numel()
    if label.dim() != 3 or affinity.shape != (images, count, count):
        raise ValueError(
            f"affinity {tuple(affinity.shape)} and label {tuple(label.shape)}: expected (B, N, N) "
            "and (B, h, w) with N = h * w."
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be positive.")
    if affinity.dtype != torch.float64:
        affinity = affinity.float()
    logits = affinity / temperature
    label = label.flatten(1)
    known = label != IGNORE_INDEX
    both = known[:, :, None] & known[:, None, :]
    same = label[:, :, None] == label[:, None, :]
    diagonal = torch.eye(count, dtype=torch.bool, device=label.device)
    positive = both & same & ~diagonal
    # e^q / (e^q + K) = sigmoid(q - log K): no exp of either side, no N^3 tensor. Masked by a huge
    # finite number, so that an image without negatives has a gradient of 0, not NaN.
    masked = logits.masked_fill(~(both & ~same), torch.finfo(logits.dtype).min / 4)
    margin = logits - masked.flatten(1).logsumexp(1)[:, None, None]
    term = F.softplus(-margin) if log else -margin.sigmoid()
    per_image = (term * positive).sum((1, 2)) / positive.sum((1, 2)).clamp(min=1)
    return per_image.mean()
