"""Loggers of a run: CSV always, W&B by choice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf


def make_loggers(cfg: DictConfig, output_dir: Path) -> list[Logger]:
    """CSV in the run folder, and W&B when ``cfg.logger.wandb`` is set."""
    if getattr(rank_zero_only, "rank", 0) == 0:  # the one rank that writes
        _keep_earlier(output_dir / "metrics.csv")
    loggers: list[Logger] = [
        CSVLogger(output_dir, name="", version="", flush_logs_every_n_steps=50)
    ]
    wandb = make_wandb_logger(cfg, output_dir)
    return [*loggers, wandb] if wandb is not None else loggers


def make_wandb_logger(cfg: DictConfig, output_dir: Path) -> WandbLogger | None:
    """W&B when ``cfg.logger.wandb`` is set; offline without a key."""
    if cfg.logger.wandb is None:
        return None
    options = cast(dict[str, Any], OmegaConf.to_container(cfg.logger.wandb, resolve=True))
    offline = wandb_is_offline()
    if offline:
        os.environ["WANDB_MODE"] = "offline"
    logger = WandbLogger(
        name=f"{cfg.name}-seed{cfg.seed}", save_dir=output_dir, offline=offline, **options
    )
    # What is not set yet (checkpoint=???) stays out.
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    logger.log_hyperparams(cast(dict[str, Any], plain))
    return logger


def _keep_earlier(path: Path) -> None:
    """Rename the log of an earlier start of this run, which Lightning would delete."""
    if path.exists() and path.stat().st_size:
        number = 1
        while (kept := path.with_name(f"metrics.{number}.csv")).exists():
            number += 1
        path.rename(kept)


def wandb_is_offline() -> bool:
    """Whether runs stay on this machine: ``WANDB_MODE`` says so, or there is no key."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode != "online"
    if os.environ.get("WANDB_API_KEY"):
        return False
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "wandb" not in netrc.read_text()
    except OSError:
        return True
