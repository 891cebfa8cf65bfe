"""Necks: modules between the encoder and the heads."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.errors import UserError

#: what the minimum and the maximum of sigma are taken over, within an image
SCALES = ("image", "channel")
#: a sigma that varies by less is constant: noise is not stretched to [0, 1]
EPSILON = 1e-5
#: softplus(UNIT) is 1
UNIT = math.log(math.e - 1)


class NeckOutput(NamedTuple):
    """What a neck gives; h x w is the token grid.

    Attributes:
        features: (B, D, h, w) for the heads.
        mu: (B, D, h, w) mean of the features' distribution, float32 (float64 stays); None where a
            neck has none, as the following.
        sigma: (B, D, h, w), its deviation, above 0.
        uncertainty: (B, D, h, w) in [0, 1].
    """

    features: Tensor
    mu: Tensor | None = None
    sigma: Tensor | None = None
    uncertainty: Tensor | None = None


class UncertaintyNeck(nn.Module):
    """Uncertainty inference network (UniA, eq. 3 to 7 and 10).

    The features Z are taken as a Gaussian of deviation ``sigma``, and features that vary much are
    held back when each position collects what it needs from all others::

        mu = mu_c + mu_s,  sigma = softplus(sigma_c + sigma_s + log(e - 1))
        U = (sigma - min sigma) / (max sigma - min sigma)
        Z_f = softmax(Q(Z) K((1 - U) Z)^T / sqrt(D)) V((1 - U) Z)

    ``mu_c`` and ``sigma_c`` are a factor and an offset for each channel of Z, which is what a
    depth-wise 1x1 convolution is. ``mu_s`` and ``sigma_s`` are attention of all positions to the
    prototypes: maxima of windows. Each has linear layers of its own.

    Left open by the paper:

    - sigma is called a variance, but eq. 7 multiplies a standard normal by it: a deviation.
    - Its sign: softplus, moved so that a raw 0 gives 1, the deviation of the prior.
    - Range of U: by minimum and maximum, with gradient through both. Over channels and positions of
      an image together, so that channels can differ in how much they are held back ("image"),
      or for each channel over its positions ("channel"). Sigma that is constant gives U = 0.
    - ``sqrt(D)`` of eq. 5 is printed outside the exponential; here it is inside, as in eq. 10.
    - The start: Q, K, V of the masking are identities, so a position mostly collects itself and
      positions like it, and Z_f is about Z; random ones would average the whole image, and with
      eq. 10 as printed there is no residual connection to get it back. ``mu`` starts near Z.
    - A residual path: none is printed, so a position is replaced by what it attends to. With
      ``residual``, Z is added to Z_f.

    There is no sampling here, in training neither: samples are drawn by
    :func:`~wsss.losses.distribution_loss` and Z_f does not depend on them. The published ablation
    of the parts (Table V) is ``channel=False``, ``spatial=False``, and ``num_samples=0`` of that
    loss ("mu only").

    Args:
        dim: channels D of the features.
        window: height and width of the windows, in positions. Windows at the right and lower edge
            are smaller where the grid is no multiple.
        channel, spatial: have the two branches.
        scale: see above, "image" or "channel".
        residual: see above.

    Shape: (B, D, h, w) of any h and w -> :class:`NeckOutput`.

    Raises:
        UserError: no branch, or an option out of range.

    Source: Yang et al., Tackling Ambiguity from Perspective of Uncertainty Inference and Affinity
    Diversification for Weakly Supervised Semantic Segmentation (arXiv 2404.08195).

    Example:
        >>> output = UncertaintyNeck(8)(torch.randn(2, 8, 5, 7))
        >>> output.features.shape, bool((output.sigma > 0).all())
        (torch.Size([2, 8, 5, 7]), True)
    """

    def __init__(
        self,
        dim: int,
        window: int = 4,
        channel: bool = True,
        spatial: bool = True,
        scale: str = "image",
        residual: bool = False,
    ) -> None:
        super().__init__()
        if not (channel or spatial):
            raise UserError(
                "neck.channel=false and neck.spatial=false leave nothing to infer the uncertainty "
                "by: keep one of them, or choose neck=none."
            )
        if window < 1:
            raise UserError(f"neck.window={window}: a window has at least 1 position a side.")
        if scale not in SCALES:
            raise UserError(f"neck.scale='{scale}': choose one of {', '.join(SCALES)}.")
        self.window, self.scale, self.residual = window, scale, residual
        self.channel_mu = ChannelAffine(dim) if channel else None
        self.channel_sigma = ChannelAffine(dim) if channel else None
        self.spatial_mu = CrossAttention(dim) if spatial else None
        self.spatial_sigma = CrossAttention(dim) if spatial else None
        self.masking = CrossAttention(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (self.channel_sigma, self.spatial_mu, self.spatial_sigma):
            if module is not None:
                module.reset_parameters()
        if self.channel_mu is not None:
            nn.init.ones_(self.channel_mu.weight)
            nn.init.zeros_(self.channel_mu.bias)
        self.masking.reset_identity()

    def forward(self, features: Tensor) -> NeckOutput:
        tokens = _tokens(features)
        prototypes = tokens
        if self.spatial_mu is not None:
            # A window that reaches beyond the grid takes the maximum of what is inside.
            pooled = F.max_pool2d(features, self.window, ceil_mode=True)
            prototypes = _tokens(pooled)
        mu = _sum(self.channel_mu, self.spatial_mu, tokens, prototypes)
        sigma = F.softplus(_sum(self.channel_sigma, self.spatial_sigma, tokens, prototypes) + UNIT)
        uncertainty = min_max(sigma, (1, 2) if self.scale == "image" else (1,))
        certain = ((1 - uncertainty) * tokens).to(tokens.dtype)
        masked = self.masking(tokens, certain)
        if self.residual:
            masked = tokens + masked
        if self.training:
            # mu reaches no head. Without the distribution loss its layers would have no gradient,
            # where DDP wants one for every parameter.
            masked = masked + (0 * mu.mean()).to(masked.dtype)
        grid = (features.shape[2], features.shape[3])
        return NeckOutput(*(_maps(x, grid) for x in (masked, mu, sigma, uncertainty)))


class ChannelAffine(nn.Module):
    """A depth-wise 1x1 convolution: a factor and an offset for each channel.

    Shape: (..., dim) -> (..., dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small factors; no offsets."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class CrossAttention(nn.Module):
    """One head of attention ``softmax(q(x) k(s)^T / sqrt(D)) v(s)``, without output layer.

    Keys have no bias: the softmax would not see it. Uses torch's fused kernels where they exist for
    the dimension and device, which hold no matrix of all pairs.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as for the layers of a ViT."""
        for layer in (self.query, self.key, self.value):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        self._zero_biases()

    def reset_identity(self) -> None:
        """Queries, keys and values are what they are made from."""
        for layer in (self.query, self.key, self.value):
            nn.init.eye_(layer.weight)
        self._zero_biases()

    def _zero_biases(self) -> None:
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.value.bias)

    def forward(self, x: Tensor, sources: Tensor) -> Tensor:
        """(B, N, D) for each of x (B, N, D), from sources (B, M, D)."""
        # The fused kernels want a dimension of heads.
        query = self.query(x)[:, None]
        key, value = self.key(sources)[:, None], self.value(sources)[:, None]
        return F.scaled_dot_product_attention(query, key, value)[:, 0]


def min_max(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values brought to [0, 1] by their minimum and maximum over ``dims``; 0 where constant."""
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    spread = high - low
    varies = spread > EPSILON
    return (x - low).where(varies, 0) / spread.where(varies, 1)


def _sum(
    channel: ChannelAffine | None, spatial: CrossAttention | None, x: Tensor, prototypes: Tensor
) -> Tensor:
    """What the branches give together, in float32: differences of deviations are small."""
    parts = [] if channel is None else [channel(x)]
    if spatial is not None:
        parts.append(spatial(x, prototypes))
    parts = [part if part.dtype == torch.float64 else part.float() for part in parts]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)
