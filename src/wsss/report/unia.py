"""UniA as pictures: uncertainty, affinity between positions, and the labels made of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.addons import Affinity
from wsss.methods.base import Method
from wsss.methods.unia import UniA
from wsss.nn import UncertaintyNeck, WSSSNetwork
from wsss.nn.attention import Blocks, choose_blocks, keep_attention
from wsss.nn.neck import min_max
from wsss.nn.network import between_patches, evaluating
from wsss.pseudo import MutualLabels, MutualRefinement, symmetric_affinity


@torch.no_grad()
def uncertainty_map(network: WSSSNetwork, images: Tensor) -> Tensor:
    """How uncertain a network is where: U of its neck, mean over the channels.

    Args:
        network: with an :class:`~wsss.nn.UncertaintyNeck`; its mode is evaluation meanwhile.
        images: (B, 3, H, W) RGB in [0, 1].

    Returns:
        (B, H, W) in [0, 1].

    Raises:
        ValueError: no uncertainty is inferred.
    """
    with evaluating(network):
        neck = network(images, decode=False).neck
    if neck is None or neck.uncertainty is None:
        raise ValueError("the network infers no uncertainty: choose neck=uncertainty.")
    mean = neck.uncertainty.float().mean(1, keepdim=True)
    size = (images.shape[-2], images.shape[-1])
    return F.interpolate(mean, size=size, mode="bilinear", align_corners=False)[:, 0]


@torch.no_grad()
def attention_of(
    network: WSSSNetwork, images: Tensor, blocks: Blocks = "all"
) -> tuple[Tensor, tuple[int, int]]:
    """Attention between the positions of the grid, mean over heads and chosen blocks.

    Args:
        network: with a plain ViT; its mode is evaluation meanwhile.
        images: (B, 3, H, W) RGB in [0, 1].
        blocks: numbers, from the end where negative, or "all".

    Returns:
        (B, N, N), rows attend to columns, and the grid h and w, N = h w. Its rows sum to less than
        1: the rest goes to class tokens.

    Raises:
        UserError: an encoder without attention or without such a block.
    """
    with (
        evaluating(network),
        keep_attention(network.encoder, choose_blocks(network.encoder, blocks)) as kept,
    ):
        cam = network(images, decode=False).cam
    grid = (cam.shape[-2], cam.shape[-1])
    attention = between_patches(kept, grid[0] * grid[1])
    assert attention is not None
    return attention, grid


def affinity_of(
    network: WSSSNetwork, images: Tensor, blocks: Blocks = "all"
) -> tuple[Tensor, tuple[int, int]]:
    """Affinity between the positions of the grid (UniA, eq. 11), and the grid.

    Args and raised errors as of :func:`attention_of`.

    Returns:
        (B, N, N), symmetric, rows and columns sum to 1; and h and w, N = h w.
    """
    attention, grid = attention_of(network, images, blocks)
    return symmetric_affinity(attention), grid


def mutual_labels(
    network: WSSSNetwork,
    images: Tensor,
    activations: Tensor,
    labels: Tensor,
    refinement: MutualRefinement | None = None,
    blocks: Blocks = "all",
) -> MutualLabels:
    """P1, P2, P3 and P of images (UniA, eq. 12 to 15), by the network's own affinity.

    Args:
        network: as in :func:`attention_of`.
        images: (B, 3, H, W) RGB in [0, 1].
        activations: (B, C, H', W') in [0, 1], absent classes 0.
        labels: (B, C) 0/1.
        refinement: thresholds and random walk; None: the published ones.
        blocks: as in :func:`attention_of`.
    """
    affinity, grid = affinity_of(network, images, blocks)
    refine = MutualRefinement() if refinement is None else refinement
    return refine(activations, affinity, grid, images, labels)


def extra_maps(
    method: Method, network: WSSSNetwork, images: Tensor, activations: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What pictures show of UniA's parts, as far as a method has them.

    Args:
        method: says whether labels are refined by affinity, and how.
        network: the one to look at.
        images: (B, 3, H, W) RGB in [0, 1].
        activations: (B, C, H, W) in [0, 1], absent classes 0.
        labels: (B, C) 0/1.

    Returns:
        Maps (B, H, W) in [0, 1]: ``uncertainty``, each image's from its most to its least certain
        position; and label maps (B, H, W): ``P1``, ``P2``, ``P3``, ``P``.
    """
    maps: dict[str, Tensor] = {}
    if isinstance(network.neck, UncertaintyNeck):
        # A mean over channels keeps to a small part of [0, 1].
        maps["uncertainty"] = min_max(uncertainty_map(network, images), (1, 2))
    refinement = refinement_of(method)
    if refinement is None:
        return maps, {}
    found = mutual_labels(
        network, images, activations, labels, refinement, method.network.kept_blocks
    )
    return maps, dict(zip(("P1", "P2", "P3", "P"), found, strict=True))


def refinement_of(method: Method) -> MutualRefinement | None:
    """How a method or an add-on of it refines labels by affinity; None where neither does."""
    if isinstance(method, UniA) and method.refine == "mutual":
        return method.refinement  # the add-on takes its label
    for addon in method.addons.values():
        if isinstance(addon, Affinity):
            return addon.refinement
    return None
