"""Reading images and masks: every mode and every defect of the files that users have."""

from __future__ import annotations

import os
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
_SHOWN = 10


class DatasetError(UserError):
    """A data set on disk that cannot be used; the message names file, value and remedy."""


def summary(problems: Sequence[str]) -> str:
    """Show the first few of ``problems``, one a line, and count the others."""
    lines = [f"  - {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
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
    return np.array(image.convert("RGB"))


def read_rgb(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decode an image file to RGB.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled to 8 bits (65535 -> 255), and
    transparent pixels are composited on black. The EXIF orientation is **not** applied: masks
    and boxes of a data set refer to the pixels as stored.

    Args:
        path: a file PIL can read.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DatasetError: the file is missing, truncated or no image; names it and the cause.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(image)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such image file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"{path}: cannot decode the image ({error}); replace the file, or take its name "
            "off the image list"
        ) from error


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
            image.load()
            mode = image.mode
            if mode not in ("P", "L", "1") and not mode.startswith("I"):
                raise DatasetError(
                    f"{path}: mask has mode {mode}, expected class numbers 0..{num_classes} and "
                    f"{VOID} in a palette or grey PNG; convert its colours to class numbers"
                )
            mask = np.array(image)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such mask file") from None
    except DatasetError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot decode the mask ({error}); replace it") from error
    if size is not None and mask.shape != size:
        raise DatasetError(size_problem(path, mask.shape, size))
    wrong = mask[(mask > num_classes) & (mask != VOID)]
    if wrong.size:
        values = sorted({int(value) for value in np.unique(wrong)})
        shown = ", ".join(map(str, values[:_SHOWN])) + (", ..." if len(values) > _SHOWN else "")
        raise DatasetError(
            f"{path}: mask holds the values {shown}, allowed are 0..{num_classes} and {VOID}; "
            "map them to classes, or list the missing classes in classes.txt"
        )
    return mask.astype(np.uint8)


def size_problem(
    path: str | os.PathLike[str], found: tuple[int, ...], expected: tuple[int, int]
) -> str:
    return (
        f"{path}: mask is {found[1]}x{found[0]} but its image is {expected[1]}x{expected[0]} "
        "(width x height); replace the mask by the one of this image"
    )


def inspect_image(path: Path) -> tuple[tuple[int, int] | None, str | None]:
    """Look at an image without decoding it: ``((H, W), None)`` or ``(None, problem)``."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                return None, f"{path}: empty file (0 bytes); fetch it again"
            file.seek(0)
            with Image.open(file) as image:
                size, marker = (image.height, image.width), _END_MARKERS.get(image.format or "")
                file.seek(-12, os.SEEK_END)
                complete = marker is not None and file.read().endswith(marker)
        if not complete:
            read_rgb(path)
    except DatasetError as error:
        return None, str(error)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return None, f"{path}: not a readable image ({error}); replace the file"
    return size, None
