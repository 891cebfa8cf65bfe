"""Pixel-adaptive refinement (PAR): masks that follow the colours of the image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Keeps the division finite where all neighbours have one colour.
STD_EPS = 1e-8


class PixelAdaptiveRefinement(nn.Module):
    r"""Replace every pixel of a mask by a weighted sum of its neighbours, several times.

    PAR of AFA (Ru et al., CVPR 2022), which ToCo and UniA use as well. The
    neighbours are the 8 of every dilation, the image continued by its border pixels. With the
    image ``I``, distances ``d`` and standard deviations ``s`` over the neighbours of a pixel
    (unbiased, of each colour channel and of the distances):

    .. math::
        a_n = \mathrm{softmax}_n\Big(-\tfrac{1}{3}\sum_c
            \big(\tfrac{|I_{n,c} - I_c|}{w_1 s_c}\big)^2\Big)
            + w_2\, \mathrm{softmax}_n\Big(-\big(\tfrac{d_n}{w_1 s_d}\big)^2\Big)

    The weights sum to ``1 + w2`` and are not renormalised, as published: with the defaults every
    channel grows by 1.01 an iteration, 10 % after 10, all channels alike. So give the background
    as a channel of its own (a constant one for a threshold) and compare channels afterwards.

    Args:
        dilations: distances of the neighbours in pixels of the image.
        num_iterations: 10 in ToCo and UniA; 0 only resizes.
        w1: bandwidth of colours and distances, in their standard deviations.
        w2: weight of the distances.

    Raises:
        ValueError: a dilation below 1, none at all, a negative number of iterations, or ``w1``
            not positive.

    Example:
        >>> par = PixelAdaptiveRefinement(num_iterations=2)
        >>> par(torch.rand(1, 3, 32, 48), torch.rand(1, 5, 2, 3)).shape
        torch.Size([1, 5, 32, 48])
    """

    def __init__(
        self,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        num_iterations: int = 10,
        w1: float = 0.3,
        w2: float = 0.01,
    ) -> None:
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations={list(dilations)}: give at least one, each 1 or more.")
        if num_iterations < 0:
            raise ValueError(f"num_iterations={num_iterations}: give 0 or more.")
        if w1 <= 0:
            raise ValueError(f"w1={w1}: the bandwidth must be positive.")
        self.dilations = tuple(dilations)
        self.num_iterations = num_iterations
        self.w1 = w1
        self.w2 = w2
        self.offsets = [
            (dy * d, dx * d)
            for d in self.dilations
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if (dy, dx) != (0, 0)
        ]

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Refine ``mask`` along the colours of ``image``.

        The result is linear in ``mask`` and differentiable by it; ``image`` gets no gradient.

        Args:
            image: (B, 3, H, W) RGB in any range, also normalised: a factor or an offset of a
                channel changes nothing, colours are compared in standard deviations.
            mask: (B, K, h, w) scores of any number of channels, resized to the image first
                (bilinear, corners on corners).

        Returns:
            (B, K, H, W) float32; float64 for a float64 mask.

        Raises:
            ValueError: not four dimensions each, or different numbers of images.
        """
        if image.dim() != 4 or mask.dim() != 4 or image.shape[0] != mask.shape[0]:
            raise ValueError(
                f"image {tuple(image.shape)} and mask {tuple(mask.shape)}: expected (B, 3, H, W) "
                "and (B, K, h, w) with the same B."
            )
        dtype = torch.float64 if mask.dtype == torch.float64 else torch.float32
        height, width = image.shape[-2:]
        if mask.shape[1] == 0:  # what interpolate refuses
            return mask.new_zeros((*mask.shape[:2], height, width), dtype=dtype)
        mask = mask.to(dtype)
        if mask.shape[-2:] != image.shape[-2:]:
            mask = F.interpolate(mask, (height, width), mode="bilinear", align_corners=True)
        affinity = self.affinity(image.to(dtype))
        for _ in range(self.num_iterations):
            # One neighbour after the other: all 48 copies of the mask at once would be slower
            # and, for 20 classes at 448 pixels, take 0.8 GB an image.
            refined = torch.zeros_like(mask)
            for n, neighbour in enumerate(self._neighbours(mask)):
                refined.addcmul_(affinity[:, n : n + 1], neighbour)
            mask = refined
        return mask

    @torch.no_grad()
    def affinity(self, image: Tensor) -> Tensor:
        """Weights of the neighbours: (B, C, H, W) -> (B, 8 * dilations, H, W)."""
        # Neighbours one by one here, too: all at once they take 3 times the memory and 4 times
        # the time. Deviations from the pixel have the neighbours' standard deviation, and are
        # exactly 0 where the colour is constant.
        count = len(self.offsets)
        mean, squares = torch.zeros_like(image), torch.zeros_like(image)
        for neighbour in self._neighbours(image):
            mean += (neighbour - image) / count
        for neighbour in self._neighbours(image):
            squares += (neighbour - image - mean).square_()
        scale = ((squares / (count - 1)).sqrt() + STD_EPS) * self.w1
        logits = image.new_empty((image.shape[0], count, *image.shape[-2:]))
        for n, neighbour in enumerate(self._neighbours(image)):
            logits[:, n] = -((neighbour - image) / scale).square_().mean(dim=1)
        distances = image.new_tensor([math.hypot(dy, dx) for dy, dx in self.offsets])
        scaled = distances / (distances.std() + STD_EPS) / self.w1
        position = (-scaled.square()).softmax(dim=0)
        return logits.softmax(dim=1).add_(self.w2 * position[:, None, None])

    def _neighbours(self, x: Tensor) -> Iterator[Tensor]:
        """(B, C, H, W) views of ``x``, shifted by every offset, continued by its border."""
        margin = max(self.dilations)
        padded = F.pad(x, [margin] * 4, mode="replicate")
        height, width = x.shape[-2:]
        for dy, dx in self.offsets:
            top, left = margin + dy, margin + dx
            yield padded[..., top : top + height, left : left + width]
