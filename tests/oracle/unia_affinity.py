"""UniA's affinity diversification in loops: equations 11 to 16 of arXiv 2404.08195.

Inputs are float64 tensors; losses are 0-dim float64 tensors that autograd can differentiate.
"""

from __future__ import annotations

import torch
from torch import Tensor

BACKGROUND = 0
IGNORE = 255


def _zero_like_gradient(tensor: Tensor) -> Tensor:
    """0 that still hangs on ``tensor``, so that its gradient is zero and not missing."""
    return (tensor * 0.0).sum()


def sinkhorn(attention: Tensor, iterations: int, floor: float = 1e-12) -> Tensor:
    """Divide rows, then columns, by their sums, again and again."""
    images, count, _ = attention.shape
    result = []
    for b in range(images):
        m = [
            [a if a.item() > floor else torch.tensor(floor, dtype=a.dtype) for a in row]
            for row in attention[b]
        ]
        for _ in range(iterations):
            for i in range(count):
                total = sum(m[i][j] for j in range(count))
                m[i] = [m[i][j] / total for j in range(count)]
            for j in range(count):
                total = sum(m[i][j] for i in range(count))
                for i in range(count):
                    m[i][j] = m[i][j] / total
        result.append(torch.stack([torch.stack(row) for row in m]))
    return torch.stack(result)


def row_error(matrix: Tensor) -> float:
    """Largest deviation of a row's sum from 1, of one (N, N) matrix."""
    return max(abs(sum(float(v) for v in row) - 1) for row in matrix)


def symmetric_affinity(attention: Tensor, iterations: int) -> Tensor:
    """Eq. 11."""
    doubly = sinkhorn(attention, iterations)
    images, count, _ = doubly.shape
    result = torch.zeros_like(doubly)
    for b in range(images):
        for i in range(count):
            for j in range(count):
                result[b, i, j] = (doubly[b, i, j] + doubly[b, j, i]) / 2
    return result


def random_walk(cam: Tensor, affinity: Tensor, power: float, iterations: int) -> Tensor:
    """T_ij = a_ij^power / sum_k a_ik^power; ``iterations`` times m_i <- sum_j T_ij m_j."""
    images, classes, height, width = cam.shape
    count = height * width
    result = torch.zeros_like(cam)
    for b in range(images):
        transition = []
        for i in range(count):
            row = [affinity[b, i, j] ** power for j in range(count)]
            total = sum(row)
            transition.append([v / total if float(total) > 0 else v * 0 for v in row])
        for c in range(classes):
            values = [cam[b, c, i // width, i % width] for i in range(count)]
            for _ in range(iterations):
                values = [
                    sum(transition[i][j] * values[j] for j in range(count)) for i in range(count)
                ]
            result[b, c] = torch.stack(values).view(height, width)
    return result


def mutual_complement(p1: int, p2: int, p3: int, classes: int, printed: bool = False) -> int:
    """Eq. 12 to 15 at one pixel.

    Eq. 14 as printed also takes P1 = P2 = 255, which the mask of eq. 15 does not take out again.
    """
    y = range(1, classes + 1)
    s_f = p2 if p2 in y and p3 in (BACKGROUND, IGNORE) else 0  # eq. 12
    m_f = 1 if s_f not in y else 0
    p_f = m_f * p3 + s_f  # eq. 13
    s_c = p1 if p1 == p2 and (printed or p1 in y) else 0  # eq. 14
    m_c = 1 if s_c not in y else 0
    return m_c * p_f + s_c  # eq. 15


def contrastive_affinity(
    affinity: Tensor, label: Tensor, temperature: float = 0.5, log: bool = False
) -> Tensor:
    """Eq. 16 of each image, then the mean over images; 0 for an image without positive pairs."""
    images, height, width = label.shape
    total = _zero_like_gradient(affinity)
    for b in range(images):
        positives, negatives = [], []
        for i in range(height * width):
            for j in range(height * width):
                here, there = (int(label[b, k // width, k % width]) for k in (i, j))
                if i == j or here == IGNORE or there == IGNORE:
                    continue
                (positives if here == there else negatives).append(affinity[b, i, j] / temperature)
        largest = max([v.item() for v in positives + negatives], default=0.0)
        rest = _zero_like_gradient(affinity)
        for k in negatives:
            rest = rest + torch.exp(k - largest)
        image_sum = _zero_like_gradient(affinity)
        for q in positives:
            if log:  # log of the share, so that a tiny one does not round to 0 first
                image_sum = image_sum + (q - largest)
                image_sum = image_sum - torch.log(torch.exp(q - largest) + rest)
            else:
                own = torch.exp(q - largest)
                image_sum = image_sum + own / (own + rest)
        total = total - image_sum / max(len(positives), 1)
    return total / images


def token_contrast(features: Tensor, label: Tensor) -> Tensor:
    """0.5 (1 - sum_pos |cos| / (n_pos + 1)) + 0.5 sum_neg |cos| / (n_neg + 1), of the batch."""
    images, _, height, width = features.shape
    total = {True: _zero_like_gradient(features), False: _zero_like_gradient(features)}
    count = {True: 0, False: 0}
    for b in range(images):
        places = [(y, x) for y in range(height) for x in range(width)]
        for p in places:
            for q in places:
                here, there = int(label[b][p]), int(label[b][q])
                if p == q or here == IGNORE or there == IGNORE:
                    continue
                u, v = features[b, :, p[0], p[1]], features[b, :, q[0], q[1]]
                product = (u * v).sum()
                product = product if product.item() >= 0 else -product
                lengths = (u * u).sum().sqrt() * (v * v).sum().sqrt()
                total[here == there] = total[here == there] + product / lengths
                count[here == there] += 1
    positive, negative = (total[side] / (count[side] + 1) for side in (True, False))
    return 0.5 * (1 - positive) + 0.5 * negative
