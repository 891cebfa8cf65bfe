"""A prediction as a picture: the mask over its image, with a legend of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wsss.data.images import voc_palette
from wsss.data.views import resize_mask
from wsss.report.pictures import RGB, overlay

_FONT_SIZE = 15
_LINE = 22
_MARGIN = 6
_BOX = 14
#: of the canvas; smaller images stand in its upper left corner
_MIN_WIDTH = 240


class Entry(NamedTuple):
    """A line of the legend: a class, its label and the part of the image that it covers."""

    name: str
    label: int
    share: float


def draw_prediction(
    image: RGB, mask: NDArray[np.uint8], entries: Sequence[Entry], num_classes: int
) -> RGB:
    """The image with its mask in colours, and the legend below.

    Args:
        image: (h, w, 3) uint8, at the size to draw.
        mask: (H, W) labels, of any size.
        entries: in the order to be listed; none: it says that there is background alone.
        num_classes: background included.

    Returns:
        (h + legend, at least w, 3) uint8.
    """
    height, width = image.shape[:2]
    picture = overlay(image, resize_mask(mask, height, width), num_classes, alpha=0.55)
    font = ImageFont.load_default(_FONT_SIZE)
    texts = [f"{e.name}  {percent(e.share)}" for e in entries] or ["background alone"]
    column = round(max(font.getlength(text) for text in texts)) + _BOX + 4 * _MARGIN
    canvas_width = max(width, _MIN_WIDTH, column)
    columns = min(len(texts), max(1, canvas_width // column))
    lines = -(-len(texts) // columns)
    canvas = Image.new("RGB", (canvas_width, height + lines * _LINE + 2 * _MARGIN), (255,) * 3)
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    palette = voc_palette()
    for i, text in enumerate(texts):
        x = _MARGIN + i % columns * column
        y = height + _MARGIN + i // columns * _LINE
        if entries:
            r, g, b = (int(v) for v in palette[entries[i].label])
            draw.rectangle((x, y + 3, x + _BOX, y + 3 + _BOX), (r, g, b), outline=(0, 0, 0))
            x += _BOX + _MARGIN
        draw.text((x, y), text, fill=(0, 0, 0), font=font)
    return np.asarray(canvas)


def percent(share: float) -> str:
    """``12.3 %``; what is there but rounds to nothing is ``<0.1 %``."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.0005 else "<0.1 %"
