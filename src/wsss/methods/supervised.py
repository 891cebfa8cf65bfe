"""Cross-entropy on masks: full supervision, or a second stage on pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsss.addons import Step
from wsss.data.batch import Batch
from wsss.errors import UserError
from wsss.losses import cam2seg_loss
from wsss.methods.base import Method


class Supervised(Method):
    """Encoder and decoder trained with per-pixel cross-entropy on masks.

    On the data set's own masks it is the upper bound: with the same network and schedule as a
    weakly supervised method, the ratio to it is what the missing masks cost. On exported
    pseudo-labels (``data.masks``) it is the second stage of multi-stage methods such as CoSA-MS.
    The classifiers are neither trained nor evaluated. Its configuration chooses ``view=standard``:
    CoSA's strong views lower the bound (docs/findings.md).

    Args:
        pseudo_labels: for a second stage: refuse to start without ``data.masks``.
        **kwargs: of :class:`~wsss.methods.base.Method`.
    """

    evaluates_cam = False

    def __init__(self, pseudo_labels: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pseudo_labels = pseudo_labels
        self.network.classifier.requires_grad_(False)
        self.network.early_classifier.requires_grad_(False)

    @classmethod
    def wants_masks(cls, settings: Mapping[str, Any]) -> bool:
        return True

    def setup(self, stage: str) -> None:
        if self.pseudo_labels:
            self.require_given_masks(
                stage,
                "a second stage is trained on pseudo-labels",
                "`wsss pseudo_label checkpoint=...` writes "
                "(data.masks=outputs/.../pseudo_labels/train_aug/cpl); on the data set's own masks "
                "train with method.pseudo_labels=false",
            )

    def step(self, batch: Batch) -> Step:
        if batch.mask is None:
            raise UserError("method=supervised needs masks: set data.load_masks=true.")
        seg_logits = self.network(batch.strong).seg_logits
        assert seg_logits is not None
        return Step({"seg": cam2seg_loss(seg_logits, batch.mask)})
