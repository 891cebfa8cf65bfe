"""Networks: timm encoder, classifiers and segmentation decoder as one module."""

from wsss.nn.decoder import LargeFOV
from wsss.nn.encoder import ViTEncoder
from wsss.nn.network import NetworkOutput, WSSSNetwork

__all__ = ["LargeFOV", "NetworkOutput", "ViTEncoder", "WSSSNetwork"]
