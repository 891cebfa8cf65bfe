"""CoSA: co-training with swapping assignments (ECCV 2024), the method of the paper, whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from wsss.callbacks.ema import AssignmentEMA
from wsss.data.batch import Batch
from wsss.errors import UserError
from wsss.losses import (
    cam2seg_loss,
    classification_loss,
    contrastive_separation_loss,
    seg2cam_loss,
)
from wsss.losses.cam2seg import upsample_log_softmax
from wsss.methods.base import Method
from wsss.nn import NetworkOutput, WSSSNetwork
from wsss.pseudo import (
    DynamicThreshold,
    FixedThreshold,
    MultiScaleOutput,
    cam_pseudo_label,
    multi_scale,
    perplexity,
    reliability_weight,
    segmentation_pseudo_label,
)
from wsss.resize import resize_after


class Confidences(NamedTuple):
    """Largest activation of each pixel (B, H, W) and the 0-dimensional threshold it is cut at."""

    nu: Tensor
    xi: Tensor
    early_nu: Tensor
    early_xi: Tensor


class PseudoLabels(NamedTuple):
    """What AN gives ON for one batch.

    Attributes:
        cpl: (B, H, W) int64 CAM pseudo-label, 255 on padding.
        weight: (B, H, W) its RAW weight; None when RAW is off.
        early_cpl: the same of the early CAM.
        early_weight: the same of the early CAM.
        spl: (B, C + 1, h, w) probabilities, bilinear on the token grid, where Seg2CAM uses them.
        early_cam: (B, C, H, W) in [0, 1].
        early_threshold: 0-dimensional.
    """

    cpl: Tensor
    weight: Tensor | None
    early_cpl: Tensor
    early_weight: Tensor | None
    spl: Tensor
    early_cam: Tensor
    early_threshold: Tensor


DETACH_MODES = ("none", "feature", "classifier", "both")


class CoSA(Method):
    """Online and assignment network that learn from each other's swapped pseudo-labels.

    One step (Algorithm 1): the assignment network (AN) sees the weak view at several scales and
    flips; its CAMs, cut at a threshold that follows their distribution, become labels for the
    online network's (ON) segmentation (CPL), its segmentation becomes labels for ON's CAMs (SPL).
    ON sees the strong view. AN is the moving average of ON.

    Args:
        momentum: m of the moving average (0.9994 for 20 000 steps).
        loss_warmup_steps: optimizer steps with the classification losses alone. AN is not run
            in them, but for the last ``threshold_fill_steps``, which fill the threshold's queue.
        threshold_fill_steps: see above.
        threshold: estimator of the background threshold: ``otsu``, ``gmm``, ``gmm_full``,
            ``min_error``, or a number for a fixed one.
        threshold_queue, threshold_min, threshold_max, threshold_momentum: of
            :class:`~wsss.pseudo.DynamicThreshold`.
        c2s_weight, s2c_weight, csc_weight: weights of the three groups of losses (eq. 11).
        raw: weigh pixels by reliability (eq. 5); False weighs all alike.
        raw_alpha, raw_beta: of the perplexity (eq. 4).
        balanced: halve CAM2Seg between background and foreground means.
        spl_temperature: tau of the SPL (eq. 7).
        s2c_relu: ReLU on the CAM before Seg2CAM's sigmoid.
        csc_max_perplexity, csc_temperature: epsilon and tau of eq. 9 and 10.
        detach: keep Seg2CAM's gradient out of ``feature``, ``classifier`` or ``both`` (Tab. 4a).
        **kwargs: of :class:`~wsss.methods.base.Method`; ``cam_scales`` are AN's scales.
    """

    network_names = ("an", "on")
    monitor = "an/seg/miou_ms_flip"

    def __init__(
        self,
        momentum: float = 0.9994,
        loss_warmup_steps: int = 6000,
        threshold_fill_steps: int = 50,
        threshold: str | float = "otsu",
        threshold_queue: int = 100,
        threshold_min: float = 0.1,
        threshold_max: float = 0.9,
        threshold_momentum: float = 0.99,
        c2s_weight: float = 0.1,
        s2c_weight: float = 0.05,
        csc_weight: float = 0.1,
        raw: bool = True,
        raw_alpha: float = 0.8,
        raw_beta: float = 1.0,
        balanced: bool = True,
        spl_temperature: float = 0.01,
        s2c_relu: bool = False,
        csc_max_perplexity: float = 1.0,
        csc_temperature: float = 0.5,
        detach: str = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if detach not in DETACH_MODES:
            raise UserError(f"method.detach='{detach}': choose one of {', '.join(DETACH_MODES)}.")
        self.assignment = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.momentum = momentum
        self.loss_warmup_steps = loss_warmup_steps
        self.threshold_fill_steps = threshold_fill_steps
        self.c2s_weight = c2s_weight
        self.s2c_weight = s2c_weight
        self.csc_weight = csc_weight
        self.raw = raw
        self.raw_alpha = raw_alpha
        self.raw_beta = raw_beta
        self.balanced = balanced
        self.spl_temperature = spl_temperature
        self.s2c_relu = s2c_relu
        self.csc_max_perplexity = csc_max_perplexity
        self.csc_temperature = csc_temperature
        self.detach = detach

        def make_threshold() -> nn.Module:
            if not isinstance(threshold, str):
                return FixedThreshold(threshold)
            return DynamicThreshold(
                threshold,
                threshold_queue,
                threshold_min,
                threshold_max,
                threshold_momentum,
                stride=4,
            )

        self.threshold = make_threshold()
        self.early_threshold = make_threshold()

    def networks(self) -> dict[str, WSSSNetwork]:
        return {"an": self.assignment, "on": self.network}

    def configure_callbacks(self) -> list[L.Callback]:
        return [AssignmentEMA(self.momentum)]

    def train(self, mode: bool = True) -> CoSA:
        super().train(mode)
        self.assignment.eval()  # never anything else
        return self

    def on_fit_start(self) -> None:
        if self.loss_warmup_steps >= self.trainer.max_steps:
            rank_zero_warn(
                f"method.loss_warmup_steps={self.loss_warmup_steps} is not below "
                f"trainer.max_steps={self.trainer.max_steps}: only the classifiers will be trained."
            )

    def loss_weights(self) -> Mapping[str, float]:
        return {
            "c2s": self.c2s_weight,
            "c2s_early": self.c2s_weight,
            "s2c": self.s2c_weight,
            "csc": self.csc_weight,
        }

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        step = self.trainer.global_step
        if step < self.loss_warmup_steps:
            if step >= self.loss_warmup_steps - self.threshold_fill_steps:
                self.update_thresholds(self.assign(batch, decode=False), batch.valid)
            return self._warmup_losses(batch)

        assigned = self.assign(batch)
        pseudo = self.label(assigned, self.update_thresholds(assigned, batch.valid), batch)
        return self.co_training(self.network(batch.strong), pseudo, batch)

    def co_training(
        self, output: NetworkOutput, pseudo: PseudoLabels, batch: Batch
    ) -> dict[str, Tensor]:
        """All terms of eq. 11 from ON's output and AN's labels."""
        assert output.seg_logits is not None
        size = (batch.valid.shape[-2], batch.valid.shape[-1])
        log_p = upsample_log_softmax(output.seg_logits, size)  # of both CAM2Seg terms
        cam = output.cam
        if self.detach != "none":
            cam = self.network.classifier.cam(output.features, self.detach)
        return {
            "cls": classification_loss(output.class_logits, batch.labels),
            "cls_early": classification_loss(output.early_class_logits, batch.labels),
            "c2s": cam2seg_loss(log_p, pseudo.cpl, pseudo.weight, self.balanced, True),
            "c2s_early": cam2seg_loss(
                log_p, pseudo.early_cpl, pseudo.early_weight, self.balanced, True
            ),
            "s2c": seg2cam_loss(cam, pseudo.spl, self.s2c_relu),
            "csc": self._contrastive_separation(output.cam, pseudo, batch),
        }

    def _warmup_losses(self, batch: Batch) -> dict[str, Tensor]:
        output = self.network(batch.strong, decode=False)
        return {
            "cls": classification_loss(output.class_logits, batch.labels),
            "cls_early": classification_loss(output.early_class_logits, batch.labels),
            # The published code multiplies the other terms by 0, so the decoder has zero
            # gradients (not none) and AdamW counts its steps. Same here, without running it.
            "c2s": torch.stack([p.sum() for p in self.network.decoder.parameters()]).sum() * 0.0,
        }

    # --- pseudo-labels ---------------------------------------------------------------------

    @torch.no_grad()
    def assign(self, batch: Batch, decode: bool = True) -> MultiScaleOutput:
        """Activations of AN on the weak view, absent classes zero."""
        return multi_scale(
            self.assignment, batch.weak, self.cam_scales, labels=batch.labels, decode=decode
        )

    @torch.no_grad()
    def update_thresholds(self, assigned: MultiScaleOutput, valid: Tensor) -> Confidences:
        """Enqueue what AN says and follow it with both thresholds."""
        confidence = assigned.cam.amax(1)
        early_confidence = assigned.early_cam.amax(1)
        threshold = self.threshold.update(confidence, valid)  # type: ignore[operator]
        early = self.early_threshold.update(early_confidence, valid)  # type: ignore[operator]
        self.log("threshold/cam", threshold, prog_bar=True, batch_size=1)
        self.log("threshold/early_cam", early, batch_size=1)
        return Confidences(confidence, threshold, early_confidence, early)

    @torch.no_grad()
    def label(
        self, assigned: MultiScaleOutput, confidences: Confidences, batch: Batch
    ) -> PseudoLabels:
        """Turn what AN says into labels and weights for ON."""
        assert assigned.seg_logits is not None
        valid = batch.valid
        nu, xi, early_nu, early_xi = confidences

        def weight(confidence: Tensor, threshold: Tensor) -> Tensor | None:
            if not self.raw:
                return None
            return reliability_weight(
                perplexity(confidence, threshold, self.raw_alpha, self.raw_beta), valid
            )

        def spl(seg_logits: Tensor) -> Tensor:
            return segmentation_pseudo_label(seg_logits, batch.labels, self.spl_temperature)

        grid = self.assignment.encoder.grid(valid.shape[-2], valid.shape[-1])
        return PseudoLabels(
            cpl=cam_pseudo_label(assigned.cam, xi, valid, batch.labels),
            weight=weight(nu, xi),
            early_cpl=cam_pseudo_label(assigned.early_cam, early_xi, valid, batch.labels),
            early_weight=weight(early_nu, early_xi),
            spl=resize_after(spl, assigned.seg_logits, *grid),
            early_cam=assigned.early_cam,
            early_threshold=early_xi,
        )

    def _contrastive_separation(self, cam: Tensor, pseudo: PseudoLabels, batch: Batch) -> Tensor:
        """Eq. 10 on the token grid, where the early CAM's labels and perplexity are taken."""
        grid = (cam.shape[-2], cam.shape[-1])
        early = F.interpolate(pseudo.early_cam, size=grid, mode="bilinear", align_corners=False)
        valid = F.interpolate(batch.valid[:, None].float(), size=grid, mode="nearest")[:, 0] > 0
        label = cam_pseudo_label(early, pseudo.early_threshold, valid)
        confidence = perplexity(
            early.amax(1), pseudo.early_threshold, self.raw_alpha, self.raw_beta
        )
        return contrastive_separation_loss(
            cam, label, confidence, self.csc_max_perplexity, self.csc_temperature
        )
