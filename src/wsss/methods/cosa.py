"""CoSA: co-training with swapping assignments (ECCV 2024), the method of the paper, whole.

The published code's differences are arguments (``conf/method/cosa_release.yaml``), no second class.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.addons import Step
from wsss.callbacks.ema import AssignmentEMA
from wsss.data.batch import Batch
from wsss.errors import UserError
from wsss.losses import (
    cam2seg_loss,
    contrastive_separation_loss,
    dense_energy_loss,
    seg2cam_loss,
)
from wsss.losses.cam2seg import upsample_log_softmax
from wsss.losses.dense_energy import check_energy
from wsss.methods.base import Method
from wsss.nn import NetworkOutput, WSSSNetwork
from wsss.pseudo import (
    MultiScaleOutput,
    cam_pseudo_label,
    make_threshold,
    multi_scale,
    perplexity,
    reliability_weight,
    segmentation_pseudo_label,
    softmax_threshold_label,
)
from wsss.pseudo.labels import IGNORE_INDEX
from wsss.pseudo.multi_scale import FUSE_MODES
from wsss.resize import resize_after, valid_on_grid


class Confidences(NamedTuple):
    """Largest activation of each pixel (B, H, W) and the threshold it is cut at.

    A threshold is 0-dimensional, or (2,): low and high.
    """

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
        spl: (B, C + 1, h, w) what guides the CAMs, bilinear on the token grid, where Seg2CAM uses
            it; None without guidance.
        early_cam: (B, C, H, W) in [0, 1].
        early_threshold: 0-dimensional, or (2,).
    """

    cpl: Tensor
    weight: Tensor | None
    early_cpl: Tensor
    early_weight: Tensor | None
    spl: Tensor | None
    early_cam: Tensor
    early_threshold: Tensor


DETACH_MODES = ("none", "feature", "classifier", "both")
GUIDANCE = ("spl", "none", "gt", "noise")
#: sources of guidance that only show what others are worth: the truth, and none at all
ORACLES = ("gt", "noise")
INITIALISATIONS = ("copy", "independent")


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
            ``min_error``, or a number for a fixed one. Two numbers, low and high, or ``gmm3``,
            which estimates them, leave the pixels in between undecided (release).
        early_threshold: that of the early CAM; None: ``threshold`` too.
        threshold_queue, threshold_min, threshold_max, threshold_momentum: of
            :class:`~wsss.pseudo.DynamicThreshold`.
        c2s_weight, s2c_weight, csc_weight: weights of the three groups of losses (eq. 11).
        raw: weigh pixels by reliability (eq. 5); False weighs all alike.
        raw_alpha, raw_beta: of the perplexity (eq. 4).
        balanced: halve CAM2Seg between background and foreground means, as the published code;
            eq. 5 as printed, False.
        spl_temperature: tau of the SPL (eq. 7).
        s2c_relu: ReLU on the CAM before Seg2CAM's sigmoid.
        csc_max_perplexity, csc_temperature: epsilon and tau of eq. 9 and 10.
        detach: keep Seg2CAM's gradient out of ``feature``, ``classifier`` or ``both`` (Tab. 4a).
        guidance: what the CAMs learn from: ``spl``; ``none`` leaves Seg2CAM out; ``gt`` (masks) and
            ``noise`` (random masks of the classes present) are the oracles of Fig. 1.
        oracle: allow those two; their scores are no weakly supervised ones.
        fuse: of AN's scales, see :func:`~wsss.pseudo.multi_scale`: ``max``, or ``sum`` (release).
        early_cam_scales: scales of AN's early CAM, some of ``cam_scales``; None takes all, ``last``
            the last of them (release).
        cpl_softmax: make the CPL by :func:`~wsss.pseudo.softmax_threshold_label` (release).
        energy_weight: of the dense energy loss on ON's segmentation (release); 0 leaves it out.
        energy_scale, energy_sigma_rgb, energy_sigma_xy, energy_factor: its ``scale``, widths and
            ``weight``, see :func:`~wsss.losses.dense_energy_loss`.
        assignment_init: AN's heads start as a ``copy`` of ON's, or ``independent`` (release).
        freeze_position: do not train the position embedding (release).
        **kwargs: of :class:`~wsss.methods.base.Method`; ``cam_scales`` are AN's scales.

    With gradient accumulation the threshold's queue, RAW's mean and CAM2Seg's balance are those of
    each micro-batch, not of the whole batch as on several GPUs.

    Raises:
        UserError: a setting out of its range, an oracle that was not asked for, or two thresholds
            with parts that need one.
    """

    network_names = ("an", "on")
    monitor = "an/seg/miou_ms_flip"

    def __init__(
        self,
        momentum: float = 0.9994,
        loss_warmup_steps: int = 6000,
        threshold_fill_steps: int = 50,
        threshold: str | float | Sequence[float] = "otsu",
        early_threshold: str | float | Sequence[float] | None = None,
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
        guidance: str = "spl",
        oracle: bool = False,
        fuse: str = "max",
        early_cam_scales: Sequence[float] | str | None = None,
        cpl_softmax: bool = False,
        energy_weight: float = 0.0,
        energy_scale: float = 0.5,
        energy_sigma_rgb: float = 15.0,
        energy_sigma_xy: float = 100.0,
        energy_factor: float = 1e-7,
        assignment_init: str = "copy",
        freeze_position: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for key, value, choices in (
            ("detach", detach, DETACH_MODES),
            ("guidance", guidance, GUIDANCE),
            ("assignment_init", assignment_init, INITIALISATIONS),
            ("fuse", fuse, FUSE_MODES),
        ):
            if value not in choices:
                raise UserError(f"method.{key}='{value}': choose one of {', '.join(choices)}.")
        # Most of these would be noticed after the warm-up alone, hours into a run.
        for key, number, fits, allowed in (
            ("raw_alpha", raw_alpha, 0 < raw_alpha < 1, "between 0 and 1"),
            ("raw_beta", raw_beta, raw_beta > 0, "above 0"),
            ("spl_temperature", spl_temperature, spl_temperature > 0, "above 0"),
            ("csc_temperature", csc_temperature, csc_temperature > 0, "above 0"),
        ):
            if not fits:
                raise UserError(f"method.{key}={number}: choose a value {allowed}.")
        check_energy(energy_sigma_rgb, energy_sigma_xy, energy_scale)
        early = self.cam_scales if early_cam_scales is None else early_cam_scales
        if isinstance(early, str):
            early = self.cam_scales[-1:] if early == "last" else ()
        if not early or not set(early) <= set(self.cam_scales):
            raise UserError(
                f"method.early_cam_scales={early_cam_scales}: give some of "
                f"method.cam_scales={list(self.cam_scales)}, last, or null for all."
            )
        if guidance in ORACLES and not oracle:
            raise UserError(
                f"method.guidance='{guidance}' is an oracle, not weak supervision: choose spl or "
                "none, or say that you want it with method.oracle=true."
            )
        if freeze_position:
            self.network.encoder.freeze_position()
        self.assignment = copy.deepcopy(self.network).requires_grad_(False).eval()
        if assignment_init == "independent":
            self.assignment.reset_heads()
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
        self.guidance = guidance
        self.fuse = fuse
        self.early_cam_scales = tuple(early)
        self.cpl_softmax = cpl_softmax
        self.energy_weight = energy_weight
        self.energy_scale = energy_scale
        self.energy_sigma_rgb = energy_sigma_rgb
        self.energy_sigma_xy = energy_sigma_xy
        self.energy_factor = energy_factor

        settings = (threshold_queue, threshold_min, threshold_max, threshold_momentum)
        of_early = threshold if early_threshold is None else early_threshold
        self.threshold = make_threshold(threshold, *settings, stride=4)
        self.early_threshold = make_threshold(of_early, *settings, stride=4)
        pair = self.threshold.value.dim() == 1
        if pair != (self.early_threshold.value.dim() == 1):
            raise UserError(
                f"method.threshold={threshold} and method.early_threshold={early_threshold}: give "
                "both one threshold, or both two."
            )
        if pair and (raw or csc_weight):
            raise UserError(
                f"method.threshold={threshold} leaves pixels undecided; RAW and CSC measure the "
                "distance to one threshold. Set method.raw=false and method.csc_weight=0, or "
                "choose one threshold."
            )
        if cpl_softmax and not pair:
            raise UserError("method.cpl_softmax=true needs two thresholds, such as [0.25,0.7].")

    @classmethod
    def wants_masks(cls, settings: Mapping[str, Any]) -> bool:
        return settings.get("guidance") == "gt"

    def networks(self) -> dict[str, WSSSNetwork]:
        return {"an": self.assignment, "on": self.network}

    def configure_callbacks(self) -> list[L.Callback]:
        return [AssignmentEMA(self.momentum)]

    def train(self, mode: bool = True) -> CoSA:
        super().train(mode)
        self.assignment.eval()  # never anything else
        return self

    def loss_weights(self) -> Mapping[str, float]:
        return {
            "c2s": self.c2s_weight,
            "c2s_early": self.c2s_weight,
            self._s2c: self.s2c_weight,
            "csc": self.csc_weight,
            "energy": self.energy_weight,
        }

    @property
    def _s2c(self) -> str:
        """Name of the guidance term: an oracle's stands in every log."""
        return f"s2c_{self.guidance}" if self.guidance in ORACLES else "s2c"

    def step(self, batch: Batch) -> Step:
        step = self.trainer.global_step
        if step < self.loss_warmup_steps:
            assigned = None
            if step >= self.loss_warmup_steps - self.threshold_fill_steps:
                assigned = self.assign(batch, decode=False)
                self.update_thresholds(assigned, batch.valid)
            output = self.network(batch.strong, decode=False)
            return Step(self._warmup_losses(output, batch), self.views(output, batch, assigned))

        assigned = self.assign(batch)
        pseudo = self.label(assigned, self.update_thresholds(assigned, batch.valid), batch)
        output = self.network(batch.strong)
        return Step(self.co_training(output, pseudo, batch), self.views(output, batch, assigned))

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
        terms = self.classification(output, batch) | {
            "c2s": cam2seg_loss(log_p, pseudo.cpl, pseudo.weight, self.balanced, True),
            "c2s_early": cam2seg_loss(
                log_p, pseudo.early_cpl, pseudo.early_weight, self.balanced, True
            ),
        }
        if pseudo.spl is not None:
            terms[self._s2c] = seg2cam_loss(cam, pseudo.spl, self.s2c_relu)
        if self.csc_weight:
            terms["csc"] = self._contrastive_separation(output.cam, pseudo, batch)
        if self.energy_weight:
            # The weak view has the colours of the image; the strong one may be solarised.
            terms["energy"] = dense_energy_loss(
                log_p.exp(),
                batch.weak * 255,
                pseudo.cpl,
                batch.valid,
                self.energy_factor,
                self.energy_sigma_rgb,
                self.energy_sigma_xy,
                self.energy_scale,
            )
        return terms

    def _warmup_losses(self, output: NetworkOutput, batch: Batch) -> dict[str, Tensor]:
        return self.classification(output, batch) | {
            # The published code multiplies the other terms by 0, so the decoder has zero
            # gradients (not none) and AdamW counts its steps. Same here, without running it.
            "c2s": torch.stack([p.sum() for p in self.network.decoder.parameters()]).sum() * 0.0,
        }

    # --- pseudo-labels ---------------------------------------------------------------------

    @torch.no_grad()
    def assign(self, batch: Batch, decode: bool = True) -> MultiScaleOutput:
        """Activations of AN on the weak view, absent classes zero."""
        return multi_scale(
            self.assignment,
            batch.weak,
            self.cam_scales,
            fuse=self.fuse,
            labels=batch.labels,
            decode=decode,
            early_cam_scales=self.early_cam_scales,
        )

    @torch.no_grad()
    def update_thresholds(self, assigned: MultiScaleOutput, valid: Tensor) -> Confidences:
        """Enqueue what AN says and follow it with both thresholds."""
        confidence = assigned.cam.amax(1)
        early_confidence = assigned.early_cam.amax(1)
        threshold = self.threshold.update(confidence, valid)
        early = self.early_threshold.update(early_confidence, valid)
        for name, value in (("cam", threshold), ("early_cam", early)):
            self._log_threshold(name, value, prog_bar=name == "cam")
        for name, estimator in (("cam", self.threshold), ("early_cam", self.early_threshold)):
            raw = getattr(estimator, "raw", None)  # a fixed one has none
            if raw is not None:
                # Before bounds and smoothing; NaN where the fit is degenerate.
                self._log_threshold(f"{name}_raw", raw)
        return Confidences(confidence, threshold, early_confidence, early)

    def _log_threshold(self, name: str, value: Tensor, prog_bar: bool = False) -> None:
        if value.dim():
            self.log(f"threshold/{name}_low", value[0], batch_size=1)
            value = value[1]
        self.log(f"threshold/{name}", value, prog_bar=prog_bar, batch_size=1)

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

        return PseudoLabels(
            cpl=self._cpl(assigned.cam, xi, batch),
            weight=weight(nu, xi),
            early_cpl=self._cpl(assigned.early_cam, early_xi, batch),
            early_weight=weight(early_nu, early_xi),
            spl=self._guide(assigned.seg_logits, batch),
            early_cam=assigned.early_cam,
            early_threshold=early_xi,
        )

    def _cpl(self, cam: Tensor, xi: Tensor, batch: Batch) -> Tensor:
        if self.cpl_softmax:
            return softmax_threshold_label(cam, xi[0], xi[1], batch.labels, batch.valid)
        return cam_pseudo_label(cam, xi, batch.valid, batch.labels)

    def _guide(self, seg_logits: Tensor, batch: Batch) -> Tensor | None:
        """Target (B, C + 1, h, w) of Seg2CAM on the token grid."""
        grid = self.assignment.encoder.grid(batch.valid.shape[-2], batch.valid.shape[-1])
        if self.guidance == "none":
            return None
        if self.guidance == "spl":

            def spl(logits: Tensor) -> Tensor:
                return segmentation_pseudo_label(logits, batch.labels, self.spl_temperature)

            return resize_after(spl, seg_logits, *grid)
        channels = batch.labels.shape[1] + 1
        if self.guidance == "noise":
            possible = F.pad(batch.labels, (1, 0), value=1.0)  # background is always
            drawn = torch.multinomial(possible, grid[0] * grid[1], replacement=True)
            return F.one_hot(drawn, channels).transpose(1, 2).unflatten(2, grid).float()
        if batch.mask is None:
            raise UserError("method.guidance='gt' needs masks: set data.load_masks=true.")
        # Void and padding count as background, which no class's map is drawn towards.
        mask = batch.mask.masked_fill(batch.mask == IGNORE_INDEX, 0)
        truth = F.one_hot(mask, channels).permute(0, 3, 1, 2).float()
        return F.interpolate(truth, size=grid, mode="bilinear", align_corners=False)

    def _contrastive_separation(self, cam: Tensor, pseudo: PseudoLabels, batch: Batch) -> Tensor:
        """Eq. 10 on the token grid, where the early CAM's labels and perplexity are taken."""
        grid = (cam.shape[-2], cam.shape[-1])
        early = F.interpolate(pseudo.early_cam, size=grid, mode="bilinear", align_corners=False)
        label = cam_pseudo_label(early, pseudo.early_threshold, valid_on_grid(batch.valid, grid))
        confidence = perplexity(
            early.amax(1), pseudo.early_threshold, self.raw_alpha, self.raw_beta
        )
        return contrastive_separation_loss(
            cam, label, confidence, self.csc_max_perplexity, self.csc_temperature
        )
