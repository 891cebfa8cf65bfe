"""Full supervision: the upper bound, cross-entropy on ground-truth masks."""

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

    The same network, views and schedule as the other methods, so that the ratio to it is what
    the missing masks cost. The classifiers are neither trained nor evaluated.

    Args:
        **kwargs: of :class:`~wsss.methods.base.Method`.
    """

    evaluates_cam = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network.classifier.requires_grad_(False)
        self.network.early_classifier.requires_grad_(False)

    @classmethod
    def wants_masks(cls, settings: Mapping[str, Any]) -> bool:
        return True

    def step(self, batch: Batch) -> Step:
        if batch.mask is None:
            raise UserError("method=supervised needs masks: set data.load_masks=true.")
        seg_logits = self.network(batch.strong).seg_logits
        assert seg_logits is not None
        return Step({"seg": cam2seg_loss(seg_logits, batch.mask)})
