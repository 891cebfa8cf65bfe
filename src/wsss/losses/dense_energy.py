"""Dense energy loss: pixels alike in place and colour should be segmented alike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.losses.precision import full_precision
from wsss.pseudo.labels import IGNORE_INDEX
from wsss.resize import nearest, resize_small

#: Pixels a block holds at most. Smaller blocks leave out more pairs, larger ones cost fewer calls.
BLOCK = 256
#: Bytes of a tile of pairs. On a CPU it stays in the cache, elsewhere it keeps the device busy.
CPU_TILE, DEVICE_TILE = 2 * 2**20, 64 * 2**20


def dense_energy_loss(
    probabilities: Tensor,
    images: Tensor,
    label: Tensor,
    valid: Tensor,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
) -> Tensor:
    """Dense CRF energy of a soft segmentation, gated by its confidence.

    ::

        loss = -weight / B sum_ik S_ik g_i (K S)_ik
        K_ij = exp(-|p_i - p_j|^2 / (2 (scale sigma_xy)^2) - |x_i - x_j|^2 / (2 sigma_rgb^2))

    over the pixels of the downscaled images: S the probabilities, 0 outside the image; p the
    place; x the colour; g = 1 - max_k S_ik, or 1 where the label is 255. The sum over j includes
    j = i. Images, label and valid region are downscaled to ``floor(scale * size)`` by nearest,
    the probabilities resized to the same size bilinearly.

    **The gradient is the published one**, ``-2 weight / B g_i (K S)_ik`` by S_ik. It is not that
    of the value, which even with g constant would be ``-weight / B (g_i (K S)_ik + (K g S)_ik)``,
    so numerical differentiation does not confirm it. It is the gradient of the energy without a
    gate, times the gate: a certain pixel pulls at its unsure neighbours and is not pulled itself.

    **The weight.** K is summed exactly and not normalised. The published filter, a permutohedral
    lattice, comes to 0.53 to 0.59 of the exact sum (photographs of 112 x 112; the gradients' cosine
    is 0.996 or more): ``weight=5.7e-8`` pulls as hard as 1e-7 in published code.

    On its own the energy is lowest where one class has taken all: it belongs beside a loss that
    holds the segmentation to its labels.

    The loss is a mean over this rank's images: DDP, which averages gradients over ranks, arrives
    at that of the global batch when every rank has as many images.

    Time grows with the square of the number of valid pixels, memory does not: pairs are computed
    a tile at a time, and left out where they are too far apart to change the sum in the
    precision used.

    Args:
        probabilities: (B, C + 1, h, w) softmax output at any size; carries the gradient. Computed
            in float32, float64 stays.
        images: (B, 3, H, W) RGB from 0 to 255, uint8 or floating point.
        label: (B, H, W) integer pseudo-label, of which only 255 (undecided) matters.
        valid: (B, H, W) bool, False on padding.
        weight: factor of the loss; see above.
        sigma_rgb: width of the Gaussian over colours, on the scale of ``images``.
        sigma_xy: width of the Gaussian over places in pixels of ``images``.
        scale: factor for height and width, above 0 and at most 1.

    Returns:
        0-dimensional float tensor, at most 0; 0 with a zero gradient when no pixel is valid.

    Raises:
        ValueError: shapes do not fit together, or a width or the scale is out of range.

    Source: Tang et al., On Regularized Losses for Weakly-supervised CNN Segmentation (ECCV
    2018), with the gate of Zhang et al., Reliability Does Matter (AAAI 2020).
    """
    _check(probabilities, images, label, valid, sigma_rgb, sigma_xy, scale)
    height, width = (max(1, math.floor(side * scale)) for side in label.shape[-2:])
    if probabilities.dtype != torch.float64:
        probabilities = probabilities.float()
    segmentation = resize_small(probabilities, height, width)
    label = nearest(label, height, width)
    valid = nearest(valid, height, width)
    segmentation = segmentation.masked_fill(~valid[:, None], 0)
    with torch.no_grad(), full_precision(segmentation.device):
        colours = nearest(images, height, width).to(segmentation.dtype)
        gate = (1 - segmentation.amax(1)).clamp(min=0)
        gate = gate.masked_fill(label == IGNORE_INDEX, 1).masked_fill(~valid, 0)
        pull = torch.zeros_like(segmentation)
        for n in range(len(images)):
            features = _features(colours[n], sigma_rgb, sigma_xy * scale)
            values = segmentation[n].flatten(1).T
            # Two lists, as a pixel that is certain still pulls and is not pulled.
            sources = valid[n].flatten().nonzero()[:, 0]
            targets = gate[n].flatten().nonzero()[:, 0]
            pulled = gaussian_sum(features[targets], features[sources], values[sources])
            pull[n].view(len(pull[n]), -1)[:, targets] = pulled.T
        pull *= gate[:, None]
    energy = (segmentation * pull).sum()
    # Value: -energy. Gradient: that of -2 energy, with ``pull`` constant.
    return -weight / len(images) * (2 * energy - energy.detach())


def gaussian_sum(targets: Tensor, sources: Tensor, values: Tensor) -> Tensor:
    """``sum_j 2^(-|targets_i - sources_j|^2) values_j``, to rounding, a tile at a time.

    Both sides are cut into blocks of near features. Pairs of blocks so far apart that all they
    could add stays below the rounding error of a sum of 1 are left out: in a photograph that is
    about half of them.

    Args:
        targets: (N, D).
        sources: (M, D).
        values: (M, K), from 0 to 1.

    Returns:
        (N, K).
    """
    if not len(targets) or not len(sources):
        return values.new_zeros(len(targets), values.shape[1])
    target_rows, source_rows = _blocks(targets), _blocks(sources)
    result = values.new_zeros(target_rows.numel(), values.shape[1])
    number = len(targets)
    targets = targets[target_rows.clamp(max=number - 1)]
    # Filler rows have values of 0.
    values = F.pad(values, (0, 0, 0, source_rows.numel() - len(values)))[source_rows]
    sources = sources[source_rows.clamp(max=len(sources) - 1)]

    near = _near(targets, sources)
    near_sources = near.nonzero()[:, 1].split(near.sum(1).tolist())
    tile_bytes = CPU_TILE if values.device.type == "cpu" else DEVICE_TILE
    pairs = targets.shape[1] * sources.shape[1]
    step = max(1, tile_bytes // (pairs * values.element_size()))
    for rows, block, chosen in zip(target_rows, targets, near_sources, strict=True):
        # From the block's centre: in |a|^2 + |b|^2 - 2 ab large squares would cancel badly.
        centre = block.mean(0)
        a = block - centre
        left = torch.cat([2 * a, -_square(a), -torch.ones_like(a[:, :1])], 1)
        total = values.new_zeros(len(a), values.shape[-1])
        for some in chosen.split(step):
            b = sources[some].flatten(0, 1) - centre
            right = torch.cat([b, torch.ones_like(b[:, :1]), _square(b)], 1)
            # exp2, as exp on a CPU is four times slower, and fifty times where it underflows;
            # never so small as to be denormal, which makes the product ten times slower.
            kernel = (left @ right.T).clamp_(min=-100).exp2_()
            total.addmm_(kernel, values[some].flatten(0, 1))
        result[rows] = total
    return result[:number]


def _blocks(features: Tensor) -> Tensor:
    """Rows of (N, D) features in equal blocks of at most ``BLOCK``, each near in itself.

    Halved at the median of the widest axis until small enough: a k-d tree, all nodes of a level
    at once.

    Returns:
        (blocks, size) int64; numbers from N on are filler and stand where row N - 1 does.
    """
    number = len(features)
    levels = max(0, math.ceil(math.log2(number / BLOCK)))
    size = -(-number // 2**levels)
    rows = torch.arange(size * 2**levels, device=features.device)[None]
    for _ in range(levels):
        nodes = features[rows.clamp(max=number - 1)]
        widest = (nodes.amax(1) - nodes.amin(1)).argmax(1)
        along = nodes.gather(2, widest[:, None, None].expand(-1, nodes.shape[1], 1))[..., 0]
        rows = rows.gather(1, along.argsort(1)).view(2 * len(rows), -1)
    return rows


def _near(targets: Tensor, sources: Tensor) -> Tensor:
    """(blocks, blocks) bool: may any pair of (blocks, size, D) targets and sources matter?

    No where the boxes around two blocks are so far apart that all sources at that distance
    together add less than the rounding error of 1.
    """
    gap = torch.maximum(
        targets.amin(1)[:, None] - sources.amax(1), sources.amin(1) - targets.amax(1)[:, None]
    )
    reach = math.log2(sources.shape[0] * sources.shape[1] / torch.finfo(sources.dtype).eps)
    return gap.clamp(min=0).square().sum(-1) < reach


def _square(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True)


def _features(colours: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """(H W, 5) positions whose kernel is ``2^(-distance^2)``, of a (3, H, W) image."""
    height, width = colours.shape[-2:]
    y = torch.arange(height, device=colours.device, dtype=colours.dtype)[:, None]
    x = torch.arange(width, device=colours.device, dtype=colours.dtype)
    place = torch.stack([y.expand(height, width), x.expand(height, width)]) / sigma_xy
    return torch.cat([place, colours / sigma_rgb]).flatten(1).T * math.sqrt(0.5 / math.log(2))


def _check(
    probabilities: Tensor,
    images: Tensor,
    label: Tensor,
    valid: Tensor,
    sigma_rgb: float,
    sigma_xy: float,
    scale: float,
) -> None:
    if probabilities.dim() != 4 or label.dim() != 3 or len(probabilities) != len(label):
        raise ValueError(
            f"probabilities of shape {tuple(probabilities.shape)} and a label of shape "
            f"{tuple(label.shape)}: they must be (B, C + 1, h, w) and (B, H, W)."
        )
    expected = (len(label), 3, *label.shape[1:])
    if tuple(images.shape) != expected or valid.shape != label.shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)} and valid of shape {tuple(valid.shape)}: a "
            f"label of {tuple(label.shape)} needs {expected} and {tuple(label.shape)}."
        )
    check_energy(sigma_rgb, sigma_xy, scale)


def check_energy(sigma_rgb: float, sigma_xy: float, scale: float) -> None:
    """For constructors: raise a ValueError unless :func:`dense_energy_loss` takes these."""
    if not (sigma_rgb > 0 and sigma_xy > 0 and 0 < scale <= 1):
        raise ValueError(
            f"dense energy's sigma_rgb {sigma_rgb}, sigma_xy {sigma_xy}, scale {scale}: the widths "
            "must be above 0, the scale above 0 and at most 1."
        )
