"""Networks: an encoder, classifiers and a segmentation decoder as one module."""

from wsss.nn.cnn import CNNEncoder
from wsss.nn.decoder import LargeFOV
from wsss.nn.encoder import ViTEncoder
from wsss.nn.encoders import make_encoder
from wsss.nn.network import NetworkOutput, WSSSNetwork
from wsss.nn.resnet38 import ResNet38Encoder

__all__ = [
    "CNNEncoder",
    "LargeFOV",
    "NetworkOutput",
    "ResNet38Encoder",
    "ViTEncoder",
    "WSSSNetwork",
    "make_encoder",
]
