"""Typed batches: what a data loader hands to a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """One training micro-batch: two views of the same crops.

    Both views share their geometry pixel by pixel, so anything computed on ``weak`` can
    supervise ``strong`` at the same position.

    Attributes:
        weak: (B, 3, H, W) RGB. uint8 0..255 as the workers send it, float in [0, 1] after
            the data module's transfer hook; 0 outside the image.
        strong: (B, 3, H, W), as ``weak``, with one appearance transform on top.
        labels: (B, C) float, 1 where the image holds the foreground class.
        valid: (B, H, W) bool, False on padding (outside the image).
        names: image names, without folder and extension.
        index: (B,) int64, the global sample number each item was drawn as.
        mask: (B, H, W) int64, 0..C and 255 (void and padding); None unless the method asks
            for masks (``supervised``).
    """

    weak: Tensor
    strong: Tensor
    labels: Tensor
    valid: Tensor
    names: Sequence[str]
    index: Tensor
    mask: Tensor | None = None

    def pin_memory(self) -> Batch:
        """Page-locked copy; called by ``DataLoader(pin_memory=True)``."""
        return Batch(
            self.weak.pin_memory(),
            self.strong.pin_memory(),
            self.labels.pin_memory(),
            self.valid.pin_memory(),
            self.names,
            self.index,
            None if self.mask is None else self.mask.pin_memory(),
        )


@dataclass
class EvalBatch:
    """One evaluation batch: images at the inference size, masks at their own size.

    Attributes:
        images: (B, 3, S, S) RGB, uint8 from the workers, float in [0, 1] after transfer.
        labels: (B, C) float, the image labels; only ``given_tags`` and ``cpl`` scores read them.
        masks: B tensors (H_i, W_i) int64 with 0..C and 255, each at the image's native size; of
            data without masks, all 255.
        names: image names.
        groups: (B,) int64, index of what each image belongs to (a patient) in the data module's
            ``groups``; None for data without groups.
        originals: B tensors (H_i, W_i, 3) uint8 RGB, the images at their own size; None unless
            the data module is asked for them (for a CRF).
    """

    images: Tensor
    labels: Tensor
    masks: list[Tensor]
    names: Sequence[str]
    groups: Tensor | None = None
    originals: list[Tensor] | None = None

    def pin_memory(self) -> EvalBatch:
        """Page-locked copy; called by ``DataLoader(pin_memory=True)``."""
        return EvalBatch(
            self.images.pin_memory(),
            self.labels.pin_memory(),
            [mask.pin_memory() for mask in self.masks],
            self.names,
            self.groups,
            self.originals,
        )


def to_unit_range(images: Tensor) -> Tensor:
    """RGB uint8 0..255 to float32 in [0, 1]; float input is returned as it is."""
    return images.to(torch.float32).div_(255.0) if images.dtype == torch.uint8 else images
