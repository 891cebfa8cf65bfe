"""Contrastive separation of CAMs (CoSA, eq. 9 and 10)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.pseudo.labels import IGNORE_INDEX


def contrastive_separation_loss(
    cam: Tensor,
    label: Tensor,
    perplexity: Tensor,
    max_perplexity: float = 1.0,
    temperature: float = 0.5,
) -> Tensor:
    """Pull CAM vectors of equally labelled positions together, push others apart (eq. 9, 10).

    Omega holds the positions of an image whose early CAM pseudo-label has a perplexity of at
    most ``max_perplexity``. For each position i of Omega: the mean over its positives p (same
    label) of ``-log(exp(s_ip) / (exp(s_ip) + sum_n exp(s_in)))`` with negatives n (other label)
    and ``s`` the cosine similarity of the C-vectors of ``cam``, divided by the temperature.

    Args:
        cam: (B, C, h, w) CAM logits of the online network, C >= 1.
        label: (B, h, w) early CAM pseudo-label on the same grid; 255 is never in Omega.
        perplexity: (B, h, w) of that label.
        max_perplexity: epsilon.
        temperature: tau.

    Returns:
        0-dimensional float tensor: mean over Omega, then over images. A position without
        positives adds nothing; an image with an empty Omega counts 0.
    """
    cam = cam if cam.dtype == torch.float64 else cam.float()
    features = F.normalize(cam.flatten(2), dim=1, eps=1e-8)
    label = label.flatten(1)
    member = (perplexity.flatten(1) <= max_perplexity) & (label != IGNORE_INDEX)
    with torch.autocast(cam.device.type, enabled=False):  # bf16 costs 1 to 3 % of the gradient
        similarity = features.transpose(1, 2) @ features / temperature  # (B, N, N)

    both = member[:, :, None] & member[:, None, :]
    same = label[:, :, None] == label[:, None, :]
    diagonal = torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    positive = both & same & ~diagonal
    # -log(e^s / (e^s + K)) = softplus(log K - s): no exp of either side, no N^3 tensor. Masked by
    # a large finite number, so that a row without negatives gives 0 and a gradient of 0, not NaN.
    log_k = similarity.masked_fill(~(both & ~same), -1e4).logsumexp(2, keepdim=True)
    term = F.softplus(log_k - similarity) * positive
    num_positive = positive.sum(2).clamp(min=1)
    per_position = term.sum(2) / num_positive
    return (per_position.sum(1) / member.sum(1).clamp(min=1)).mean()
