"""From activations to pseudo-labels: CPL (eq. 3) and SPL (eq. 7) of CoSA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255


def cam_pseudo_label(
    cam: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """CAM pseudo-label, CPL (CoSA, eq. 3).

    The class with the largest activation where that reaches the threshold, else background. With
    a low and a high threshold, 255 in between: see :func:`two_threshold_label`.

    Args:
        cam: (B, C, H, W) in [0, 1], already multiplied by the image labels.
        threshold: xi, a number or a 0-dimensional tensor; or (2,): low and high.
        valid: (B, H, W) bool; the label is 255 where it is False.
        labels: (B, C) 0/1. Changes nothing in the result: with them only the channels of present
            classes are compared, which is several times faster.

    Returns:
        (B, H, W) int64: 0 background, 1..C, 255.
    """
    pair = isinstance(threshold, Tensor) and threshold.dim() == 1
    low, high = threshold if pair else (threshold, threshold)  # type: ignore[misc]
    if labels is None:
        return two_threshold_label(cam, low, high, valid)
    present = PresentChannels(labels)
    return present.names(two_threshold_label(present.take(cam), low, high), valid)


class PresentChannels:
    """The channels of present classes, so that absent ones need not be computed.

    Present classes come first, both groups in class order; an image with fewer of them than another
    also has absent classes, which are 0 and never above a threshold.

    Args:
        labels: (B, C) 0/1.
    """

    def __init__(self, labels: Tensor) -> None:
        count = int(labels.bool().sum(1).max().clamp(min=1))
        self._channels = labels.bool().int().argsort(dim=1, descending=True, stable=True)[:, :count]

    def take(self, cam: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W), K the largest number of classes that an image holds."""
        index = self._channels[:, :, None, None].expand(-1, -1, *cam.shape[-2:])
        return cam.gather(1, index)

    def names(self, label: Tensor, valid: Tensor | None = None) -> Tensor:
        """Label (B, H, W) of classes for one of taken channels: 0, 1..K and 255.

        It is 255 where ``valid`` (B, H, W) is False.
        """
        undecided = label == IGNORE_INDEX
        lookup = F.pad(self._channels + 1, (1, 0))
        label = lookup.gather(1, label.masked_fill(undecided, 0).flatten(1)).view_as(label)
        label = label.masked_fill(undecided, IGNORE_INDEX)
        return label if valid is None else torch.where(valid, label, IGNORE_INDEX)


def two_threshold_label(
    cam: Tensor, low: float | Tensor, high: float | Tensor, valid: Tensor | None = None
) -> Tensor:
    """CAM pseudo-label with an undecided band: class from ``high`` on, background below ``low``.

    Args:
        cam: (B, C, H, W) in [0, 1], already multiplied by the image labels.
        low: activations below it are background (0).
        high: activations of at least this are the class; in between the label is 255.
        valid: (B, H, W) bool; the label is 255 where it is False.

    Returns:
        (B, H, W) int64: 0 background, 1..C, 255.
    """
    confidence, channel = cam.max(dim=1)
    if confidence.dtype != torch.float64:
        confidence = confidence.float()  # in bf16 the threshold itself would be rounded
    label = torch.where(confidence >= high, channel + 1, IGNORE_INDEX)
    label = torch.where(confidence < low, 0, label)
    return label if valid is None else torch.where(valid, label, IGNORE_INDEX)


def softmax_threshold_label(
    cam: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """CAM pseudo-label as CoSA's published code makes it, at half resolution.

    A pass is the softmax over [threshold, present classes] of the halved CAM, resized to the whole
    and cut by its largest channel. The class is taken where the pass with the high threshold names
    one, background where both passes say so; in between the label is 255.

    Args:
        cam: (B, C, H, W) in [0, 1].
        low, high: thresholds.
        labels: (B, C) 0/1 image labels.
        valid: (B, H, W) bool; the label is 255 where it is False.

    Returns:
        (B, H, W) int64: 0 background, 1..C, 255.
    """
    size = (cam.shape[-2], cam.shape[-1])
    halved = (max(1, size[0] // 2), max(1, size[1] // 2))
    result = []
    for maps, present in zip(cam, labels.bool(), strict=True):
        channels = present.nonzero().flatten()
        lookup = torch.cat([channels.new_zeros(1), channels + 1])
        half = _resize(maps[channels].float(), halved) if len(channels) else maps[:0, :1, :1]

        def one_pass(
            threshold: float | Tensor, half: Tensor = half, lookup: Tensor = lookup
        ) -> Tensor:
            background = torch.as_tensor(threshold, dtype=half.dtype, device=half.device)
            background = background.expand(1, *half.shape[-2:])
            return lookup[_resize(torch.cat([background, half]).softmax(0), size).max(0).indices]

        confident, possible = one_pass(high), one_pass(low)
        label = confident.masked_fill((confident == 0) & (possible != 0), IGNORE_INDEX)
        result.append(label)
    label = torch.stack(result)
    return label if valid is None else torch.where(valid, label, IGNORE_INDEX)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def segmentation_pseudo_label(
    seg_logits: Tensor, labels: Tensor, temperature: float = 0.01
) -> Tensor:
    """Segmentation pseudo-label, SPL (CoSA, eq. 7).

    ``softmax(S' / temperature)`` over background and the classes the image holds; absent
    classes get probability 0.

    Args:
        seg_logits: (B, C + 1, H, W), background first.
        labels: (B, C) 0/1 image labels.
        temperature: tau; small values make the label hard.

    Returns:
        (B, C + 1, H, W) probabilities.

    Raises:
        ValueError: the class counts of logits and labels do not fit together.
    """
    if seg_logits.shape[1] != labels.shape[1] + 1:
        raise ValueError(
            f"seg_logits has {seg_logits.shape[1]} channels, labels {labels.shape[1]} classes: "
            "the logits need one channel more than there are classes (background first)."
        )
    logits = seg_logits.float() if seg_logits.dtype != torch.float64 else seg_logits
    barred = torch.zeros_like(labels, dtype=logits.dtype).masked_fill(labels == 0, float("-inf"))
    barred = torch.nn.functional.pad(barred, (1, 0))[:, :, None, None]  # background stays
    return torch.add(logits / temperature, barred).softmax(dim=1)
