"""A score taken by several processes at once."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torchmetrics import Metric

from tests.forks import fork_server

Updates = list[tuple[Tensor, Tensor]]


def compute_on_ranks(metrics: list[Metric], ranks: list[Updates], folder: Path) -> list[list[Any]]:
    """What each of several gloo processes computes.

    Args:
        metrics: scores without an update; every rank updates and computes a copy of each.
        ranks: the updates of each rank.
        folder: an empty one, for the processes to meet in.

    Returns:
        by rank, by metric, what ``compute`` returns.
    """
    fork_server()
    mp.start_processes(
        _rank,
        (len(ranks), metrics, ranks, str(folder)),
        nprocs=len(ranks),
        start_method="forkserver",
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(ranks))]


def _rank(rank: int, size: int, metrics: list[Metric], ranks: list[Updates], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        # Ranks that wait for each other should fail the test, not hang it.
        timeout=timedelta(seconds=60),
    )
    # Tensors come in shared memory: without a copy all ranks would count into one state.
    metrics = copy.deepcopy(metrics)
    for metric in metrics:
        for update in ranks[rank]:
            metric.update(*update)
    found = [{k: v.clone() for k, v in metric.compute().items()} for metric in metrics]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
