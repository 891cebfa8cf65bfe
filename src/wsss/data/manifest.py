"""What was found out about one split of a data set, written down once and read by every run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsss.errors import UserError
from wsss.files import write_atomically

FORMAT = 2
"""Raise when files of an older program must not be taken for today's."""


@dataclass
class Item:
    """One image of a split.

    Attributes:
        name: unique within the split.
        image: path, relative to the data set's root where it lies inside; "" if there is none.
        size: (H, W) in pixels; (0, 0) while unknown.
        labels: sorted class indices 0..C-1; None if nothing says which classes the image holds.
        mask: path as ``image``, or None.
        group: what items belong together, for example a patient; "" for none.
        source: path of a file that ``labels`` came from and that belongs to this item alone.
        problem: why the item cannot be used at all, or None.
        mask_problem: why its mask cannot be used, or None.
        mask_classes: sorted class indices in the mask; None while nobody looked.
        labels_of_mask: ``labels`` are ``mask_classes``, since nothing else says any.
    """

    name: str
    image: str = ""
    size: tuple[int, int] = (0, 0)
    labels: list[int] | None = None
    mask: str | None = None
    group: str = ""
    source: str | None = None
    problem: str | None = None
    mask_problem: str | None = None
    mask_classes: list[int] | None = None
    labels_of_mask: bool = False


@dataclass
class Manifest:
    """One split of a data set.

    Attributes:
        kind: layout it came from (``voc``, ``coco`` ...).
        split: name of the split.
        classes: C foreground class names; class i has mask value i + 1.
        items: all images that the split names, those with problems too.
        options: settings of the layout that decide the content.
        decoded: every image and mask was decoded and every mask value seen; else headers alone.
        exif: images are turned as their EXIF orientation says.
        sources: files and folders besides the items' own whose change makes this out of date.
        notes: what a user should know: what was built, left out or assumed.
        stamp: size and time of change of all files, as :meth:`fingerprint` gave it.
        path: the file that this was read from or written to; not part of its content.
    """

    kind: str
    split: str
    classes: tuple[str, ...]
    items: list[Item]
    options: dict[str, Any] = field(default_factory=dict)
    decoded: bool = False
    exif: bool = False
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stamp: str = ""
    path: Path | None = field(default=None, compare=False)

    def fingerprint(self, root: Path) -> str:
        """Size and time of change of every file that this manifest speaks of, as one digest."""
        paths: set[str] = set(self.sources)
        for item in self.items:
            paths.update(p for p in (item.image, item.mask, item.source) if p)
        digest = hashlib.sha1(usedforsecurity=False)
        base = str(root)
        for path in sorted(paths):
            line = f"{path}:{_stat(os.path.join(base, path))}\n"  # noqa: PTH118
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def is_fresh(self, root: Path, options: dict[str, Any], classes: tuple[str, ...]) -> bool:
        """Whether nothing that this manifest speaks of has changed since it was written."""
        same = self.options == options and self.classes == classes
        return same and self.stamp == self.fingerprint(root)

    def save(self, path: Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        content = {"format": FORMAT, **vars(self)}
        del content["path"]
        # Absent values are most of the file.
        content["items"] = [
            {key: value for key, value in vars(item).items() if value not in (None, "", False)}
            for item in self.items
        ]
        # Folder names need not be UTF-8.
        text = json.dumps(content, ensure_ascii=False)
        write_atomically(path, text.encode(errors="surrogateescape"))
        self.path = path

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """Read what :meth:`save` wrote.

        Returns:
            None if there is no such file, or if it is cut off, damaged or of another format:
            everything in it can be found out again.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
            if content.pop("format") != FORMAT:
                return None
            content["items"] = [
                Item(**{**item, "size": tuple(item.get("size", (0, 0)))})
                for item in content["items"]
            ]
            content["classes"] = tuple(content["classes"])
            return cls(**content, path=path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _stat(path: str) -> str:
    try:
        found = os.stat(path)  # noqa: PTH116 (called for every file: Path objects cost more)
    except OSError:
        return "absent"
    # Of a folder, the time alone: it changes when a file comes or goes.
    size = 0 if os.path.isdir(path) else found.st_size  # noqa: PTH112
    return f"{size}:{found.st_mtime_ns}"


def work_folders(root: Path) -> list[Path]:
    """Where manifests and built files of a data set may lie, the best place first.

    ``root/wsss`` and a folder in ``~/.cache/wsss``, whose name is the root's name and a digest of
    its path; if ``$WSSS_CACHE`` is set, a folder in there alone.
    """
    named = os.environ.get("WSSS_CACHE")
    cache = Path(named or "~/.cache/wsss").expanduser()
    digest = hashlib.sha1(os.fsencode(root.resolve()), usedforsecurity=False).hexdigest()[:10]
    folder = cache / f"{root.resolve().name}-{digest}"
    return [folder] if named else [root / "wsss", folder]


def work_folder(root: Path) -> Path:
    """The first of :func:`work_folders` that can be written; it is made.

    Raises:
        UserError: none can.
    """
    folders = work_folders(root)
    for folder in folders:
        if is_writable(folder):
            return folder
    raise UserError(
        f"{' and '.join(map(str, folders))} cannot be written, and what is found out about a data "
        "set must be kept somewhere; set the environment variable WSSS_CACHE to a folder"
    )


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def relative(path: Path, root: Path) -> str:
    """``path`` as a manifest stores it: relative to ``root`` if inside, else absolute."""
    for base, inside in ((root, path), (root.absolute(), path.absolute())):
        if inside.is_relative_to(base):
            return inside.relative_to(base).as_posix()
    return path.absolute().as_posix()


def files_by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, str]:
    """File name by stem of the files with one of ``suffixes``; an earlier suffix wins.

    Suffixes are compared in lower case. One look at the folder is far cheaper than one at every
    name, on network drives above all.
    """
    rank = {suffix: i for i, suffix in enumerate(suffixes)}
    found: dict[str, tuple[int, str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122
            order = rank.get(suffix.lower())
            if order is not None and (stem not in found or (order, entry.name) < found[stem]):
                found[stem] = (order, entry.name)
    return {stem: name for stem, (_, name) in found.items()}
