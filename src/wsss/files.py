"""Files that are whole or not there."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
