"""Commands as their users start them, without the seconds that their imports take.

``python -m MODULE`` imports PyTorch, Lightning and timm anew, which takes longer than what most
tests do with it. Here a server imports them once, does nothing else, and every command is a fork
of it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

#: What all commands import; not the commands, of which each is ``__main__`` when it runs.
PRELOADED = [
    "wsss.build",
    "wsss.callbacks.pictures",
    "wsss.inference",
    "wsss.loggers",
    "wsss.metrics",
    "wsss.report.tables",
]


def fork_server() -> ForkServerContext:
    """Makes processes that are forks of one that has done nothing but import.

    Safer than forking this one, which has threads. There is one server a process of pytest.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_module(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    output: Path,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """``python -m module *arguments`` in ``folder``; what it printed goes through ``output``.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout`` seconds, and was killed.
    """
    output.mkdir()
    process = fork_server().Process(
        target=_run, args=(module, arguments, folder, dict(environment), output)
    )
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired([module, *arguments], timeout)
    printed, said = ((output / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, printed, said)


def _run(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    output: Path,
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0:0] = [str(folder)]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a fork ends without
