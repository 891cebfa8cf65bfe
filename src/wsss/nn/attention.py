"""Attention of chosen blocks of a ViT, seen from outside: the blocks keep their own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wsss.errors import UserError

#: attention of plain ViTs (DeiT, DINOv2, CLIP, SigLIP), and with rotary embedding (DINOv3, EVA-02)
_KINDS = (Attention, AttentionRope, EvaAttention)


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


def attention_layers(encoder: nn.Module) -> list[Any]:
    """Attention layers of all blocks of a ViT of timm; none where one is of an unknown kind."""
    blocks = getattr(getattr(encoder, "vit", None), "blocks", ())
    layers = [getattr(block, "attn", None) for block in blocks]
    return layers if all(isinstance(layer, _KINDS) for layer in layers) else []


def observe_attention(
    attn: Any, receive: Callable[[Tensor, Tensor, float], None]
) -> list[RemovableHandle]:
    """Hand on queries and keys (B, H, T, d) and the scale of their product whenever a layer runs.

    They are what the layer itself takes the attention of: with biases, normalised and turned by
    the rotary embedding where it has these, and keys shared by several heads once for each.

    Args:
        attn: one of :func:`attention_layers`.
        receive: takes what :func:`mean_attention` does.

    Returns:
        Hooks, to be removed by the caller.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, norm: nn.Module, inputs: Any, out: Tensor) -> None:
        seen[name] = out

    def hand_on(module: nn.Module, inputs: Any, options: dict[str, Any], out: Tensor) -> None:
        query, key = seen.pop("query"), seen.pop("key")
        rope = options.get("rope")
        if rope is not None:
            query, key = _rotate(attn, query, rope), _rotate(attn, key, rope)
        if query.shape[1] != key.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        receive(query, key, attn.scale)

    # All kinds pass queries and keys through these, if need be as identities; the projections
    # before are not always called as modules.
    return [
        attn.q_norm.register_forward_hook(partial(keep, "query")),
        attn.k_norm.register_forward_hook(partial(keep, "key")),
        attn.register_forward_hook(hand_on, with_kwargs=True),
    ]


def _rotate(attn: Any, heads: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of the patches' part of queries or keys (B, H, T, d); they come last."""
    count = attn.num_prefix_tokens
    half = getattr(attn, "rotate_half", False)
    turned = apply_rot_embed_cat(heads[:, :, count:], rope, half=half)
    return torch.cat([heads[:, :, :count], turned.type_as(heads)], dim=2)


#: what names the blocks of a ViT: numbers, from the end where negative, or "all"
Blocks = Sequence[int] | str


def choose_blocks(encoder: nn.Module, blocks: Blocks) -> tuple[int, ...]:
    """Numbers of blocks, from the start.

    Raises:
        UserError: no plain ViT of timm, or a block that it does not have.
    """
    layers = attention_layers(encoder)
    if not layers:
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

    def keep(query: Tensor, key: Tensor, scale: float) -> None:
        kept.append(mean_attention(query, key, scale))

    layers = [encoder.vit.blocks[block].attn for block in blocks]
    handles = [handle for layer in layers for handle in observe_attention(layer, keep)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
