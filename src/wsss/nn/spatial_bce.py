"""Spatial-BCE's network: probabilities of pixels, and a threshold that parts them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from wsss.nn.network import NetworkOutput, WSSSNetwork


class SpatialBCENetwork(WSSSNetwork):
    """Encoder and classifier with a scale for each class, and a head that predicts a threshold.

    As in the published code, logits of class c are multiplied by ``exp(log_scale_c)``, 10 at first,
    for a sigmoid of small logits could not part anything; and the threshold of an image and class
    is the sigmoid of a linear layer on the mean of the features.

    In evaluation mode, if ``adaptive``, ``refined_cam`` are the probabilities seen from that
    threshold, ``sigmoid(M - logit(t))``, calibrated: cut at 0.5, they are cut where p is t.

    Args:
        *args, **kwargs: of :class:`WSSSNetwork`.

    Attributes:
        threshold: the threshold's layer, 0.5 for all before it is trained.
        adaptive: inference sees probabilities from the threshold; False: the logits' CAM.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_scale = nn.Parameter(torch.full((self.num_classes,), math.log(10.0)))
        self.threshold = nn.Linear(self.encoder.dim, self.num_classes, bias=False)
        nn.init.zeros_(self.threshold.weight)
        self.adaptive = True

    def forward(self, images: Tensor, decode: bool = True) -> NetworkOutput:
        output = super().forward(images, decode)
        scale = self.log_scale.exp()
        cam = output.cam * scale[:, None, None]
        refined = None
        if self.adaptive and not self.training:
            logits = self.threshold_logits(output.features)
            refined = (cam.float() - logits[:, :, None, None]).sigmoid()
        return output._replace(
            class_logits=output.class_logits * scale,
            cam=cam,
            refined_cam=refined,
            calibrated=refined is not None,
        )

    def threshold_logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) of the thresholds of final features (B, D, h, w)."""
        logits: Tensor = self.threshold(features.mean((-2, -1)))
        return logits.float()

    def head_parameters(self) -> list[nn.Parameter]:
        return [*super().head_parameters(), self.log_scale, *self.threshold.parameters()]
