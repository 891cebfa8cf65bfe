"""From activations to pseudo-labels: CPL (eq. 3) and SPL (eq. 7) of CoSA."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = 255


def cam_pseudo_label(cam: Tensor, threshold: float | Tensor, valid: Tensor | None = None) -> Tensor:
    """CAM pseudo-label, CPL (CoSA, eq. 3).

    The class with the largest activation where that reaches the threshold, else background.

    Args:
        cam: (B, C, H, W) in [0, 1], already multiplied by the image labels.
        threshold: xi, a number or a 0-dimensional tensor.
        valid: (B, H, W) bool; the label is 255 where it is False.

    Returns:
        (B, H, W) int64: 0 background, 1..C, 255.
    """
    return two_threshold_label(cam, threshold, threshold, valid)


def two_threshold_label(
    cam: Tensor, low: float | Tensor, high: float | Tensor, valid: Tensor | None = None
) -> Tensor:
    """CAM pseudo-label with an undecided band: class from ``high`` on, background below ``low``.

    Args:
        cam: (B, C, H, W) in [0, 1], already multiplied by the image labels.
        low: activations below it are background (0).
        high: activations of at least this are the class; in between the label is 255.
        valid: (B, H, W) bool; the label is 255 where it is False.

    Returns:
        (B, H, W) int64: 0 background, 1..C, 255.
    """
    confidence, channel = cam.max(dim=1)
    if confidence.dtype != torch.float64:
        confidence = confidence.float()  # in bf16 the threshold itself would be rounded
    label = torch.where(confidence >= high, channel + 1, IGNORE_INDEX)
    label = torch.where(confidence < low, 0, label)
    return label if valid is None else torch.where(valid, label, IGNORE_INDEX)


def segmentation_pseudo_label(
    seg_logits: Tensor, labels: Tensor, temperature: float = 0.01
) -> Tensor:
    """Segmentation pseudo-label, SPL (CoSA, eq. 7).

    ``softmax(S' / temperature)`` over background and the classes the image holds; absent
    classes get probability 0.

    Args:
        seg_logits: (B, C + 1, H, W), background first.
        labels: (B, C) 0/1 image labels.
        temperature: tau; small values make the label hard.

    Returns:
        (B, C + 1, H, W) probabilities.

    Raises:
        ValueError: the class counts of logits and labels do not fit together.
    """
    if seg_logits.shape[1] != labels.shape[1] + 1:
        raise ValueError(
            f"seg_logits has {seg_logits.shape[1]} channels, labels {labels.shape[1]} classes: "
            "the logits need one channel more than there are classes (background first)."
        )
    absent = torch.cat([torch.zeros_like(labels[:, :1], dtype=torch.bool), labels == 0], dim=1)
    logits = seg_logits.float() if seg_logits.dtype != torch.float64 else seg_logits
    masked = (logits / temperature).masked_fill(absent[:, :, None, None], float("-inf"))
    return masked.softmax(dim=1)
