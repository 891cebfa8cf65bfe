"""``shapes`` on disk: written whole or not at all, in one of several layouts."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from wsss.data.layout import in_threads
from wsss.data.shapes import acdc_tree, coco_tree, difficulty, folder_tree, voc_tree
from wsss.data.shapes.difficulty import VERSION
from wsss.data.shapes.files import FIRST_VAL, Draw, Numbers, image_numbers
from wsss.data.shapes.scene import check_range, render


class Layout(Protocol):
    """A module that lays the data set out on disk."""

    def files(self, numbers: Numbers) -> Iterable[str]: ...

    def write(self, root: Path, numbers: Numbers, draw: Draw) -> None: ...


LAYOUTS: dict[str, Layout] = {
    "voc": voc_tree,
    "coco": coco_tree,
    "acdc": acdc_tree,
    "folder": folder_tree,
}


def generate(
    root: str | os.PathLike[str],
    train: int = 1200,
    val: int = 200,
    image_size: int = 96,
    seed: int = 0,
    layout: str = "voc",
) -> None:
    """Write the data set to ``root``, once.

    The tree appears whole or not at all: it is written beside ``root`` and renamed at the end. If
    ``root`` already holds this very data set, nothing is done.

    Args:
        root: folder of the tree; ``shapes.json`` in it records the parameters.
        train: number of training images, at least 1.
        val: number of validation images, at least 1.
        image_size: side of the square images in pixels, at least 32.
        seed: seed, not negative; the same seed gives the same files.
        layout: the same images and masks as a tree of "voc" (PASCAL VOC 2012), "coco" (MS COCO
            2017), "acdc" (volumes of patients, grey and without void) or "folder" (images, masks
            and a table); ``voc_tree.py`` and its siblings show each.

    Raises:
        ValueError: if an argument is out of range, or "acdc" cannot hold so few images of a split.
        FileExistsError: if ``root`` holds something else: another data set, the same one with
            other parameters, or one with files missing.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"shapes: layout={layout!r} is unknown; valid values: {', '.join(LAYOUTS)}"
        )
    check_range("train", train, 1, FIRST_VAL - 1)
    check_range("val", val, 1, 499_999)
    check_range("image_size", image_size, 32)
    check_range("seed", seed, 0)
    parameters: dict[str, Any] = {
        "version": VERSION,
        "train": train,
        "val": val,
        "image_size": image_size,
        "seed": seed,
        "layout": layout,
        **{knob.lower(): getattr(difficulty, knob) for knob in difficulty.KNOBS},
    }
    parameters = json.loads(json.dumps(parameters))  # as it reads back: lists for tuples
    target, numbers = Path(root), image_numbers(train, val)
    files = set(LAYOUTS[layout].files(numbers))
    if _is_complete(target, parameters, files):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir()
        LAYOUTS[layout].write(
            partial,
            numbers,
            lambda some: in_threads(lambda n: render(n, image_size, seed), some, "Drawing images"),
        )
        record = json.dumps(parameters, indent=2) + "\n"
        (partial / "shapes.json").write_text(record, encoding="utf-8")
        try:
            partial.rename(target)
        except OSError:
            # Another process may have finished the same data set first, which is as good.
            if not _is_complete(target, parameters, files):
                raise
    finally:  # also on Ctrl-C; after the rename there is nothing left to remove
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(root: Path, parameters: dict[str, Any], files: set[str]) -> bool:
    """True if ``root`` is this data set, False if it is free to write; raises otherwise."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    record = root / "shapes.json"
    remedy = "remove it to generate the data set again, or give another root"
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileExistsError(
            f"{root} exists and is no generated data set (no shapes.json in it); {remedy}"
        ) from None
    except (NotADirectoryError, ValueError) as error:
        raise FileExistsError(f"{record} cannot be read ({error}); {remedy}") from None
    if found != parameters:
        old = found if isinstance(found, dict) else {}
        changes = [
            f"{key}: {old.get(key)!r} there, {value!r} asked for"
            for key, value in parameters.items()
            if old.get(key) != value
        ]
        raise FileExistsError(
            f"{root} holds shapes with other parameters ({'; '.join(changes) or found}); {remedy}"
        )
    if missing := sorted(files - {path.relative_to(root).as_posix() for path in root.rglob("*")}):
        raise FileExistsError(
            f"{root} lacks {len(missing)} of {len(files)} files, such as {missing[0]}; {remedy}"
        )
    return True
