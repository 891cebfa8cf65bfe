"""What a method shows its add-ons, and what an add-on is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from wsss.errors import UserError

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
    """

    cam: str
    term: str
    scores: Tensor
    images: Tensor
    labels: Tensor
    valid: Tensor


class Step(NamedTuple):
    """What a method makes of one micro-batch.

    Attributes:
        terms: named loss terms, before weighting.
        views: what add-ons may act on; empty where nothing is classified.
    """

    terms: dict[str, Tensor]
    views: tuple[View, ...] = ()


class AddOn(nn.Module):
    """A loss on each CAM of a method, next to its own terms.

    Args:
        cams: which it acts on: ``cam``, ``early_cam`` or both.
        scale: factor of the loss; None takes 1 with SGD and 0.1 with AdamW, as published.

    Raises:
        UserError: no CAM, or an unknown one.
    """

    #: name of its term, in a method its key in ``addon``; a suffix says which classification term
    #: it stands next to
    name: str

    def __init__(self, cams: Sequence[str] = ("cam",), scale: float | None = None) -> None:
        super().__init__()
        if not cams or not set(cams) <= set(CAMS):
            raise UserError(f"addon.{self.name}.cams={list(cams)}: choose from {', '.join(CAMS)}.")
        self.cams = tuple(cams)
        self.scale = scale

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
