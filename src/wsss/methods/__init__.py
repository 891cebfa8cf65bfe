"""Methods: one LightningModule a file."""

from wsss.methods.cam import CAM
from wsss.methods.cosa import CoSA
from wsss.methods.supervised import Supervised

__all__ = ["CAM", "CoSA", "Supervised"]
