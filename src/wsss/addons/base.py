"""What a method shows its add-ons, and what an add-on is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn import NetworkOutput, WSSSNetwork
from wsss.pseudo import normalise_cam

CAMS = ("cam", "early_cam")


@dataclass(frozen=True)
class View:
    """One CAM of one pass of the trained network, with the image it belongs to.

    Attributes:
        cam: ``cam`` or ``early_cam``.
        term: name of the classification term that its scores make.
        scores: (B, C, h, w) CAM logits, with gradient.
        images: (B, 3, H, W) RGB in [0, 1] with the image's own colours, at any size.
        labels: (B, C) 0/1.
        valid: (B, H', W') bool, False on padding; perhaps of another size than ``images``.
        output: all that the pass gave; None where a method shows the CAM alone.
        activations: (B, C, H'', W'') the same CAM as the method makes pseudo-labels of it, fused
            over scales, in [0, 1], absent classes 0; None where it makes none in this step.
        affinity: (B, N, N) of the positions of the grid, with gradient, and
        label: (B, H, W) int64 pseudo-label, where the method made them itself.
    """

    cam: str
    term: str
    scores: Tensor
    images: Tensor
    labels: Tensor
    valid: Tensor
    output: NetworkOutput | None = None
    activations: Tensor | None = None
    affinity: Tensor | None = None
    label: Tensor | None = None

    def certainties(self) -> Tensor:
        """(B, C, H, W) in [0, 1], absent classes 0, no gradient, at the size of ``valid``.

        ``activations``, or what this pass alone says.
        """
        maps = self.activations
        if maps is None:
            maps = normalise_cam(self.scores.detach().float().relu())
            maps = maps * self.labels[:, :, None, None]
        size = (self.valid.shape[-2], self.valid.shape[-1])
        if maps.shape[-2:] == size:
            return maps
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class Step(NamedTuple):
    """What a method makes of one micro-batch.

    Attributes:
        terms: named loss terms, before weighting.
        views: what add-ons may act on; empty where nothing is classified.
    """

    terms: dict[str, Tensor]
    views: tuple[View, ...] = ()


def check_number(key: str, value: float | None, least: float, whole: bool = False) -> None:
    """Refuse a setting that is no number of ``least`` or more; None, a default, passes.

    Args:
        key: the setting's name, for the message.
        value: what it is set to.
        least: the smallest that is allowed.
        whole: whether it counts something.

    Raises:
        UserError: it is too small, not finite, or not whole.
    """
    if value is None:
        return
    kind = "a whole number" if whole else "a number"
    if not least <= value < math.inf or (whole and value != int(value)):
        raise UserError(f"{key}={value}: give {kind} of {least} or more.")


class AddOn(nn.Module):
    """A loss on each CAM of a method, next to its own terms.

    Args:
        cams: which it acts on: ``cam``, ``early_cam`` or both.
        scale: factor of the loss; None takes 1 with SGD and 0.1 with AdamW, as published.
        start_step: optimizer step from which it takes part.

    Raises:
        UserError: no CAM, or an unknown one; a number out of range.
    """

    #: whether it reads the attention that the network keeps (``output.attention``)
    needs_attention = False
    #: name of its term, in a method its key in ``addon``; a suffix says which classification term
    #: it stands next to
    name: str

    def __init__(
        self, cams: Sequence[str] = ("cam",), scale: float | None = None, start_step: int = 0
    ) -> None:
        super().__init__()
        if not cams or not set(cams) <= set(CAMS):
            raise UserError(f"addon.{self.name}.cams={list(cams)}: choose from {', '.join(CAMS)}.")
        check_number(f"addon.{self.name}.scale", scale, 0)
        check_number(f"addon.{self.name}.start_step", start_step, 0, whole=True)
        self.cams = tuple(cams)
        self.scale = scale
        self.start_step = start_step

    def prepare(self, network: WSSSNetwork) -> None:
        """Check that a network gives what it needs, and ask for it.

        Raises:
            UserError: it does not.
        """

    def loss(self, view: View) -> Tensor:
        """Its value on one view, without weight."""
        raise NotImplementedError

    @property
    def weight(self) -> float:
        """Weight of the loss next to a classification term of weight 1, before ``scale``."""
        return 1.0

    @property
    def keeps(self) -> float:
        """What it leaves of the weight of the classification term."""
        return 1.0

    def add_to(
        self,
        step: Step,
        terms: dict[str, Tensor],
        weights: dict[str, float],
        own_weights: Mapping[str, float],
        default_scale: float,
    ) -> None:
        """Add its terms and weights, in place.

        Args:
            step: what the method made.
            terms: all terms so far.
            weights: of those; a term that is not named counts 1.
            own_weights: the method's own, before any add-on.
            default_scale: where ``scale`` is None.
        """
        scale = default_scale if self.scale is None else self.scale
        for view in step.views:
            if view.cam not in self.cams:
                continue
            own = own_weights.get(view.term, 1.0)
            name = self.name + view.term.removeprefix("cls")
            terms[name] = self.loss(view)
            weights[name] = own * self.weight * scale
            if self.keeps != 1.0:
                weights[view.term] = weights.get(view.term, 1.0) * self.keeps
