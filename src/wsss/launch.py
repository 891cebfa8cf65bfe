"""Several processes for one command: what Lightning's launcher is told of this job.

With several devices, and no ``torchrun`` or Slurm around it, Lightning starts the other ranks by
running the command line again. Under ``-m`` that would be the whole sweep, in another folder, and
what one job leaves behind (variables, the process group) would keep the next from starting its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import read_write

#: what Lightning sets for the processes that it starts, and mostly leaves set
VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: settings of a sweep that one of its jobs does not have
OF_SWEEPS = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra.sweeper", "hydra.launcher")


@contextmanager
def one_job() -> Iterator[None]:
    """While a job of a Hydra multirun goes on, the command line is that job's alone.

    Outside of a multirun nothing changes.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        yield
        return
    config: Any = HydraConfig.get()
    argv, before = list(sys.argv), {name: os.environ.get(name) for name in VARIABLES}
    overrides = [o for o in config.overrides.hydra if not o.lstrip("+~").startswith(OF_SWEEPS)]
    sys.argv[1:] = [*_config_folder(argv), *config.overrides.task, *overrides]
    with read_write(config), read_write(config.run):
        # Lightning gives this folder to the other ranks: in a sweep it is not the job's.
        config.run.dir = config.runtime.output_dir
    try:
        yield
    finally:
        sys.argv[:] = argv
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            elif os.environ.pop(name, None) and name == "LOCAL_RANK" and dist.is_initialized():
                dist.destroy_process_group()  # of processes that end with this job


def _config_folder(argv: Sequence[str]) -> list[str]:
    """``--config-dir x``, as typed."""
    for i, argument in enumerate(argv):
        if argument in ("--config-dir", "-cd"):
            return list(argv[i : i + 2])
        if argument.startswith(("--config-dir=", "-cd=")):
            return [argument]
    return []
