"""UniA's distribution loss as an add-on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from wsss.addons.base import AddOn, View
from wsss.errors import UserError
from wsss.losses import distribution_loss
from wsss.nn import UncertaintyNeck, WSSSNetwork


class Distribution(AddOn):
    """Holds the neck's Gaussians to the certain foreground of the CAM (UniA, eq. 8, 9).

    The CAM is the one that the method makes pseudo-labels of, where it makes any: CoSA's assignment
    network's, fused over scales. Needs ``neck=uncertainty``.

    Args:
        weight: of the loss next to a classification term of weight 1.
        threshold: lambda, above which an activation is certain.
        num_samples: K; 0 takes the mean alone.
        epsilon, regulariser: of :func:`~wsss.losses.distribution_loss`.
        start_step, cams: of :class:`~wsss.addons.AddOn`.

    Raises:
        UserError: a number out of range.
    """

    name = "distribution"

    def __init__(
        self,
        weight: float = 0.1,
        threshold: float = 0.7,
        num_samples: int = 50,
        epsilon: float = 0.01,
        regulariser: float = 0.01,
        start_step: int = 0,
        cams: Sequence[str] = ("cam",),
    ) -> None:
        super().__init__(cams, 1.0, start_step)
        if num_samples < 0:
            raise UserError(
                f"addon.distribution.num_samples={num_samples}: give 0 (mean alone) or more."
            )
        if not 0 < epsilon < 0.5:
            raise UserError(
                f"addon.distribution.epsilon={epsilon}: give more than 0, and less than 0.5."
            )
        self.factor = weight
        self.threshold = threshold
        self.num_samples = num_samples
        self.epsilon = epsilon
        self.regulariser = regulariser

    @property
    def weight(self) -> float:
        return self.factor

    def prepare(self, network: WSSSNetwork) -> None:
        if not isinstance(network.neck, UncertaintyNeck):
            raise UserError(
                f"addon.{self.name} needs the distribution that neck=uncertainty infers: choose "
                "that neck, or leave the add-on out."
            )

    def loss(self, view: View) -> Tensor:
        assert view.output is not None
        neck = view.output.neck
        assert neck is not None
        assert neck.mu is not None
        assert neck.sigma is not None
        return distribution_loss(
            neck.mu,
            neck.sigma,
            view.certainties(),
            self.threshold,
            self.num_samples,
            epsilon=self.epsilon,
            regulariser=self.regulariser,
            valid=view.valid,
        )
