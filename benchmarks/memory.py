"""Memory of a benchmark's process and device; for scripts in this folder."""

from __future__ import annotations

import os
import resource
import sys

import torch


def free_memory(device: str) -> int:
    """Bytes that nobody uses."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def held_memory(device: str) -> int:
    """Bytes that a peak starts from: on a CPU the peak so far, which imports do not fall from."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return peak_memory(device)


def peak_memory(device: str) -> int:
    """Bytes of this process at their most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
