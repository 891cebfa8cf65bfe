"""What tests of preparing share: whether a call wrote anything."""

from __future__ import annotations

from pathlib import Path


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of all files below a folder; equal if none was written or removed."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): (stat.st_mtime_ns, stat.st_size)
        for path, stat in found.items()
    }
