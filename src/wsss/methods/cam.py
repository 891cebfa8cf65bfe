"""Plain classifier: the lower bound, whose CAMs nothing guides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wsss.data.batch import Batch
from wsss.losses import classification_loss
from wsss.methods.base import Method


class CAM(Method):
    """Multi-label classification alone (CoSA, eq. 1, on final and early features).

    The decoder of the network is neither trained nor evaluated.

    Args:
        **kwargs: of :class:`~wsss.methods.base.Method`.
    """

    monitor = "on/cpl/miou_ms_flip"
    evaluates_segmentation = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network.decoder.requires_grad_(False)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        output = self.network(batch.strong, decode=False)
        return {
            "cls": classification_loss(output.class_logits, batch.labels),
            "cls_early": classification_loss(output.early_class_logits, batch.labels),
        }
