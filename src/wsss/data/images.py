"""Reading images and masks: every mode and every defect of the files that users have."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
VOID = 255
"""Mask value of pixels without a class (object borders, padding)."""

# The last bytes of a complete file. A file that ends otherwise is decoded to find out: some
# cameras append bytes after the end marker, which is harmless.
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
#: problems that a message names before it counts the others
SHOWN = 10
#: what PIL raises of files that are not what they should be
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DatasetError(UserError):
    """A data set on disk that cannot be used; the message names file, value and remedy."""


def summary(problems: Sequence[str]) -> str:
    """Show the first few of ``problems``, one a line, and count the others."""
    lines = [f"  - {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def nearest(value: str, choices: Sequence[str]) -> str:
    close = get_close_matches(value.lower(), choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(choices)}"


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own convert would clip, not scale
        grey = np.array(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError(f"pixel values {grey.min()}..{grey.max()} do not fit 16 bits")
        eight = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(eight[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; store 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        black = Image.new("RGB", layered.size)
        black.paste(layered, mask=layered.getchannel("A"))
        return np.array(black)
    # convert() would copy an image that is RGB already.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


_EXIF_ORIENTATION = 0x0112
#: how to turn an image by its orientation; PIL's own way also writes the tags anew, and fails at
#: any that is damaged
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where nothing legible says otherwise."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def read_rgb(
    path: str | os.PathLike[str], exif: bool = False, longest: int | None = None
) -> NDArray[np.uint8]:
    """Decode an image file to RGB.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled to 8 bits (65535 -> 255), and
    transparent pixels are composited on black.

    Args:
        path: a file PIL can read.
        exif: turn the image as its EXIF orientation says, as viewers do. The masks and boxes of
            VOC, COCO and the like refer to the pixels as stored.
        longest: pixels of the longer side that are enough. A JPEG that has twice as many or more
            is decoded at a half, a quarter or an eighth of its size (rounded up), which never
            has fewer, at a fraction of the cost. Other formats are decoded as they are.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DatasetError: the file is missing, truncated or no image; names it and the cause.
    """
    try:
        with Image.open(path) as image:
            if longest is not None:
                _decode_smaller(image, longest)
            image.load()
            turn = _TURNS.get(_orientation(image)) if exif else None
            return _to_rgb(image if turn is None else image.transpose(turn))
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such image file") from None
    except _BROKEN as error:
        raise DatasetError(
            f"{path}: cannot decode the image ({error}); replace the file, or take its name "
            "off the image list"
        ) from error


def _decode_smaller(image: Image.Image, longest: int) -> None:
    """Have an image that is not yet loaded decoded at a fraction with ``longest`` pixels or more.

    libjpeg leaves out the high frequencies of its blocks: no aliasing, and most of the work saved.
    """
    width, height = image.size
    part = next((n for n in (8, 4, 2) if max(width, height) >= n * longest), 1)
    if part > 1:  # the mode stays as it is; formats but JPEG know no fraction
        image.draft(None, (max(1, width // part), max(1, height // part)))


def read_mask(
    path: str | os.PathLike[str], num_classes: int, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decode a class mask, a palette or grey PNG whose stored values are the classes.

    Args:
        path: the mask file.
        num_classes: C, the number of foreground classes.
        size: (H, W) the mask must have, the size of its image; None accepts any.

    Returns:
        (H, W) uint8 with 0 (background), 1..C and 255 (void).

    Raises:
        DatasetError: missing or broken file, colours instead of class numbers, another size
            than the image, or values outside 0..C and 255.
    """
    try:
        with Image.open(path) as image:
            scale = _grey_scale(image)
            image.load()
            if problem := _mode_problem(path, image.mode, num_classes):
                raise DatasetError(problem)
            mask = np.array(image) // scale if scale > 1 else np.array(image)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such mask file") from None
    except DatasetError:
        raise
    except _BROKEN as error:
        raise DatasetError(f"{path}: cannot decode the mask ({error}); replace it") from error
    if size is not None and mask.shape != size:
        raise DatasetError(size_problem(path, mask.shape, size))
    wrong = mask[(mask > num_classes) & (mask != VOID)]
    if wrong.size:
        values = sorted({int(value) for value in np.unique(wrong)})
        shown = ", ".join(map(str, values[:SHOWN])) + (", ..." if len(values) > SHOWN else "")
        raise DatasetError(
            f"{path}: mask holds the values {shown}, allowed are 0..{num_classes} and {VOID}; "
            "map them to classes, or list the missing classes in classes.txt"
        )
    return mask.astype(np.uint8)


def _grey_scale(image: Image.Image) -> int:
    """What PIL multiplies the values of a grey PNG of 2 or 4 bits by; of a file not yet loaded."""
    tiles = getattr(image, "tile", [])
    stored = str(tiles[0][3]) if tiles else ""
    return {"L;2": 85, "L;4": 17}.get(stored, 1)


def _mode_problem(path: str | os.PathLike[str], mode: str, num_classes: int) -> str | None:
    if mode in ("P", "L", "1") or mode.startswith("I"):
        return None
    return (
        f"{path}: mask has mode {mode}, expected class numbers 0..{num_classes} and {VOID} in a "
        "palette or grey PNG; convert its colours to class numbers"
    )


def encode_mask(mask: NDArray[np.uint8]) -> bytes:
    """A class mask (H, W) uint8 as a PNG in VOC's colours."""
    image = Image.fromarray(mask, mode="P")
    image.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def encode_grey(image: NDArray[np.uint8]) -> bytes:
    """A grey image (H, W) uint8 as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image, mode="L").save(buffer, "PNG")
    return buffer.getvalue()


def voc_palette(n: int = 256) -> NDArray[np.uint8]:
    """The colours of PASCAL VOC's label images, (n, 3) uint8: bits of the index, spread out."""
    index = np.arange(n)[:, None]
    palette = np.zeros((n, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index[:, 0] >> (3 * bit + channel)) & 1) << (7 - bit)
    return palette.astype(np.uint8)


def size_problem(
    path: str | os.PathLike[str], found: tuple[int, ...], expected: tuple[int, int]
) -> str:
    return (
        f"{path}: mask is {found[1]}x{found[0]} but its image is {expected[1]}x{expected[0]} "
        "(width x height); replace the mask by the one of this image"
    )


def inspect_image(
    path: Path, decode: bool = False, exif: bool = False
) -> tuple[tuple[int, int] | None, str | None]:
    """Look at an image: ``((H, W), None)`` or ``(None, problem)``.

    Args:
        path: image file.
        decode: decode it; else the header and the end of the file are looked at, which finds
            files that are cut off, at a fraction of the cost.
        exif: give the size after turning the image as its EXIF orientation says.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                return None, f"{path}: empty file (0 bytes); fetch it again"
            file.seek(0)
            with Image.open(file) as image:
                size, marker = (image.height, image.width), _END_MARKERS.get(image.format or "")
                # PIL decodes a PNG for this: its EXIF may come last. From 5 on: quarter turns.
                if exif and not decode and _orientation(image) >= 5:
                    size = size[::-1]
                file.seek(-12, os.SEEK_END)
                whole = marker is not None and file.read().endswith(marker)
        if decode or not whole:
            # The size as it will be loaded: PIL turns TIFF by itself, with or without exif.
            height, width, _ = read_rgb(path, exif).shape
            size = height, width
    except DatasetError as error:
        return None, str(error)
    except _BROKEN as error:
        return None, f"{path}: not a readable image ({error}); replace the file"
    return size, None


def inspect_mask(path: Path, num_classes: int, size: tuple[int, int]) -> str | None:
    """Look at a mask's header and end: what is wrong with it as the mask of an image, or None.

    Values are checked when the mask is loaded; at once, where the file does not end as one should.

    Args:
        path: mask file.
        num_classes: C.
        size: (H, W) of the image.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            found, mode = (image.height, image.width), image.mode
            marker = _END_MARKERS.get(image.format or "")
            file.seek(-12, os.SEEK_END)
            whole = marker is not None and file.read().endswith(marker)
        if not whole:
            read_mask(path, num_classes)
    except FileNotFoundError:
        return f"{path}: no such mask file"
    except DatasetError as error:
        return str(error)
    except _BROKEN as error:
        return f"{path}: not a readable mask ({error}); replace it"
    if problem := _mode_problem(path, mode, num_classes):
        return problem
    return None if found == size else size_problem(path, found, size)
