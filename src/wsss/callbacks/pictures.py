"""Pictures of a few validation images at each evaluation, in the run folder and in W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from wsss.data.batch import EvalBatch
from wsss.methods.base import Method
from wsss.report.pictures import (
    PanelSet,
    draw_panels,
    grid,
    save_png,
    scored_threshold,
    spread,
    strip,
)
from wsss.report.tables import collect


class PictureLogger(L.Callback):
    """Draws ``folder/step_000500.png`` at the end of each validation, on the first rank.

    With W&B among the loggers the rows and the IoU of each class go there too. A step is drawn
    once: the evaluation after training would repeat the last one during it.

    Args:
        folder: where the pictures go.
        count: number of images, spread evenly over what the first rank evaluates.
        step: of the weights; None: the trainer's, which counts none where it does not train.
    """

    def __init__(self, folder: Path, count: int, step: int | None = None) -> None:
        self.folder = folder
        self.count = count
        self.step = step
        self._rows: list[PanelSet] = []
        self._drawn_step = -1

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.global_rank != 0 or trainer.sanity_checking:
            return
        if trainer.global_step == self._drawn_step:
            return
        method = cast(Method, pl_module)
        if not (method.evaluates_segmentation or method.evaluates_cam):
            return  # AffinityNet labels nothing
        loader: Any = trainer.val_dataloaders
        total = min(len(loader.sampler), int(trainer.num_val_batches[0]) * loader.batch_size)
        first = batch_idx * loader.batch_size
        here = [p - first for p in spread(total, self.count) if 0 <= p - first < len(batch.names)]
        if not here:
            return
        chosen = EvalBatch(
            batch.images[here],
            batch.labels[here],
            [batch.masks[i] for i in here],
            [batch.names[i] for i in here],
        )
        # While it trains the CPL is what it trains on, afterwards what is scored.
        scored = self.step is not None and method.evaluates_cam
        threshold = scored_threshold(method) if scored else None
        # Lightning switches mixed precision on in *_step alone.
        with trainer.precision_plugin.forward_context():
            self._rows += draw_panels(method, chosen, threshold)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._rows:
            return
        method = cast(Method, pl_module)
        step = trainer.global_step if self.step is None else self.step
        picture = grid(self._rows, legend=method.classes)
        save_png(picture, self.folder / f"step_{step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log_wandb(logger, method, step)
        self._rows = []
        self._drawn_step = trainer.global_step

    def _log_wandb(self, logger: WandbLogger, method: Method, step: int) -> None:
        logger.log_image(
            "pictures",
            [strip(row) for row in self._rows],
            step=step,
            caption=[row.name for row in self._rows],
        )
        per_class = collect(method, step)["per_class"]
        logger.log_table(
            "iou_per_class",
            columns=["class", *per_class],
            data=[
                [name, *(table[name] for table in per_class.values())]
                for name in ("background", *method.classes)
            ],
            step=step,
        )
