"""Every protocol of metrics.md: one image, one scale, one flip at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.boundary import boundary_f
from tests.oracle.classification import per_class, per_image
from tests.oracle.metrics import mean, segmentation_scores

Refine = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Picture:
    """One image: (3, S, S), labels (C,), mask (H, W), its own pixels (H, W, 3), patient."""

    name: str
    image: Tensor
    labels: Tensor
    mask: Tensor
    original: Tensor
    group: int = -1


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(K, h, w) to (K, H, W)."""
    return F.interpolate(x[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def run(network: Callable, image: Tensor, scale: float, flip: bool) -> tuple[Tensor, ...]:
    """CAM, early CAM and segmentation logits of one view, turned back, at the image's size."""
    size = image.shape[1:]
    view = resized(image, [round(side * scale) for side in size])
    output = network((view.flip(-1) if flip else view)[None])
    maps = (output.cam[0], output.early_cam[0], output.seg_logits[0])
    return tuple(resized(m.flip(-1) if flip else m, size) for m in maps)


def predictions(
    network: Callable,
    picture: Picture,
    scales: Sequence[float],
    cam_scales: Sequence[float],
    threshold: float,
    refine: Refine | None = None,
) -> dict[str, Tensor]:
    """Label maps (H, W) of one image by protocol."""
    native = picture.mask.shape
    absent = [c + 1 for c, there in enumerate(picture.labels.tolist()) if not there]
    labels: dict[str, Tensor] = {}

    logits = {
        "ss": run(network, picture.image, 1.0, False)[2],
        "ms_flip": torch.stack(
            [run(network, picture.image, s, flip)[2] for s in scales for flip in (False, True)]
        ).mean(0),
    }
    for how, found in logits.items():
        at_home = resized(found, native)
        told = at_home.clone()
        told[absent] = -math.inf
        labels[f"seg/miou_{how}"] = at_home.argmax(0)
        labels[f"seg_given_tags/miou_{how}"] = told.argmax(0)
        if how == "ms_flip" and refine is not None:
            labels["seg/miou_ms_flip_crf"] = refine(picture.original, at_home.softmax(0)).argmax(0)
            present = [c for c in range(len(at_home)) if c not in absent]
            refined = refine(picture.original, at_home[present].softmax(0)).argmax(0)
            labels["seg_given_tags/miou_ms_flip_crf"] = torch.tensor(present)[refined]

    cams = []
    for which in (0, 1):
        views = [
            run(network, picture.image, s, flip)[which].clamp(min=0)
            for s in cam_scales
            for flip in (False, True)
        ]
        cam = torch.stack(views).amax(0)
        for c in range(len(cam)):
            low, high = cam[c].min(), cam[c].max()
            cam[c] = (cam[c] - low) / (high - low + 1e-5)
            if not picture.labels[c]:
                cam[c] = 0
        cams.append(resized(cam, native))
    cams.append((cams[0] + cams[1]) / 2)
    for name, cam in zip(("cpl", "cpl_early", "cpl_ensemble"), cams, strict=True):
        label = torch.zeros(native, dtype=torch.int64)
        for y in range(native[0]):
            for x in range(native[1]):
                best = int(cam[:, y, x].argmax())
                if cam[best, y, x] >= threshold and picture.labels.any():
                    label[y, x] = best + 1
        labels[f"{name}/miou_ms_flip"] = label
    return labels


@dataclass
class Scores:
    """``tables`` by protocol, ``images`` by name and protocol, ``classification`` by score."""

    tables: dict[str, dict[str, list[float]]]
    images: dict[str, dict[str, float]]
    classification: dict[str, list[float]]


def evaluate(
    network: Callable,
    pictures: Sequence[Picture],
    scales: Sequence[float],
    cam_scales: Sequence[float],
    threshold: float,
    refine: Refine | None = None,
    coexistence: Sequence[int] = (),
) -> Scores:
    """All scores of a set; an image whose mask is all void has only image labels to score."""
    num_labels = len(pictures[0].labels) + 1
    scorable = [p for p in pictures if bool((p.mask != 255).any())]
    found = [predictions(network, p, scales, cam_scales, threshold, refine) for p in scorable]
    tables: dict[str, dict[str, list[float]]] = {}
    images: dict[str, dict[str, float]] = {p.name: {} for p in pictures}
    for protocol in found[0]:
        pairs = [(f[protocol], p.mask) for f, p in zip(found, scorable, strict=True)]
        table = segmentation_scores(pairs, num_labels)
        table["miou"] = [mean(table["iou"])]
        table["cmiou"] = [mean([table["iou"][c] for c in coexistence])]
        if "ms_flip" in protocol:
            table["boundary_f"] = boundary_f(pairs, num_labels)["f"]
            table["mean_boundary_f"] = [mean(table["boundary_f"])]
        by_patient = []
        for group in sorted({p.group for p in pictures if p.group >= 0}):
            own = [pair for pair, p in zip(pairs, scorable, strict=True) if p.group == group]
            by_patient.append(segmentation_scores(own, num_labels)["dice"])
        table["group_dice"] = [dice for row in by_patient for dice in row]
        classes = [mean([row[c] for row in by_patient]) for c in range(1, num_labels)]
        table["mean_group_dice"] = [mean(classes)]
        tables[protocol] = table
        for p in pictures:
            images[p.name][protocol] = math.nan
        for pair, p in zip(pairs, scorable, strict=True):
            images[p.name][protocol] = mean(segmentation_scores([pair], num_labels)["iou"])

    logits = torch.stack([network(p.image[None]).class_logits[0] for p in pictures])
    wanted = torch.stack([p.labels for p in pictures])
    ap = per_class(logits, wanted)
    image_ap = [mean(per_image(logits, wanted))]
    return Scores(tables, images, {"ap": ap, "map": [mean(ap)], "image_ap": image_ap})
