"""Multi-scale, flipped inference: from images to normalised CAMs and segmentation logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FUSE_MODES = ("max", "sum")


class MultiScaleOutput(NamedTuple):
    """Activations at the input size.

    Attributes:
        cam: (B, C, H, W), each channel of each image normalised to [0, 1]; (B, 0, H, W) when CAMs
            were not asked for.
        early_cam: (B, C, H, W), the same of the early features.
        seg_logits: (B, C + 1, H, W); None when the decoder was not asked for.
        class_logits: (B, C) of the images as given, not flipped; None without scale 1.
        single_seg_logits: (B, C + 1, h, w), the same of the segmentation, on the token grid; both
            in the network's precision, all else in float32.
    """

    cam: Tensor
    early_cam: Tensor
    seg_logits: Tensor | None
    class_logits: Tensor | None = None
    single_seg_logits: Tensor | None = None


class _Output(Protocol):
    @property
    def class_logits(self) -> Tensor: ...
    @property
    def cam(self) -> Tensor: ...
    @property
    def early_cam(self) -> Tensor: ...
    @property
    def seg_logits(self) -> Tensor | None: ...


def normalise_cam(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """``(M - min) / (max - min + eps)`` per image and channel, over the last two dimensions."""
    low = cam.amin(dim=(-2, -1), keepdim=True)
    high = cam.amax(dim=(-2, -1), keepdim=True)
    return (cam - low) / (high - low + eps)


def multi_scale(
    network: Callable[..., _Output],
    images: Tensor,
    scales: Sequence[float],
    flip: bool = True,
    fuse: str = "max",
    labels: Tensor | None = None,
    cam_scales: Sequence[float] | None = None,
    decode: bool = True,
    early_cam_scales: Sequence[float] | None = None,
) -> MultiScaleOutput:
    """Fuse the network's outputs over scales and horizontal flips (CoSA, Algorithm 1).

    ``max`` (paper): every CAM is upsampled to the input size (bilinear), ReLU, maximum over
    flips and scales; segmentation logits are averaged. ``sum`` (release): maximum over flips,
    ReLU, sum over scales; segmentation logits are summed. CAMs are then normalised to [0, 1]
    per image and channel. Calibrated maps (``NetworkOutput.calibrated``) are averaged instead, and
    keep their values.

    Bilinear resizing and the mean commute, so the segmentation logits of a flip pair share one
    upsampling; with ``labels`` only the channels of present classes are upsampled at all.

    Args:
        network: called with images (and ``decode=False`` when the decoder is not needed); of an
            output with a ``refined_cam`` that is taken instead of ``cam``.
        images: (B, 3, H, W) RGB in [0, 1].
        scales: factors of the input size, each rounded to whole pixels, for the segmentation and,
            unless ``cam_scales`` says otherwise, the CAMs; one that is named twice counts once.
        flip: also run the mirrored images.
        fuse: ``"max"`` or ``"sum"``.
        labels: (B, C) 0/1. CAM channels of absent classes become 0; segmentation logits of
            absent classes are not computed (0): only for consumers that mask them, such as
            :func:`~wsss.pseudo.segmentation_pseudo_label`. Background is always computed.
        cam_scales: those of the CAMs. A scale that both have is run once. Empty: no CAMs.
        decode: False leaves the decoder out; then only the scales of the CAMs are run.
        early_cam_scales: those of ``cam_scales`` that count for the early CAM; None: all.

    Raises:
        ValueError: no scales, a scale that is not positive, early scales that are not among those
            of the CAMs, or unknown ``fuse``.
    """
    if fuse not in FUSE_MODES:
        raise ValueError(f"fuse='{fuse}': choose one of {', '.join(FUSE_MODES)}.")
    cam_scales = scales if cam_scales is None else cam_scales
    if not (scales if decode else cam_scales) or min([*scales, *cam_scales]) <= 0:
        raise ValueError(
            f"scales={list(scales)}, cam_scales={list(cam_scales)}: give at least one positive "
            "factor."
        )
    early_scales = cam_scales if early_cam_scales is None else early_cam_scales
    if cam_scales and (not early_scales or not set(early_scales) <= set(cam_scales)):
        raise ValueError(
            f"early_cam_scales={list(early_scales)}: give some of cam_scales={list(cam_scales)}."
        )

    size = (images.shape[-2], images.shape[-1])
    batch = images.shape[0]
    present = None if labels is None else _Present(labels)
    cams: list[Tensor | None] = [None, None]
    segmentation: Tensor | None = None
    class_logits: Tensor | None = None
    single: Tensor | None = None
    calibrated = False
    for scale in dict.fromkeys([*scales, *cam_scales] if decode else cam_scales):
        segments = decode and scale in scales
        kwargs = {} if segments else {"decode": False}
        scaled = _resize(images, (round(size[0] * scale), round(size[1] * scale)))
        output = network(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled, **kwargs)
        if scale == 1:
            class_logits = output.class_logits[:batch]
            single = None if output.seg_logits is None else output.seg_logits[:batch]
        if scale in cam_scales:
            refined = getattr(output, "refined_cam", None)
            final = output.cam if refined is None else refined
            calibrated = getattr(output, "calibrated", False)
            for i, cam in enumerate((final, output.early_cam)):
                if i == 1 and scale not in early_scales:
                    continue
                fused = _upsampled_cam(cam, batch, size, present, mean=i == 0 and calibrated)
                previous = cams[i]
                if previous is None:
                    cams[i] = fused
                elif fuse == "max" and not (i == 0 and calibrated):
                    cams[i] = torch.maximum(previous, fused)
                else:
                    cams[i] = previous + fused
        if segments:
            assert output.seg_logits is not None
            logits = output.seg_logits.float()
            if flip:
                logits = (logits[:batch] + logits[batch:].flip(-1)) * (0.5 if fuse == "max" else 1)
            logits = logits if present is None else present.gather(logits, background=True)
            resized = _resize(logits, size)
            # In place: at this size every new tensor costs as much as a block of the network.
            if segmentation is not None:
                segmentation.add_(resized)
            else:
                segmentation = resized.clone() if resized is logits else resized

    if segmentation is not None and fuse == "max":
        segmentation = segmentation.div_(len(set(scales)))
    if segmentation is not None and present is not None:
        segmentation = present.scatter(segmentation, background=True)
    if not cam_scales:
        nothing = images.new_zeros((batch, 0, *size))
        return MultiScaleOutput(nothing, nothing, segmentation, class_logits, single)
    cam, early_cam = (c for c in cams if c is not None)
    cam = cam / len(dict.fromkeys(cam_scales)) if calibrated else normalise_cam(cam)
    early_cam = normalise_cam(early_cam)
    if present is not None:
        cam, early_cam = present.scatter(cam), present.scatter(early_cam)
    return MultiScaleOutput(cam, early_cam, segmentation, class_logits, single)


def _upsampled_cam(
    cam: Tensor, batch: int, size: tuple[int, int], present: _Present | None, mean: bool = False
) -> Tensor:
    """ReLU and the maximum (or mean) over the flip pair, at the input size."""
    cam = cam.float()
    views = [cam[:batch]]
    if cam.shape[0] > batch:
        views.append(cam[batch:].flip(-1))
    if present is not None:
        views = [present.gather(view) for view in views]
    fused = _resize(views[0], size)
    if len(views) > 1:
        other = _resize(views[1], size)
        fused = (fused + other) / 2 if mean else torch.maximum(fused, other)
    return fused.relu()


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class _Present:
    """The (image, class) pairs that the image labels name, as a flat list of channels."""

    def __init__(self, labels: Tensor) -> None:
        self.batch, self.num_classes = labels.shape
        self.image, self.channel = labels.bool().nonzero(as_tuple=True)

    def gather(self, x: Tensor, background: bool = False) -> Tensor:
        """(B, C, h, w) -> (K, 1, h, w), K pairs; with background (B + K, 1, h, w)."""
        if not background:
            return x[self.image, self.channel][:, None]
        return torch.cat([x[:, 0], x[self.image, self.channel + 1]])[:, None]

    def scatter(self, x: Tensor, background: bool = False) -> Tensor:
        """Inverse of :meth:`gather`, with 0 for the classes that are absent."""
        x = x[:, 0]
        full = x.new_zeros((self.batch, self.num_classes + background, *x.shape[-2:]))
        if background:
            full[:, 0] = x[: self.batch]
            full[self.image, self.channel + 1] = x[self.batch :]
        else:
            full[self.image, self.channel] = x
        return full
