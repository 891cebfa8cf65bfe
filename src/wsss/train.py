"""Train a method: ``python -m wsss.train experiment=cosa_voc data.root=/data/VOC2012``.

Writes into ``output_dir``: ``checkpoints/`` (last.ckpt, best.ckpt), ``metrics.csv``,
``config.yaml``, ``environment.json``, ``pictures/`` and, at the end, ``scores.json`` (every network
under every protocol) and ``images.csv`` (every image).
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import cast

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsss.build import (
    build_data,
    build_method,
    build_network,
    kept_of_experiment,
    leave_out_foreign_settings,
    method_class,
)
from wsss.callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, ResumableInterrupt
from wsss.callbacks.pictures import PictureLogger
from wsss.cli import hydra_command, nearest, quiet_libraries
from wsss.environment import describe, write_environment
from wsss.errors import UserError
from wsss.files import check_writable
from wsss.log import tell
from wsss.loggers import make_loggers, wandb_run_ends
from wsss.methods.base import Method, check_classes
from wsss.metrics.protocols import HEADLINES
from wsss.progress import TrainProgress
from wsss.report.tables import print_scores, write_image_scores, write_scores
from wsss.resume import (
    Resumed,
    check_fits,
    check_free,
    find_checkpoint,
    read_resumed,
    start_anew,
)
from wsss.trainer_settings import check_trainer, device_settings

log = logging.getLogger(__name__)


def train(cfg: DictConfig, output_dir: Path) -> dict[str, float]:
    """Run one training from a composed configuration.

    Args:
        cfg: ``conf/train.yaml`` composed with an experiment.
        output_dir: folder of this run; made when missing.

    Returns:
        Scores by full name, of the last weights (empty with ``evaluate=false``).

    Raises:
        UserError: a mistake in data, configuration or checkpoint, before the first step; or a
            loss that is not finite, during training.
    """
    with wandb_run_ends():
        return _train(cfg, output_dir)


def _train(cfg: DictConfig, output_dir: Path) -> dict[str, float]:
    quiet_libraries()
    cfg = apply_variant(cfg)
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    if left_out := leave_out_foreign_settings(cfg, overrides):
        log.info("Settings of another method, left out: %s", ", ".join(left_out))
    if kept := kept_of_experiment(cfg, overrides):
        log.info("Settings of the experiment's own method, kept: %s", ", ".join(kept))
    check_trainer(cfg)
    check_writable(output_dir)
    first_rank = getattr(rank_zero_only, "rank", 0) == 0
    # Every rank looks, so that none waits for one that refused: what is looked for is written when
    # all of them have met.
    check_free(output_dir, cfg.ckpt, cfg.overwrite, cfg.backbone.weights)
    checkpoint = find_checkpoint(cfg.ckpt, output_dir)
    resumed = None if checkpoint is None else read_resumed(checkpoint, cfg)
    if first_rank:
        tell_start(cfg.ckpt, output_dir, resumed)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    data = build_data(cfg, load_masks=method_class(cfg).wants_masks(cfg.method))
    try:
        data.setup("fit")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if first_rank:
        for note in data.notes():
            tell(f"Data: {note}")
        if data.about_masks is not None:
            tell(f"Training masks: {data.about_masks}")
    if resumed is not None:
        check_classes(resumed.content, data.classes, str(checkpoint))
    network = build_network(cfg, data.num_classes, load_weights=checkpoint is None)
    method = build_method(cfg, network, data.classes)
    step = None
    if resumed is not None:
        check_fits(resumed, method)
        step = resumed.step
        del resumed  # as large as the networks
    if cfg.overwrite and first_rank:
        start_anew(output_dir)  # here, where all that can be wrong with this run has been told
    trainer = make_trainer(cfg, method, output_dir)
    on_gpu = trainer.strategy.root_device.type == "cuda"
    about = describe(
        cfg.trainer.precision, trainer.world_size, trainer.device_ids if on_gpu else (), step
    )
    environment = output_dir / "environment.json"
    # A run that has all its steps is scored again: its times stay.
    trains = step is None or step < cfg.trainer.max_steps or not environment.is_file()
    if trainer.is_global_zero and trains:
        write_environment(environment, about)
    if trainer.is_global_zero:
        OmegaConf.save(OmegaConf.create(method.run_config), output_dir / "config.yaml")

    if checkpoint is not None and first_rank:
        bring_best(checkpoint, output_dir / "checkpoints")
    trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ResumableInterrupt) and callback.interrupted:
            sys.exit(callback.exit_code)
    trainer.save_checkpoint(output_dir / "checkpoints" / "last.ckpt", weights_only=False)
    if trainer.is_global_zero and trains:
        write_environment(environment, about, finished=True)
    if not cfg.evaluate:
        return {}
    for scores in method.scores.values():
        # At the end alone, and of two protocols: it takes longer than all the rest.
        scores.boundary = HEADLINES if cfg.boundary else False  # type: ignore[assignment]
    trainer.validate(method, datamodule=data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
    if trainer.is_global_zero:
        keep_best(output_dir / "checkpoints", trainer, method.monitor)
        write_scores(output_dir / "scores.json", method)
        write_image_scores(output_dir / "images.csv", method)
        if data.has_masks:
            print_scores(method)
        else:
            name = f"{method.network_names[0]}/cls/map"
            value = f"{100 * found[name]:.2f} %" if name in found else "-"
            scored = f"only the image labels were scored ({name} {value})"
            if not method.evaluates_cam:
                scored = "nothing was scored"
            tell(
                f"Split '{data.val_split}' has no masks, so {scored} and best.ckpt is last.ckpt; "
                "look at the pictures."
            )
        tell(f"Run folder: {output_dir}")
    return {k: v for k, v in found.items() if k.split("/")[0] in method.network_names}


def apply_variant(cfg: DictConfig) -> DictConfig:
    """The configuration with the settings of ``cfg.variant``, one of ``cfg.variants``.

    Raises:
        UserError: no such variant, or one that sets a key that does not exist.
    """
    if cfg.variant is None:
        return cfg
    if cfg.variant not in cfg.variants:
        if not cfg.variants:
            raise UserError(f"variant={cfg.variant}: variants belong to a sweep; set sweep=...")
        raise UserError(f"variant={cfg.variant}: no such one. {nearest(cfg.variant, cfg.variants)}")
    settings = cfg.variants[cfg.variant]
    try:
        merged = cast(DictConfig, OmegaConf.merge(cfg, settings))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"variant={cfg.variant}: {settings} does not fit ({reason}).") from error
    merged.variants = {}  # the others are not part of this run
    return merged


def tell_start(ckpt: str | None, output_dir: Path, resumed: Resumed | None) -> None:
    """Say which step a run goes on from, if ``ckpt`` asks for one, and what is not as it was."""
    if resumed is not None:
        where = output_dir if ckpt == "last" else resumed.path
        tell(f"Resumes {where} at step {resumed.step}.")
        if resumed.changed:
            log.warning(
                "Settings other than those that %s was trained with: %s",
                resumed.path.name,
                resumed.about_changes(),
            )
    elif ckpt is not None:
        tell(f"{output_dir} has no checkpoint: starts at step 0.")


def make_trainer(cfg: DictConfig, method: Method, output_dir: Path) -> L.Trainer:
    """The Lightning trainer of ``cfg.trainer``, with callbacks, loggers and checkpoints."""
    t = cfg.trainer
    folder = output_dir / "checkpoints"
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder,
            filename="last",
            every_n_train_steps=t.save_every_n_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        ),
        BestCheckpoint(
            folder,
            filename="best",
            monitor=method.monitor,
            mode="max",
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        ),
        ResumableInterrupt(folder / "last.ckpt"),
    ]
    if t.keep_every_n_steps:
        callbacks.append(
            ModelCheckpoint(
                folder,
                filename="step_{step:06d}",
                # No score is looked at. Lightning tells callbacks apart by such arguments, and
                # with the default this one would be `last` again when both intervals are equal.
                mode="max",
                every_n_train_steps=t.keep_every_n_steps,
                save_top_k=-1,
                enable_version_counter=False,
                auto_insert_metric_name=False,
                save_on_train_epoch_end=False,
            )
        )
    if cfg.pictures:
        callbacks.append(PictureLogger(output_dir / "pictures", cfg.pictures))
    if t.progress:
        callbacks.append(TrainProgress())
    accumulate = t.accumulate_grad_batches
    every = t.val_every_n_steps
    trainer = L.Trainer(
        max_steps=t.max_steps,
        **device_settings(cfg),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=t.gradient_clip_val,
        sync_batchnorm=t.sync_batchnorm and torch.cuda.is_available(),
        log_every_n_steps=t.log_every_n_steps,
        # The whole run is one Lightning epoch; validation is counted in micro-batches there.
        val_check_interval=every * accumulate if every else None,
        check_val_every_n_epoch=None if every else sys.maxsize,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=bool(t.progress),
        enable_model_summary=False,
        callbacks=callbacks,
        logger=make_loggers(cfg, output_dir),
        default_root_dir=output_dir,
        plugins=[AtomicCheckpointIO()],
    )
    return trainer


def keep_best(folder: Path, trainer: L.Trainer, monitor: str) -> None:
    """Make ``last.ckpt`` the best one if the final evaluation says so or cannot say, or if none was
    kept."""
    best = next(
        (c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor == monitor),  # type: ignore[attr-defined]
        None,
    )
    score = trainer.callback_metrics[monitor]
    if score.isnan():  # nothing to score by: no masks
        best = None
    if best is None or best.best_model_score is None or score > best.best_model_score.cpu():
        part = folder / ".best.ckpt.part"
        shutil.copyfile(folder / "last.ckpt", part)
        part.replace(folder / "best.ckpt")


def bring_best(checkpoint: Path, folder: Path) -> None:
    """The best weights of a run that goes on in another folder, which count there too."""
    best = checkpoint.with_name("best.ckpt")
    # An earlier step's checkpoint knows nothing of a best one that came later.
    if checkpoint.name == "last.ckpt" and best.is_file() and not (folder / best.name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / ".best.ckpt.part"
        shutil.copyfile(best, part)
        part.replace(folder / best.name)


def main() -> None:
    """Console entry point."""
    hydra_command("train", lambda cfg: train(cfg, Path(HydraConfig.get().runtime.output_dir)))


if __name__ == "__main__":
    main()
