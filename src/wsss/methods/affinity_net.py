"""AffinityNet: which neighbouring cells belong together, learned from confident pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.addons import Step
from wsss.data.batch import Batch, EvalBatch
from wsss.errors import UserError
from wsss.losses import pixel_affinity_loss
from wsss.losses.pixel_affinity import grid_labels
from wsss.methods.base import Method
from wsss.metrics.pairs import PairAccuracy
from wsss.nn.affinity_net import AffinityNetwork
from wsss.pseudo.pixel_affinity import RADIUS


class AffinityNet(Method):
    """The refinement between the stages of multi-stage methods (Ahn and Kwak, CVPR 2018).

    Trained on exported pseudo-labels (``data.masks``) with 255 where they are not confident, it
    learns the affinity of neighbouring cells. ``wsss pseudo_label refine=affinity`` then spreads
    CAMs along it. It segments nothing itself: its score is the balanced accuracy of the pairs of
    the validation masks, see :class:`~wsss.metrics.pairs.PairAccuracy`.

    Args:
        radius: cells nearer to each other are a pair.
        **kwargs: of :class:`~wsss.methods.base.Method`.

    Raises:
        UserError: a radius that has no pairs.
    """

    monitor = "on/affinity/balanced_accuracy"
    evaluates_segmentation = False
    evaluates_cam = False
    evaluates_early_cam = False
    network_class = AffinityNetwork

    def __init__(self, radius: int = RADIUS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if radius < 2:
            raise UserError(f"method.radius={radius}: give 2 or more cells.")
        self.radius = radius
        self.scores = nn.ModuleDict()  # no protocol has a meaning
        self.pairs = PairAccuracy(radius)
        for unused in ("decoder", "classifier", "early_classifier"):
            getattr(self.network, unused).requires_grad_(False)

    @classmethod
    def short_name(cls) -> str:
        return "affinity_net"

    @classmethod
    def wants_masks(cls, settings: Mapping[str, Any]) -> bool:
        return True

    def setup(self, stage: str) -> None:
        self.require_given_masks(
            stage,
            "method=affinity_net is trained on confident pseudo-labels",
            "`wsss pseudo_label checkpoint=... alpha=[4,24] refine=crf` writes "
            "(data.masks=outputs/.../pseudo_labels/train_aug/cpl)",
        )

    def step(self, batch: Batch) -> Step:
        if batch.mask is None:
            raise UserError("method=affinity_net needs masks: set data.load_masks=true.")
        features = self._features(batch.strong)
        labels = grid_labels(batch.mask, self.network.patch_size)
        return Step({"affinity": pixel_affinity_loss(features, labels, self.radius)})

    def _features(self, images: Tensor) -> Tensor:
        return cast(AffinityNetwork, self.network).affinity_features(images)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.pairs.reset()

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        # Elsewhere scores are taken at the size of the mask. Cells are far larger than its pixels.
        size = batch.images.shape[-2:]
        masks = torch.stack([_resized(mask, (size[0], size[1])) for mask in batch.masks])
        labels = grid_labels(masks, self.network.patch_size)
        self.pairs.update(self._features(batch.images), labels)

    def compute_scores(self) -> dict[str, Tensor]:
        """Balanced accuracy of the pairs, and the accuracy of each group, in [0, 1]."""
        return {f"on/affinity/{k}": v.float() for k, v in self.pairs.compute().items()}


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
