"""UniA's uncertainty inference network and distribution loss in loops (eq. 3 to 10).

Features are float64 tensors, parameters a dict of float64 tensors by name; a position is handled
at a time, as a small vector of its channels. Outputs are tensors that autograd can differentiate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def _linear(parameters: Parameters, name: str, vector: Tensor) -> Tensor:
    out = parameters[f"{name}.weight"] @ vector
    return out + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else out


def prototypes(features: Tensor, window: int) -> list[Tensor]:
    """Eq. 4: the largest value of each channel in each window of one image (D, h, w)."""
    dim, height, width = features.shape
    out = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            largest = []
            for d in range(dim):
                inside = [
                    features[d, y, x]
                    for y in range(top, min(top + window, height))
                    for x in range(left, min(left + window, width))
                ]
                largest.append(max(inside, key=Tensor.item))
            out.append(torch.stack(largest))
    return out


def attend(
    parameters: Parameters, name: str, tokens: list[Tensor], sources: list[Tensor]
) -> list[Tensor]:
    """Eq. 5 and 10: each token's mean of the sources' values, softmax of q k / sqrt(D)."""
    keys = [_linear(parameters, f"{name}.key", source) for source in sources]
    values = [_linear(parameters, f"{name}.value", source) for source in sources]
    out = []
    for token in tokens:
        query = _linear(parameters, f"{name}.query", token)
        scores = [(query * key).sum() / math.sqrt(len(token)) for key in keys]
        top = max(score.item() for score in scores)
        weights = [torch.exp(score - top) for score in scores]
        whole = sum(weights)
        out.append(sum(w / whole * v for w, v in zip(weights, values, strict=True)))
    return out  # type: ignore[return-value]


def _maps(vectors: list[Tensor], height: int, width: int) -> Tensor:
    """(D, h, w) of the vectors of all positions in reading order."""
    rows = [torch.stack(vectors[y * width : (y + 1) * width], 1) for y in range(height)]
    return torch.stack(rows, 1)


def uncertainty(sigma: Tensor, scale: str) -> Tensor:
    """Min-max of one image's (D, h, w) over everything ("image") or for each channel."""
    groups = [sigma.flatten()] if scale == "image" else [channel.flatten() for channel in sigma]
    scaled = []
    for group in groups:
        low, high = min(group, key=Tensor.item), max(group, key=Tensor.item)
        if high.item() - low.item() <= 1e-5:
            scaled.append(group * 0.0)
        else:
            scaled.append(torch.stack([(value - low) / (high - low) for value in group]))
    return torch.cat(scaled).view(sigma.shape)


def neck(
    features: Tensor,
    parameters: Parameters,
    window: int,
    channel: bool,
    spatial: bool,
    scale: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Z_f, mu, sigma, U of features (B, D, h, w)."""
    images, dim, height, width = features.shape
    results: list[list[Tensor]] = [[], [], [], []]
    for b in range(images):
        tokens = [features[b, :, y, x] for y in range(height) for x in range(width)]
        windows = prototypes(features[b], window)
        parts = {}
        for part in ("mu", "sigma"):
            raw = [token * 0.0 for token in tokens]
            if channel:
                factor = parameters[f"channel_{part}.weight"]
                offset = parameters[f"channel_{part}.bias"]
                raw = [
                    r + torch.stack([factor[d] * token[d] + offset[d] for d in range(dim)])
                    for r, token in zip(raw, tokens, strict=True)
                ]
            if spatial:
                attended = attend(parameters, f"spatial_{part}", tokens, windows)
                raw = [r + a for r, a in zip(raw, attended, strict=True)]
            parts[part] = _maps(raw, height, width)
        # softplus, moved so that 0 becomes 1: e^x (e - 1) under 1 + .
        sigma = torch.log(1 + torch.exp(parts["sigma"]) * (math.e - 1))
        u = uncertainty(sigma, scale)
        certain = [
            (1 - u[:, y, x]) * features[b, :, y, x] for y in range(height) for x in range(width)
        ]
        final = _maps(attend(parameters, "masking", tokens, certain), height, width)
        for result, value in zip(results, (final, parts["mu"], sigma, u), strict=True):
            result.append(value)
    return tuple(torch.stack(result) for result in results)  # type: ignore[return-value]


def foreground(cam: Tensor, threshold: float) -> list[list[list[int]]]:
    """Eq. 8: M_re = M_CAM where that is above the threshold, then 1 where any class is left."""
    images, classes, height, width = cam.shape
    return [
        [
            [
                int(any(cam[b, c, y, x].item() > threshold for c in range(classes)))
                for x in range(width)
            ]
            for y in range(height)
        ]
        for b in range(images)
    ]


def distribution(
    mu: Tensor,
    sigma: Tensor,
    cam: Tensor,
    noise: Tensor,
    threshold: float,
    epsilon: float,
    weight: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Eq. 9 with its regulariser; the cam on the grid, noise (K, B, D, h, w) or K = 0: mu alone."""
    images, dim, height, width = mu.shape
    mask = foreground(cam, threshold)
    total, number = (mu * 0.0).sum(), 0
    for b in range(images):
        for y in range(height):
            for x in range(width):
                if valid is not None and not valid[b, y, x]:
                    continue
                number += 1
                samples = []
                for d in range(dim):
                    m, s = mu[b, d, y, x], sigma[b, d, y, x]
                    samples += [m + noise[k, b, d, y, x] * s for k in range(len(noise))] or [m]
                logit = sum(samples) / len(samples)
                p = 1 / (1 + torch.exp(-logit))  # type: ignore[arg-type]
                q = min(max(float(mask[b][y][x]), epsilon), 1 - epsilon)
                total = total + p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))
                for d in range(dim):
                    m, s = mu[b, d, y, x], sigma[b, d, y, x]
                    s = s if len(noise) else s.detach()
                    kl = (m * m + s * s - 1) / 2 - torch.log(s)
                    total = total + weight * kl / dim
    return total / max(number, 1)
