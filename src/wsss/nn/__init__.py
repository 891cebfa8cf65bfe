"""Networks: an encoder, classifiers and a segmentation decoder as one module."""

from wsss.nn.cnn import CNNEncoder
from wsss.nn.decoder import LargeFOV
from wsss.nn.encoder import ViTEncoder
from wsss.nn.encoders import SavedEncoder, make_encoder
from wsss.nn.neck import NeckOutput, UncertaintyNeck
from wsss.nn.network import NetworkOutput, WSSSNetwork
from wsss.nn.resnet38 import ResNet38Encoder
from wsss.nn.stage_decoders import DeepLabV3Plus, UPerNet

__all__ = [
    "CNNEncoder",
    "DeepLabV3Plus",
    "LargeFOV",
    "NeckOutput",
    "NetworkOutput",
    "ResNet38Encoder",
    "SavedEncoder",
    "UPerNet",
    "UncertaintyNeck",
    "ViTEncoder",
    "WSSSNetwork",
    "make_encoder",
]
