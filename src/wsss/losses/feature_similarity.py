"""Feature similarity loss: class maps should change where colours do, and only there."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsss.losses.max_norm import max_norm
from wsss.losses.precision import full_precision

GATES = ("max_norm", "binomial", "multinomial", "none")

#: Keeps the logarithm finite, as published.
EPSILON = 1e-5
#: Bytes of a tile of pairs. On a CPU it stays in the cache, elsewhere it keeps the device busy.
CPU_TILE, DEVICE_TILE = 2**20, 16 * 2**20


def feature_similarity_loss(
    scores: Tensor,
    images: Tensor,
    labels: Tensor | None = None,
    mu: float = 2.5,
    sigma: float = 5.0,
    gate: str = "max_norm",
    window: int | None = None,
    background: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Reward differences of class maps across edges of the image, punish others (FSL, eq. 9 to 13).

    ::

        loss = -1 / (H W) sum_ij w_ij f_ij 1/2 |r_i - r_j|^2
        w_ij = exp(-|p_i - p_j|^2 / (2 sigma^2)) / (2 pi sigma^2)
        f_ij = tanh(mu + log((d_ij + 1e-5) / (1 - d_ij + 1e-5))),  d_ij = |x_i - x_j|_1 / 3

    over all ordered pairs of pixels of an image; p the place, x the colour, H W the number of
    pixels, without padding. r are the predictions, one channel a class: those of classes that
    are not in the image are 0. ``gate`` makes them from the scores:

    - "max_norm": relu, minus the minimum and 1e-5 (not below 0), over maximum - minimum + 1e-5 of
      the image and channel (eq. 4, as published); gradient through maximum and minimum too.
    - "binomial": the sigmoid (eq. 14).
    - "multinomial": the softmax over the classes and a background of score 0 (eq. 5).
    - "none": the scores are predictions already.

    The gradient flows through r alone. Time grows with the number of pairs, memory does not: as
    ``w f`` is symmetric, the sum is ``r^T (D - A) r`` with ``A = w f`` and D its row sums, whose
    gradient is ``2 (D - A) r``. Value and gradient come from one pass over tiles of A, each
    unordered pair once. There is no second derivative.

    Args:
        scores: (B, C, h, w) logits of the classes; carries the gradient. Computed in float32,
            float64 stays.
        images: (B, 3, h, w) floating-point RGB from 0 to 1, clamped to that range.
        labels: (B, C), 0 for classes that are not in the image; None: all are.
        mu: offset of the dissimilarity; pixels with a d above ``1 / (1 + exp(mu))`` are dissimilar.
        sigma: width of the Gaussian over places, in pixels of ``scores``.
        gate: see above.
        window: take only pairs at most so many pixels apart in height and in width; None takes
            all. The pairs left out by ``ceil(3 sigma)`` hold 0.4 % of the weights for
            sigma 5, less than 0.6 % for any.
        background: a further channel of r, ``1 - max_c r_c`` (published with SEAM); with
            "multinomial" its own posterior of the background.
        valid: (B, h, w) bool, False on padding, which has no say; None: no padding.

    Returns:
        0-dimensional float tensor, mean over images; 0 with a zero gradient where no class is
        present or no pixel valid.

    Raises:
        ValueError: shapes do not fit together, or an option is out of range.

    Source: Jonnarth, Zhang, Felsberg, High-fidelity Pseudo-labels for Boosting
    Weakly-Supervised Segmentation (WACV 2024).
    """
    _check(scores, images, labels, sigma, gate, window, valid)
    if scores.dtype != torch.float64:
        scores = scores.float()
    if valid is None:
        valid = torch.ones_like(images[:, 0], dtype=torch.bool)
    images = images.detach().to(scores.dtype).clamp(0, 1).masked_fill(~valid[:, None], 0)
    scores = scores.masked_fill(~valid[:, None], 0)
    r = _predictions(scores, labels, gate, background, valid)
    radius = max(scores.shape[2:]) if window is None else window
    loss: Tensor = _PairSum.apply(r, images, valid, mu, sigma, radius)
    return loss


def _predictions(
    scores: Tensor, labels: Tensor | None, gate: str, background: bool, valid: Tensor
) -> Tensor:
    """(B, channels, h, w) that the gate compares."""
    rest = None
    if gate == "multinomial":
        rest, scores = F.pad(scores, (0, 0, 0, 0, 1, 0)).softmax(1).tensor_split([1], 1)
    if labels is not None:
        absent = labels == 0
        if scores.device.type == "cpu":
            # Most classes are in no image. Elsewhere their channels cost less than to wait for
            # the number of those that are.
            most = max(1, int((~absent).sum(1).max()))
            kept = absent.int().argsort(1)[:, :most]
            scores, absent = scores.take_along_dim(kept[..., None, None], 1), absent.gather(1, kept)
    if gate == "max_norm":
        scores = max_norm(scores, valid)
    elif gate == "binomial":
        scores = scores.sigmoid()
    if labels is not None:
        scores = scores.masked_fill(absent[..., None, None], 0)
    if not background:
        return scores
    if rest is None:
        rest = 1 - scores.amax(1, keepdim=True)
    return torch.cat([scores, rest], 1)


class _PairSum(torch.autograd.Function):
    """``-1/(H W) r^T (D - A) r``, mean over images, with the gradient found on the way."""

    @staticmethod
    def forward(
        ctx: Any, r: Tensor, images: Tensor, valid: Tensor, mu: float, sigma: float, radius: int
    ) -> Tensor:
        inside = valid[:, None].to(r.dtype)
        number = inside.sum((2, 3), keepdim=True).clamp(min=1)
        # Differences alone matter. Around its mean a map of nearly one value keeps its digits.
        r = (r - (r * inside).sum((2, 3), keepdim=True) / number) * inside
        with full_precision(r.device):
            # A further channel of ones makes the row sums of A.
            sums = _multiply(torch.cat([r, inside], 1), images, mu, sigma, radius)
        # Not 0 at padding, which makes no difference: r is 0 there, and scores were overwritten.
        field = (r * sums[:, -1:]).sub_(sums[:, :-1]).div_(-len(r) * number)
        ctx.save_for_backward(field)
        return (r * field).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (field,) = ctx.saved_tensors
        return 2 * gradient * field, None, None, None, None, None


def _multiply(x: Tensor, images: Tensor, mu: float, sigma: float, radius: int) -> Tensor:
    """``A x`` of (B, K, h, w) without A_ii: tiles of pairs of a pixel and one after it.

    A tile is a block of target pixels by the rectangle of all sources within its reach, below or
    to the right; it is multiplied from both sides.
    """
    result = torch.zeros_like(x)
    height, width = x.shape[2:]
    rows, columns = _tile(x, radius)
    colours = images / 3  # so that absolute differences add up to d
    for left in range(0, width, columns):
        across = slice(left, min(left + columns, width))
        reach = slice(max(0, left - radius), min(across.stop + radius, width))
        all_weights = _weights(rows, across, reach, sigma, radius, height, x)
        for top in range(0, height, rows):
            down = slice(top, min(top + rows, height))
            below = slice(top, min(down.stop + radius, height))
            weights = all_weights[: down.stop - top, :, : below.stop - top]
            weights = weights.flatten(2).flatten(0, 1)
            targets, sources = (..., down, across), (..., below, reach)
            a = _dissimilarity(
                colours[targets].flatten(2), colours[sources].flatten(2), mu, weights
            )
            from_sources = x[sources].flatten(2) @ a.mT
            from_targets = x[targets].flatten(2) @ a
            result[targets] += from_sources.view_as(x[targets])
            result[sources] += from_targets.view_as(x[sources])
    return result


def _dissimilarity(targets: Tensor, sources: Tensor, mu: float, weights: Tensor) -> Tensor:
    """(B, T, S) of ``w f`` from (B, 3, T) and (B, 3, S) colours over 3 and (T, S) weights.

    ``tanh(mu + log q) = 1 - 2 / (1 + (e^mu q)^2)``: no tanh, no logarithm. Everything in place.
    """
    d: Tensor | None = None
    for t, s in zip(targets.unbind(1), sources.unbind(1), strict=True):
        difference = (t[:, :, None] - s[:, None]).abs_()
        d = difference if d is None else d.add_(difference)
    assert d is not None
    similar = (1 + EPSILON) - d
    q = d.add_(EPSILON).div_(similar).mul_(math.exp(mu))
    ratio = q.square_().add_(1)
    return torch.addcdiv(weights, weights, ratio, value=-2, out=similar)


def _weights(
    rows: int, across: slice, reach: slice, sigma: float, radius: int, height: int, like: Tensor
) -> Tensor:
    """(rows, columns, source rows, source columns) Gaussian weights w of a tile.

    0 outside the window, and for sources that do not come after the target.
    """

    def gaussian(distance: Tensor) -> Tensor:
        near = distance.abs() <= radius
        return near * (-(distance.to(like.dtype) / sigma).square() / 2).exp()

    def steps(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=like.device)

    y = steps(0, min(rows + radius, height)) - steps(0, rows)[:, None]
    x = steps(reach.start, reach.stop) - steps(across.start, across.stop)[:, None]
    below, same = gaussian(y) * (y > 0), (y == 0).to(like.dtype)
    beside, right = gaussian(x), gaussian(x) * (x > 0)
    weights = below[:, None, :, None] * beside[:, None, :] + same[:, None, :, None] * right[:, None]
    return weights / (2 * math.pi * sigma**2)


def _tile(x: Tensor, radius: int) -> tuple[int, int]:
    """Rows and columns of a block of targets whose tile of pairs is about as large as allowed."""
    height, width = x.shape[2:]
    tile_bytes = CPU_TILE if x.device.type == "cpu" else DEVICE_TILE
    pairs = tile_bytes // (x.element_size() * len(x))

    def size(rows: int, columns: int) -> int:
        sources = min(height, rows + radius) * min(width, columns + 2 * radius)
        return rows * columns * sources

    rows, columns = 1, min(width, 2 * radius)
    # Not fewer targets than channels, or copying the channels of the sources would cost the most.
    while columns > x.shape[1] and size(rows, columns) > pairs:
        columns = -(-columns // 2)
    while rows < height and size(rows + 1, columns) <= pairs:
        rows += 1
    return rows, columns


def _check(
    scores: Tensor,
    images: Tensor,
    labels: Tensor | None,
    sigma: float,
    gate: str,
    window: int | None,
    valid: Tensor | None,
) -> None:
    if scores.dim() != 4 or images.shape != (len(scores), 3, *scores.shape[2:]):
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and images of shape {tuple(images.shape)}: "
            "they must be (B, C, h, w) and (B, 3, h, w), so resize one to the other."
        )
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}: they must be floating point, from 0 to 1.")
    if labels is not None and labels.shape != scores.shape[:2]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}: scores of {tuple(scores.shape)} need "
            f"{tuple(scores.shape[:2])}."
        )
    if valid is not None and valid.shape != (len(scores), *scores.shape[2:]):
        raise ValueError(
            f"valid of shape {tuple(valid.shape)}: scores of {tuple(scores.shape)} need "
            f"{(len(scores), *scores.shape[2:])}."
        )
    if gate not in GATES:
        raise ValueError(f'gate "{gate}": it must be one of {", ".join(GATES)}.')
    if not sigma > 0 or (window is not None and window < 1):
        raise ValueError(f"sigma {sigma}, window {window}: above 0, and None or at least 1.")
