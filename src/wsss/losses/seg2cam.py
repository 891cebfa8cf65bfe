"""Seg2CAM: CAMs learn from segmentation pseudo-labels (CoSA, eq. 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def seg2cam_loss(cam: Tensor, spl: Tensor, relu: bool = False) -> Tensor:
    """Binary cross-entropy between CAM logits and the segmentation pseudo-label (CoSA, eq. 8).

    Args:
        cam: (B, C, h, w) CAM logits.
        spl: (B, C + 1, H, W) probabilities, background first (dropped); resized to (h, w).
        relu: ReLU on the CAM before the sigmoid, as the published code has it.

    Returns:
        0-dimensional float tensor, mean over images, classes and positions.
    """
    target = spl[:, 1:].detach()
    if target.shape[-2:] != cam.shape[-2:]:
        target = F.interpolate(target, size=cam.shape[-2:], mode="bilinear", align_corners=False)
    logits = cam if cam.dtype == torch.float64 else cam.float()
    if relu:
        logits = logits.relu()
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
