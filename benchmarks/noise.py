"""Batches of noise, for scripts in this folder that measure steps without a data set."""

from __future__ import annotations

import torch

from wsss.data.batch import Batch


def noise(images: int, size: int, classes: int, device: str = "cpu") -> Batch:
    """Images of noise with large and small structures, two classes each, with masks of them."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, size, size)
    coarse = torch.rand(*shape[:2], 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic").clamp(0, 1)
    pixels = (pixels + 0.05 * torch.randn(shape, generator=generator)).clamp(0, 1)
    labels = torch.zeros(images, classes)
    masks = torch.zeros(images, size, size, dtype=torch.int64)
    for i in range(images):
        first, second = torch.randperm(classes, generator=generator)[:2]
        labels[i, [first, second]] = 1
        masks[i, : size // 2, : size // 2] = first + 1
        masks[i, size // 2 :, size // 2 :] = second + 1
    return Batch(
        weak=pixels.to(device),
        strong=pixels.to(device),
        labels=labels.to(device),
        valid=torch.ones(images, size, size, dtype=torch.bool, device=device),
        names=[str(i) for i in range(images)],
        index=torch.arange(images),
        mask=masks.to(device),
    )
