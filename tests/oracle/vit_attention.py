"""Attention of a timm layer in loops over heads and tokens, from its weights.

Softmax of the products of queries and keys over the root of their width. Rotary embedding (Su et
al.: RoFormer): a pair of channels (u, v) becomes (u cos - v sin, v cos + u sin). The pairs are
neighbours, or channels half the width apart; tokens before the patches are not turned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def project(layer: Any, which: int, x: Tensor) -> Tensor:
    """Queries (0) or keys (1) (B, T, H' d) of tokens x (B, T, D), H' their own number of heads."""
    if getattr(layer, "qkv", None) is None:
        linear = (layer.q_proj, layer.k_proj)[which]
        weight, bias = linear.weight, linear.bias
    else:
        width = layer.qkv.weight.shape[0] // 3
        rows = slice(which * width, (which + 1) * width)
        weight = layer.qkv.weight[rows]
        bias = None if layer.qkv.bias is None else layer.qkv.bias[rows]
        if which == 0 and getattr(layer, "q_bias", None) is not None:  # EVA: keys have none
            bias = layer.q_bias
    out = x @ weight.T
    return out if bias is None else out + bias


def turned(vector: Tensor, sin: Tensor, cos: Tensor, half: bool) -> Tensor:
    """One token's queries or keys (d,) after the rotation; angles given for all d channels."""
    width = len(vector)
    out = torch.empty_like(vector)
    for pair in range(width // 2):
        u, v = (pair, pair + width // 2) if half else (2 * pair, 2 * pair + 1)
        out[u] = vector[u] * cos[u] - vector[v] * sin[u]
        out[v] = vector[v] * cos[v] + vector[u] * sin[v]
    return out


def attention(layer: Any, x: Tensor, rope: Tensor | None = None, prefix: int = 0) -> Tensor:
    """Mean over heads (B, T, T) for tokens x (B, T, D), of which the first ``prefix`` do not turn.

    Args:
        rope: (N, 2 d) sines and then cosines of the patches, of all heads or (H, N, 2 d).
    """
    queries, keys = project(layer, 0, x).detach(), project(layer, 1, x).detach()
    heads = layer.num_heads
    width = queries.shape[-1] // heads
    groups = heads // (keys.shape[-1] // width)
    batch, tokens, _ = x.shape
    total = torch.zeros(batch, tokens, tokens)
    for b in range(batch):
        for h in range(heads):
            sides = []
            for values, norm, own in (
                (queries, layer.q_norm, h),
                (keys, layer.k_norm, h // groups),
            ):
                rows = []
                for t in range(tokens):
                    row = norm(values[b, t, own * width : (own + 1) * width]).detach()
                    if rope is not None and t >= prefix:
                        angles = (rope if rope.dim() == 2 else rope[h])[t - prefix]
                        half = bool(getattr(layer, "rotate_half", False))
                        row = turned(row, angles[:width], angles[width:], half)
                    rows.append(row)
                sides.append(rows)
            for i in range(tokens):
                powers = [math.exp(float(sides[0][i] @ k) / math.sqrt(width)) for k in sides[1]]
                for j in range(tokens):
                    total[b, i, j] += powers[j] / sum(powers)
    return total / heads
