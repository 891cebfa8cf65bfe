"""One pass of a checkpoint over images with masks: what the figures are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.analysis.counts import ConfidenceCounts
from wsss.analysis.curves import mean_iou
from wsss.data.batch import EvalBatch
from wsss.inference import Inference
from wsss.methods.base import Method
from wsss.metrics import SegmentationScores
from wsss.report.pictures import scored_threshold

#: what the thresholds of a checkpoint are
DYNAMIC, UNFITTED, FIXED = "dynamic", "not fitted yet", "fixed"
SCORED, PAIR = "that of the scores", "that of the scores, not the two of the method"


class Thresholds(NamedTuple):
    """Background thresholds of a method.

    Attributes:
        cam: xi of M.
        early_cam: xi of M_early.
        kind: ``dynamic``; ``not fitted yet`` (before the end of the loss warm-up); ``fixed``; or
            ``that of the scores``, for a method that has none of its own, or has two (the pixels
            between them are left undecided, so that neither is a xi).
    """

    cam: float
    early_cam: float
    kind: str


class NetworkScore(NamedTuple):
    """mIoU in [0, 1] of one network at one step; NaN where the method has no such output.

    Attributes:
        step: optimizer steps.
        network: ``an``, ``on``.
        seg: segmentation, nothing known, multi-scale with flips.
        cpl: CAM pseudo-label, image labels known, at the threshold of the scores.
    """

    step: int
    network: str
    seg: float
    cpl: float


@dataclass
class CheckpointAnalysis:
    """Counts of one checkpoint.

    Attributes:
        step: optimizer steps of the weights.
        thresholds: of the checkpoint.
        cam, early_cam: pixels by confidence of M and of M_early, each at its own threshold.
        cam_in_omega: pixels by confidence of M, where the perplexity of M_early is low.
        networks: scores of every network; empty unless asked for.
    """

    step: int
    thresholds: Thresholds
    cam: ConfidenceCounts
    early_cam: ConfidenceCounts
    cam_in_omega: ConfidenceCounts
    networks: list[NetworkScore] = field(default_factory=list)

    @classmethod
    def empty(
        cls, method: Method, step: int, max_perplexity: float, device: torch.device
    ) -> CheckpointAnalysis:
        """Counts of no image yet, with the perplexity of the method (CoSA's where it has none)."""
        thresholds = thresholds_of(method)
        alpha, beta = getattr(method, "raw_alpha", 0.8), getattr(method, "raw_beta", 1.0)

        def counts(threshold: float) -> ConfidenceCounts:
            return ConfidenceCounts(
                len(method.classes), threshold, alpha, beta, max_perplexity, device
            )

        return cls(
            step,
            thresholds,
            counts(thresholds.cam),
            counts(thresholds.early_cam),
            counts(thresholds.cam),
        )

    def update(self, cam: Tensor, early_cam: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Count one image.

        Args:
            cam: (C, H, W) M in [0, 1], at any size.
            early_cam: (C, H, W) M_early.
            labels: (C,) 0/1 image labels; absent classes are left out of both CAMs.
            mask: (H', W') true labels; the CAMs are resized (bilinear) to it.
        """
        confidence, strongest = peak(cam, labels, mask)
        early_confidence, early_strongest = peak(early_cam, labels, mask)
        omega = self.early_cam.is_low_perplexity(early_confidence)
        self.cam.update(confidence, strongest, mask)
        self.early_cam.update(early_confidence, early_strongest, mask)
        self.cam_in_omega.update(confidence, strongest, mask, keep=omega)


def thresholds_of(method: Method) -> Thresholds:
    """The thresholds that a method is at; that of the scores where it has none."""
    values = []
    kind = SCORED
    for name in ("threshold", "early_threshold"):
        threshold = getattr(method, name, None)
        if not isinstance(threshold, nn.Module):
            values.append(scored_threshold(method))
            continue
        value = cast(Tensor, threshold.value)
        if value.numel() != 1:
            return Thresholds(scored_threshold(method), scored_threshold(method), PAIR)
        values.append(float(value))
        fitted = getattr(threshold, "fitted", None)
        kind = FIXED if fitted is None else DYNAMIC if bool(fitted) else UNFITTED
    return Thresholds(values[0], values[1], kind)


def peak(cam: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence nu and strongest class of each pixel of a mask, over the classes present.

    Args:
        cam: (C, H, W) in [0, 1].
        labels: (C,) 0/1.
        mask: (H', W').

    Returns:
        (H', W') float32 and int64; an image without classes has confidence 0 everywhere.
    """
    present = labels.bool().nonzero().flatten()
    if present.numel() == 0:
        return torch.zeros_like(mask, dtype=torch.float32), torch.zeros_like(mask)
    resized = F.interpolate(
        cam[None, present].float(), size=mask.shape, mode="bilinear", align_corners=False
    )
    confidence, index = resized[0].max(0)
    return confidence, present[index]


def collect(
    inference: Inference,
    batches: Iterable[EvalBatch],
    step: int,
    max_perplexity: float,
    others: Iterable[Inference] = (),
) -> CheckpointAnalysis:
    """Run a checkpoint over images with masks.

    Args:
        inference: the network to deploy (CoSA's assignment network), whose CAMs are counted.
        batches: uint8 or float images, with masks.
        step: optimizer steps of the weights.
        max_perplexity: epsilon of Omega.
        others: the method's other networks. With any, ``networks`` holds the scores of all.
    """
    method = inference.method
    device = inference.device
    analysis = CheckpointAnalysis.empty(method, step, max_perplexity, device)
    others = list(others)
    scores = [_Scores(method, step, i) for i in (inference, *others)] if others else []
    for batch in batches:
        labels = batch.labels.to(device)
        masks = [mask.to(device) for mask in batch.masks]
        # With the labels, logits of absent classes are not computed: scores need them.
        out = inference(batch.images, bool(scores), labels=None if scores else labels)
        for i, mask in enumerate(masks):
            analysis.update(out.cam[i], out.early_cam[i], labels[i], mask)
        for score in scores:
            own = out if score.inference is inference else score.inference(batch.images)
            for i, mask in enumerate(masks):
                logits = None if own.seg_logits is None else own.seg_logits[i]
                score.update(own.cam[i], logits, labels[i], mask)
    analysis.networks = [score.compute() for score in scores]
    return analysis


class _Scores:
    """Segmentation and CAM pseudo-labels of one network, as evaluation scores them."""

    def __init__(self, method: Method, step: int, inference: Inference) -> None:
        self.inference = inference
        self.step = step
        self.threshold = scored_threshold(method)
        num_labels = len(method.classes) + 1
        self.seg = SegmentationScores(num_labels).to(inference.device)
        self.cpl = SegmentationScores(num_labels).to(inference.device)

    def update(self, cam: Tensor, seg_logits: Tensor | None, labels: Tensor, mask: Tensor) -> None:
        confidence, strongest = peak(cam, labels, mask)
        self.cpl.update(torch.where(confidence >= self.threshold, strongest + 1, 0), mask)
        if seg_logits is not None:
            resized = F.interpolate(
                seg_logits[None].float(), size=mask.shape, mode="bilinear", align_corners=False
            )
            self.seg.update(resized[0].argmax(0), mask)

    def compute(self) -> NetworkScore:
        seg, cpl = (mean_iou(score.matrix.cpu()) for score in (self.seg, self.cpl))
        return NetworkScore(self.step, self.inference.network_name, seg, cpl)
