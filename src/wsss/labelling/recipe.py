"""From a network's activations to the pseudo-label of one image at its own size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss.data.views import resize_image
from wsss.pseudo import (
    IGNORE_INDEX,
    MultiScaleOutput,
    PixelAdaptiveRefinement,
    dense_crf,
    two_threshold_label,
)

#: what the CPL is cut from, and the name of its score
SOURCES = {"cam": "cpl", "early_cam": "cpl_early", "ensemble": "cpl_ensemble"}
REFINEMENTS = ("none", "par", "crf")
#: PAR looks up to 24 pixels far. As published it works on half of a 448 crop; here on the image
#: reduced to as many pixels as a square of this side has. Larger, it reaches less far.
PAR_SIDE = 224
_PAR = PixelAdaptiveRefinement()


@dataclass(frozen=True)
class Recipe:
    """How pseudo-labels are made.

    Attributes:
        source: ``cam``, ``early_cam``, or ``ensemble``, the mean of both.
        low: activations below it are background.
        high: activations of at least this are the class; in between the label is 255. Equal to
            ``low``: nothing is left undecided.
        refine: ``none``, ``par`` or ``crf``.
        cpl_crf: preset of :func:`~wsss.pseudo.dense_crf` for the CPL.
        spl_crf: the same for the SPL.
    """

    source: str = "cam"
    low: float = 0.5
    high: float = 0.5
    refine: str = "none"
    cpl_crf: str = "toco_cam"
    spl_crf: str = "cosa"

    def cam(self, output: MultiScaleOutput, i: int, classes: Tensor) -> Tensor:
        """Normalised CAMs of one image's classes.

        Args:
            output: of a batch.
            i: the image in it.
            classes: (K,) int64 indices 0..C-1 of the classes that the image holds.

        Returns:
            (K, h, w) float32 in [0, 1], at the inference size.
        """
        if self.source == "ensemble":
            return (output.cam[i, classes] + output.early_cam[i, classes]) / 2
        return (output.cam if self.source == "cam" else output.early_cam)[i, classes]

    def cpl(
        self, cam: Tensor, classes: Tensor, size: tuple[int, int], image: Tensor | None = None
    ) -> NDArray[np.uint8]:
        """CAM pseudo-label (CoSA, eq. 3) of one image.

        The CAMs are resized (bilinear) to the image, as evaluation does, and cut. Both refinements
        see the threshold as the activation of the background:

        - ``par``, on the reduced image (:data:`PAR_SIDE`): refined CAMs over a refined channel of
          ones. That is what the threshold becomes next to them, whatever its value, so one pass
          serves both thresholds. The published code refines the softmax over threshold and CAMs.
        - ``crf``, on the image: threshold and CAMs, divided by their sum, are its probabilities;
          zero iterations would give the label without refinement. With two thresholds it runs
          once for each: the class is what the pass with ``high`` says, background what both say.

        Args:
            cam: (K, h, w) from :meth:`cam`.
            classes: (K,) int64 indices 0..C-1.
            size: (H, W) of the image.
            image: (H, W, 3) uint8 RGB on any device; only refinements look at it.

        Returns:
            (H, W): 0 background, 1..C, 255 undecided. All background for K = 0.
        """
        if not len(classes):
            return np.zeros(size, np.uint8)
        if self.refine == "par":
            cam = _resize(cam, _par_size(size))
            refined = _par(image, torch.cat([torch.ones_like(cam[:1]), cam]))
            cam = refined[1:] / refined[:1]
        cam = _resize(cam, size)
        if self.refine == "crf":
            label = _crf_label(cam, self.high, image, self.cpl_crf)
            if self.low != self.high:
                background = _crf_label(cam, self.low, image, self.cpl_crf) == 0
                undecided = torch.where(background, 0, IGNORE_INDEX)
                label = torch.where(label > 0, label, undecided)
        else:
            label = two_threshold_label(cam[None], self.low, self.high)[0]
        return _as_values(label, classes)

    def spl(
        self, logits: Tensor, classes: Tensor, size: tuple[int, int], image: Tensor | None = None
    ) -> NDArray[np.uint8]:
        """Segmentation pseudo-label of one image: the largest logit of what it may hold.

        The argmax of CoSA's eq. 7 at any temperature. Refinements work on the softmax over
        background and the image's classes, at temperature 1.

        Args:
            logits: (C + 1, h, w), background first.
            classes, size, image: see :meth:`cpl`.

        Returns:
            (H, W): 0 background, 1..C.
        """
        background = classes.new_zeros(1)
        scores = logits[torch.cat([background, classes + 1])]
        if self.refine == "par":
            scores = _par(image, _resize(scores, _par_size(size)).softmax(0))
        scores = _resize(scores, size)
        if self.refine == "crf":
            assert image is not None
            scores = dense_crf(image, scores.softmax(0), self.spl_crf)
        return _as_values(scores.argmax(0), classes)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x[None].float(), size=size, mode="bilinear", align_corners=False)[0]


def _par_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size at which PAR works: the image's, or less."""
    scale = min(1.0, PAR_SIDE / math.sqrt(size[0] * size[1]))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _par(image: Tensor | None, scores: Tensor) -> Tensor:
    """PAR of (K, h, w) scores with the colours of an image (H, W, 3), resized to them."""
    assert image is not None
    colours = torch.from_numpy(resize_image(image.cpu().numpy(), *scores.shape[1:]))
    return _PAR(colours.permute(2, 0, 1)[None].to(scores), scores[None])[0]


def _crf_label(cam: Tensor, threshold: float, image: Tensor | None, preset: str) -> Tensor:
    """(H, W) int64: 0 background, k the k-th CAM."""
    assert image is not None
    scores = torch.cat([torch.full_like(cam[:1], threshold), cam])
    return dense_crf(image, scores / scores.sum(0), preset).argmax(0)


def _as_values(label: Tensor, classes: Tensor) -> NDArray[np.uint8]:
    """Mask values of a label map whose k stands for the k-th present class; 255 stays."""
    values = torch.zeros(IGNORE_INDEX + 1, dtype=torch.uint8, device=label.device)
    values[1 : len(classes) + 1] = (classes + 1).to(torch.uint8)
    values[IGNORE_INDEX] = IGNORE_INDEX
    return values[label].cpu().numpy()
