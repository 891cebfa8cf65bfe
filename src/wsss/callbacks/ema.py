"""Moving average of the online network."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn


class AssignmentEMA(L.Callback):
    """After every real optimizer step: ``AN <- m AN + (1 - m) ON``.

    The only writer of the method's ``assignment`` network. With gradient accumulation it acts
    once per optimizer step, not per micro-batch.

    Args:
        momentum: m, in [0, 1]; 1 freezes the assignment network.

    Raises:
        ValueError: momentum outside [0, 1].
    """

    def __init__(self, momentum: float) -> None:
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"method.momentum={momentum}: choose a value from 0 to 1.")
        self.momentum = momentum
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        online, assignment = pl_module.network, pl_module.assignment
        assert isinstance(online, nn.Module)
        assert isinstance(assignment, nn.Module)
        torch._foreach_lerp_(
            list(assignment.parameters()), list(online.parameters()), 1.0 - self.momentum
        )
        for mine, theirs in zip(assignment.buffers(), online.buffers(), strict=True):
            mine.copy_(theirs)
