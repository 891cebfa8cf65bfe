"""Evaluation of one network under every protocol, in one pass over the images."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.data.batch import EvalBatch
from wsss.distributed import world_size
from wsss.metrics.boundary import BoundaryScores
from wsss.metrics.classification import ClassificationScores
from wsss.metrics.segmentation import GroupDice, SegmentationScores
from wsss.nn import WSSSNetwork
from wsss.pseudo import MultiScaleOutput, cam_pseudo_label, dense_crf, multi_scale

SEGMENTATION_PROTOCOLS = (
    "seg/miou_ss",
    "seg/miou_ms_flip",
    "seg_given_tags/miou_ss",
    "seg_given_tags/miou_ms_flip",
)
CRF_PROTOCOLS = ("seg/miou_ms_flip_crf", "seg_given_tags/miou_ms_flip_crf")
CAM_PROTOCOLS = ("cpl/miou_ms_flip", "cpl_early/miou_ms_flip", "cpl_ensemble/miou_ms_flip")
#: what a network is judged by: its segmentation and its CAM pseudo-labels
HEADLINES = ("seg/miou_ms_flip", "cpl/miou_ms_flip")


class ProtocolScores(nn.Module):
    """Scores of one network under every protocol of ``metrics.md``.

    ``seg/`` knows nothing of the image; ``seg_given_tags/`` masks classes that its labels do not
    name; ``cpl*/`` are CAM pseudo-labels, whose labels are known, at ``cpl_threshold``.
    ``_ss`` is one scale; ``_ms_flip`` averages logits over ``scales`` and flips (CAMs: maximum
    over ``cam_scales`` and flips); ``_crf`` refines those at the image's own size.

    Args:
        classes: foreground class names.
        scales: of the segmentation logits.
        cam_scales: of the CAMs.
        cpl_threshold: background threshold of the CAM pseudo-labels.
        segmentation: take the segmentation scores.
        cam: take the CAM scores, and those of the image labels.
        early_cam: also those of the early CAM and of the mean of both.
        ignore_index: mask value that is left out.

    Attributes:
        crf: preset of :func:`~wsss.pseudo.dense_crf`; None leaves its protocols out.
        boundary: also take the boundary F of the multi-scale protocols, or of those it names.
        chosen: protocols to take; None takes all.
        coexistence: class indices (background 0) whose mean IoU is taken apart (C-mIoU).

    The attributes may be changed between two evaluations; the next :meth:`reset` heeds them.
    """

    _where: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        scales: Sequence[float] = (1.0, 0.5, 1.5, 0.75, 1.25),
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
        cpl_threshold: float = 0.5,
        segmentation: bool = True,
        cam: bool = True,
        ignore_index: int = 255,
        early_cam: bool = True,
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.cam_scales = tuple(cam_scales)
        self.cpl_threshold = cpl_threshold
        self.segmentation = segmentation
        self.cam = cam
        self.early_cam = early_cam
        self.names = ("background", *classes)
        self.ignore_index = ignore_index
        self.crf: str | None = None
        self.boundary: bool | Collection[str] = False
        self.chosen: tuple[str, ...] | None = None
        self.coexistence: tuple[int, ...] = ()
        self.classification = ClassificationScores(len(classes), tuple(classes)) if cam else None
        self.register_buffer("_where", torch.empty(0), persistent=False)  # knows the device
        self.reset()

    @property
    def _cam_protocols(self) -> tuple[str, ...]:
        return CAM_PROTOCOLS if self.early_cam else CAM_PROTOCOLS[:1]

    def reset(self, num_groups: int = 0) -> None:
        """Forget all images; from now on they come in ``num_groups`` groups (patients)."""
        device = self._where.device
        known = (
            *(SEGMENTATION_PROTOCOLS if self.segmentation else ()),
            *(CRF_PROTOCOLS if self.segmentation and self.crf else ()),
            *(self._cam_protocols if self.cam else ()),
        )
        self.protocols = tuple(p for p in known if self.chosen is None or p in self.chosen)
        self._single = any(p.endswith("_ss") for p in self.protocols)
        self._multi = any(p.startswith("seg") and "ms_flip" in p for p in self.protocols)
        self._refined = any(p.endswith("_crf") for p in self.protocols)
        self._cams = any(p.startswith("cpl") for p in self.protocols)
        num_labels = len(self.names)
        self.scores = nn.ModuleList(
            SegmentationScores(num_labels, self.ignore_index, self.names, self.coexistence or None)
            for _ in self.protocols
        )
        self.group_dice = nn.ModuleList(
            GroupDice(num_labels, num_groups) for _ in self.protocols if num_groups
        )
        self.boundaries = nn.ModuleDict(
            {
                # A module's name may hold no dot; a slash is fine.
                name: BoundaryScores(num_labels, self.ignore_index, class_names=self.names)
                for name in self.protocols
                if "ms_flip" in name and (self.boundary is True or name in (self.boundary or ()))
            }
        )
        if self.classification is not None:
            self.classification.reset()
        self._image_names: list[str] = []
        self._image_iou: list[Tensor] = []
        self.scored = False  # whether a mask had a pixel to score
        self.to(device)

    @torch.no_grad()
    def update(self, network: WSSSNetwork, batch: EvalBatch) -> None:
        """Predict one batch and count it.

        Logits and CAMs are resized (bilinear) to each mask's own size, never the mask. An image
        without a pixel to score counts for the scores of image labels alone; a batch of such
        images costs one pass.

        Raises:
            ValueError: ``crf`` is set and the batch lacks the original images.
        """
        scorable = [bool((mask != self.ignore_index).any()) for mask in batch.masks]
        if not any(scorable):
            if self.classification is not None:
                logits = network(batch.images, decode=False).class_logits
                self.classification.update(logits, batch.labels)
            for name in batch.names:
                self._note(name, None)
            return
        self.scored = True
        if self._refined and batch.originals is None:
            raise ValueError("a CRF needs the images at their own size: set data.load_originals.")
        out = multi_scale(
            network,
            batch.images,
            self.scales if self._multi else (1.0,),
            cam_scales=self.cam_scales if self._cams else (),
            decode=self._multi or self._single,
        )
        labels_lack = self.classification is not None and out.class_logits is None
        if labels_lack or (self._single and out.single_seg_logits is None):
            single = network(batch.images, decode=self._single)  # scale 1 is not among the scales
            out = out._replace(
                class_logits=single.class_logits, single_seg_logits=single.seg_logits
            )
        if self.classification is not None:
            assert out.class_logits is not None
            self.classification.update(out.class_logits, batch.labels)
        if out.single_seg_logits is not None:
            # First to the size of the images, as the multi-scale logits are.
            size = (batch.images.shape[-2], batch.images.shape[-1])
            logits = F.interpolate(
                out.single_seg_logits.float(), size=size, mode="bilinear", align_corners=False
            )
            out = out._replace(single_seg_logits=logits)
        for i, mask in enumerate(batch.masks):
            if not scorable[i]:
                self._note(batch.names[i], None)
                continue
            original = None if batch.originals is None else batch.originals[i]
            predictions = self._predict(out, i, batch.labels[i].bool(), mask, original)
            group = -1 if batch.groups is None else int(batch.groups[i])
            self._count(predictions, mask, batch.names[i], group)

    def _predict(
        self,
        out: MultiScaleOutput,
        i: int,
        present: Tensor,
        mask: Tensor,
        original: Tensor | None,
    ) -> dict[str, Tensor]:
        """Label maps (H, W) of image ``i`` by protocol."""
        predictions: dict[str, Tensor] = {}
        # Absent classes are masked by taking the present ones alone.
        kept = torch.cat([present.new_ones(1), present]).nonzero().flatten()
        for name, wanted, logits in (
            ("ss", self._single, out.single_seg_logits),
            ("ms_flip", self._multi, out.seg_logits),
        ):
            if not wanted:
                continue
            assert logits is not None
            resized = _resize(logits[i], mask)
            refined = self.crf if name == "ms_flip" else None
            for protocol, channels in (("seg", None), ("seg_given_tags", kept)):
                full = f"{protocol}/miou_{name}"
                chosen = resized if channels is None else resized[channels]
                if full in self.protocols:
                    predictions[full] = _strongest(chosen, channels)
                if refined and f"{full}_crf" in self.protocols:
                    assert original is not None
                    probabilities = dense_crf(original, chosen.softmax(0), refined)
                    predictions[f"{full}_crf"] = _strongest(probabilities, channels)
        if self._cams:
            channels = present.nonzero().flatten()
            if channels.numel() == 0:
                return predictions | dict.fromkeys(self._cam_protocols, torch.zeros_like(mask))
            cams = [_resize(out.cam[i, channels], mask)]
            if self.early_cam:
                cams.append(_resize(out.early_cam[i, channels], mask))
                cams.append((cams[0] + cams[1]) / 2)
            for name, cam in zip(self._cam_protocols, cams, strict=True):
                predictions[name] = _present_label(cam, channels, self.cpl_threshold)
        return predictions

    def _count(self, predictions: dict[str, Tensor], mask: Tensor, name: str, group: int) -> None:
        """Add one image to every score."""
        image_iou = []
        for k, protocol in enumerate(self.protocols):
            score = cast(SegmentationScores, self.scores[k])
            before = score.matrix.clone()
            score.update(predictions[protocol], mask)
            matrix = score.matrix - before
            if self.group_dice and group >= 0:
                cast(GroupDice, self.group_dice[k]).update(matrix, group)
            if protocol in self.boundaries:
                cast(BoundaryScores, self.boundaries[protocol]).update(predictions[protocol], mask)
            image_iou.append(_mean_iou(matrix))
        self._note(name, torch.stack(image_iou))

    def _note(self, name: str, iou: Tensor | None) -> None:
        """Keep an image's mIoU, a value a protocol; None where nothing can be scored."""
        if iou is None:
            shape, device = (len(self.protocols),), self._where.device
            iou = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self._image_names.append(name)
        self._image_iou.append(iou)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Scores by protocol name, reduced over ranks; see :meth:`SegmentationScores.compute`.

        With groups, ``group_dice`` (G, C + 1) and ``mean_group_dice``: the mean over groups of
        each foreground class, then over classes. With boundaries, ``boundary_f`` (C,) and
        ``mean_boundary_f``.
        """
        tables: dict[str, dict[str, Tensor]] = {}
        with warnings.catch_warnings():
            if not self._warns():
                warnings.simplefilter("ignore")
            for k, name in enumerate(self.protocols):
                score = cast(SegmentationScores, self.scores[k])
                tables[name] = score.compute()
                if self.group_dice:
                    dice = cast(GroupDice, self.group_dice[k]).compute()
                    tables[name] |= {
                        "group_dice": dice,
                        "mean_group_dice": dice[:, 1:].nanmean(0).nanmean(),
                    }
                if name in self.boundaries:
                    found = cast(BoundaryScores, self.boundaries[name]).compute()
                    tables[name] |= {
                        "boundary_f": found["f"].view(-1),  # torchmetrics: one class, a scalar
                        "mean_boundary_f": found["mean"],
                    }
        return tables

    def compute_classification(self) -> dict[str, Tensor]:
        """Scores of the image labels, see :class:`ClassificationScores`; empty without CAMs."""
        if self.classification is None:
            return {}
        with warnings.catch_warnings():
            if not self._warns():
                warnings.simplefilter("ignore")
            found = self.classification.compute()
        return found | {"ap": found["ap"].view(-1)}  # torchmetrics makes a scalar of one class

    def _warns(self) -> bool:
        """Whether to name absent classes: once, and not of data without masks, which lack all."""
        return self.scored and (world_size() == 1 or dist.get_rank() == 0)

    def image_scores(self) -> dict[str, list[float]]:
        """mIoU of each image by name, a value a protocol, of all ranks; to be called on all.

        The mean runs over the classes that the image's mask or prediction holds; NaN where the
        mask has no pixel to score.
        """
        table = torch.stack(self._image_iou).cpu().tolist() if self._image_iou else []
        here = dict(zip(self._image_names, table, strict=True))
        if world_size() == 1:
            return here
        everywhere: list[dict[str, list[float]]] = [{}] * world_size()
        dist.all_gather_object(everywhere, here)
        return {name: row for part in everywhere for name, row in part.items()}


def _resize(x: Tensor, mask: Tensor) -> Tensor:
    """(K, h, w) to the size of the mask."""
    return F.interpolate(x[None].float(), size=mask.shape, mode="bilinear", align_corners=False)[0]


def _strongest(x: Tensor, channels: Tensor | None) -> Tensor:
    """Label map (H, W) of (K, H, W): the strongest channel, as a label 0..C."""
    label = x.max(0).indices  # what argmax gives, four times as fast on a CPU
    return label if channels is None else channels[label]


def _present_label(cam: Tensor, channels: Tensor, threshold: float) -> Tensor:
    """CPL (H, W) of CAMs (K, H, W) that hold the present classes alone, as labels 0..C."""
    label = cam_pseudo_label(cam[None], threshold)[0]
    lookup = torch.cat([channels.new_zeros(1), channels + 1])
    return lookup[label]


def _mean_iou(matrix: Tensor) -> Tensor:
    """mIoU of one image's confusion matrix over the classes that it holds."""
    true_positive = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - true_positive
    return (true_positive / union).nanmean()  # 0 / 0 of an absent class is the NaN left out
