"""Checkpoints, read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from wsss.errors import UserError
from wsss.methods.base import CHECKPOINT_FORMAT, CHECKPOINT_KEY


def find_checkpoint(path: str | Path, key: str = "checkpoint") -> Path:
    """The file that ``checkpoint=`` means; a run's folder stands for its best checkpoint.

    Args:
        path: as given.
        key: of the configuration, for messages.

    Raises:
        UserError: no such file; names those that are near.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in ("best.ckpt", "last.ckpt"):
            for folder in (path / "checkpoints", path):
                if (folder / name).is_file():
                    return folder / name
        raise UserError(
            f"{key}='{path}' is a folder without checkpoints/best.ckpt or last.ckpt: give a "
            "run's folder or its .ckpt file."
        )
    near = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    hint = f" There are: {', '.join(p.name for p in near)}." if near else ""
    raise UserError(f"{key}='{path}': no such file.{hint}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content: tensors and plain containers only.

    Raises:
        UserError: the file cannot be read so, or was written by a newer version of wsss.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here: pickle, zip, runtime
        raise UserError(
            f"'{path}' cannot be read as a checkpoint ({str(error).splitlines()[0]}). It may be "
            "cut off or of another program; take another one, for example best.ckpt."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is not a checkpoint of wsss.")
    about = content.get(CHECKPOINT_KEY)
    if isinstance(about, dict) and about.get("format", 1) > CHECKPOINT_FORMAT:
        raise UserError(
            f"'{path}' was written by wsss {about.get('version')} in format {about['format']}; "
            f"this version reads up to {CHECKPOINT_FORMAT}. Update wsss."
        )
    return content


def saved_config(checkpoint: dict[str, Any], path: str | Path) -> DictConfig:
    """The configuration that a checkpoint was trained with.

    Raises:
        UserError: the file was not written by wsss.
    """
    saved = checkpoint.get(CHECKPOINT_KEY, {}).get("config")
    if not saved:
        raise UserError(
            f"'{path}' was not written by wsss: it holds no configuration. Checkpoints lie in a "
            "run's checkpoints/ folder; `wsss import_checkpoint` makes one of the authors' files."
        )
    return cast(DictConfig, OmegaConf.create(saved))


def with_data(saved: DictConfig, data: DictConfig) -> DictConfig:
    """A run's configuration, open to changes, with the data that a command asks for.

    Args:
        saved: from :func:`saved_config`.
        data: the command's ``data``: a whole data set takes the place of the run's, but for the
            size of evaluation images unless that is typed; of ``data=from_checkpoint`` the keys
            that are set change the run's own.
    """
    run = saved.copy()
    OmegaConf.set_struct(run, False)
    if "_target_" in data:
        run.data = OmegaConf.create(OmegaConf.to_container(data, resolve=True))
        size = OmegaConf.select(saved, "data.eval_size")
        typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        if size is not None and not any(o.startswith("data.eval_size=") for o in typed):
            run.data.eval_size = size  # what the network was trained and scored at
    else:
        for key, value in data.items():
            if value is not None:
                run.data[key] = value
    return run


def saved_classes(checkpoint: dict[str, Any], path: str | Path) -> tuple[str, ...]:
    """Foreground class names of a checkpoint, in label order.

    Raises:
        UserError: the file was not written by wsss.
    """
    classes = checkpoint.get(CHECKPOINT_KEY, {}).get("classes")
    if not classes:
        raise UserError(f"'{path}' was not written by wsss: it names no classes.")
    return tuple(classes)
