"""Loggers of a run: CSV always, W&B by choice."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from wsss.files import write_atomically


def make_loggers(cfg: DictConfig, output_dir: Path) -> list[Logger]:
    """CSV in the run folder, and W&B when ``cfg.logger.wandb`` is set."""
    if getattr(rank_zero_only, "rank", 0) == 0:  # the one rank that writes
        _keep_earlier(output_dir / "metrics.csv")
    loggers: list[Logger] = [
        CSVLogger(output_dir, name="", version="", flush_logs_every_n_steps=50)
    ]
    wandb = make_wandb_logger(cfg, output_dir, resumable=True)
    return [*loggers, wandb] if wandb is not None else loggers


def make_wandb_logger(
    cfg: DictConfig, output_dir: Path, resumable: bool = False
) -> WandbLogger | None:
    """W&B when ``cfg.logger.wandb`` is set; offline without a key.

    Args:
        cfg: of the command.
        output_dir: where W&B's files go.
        resumable: what goes on in ``output_dir`` is the same W&B run, whose id lies there in
            ``wandb_run.txt``.
    """
    if cfg.logger.wandb is None:
        return None
    options = cast(dict[str, Any], OmegaConf.to_container(cfg.logger.wandb, resolve=True))
    # Where W&B is switched off it stays off: Lightning's `offline` would make it write files.
    offline = wandb_is_offline() and os.environ.get("WANDB_MODE") != "disabled"
    if offline:
        os.environ["WANDB_MODE"] = "offline"
    elif os.environ.get("WANDB_MODE") == "disabled":
        options["mode"] = "disabled"
    if resumable and "id" not in options:
        options |= {"id": _run_id(output_dir), "resume": "allow"}
    logger = WandbLogger(
        name=f"{cfg.name}-seed{cfg.seed}", save_dir=output_dir, offline=offline, **options
    )
    # What is not set yet (checkpoint=???) stays out.
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    logger.log_hyperparams(cast(dict[str, Any], plain))
    return logger


@contextmanager
def wandb_run_ends() -> Iterator[None]:
    """Ends W&B's run with what is inside, so that the next of this process is another one.

    One that was there before is its owner's to end.
    """
    before = _wandb_run()
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if before is None and _wandb_run() is not None:
            sys.modules["wandb"].finish(exit_code=exit_code)


def _wandb_run() -> Any:
    wandb = sys.modules.get("wandb")  # not imported: nothing is logged there
    return None if wandb is None else wandb.run


def _run_id(folder: Path) -> str:
    file = folder / "wandb_run.txt"
    if file.is_file() and (known := file.read_text().strip()):
        return known
    new = uuid.uuid4().hex[:12]
    if getattr(rank_zero_only, "rank", 0) == 0:  # the one rank that logs
        write_atomically(file, f"{new}\n".encode())
    return new


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
    try:
        known = Path(os.environ.get("NETRC", Path.home() / ".netrc")).read_text()
    except OSError:
        return True
    import wandb

    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    return "wandb" not in known and (urlsplit(server).hostname or server) not in known
