"""Importance sampling loss as an add-on (ISL, WACV 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from wsss.addons.base import AddOn, View, check_number
from wsss.errors import UserError
from wsss.losses import importance_sampling_loss
from wsss.resize import valid_on_grid

POSTERIORS = ("binomial", "multinomial")


class ImportanceSampling(AddOn):
    """Turns a classification term ``L_pool`` into ``(1 - weight) L_pool + weight L_is`` (eq. 16).

    Args:
        weight: lambda; 0.2 for the binomial form, 0.6 for the multinomial one.
        num_samples: pixels drawn for each image and class.
        posterior: what they are drawn from, ``binomial`` or ``multinomial``.
        cams, scale, start_step: of :class:`~wsss.addons.AddOn`; ``scale`` is a factor of ``L_is``
            alone.

    Raises:
        UserError: a weight outside [0, 1], no samples, an unknown posterior.
    """

    name = "isl"

    def __init__(
        self,
        weight: float = 0.2,
        num_samples: int = 10,
        posterior: str = "binomial",
        cams: Sequence[str] = ("cam",),
        scale: float | None = None,
        start_step: int = 0,
    ) -> None:
        super().__init__(cams, scale, start_step)
        if not 0 <= weight <= 1:
            raise UserError(f"addon.isl.weight={weight}: it is a share, from 0 to 1.")
        check_number("addon.isl.num_samples", num_samples, 1, whole=True)
        if posterior not in POSTERIORS:
            raise UserError(
                f"addon.isl.posterior='{posterior}': choose one of {', '.join(POSTERIORS)}."
            )
        self.share = weight
        self.num_samples = num_samples
        self.posterior = posterior

    @property
    def weight(self) -> float:
        return self.share

    @property
    def keeps(self) -> float:
        return 1.0 - self.share

    def loss(self, view: View) -> Tensor:
        size = (view.scores.shape[-2], view.scores.shape[-1])
        return importance_sampling_loss(
            view.scores,
            view.labels,
            self.num_samples,
            posterior=self.posterior,
            valid=valid_on_grid(view.valid, size),
        )
