"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from wsss.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(folder: Path, key: str = "output_dir") -> None:
    """Make a folder and prove that a file can be written there.

    Args:
        folder: made when missing.
        key: that chose it, for the error.

    Raises:
        UserError: it cannot.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{key}='{folder}' cannot be written ({error.strerror}). Choose another folder with "
            f"{key}=..."
        ) from error


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
