"""Progress bar."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class TrainProgress(RichProgressBar):
    """Rich progress bar that counts optimizer steps and shows losses and the threshold."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5, leave=False)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {
            name.removeprefix("loss/").removeprefix("threshold/"): value
            for name, value in items.items()
            if not (isinstance(value, float) and math.isnan(value))  # a score without masks
        }

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"
