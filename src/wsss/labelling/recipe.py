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
from wsss.labelling.affinity import AffinityRun
from wsss.pseudo import (
    IGNORE_INDEX,
    MultiScaleOutput,
    PixelAdaptiveRefinement,
    dense_crf,
    two_threshold_label,
)

#: what the CPL is cut from, and the name of its score
SOURCES = {"cam": "cpl", "early_cam": "cpl_early", "ensemble": "cpl_ensemble"}
REFINEMENTS = ("none", "par", "crf", "affinity")
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
        alpha: in place of thresholds: the activation of the background is ``(1 - max)^alpha``, the
            maximum over the image's classes. Of two, the smaller first, one makes a background
            that only confident classes exceed, the other one that classes easily exceed; what
            neither the first says is a class nor the second is background is 255.
        refine: ``none``, ``par``, ``crf`` or ``affinity`` (the CPL alone).
        cpl_crf: preset of :func:`~wsss.pseudo.dense_crf` for the CPL.
        spl_crf: the same for the SPL.
        affinity: what ``refine=affinity`` spreads scores along.
    """

    source: str = "cam"
    low: float = 0.5
    high: float = 0.5
    refine: str = "none"
    cpl_crf: str = "toco_cam"
    spl_crf: str = "cosa"
    alpha: tuple[float, ...] = ()
    affinity: AffinityRun | None = None

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

        The CAMs are resized (bilinear) to the image, as evaluation does, and cut. Refinements see
        the threshold as the activation of the background, which is constant; with :attr:`alpha` it
        follows the CAMs at the size that is refined, and ties go to the background:

        - ``par``, on the reduced image (:data:`PAR_SIDE`): refined CAMs over a refined channel of
          ones. That is what the threshold becomes next to them, whatever its value, so one pass
          serves both thresholds. The published code refines the softmax over threshold and CAMs.
        - ``affinity``, on the grid of AffinityNet, in the same way; background and CAMs are
          averaged to it from the inference size.
        - ``crf``, on the image: background and CAMs, divided by their sum, are its probabilities;
          zero iterations would give the label without refinement. With two thresholds or powers it
          runs once for each. Of thresholds the class is what the pass with ``high`` says,
          background what both say. Of powers, as AffinityNet's code has it, background is what the
          second says, whatever the first does.

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
        if self.refine == "crf":
            cam = _resize(cam, size)
            labels = [_crf_label(cam, b, image, self.cpl_crf) for b in self._backgrounds(cam)]
            return _as_values(self._joined(labels[0], labels[-1]), classes)
        if self.refine != "affinity":
            cam = _resize(cam, size if self.refine == "none" else _par_size(size))
        if self.alpha:
            backgrounds = self._backgrounds(cam)
            scores = _resize(self._refined(torch.cat([*backgrounds, cam]), image), size)
            count = len(backgrounds)
            labels = [torch.cat([b[None], scores[count:]]).argmax(0) for b in scores[:count]]
            return _as_values(self._joined(labels[0], labels[-1]), classes)
        if self.refine != "none":
            refined = self._refined(torch.cat([torch.ones_like(cam[:1]), cam]), image)
            cam = refined[1:] / refined[:1]
        label = two_threshold_label(_resize(cam, size)[None], self.low, self.high)[0]
        return _as_values(label, classes)

    def _backgrounds(self, cam: Tensor) -> list[Tensor]:
        """Activations (1, h, w) of the background: of confident classes, then of background."""
        if self.alpha:
            rest = (1 - cam.amax(0, keepdim=True)).clamp(min=0)
            return [rest**alpha for alpha in self.alpha]
        return [torch.full_like(cam[:1], value) for value in dict.fromkeys((self.high, self.low))]

    def _refined(self, scores: Tensor, image: Tensor | None) -> Tensor:
        """Scores after the refinements that take each channel by itself."""
        if self.refine == "par":
            return _par(image, scores)
        if self.refine == "affinity":
            assert self.affinity is not None
            assert image is not None
            return self.affinity.spread(scores, image)
        return scores

    def _joined(self, sure: Tensor, maybe: Tensor) -> Tensor:
        """Classes of one label, background of the other, 255 where there is neither."""
        if self.alpha:
            return torch.where(maybe == 0, 0, torch.where(sure > 0, sure, IGNORE_INDEX))
        return torch.where(sure > 0, sure, torch.where(maybe == 0, 0, IGNORE_INDEX))

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
    if x.shape[-2:] == size:
        return x.float()
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


def _crf_label(cam: Tensor, background: Tensor, image: Tensor | None, preset: str) -> Tensor:
    """(H, W) int64: 0 background, k the k-th CAM."""
    assert image is not None
    scores = torch.cat([background, cam])
    return dense_crf(image, scores / scores.sum(0), preset).argmax(0)


def _as_values(label: Tensor, classes: Tensor) -> NDArray[np.uint8]:
    """Mask values of a label map whose k stands for the k-th present class; 255 stays."""
    values = torch.zeros(IGNORE_INDEX + 1, dtype=torch.uint8, device=label.device)
    values[1 : len(classes) + 1] = (classes + 1).to(torch.uint8)
    values[IGNORE_INDEX] = IGNORE_INDEX
    return values[label].cpu().numpy()
