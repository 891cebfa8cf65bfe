"""UniA: uncertainty inference and affinity diversification, single-stage (TMM 2025)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.addons import Affinity, Step, View
from wsss.data.batch import Batch
from wsss.errors import UserError
from wsss.losses import cam2seg_loss, dense_energy_loss, token_contrast_loss
from wsss.losses.cam2seg import upsample_log_softmax
from wsss.losses.dense_energy import check_energy
from wsss.methods.activations import own_activations
from wsss.methods.base import Method
from wsss.nn import NetworkOutput
from wsss.nn.attention import Blocks
from wsss.pseudo import (
    MultiScaleOutput,
    MutualRefinement,
    symmetric_affinity,
    two_threshold_label,
)
from wsss.resize import valid_on_grid

REFINEMENTS = ("mutual", "par", "none")


class UniA(Method):
    """The single-stage recipe that UniA's neck and losses were published with.

    One step: the network's own CAMs on the weak view, over scales and flips, become a refined
    label, which the decoder learns from on the strong view. Beside it train, as in ToCo: the
    classifiers of final and auxiliary (early) features, patch-token contrast, and the dense energy
    of the segmentation. In the first ``aux_steps`` labels come from the auxiliary CAM, then from
    the final one.

    The other terms of eq. 17 are add-ons, which every method can have: ``addon=unia``. They see the
    CAM, the affinity and the label of this step. The uncertainty inference network is
    ``neck=uncertainty``. Both are chosen by ``method=unia``; without them it is the baseline.

    Args:
        refine: of the label: ``mutual`` complementing (needs a plain ViT); ``par``, pixel-adaptive
            refinement alone; ``none``.
        refine_start_step: optimizer step from which ``mutual`` counts; ``par`` before.
        high, low: thresholds of all labels: class from ``high`` on, background below ``low``.
        blocks, walk_power, walk_steps, renormalise, par_scale: of the affinity and its random walk,
            see :class:`~wsss.addons.Affinity`.
        aux_steps: see above.
        loss_warmup_steps: optimizer steps before the decoder learns (ToCo's 2000; the paper is
            silent).
        seg_weight, token_weight, energy_weight: of the terms.
        balanced: halve the segmentation's cross-entropy between background and foreground means.
        energy_scale, energy_sigma_rgb, energy_sigma_xy, energy_factor: ``scale``, widths and
            ``weight`` of :func:`~wsss.losses.dense_energy_loss`.
        **kwargs: of :class:`~wsss.methods.base.Method`; ``cam_scales`` are those of the labels.

    Raises:
        UserError: an unknown refinement, or ``mutual`` without a plain ViT.
        ValueError: of :class:`~wsss.pseudo.MutualRefinement`, or of the dense energy's widths and
            scale.
    """

    def __init__(
        self,
        refine: str = "mutual",
        refine_start_step: int = 0,
        high: float = 0.7,
        low: float = 0.25,
        blocks: Blocks = "all",
        walk_power: float = 2.0,
        walk_steps: int = 1,
        renormalise: bool = False,
        par_scale: float = 0.5,
        aux_steps: int = 8000,
        loss_warmup_steps: int = 2000,
        seg_weight: float = 0.15,
        token_weight: float = 0.3,
        energy_weight: float = 0.05,
        balanced: bool = True,
        energy_scale: float = 0.5,
        energy_sigma_rgb: float = 15.0,
        energy_sigma_xy: float = 100.0,
        energy_factor: float = 1e-7,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if refine not in REFINEMENTS:
            raise UserError(f"method.refine='{refine}': choose one of {', '.join(REFINEMENTS)}.")
        check_energy(energy_sigma_rgb, energy_sigma_xy, energy_scale)
        if refine == "mutual":
            self.network.want_attention(blocks)
        self.refine = refine
        self.refine_start_step = refine_start_step
        self.high, self.low = high, low
        self.refinement = MutualRefinement(
            high, low, walk_power, walk_steps, renormalise, par_scale
        )
        self._check_labels()
        self.aux_steps = aux_steps
        self.loss_warmup_steps = loss_warmup_steps
        self.seg_weight = seg_weight
        self.token_weight = token_weight
        self.energy_weight = energy_weight
        self.balanced = balanced
        self.energy_scale = energy_scale
        self.energy_sigma_rgb = energy_sigma_rgb
        self.energy_sigma_xy = energy_sigma_xy
        self.energy_factor = energy_factor

    def _check_labels(self) -> None:
        """An affinity loss takes the method's mutually refined label: its own settings of labels
        would do nothing."""
        for name, addon in self.addons.items():
            if self.refine != "mutual" or not isinstance(addon, Affinity):
                continue
            for key, own in addon.label_settings.items():
                ours = getattr(self.refinement, key)
                if own != ours:
                    raise UserError(
                        f"addon.{name}.{key}={own}: with method.refine=mutual the label is the "
                        f"method's, of method.{key}={ours}. Set that one alone."
                    )

    def loss_weights(self) -> dict[str, float]:
        return {
            "seg": self.seg_weight,
            "token": self.token_weight,
            "energy": self.energy_weight,
        }

    def step(self, batch: Batch) -> Step:
        activations = own_activations(self.network, batch.weak, self.cam_scales, batch.labels)
        segments = self.trainer.global_step >= self.loss_warmup_steps
        output = self.network(batch.strong, decode=segments)
        terms = self.classification(output, batch)
        if self.token_weight:
            assert output.tokens is not None
            label = self.token_label(activations, batch, output.tokens)
            terms["token"] = token_contrast_loss(output.tokens, label)
        if not segments:
            # DDP wants a gradient for every parameter.
            unused = [p.sum() for p in self.network.decoder.parameters()]
            terms["seg"] = torch.stack(unused).sum() * 0.0
            return Step(terms, self._views(output, batch, activations))

        affinity = None
        if self._refines(self.trainer.global_step):
            assert output.attention is not None
            affinity = symmetric_affinity(output.attention)
        label = self.label(activations, affinity, output, batch)
        terms |= self.segmentation(output, label, batch)
        mutual = None if affinity is None else label
        return Step(terms, self._views(output, batch, activations, affinity, mutual))

    def _refines(self, step: int) -> bool:
        """Whether labels are mutually refined in an optimizer step."""
        return self.refine == "mutual" and step >= max(
            self.refine_start_step, self.loss_warmup_steps
        )

    def reads_attention(self, step: int) -> bool:
        return self._refines(step) or super().reads_attention(step)

    def segmentation(self, output: NetworkOutput, label: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The decoder's terms for a label (B, H, W)."""
        assert output.seg_logits is not None
        size = (label.shape[-2], label.shape[-1])
        log_p = upsample_log_softmax(output.seg_logits, size)  # of both terms
        terms = {"seg": cam2seg_loss(log_p, label, None, self.balanced, True)}
        if self.energy_weight:
            # The weak view has the colours of the image; the strong one may be solarised.
            terms["energy"] = dense_energy_loss(
                log_p.exp(),
                batch.weak * 255,
                label,
                batch.valid,
                self.energy_factor,
                self.energy_sigma_rgb,
                self.energy_sigma_xy,
                self.energy_scale,
            )
        return terms

    # --- pseudo-labels ---------------------------------------------------------------------

    def label_cam(self, activations: MultiScaleOutput) -> Tensor:
        """The CAM (B, C, H, W) that labels come from in this step."""
        early = self.trainer.global_step < self.aux_steps
        return activations.early_cam if early else activations.cam

    @torch.no_grad()
    def label(
        self,
        activations: MultiScaleOutput,
        affinity: Tensor | None,
        output: NetworkOutput,
        batch: Batch,
    ) -> Tensor:
        """The decoder's label (B, H, W): mutually refined where there is an affinity (B, N, N)."""
        cam = self.label_cam(activations)
        if affinity is not None:
            grid = (output.cam.shape[-2], output.cam.shape[-1])
            return self.refinement(
                cam, affinity.detach(), grid, batch.weak, batch.labels, batch.valid
            ).label
        if self.refine == "none":
            return two_threshold_label(cam, self.low, self.high, batch.valid)
        return self.refinement.label(cam, batch.weak, batch.labels, batch.valid)

    @torch.no_grad()
    def token_label(self, activations: MultiScaleOutput, batch: Batch, tokens: Tensor) -> Tensor:
        """Label (B, h, w) of the auxiliary CAM on the grid of the tokens (B, D, h, w)."""
        grid = (tokens.shape[-2], tokens.shape[-1])
        cam = F.interpolate(activations.early_cam, size=grid, mode="bilinear", align_corners=False)
        return two_threshold_label(cam, self.low, self.high, valid_on_grid(batch.valid, grid))

    def _views(
        self,
        output: NetworkOutput,
        batch: Batch,
        activations: MultiScaleOutput,
        affinity: Tensor | None = None,
        label: Tensor | None = None,
    ) -> tuple[View, ...]:
        """What add-ons may act on; the final CAM with the activations that labels come from."""
        first, *others = self.views(output, batch, activations)
        made = dataclasses.replace(
            first, activations=self.label_cam(activations), affinity=affinity, label=label
        )
        return (made, *others)
