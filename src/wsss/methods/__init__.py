"""Methods: one LightningModule a file."""

from wsss.methods.affinity_net import AffinityNet
from wsss.methods.cam import CAM
from wsss.methods.cosa import CoSA
from wsss.methods.mctformer import MCTformer
from wsss.methods.seam import SEAM
from wsss.methods.spatial_bce import SpatialBCE
from wsss.methods.supervised import Supervised
from wsss.methods.unia import UniA

__all__ = [
    "CAM",
    "SEAM",
    "AffinityNet",
    "CoSA",
    "MCTformer",
    "SpatialBCE",
    "Supervised",
    "UniA",
]
