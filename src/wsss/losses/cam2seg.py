"""CAM2Seg: segmentation learns from CAM pseudo-labels (CoSA, eq. 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.distributed import normalised_sum
from wsss.pseudo.labels import IGNORE_INDEX


def upsample_logits(seg_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling in float32 (float64 stays), align_corners=False."""
    if seg_logits.dtype != torch.float64:
        seg_logits = seg_logits.float()
    if seg_logits.shape[-2:] == size:
        return seg_logits
    return F.interpolate(seg_logits, size=size, mode="bilinear", align_corners=False)


def cam2seg_loss(
    seg_logits: Tensor, label: Tensor, weight: Tensor | None = None, balanced: bool = False
) -> Tensor:
    """Weighted per-pixel cross-entropy against the CAM pseudo-label (CoSA, eq. 5).

    Args:
        seg_logits: (B, C + 1, h, w), upsampled to the label's size when smaller.
        label: (B, H, W), 0..C and 255 for pixels that are left out.
        weight: (B, H, W), the RAW weight; None weighs all pixels alike.
        balanced: mean over background and mean over foreground pixels, half each, instead of
            the mean over all; a side without pixels counts 0.

    Returns:
        0-dimensional float tensor; 0 with a zero gradient when every pixel is left out.
    """
    logits = upsample_logits(seg_logits, (label.shape[-2], label.shape[-1]))
    pixel_loss = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="none")
    if weight is not None:
        pixel_loss = pixel_loss * weight.detach()
    if not balanced:
        return normalised_sum(pixel_loss.sum(), (label != IGNORE_INDEX).sum())
    background = label == 0
    foreground = ~background & (label != IGNORE_INDEX)
    sides = torch.stack([background, foreground])
    means = normalised_sum((pixel_loss * sides).flatten(1).sum(1), sides.flatten(1).sum(1))
    return 0.5 * means.sum()
