"""Decoders that read several stages of an encoder, through segmentation_models_pytorch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn.pyramid import PyramidEncoder

_FINE = 4


class StageDecoder(nn.Module):
    """Base: logits of stride 4 from the stages of a :class:`~wsss.nn.pyramid.PyramidEncoder`.

    Stages of an image whose sides the last stride does not divide do not nest: ten cells of stride
    4 under three of stride 16. The finer ones are continued at the border until they do, and what
    lies outside the image is cut off the logits.

    Args:
        encoder: whose stages will be read; not kept.
        out_channels: segmentation classes, background included (C + 1).
        width: channels of the decoder's features.

    Shape: stages (B, D_i, ceil(H / s_i), ceil(W / s_i)) by number ->
    (B, out_channels, ceil(H / 4), ceil(W / 4)), logits.

    Raises:
        UserError: an encoder without stages or without one of stride 4; in :meth:`forward`, one
            image in training, which the batch statistics of pooled features cannot be taken of.
    """

    def __init__(self, encoder: nn.Module, out_channels: int, width: int) -> None:
        super().__init__()
        kind = type(self).__name__
        name = getattr(encoder, "name", type(encoder).__name__)
        strides = encoder.stage_strides if isinstance(encoder, PyramidEncoder) else ()
        if not isinstance(encoder, PyramidEncoder) or _FINE not in strides:
            raise UserError(
                f"decoder={kind} reads stages from stride {_FINE} on, which backbone.name='{name}' "
                "does not give: choose decoder=largefov, or a backbone in stages such as "
                "backbone=resnet101 or backbone=swin_base."
            )
        first = max(i for i, stride in enumerate(strides) if stride == _FINE)
        #: numbers of the stages that are read, finest first
        self.read = self._choose(first, strides)
        self.strides = tuple(strides[i] for i in self.read)
        self.decoder = self._make([encoder.stage_dims[i] for i in self.read], width)
        self.classifier = nn.Conv2d(width, out_channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in self.decoder.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        initialize_decoder(self.decoder)
        # Equal logits for all classes at the start, as in LargeFOV.
        nn.init.zeros_(self.classifier.weight)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def _spans_ranks(self) -> bool:
        """Whether batch statistics are of all ranks' images together."""
        return (
            any(isinstance(module, nn.SyncBatchNorm) for module in self.modules())
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        )

    def forward(self, stages: Mapping[int, Tensor]) -> Tensor:
        chosen = [stages[i] for i in self.read]
        if self.training and len(chosen[0]) < 2 and not self._spans_ranks():
            raise UserError(
                f"decoder={type(self).__name__} normalises over the batch and got 1 image: give "
                "data.batch_size at least 2 for each GPU and accumulated micro-batch."
            )
        height, width = chosen[0].shape[-2:]
        # The first two of its list, strides 1 and 2, are not read by either decoder.
        features = self.decoder([chosen[0], chosen[0], *self._nested(chosen)])
        return self.classifier(features)[..., :height, :width]

    def _nested(self, stages: Sequence[Tensor]) -> list[Tensor]:
        rows, columns = stages[-1].shape[-2:]
        factors = [self.strides[-1] // stride for stride in self.strides]
        return [
            F.pad(
                stage,
                (0, columns * factor - stage.shape[-1], 0, rows * factor - stage.shape[-2]),
                mode="replicate",
            )
            for stage, factor in zip(stages, factors, strict=True)
        ]

    @abstractmethod
    def _choose(self, first: int, strides: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the stages to read, of which ``first`` has stride 4."""

    @abstractmethod
    def _make(self, dims: Sequence[int], width: int) -> nn.Module:
        """The decoder of stages with these channels; its list begins with two it does not read."""


class DeepLabV3Plus(StageDecoder):
    """DeepLabV3+: atrous spatial pyramid pooling of the last stage, joined with stride 4.

    Source: Chen et al., Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation (ECCV 2018).

    Args:
        encoder: of final stride 8 or 16.
        out_channels: C + 1.
        width: channels of the decoder.
        rates: of the three atrous convolutions: (6, 12, 18) at stride 16, the double at 8.
        dropout: probability, after the pyramid.

    Raises:
        UserError: another final stride, or what :class:`StageDecoder` raises.
    """

    def __init__(
        self,
        encoder: nn.Module,
        out_channels: int,
        width: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        dropout: float = 0.1,
    ) -> None:
        if len(rates) != 3:
            raise UserError(f"decoder.rates={list(rates)}: give three dilations.")
        self._options: dict[str, Any] = {
            "atrous_rates": tuple(rates),
            "aspp_separable": True,
            "aspp_dropout": dropout,
        }
        super().__init__(encoder, out_channels, width)

    def _choose(self, first: int, strides: Sequence[int]) -> tuple[int, ...]:
        if strides[-1] not in (8, 16):
            raise UserError(
                f"decoder=DeepLabV3Plus needs a last stage of stride 8 or 16, not {strides[-1]}: "
                "set backbone.options.output_stride=16, or choose decoder=upernet."
            )
        return first, len(strides) - 1

    def _make(self, dims: Sequence[int], width: int) -> nn.Module:
        return DeepLabV3PlusDecoder(
            (0, 0, *dims),
            encoder_depth=4,
            out_channels=width,
            output_stride=self.strides[-1],
            **self._options,
        )


class UPerNet(StageDecoder):
    """UPerNet: pyramid pooling of the last stage, then a feature pyramid over all from stride 4 on.

    Source: Xiao et al., Unified Perceptual Parsing for Scene Understanding (ECCV 2018). The stages
    are normalised over their channels first.

    Args:
        encoder: with at least two stages from stride 4 on.
        out_channels: C + 1.
        width: channels of the decoder.

    Raises:
        UserError: see :class:`StageDecoder`.
    """

    def __init__(self, encoder: nn.Module, out_channels: int, width: int = 512) -> None:
        super().__init__(encoder, out_channels, width)

    def _choose(self, first: int, strides: Sequence[int]) -> tuple[int, ...]:
        return tuple(range(first, len(strides)))

    def _make(self, dims: Sequence[int], width: int) -> nn.Module:
        return UPerNetDecoder((0, 0, *dims), encoder_depth=len(dims) + 1, decoder_channels=width)
