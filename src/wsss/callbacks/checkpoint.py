"""Checkpoints that a crash cannot break, and Ctrl-C that loses nothing."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from wsss.errors import UserError
from wsss.log import tell


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target and renames: the target is always whole, old or new.

    Reads tensors and plain containers only.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            torch.save(checkpoint, part)
            part.replace(target)
        except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            there = "the one that is there is whole" if target.exists() else "there is none yet"
            raise UserError(
                f"'{target}' could not be written ({reason}); {there}. Make room, then go on with "
                "ckpt=last and this run's output_dir."
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(
            path, map_location=map_location or "cpu", weights_only=True
        )
        return content


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the best validation, of those that have a score.

    Lightning takes NaN, the score of images without masks, for a first best one: those weights
    would stand for the run until it ends.
    """

    @property
    def state_key(self) -> str:
        # Lightning's own class wrote it into earlier checkpoints.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning forgets the best score when the folder is another one, such as the same one
        after it was moved; here it counts as long as its ``best.ckpt`` is beside the run."""
        folder = str(self.dirpath)
        here = Path(folder) / Path(state_dict["best_model_path"] or "-").name
        if here.is_file():
            paths = {
                str(Path(folder) / Path(path).name): score
                for path, score in state_dict["best_k_models"].items()
            }
            worst = state_dict["kth_best_model_path"]
            state_dict = state_dict | {
                "dirpath": folder,
                "best_model_path": str(here),
                "best_k_models": paths,
                "kth_best_model_path": str(Path(folder) / Path(worst).name) if worst else "",
            }
        super().load_state_dict(state_dict)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        score = trainer.callback_metrics.get(str(self.monitor))
        if score is None or not score.isnan():
            super().on_validation_end(trainer, pl_module)


class ResumableInterrupt(Checkpoint):
    """The first Ctrl-C ends the run after the current step, with a checkpoint; a second at once.

    So does SIGTERM, which schedulers send before they kill, and ``kill`` without more.

    A ``Checkpoint``, so that Lightning calls it after all other callbacks, the moving average
    among them: what it saves is the whole step.

    Args:
        path: where the checkpoint goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.interrupted = False
        self.exit_code = 130
        self._asked = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of an optimizer step
        asked = self._asked
        if trainer.world_size > 1:
            # Ranks may see the signal at different steps: they must stop at the same one.
            if trainer.global_step % 10:
                return
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and not self.interrupted:
            self.interrupted = True
            trainer.save_checkpoint(self.path, weights_only=False)
            if trainer.is_global_zero:
                tell(f"Stopped at step {trainer.global_step}. Resume with: ckpt={self.path}")
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked:
            raise SystemExit(self.exit_code)
        self._asked = True
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"{name}: saving after this step (again: stop at once).", flush=True)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
