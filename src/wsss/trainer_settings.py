"""The section ``trainer`` of a configuration, checked before any work."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig

from wsss.errors import UserError
from wsss.inference import accelerator_name, find_device, has_bf16, precision_on

#: whole numbers above 0; of those in OPTIONAL, null (or 0) means never, or a choice of the library
POSITIVE = (
    "max_steps",
    "num_nodes",
    "accumulate_grad_batches",
    "log_every_n_steps",
    "val_every_n_steps",
    "save_every_n_steps",
    "keep_every_n_steps",
    "threads",
)
OPTIONAL = ("val_every_n_steps", "save_every_n_steps", "keep_every_n_steps", "threads")
SWITCHES = ("sync_batchnorm", "progress")


def check_trainer(cfg: DictConfig) -> None:
    """Check ``cfg.trainer``, and write its numbers and its precision as Lightning names them.

    Args:
        cfg: changed in place: ``1e3`` steps are 1000, precision ``bf16`` is ``bf16-mixed``, and
            ``auto`` what it means on this machine.

    Raises:
        UserError: a value of the wrong type or size, or devices that are not there.
    """
    t = cfg.trainer
    for key in POSITIVE:
        t[key] = _positive(f"trainer.{key}", t[key], key in OPTIONAL)
    for key in SWITCHES:
        if not isinstance(t[key], bool):
            raise UserError(f"trainer.{key}={t[key]}: choose true or false.")
    clip = t.gradient_clip_val
    if clip is not None and (not _is_number(clip) or clip < 0):
        raise UserError(
            f"trainer.gradient_clip_val={clip}: give the largest norm of a gradient, or null."
        )
    t.accelerator = accelerator_name(t.accelerator, "trainer.accelerator")
    device = find_device("cpu" if t.accelerator == "cpu" else "auto")
    t.precision = precision_on(device, t.precision, "trainer.precision")
    if t.precision == "bf16-mixed" and not has_bf16(device):
        rank_zero_warn(
            "trainer.precision=bf16-mixed: this device emulates bfloat16, which takes several "
            "times as long as trainer.precision=32-true."
        )
    _check_devices(cfg)


def device_settings(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of ``lightning.Trainer`` that say what a run runs on."""
    names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    return {name: cfg.trainer[name] for name in names}


def _check_devices(cfg: DictConfig) -> None:
    """Make a trainer that does nothing else: Lightning knows best what it can run on."""
    settings = device_settings(cfg)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real one says it again
            L.Trainer(
                **settings,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    # Lightning raises many types here, also of libraries that a strategy wants.
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        given = " ".join(f"trainer.{name}={value}" for name, value in settings.items())
        raise UserError(
            f"{given} does not work on this machine: {' '.join(str(error).split())} Leave "
            "accelerator, devices and strategy at auto to take what is there."
        ) from error


def _positive(key: str, value: Any, optional: bool) -> int | None:
    if optional and not value and not isinstance(value, bool | str):
        return None
    if not _is_number(value) or value != int(value) or value < 1:
        more = ", or null" if optional else ""
        raise UserError(f"{key}={value}: give a whole number above 0{more}.")
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
