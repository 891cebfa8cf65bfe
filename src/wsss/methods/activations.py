"""Activations of the network that is being trained, for methods without a second one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsss.nn import WSSSNetwork
from wsss.nn.network import evaluating
from wsss.pseudo import MultiScaleOutput, multi_scale


@torch.no_grad()
def own_activations(
    network: WSSSNetwork, images: Tensor, scales: Sequence[float], labels: Tensor
) -> MultiScaleOutput:
    """CAMs of a network in training, fused over scales and flips, absent classes 0.

    Its mode is evaluation meanwhile: the statistics of batch norms see the trained view alone.
    """
    with evaluating(network):
        return multi_scale(network, images, scales, labels=labels, decode=False)
