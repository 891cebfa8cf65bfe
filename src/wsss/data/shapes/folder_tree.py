"""``shapes`` as a plain folder of images and masks with a table of labels.

::

    images/shapes_000001.jpg
    masks/shapes_000001.png                  palette PNG, 1..C, 0 background, 255 void
    labels.csv                               image,labels,split: shapes_000001.jpg,fox;boat,train
    classes.txt
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from wsss.data.shapes.difficulty import CLASSES
from wsss.data.shapes.files import Draw, Numbers, image_name, jpeg, save_mask, write_classes


def files(numbers: Numbers) -> Iterator[str]:
    """Paths under the root of all files that :func:`write` writes."""
    for members in numbers.values():
        for name in map(image_name, members):
            yield f"images/{name}.jpg"
            yield f"masks/{name}.png"
    yield "labels.csv"
    yield "classes.txt"


def write(root: Path, numbers: Numbers, draw: Draw) -> None:
    """Write the tree into the empty folder ``root``."""
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    with (root / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("image", "labels", "split"))
        for split, members in numbers.items():
            for name, sample in zip(map(image_name, members), draw(members), strict=True):
                (root / "images" / f"{name}.jpg").write_bytes(jpeg(sample.image))
                save_mask(root / "masks" / f"{name}.png", sample.mask)
                names = sorted({thing.name for thing in sample.objects}, key=CLASSES.index)
                table.writerow((f"{name}.jpg", ";".join(names), split))
    write_classes(root)
