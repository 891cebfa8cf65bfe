"""Image-level classification loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-label binary cross-entropy (CoSA, eq. 1), mean over images and classes.

    Args:
        class_logits: (B, C).
        labels: (B, C) 0/1.
    """
    logits = class_logits if class_logits.dtype == torch.float64 else class_logits.float()
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
