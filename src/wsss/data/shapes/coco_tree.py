"""``shapes`` as an MS COCO 2017 tree.

::

    train2017/shapes_000001.jpg              the image ids are the image numbers: 1, 2, ...
    val2017/shapes_500001.jpg
    annotations/instances_{train,val}2017.json

Each annotation is a connected region of a class, as uncompressed RLE: an object that another one
cuts in two has two, and two touching objects of a class share one. Void pixels are one crowd
annotation, of a class of the image. The annotations of an image do not overlap. Thus painting the
instances with their class and the crowds with 255 gives exactly the mask of the VOC tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from wsss.data.images import VOID
from wsss.data.shapes.difficulty import CLASSES, VERSION
from wsss.data.shapes.files import Draw, Numbers, image_name, jpeg
from wsss.data.shapes.scene import Sample

CATEGORY_IDS = tuple(k + 1 + k // 3 for k in range(len(CLASSES)))
"""1, 2, 3, 5, 6, 7, 9 ...: with gaps as in MS COCO, so that a reader must map them to classes."""


def files(numbers: Numbers) -> Iterator[str]:
    """Paths under the root of all files that :func:`write` writes."""
    for split, members in numbers.items():
        for number in members:
            yield f"{split}2017/{image_name(number)}.jpg"
        yield f"annotations/instances_{split}2017.json"


def write(root: Path, numbers: Numbers, draw: Draw) -> None:
    """Write the tree into the empty folder ``root``."""
    (root / "annotations").mkdir()
    annotation_ids = count(1)  # over both splits, as in MS COCO
    for split, members in numbers.items():
        folder = root / f"{split}2017"
        folder.mkdir()
        images, annotations = [], []
        for number, sample in zip(members, draw(members), strict=True):
            height, width = sample.mask.shape
            name = f"{image_name(number)}.jpg"
            (folder / name).write_bytes(jpeg(sample.image))
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for annotation in _annotations(sample):
                annotations.append({"id": next(annotation_ids), "image_id": number, **annotation})
        content = {
            "info": {"description": "shapes, a generated data set", "version": str(VERSION)},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": category, "name": name, "supercategory": "shape"}
                for category, name in zip(CATEGORY_IDS, CLASSES, strict=True)
            ],
        }
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _annotations(sample: Sample) -> Iterator[dict[str, Any]]:
    for k, category in enumerate(CATEGORY_IDS):
        number, regions = cv2.connectedComponents((sample.mask == k + 1).astype(np.uint8))
        for region in range(1, number):
            yield _annotation(regions == region, category, iscrowd=0)
    void = sample.mask == VOID
    if void.any():
        category = CATEGORY_IDS[CLASSES.index(sample.objects[0].name)]
        yield _annotation(void, category, iscrowd=1)


def _annotation(pixels: NDArray[np.bool_], category: int, iscrowd: int) -> dict[str, Any]:
    rows, cols = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    x, y, right, bottom = (int(edge) for edge in (cols[0], rows[0], cols[-1], rows[-1]))
    return {
        "category_id": category,
        "iscrowd": iscrowd,
        "area": int(pixels.sum()),
        "bbox": [x, y, right - x + 1, bottom - y + 1],
        "segmentation": {"counts": _run_lengths(pixels), "size": list(pixels.shape)},
    }


def _run_lengths(pixels: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of equal pixels, column after column, the first one of zeros."""
    column_major = pixels.ravel(order="F")
    changes = np.flatnonzero(np.diff(column_major, prepend=False))
    return [int(length) for length in np.diff(changes, prepend=0, append=column_major.size)]
