"""Attention, localisation maps and their refinement of MCTformer in loops.

Xu et al.: Multi-class Token Transformer for Weakly Supervised Semantic Segmentation (CVPR 2022),
section 3. Tokens: C class tokens, perhaps others, then the h x w patches in reading order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, H, T, d) queries and keys -> (B, H, T, T): each row sums to 1."""
    batch, heads, tokens, _ = query.shape
    out = torch.zeros(batch, heads, tokens, tokens, dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            for i in range(tokens):
                products = [
                    scale
                    * sum(float(u) * float(v) for u, v in zip(query[b, head, i], k, strict=True))
                    for k in key[b, head]
                ]
                largest = max(products)
                powers = [math.exp(p - largest) for p in products]
                for j, power in enumerate(powers):
                    out[b, head, i, j] = power / sum(powers)
    return out


def mean_over_heads(attention: Tensor) -> Tensor:
    """(B, H, T, T) -> (B, T, T)."""
    batch, heads, tokens, _ = attention.shape
    out = torch.zeros(batch, tokens, tokens, dtype=torch.float64)
    for b in range(batch):
        for i in range(tokens):
            for j in range(tokens):
                out[b, i, j] = (
                    sum(float(attention[b, k, i, j].detach()) for k in range(heads)) / heads
                )
    return out


def class_to_patch(
    blocks: list[Tensor], num_classes: int, grid: tuple[int, int], last: int
) -> Tensor:
    """Attention of each class token to each patch, mean over the last blocks; even attention: 1."""
    height, width = grid
    batch, tokens, _ = blocks[0].shape
    first = tokens - height * width
    out = torch.zeros(batch, num_classes, height, width, dtype=torch.float64)
    for b in range(batch):
        for c in range(num_classes):
            for y in range(height):
                for x in range(width):
                    seen = [float(a[b, c, first + y * width + x]) for a in blocks]
                    out[b, c, y, x] = sum(seen[len(seen) - last :]) / last * height * width
    return out


def fused(cam: Tensor, attention: Tensor) -> Tensor:
    """Positive part of the patch-token CAM times the attention, patch by patch."""
    out = torch.zeros(cam.shape, dtype=torch.float64)
    for b in range(cam.shape[0]):
        for c in range(cam.shape[1]):
            for y in range(cam.shape[2]):
                for x in range(cam.shape[3]):
                    positive = max(0.0, cam[b, c, y, x].item())
                    out[b, c, y, x] = positive * float(attention[b, c, y, x])
    return out


def patch_to_patch(blocks: list[Tensor], patches: int) -> Tensor:
    """Attention of each patch to each patch, mean over all blocks."""
    batch, tokens, _ = blocks[0].shape
    first = tokens - patches
    out = torch.zeros(batch, patches, patches, dtype=torch.float64)
    for b in range(batch):
        for i in range(patches):
            for j in range(patches):
                values = [float(a[b, first + i, first + j]) for a in blocks]
                out[b, i, j] = sum(values) / len(values)
    return out


def refined(maps: Tensor, affinity: Tensor) -> Tensor:
    """Each patch takes of every patch's value what it attends to it."""
    batch, classes, height, width = maps.shape
    out = torch.zeros(maps.shape, dtype=torch.float64)
    for b in range(batch):
        for c in range(classes):
            for i in range(height * width):
                total = 0.0
                for j in range(height * width):
                    total += float(affinity[b, i, j]) * float(maps[b, c, j // width, j % width])
                out[b, c, i // width, i % width] = total
    return out


def class_token_logits(tokens: Tensor) -> Tensor:
    """(B, C, D) final class tokens -> (B, C): the mean of their channels."""
    batch, classes, dim = tokens.shape
    out = torch.zeros(batch, classes, dtype=torch.float64)
    for b in range(batch):
        for c in range(classes):
            out[b, c] = sum(v.item() for v in tokens[b, c]) / dim
    return out


def conv3x3(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, C, h, w), zeros outside."""
    batch, _, height, width = features.shape
    classes = weight.shape[0]
    out = torch.zeros(batch, classes, height, width, dtype=torch.float64)
    for b in range(batch):
        for c in range(classes):
            for y in range(height):
                for x in range(width):
                    total = bias[c].double()
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                patch = features[b, :, y + dy, x + dx].double()
                                total = (
                                    total + (weight[c, :, dy + 1, dx + 1].double() * patch).sum()
                                )
                    out[b, c, y, x] = total
    return out
