"""What the encoders that work in stages of falling resolution share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsss.errors import UserError


class PyramidEncoder(nn.Module):
    """An encoder with a list of stages: its last is the final feature map, one other the early.

    It has the interface of :class:`~wsss.nn.ViTEncoder`, and :meth:`pyramid` beside it. A
    subclass makes its layers after this constructor, implements :meth:`_stages` and ends its own
    constructor with :meth:`_freeze_norms`.

    Args:
        name: of the model, for messages.
        early_block: stage of the early features, from the end or from the start.
        dims: channels of every stage.
        strides: pixels between neighbouring cells of every stage; each divides the last.
        mean: of the three colours in [0, 1].
        std: of the three colours.
        freeze_bn: keep BatchNorm layers in evaluation mode, their affine parameters untrained.

    Attributes:
        stage_dims, stage_strides: ``dims`` and ``strides`` as tuples.
        dim, early_dim: channels of the final and of the early features.
        patch_size: the last stride, twice.

    Raises:
        UserError: ``early_block`` out of range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        early_block: int,
        dims: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        freeze_bn: bool,
    ) -> None:
        super().__init__()
        count = len(dims)
        if not -count <= early_block < count:
            raise UserError(
                f"backbone.early_block={early_block} is outside the {count} stages of '{name}': "
                f"choose a value from {-count} to {count - 1}."
            )
        self.name = name
        self.early_index = early_block % count
        self.stage_dims = tuple(dims)
        self.stage_strides = tuple(strides)
        self.dim = self.stage_dims[-1]
        self.early_dim = self.stage_dims[self.early_index]
        self.patch_size = (self.stage_strides[-1], self.stage_strides[-1])
        self.freeze_bn = freeze_bn
        for key, value in (("mean", mean), ("std", std)):
            tensor = torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(key, tensor, persistent=False)

    def freeze_position(self) -> None:
        """There is no position embedding: nothing to do."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the final feature map of an image of that size."""
        return -(-height // self.patch_size[0]), -(-width // self.patch_size[1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of RGB images in [0, 1].

        Args:
            images: (B, 3, H, W) of any size.

        Returns:
            Final features (B, dim, h, w) and early features (B, early_dim, h, w), h = ceil(H /
            stride), w = ceil(W / stride). An early stage of finer resolution is averaged down to
            the final grid, for CAMs of both are compared cell by cell.
        """
        stages = self.chosen_stages(images, ())
        early = self.on_final_grid(stages[self.early_index], self.early_index)
        return stages[len(self.stage_dims) - 1], early

    def chosen_stages(self, images: Tensor, wanted: Collection[int]) -> dict[int, Tensor]:
        """Stages by number: those wanted, the early and the last one.

        The others are not held on to: at stride 2 one is larger than all that follow.

        Args:
            images: (B, 3, H, W) RGB in [0, 1].
            wanted: numbers from 0 on.
        """
        kept = {*wanted, self.early_index, len(self.stage_dims) - 1}
        return {i: stage for i, stage in enumerate(self._stages(images)) if i in kept}

    def on_final_grid(self, stage: Tensor, number: int) -> Tensor:
        """Stage ``number`` averaged down to the final grid: (B, D, h, w)."""
        factor = self.stage_strides[-1] // self.stage_strides[number]
        return F.avg_pool2d(stage, factor, ceil_mode=True) if factor > 1 else stage

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """All stages in order, the final features last.

        Args:
            images: (B, 3, H, W) RGB in [0, 1].

        Returns:
            Stage i as (B, stage_dims[i], ceil(H / stage_strides[i]), ceil(W / stage_strides[i])).
        """
        return list(self._stages(images))

    def train(self, mode: bool = True) -> PyramidEncoder:
        """As every module's, but BatchNorm stays in evaluation mode with ``freeze_bn``."""
        super().train(mode)
        if self.freeze_bn:
            for norm in self._norms():
                norm.eval()
        return self

    @abstractmethod
    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        """The stages' outputs of images in [0, 1], one after the other."""

    def _norms(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, _BatchNorm))

    def _freeze_norms(self) -> None:
        """Freeze what ``freeze_bn`` names; after the layers were made."""
        if self.freeze_bn:
            for norm in self._norms():
                norm.requires_grad_(False)
            self.train(self.training)
