"""SEAM's network: a CNN whose CAMs are averaged over pixels that look alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.losses.equivariance import keep_largest
from wsss.nn.network import NetworkOutput, WSSSNetwork
from wsss.nn.pyramid import PyramidEncoder

#: keeps normalisation finite, as published
EPSILON = 1e-5


class PixelCorrelation(nn.Module):
    """SEAM's pixel correlation module (PCM).

    Every pixel gets the mean of all pixels' maps, weighted by the relu'd cosine similarity of
    their embeddings: of the image's colours and two stages of features, none with gradient, through
    one 1x1 convolution each (but for the colours) and a common one.

    Args:
        dims: channels of the two stages.
        widths: of their embeddings.
        width: of the common embedding.
    """

    def __init__(
        self, dims: tuple[int, int], widths: tuple[int, int] = (64, 128), width: int = 192
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(dim, out, 1, bias=False) for dim, out in zip(dims, widths, strict=True)
        )
        self.common = nn.Conv2d(3 + sum(widths), width, 1, bias=False)
        for stage in self.stages:
            nn.init.kaiming_normal_(stage.weight)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.common.weight, gain=4)

    def forward(self, maps: Tensor, stages: Sequence[Tensor], images: Tensor) -> Tensor:
        """Refine maps.

        Args:
            maps: (B, K, h, w) float.
            stages: two feature maps (B, dims[i], h_i, w_i).
            images: (B, 3, H, W), normalised as the encoder wants them.

        Returns:
            (B, K, h, w).
        """
        size = (maps.shape[-2], maps.shape[-1])
        parts = [_resize(images, size)]
        for layer, stage in zip(self.stages, stages, strict=True):
            parts.append(layer(_resize(stage.detach(), size)).relu())
        return correlate(maps, self.common(torch.cat([p.float() for p in parts], 1)))


class SEAMNetwork(WSSSNetwork):
    """Encoder and classifier with the pixel correlation module behind them.

    There is no early CAM: its fields are those of the final one. ``refined_cam`` are the maps of
    the correlation module, to be used instead of the CAM.

    Args:
        *args, **kwargs: of :class:`WSSSNetwork`.

    Attributes:
        dropout: of whole feature channels before the classifier, in training.

    Raises:
        UserError: a backbone without stages, such as a ViT.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.encoder, PyramidEncoder) or len(self.encoder.stage_dims) < 3:
            name = getattr(self.encoder, "name", type(self.encoder).__name__)
            raise UserError(
                f"backbone.name='{name}' does not give the features of three stages, which "
                "method=seam compares pixels by: choose backbone=resnet38d, or a CNN of timm such "
                "as backbone.name=resnet50."
            )
        shallow, deep = self.encoder.stage_dims[-3:-1]
        self.correlation = PixelCorrelation((shallow, deep))
        self.dropout = nn.Dropout2d(0.5)

    def forward(self, images: Tensor, decode: bool = True) -> NetworkOutput:
        return self.refine(images, decode)[0]

    def refine(self, images: Tensor, decode: bool = False) -> tuple[NetworkOutput, Tensor]:
        """What :meth:`forward` gives, and the refined maps with their background.

        Args:
            images: (B, 3, H, W) RGB in [0, 1].
            decode: also run the decoder.

        Returns:
            The output, and (B, C + 1, h, w) in [0, 1], background first.
        """
        stages = self.encoder.pyramid(images)  # type: ignore[operator]
        neck = self.apply_neck(stages[-1])
        features = neck.features
        class_logits, cam = self.classifier(self.dropout(features))
        normalised = (images - self.encoder.mean) / self.encoder.std
        refined = self.correlation(suppressed(cam.detach()), stages[-3:-1], normalised)
        seg_logits = self.decode(features, dict(enumerate(stages))) if decode else None
        output = NetworkOutput(
            class_logits,
            class_logits,
            cam,
            cam,
            seg_logits,
            features,
            refined[:, 1:],
            tokens=stages[-1],
            neck=neck,
        )
        return output, refined

    def head_parameters(self) -> list[nn.Parameter]:
        return [*super().head_parameters(), *self.correlation.parameters()]


def suppressed(cam: Tensor) -> Tensor:
    """What the correlation module refines: CAMs of which each pixel keeps the largest alone.

    ``r = relu(relu(M) - 1e-5) / (max relu(M) + 1e-5)`` of each image and class; the background is
    ``1 - max_c r_c``.

    Args:
        cam: (B, C, h, w) CAM logits.

    Returns:
        (B, C + 1, h, w) float32 (float64 stays), background first.
    """
    positive = (cam if cam.dtype == torch.float64 else cam.float()).relu()
    high = positive.amax((-2, -1), keepdim=True)
    return keep_largest((positive - EPSILON).relu() / (high + EPSILON))


def correlate(maps: Tensor, embedding: Tensor) -> Tensor:
    """Mean of maps over all pixels, weighted by the relu'd cosine similarity of embeddings.

    Memory grows with the square of the number of pixels.

    Args:
        maps: (B, K, h, w).
        embedding: (B, D, h, w).

    Returns:
        (B, K, h, w) in the precision of ``maps``.
    """
    with torch.autocast(maps.device.type, enabled=False):
        vectors = embedding.to(maps.dtype).flatten(2)
        vectors = vectors / (vectors.norm(dim=1, keepdim=True) + EPSILON)
        similarity = (vectors.transpose(1, 2) @ vectors).relu()
        # The matrix is symmetric and large: the K maps are divided by its sums, not itself.
        whole = similarity.sum(1, keepdim=True) + EPSILON
        return (maps.flatten(2) @ similarity / whole).unflatten(2, maps.shape[-2:])


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
