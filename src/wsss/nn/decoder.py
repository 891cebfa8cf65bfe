"""Segmentation decoders."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def largefov(
    encoder: nn.Module, out_channels: int, width: int = 512, dilation: int = 5
) -> LargeFOV:
    """:class:`LargeFOV` on the final features of an encoder, for ``conf/decoder``."""
    dim: int = encoder.dim  # type: ignore[assignment]
    return LargeFOV(dim, out_channels, width, dilation)


class LargeFOV(nn.Module):
    """DeepLab's large field-of-view decoder: two dilated 3x3 convolutions and a 1x1.

    As in CoSA (and ToCo before it), without biases.

    Args:
        in_channels: channels of the encoder features.
        out_channels: segmentation classes, background included (C + 1).
        width: channels of the two hidden layers.
        dilation: dilation (and padding) of both 3x3 convolutions.

    Shape: (B, in_channels, h, w) -> (B, out_channels, h, w), logits.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int = 512, dilation: int = 5
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, width, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.classifier = nn.Conv2d(width, out_channels, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        # Equal logits for all classes at the start: a softmax of them says nothing yet. Random
        # ones would be hard labels under CoSA's SPL temperature of 0.01.
        nn.init.zeros_(self.classifier.weight)

    def forward(self, features: Tensor) -> Tensor:
        x = F.relu(self.conv1(features))
        x = F.relu(self.conv2(x))
        return self.classifier(x)
