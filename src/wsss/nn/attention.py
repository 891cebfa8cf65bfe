"""Attention of chosen blocks of a ViT, seen from outside: the blocks keep their own kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from wsss.errors import UserError


def mean_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Softmax attention, mean over the heads: (B, H, T, d) twice -> (B, T, T) in fp32.

    Head by head: without gradient the (B, H, T, T) of all of them never exists.
    """
    heads = query.shape[1]
    total: Any = 0.0
    for head in range(heads):
        logits = (query[:, head] * scale) @ key[:, head].transpose(-2, -1)
        total = total + logits.float().softmax(dim=-1)
    attention: Tensor = total / heads
    return attention


def attention_of_qkv(attn: Any, out: Tensor) -> Tensor:
    """Mean attention (B, T, T) of a timm attention layer from what its ``qkv`` gave (B, T, 3 D)."""
    query, key, _ = out.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return mean_attention(attn.q_norm(query), attn.k_norm(key), attn.scale)


#: what names the blocks of a ViT: numbers, from the end where negative, or "all"
Blocks = Sequence[int] | str


def choose_blocks(encoder: nn.Module, blocks: Blocks) -> tuple[int, ...]:
    """Numbers of blocks, from the start.

    Raises:
        UserError: no plain ViT of timm, or a block that it does not have.
    """
    layers = [
        getattr(b, "attn", None) for b in getattr(getattr(encoder, "vit", None), "blocks", ())
    ]
    if not layers or not all(isinstance(layer, Attention) for layer in layers):
        name = getattr(encoder, "name", type(encoder).__name__)
        raise UserError(
            f"backbone.name='{name}' gives no affinity between positions, which is made of the "
            "attention of a plain ViT: choose one such as vit_base_patch16_224."
        )
    depth = len(layers)
    if blocks == "all":
        return tuple(range(depth))
    if isinstance(blocks, str) or not blocks or not all(-depth <= b < depth for b in blocks):
        found = blocks if isinstance(blocks, str) else list(blocks)
        raise UserError(
            f"blocks={found}: give at least one number from {-depth} to {depth - 1} in a list, or "
            "'all'."
        )
    return tuple(sorted({block % depth for block in blocks}))


@contextmanager
def keep_attention(encoder: Any, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Fills a list with the attention (B, T, T) of chosen blocks as the encoder runs meanwhile.

    Mean over the heads, over all tokens, class tokens first; float32, with gradient to queries and
    keys. It costs one more product of these in each chosen block, and nothing in the others.

    Args:
        encoder: a :class:`~wsss.nn.ViTEncoder`.
        blocks: from :func:`choose_blocks`; none does nothing.
    """
    kept: list[Tensor] = []

    def keep(attn: Any, qkv: nn.Module, inputs: Any, out: Tensor) -> None:
        kept.append(attention_of_qkv(attn, out))

    layers = [encoder.vit.blocks[block].attn for block in blocks]
    handles = [layer.qkv.register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
