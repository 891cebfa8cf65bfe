"""``shapes`` on disk."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from PIL import Image

from wsss.data.shapes import difficulty
from wsss.data.shapes.difficulty import CLASSES, VERSION
from wsss.data.shapes.scene import Sample, check_range, render

JPEG_QUALITY = 92
LAYOUTS = ("voc",)
FIRST_VAL = 500_001  # image numbers: training from 1, validation from here


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
        root: folder of the tree; ``JPEGImages``, ``SegmentationClass``, ``Annotations``,
            ``ImageSets/Segmentation/{train,val}.txt``, ``classes.txt`` and ``shapes.json`` in it.
        train: number of training images, at least 1.
        val: number of validation images, at least 1.
        image_size: side of the square images in pixels, at least 32.
        seed: seed, not negative; the same seed gives the same files.
        layout: "voc", the PASCAL VOC 2012 tree.

    Raises:
        ValueError: if an argument is out of range.
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
    target = Path(root)
    if _is_complete(target, parameters):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        _write_voc(partial, parameters, train, val, image_size, seed)
        try:
            partial.rename(target)
        except OSError:
            # Another process may have finished the same data set first, which is as good.
            if not _is_complete(target, parameters):
                raise
    finally:  # also on Ctrl-C; after the rename there is nothing left to remove
        shutil.rmtree(partial, ignore_errors=True)


def _numbers(train: int, val: int) -> tuple[range, range]:
    """Image numbers of the two splits: apart, so neither depends on the other's length."""
    return range(1, train + 1), range(FIRST_VAL, FIRST_VAL + val)


def _name(number: int) -> str:
    return f"shapes_{number:06d}"


def _is_complete(root: Path, parameters: dict[str, Any]) -> bool:
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
    names = {_name(n) for split in _numbers(int(found["train"]), int(found["val"])) for n in split}
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        present = {p.stem for p in (root / folder).iterdir()} if (root / folder).is_dir() else set()
        if missing := sorted(names - present):
            raise FileExistsError(
                f"{root / folder} lacks {len(missing)} of {len(names)} files, such as "
                f"{missing[0]}; {remedy}"
            )
    return True


def _write_voc(
    root: Path, parameters: dict[str, Any], train: int, val: int, image_size: int, seed: int
) -> None:
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    palette = _voc_palette()
    for split, numbers in zip(("train", "val"), _numbers(train, val), strict=True):
        for number in numbers:
            name, sample = _name(number), render(number, image_size, seed)
            # 4:4:4, because halved chroma would blur the patterns into one another.
            Image.fromarray(sample.image).save(
                root / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0
            )
            png = Image.fromarray(sample.mask, mode="P")
            png.putpalette(palette)
            png.save(root / "SegmentationClass" / f"{name}.png")
            _annotation(name, sample).write(root / "Annotations" / f"{name}.xml", encoding="utf-8")
        lines = "".join(f"{_name(number)}\n" for number in numbers)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(lines, encoding="utf-8")
    (root / "classes.txt").write_text("".join(f"{c}\n" for c in CLASSES), encoding="utf-8")
    (root / "shapes.json").write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")


def _annotation(name: str, sample: Sample) -> ET.ElementTree[ET.Element]:
    """PASCAL VOC annotation; boxes are 1-based, as VOC's are."""
    height, width = sample.mask.shape
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = "shapes"
    ET.SubElement(root, "filename").text = f"{name}.jpg"
    extent = ET.SubElement(root, "size")
    for key, value in (("width", width), ("height", height), ("depth", 3)):
        ET.SubElement(extent, key).text = str(value)
    ET.SubElement(root, "segmented").text = "1"
    for thing in sample.objects:
        node = ET.SubElement(root, "object")
        ET.SubElement(node, "name").text = thing.name
        ET.SubElement(node, "difficult").text = "0"
        box = ET.SubElement(node, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), thing.box, strict=True):
            ET.SubElement(box, key).text = str(value + 1)
    ET.indent(root)
    return ET.ElementTree(root)


def _voc_palette() -> list[int]:
    """PASCAL VOC's 256 colours: the bits of the index dealt to R, G, B from the top bit down."""
    palette = []
    for index in range(256):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        palette += color
    return palette
