"""The network that online and assignment network share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn.attention import Blocks, choose_blocks, keep_attention
from wsss.nn.decoder import largefov
from wsss.nn.encoders import SavedEncoder, make_encoder
from wsss.nn.neck import NeckOutput
from wsss.nn.pyramid import PyramidEncoder
from wsss.nn.stage_decoders import StageDecoder

POOLINGS = ("gmp", "gap")


class NetworkOutput(NamedTuple):
    """What one forward pass gives; h x w is the token grid.

    Attributes:
        class_logits: (B, C) image-level logits from the final features (``Z``).
        early_class_logits: (B, C), from the early features.
        cam: (B, C, h, w) CAM logits of the final features (``M``).
        early_cam: (B, C, h, w) CAM logits of the early features.
        seg_logits: (B, C + 1, h, w) decoder logits (``S``), background first, on a finer grid
            from a :class:`~wsss.nn.stage_decoders.StageDecoder`; None when it was not asked for.
        features: (B, D, h, w) final patch features that the heads see (``F``).
        refined_cam: (B, C, h, w) non-negative maps that multi-scale inference takes instead of
            ``cam``; None where a method has none.
        calibrated: ``refined_cam`` is in [0, 1] and 0.5 means what it says: inference does not
            stretch it to [0, 1] as it does other maps.
        tokens: (B, D, h, w) the encoder's final features, before a neck; without one ``features``.
        neck: what the neck gave; its fields but ``features`` are None without one.
        attention: (B, N, N) of the N = h w positions, rows attend to columns, mean over heads and
            chosen blocks (:meth:`WSSSNetwork.want_attention`); None where nobody wants it.
    """

    class_logits: Tensor
    early_class_logits: Tensor
    cam: Tensor
    early_cam: Tensor
    seg_logits: Tensor | None
    features: Tensor
    refined_cam: Tensor | None = None
    calibrated: bool = False
    tokens: Tensor | None = None
    neck: NeckOutput | None = None
    attention: Tensor | None = None


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile: no stochastic depth, and batch statistics stay as they are."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


class Classifier(nn.Module):
    """Bias-free linear classifier on a feature map, read as CAM and as image logits.

    ``M = W F`` and ``Z = W pool(F)``: features are pooled first, then comes the layer. With the
    mean (``gap``) Z is the mean of the CAM as well; with the maximum (``gmp``) it is not.
    """

    def __init__(self, dim: int, num_classes: int, pooling: str = "gmp") -> None:
        super().__init__()
        self.pooling = pooling
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, C) and CAM logits (B, C, h, w) of features (B, D, h, w)."""
        pool = torch.mean if self.pooling == "gap" else torch.amax
        class_logits = nn.functional.linear(pool(features, dim=(2, 3)), self.weight)
        return class_logits, self.cam(features)

    def cam(self, features: Tensor, detach: str = "none") -> Tensor:
        """CAM logits (B, C, h, w), optionally without gradient into the features or the weight.

        Args:
            features: (B, D, h, w).
            detach: ``none``, ``feature``, ``classifier`` or ``both`` (CoSA, Tab. 4a).
        """
        if detach in ("feature", "both"):
            features = features.detach()
        weight = self.weight.detach() if detach in ("classifier", "both") else self.weight
        return nn.functional.conv2d(features, weight[:, :, None, None])


class WSSSNetwork(nn.Module):
    """Encoder, two classifiers and a decoder as one module with one typed output.

    Args:
        backbone: timm name of a patch-based ViT or a CNN, or ``resnet38d``.
        num_classes: foreground classes C; the decoder has C + 1 outputs.
        early_block: block or stage of the early features; None: -3 in a ViT, -2 in a CNN.
        pretrained: hub weights for the encoder.
        weights: local weights file for the encoder, or the encoder of a trained network.
        decoder: a module (B, D, h, w) -> (B, C + 1, h', w') or a :class:`StageDecoder`, or a
            function of the encoder and C + 1 that makes one; None builds :class:`LargeFOV`.
        early_norm: final norm on the early features too, see :class:`~wsss.nn.ViTEncoder`.
        neck: between the encoder's final features and the heads: a module (B, D, h, w) ->
            :class:`~wsss.nn.NeckOutput` or tensor, or a function of D that makes one; None: none.
        **backbone_kwargs: further options of the encoder, see :func:`~wsss.nn.make_encoder`.

    Example:
        >>> network = WSSSNetwork("vit_tiny_patch16_224", num_classes=20, depth=4, img_size=64)
        >>> network(torch.rand(2, 3, 64, 96)).seg_logits.shape
        torch.Size([2, 21, 4, 6])
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        early_block: int | None = None,
        pretrained: bool = False,
        weights: str | Path | SavedEncoder | None = None,
        decoder: nn.Module | Callable[[nn.Module, int], nn.Module] | None = None,
        early_norm: bool = False,
        neck: nn.Module | Callable[[int], nn.Module] | None = None,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder = make_encoder(
            backbone, early_block, early_norm, pretrained, weights, **backbone_kwargs
        )
        dim = self.encoder.dim
        self.neck = neck if neck is None or isinstance(neck, nn.Module) else neck(dim)
        #: blocks whose attention a pass in training mode keeps
        self.kept_blocks: tuple[int, ...] = ()
        #: False while nobody reads it: passes keep none
        self.attention_is_read = True
        self._wished_blocks: tuple[int, ...] = ()
        self.classifier = Classifier(dim, num_classes)
        self.early_classifier = Classifier(self.encoder.early_dim, num_classes)
        if not isinstance(decoder, nn.Module):
            decoder = (decoder or largefov)(self.encoder, num_classes + 1)
        self.decoder = decoder

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's weights, for a network of another kind to start from."""
        return dict(self.encoder.state_dict())

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a cell of the grid, in pixels."""
        return self.encoder.patch_size

    def forward(self, images: Tensor, decode: bool = True) -> NetworkOutput:
        """Run the network.

        Args:
            images: (B, 3, H, W) RGB in [0, 1]; normalised here with the backbone's own settings.
            decode: False leaves the decoder out (``seg_logits`` is None).
        """
        stages: dict[int, Tensor] = {}
        with keep_attention(self.encoder, self.wanted_attention) as attention:
            if decode and isinstance(self.decoder, StageDecoder):
                encoder = cast(PyramidEncoder, self.encoder)  # the decoder has seen to it
                stages = encoder.chosen_stages(images, self.decoder.read)
                tokens, number = stages[max(stages)], encoder.early_index
                early = encoder.on_final_grid(stages[number], number)
            else:
                tokens, early = self.encoder(images)
        neck = self.apply_neck(tokens)
        class_logits, cam = self.classifier(neck.features)
        early_class_logits, early_cam = self.early_classifier(early)
        return NetworkOutput(
            class_logits,
            early_class_logits,
            cam,
            early_cam,
            self.decode(neck.features, stages) if decode else None,
            neck.features,
            tokens=tokens,
            neck=neck,
            attention=between_patches(attention, tokens.shape[2:].numel()),
        )

    def apply_neck(self, tokens: Tensor) -> NeckOutput:
        """What the neck makes of the encoder's final features (B, D, h, w)."""
        if self.neck is None:
            return NeckOutput(tokens)
        output = self.neck(tokens)
        return output if isinstance(output, NeckOutput) else NeckOutput(output)

    def decode(self, features: Tensor, stages: Mapping[int, Tensor] | None = None) -> Tensor:
        """Segmentation logits of the final features and, for a decoder that reads them, of stages.

        Args:
            features: (B, D, h, w), after the neck; they take the place of the last stage.
            stages: by number, from :meth:`PyramidEncoder.chosen_stages`.
        """
        if not isinstance(self.decoder, StageDecoder):
            return self.decoder(features)
        assert stages, "a decoder of stages needs them"
        return self.decoder({**stages, max(stages): features})

    def want_attention(self, blocks: Blocks | None = None) -> None:
        """Keep the attention of blocks in each pass in training mode.

        Args:
            blocks: numbers, from the end where negative, or "all"; None takes those that somebody
                else names, or all.

        Raises:
            UserError: an encoder without attention or without such a block, or somebody who wants
                other blocks.
        """
        chosen = choose_blocks(self.encoder, "all" if blocks is None else blocks)
        if blocks is None:
            self.kept_blocks = self.kept_blocks or chosen
            return
        if self._wished_blocks not in ((), chosen):
            raise UserError(
                f"Attention is wanted of blocks {list(self._wished_blocks)} and of "
                f"{list(chosen)}: give method.blocks and addon.affinity.blocks one value."
            )
        self.kept_blocks = self._wished_blocks = chosen

    @property
    def wanted_attention(self) -> tuple[int, ...]:
        """The blocks whose attention the next pass keeps."""
        return self.kept_blocks if self.training and self.attention_is_read else ()

    def set_pooling(self, pooling: str) -> None:
        """How image logits pool the features: ``gmp``, the maximum, or ``gap``, the mean.

        Raises:
            UserError: another one.
        """
        if pooling not in POOLINGS:
            raise UserError(f"method.pooling='{pooling}': choose one of {', '.join(POOLINGS)}.")
        self.classifier.pooling = self.early_classifier.pooling = pooling

    def reset_heads(self) -> None:
        """Draw new weights for neck, classifiers and decoder; a given one that cannot stays."""
        for head in self._heads:
            reset = getattr(head, "reset_parameters", None)
            if callable(reset):
                reset()

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of neck, classifiers and decoder: those with the larger learning rate."""
        return [parameter for head in self._heads for parameter in head.parameters()]

    @property
    def _heads(self) -> list[nn.Module]:
        neck = [] if self.neck is None else [self.neck]
        return [*neck, self.classifier, self.early_classifier, self.decoder]


def between_patches(attention: Sequence[Tensor], count: int) -> Tensor | None:
    """Attention among the last ``count`` of all tokens, the patches: mean of (B, T, T) matrices."""
    if not attention:
        return None
    return torch.stack([matrix[:, -count:, -count:] for matrix in attention]).mean(0)
