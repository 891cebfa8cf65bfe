"""Evaluation of one network under every protocol, in one pass over the images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.data.batch import EvalBatch
from wsss.metrics.segmentation import GroupDice, SegmentationScores
from wsss.nn import WSSSNetwork
from wsss.pseudo import cam_pseudo_label, multi_scale

SEGMENTATION_PROTOCOLS = (
    "seg/miou_ss",
    "seg/miou_ms_flip",
    "seg_given_tags/miou_ss",
    "seg_given_tags/miou_ms_flip",
)
CAM_PROTOCOLS = ("cpl/miou_ms_flip", "cpl_early/miou_ms_flip", "cpl_ensemble/miou_ms_flip")


class ProtocolScores(nn.Module):
    """mIoU of one network under every protocol of ``metrics.md``.

    ``seg/`` knows nothing of the image; ``seg_given_tags/`` masks classes that its labels do not
    name; ``cpl*/`` are CAM pseudo-labels, whose labels are known, at ``cpl_threshold``.
    ``_ss`` is one scale; ``_ms_flip`` averages logits over ``scales`` and flips (CAMs: maximum
    over ``cam_scales`` and flips).

    Args:
        classes: foreground class names.
        scales: of the segmentation logits.
        cam_scales: of the CAMs.
        cpl_threshold: background threshold of the CAM pseudo-labels.
        segmentation: take the segmentation scores.
        cam: take the CAM scores.
        ignore_index: mask value that is left out.
    """

    def __init__(
        self,
        classes: Sequence[str],
        scales: Sequence[float] = (1.0, 0.5, 1.5, 0.75, 1.25),
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
        cpl_threshold: float = 0.5,
        segmentation: bool = True,
        cam: bool = True,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.cam_scales = tuple(cam_scales)
        self.cpl_threshold = cpl_threshold
        self.segmentation = segmentation
        self.cam = cam
        self.protocols = (SEGMENTATION_PROTOCOLS if segmentation else ()) + (
            CAM_PROTOCOLS if cam else ()
        )
        names = ("background", *classes)
        self.num_labels = len(names)
        self.ignore_index = ignore_index
        self.scores = nn.ModuleList(
            SegmentationScores(len(names), ignore_index, names) for _ in self.protocols
        )
        self.group_dice = nn.ModuleList()
        self.scored = False  # whether a mask had a pixel to score

    def reset(self, num_groups: int = 0) -> None:
        """Forget all images; from now on they come in ``num_groups`` groups (patients)."""
        self.scored = False
        for score in self.scores:
            score.reset()  # type: ignore[operator]
        device = cast(SegmentationScores, self.scores[0]).device
        self.group_dice = nn.ModuleList(
            GroupDice(self.num_labels, num_groups) for _ in self.protocols if num_groups
        ).to(device)

    @torch.no_grad()
    def update(self, network: WSSSNetwork, batch: EvalBatch) -> None:
        """Predict one batch and count it.

        Logits and CAMs are resized (bilinear) to each mask's own size, never the mask. A batch
        without a pixel to score costs nothing.
        """
        if all(bool((mask == self.ignore_index).all()) for mask in batch.masks):
            return
        self.scored = True
        out = multi_scale(
            network,
            batch.images,
            self.scales,
            cam_scales=self.cam_scales,
            decode=self.segmentation,
        )
        maps: dict[str, Tensor] = {}
        if self.segmentation:
            single = network(batch.images).seg_logits
            assert single is not None
            assert out.seg_logits is not None
            size = (batch.images.shape[-2], batch.images.shape[-1])
            single = F.interpolate(single.float(), size=size, mode="bilinear", align_corners=False)
            maps |= {"ss": single, "ms_flip": out.seg_logits}
        for i, mask in enumerate(batch.masks):
            target = mask[None]
            present = batch.labels[i].bool()
            predictions: dict[str, Tensor] = {}
            for name, logits in maps.items():
                resized = _resize(logits[i : i + 1], mask)
                predictions[f"seg/miou_{name}"] = resized.argmax(1)
                # Absent classes are masked by taking the present ones alone.
                kept = torch.cat([present.new_ones(1), present]).nonzero().flatten()
                predictions[f"seg_given_tags/miou_{name}"] = kept[resized[:, kept].argmax(1)]
            if self.cam:
                channels = present.nonzero().flatten()
                cams = [_resize(c[i : i + 1, channels], mask) for c in (out.cam, out.early_cam)]
                cams.append((cams[0] + cams[1]) / 2)
                for name, cam in zip(CAM_PROTOCOLS, cams, strict=True):
                    predictions[name] = _present_label(cam, channels, self.cpl_threshold)
            for k, (name, score) in enumerate(zip(self.protocols, self.scores, strict=True)):
                score.update(predictions[name], target)  # type: ignore[operator]
                group = -1 if batch.groups is None else int(batch.groups[i])
                if self.group_dice and group >= 0:
                    matrix = score.count(predictions[name], target)  # type: ignore[operator]
                    self.group_dice[k].update(matrix, group)  # type: ignore[operator]

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Scores by protocol name, reduced over ranks; see :meth:`SegmentationScores.compute`.

        With groups, ``group_dice`` (G, C + 1) and ``mean_group_dice``: the mean over groups of
        each foreground class, then over classes.
        """
        with warnings.catch_warnings():
            if not self.scored:  # data without masks: no reason to warn of every class
                warnings.simplefilter("ignore")
            tables = {
                name: score.compute()  # type: ignore[operator]
                for name, score in zip(self.protocols, self.scores, strict=True)
            }
            group_dice = [dice.compute() for dice in self.group_dice]  # type: ignore[operator]
        for name, value in zip(self.protocols, group_dice, strict=False):
            tables[name] |= {
                "group_dice": value,
                "mean_group_dice": value[:, 1:].nanmean(0).nanmean(),
            }
        return tables


def _resize(x: Tensor, mask: Tensor) -> Tensor:
    return F.interpolate(x.float(), size=mask.shape, mode="bilinear", align_corners=False)


def _present_label(cam: Tensor, channels: Tensor, threshold: float) -> Tensor:
    """CPL of CAMs (1, K, H, W) that hold the present classes alone, as labels 0..C."""
    if channels.numel() == 0:
        return torch.zeros_like(cam[:, :0].sum(1), dtype=torch.int64)
    label = cam_pseudo_label(cam, threshold)
    lookup = torch.cat([channels.new_zeros(1), channels + 1])
    return lookup[label]
