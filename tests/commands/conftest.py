"""A tiny network on a tiny tree, through the real command line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from tests.forks import run_module
from wsss.cli import config_dir

TINY = [
    "experiment=cosa_shapes",
    "~data.generate",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.eval_size=64",
    "view.crop_size=64",
    "backbone.options.img_size=64",
    "backbone.options.depth=2",
    "backbone.options.embed_dim=24",
    "backbone.options.num_heads=2",
    "method.cam_scales=[1.0,0.5]",
    "method.eval_scales=[1.0,0.5]",
    "method.warmup_steps=2",
    "method.loss_warmup_steps=2",
    "method.threshold_fill_steps=1",
    "trainer.max_steps=5",
    "trainer.threads=1",
    "trainer.progress=false",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "pictures=0",
]

Run = Callable[..., subprocess.CompletedProcess[str]]


def command_environment() -> dict[str, str]:
    """The environment of a command: offline, one thread."""
    return os.environ | {
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
    }


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs ``python -m wsss.<command> ...`` in an empty folder and returns what it printed."""

    def call(command: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = run_module(
            f"wsss.{command}",
            arguments,
            folder=tmp_path,
            environment=command_environment(),
            output=tmp_path_factory.mktemp("printed") / command,
        )
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def tiny(shapes_root: Path) -> list[str]:
    """Overrides of ``wsss.train`` for a run of a few seconds."""
    return [*TINY, f"data.root={shapes_root}"]


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """A configuration as a command sees it, without starting the command."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose(config_name, overrides=overrides)
