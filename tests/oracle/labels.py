"""From activations to pseudo-labels in loops: equations 3, 4 and 7, RAW, and the fusion.

All inputs are tensors and are read one number at a time; outputs are float64 or int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracle.resize import bilinear, flip

IGNORE = 255
NORM_EPS = 1e-5


@dataclass
class Fused:
    """(B, C, H, W) CAMs in [0, 1] and (B, C+1, H, W) logits."""

    cam: Tensor
    early_cam: Tensor
    seg_logits: Tensor


def multi_scale(
    network: Callable[[Tensor], Any],
    images: Tensor,
    scales: Sequence[float],
    flip_too: bool = True,
    fuse: str = "max",
    labels: Tensor | None = None,
    cam_scales: Sequence[float] | None = None,
) -> Fused:
    """Every scale and flip of every image alone through the network, fused at image size."""
    height, width = images.shape[2:]
    cams, early_cams, segs = [], [], []
    for b in range(images.shape[0]):
        # one entry a scale: the maps of the plain and the mirrored pass, at image size
        per_scale: dict[str, list[list[Tensor]]] = {"cam": [], "early_cam": [], "seg_logits": []}
        for scale in [*scales, *(s for s in cam_scales or () if s not in scales)]:
            resized = bilinear(images[b], round(height * scale), round(width * scale))
            passes: dict[str, list[Tensor]] = {name: [] for name in per_scale}
            for mirrored in (False, True) if flip_too else (False,):
                output = network((flip(resized) if mirrored else resized).unsqueeze(0))
                for name, maps in passes.items():
                    full = bilinear(getattr(output, name)[0].double(), height, width)
                    maps.append(flip(full) if mirrored else full)
            for name, maps in passes.items():
                its_scales = scales if name == "seg_logits" or cam_scales is None else cam_scales
                if scale in its_scales:
                    per_scale[name].append(maps)
        cams.append(_fuse_cam(per_scale["cam"], fuse))
        early_cams.append(_fuse_cam(per_scale["early_cam"], fuse))
        segs.append(_fuse_seg(per_scale["seg_logits"], fuse))
    cam, early_cam = torch.stack(cams), torch.stack(early_cams)
    if labels is not None:
        cam, early_cam = _mask(cam, labels), _mask(early_cam, labels)
    return Fused(cam, early_cam, torch.stack(segs))


def _fuse_cam(per_scale: list[list[Tensor]], fuse: str) -> Tensor:
    channels, height, width = per_scale[0][0].shape
    fused = torch.zeros(channels, height, width, dtype=torch.float64)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                best = [max(m[c, y, x].item() for m in maps) for maps in per_scale]
                positive = [max(value, 0.0) for value in best]
                fused[c, y, x] = max(positive) if fuse == "max" else sum(positive)
        low, high = fused[c].min().item(), fused[c].max().item()
        fused[c] = (fused[c] - low) / (high - low + NORM_EPS)
    return fused


def _fuse_seg(per_scale: list[list[Tensor]], fuse: str) -> Tensor:
    total = torch.zeros_like(per_scale[0][0])
    count = 0
    for maps in per_scale:
        for single in maps:
            total = total + single
            count += 1
    return total / count if fuse == "max" else total


def _mask(cam: Tensor, labels: Tensor) -> Tensor:
    out = cam.clone()
    for b in range(cam.shape[0]):
        for c in range(cam.shape[1]):
            if labels[b, c] == 0:
                out[b, c] = 0.0
    return out


def _peak(cam: Tensor, b: int, y: int, x: int) -> tuple[float, int]:
    """Confidence nu and the class index (from 0) that holds it; the first one of a tie."""
    values = [cam[b, c, y, x].item() for c in range(cam.shape[1])]
    nu = max(values)
    return nu, values.index(nu)


def two_threshold(cam: Tensor, low: float, high: float, valid: Tensor | None = None) -> Tensor:
    """Class at or above ``high``, background below ``low``, 255 between and where invalid."""
    images, _, height, width = cam.shape
    out = torch.full((images, height, width), IGNORE, dtype=torch.int64)
    for b in range(images):
        for y in range(height):
            for x in range(width):
                if valid is not None and not bool(valid[b, y, x]):
                    continue
                nu, best = _peak(cam, b, y, x)
                if nu >= high:
                    out[b, y, x] = best + 1
                elif nu < low:
                    out[b, y, x] = 0
    return out


def cam_pseudo_label(cam: Tensor, threshold: float, valid: Tensor | None = None) -> Tensor:
    """Eq. 3: nothing lies between when both thresholds are the same."""
    return two_threshold(cam, threshold, threshold, valid)


def segmentation_pseudo_label(
    seg_logits: Tensor, labels: Tensor, temperature: float = 0.01
) -> Tensor:
    """Eq. 7: softmax over the background and the present classes only."""
    images, channels, height, width = seg_logits.shape
    out = torch.zeros(images, channels, height, width, dtype=torch.float64)
    for b in range(images):
        kept = [0] + [k for k in range(1, channels) if labels[b, k - 1] != 0]
        for y in range(height):
            for x in range(width):
                scaled = [seg_logits[b, k, y, x].item() / temperature for k in kept]
                largest = max(scaled)
                total = sum(math.exp(value - largest) for value in scaled)
                for k, value in zip(kept, scaled, strict=True):
                    out[b, k, y, x] = math.exp(value - largest) / total
    return out


def perplexity(nu: float, xi: float, alpha: float = 0.8, beta: float = 1.0) -> float:
    """Eq. 4 of one confidence; infinite on the threshold itself."""
    distance = (nu - xi) / (1 - xi) if nu >= xi else (xi - nu) / xi
    if distance == 0:
        return math.inf
    return (-math.log(alpha * distance)) ** beta


def reliability_weight(values: Sequence[float], valid: Sequence[bool] | None = None) -> list[float]:
    """RAW of a flat list of perplexities: 1/P over its mean on the valid pixels of the batch."""
    kept = [True] * len(values) if valid is None else list(valid)
    reliability = [1 / p if ok else 0.0 for p, ok in zip(values, kept, strict=True)]
    mean = sum(reliability) / max(sum(kept), 1)
    return [r / mean if ok else 0.0 for r, ok in zip(reliability, kept, strict=True)]


def softmax_threshold_label(
    cam: Tensor, low: float, high: float, labels: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The release's CPL: two passes of a softmax over [threshold, present], at half resolution."""
    batch, classes, height, width = cam.shape
    result = torch.full((batch, height, width), IGNORE, dtype=torch.int64)
    for b in range(batch):
        present = [c for c in range(classes) if labels[b, c] == 1]
        halved = bilinear(cam[b].double(), max(1, height // 2), max(1, width // 2))
        winners = []
        for threshold in (low, high):
            maps = torch.zeros(1 + len(present), *halved.shape[1:], dtype=torch.float64)
            for y in range(halved.shape[1]):
                for x in range(halved.shape[2]):
                    values = [threshold, *(float(halved[c, y, x]) for c in present)]
                    total = sum(math.exp(v) for v in values)
                    for k, v in enumerate(values):
                        maps[k, y, x] = math.exp(v) / total
            full = bilinear(maps, height, width)
            winners.append(full)
        for y in range(height):
            for x in range(width):
                if valid is not None and not valid[b, y, x]:
                    continue
                best = []
                for full in winners:
                    column = [float(v) for v in full[:, y, x]]
                    k = column.index(max(column))
                    best.append(0 if k == 0 else present[k - 1] + 1)
                possible, confident = best
                if confident != 0:
                    result[b, y, x] = confident
                elif possible == 0:
                    result[b, y, x] = 0
    return result
