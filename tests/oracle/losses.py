"""CoSA's losses in loops: equations 1, 5, 8, 9 and 10 of arXiv 2402.17891.

Inputs are float64 tensors; outputs 0-dim float64 tensors that autograd can differentiate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracle.resize import bilinear

IGNORE = 255


def _log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), the branch chosen so that exp never overflows."""
    if x.item() >= 0:
        return -torch.log(1 + torch.exp(-x))
    return x - torch.log(1 + torch.exp(x))


def _log_sum_exp(values: list[Tensor]) -> Tensor:
    """log of the sum of exponentials, shifted by the largest value."""
    largest = max(value.item() for value in values)
    total = torch.zeros((), dtype=torch.float64)
    for value in values:
        total = total + torch.exp(value - largest)
    return torch.log(total) + largest


def _zero_like_gradient(tensor: Tensor) -> Tensor:
    """0 that still hangs on ``tensor``, so that its gradient is zero and not missing."""
    return (tensor * 0.0).sum()


def classification(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 1: multi-label binary cross-entropy, mean over images and classes."""
    images, classes = class_logits.shape
    total = _zero_like_gradient(class_logits)
    for b in range(images):
        for c in range(classes):
            y = float(labels[b, c])
            z = class_logits[b, c]
            total = total - y * _log_sigmoid(z) - (1 - y) * _log_sigmoid(-z)
    return total / (images * classes)


def cam2seg(
    seg_logits: Tensor, label: Tensor, weight: Tensor | None = None, balanced: bool = False
) -> Tensor:
    """Eq. 5: weighted cross-entropy of the upsampled segmentation against the CPL.

    Plain: the sum over all valid pixels of the batch, divided by their number. Balanced: half
    the same over the background pixels and half over the foreground pixels.
    """
    images, height, width = label.shape
    side_sum = {side: _zero_like_gradient(seg_logits) for side in ("background", "foreground")}
    side_count = {"background": 0, "foreground": 0}
    for b in range(images):
        logits = seg_logits[b]
        if tuple(logits.shape[1:]) != (height, width):
            logits = bilinear(logits, height, width)
        for y in range(height):
            for x in range(width):
                target = int(label[b, y, x])
                if target == IGNORE:
                    continue
                pixel = [logits[k, y, x] for k in range(logits.shape[0])]
                cross_entropy = _log_sum_exp(pixel) - pixel[target]
                w = 1.0 if weight is None else float(weight[b, y, x])
                side = "background" if target == 0 else "foreground"
                side_sum[side] = side_sum[side] + w * cross_entropy
                side_count[side] += 1
    if balanced:
        total = _zero_like_gradient(seg_logits)
        for side, count in side_count.items():
            if count > 0:
                total = total + 0.5 * side_sum[side] / count
        return total
    count = side_count["background"] + side_count["foreground"]
    return (side_sum["background"] + side_sum["foreground"]) / max(count, 1)


def seg2cam(cam: Tensor, spl: Tensor, relu: bool = False) -> Tensor:
    """Eq. 8: binary cross-entropy of the CAM logits against the SPL, background dropped."""
    images, classes, height, width = cam.shape
    total = _zero_like_gradient(cam)
    for b in range(images):
        target = bilinear(spl[b], height, width)
        for c in range(1, classes + 1):
            for y in range(height):
                for x in range(width):
                    m = cam[b, c - 1, y, x]
                    if relu:
                        m = m if m.item() > 0 else m * 0.0
                    p = float(target[c, y, x])
                    total = total - p * _log_sigmoid(m) - (1 - p) * _log_sigmoid(-m)
    return total / (images * classes * height * width)


def contrastive_separation(
    cam: Tensor,
    label: Tensor,
    perplexity: Tensor,
    max_perplexity: float = 1.0,
    temperature: float = 0.5,
) -> Tensor:
    """Eq. 9 and 10 for each image on its own, then the mean over the images."""
    images, classes, height, width = cam.shape
    total = _zero_like_gradient(cam)
    for b in range(images):
        omega = []
        for y in range(height):
            for x in range(width):
                known = int(label[b, y, x]) != IGNORE
                if known and float(perplexity[b, y, x]) <= max_perplexity:
                    omega.append((y, x))
        if not omega:
            continue
        image_sum = torch.zeros((), dtype=torch.float64)
        for i in omega:
            positives, negatives = [], []
            for other in omega:
                if other == i:
                    continue
                similarity = _cosine(cam[b], i, other, classes) / temperature
                same = int(label[b, i[0], i[1]]) == int(label[b, other[0], other[1]])
                (positives if same else negatives).append(similarity)
            if not positives:
                continue
            position = torch.zeros((), dtype=torch.float64)
            for s_ip in positives:
                position = position - (s_ip - _log_sum_exp([s_ip, *negatives]))
            image_sum = image_sum + position / len(positives)
        total = total + image_sum / len(omega)
    return total / images


def _cosine(cam: Tensor, a: tuple[int, int], b: tuple[int, int], classes: int) -> Tensor:
    """Cosine of the class vectors of two positions; 0 where one of them is the zero vector."""
    dot = torch.zeros((), dtype=torch.float64)
    norm_a = torch.zeros((), dtype=torch.float64)
    norm_b = torch.zeros((), dtype=torch.float64)
    for c in range(classes):
        u, v = cam[c, a[0], a[1]], cam[c, b[0], b[1]]
        dot = dot + u * v
        norm_a = norm_a + u * u
        norm_b = norm_b + v * v
    length = math.sqrt(norm_a.item()) * math.sqrt(norm_b.item())
    if length == 0:
        return dot
    return dot / (torch.sqrt(norm_a) * torch.sqrt(norm_b))
