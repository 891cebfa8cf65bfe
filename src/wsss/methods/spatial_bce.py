"""Spatial-BCE: classification in which every pixel has its own part (ECCV 2022)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor

from wsss.addons import Step, View
from wsss.data.batch import Batch
from wsss.errors import UserError
from wsss.losses import classification_loss
from wsss.losses.spatial_bce import (
    area_loss,
    area_threshold,
    spatial_bce_loss,
    threshold_loss,
)
from wsss.methods.base import Method
from wsss.methods.checks import check_scales, check_threshold
from wsss.nn.spatial_bce import SpatialBCENetwork
from wsss.pseudo import cam_pseudo_label, multi_scale
from wsss.pseudo.labels import IGNORE_INDEX
from wsss.resize import valid_on_grid


class SpatialBCE(Method):
    """Adaptive Spatial-BCE with its alternating threshold learning.

    Steps come in cycles. In most of a cycle the network learns: the pixels of a present class are
    pushed away from a threshold, those of an absent class down ("cls"), while their mean
    probability is kept near the class's area (the self-supervised task, "area"); the threshold is
    the one that leaves that area above it. In the last steps of a cycle the threshold head learns
    from the same curve with the probabilities held fixed ("threshold"); the encoder learns on in
    them, from "area" and through the features that the head sees. With ``adaptive`` inference cuts
    the probabilities at what the head has learned, see
    :class:`~wsss.nn.spatial_bce.SpatialBCENetwork`. Without, there are no such steps, and the CAM
    of the logits is cut at a fixed threshold, as every other method's. Add-ons act where something
    is classified, in the former steps alone.

    The authors' code does all this in separate runs: a classifier is trained; its pseudo-labels,
    refined by a CRF, give the areas; with these a first phase is trained, its pseudo-labels give
    the areas of a second, and so on, three in all. Here it is one run: ``loss_warmup_steps`` of
    classification, then phases of ``phase_steps``; a copy of the network, taken at the start of
    each, gives the areas of its phase: of its logits' CAM on the crop, cut at ``area_threshold``,
    without a CRF. Areas are kept within ``area_range``, which the code does not: an area of 0 would
    wipe a present class out.

    The strong view is trained on; the areas are those of the weak one.

    Args:
        adaptive: learn a threshold for inference; False: the CAM is that of the logits.
        loss_warmup_steps: optimizer steps with the image-level classification loss instead.
        phase_steps: optimizer steps from one copy of the network to the next.
        cycle: optimizer steps of a cycle.
        threshold_steps: how many at its end train the threshold.
        area_weight: weight of the area's loss.
        area_scales: scales, with flips, of the CAMs that the areas are taken from.
        area_threshold: background threshold of the CAMs that the areas are taken from.
        area_range: least and largest area.
        pooling: of CAMs to image logits, during warm-up.
        **kwargs: of :class:`~wsss.methods.base.Method`.

    Raises:
        UserError: numbers of steps or areas that cannot be.
    """

    monitor = "on/cpl/miou_ms_flip"
    evaluates_segmentation = False
    evaluates_early_cam = False
    network_class = SpatialBCENetwork

    def __init__(
        self,
        adaptive: bool = True,
        loss_warmup_steps: int = 1764,
        phase_steps: int = 17640,
        cycle: int = 100,
        threshold_steps: int = 20,
        area_weight: float = 1.0,
        area_scales: tuple[float, ...] = (1.0,),
        area_threshold: float = 0.4,
        area_range: tuple[float, float] = (0.01, 0.99),
        pooling: str = "gap",
        **kwargs: Any,
    ) -> None:
        super().__init__(pooling=pooling, **kwargs)
        if phase_steps < 1:
            raise UserError(f"method.phase_steps={phase_steps}: give at least 1.")
        if not 0 <= threshold_steps < cycle:
            raise UserError(
                f"method.threshold_steps={threshold_steps}: give 0 or more, and less than "
                f"method.cycle={cycle}."
            )
        if len(area_range) != 2 or not 0 < area_range[0] <= area_range[1] < 1:
            raise UserError(
                f"method.area_range={list(area_range)}: expected (low, high) in (0, 1)."
            )
        self.loss_warmup_steps = loss_warmup_steps
        self.phase_steps = phase_steps
        self.cycle = cycle
        self.threshold_steps = threshold_steps
        self.area_weight = area_weight
        check_scales("method.area_scales", area_scales)
        check_threshold("method.area_threshold", area_threshold)
        self.area_scales = tuple(area_scales)
        self.area_range = (float(area_range[0]), float(area_range[1]))
        self.adaptive = adaptive
        self.area_threshold = area_threshold
        network = cast(SpatialBCENetwork, self.network)
        network.adaptive = adaptive
        network.threshold.requires_grad_(adaptive)
        self.network.decoder.requires_grad_(False)
        self.network.early_classifier.requires_grad_(False)
        #: the network at the start of the phase
        self.previous = copy.deepcopy(network).requires_grad_(False).eval()
        self.previous.adaptive = False

    def train(self, mode: bool = True) -> SpatialBCE:
        super().train(mode)
        self.previous.eval()  # never anything else
        return self

    def loss_weights(self) -> dict[str, float]:
        return {"area": self.area_weight}

    def step(self, batch: Batch) -> Step:
        step = self.trainer.global_step
        done = step - self.loss_warmup_steps
        if done >= 0 and done % self.phase_steps == 0:
            # Also at the further micro-batches of this step: the weights are still the same.
            self.previous.load_state_dict(self.network.state_dict())
        network = cast(SpatialBCENetwork, self.network)
        output = network(batch.strong, decode=False)
        grid = (output.cam.shape[-2], output.cam.shape[-1])
        labels, valid = batch.labels, valid_on_grid(batch.valid, grid)
        terms: dict[str, Tensor] = {}
        views: tuple[View, ...] = ()
        # DDP wants a gradient of every parameter in every step, be it 0.
        unused = network.threshold.weight.sum() * 0.0
        if self.trains_threshold(step):
            threshold = network.threshold_logits(output.features).sigmoid()
            terms["threshold"] = threshold_loss(output.cam, labels, threshold, valid)
            unused = output.cam.sum() * 0.0
        elif done < 0:
            terms["cls"] = classification_loss(output.class_logits, labels)
            views = self.views(output, batch)
        if done >= 0:
            area = self.area(batch)
            terms["area"] = area_loss(output.cam, labels, area, valid)
            if not self.trains_threshold(step):
                threshold = area_threshold(output.cam, area, valid)
                terms["cls"] = spatial_bce_loss(output.cam, labels, threshold, valid)
                views = self.views(output, batch)
        first = next(iter(terms))
        terms[first] = terms[first] + unused
        return Step(terms, views)

    def trains_threshold(self, step: int) -> bool:
        """Whether the optimizer step is one of the threshold's."""
        last = step % self.cycle >= self.cycle - self.threshold_steps
        return self.adaptive and step >= self.loss_warmup_steps and last

    @torch.no_grad()
    def area(self, batch: Batch) -> Tensor:
        """Share (B, C) of each image that the phase's network takes for each present class."""
        out = multi_scale(
            self.previous, batch.weak, self.area_scales, labels=batch.labels, decode=False
        )
        label = cam_pseudo_label(out.cam, self.area_threshold, batch.valid, batch.labels).flatten(1)
        pixels = torch.zeros(len(label), IGNORE_INDEX + 1, device=label.device)
        pixels.scatter_add_(1, label, torch.ones_like(label, dtype=pixels.dtype))
        inside = batch.valid.flatten(1).sum(1, keepdim=True).clamp(min=1)
        return (pixels[:, 1 : batch.labels.shape[1] + 1] / inside).clamp(*self.area_range)
