"""Score a checkpoint: ``python -m wsss.evaluate checkpoint=.../best.ckpt``.

Every network of the method under every protocol in one pass over the validation images; writes
``scores.json`` and pictures.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from wsss.build import build_data
from wsss.callbacks.pictures import PictureLogger
from wsss.checkpoints import find_checkpoint, read_checkpoint, restore_method, saved_config
from wsss.cli import hydra_command, quiet_libraries
from wsss.errors import UserError
from wsss.files import check_writable
from wsss.methods.base import check_classes
from wsss.progress import TrainProgress
from wsss.report.tables import print_scores, write_scores


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Score ``cfg.checkpoint``.

    Args:
        cfg: ``conf/evaluate.yaml`` composed.

    Returns:
        mIoU in [0, 1] by full name, for example ``an/seg/miou_ms_flip``.

    Raises:
        UserError: no such checkpoint, one of other classes than the data, or bad data.
    """
    quiet_libraries()
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise UserError(
            "checkpoint is not set: give a run's file, for example "
            "checkpoint=outputs/.../checkpoints/best.ckpt."
        )
    path = find_checkpoint(cfg.checkpoint)
    output_dir = Path(cfg.output_dir or path.parent.parent / "evaluation")
    check_writable(output_dir)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    checkpoint = read_checkpoint(path)
    run = merge(saved_config(checkpoint, path), cfg)
    data = build_data(run)
    try:
        data.setup("validate")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    check_classes(checkpoint, data.classes, str(path))
    if not data.has_masks:
        raise UserError(
            f"split '{data.val_split}' of {data.root} has no masks: there is nothing to score. "
            "Choose another with data.val_split=..."
        )
    method = restore_method(checkpoint, run, path)

    trainer = L.Trainer(
        accelerator=cfg.accelerator,
        devices=cfg.devices,
        precision=run.trainer.precision,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            TrainProgress(),
            *([PictureLogger(output_dir / "pictures", cfg.pictures)] if cfg.pictures else []),
        ],
    )
    trainer.validate(method, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        write_scores(output_dir / "scores.json", method, step=checkpoint["global_step"])
        print_scores(method)
        print(f"Written to {output_dir}")
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def merge(saved: DictConfig, cfg: DictConfig) -> DictConfig:
    """The training run's configuration with what the command changes."""
    run = saved.copy()
    OmegaConf.set_struct(run, False)
    if "_target_" in cfg.data:
        run.data = OmegaConf.create(OmegaConf.to_container(cfg.data, resolve=True))
    else:
        for key, value in cfg.data.items():
            if value is not None:
                run.data[key] = value
    for key in ("eval_scales", "cam_scales", "cpl_threshold"):
        if cfg[key] is not None:
            run.method[key] = cfg[key]
    if cfg.precision is not None:
        run.trainer.precision = cfg.precision
    return run


def main() -> None:
    """Console entry point."""
    hydra_command("evaluate", evaluate)


if __name__ == "__main__":
    main()
