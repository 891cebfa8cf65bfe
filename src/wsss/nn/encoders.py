"""One function that makes the encoder a name stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from wsss.errors import UserError
from wsss.nn import resnet38
from wsss.nn.cnn import CNNEncoder
from wsss.nn.encoder import (
    ViTEncoder,
    is_plain_vit,
    load_strictly,
    load_vit_tensors,
    require_timm_name,
)
from wsss.nn.pyramid import PyramidEncoder
from wsss.nn.resnet38 import ResNet38Encoder

Encoder = ViTEncoder | PyramidEncoder


@dataclass(frozen=True)
class SavedEncoder:
    """The encoder of a trained network, for another one to start from."""

    name: str  #: of its backbone
    tensors: Mapping[str, Tensor]  #: of its state dict
    path: Path  #: of the checkpoint, for messages

    def load_into(self, encoder: Encoder) -> None:
        """Copy the weights, strictly; a ViT's embeddings of positions and patches are resampled.

        Raises:
            UserError: it is another encoder.
        """
        if encoder.name != self.name:
            raise UserError(
                f"backbone.weights='{self.path}' was trained with backbone.name={self.name}, not "
                f"{encoder.name}: choose the same backbone, or other weights."
            )
        if isinstance(encoder, ViTEncoder):
            tensors = {k.removeprefix("vit."): v for k, v in self.tensors.items()}
            load_vit_tensors(encoder.vit, tensors, self.name, self.path)
        else:
            load_strictly(encoder, self.tensors, self.name, self.path)


def make_encoder(
    name: str,
    early_block: int | None = None,
    early_norm: bool = False,
    pretrained: bool = False,
    weights: str | Path | SavedEncoder | None = None,
    **kwargs: Any,
) -> Encoder:
    """The encoder of a name: a plain ViT of timm, a CNN of timm, or ``resnet38d``.

    Args:
        name: timm model name or ``resnet38d``.
        early_block: block or stage of the early features; None takes the class's own default (-3
            in a ViT, -2 in a CNN).
        early_norm: see :class:`~wsss.nn.ViTEncoder`; not for CNNs.
        pretrained: load timm's own weights from the hub.
        weights: a local file of weights of that model, or the encoder of a trained network.
        **kwargs: further options of :class:`~wsss.nn.ViTEncoder`, :class:`CNNEncoder` or
            :class:`ResNet38Encoder`.

    Raises:
        UserError: unknown name, a model that is neither a plain ViT nor one that gives the features
            of its stages, options that the encoder does not have, or weights of another one.
    """
    if isinstance(weights, SavedEncoder):
        encoder = make_encoder(name, early_block, early_norm, **kwargs)
        weights.load_into(encoder)
        return encoder
    if early_block is not None:
        kwargs["early_block"] = early_block
    if name == resnet38.NAME:
        _refuse_early_norm(name, early_norm)
        unknown = set(kwargs) - resnet38.option_names() - {"early_block"}
        if unknown:
            raise UserError(
                f"backbone.options: {name} does not have {', '.join(sorted(unknown))}; "
                f"it has {', '.join(sorted(resnet38.option_names()))}."
            )
        return ResNet38Encoder(pretrained=pretrained, weights=weights, **kwargs)
    require_timm_name(name, (resnet38.NAME,))
    if _is_vit(name):
        return ViTEncoder(
            name, early_norm=early_norm, pretrained=pretrained, weights=weights, **kwargs
        )
    _refuse_early_norm(name, early_norm)
    return CNNEncoder(name, pretrained=pretrained, weights=weights, **kwargs)


def _is_vit(name: str) -> bool:
    """Whether a timm model is a ViT on token grids of any shape; on the meta device, so at once."""
    one_block: dict[str, Any] = {"depth": 1}
    for options in (one_block, {}):
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        except TypeError:  # a model that does not know these options, as most
            return False
        except Exception:  # a few ViTs take no other depth than their own
            continue
        return is_plain_vit(model)
    return False


def _refuse_early_norm(name: str, early_norm: bool) -> None:
    if early_norm:
        raise UserError(
            f"backbone.early_norm=true: '{name}' has no final norm that fits its early features. "
            "Set it to false."
        )
