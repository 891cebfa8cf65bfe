"""Multi-class token transformer: a plain ViT with one class token per class (MCTformer-V2).

Xu et al.: Multi-class Token Transformer for Weakly Supervised Semantic Segmentation (CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn.attention import attention_layers, keep_attention, mean_attention, observe_attention
from wsss.nn.network import NetworkOutput, WSSSNetwork, between_patches


def class_to_patch_attention(attention: Tensor, num_classes: int, num_patches: int) -> Tensor:
    """How much each class token attends to each patch.

    As published but for a factor, the number of patches: attention thins out as a grid grows, and
    multi-scale inference compares grids. A token that attends to nothing but patches, and to all
    alike, has 1 everywhere.

    Args:
        attention: (B, T, T), rows attend to columns; of the T tokens the first are those of the
            classes, the last the patches.
        num_classes: C.
        num_patches: N.

    Returns:
        (B, C, N).
    """
    return attention[:, :num_classes, -num_patches:] * num_patches


def fuse_attention_and_cam(attention: Tensor, cam: Tensor) -> Tensor:
    """Attention (B, C, N) times the positive part of the patch-token CAM (B, C, h, w), N = h w.

    Returns:
        (B, C, h, w), non-negative.
    """
    return attention.reshape(cam.shape) * cam.relu()


def patch_affinity_refine(maps: Tensor, affinity: Tensor) -> Tensor:
    """Every patch takes from each patch as much as it attends to it.

    Args:
        maps: (B, C, h, w).
        affinity: (B, N, N), N = h w; row i is what patch i attends to.

    Returns:
        (B, C, h, w).
    """
    return (affinity @ maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)


class ConvClassifier(nn.Module):
    """3 x 3 convolution of a feature map, read as CAM and, pooled, as image logits."""

    def __init__(self, dim: int, num_classes: int, pooling: str = "gap") -> None:
        super().__init__()
        self.pooling = pooling
        self.conv = nn.Conv2d(dim, num_classes, kernel_size=3, padding=1)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.conv.reset_parameters()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, C) and CAM logits (B, C, h, w) of features (B, D, h, w)."""
        cam = self.conv(features)
        pool = torch.mean if self.pooling == "gap" else torch.amax
        return pool(cam, dim=(2, 3)), cam


class MCTformerNetwork(WSSSNetwork):
    """:class:`~wsss.nn.WSSSNetwork` with C class tokens, whose CAM a 3 x 3 convolution makes.

    All class tokens and their position embeddings start as the one that the backbone was
    pretrained with. As published, the final norm is left out: a token's logit is the mean of its
    channels, which a plain LayerNorm would make 0 whatever the token says.

    In evaluation mode the output has a ``refined_cam``: the mean class-to-patch attention of the
    last blocks, times the positive part of the patch-token CAM, refined by the patch-to-patch
    attention of all blocks. It takes one more product of queries and keys in each block.

    Args:
        backbone: timm name of a plain ViT with a class token.
        num_classes: C.
        **kwargs: of :class:`~wsss.nn.WSSSNetwork`.

    Raises:
        UserError: a backbone of another kind.

    Example:
        >>> network = MCTformerNetwork("vit_tiny_patch16_224", num_classes=20, depth=4, img_size=64)
        >>> network.eval()(torch.rand(2, 3, 64, 96)).refined_cam.shape
        torch.Size([2, 20, 4, 6])
    """

    def __init__(self, backbone: str, num_classes: int, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        _widen_class_token(self.encoder, num_classes)
        self._vit.norm.requires_grad_(False)  # no loss sees what comes out of it
        self.classifier: Any = ConvClassifier(self.encoder.dim, num_classes)
        self.set_attention()

    def set_attention(self, blocks: int = 3, refine: bool = True) -> None:
        """What the refined CAM is made of.

        Args:
            blocks: K; class-to-patch attention is the mean over that many last blocks, all of them
                in a backbone that has fewer.
            refine: False leaves patch affinity out.

        Raises:
            UserError: no blocks.
        """
        if blocks < 1:
            raise UserError(f"method.attention_blocks={blocks}: choose 1 or more.")
        self.attention_blocks = min(blocks, len(self._vit.blocks))
        self.refine = refine

    def forward(self, images: Tensor, decode: bool = True) -> NetworkOutput:
        """Run the network, see :meth:`WSSSNetwork.forward`.

        ``class_logits`` and ``cam`` are those of the patch tokens, ``features`` the patch tokens
        before the final norm. There is no early CAM: its fields are those of the final one.
        """
        return self.forward_with_tokens(images, decode)[0]

    def forward_with_tokens(
        self, images: Tensor, decode: bool = True
    ) -> tuple[NetworkOutput, Tensor]:
        """The output, and the logits (B, C) of the class tokens: the mean of their channels."""
        grid = self.encoder.grid(images.shape[-2], images.shape[-1])
        with (
            self._observed(grid[0] * grid[1]) as seen,
            keep_attention(self.encoder, self.wanted_attention) as attention,
        ):
            self.encoder(images)
        class_tokens = seen.tokens[:, : self.num_classes]
        tokens = seen.tokens[:, -seen.num_patches :].transpose(1, 2).unflatten(2, grid)
        neck = self.apply_neck(tokens)
        features = neck.features
        class_logits, cam = self.classifier(features)
        output = NetworkOutput(
            class_logits,
            class_logits,
            cam,
            cam,
            self.decoder(features) if decode else None,
            features,
            refined_cam=None if self.training else self._refined(cam, seen),
            tokens=tokens,
            neck=neck,
            attention=between_patches(attention, seen.num_patches),
        )
        return output, class_tokens.mean(dim=-1)

    def encoder_state(self) -> dict[str, Tensor]:
        """See :meth:`WSSSNetwork.encoder_state`; the class tokens become their mean."""
        state = super().encoder_state()
        tokens = state["vit.cls_token"]
        state["vit.cls_token"] = tokens.mean(1, keepdim=True)
        if "vit.pos_embed" in state and not self._vit.no_embed_class:
            own, others = state["vit.pos_embed"].tensor_split([tokens.shape[1]], dim=1)
            state["vit.pos_embed"] = torch.cat([own.mean(1, keepdim=True), others], dim=1)
        return state

    @property
    def _vit(self) -> Any:
        return self.encoder.vit

    @contextmanager
    def _observed(self, num_patches: int) -> Iterator[_Seen]:
        """Fills a :class:`_Seen` from what the blocks compute meanwhile."""
        seen = _Seen(self.num_classes, num_patches)
        blocks = self._vit.blocks
        handles = [blocks[-1].register_forward_hook(seen.keep_tokens)]
        for i, block in enumerate([] if self.training else blocks):
            last = i >= len(blocks) - self.attention_blocks
            if last or self.refine:
                receive = partial(seen.add_attention, last, self.refine)
                handles.extend(observe_attention(block.attn, receive))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _refined(self, cam: Tensor, seen: _Seen) -> Tensor:
        # Sums over a large grid's patches leave the range of fp16.
        with torch.autocast(cam.device.type, enabled=False):
            attention = seen.class_attention / self.attention_blocks
            maps = fuse_attention_and_cam(attention, cam.float())
            if self.refine:
                maps = patch_affinity_refine(maps, seen.affinity / len(self._vit.blocks))
            return maps


class _Seen:
    """What one pass leaves: the last block's tokens and sums of the blocks' attention."""

    tokens: Tensor

    def __init__(self, num_classes: int, num_patches: int) -> None:
        self.num_classes = num_classes
        self.num_patches = num_patches
        self.class_attention: Any = 0.0
        self.affinity: Any = 0.0

    def keep_tokens(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self.tokens = output

    @torch.no_grad()
    def add_attention(
        self, to_classes: bool, to_patches: bool, query: Tensor, key: Tensor, scale: float
    ) -> None:
        attention = mean_attention(query, key, scale)
        if to_classes:
            self.class_attention += class_to_patch_attention(
                attention, self.num_classes, self.num_patches
            )
        if to_patches:
            self.affinity += attention[:, -self.num_patches :, -self.num_patches :]


def _widen_class_token(encoder: nn.Module, num_classes: int) -> None:
    """Give a ViT that many class tokens, copies of its own with their position embeddings."""
    layers = attention_layers(encoder)
    vit: Any = getattr(encoder, "vit", None)
    if not layers or vit.cls_token is None:
        why = "has no class token" if layers else "is no plain ViT"
        raise UserError(
            f"backbone.name='{getattr(encoder, 'name', '')}' {why}: method=mctformer needs a plain "
            "ViT with a class token, such as deit_small_patch16_224, vit_base_patch16_224 or "
            "vit_base_patch14_dinov2."
        )
    vit.cls_token = nn.Parameter(vit.cls_token.detach().repeat(1, num_classes, 1))
    if vit.pos_embed is not None and not vit.no_embed_class:
        own, others = vit.pos_embed.detach()[:, :1], vit.pos_embed.detach()[:, 1:]
        vit.pos_embed = nn.Parameter(torch.cat([own.repeat(1, num_classes, 1), others], dim=1))
    vit.num_prefix_tokens += num_classes - 1
    encoder.num_prefix_tokens = vit.num_prefix_tokens
    for layer in layers:
        if hasattr(layer, "num_prefix_tokens"):  # tokens that a rotary embedding leaves alone
            layer.num_prefix_tokens = vit.num_prefix_tokens
