"""What the layouts of ``shapes`` share: numbers, names and the bytes of one image and one mask."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss.data.images import encode_mask
from wsss.data.shapes.difficulty import CLASSES
from wsss.data.shapes.scene import Sample

Numbers = Mapping[str, range]
"""Image numbers of "train" and of "val", in this order."""
Draw = Callable[[Sequence[int]], Iterator[Sample]]
"""The samples of image numbers, in their order."""

JPEG_QUALITY = 92
FIRST_VAL = 500_001  # image numbers: training from 1, validation from here


def image_numbers(train: int, val: int) -> Numbers:
    """Image numbers of the two splits: apart, so neither depends on the other's length."""
    return {"train": range(1, train + 1), "val": range(FIRST_VAL, FIRST_VAL + val)}


def image_name(number: int) -> str:
    return f"shapes_{number:06d}"


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """The JPEG file of an (H, W, 3) RGB image, the same in every layout."""
    file = io.BytesIO()
    # 4:4:4, because halved chroma would blur the patterns into one another.
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def save_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write an (H, W) class mask as a PNG with PASCAL VOC's palette."""
    path.write_bytes(encode_mask(mask))


def write_classes(root: Path) -> None:
    """Write ``classes.txt``: one foreground class a line, line k being mask value k."""
    (root / "classes.txt").write_text("".join(f"{c}\n" for c in CLASSES), encoding="utf-8")
