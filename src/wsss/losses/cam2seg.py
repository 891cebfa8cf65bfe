"""CAM2Seg: segmentation learns from CAM pseudo-labels (CoSA, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss.distributed import normalised_sum
from wsss.pseudo.labels import IGNORE_INDEX
from wsss.resize import resize_small


def upsample_log_softmax(seg_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling (align_corners=False), then log-probabilities of the classes.

    In float32; float64 stays.
    """
    if seg_logits.dtype != torch.float64:
        seg_logits = seg_logits.float()
    return resize_small(seg_logits, *size).log_softmax(1)


def cam2seg_loss(
    seg_logits: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    balanced: bool = False,
    normalised: bool = False,
) -> Tensor:
    """Weighted per-pixel cross-entropy against the CAM pseudo-label (CoSA, eq. 5).

    Args:
        seg_logits: (B, C + 1, h, w), upsampled to the label's size when smaller.
        label: (B, H, W), 0..C and 255 for pixels that are left out.
        weight: (B, H, W), the RAW weight; None weighs all pixels alike.
        balanced: mean over background and mean over foreground pixels (of the weighted loss), half
            each, instead of the mean over all; a side without pixels counts 0.
        normalised: ``seg_logits`` are log-probabilities of the label's size already: for two losses
            that share one :func:`upsample_log_softmax`.

    Returns:
        0-dimensional float tensor; 0 with a zero gradient when every pixel is left out.
    """
    log_p = seg_logits
    if not normalised:
        log_p = upsample_log_softmax(seg_logits, (label.shape[-2], label.shape[-1]))
    counted = label != IGNORE_INDEX
    target = label.where(counted, 0)
    pixel_loss = -log_p.gather(1, target[:, None])[:, 0]
    pixel_loss = pixel_loss * (counted if weight is None else weight.detach() * counted)
    if not balanced:
        return normalised_sum(pixel_loss.sum(), counted.sum())
    background = counted & (label == 0)
    foreground = counted & (label != 0)
    sides = torch.stack([background, foreground])
    means = normalised_sum((pixel_loss * sides).flatten(1).sum(1), sides.flatten(1).sum(1))
    return 0.5 * means.sum()
