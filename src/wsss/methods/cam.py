"""Plain classifier: the lower bound, whose CAMs nothing guides, alone or with a decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wsss.addons import Step
from wsss.data.batch import Batch
from wsss.losses import cam2seg_loss
from wsss.methods.activations import own_activations
from wsss.methods.base import Method
from wsss.methods.checks import check_threshold
from wsss.pseudo import MultiScaleOutput, cam_pseudo_label


class CAM(Method):
    """Multi-label classification alone (CoSA, eq. 1, on final and early features).

    With ``segment`` the single-stage form: the network's own multi-scale CAMs on the weak view, cut
    at a fixed threshold, also train its decoder on the strong view. Without, the decoder is neither
    trained nor evaluated.

    Args:
        segment: train the decoder too.
        c2s_weight: weight of its cross-entropy.
        threshold: background threshold of the CAM pseudo-labels that it learns from.
        loss_warmup_steps: optimizer steps before it starts, with the classification losses alone.
        balanced: halve its cross-entropy between background and foreground means.
        **kwargs: of :class:`~wsss.methods.base.Method`; ``cam_scales`` are those of the labels.
    """

    def __init__(
        self,
        segment: bool = False,
        c2s_weight: float = 0.1,
        threshold: float = 0.45,
        loss_warmup_steps: int = 0,
        balanced: bool = True,
        **kwargs: Any,
    ) -> None:
        self.evaluates_segmentation = segment  # before the scores are made
        super().__init__(**kwargs)
        check_threshold("method.threshold", threshold)
        self.monitor = "on/seg/miou_ms_flip" if segment else "on/cpl/miou_ms_flip"
        self.segment = segment
        self.c2s_weight = c2s_weight
        self.threshold = threshold
        self.loss_warmup_steps = loss_warmup_steps
        self.balanced = balanced
        if not segment:
            self.network.decoder.requires_grad_(False)

    def loss_weights(self) -> dict[str, float]:
        return {"c2s": self.c2s_weight}

    def step(self, batch: Batch) -> Step:
        output = self.network(batch.strong, decode=self.segment)
        terms = self.classification(output, batch)
        activations = None
        if self.segment:
            assert output.seg_logits is not None
            if self.trainer.global_step >= self.loss_warmup_steps:
                activations = own_activations(
                    self.network, batch.weak, self.cam_scales, batch.labels
                )
                label = self.label(activations, batch)
                terms["c2s"] = cam2seg_loss(output.seg_logits, label, balanced=self.balanced)
            else:
                terms["c2s"] = output.seg_logits.sum() * 0.0  # DDP wants every gradient
        return Step(terms, self.views(output, batch, activations))

    def label(self, activations: MultiScaleOutput, batch: Batch) -> Tensor:
        """CAM pseudo-labels (B, H, W)."""
        return cam_pseudo_label(activations.cam, self.threshold, batch.valid, batch.labels)
