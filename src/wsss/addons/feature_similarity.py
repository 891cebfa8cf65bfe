"""Feature similarity loss as an add-on (FSL, WACV 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.addons.base import AddOn, View, check_number
from wsss.errors import UserError
from wsss.losses import feature_similarity_loss
from wsss.resize import resize_small, valid_on_grid

GATES = ("max_norm", "binomial", "multinomial")
#: side of the CAM of the published settings, which sigma is measured in
GRID = 56


class FeatureSimilarity(AddOn):
    """Draws the contours of the CAMs of present classes to edges of the image (eq. 9 to 13).

    Args:
        mu: dissimilarity threshold.
        sigma: width of the spatial Gaussian, in pixels of the upsampled CAM.
        gate: what predictions are compared by: ``max_norm``, ``binomial`` or ``multinomial``.
        upsample: integer factor of the CAM's grid first; None takes the one that comes nearest to
            56 pixels on the longer side, as published.
        window: radius of the pairs that count, in pixels of the upsampled CAM; None takes 3 sigma,
            beyond which the Gaussian is below 1.1 % of its peak; 0 takes all pairs.
        background: also a background channel, as in the published SEAM version.
        cams, scale, start_step: of :class:`~wsss.addons.AddOn`.

    Raises:
        UserError: unknown gate, or a sigma, factor or window that cannot be.
    """

    name = "fsl"

    def __init__(
        self,
        mu: float = 2.5,
        sigma: float = 5.0,
        gate: str = "max_norm",
        upsample: int | None = None,
        window: int | None = None,
        background: bool = False,
        cams: Sequence[str] = ("cam",),
        scale: float | None = None,
        start_step: int = 0,
    ) -> None:
        super().__init__(cams, scale, start_step)
        if gate not in GATES:
            raise UserError(f"addon.fsl.gate='{gate}': choose one of {', '.join(GATES)}.")
        check_number("addon.fsl.mu", mu, 0)
        check_number("addon.fsl.sigma", sigma, 1e-3)
        check_number("addon.fsl.upsample", upsample, 1, whole=True)
        check_number("addon.fsl.window", window, 0, whole=True)
        self.mu = mu
        self.sigma = sigma
        self.gate = gate
        self.upsample = upsample
        self.window = window
        self.background = background

    def loss(self, view: View) -> Tensor:
        rows, columns = view.scores.shape[-2:]
        factor = self.upsample or max(1, round(GRID / max(rows, columns)))
        size = (rows * factor, columns * factor)
        scores, images = resize_small(view.scores.float(), *size), view.images
        if images.shape[-2:] != size:
            images = _mean_colours(images, view.valid, size)
        window = math.ceil(3 * self.sigma) if self.window is None else self.window
        return feature_similarity_loss(
            scores,
            images.clamp(0, 1),
            view.labels,
            self.mu,
            self.sigma,
            self.gate,
            window or None,
            self.background,
            valid_on_grid(view.valid, size),
        )


def _mean_colours(images: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Colours of the cells of a grid, those of the image alone: padding would darken its border.

    Args:
        images: (B, 3, H, W).
        valid: (B, H', W') bool, where the image is.
        size: h and w.

    Returns:
        (B, 3, h, w); 0 of a cell without a pixel of the image.
    """

    def shrink(x: Tensor) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)

    height, width = images.shape[-2:]
    inside = valid_on_grid(valid, (height, width))[:, None].to(images.dtype)
    share = shrink(inside)
    return shrink(images * inside) / share.clamp(min=torch.finfo(share.dtype).eps)
