"""What a run ran on, for whoever reads its numbers later."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wsss import __version__
from wsss.files import write_atomically


def processors() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every platform
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def describe(
    precision: str, world_size: int, gpus: Iterable[int] = (), resumed: int | None = None
) -> dict[str, Any]:
    """Versions, hardware and command of this process, with the time as ``started``.

    Args:
        precision: of the run, as Lightning names it.
        world_size: number of ranks.
        gpus: those of this machine that the run uses, which ``devices`` then lists by name.
        resumed: step that the run goes on from; its times are of what came after. None: from the
            start.

    ``commit`` is that of the source code, ``+`` behind it if files differ from it; None where wsss
    was installed from a wheel.
    """
    return {
        "wsss": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "timm", "numpy")},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": processors(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in gpus],
        "world_size": world_size,
        "precision": precision,
        "command": _command(),
        "resumed_from_step": resumed,
        "started": _now(),
    }


def write_environment(path: Path, about: dict[str, Any], finished: bool = False) -> None:
    """Write :func:`describe` as JSON; when finished ``finished`` and ``seconds`` too."""
    content = dict(about)
    if finished:
        content["finished"] = _now()
        took = datetime.fromisoformat(content["finished"]) - datetime.fromisoformat(
            about["started"]
        )
        content["seconds"] = took.total_seconds()
    write_atomically(path, f"{json.dumps(content, indent=2)}\n".encode())


def _command() -> list[str]:
    """As one would type it: ``wsss train``, however it was started."""
    program = Path(sys.argv[0])
    if program.parent != Path(__file__).parent:
        return sys.argv
    return [f"wsss {program.stem}", *sys.argv[1:]]


def _commit() -> str | None:
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    answers = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode:
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
