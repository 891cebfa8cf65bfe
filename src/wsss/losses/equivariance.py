"""SEAM's self-supervision: what two scales of one image say should be the same."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss.losses.max_norm import max_norm


def equivariant_loss(large: Tensor, small: Tensor, labels: Tensor) -> Tensor:
    """Equivariant regularisation of SEAM (ER): ``mean |r_large - r_small|``.

    r are the max-normalised CAMs, see :func:`~wsss.losses.max_norm.max_norm`, 0 for classes that
    are not in the image.

    Args:
        large: (B, C, h, w) CAM logits of the image, resized to those of ``small``.
        small: (B, C, h, w) CAM logits of the image at another scale.
        labels: (B, C) 0/1.

    Returns:
        0-dimensional float tensor, mean over images, all classes and positions.

    Source: Wang et al., Self-supervised Equivariant Attention Mechanism (CVPR 2020).
    """
    return (_present(large, labels) - _present(small, labels)).abs().mean()


def equivariant_cross_loss(
    large: Tensor,
    small: Tensor,
    refined_large: Tensor,
    refined_small: Tensor,
    labels: Tensor,
    share: float = 0.2,
) -> Tensor:
    """Equivariant cross regularisation of SEAM (ECR), on its hardest values.

    The refined maps of each scale against the CAM of the other. The CAM is a target: it is
    max-normalised, at each pixel only the largest class stays, before it comes a background
    ``1 - max_c r_c``; no gradient. Of the absolute differences of an image, background included,
    the largest ``share`` counts.

    Args:
        large, small: (B, C, h, w) CAM logits, as in :func:`equivariant_loss`.
        refined_large, refined_small: (B, C + 1, h, w) refined maps at the same size, background
            first.
        labels: (B, C) 0/1.
        share: of the values of an image, at least one.

    Returns:
        0-dimensional float tensor: mean over the values of the one direction plus that of the
        other, mean over images.

    Source: Wang et al., Self-supervised Equivariant Attention Mechanism (CVPR 2020).
    """
    one = _cross(small, refined_large, labels, share)
    return one + _cross(large, refined_small, labels, share)


def min_pooling_loss(refined: Tensor, labels: Tensor, share: float = 0.25) -> Tensor:
    """What is left where an image is least like any of its classes ("adaptive min pooling").

    Part of SEAM's published training alone: with ``m`` the largest activation of a pixel over the
    classes present, the mean of the lowest ``share`` of m, which is to become 0, background.

    Args:
        refined: (B, C, h, w) maps of the classes.
        labels: (B, C) 0/1.
        share: of the pixels of an image, at least one.

    Returns:
        0-dimensional float tensor, mean over images.
    """
    largest = (_float(refined) * labels[:, :, None, None]).amax(1).flatten(1)
    count = max(1, int(largest.shape[1] * share))
    return largest.topk(count, dim=1, largest=False).values.relu().mean()


def keep_largest(maps: Tensor) -> Tensor:
    """Background ``1 - max`` and, at each pixel, the largest of the maps; the others become 0.

    Args:
        maps: (B, C, h, w) in [0, 1].

    Returns:
        (B, C + 1, h, w), background first.
    """
    largest = maps.amax(1, keepdim=True)
    return torch.cat([1 - largest, torch.where(maps == largest, maps, 0)], 1)


def _cross(cam: Tensor, refined: Tensor, labels: Tensor, share: float) -> Tensor:
    target = keep_largest(_present(cam.detach(), labels))
    with_background = torch.cat([torch.ones_like(labels[:, :1]), labels], 1)
    difference = (target - _present(refined, with_background)).abs().flatten(1)
    count = max(1, int(difference.shape[1] * share))
    return difference.topk(count, dim=1).values.mean()


def _present(maps: Tensor, labels: Tensor) -> Tensor:
    return max_norm(maps) * labels[:, :, None, None]


def _float(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()
