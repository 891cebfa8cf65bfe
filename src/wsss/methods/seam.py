"""SEAM: one network, two scales of an image, and what they say should be the same (CVPR 2020)."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from wsss.addons import Step, View
from wsss.data.batch import Batch
from wsss.errors import UserError
from wsss.losses import classification_loss
from wsss.losses.equivariance import equivariant_cross_loss, equivariant_loss, min_pooling_loss
from wsss.methods.base import Method
from wsss.nn.seam import SEAMNetwork
from wsss.resize import resize_small


class SEAM(Method):
    """Self-supervised equivariant attention mechanism.

    The image and its smaller copy go through the same network. Classification on both (the mean of
    the CAM) and the equivariant regularisation (ER) train encoder and classifier; the equivariant
    cross regularisation (ECR) and the min pooling of the published code train the pixel correlation
    module, which gives the CAMs at inference. There is no decoder and no early CAM.

    The strong view is trained on, whose appearance should be colour jitter alone
    (``conf/experiment/seam_voc.yaml``). Maps are compared at the size of the small image, as
    published; there the min pooling is taken at the size of the image, here on the grid, maps are
    normalised before they are resized, here after, and resizing aligns corners, here centres, as
    everywhere in this library.

    Args:
        small_scale: size of the small image, as a factor.
        hardest: share of the values that ECR counts.
        lowest: share of the pixels that the min pooling counts.
        dropout: of feature channels before the classifier.
        pooling: of CAMs to image logits, ``gap`` as published.
        **kwargs: of :class:`~wsss.methods.base.Method`.

    Raises:
        UserError: a factor or share that cannot be.
    """

    monitor = "on/cpl/miou_ms_flip"
    evaluates_segmentation = False
    evaluates_early_cam = False
    network_class = SEAMNetwork

    def __init__(
        self,
        small_scale: float = 0.3,
        hardest: float = 0.2,
        lowest: float = 0.25,
        dropout: float = 0.5,
        pooling: str = "gap",
        **kwargs: Any,
    ) -> None:
        super().__init__(pooling=pooling, **kwargs)
        for key, value in (("small_scale", small_scale), ("hardest", hardest), ("lowest", lowest)):
            if not 0 < value <= 1:
                raise UserError(f"method.{key}={value}: give more than 0, and 1 at most.")
        if not 0 <= dropout < 1:
            raise UserError(f"method.dropout={dropout}: give 0 or more, and less than 1.")
        self.small_scale = small_scale
        self.hardest = hardest
        self.lowest = lowest
        network = cast(SEAMNetwork, self.network)
        network.dropout.p = dropout
        network.decoder.requires_grad_(False)
        network.early_classifier.requires_grad_(False)

    def loss_weights(self) -> dict[str, float]:
        return dict.fromkeys(("cls", "cls_small", "rvmin", "rvmin_small"), 0.5)

    def step(self, batch: Batch) -> Step:
        network = cast(SEAMNetwork, self.network)
        labels = batch.labels
        large, refined = network.refine(batch.strong)
        small, small_refined = network.refine(self.shrink(batch.strong))
        size = self.small_size(batch.strong)
        cams, small_cams = _resized(large.cam, size), _resized(small.cam, size)
        terms = {
            "cls": classification_loss(large.class_logits, labels),
            "cls_small": classification_loss(small.class_logits, labels),
            "rvmin": min_pooling_loss(refined[:, 1:], labels, self.lowest),
            "rvmin_small": min_pooling_loss(small_refined[:, 1:], labels, self.lowest),
            "er": equivariant_loss(cams, small_cams, labels),
            "ecr": equivariant_cross_loss(
                cams,
                small_cams,
                _resized(refined, size),
                _resized(small_refined, size),
                labels,
                self.hardest,
            ),
        }
        # The weak view has the colours of the image.
        small_images = self.shrink(batch.weak)
        views = (
            View("cam", "cls", large.cam, batch.weak, labels, batch.valid, large),
            View("cam", "cls_small", small.cam, small_images, labels, batch.valid, small),
        )
        return Step(terms, views)

    def small_size(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the small copies."""
        height, width = (max(1, int(side * self.small_scale)) for side in images.shape[-2:])
        return height, width

    def shrink(self, images: Tensor) -> Tensor:
        """The small copies, bilinear without antialiasing, as published."""
        size = self.small_size(images)
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return resize_small(maps.float(), *size)
