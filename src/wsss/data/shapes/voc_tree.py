"""``shapes`` as a PASCAL VOC 2012 tree.

::

    JPEGImages/shapes_000001.jpg
    SegmentationClass/shapes_000001.png      palette PNG, 1..C, 0 background, 255 void
    Annotations/shapes_000001.xml            every object with its box
    ImageSets/Segmentation/{train,val}.txt   one name a line
    classes.txt
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from wsss.data.shapes.files import Draw, Numbers, image_name, jpeg, save_mask, write_classes
from wsss.data.shapes.scene import Sample


def files(numbers: Numbers) -> Iterator[str]:
    """Paths under the root of all files that :func:`write` writes."""
    for split, members in numbers.items():
        for name in map(image_name, members):
            yield f"JPEGImages/{name}.jpg"
            yield f"SegmentationClass/{name}.png"
            yield f"Annotations/{name}.xml"
        yield f"ImageSets/Segmentation/{split}.txt"
    yield "classes.txt"


def write(root: Path, numbers: Numbers, draw: Draw) -> None:
    """Write the tree into the empty folder ``root``."""
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, members in numbers.items():
        for name, sample in zip(map(image_name, members), draw(members), strict=True):
            (root / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg(sample.image))
            save_mask(root / "SegmentationClass" / f"{name}.png", sample.mask)
            _annotation(name, sample).write(root / "Annotations" / f"{name}.xml", encoding="utf-8")
        lines = "".join(f"{image_name(number)}\n" for number in members)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(lines, encoding="utf-8")
    write_classes(root)


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
