"""UniA's affinity diversification as an add-on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wsss.addons.base import AddOn, View
from wsss.errors import UserError
from wsss.losses import contrastive_affinity_loss
from wsss.nn import WSSSNetwork
from wsss.nn.attention import Blocks
from wsss.pseudo import MutualRefinement, symmetric_affinity
from wsss.resize import cell_centres


class Affinity(AddOn):
    """Parts the attention between positions by a mutually refined label (UniA, eq. 11 to 16).

    The label is made of the CAM that the method makes pseudo-labels of, where it makes any, and of
    the affinity itself; the method's own labels stay as they are. ``method=unia`` makes that label
    for its decoder too, and this takes it. Needs a plain ViT.

    Args:
        weight: of the loss next to a classification term of weight 1.
        blocks: of the ViT, whose mean attention is the affinity: numbers, from the end where
            negative, or "all"; None takes those that the method names, or all.
        temperature, log: of :func:`~wsss.losses.contrastive_affinity_loss`.
        scale_affinity: times the number of positions, so that 1 is the affinity of two positions
            that know nothing of each other, whatever the grid. Without it all affinities are near
            1/N, and the loss has next to no gradient.
        high, low, walk_power, walk_steps, renormalise, par_scale: of
            :class:`~wsss.pseudo.MutualRefinement`; None: its own defaults. They have to be the
            method's where that makes the label.
        start_step, cams: of :class:`~wsss.addons.AddOn`.

    Raises:
        UserError: a temperature that is not positive.
        ValueError: of :class:`~wsss.pseudo.MutualRefinement`.
    """

    name = "affinity"
    needs_attention = True

    def __init__(
        self,
        weight: float = 0.1,
        blocks: Blocks | None = None,
        temperature: float = 0.5,
        log: bool = False,
        scale_affinity: bool = False,
        high: float | None = None,
        low: float | None = None,
        walk_power: float | None = None,
        walk_steps: int | None = None,
        renormalise: bool | None = None,
        par_scale: float | None = None,
        start_step: int = 0,
        cams: Sequence[str] = ("cam",),
    ) -> None:
        super().__init__(cams, 1.0, start_step)
        if temperature <= 0:
            raise UserError(f"addon.affinity.temperature={temperature}: give a positive number.")
        self.factor = weight
        self.blocks = blocks
        self.temperature = temperature
        self.log = log
        self.scale_affinity = scale_affinity
        options: dict[str, Any] = {
            "high": high,
            "low": low,
            "walk_power": walk_power,
            "walk_steps": walk_steps,
            "renormalise": renormalise,
            "par_scale": par_scale,
        }
        #: settings of the label that were given
        self.label_settings = {key: value for key, value in options.items() if value is not None}
        self.refinement = MutualRefinement(**self.label_settings)

    @property
    def weight(self) -> float:
        return self.factor

    def prepare(self, network: WSSSNetwork) -> None:
        network.want_attention(self.blocks)

    def loss(self, view: View) -> Tensor:
        affinity = view.affinity
        if affinity is None:
            assert view.output is not None
            assert view.output.attention is not None
            affinity = symmetric_affinity(view.output.attention)
        grid = (view.scores.shape[-2], view.scores.shape[-1])
        label = view.label
        if label is None:
            label = self.refinement(
                view.certainties(), affinity.detach(), grid, view.images, view.labels, view.valid
            ).label
        if self.scale_affinity:
            affinity = affinity * affinity.shape[-1]
        return contrastive_affinity_loss(
            affinity, cell_centres(label, grid), self.temperature, self.log
        )
