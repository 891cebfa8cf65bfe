"""Affinity of attention, and labels refined by it (UniA, eq. 11 to 15)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsss.pseudo.labels import IGNORE_INDEX

#: Smaller attention counts as this: every matrix then has a doubly stochastic scaling, and the
#: derivative of its logarithm stays bounded.
FLOOR = 1e-12
#: Iterations between two looks at the row sums. A look makes the host wait for the device.
CHECK_EVERY = 5


def sinkhorn(attention: Tensor, tolerance: float = 1e-4, max_iterations: int = 100) -> Tensor:
    """Scale rows and columns of a matrix until it is doubly stochastic (Sinkhorn, 1964).

    An iteration divides the rows by their sums and then the columns, in the log domain. Every 5
    iterations an image stops once all its row sums are within ``tolerance`` of 1 (its columns sum
    to 1 by construction); images do not change each other's result. The host waits for the device
    only at these looks, so at most ``max_iterations / 5`` times.

    The gradient is that of the iterations done, exactly; it needs their (B, N) scalings, not
    their matrices. There is no second derivative.

    Args:
        attention: (B, N, N) non-negative, rows need not sum to 1. Entries below 1e-12, negative
            ones too, count as 1e-12 and get no gradient: a row or a column of zeros is taken as
            constant.
        tolerance: see above; 0 does all iterations.
        max_iterations: more are not done, whatever the row sums.

    Returns:
        (B, N, N) float32, also under autocast; float64 for float64 attention.

    Raises:
        ValueError: not a batch of square matrices, or an option out of range.

    Example:
        >>> sinkhorn(torch.tensor([[[0.9, 0.1], [0.9, 0.1]]]))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    if attention.dim() != 3 or attention.shape[1] != attention.shape[2]:
        raise ValueError(f"attention {tuple(attention.shape)}: expected (B, N, N).")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: give 0 or more.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations}: give 1 or more.")
    if attention.dtype != torch.float64:
        attention = attention.float()
    logs = attention.clamp(min=FLOOR).log()
    doubly_stochastic: Tensor = _Sinkhorn.apply(logs, tolerance, max_iterations)
    return doubly_stochastic


class _Sinkhorn(torch.autograd.Function):
    """exp(L + f + g) with f and g of the iterations f = -logsumexp_j(L + g), g the same over i.

    Autograd alone would keep two (B, N, N) matrices an iteration: 2 GB for 100 iterations of four
    images of 28 x 28 tokens.
    """

    @staticmethod
    def forward(ctx: Any, logs: Tensor, tolerance: float, max_iterations: int) -> Tensor:
        images, count, _ = logs.shape
        f = g = logs.new_zeros(images, count)
        active = torch.ones(images, 1, dtype=torch.bool, device=logs.device)
        history = []
        for iteration in range(1, max_iterations + 1):
            before = g
            f = torch.where(active, -torch.logsumexp(logs + g[:, None, :], dim=2), f)
            g = torch.where(active, -torch.logsumexp(logs + f[:, :, None], dim=1), g)
            history += [before, f, g, active]
            if iteration % CHECK_EVERY == 0 and iteration < max_iterations and tolerance > 0:
                error = (_scaled(logs, f, g).sum(2) - 1).abs().amax(1, keepdim=True)
                active = active & ~(error <= tolerance)
                if not active.any():
                    break
        ctx.save_for_backward(logs, *history)
        return _scaled(logs, f, g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logs, *history = ctx.saved_tensors
        _, f, g, _ = history[-4:]
        grad_logs = grad * _scaled(logs, f, g)
        grad_f, grad_g = grad_logs.sum(2), grad_logs.sum(1)
        for start in range(len(history) - 4, -1, -4):
            before, f, g, active = history[start : start + 4]
            # d logsumexp_i(L + f) = sum_i softmax_i d(L + f), and the softmax is exp(L + f + g);
            # an image that had stopped hands its gradients on unchanged.
            step = _scaled(logs, f, g) * (grad_g * active)[:, None, :]
            grad_logs -= step
            grad_f = grad_f - step.sum(2)
            step = _scaled(logs, f, before) * (grad_f * active)[:, :, None]
            grad_logs -= step
            grad_f = torch.where(active, 0, grad_f)
            grad_g = torch.where(active, -step.sum(1), grad_g)
        return grad_logs, None, None


def _scaled(logs: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return (logs + f[:, :, None]).add_(g[:, None, :]).exp_()


def symmetric_affinity(
    attention: Tensor, tolerance: float = 1e-4, max_iterations: int = 100
) -> Tensor:
    """Affinity of attention (UniA, eq. 11): ``(M + M^T) / 2``, M its Sinkhorn normalisation.

    Args:
        attention: (B, N, N) of the positions of the grid, without class token.
        tolerance, max_iterations: see :func:`sinkhorn`.

    Returns:
        (B, N, N) float32, float64 for float64 attention; symmetric, rows and columns sum to 1.

    Raises:
        ValueError: see :func:`sinkhorn`.
    """
    doubly_stochastic = sinkhorn(attention, tolerance, max_iterations)
    return (doubly_stochastic + doubly_stochastic.transpose(1, 2)) / 2


def random_walk(cam: Tensor, affinity: Tensor, power: float = 2.0, iterations: int = 1) -> Tensor:
    """Spread class activations along an affinity, as AffinityNet does.

    The transition matrix is the elementwise ``affinity ** power``, its rows divided by their sums;
    a step replaces every activation by the mean of all, weighted by its row. Defaults are those of
    AFA, whose affinity also comes from attention: power 2, one step. AffinityNet takes power 8 and
    256 steps, for affinities near 1 inside an object and only of neighbours; attention knows
    all pairs, so that more steps soon make a map constant.

    Args:
        cam: (B, C, h, w), a channel for the background among them if there is to be one.
        affinity: (B, h w, h w) non-negative. A row of zeros makes its position 0.
        power: beta; higher leaves less to weak affinities.
        iterations: t, the number of steps.

    Returns:
        (B, C, h, w) float32, also under autocast; float64 if both are. Gradient to both.

    Raises:
        ValueError: shapes do not fit together, ``power`` not positive, or ``iterations`` below 0.
    """
    images, count = cam.shape[0], cam.shape[2:].numel()
    if cam.dim() != 4 or affinity.shape != (images, count, count):
        raise ValueError(
            f"cam {tuple(cam.shape)} and affinity {tuple(affinity.shape)}: expected (B, C, h, w) "
            "and (B, N, N) with N = h * w."
        )
    if power <= 0:
        raise ValueError(f"power={power}: give a positive number.")
    if iterations < 0:
        raise ValueError(f"iterations={iterations}: give 0 or more.")
    both_double = cam.dtype == affinity.dtype == torch.float64
    dtype = torch.float64 if both_double else torch.float32
    affinity, values = affinity.to(dtype), cam.to(dtype).flatten(2)
    # The factor of a row cancels; without it 1 / N to the power 16 would be 0 in float32.
    largest = affinity.detach().amax(2, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    transition = (affinity / largest) ** power
    transition = transition / transition.sum(2, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    with torch.autocast(cam.device.type, enabled=False):
        for _ in range(iterations):
            values = values @ transition.transpose(1, 2)
    return values.view(cam.shape)


def mutual_complement(p1: Tensor, p2: Tensor, p3: Tensor) -> Tensor:
    """Mutual complementing refinement of three pseudo-labels (UniA, eq. 12 to 15).

    Where ``p3`` is background or undecided and ``p2`` a class, take ``p2``; then, where ``p1`` and
    ``p2`` are the same class, take that. Elsewhere ``p3`` stays.

    Eq. 14 as printed also takes ``p1 = p2 = 255``, which eq. 15 would add to the label; only
    classes are meant (the text: "the true positives in both").

    Args:
        p1: label of the reweighted CAM; int64, 0 background, 1..C, 255; any shape.
        p2: label of the reweighted CAM after pixel-adaptive refinement.
        p3: label of the CAM after the random walk.

    Returns:
        The refined label P, in the shape and type of ``p3``.

    Raises:
        ValueError: the shapes differ.
    """
    if not p1.shape == p2.shape == p3.shape:
        raise ValueError(
            f"p1 {tuple(p1.shape)}, p2 {tuple(p2.shape)}, p3 {tuple(p3.shape)}: the shapes differ."
        )
    completed = torch.where(_is_class(p2) & ~_is_class(p3), p2, p3)
    return torch.where((p1 == p2) & _is_class(p1), p1, completed)


def _is_class(label: Tensor) -> Tensor:
    return (label != 0) & (label != IGNORE_INDEX)
