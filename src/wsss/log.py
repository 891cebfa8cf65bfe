"""What a command says: on the terminal, and in the log file of its run where there is one."""

from __future__ import annotations

import logging


def tell(message: str) -> None:
    """Print a line, and keep it in the log file."""
    print(message, flush=True)
    keep(message)


def keep(message: str, level: int = logging.INFO) -> None:
    """Write to the log file alone what the terminal shows already; nothing without such a file.

    Hydra opens the file, ``train.log`` in the run's folder, and hands it to the root logger.
    """
    record = logging.LogRecord("wsss", level, "", 0, message, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
