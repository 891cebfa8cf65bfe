"""Encoders: any network of timm that gives the features of its stages: CNNs, Swin and the like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn.encoder import create_timm, load_strictly, read_tensors, require_timm_name
from wsss.nn.pyramid import PyramidEncoder

# Options of timm's features_only form that whole models of some families do not have.
_FEATURES_OPTIONS = ("features_only", "out_indices", "feature_cls", "output_stride")


class CNNEncoder(PyramidEncoder):
    """A timm CNN that returns its final and an early feature map.

    The final features are what timm calls those of the last stage. In most CNNs (ResNet, Res2Net,
    RegNet, VGG, DLA) they come out of a ReLU and are not negative; in others they do not: of
    EfficientNet a linear layer ends the stage, of ConvNeXt, ResNetV2 and NFNet a residual sum.

    Every stage of stride s has exactly ceil(H / s) x ceil(W / s) cells. Networks whose layers
    round sizes down (ConvNeXt, VGG, DenseNet) get their images padded to a multiple of the final
    stride, right and below, with the mean colour; cells of the padding alone are cut off.

    Args:
        name: timm model name, e.g. ``resnet50.tv_in1k``.
        early_block: stage of the early features, counted from the end (-2 is the one before the
            last) or from the start.
        output_stride: stride of the final features; below the network's own (mostly 32) its last
            stages are dilated, which ResNets and many others can (8 or 16).
        pretrained: load timm's own weights from the hub.
        weights: a local ``.safetensors`` or ``.pth`` file of the same timm model; tensors only,
            strict but for the parts that the features do not need, such as the classifier.
        freeze_bn: keep BatchNorm layers in evaluation mode, their affine parameters untrained; as
            usual for pretrained networks, whose statistics a small batch would spoil.
        **kwargs: for ``timm.create_model`` (``drop_path_rate``, ``out_indices`` ...).

    Raises:
        UserError: unknown model, one that does not give the features of its stages or has another
            stride, ``early_block`` out of range, or weights that belong to another model or cannot
            be fetched.
    """

    def __init__(
        self,
        name: str,
        early_block: int = -2,
        output_stride: int = 16,
        pretrained: bool = False,
        weights: str | Path | None = None,
        freeze_bn: bool = False,
        **kwargs: Any,
    ) -> None:
        require_timm_name(name)
        # A model without memory: it answers every question before weights are fetched.
        blank, options = _blank_features(name, output_stride, kwargs)
        info = blank.feature_info
        config = blank.pretrained_cfg
        super().__init__(
            name,
            early_block,
            info.channels(),
            info.reduction(),
            config["mean"],
            config["std"],
            freeze_bn,
        )
        self.pads = self._needs_padding(blank)
        self.features: Any = create_timm(name, pretrained, **options)
        if weights is not None:
            load_cnn_weights(self.features, name, Path(weights), options)
        self._freeze_norms()

    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        x = (images - self.mean) / self.std
        height, width = images.shape[-2:]
        if self.pads:
            stride = self.patch_size[0]
            x = F.pad(x, (0, -width % stride, 0, -height % stride))
        for stage, stride in zip(_planes(self.features, x), self.stage_strides, strict=True):
            yield stage[..., : -(-height // stride), : -(-width // stride)]

    def _needs_padding(self, blank: nn.Module) -> bool:
        """Whether image sizes have to be multiples of the stride.

        A layer's output size grows with its input's and, with its stride, repeats: one that gives
        k + 1 cells for both 1 pixel more than k strides and k + 1 strides does so in between.
        """
        stride = self.patch_size[0]
        if self._has_every_cell(blank, 2 * stride + 1, 3 * stride):
            return False
        if self._has_every_cell(blank, 2 * stride, 3 * stride):
            return True
        raise UserError(
            f"backbone.name='{self.name}' does not give one feature for every {stride} x {stride} "
            "pixels of images of any size: choose a CNN such as resnet50 or a plain ViT such as "
            "vit_base_patch16_224."
        )

    def _has_every_cell(self, blank: nn.Module, height: int, width: int) -> bool:
        image = torch.empty(1, 3, height, width, device="meta")
        try:
            with torch.no_grad(), torch.device("meta"):
                shapes = [tuple(stage.shape) for stage in _planes(blank, image)]
        except Exception:  # whatever a network says to a size that does not suit it
            return False
        cells = [(1, d, -(-height // s), -(-width // s)) for d, s in self._sizes()]
        return shapes == cells

    def _sizes(self) -> Iterator[tuple[int, int]]:
        return zip(self.stage_dims, self.stage_strides, strict=True)


def _planes(features: Any, images: Tensor) -> list[Tensor]:
    """The stages as (B, D, h, w); of Swin and others timm gives channels last."""
    stages: list[Tensor] = features(images)
    if getattr(features, "output_fmt", "NCHW") == "NHWC":
        return [stage.permute(0, 3, 1, 2) for stage in stages]
    return stages


def _blank_features(
    name: str, output_stride: int, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The network on the meta device, in evaluation mode, and the options that make it.

    Networks that cannot be dilated are taken if their own stride is the wanted one.

    Raises:
        UserError: timm cannot make it, or its stride is another.
    """
    # Networks of windows (Swin) are made for one image size unless told otherwise.
    for own_options in ({"output_stride": output_stride}, {"strict_img_size": False}, {}):
        options = {"features_only": True} | own_options | kwargs
        try:
            with torch.device("meta"):
                blank: Any = timm.create_model(name, **options)
            break
        except Exception as error:  # TypeError, AssertionError, RuntimeError ...: each has its own
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
    else:
        raise UserError(
            f"backbone.name='{name}' with options {sorted(kwargs)} cannot give the features of its "
            f"stages ({reason}): choose a CNN such as resnet50 or a plain ViT such as "
            "vit_base_patch16_224, and options that it has."
        )
    own = blank.feature_info.reduction()[-1]
    if own != output_stride:
        raise UserError(
            f"backbone.options.output_stride={output_stride} is not possible with '{name}', whose "
            f"own stride is {own}: choose output_stride={own}, or a network that can be dilated, "
            "such as resnet50 (8, 16 or 32)."
        )
    return blank.eval(), options


def load_cnn_weights(features: nn.Module, name: str, path: Path, options: dict[str, Any]) -> None:
    """Load a local weights file of a whole timm CNN into its ``features_only`` form, strictly.

    Args:
        features: what ``timm.create_model(name, features_only=True)`` made.
        name: timm model name.
        path: ``.safetensors`` or ``.pth``, with the names of ``timm.create_model(name)``.
        options: those that ``features`` was made with.

    Raises:
        UserError: the file's tensors are not those of model ``name``.
    """
    state = read_tensors(path)
    with torch.device("meta"):
        own = {k: v for k, v in options.items() if k not in _FEATURES_OPTIONS}
        whole: nn.Module = timm.create_model(name, **own)
    ours = {_whole_name(key, whole): key for key in features.state_dict()}
    # Not loaded: classifier and further parts behind the features. Unknown names are kept, for the
    # check to name them.
    unused = set(whole.state_dict()) - set(ours)
    renamed = {ours.get(key, key): value for key, value in state.items() if key not in unused}
    load_strictly(features, renamed, name, path)


def _whole_name(key: str, whole: nn.Module) -> str:
    """Name in the whole model of a parameter of its ``features_only`` form.

    timm's wrappers either keep the top-level modules (ResNet), or those inside a top-level
    ``Sequential`` with the two names joined by ``_`` (ConvNeXt: ``stages_0`` is ``stages.0``), or
    the model as one module (``model``, ``body``).
    """
    first, _, rest = key.partition(".")
    children = dict(whole.named_children())
    if first in children:
        return key
    for name, child in children.items():
        for inner, _ in child.named_children():
            if first == f"{name}_{inner}":
                return f"{name}.{inner}.{rest}"
    return rest
