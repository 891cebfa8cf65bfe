"""ResNet-38d: the wide residual network that PSA, SEAM and Spatial-BCE are built on.

Wu, Shen, van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition"
(2016), model A1, with its last two strides replaced by dilation (stride 8) as PSA and SEAM have it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn.encoder import load_strictly, read_tensors
from wsss.nn.mxnet_params import read_mxnet_params
from wsss.nn.pyramid import PyramidEncoder

NAME = "resnet38d"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class _Level(NamedTuple):
    """Units of one resolution.

    Attributes:
        name: of the first unit; further ones have ``_1``, ``_2`` ... behind it.
        units: how many.
        channels: output channels of a unit's convolutions.
        kernels: their sizes.
        stride: of the first unit.
        first_dilation: of the first unit's first convolution.
        dilation: of all other convolutions.
        dropout: of whole channels, before every convolution but the first.
    """

    name: str
    units: int
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int = 1
    first_dilation: int = 1
    dilation: int = 1
    dropout: float = 0.0


_STEM = 64
# The original has stride 2 in b5 and b6 too. Each is left out here, and the convolutions behind it
# are dilated twice as far; the one that had it is not.
_LEVELS = (
    _Level("b2", 3, (128, 128), (3, 3), stride=2),
    _Level("b3", 3, (256, 256), (3, 3), stride=2),
    _Level("b4", 6, (512, 512), (3, 3), stride=2),
    _Level("b5", 3, (512, 1024), (3, 3), first_dilation=1, dilation=2),
    _Level("b6", 1, (512, 1024, 2048), (1, 3, 1), dilation=4, dropout=0.3),
    _Level("b7", 1, (1024, 2048, 4096), (1, 3, 1), dilation=4, dropout=0.5),
)
# A stage's output is read behind the first norm and ReLU of the level that follows: before them it
# is a sum of residual branches, of no particular scale.
_TAPS = ("b3", "b4", "b5", "b6")


class PreActivationUnit(nn.Module):
    """Residual unit with norm and ReLU before each convolution.

    Where shape changes, the shortcut is a 1 x 1 convolution of the activated input; elsewhere it is
    the input itself.

    Args:
        in_channels: of the input.
        channels: output channels of the convolutions.
        kernels: their sizes, odd.
        stride: of the first convolution and of the shortcut.
        dilations: of the convolutions.
        dropout: probability of a channel to be left out, before every convolution but the first.
    """

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, ...],
        kernels: tuple[int, ...],
        stride: int,
        dilations: tuple[int, ...],
        dropout: float,
    ) -> None:
        super().__init__()
        inputs = (in_channels, *channels[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm2d(source) for source in inputs)
        self.convs = nn.ModuleList()
        rows = zip(inputs, channels, kernels, dilations, strict=True)
        for i, (source, target, kernel, dilation) in enumerate(rows):
            step = stride if i == 0 else 1
            padding = dilation * (kernel // 2)
            self.convs.append(
                nn.Conv2d(source, target, kernel, step, padding, dilation, bias=False)
            )
        self.dropout = nn.Dropout2d(dropout)
        changes = stride != 1 or in_channels != channels[-1]
        self.shortcut = (
            nn.Conv2d(in_channels, channels[-1], 1, stride, bias=False) if changes else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The activated input (B, in_channels, H, W) and the output."""
        activated = branch = self.norms[0](x).relu()
        for i, conv in enumerate(self.convs):
            if i > 0:
                branch = self.dropout(self.norms[i](branch).relu())
            branch = conv(branch)
        return activated, branch + (x if self.shortcut is None else self.shortcut(activated))


class ResNet38Encoder(PyramidEncoder):
    """ResNet-38d with the interface of the other encoders; 4096 features at stride 8.

    :meth:`pyramid` has five stages. In the names of SEAM's code, [-1] is ``conv6``, the output of
    b7 after the last norm and ReLU (4096 channels); [-2] is ``conv5``, what enters b6's
    convolutions: the output of b5 after b6's first norm and ReLU (1024); [-3] is ``conv4``, the
    output of b4 after b5's first norm and ReLU (512); all of stride 8. Before them come the inputs
    of b4 (256 channels, stride 4) and of b3 (128, stride 2), made likewise. None is negative.

    Without ``weights`` the network is drawn anew: then switch ``freeze_bn`` and ``freeze_stem``
    off to train it.

    Args:
        early_block: stage of the early features.
        pretrained: must be False, for no hub has these weights.
        weights: a local file: MXNet's original ``ilsvrc-cls_rna-a1_cls1000_ep-0001.params``, or a
            ``.pth`` or ``.safetensors`` with the names of PSA's and SEAM's code, or ours; see
            :func:`rename`. Strict but for heads.
        width: factor of the channels of all layers.
        freeze_bn: keep BatchNorm layers in evaluation mode, their affine parameters untrained.
        freeze_stem: do not train the first convolution and level b2.

    Raises:
        UserError: ``pretrained``, a width that leaves a layer without channels, ``early_block`` out
            of range, or weights of another model.
    """

    def __init__(
        self,
        early_block: int = -2,
        pretrained: bool = False,
        weights: str | Path | None = None,
        width: float = 1.0,
        freeze_bn: bool = True,
        freeze_stem: bool = True,
    ) -> None:
        if pretrained:
            raise UserError(
                f"backbone.pretrained=true: no hub has weights of {NAME}. Set it to false, and "
                "backbone.weights to a file (ilsvrc-cls_rna-a1_cls1000_ep-0001.params, or one of "
                "PSA or SEAM)."
            )
        if round(_STEM * width) < 1:
            raise UserError(f"backbone.options.width={width}: choose at least {1 / _STEM}.")
        dims = [round(level.channels[-1] * width) for level in _LEVELS]
        strides = [2, 4, 8, 8, 8]
        super().__init__(
            NAME,
            early_block,
            [*dims[:4], dims[-1]],
            strides,
            _IMAGENET_MEAN,
            _IMAGENET_STD,
            freeze_bn,
        )
        channels = round(_STEM * width)
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.units = nn.ModuleDict()
        for level in _LEVELS:
            widths = tuple(round(c * width) for c in level.channels)
            for i in range(level.units):
                first = level.first_dilation if i == 0 else level.dilation
                self.units[f"{level.name}_{i}" if i else level.name] = PreActivationUnit(
                    channels,
                    widths,
                    level.kernels,
                    level.stride if i == 0 else 1,
                    (first,) + (level.dilation,) * (len(widths) - 1),
                    level.dropout,
                )
                channels = widths[-1]
        self.norm = nn.BatchNorm2d(channels)
        if weights is not None:
            load_strictly(self, read_resnet38(Path(weights)), NAME, weights)
        if freeze_stem:
            self.stem.requires_grad_(False)
            for name, unit in self.units.items():
                if name.startswith("b2"):
                    unit.requires_grad_(False)
        self._freeze_norms()

    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.stem((images - self.mean) / self.std)
        for name, unit in self.units.items():
            activated, x = unit(x)
            if name in _TAPS:
                yield activated
        yield self.norm(x).relu()


def option_names() -> set[str]:
    """Options that :class:`ResNet38Encoder` has beside those of every encoder."""
    common = {"self", "early_block", "pretrained", "weights"}
    return set(inspect.signature(ResNet38Encoder.__init__).parameters) - common


def read_resnet38(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file of ResNet-38 under our names, heads left out.

    Raises:
        UserError: the file cannot be read.
    """
    state: Mapping[str, Tensor]
    if path.suffix == ".params":
        arrays = read_mxnet_params(path)
        state = {_from_mxnet(name): torch.from_numpy(a) for name, a in arrays.items()}
    else:
        state = read_tensors(path)
    return rename(state)


_LAYERS = {
    "bn_branch2a": "norms.0",
    "conv_branch2a": "convs.0",
    "bn_branch2b1": "norms.1",
    "conv_branch2b1": "convs.1",
    "bn_branch2b2": "norms.2",
    "conv_branch2b2": "convs.2",
    "conv_branch1": "shortcut",
}
_HEADS = ("fc", "f8_", "f9", "linear")


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of PSA's and SEAM's files into ours; heads (``fc8``, ``f9``, ...) are left out.

    ========================  ============================  ==========================
    their file                original MXNet file           here
    ========================  ============================  ==========================
    conv1a                    conv1a                        stem
    b4, b4_1                  4a, 4b1                       units.b4, units.b4_1
    b4.bn_branch2a            bn4a_branch2a                 units.b4.norms.0
    b4.conv_branch2a          res4a_branch2a                units.b4.convs.0
    b4.bn_branch2b1, 2b2      bn4a_branch2b1, 2b2           units.b4.norms.1, .2
    b4.conv_branch2b1, 2b2    res4a_branch2b1, 2b2          units.b4.convs.1, .2
    b4.conv_branch1           res4a_branch1                 units.b4.shortcut
    bn7                       bn7                           norm
    ========================  ============================  ==========================

    A prefix ``module.`` is dropped; other names stay as they are, ours among them.
    """
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name.startswith(_HEADS):
            continue
        parts = name.split(".")
        if parts[0] == "conv1a":
            parts[0] = "stem"
        elif parts[0] == "bn7":
            parts[0] = "norm"
        elif len(parts) == 3 and parts[1] in _LAYERS:
            parts = ["units", parts[0], _LAYERS[parts[1]], parts[2]]
        renamed[".".join(parts)] = tensor
    return renamed


_MXNET_NAME = re.compile(
    r"(?:arg|aux):(?:(?P<kind>bn|res)(?P<level>\d)(?:a|b(?P<unit>\d+))_(?P<branch>branch\w+?)"
    r"|(?P<single>conv1a|bn7|linear1000))"
    r"_(?P<what>weight|bias|gamma|beta|moving_mean|moving_var)"
)
_MXNET_WHAT = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


def _from_mxnet(name: str) -> str:
    """An MXNet name in the style of PSA's files; one that is not of this network stays."""
    match = _MXNET_NAME.fullmatch(name)
    if match is None:
        return name
    what = _MXNET_WHAT.get(match["what"], match["what"])
    if match["single"]:
        return f"{match['single']}.{what}"
    unit = f"b{match['level']}" + (f"_{match['unit']}" if match["unit"] else "")
    kind = "bn" if match["kind"] == "bn" else "conv"
    return f"{unit}.{kind}_{match['branch']}.{what}"
