"""The feature similarity loss alone, on Gaussian CAMs (binomial ISL/FSL, supplement S.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss.data.layout import Split
from wsss.losses import feature_similarity_loss
from wsss.metrics import BoundaryScores, SegmentationScores

IGNORE_INDEX = 255
#: a mask's variance in pixels is at least this: an object of one pixel has a CAM as well
LEAST_VARIANCE = 1 / 12


class SingleObject(NamedTuple):
    """An image with one object, and the CAM that stands for a network's.

    Attributes:
        name: of the image.
        label: class number, from 1 on.
        mask: (H, W) int64 at the image's own size, 0, ``label`` and 255.
        image: (3, h, w) RGB in [0, 1] at the working resolution.
        scores: (h, w) ``2 G - 1``.
    """

    name: str
    label: int
    mask: Tensor
    image: Tensor
    scores: Tensor


class Score(NamedTuple):
    """Percent: mIoU, mean boundary F and their mean."""

    j: float
    f: float
    jf: float


def single_objects(
    split: Split, per_class: int, area: tuple[float, float], resolution: float, seed: int
) -> list[SingleObject]:
    """Images with one connected object of one class, as many of each class as there are.

    Args:
        split: with masks.
        per_class: most images of a class.
        area: least and largest share of the image that the object covers.
        resolution: factor of the images' size.
        seed: of the order in which images are looked at.
    """
    found: dict[int, list[SingleObject]] = {}
    for index in np.random.default_rng(seed).permutation(len(split)):
        present = np.flatnonzero(split.labels[index])
        if len(present) != 1 or len(found.get(int(present[0]) + 1, ())) >= per_class:
            continue
        label = int(present[0]) + 1
        mask = split.load_mask(index)
        if not is_single_object(mask, label, area):
            continue
        height, width = (max(1, round(side * resolution)) for side in mask.shape)
        image = torch.from_numpy(split.load_image(index)).permute(2, 0, 1)[None] / 255.0
        image = F.interpolate(
            image, size=(height, width), mode="bilinear", antialias=True, align_corners=False
        )
        scores = gaussian_scores(torch.from_numpy(mask == label), (height, width))
        found.setdefault(label, []).append(
            SingleObject(split.names[index], label, torch.from_numpy(mask).long(), image[0], scores)
        )
    return [item for label in sorted(found) for item in found[label]]


def is_single_object(mask: NDArray[np.uint8], label: int, area: tuple[float, float]) -> bool:
    """Whether a mask (H, W) holds one connected object of one class, of a fitting size."""
    foreground = (mask > 0) & (mask != IGNORE_INDEX)
    if not area[0] <= foreground.mean() <= area[1] or (mask[foreground] != label).any():
        return False
    return bool(cv2.connectedComponents(foreground.astype(np.uint8), connectivity=8)[0] == 2)


def gaussian_scores(foreground: Tensor, size: tuple[int, int]) -> Tensor:
    """``2 G - 1`` with the mean and the two variances of a mask (eq. 24), G 1 at its peak.

    Args:
        foreground: (H, W) bool with a pixel that is True.
        size: h, w of the result.
    """
    exponent: Tensor = torch.zeros(size, dtype=torch.float64)
    for axis, positions in enumerate(foreground.nonzero(as_tuple=True)):
        factor = size[axis] / foreground.shape[axis]
        places = (positions.double() + 0.5) * factor - 0.5
        variance = (places - places.mean()).square().mean().clamp(min=LEAST_VARIANCE)
        distance = (torch.arange(size[axis]) - places.mean()).square() / variance
        exponent = exponent + (distance[:, None] if axis == 0 else distance)
    return (2 * torch.exp(-0.5 * exponent) - 1).float()


def optimise(
    items: Sequence[SingleObject],
    mu: float,
    sigma: float,
    gate: str = "max_norm",
    steps: int = 100,
    lr: float = 1.0,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Follow the loss of every image by gradient descent, from the Gaussian scores on.

    Not by Adam, which makes a full step of the faint gradients far from the object too, and
    invents objects there.

    Args:
        items: images; those of other sizes are padded to the largest, which counts for nothing.
        mu, sigma, gate: of :func:`~wsss.losses.feature_similarity_loss`, on all pairs within 3
            sigma.
        steps: of gradient descent.
        lr: its step, of the loss times the number of pixels, so that it suits all sizes.
        watch: called with the number of steps done and the scores.

    Returns:
        (B, 1, h, w) scores; beyond an image's own size -1.
    """
    height = max(item.scores.shape[0] for item in items)
    width = max(item.scores.shape[1] for item in items)

    def stack(tensors: Sequence[Tensor], value: float) -> Tensor:
        pads = [(0, width - t.shape[-1], 0, height - t.shape[-2]) for t in tensors]
        return torch.stack([F.pad(t, p, value=value) for t, p in zip(tensors, pads, strict=True)])

    images = stack([item.image for item in items], 0.0)
    valid = stack([torch.ones_like(item.scores) for item in items], 0.0) > 0
    scores = stack([item.scores for item in items], -1.0)[:, None].requires_grad_()
    labels = torch.ones(len(items), 1)
    optimiser = torch.optim.SGD([scores], lr=lr)
    pixels = valid.sum((1, 2))
    for step in range(steps):
        if watch is not None:
            watch(step, scores.detach())
        optimiser.zero_grad()
        loss = feature_similarity_loss(
            scores, images, labels, mu, sigma, gate, window=math.ceil(3 * sigma), valid=valid
        )
        loss.backward()
        assert scores.grad is not None
        scores.grad *= (len(items) * pixels)[:, None, None, None]  # undo both means
        optimiser.step()
    if watch is not None:
        watch(steps, scores.detach())
    return scores.detach()


def predictions(items: Sequence[SingleObject], scores: Tensor) -> Iterator[Tensor]:
    """Label maps (H, W) of ``scores > 0`` at each image's own size."""
    for item, map_ in zip(items, scores, strict=True):
        own = map_[None, :, : item.scores.shape[0], : item.scores.shape[1]]
        size = (item.mask.shape[0], item.mask.shape[1])
        large = F.interpolate(own, size=size, mode="bilinear", align_corners=False)[0, 0]
        yield (large > 0).long() * item.label


def score(items: Sequence[SingleObject], scores: Tensor, num_classes: int) -> Score:
    """mIoU, boundary F and their mean over the images' classes.

    Args:
        items: the images.
        scores: (B, 1, h, w).
        num_classes: C, foreground.
    """
    regions = SegmentationScores(num_classes + 1)
    contours = BoundaryScores(num_classes + 1)
    for item, prediction in zip(items, predictions(items, scores), strict=True):
        regions.update(prediction, item.mask)
        contours.update(prediction, item.mask)
    # Classes without an image are left out of both means: not a warning's worth here.
    j = float(regions.compute()["iou"].nanmean())
    f = float(contours.compute()["f"].nanmean())
    return Score(100 * j, 100 * f, 50 * (j + f))
