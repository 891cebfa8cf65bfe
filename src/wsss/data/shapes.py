"""``shapes``: a small generated data set with the difficulties of weakly supervised segmentation.

Every image holds one to three objects of ten classes at different scales, with occlusion, on a
procedural background. It is easy enough that a tiny ViT learns it from scratch on a CPU, and it is
built so that a classifier's activation map is *not* a segmentation:

- ``fox``, ``lynx``, ``hare``, ``bear``: **a small discriminative part.** All four share one body
  (shape family, fur, earthy tints); only the head patch, ``PART_FRACTION`` of the object, tells
  them apart for sure. Their body tints hint at the class: each has its own, but with probability
  ``TINT_OVERLAP`` a beast wears that of any of the four.
- ``boat``, ``train``: **coexistence.** With probability ``COEXISTENCE`` the object sits on water
  (on rails), which is background and hardly ever seen without it (``CONTEXT_ALONE``). The colours
  of boat and train vary (``LIVERY_HUES``), those of the context hardly do.
- ``lizard``: **camouflage.** Its texture is mixed with that of the foliage background
  (``TEXTURE_SIMILARITY``), which it is put on with probability ``CAMOUFLAGE``.
- ``ball``, ``star``, ``crate``: **a shared part.** Large patches of a colour of their own and of a
  white that all three (and the windows of trains) have.

The image numbered ``n`` is a pure function of (seed, image size, n): each has its own Philox stream
and does not depend on how many others there are. :func:`generate` writes them as a PASCAL VOC 2012
tree, :func:`render` returns one in memory.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import shutil
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

BEASTS = ("fox", "lynx", "hare", "bear")
CLASSES = (*BEASTS, "boat", "train", "lizard", "ball", "star", "crate")
TOYS = ("ball", "star", "crate")
COEXISTENCE_CLASSES = ("boat", "train")
VERSION = 14  # raise whenever the same parameters would give other files

# --- difficulty, in one place --------------------------------------------------------------------
PART_FRACTION = (0.12, 0.20)
"""Area of a beast's head patch over that of the object: the range drawn from."""
HEAD_CONTRAST = 0.6
"""0: a beast's head patch has the tint of its body; 1: it has only colours of its own."""
TINT_OVERLAP = 0.3
"""Probability that a beast's body tint is drawn from all four instead of being its own."""
COEXISTENCE = 0.85
"""Probability that an image with a boat (train) shows water (rails) under it."""
CONTEXT_ALONE = 0.15
"""Probability of water (of rails) in an image without a boat (train)."""
LIVERY_HUES = 30.0
"""Range in degrees of the hues of boats and of trains. The wider, the more a classifier leans on
the context: at 360 a boat's activation map covers the water and leaves the boat out."""
TEXTURE_SIMILARITY = 0.25
"""0: the lizard's colours are its own; 1: they are those of the foliage background."""
CAMOUFLAGE = 0.4
"""Probability that an image with a lizard is given the foliage background on purpose."""
OBJECTS_PER_IMAGE = (0.4, 0.4, 0.2)
"""Probabilities of one, two and three objects."""
MIN_VISIBLE_AREA = 0.01
"""Visible area of every object over the image's area; below it the placement is drawn again."""
MIN_VISIBLE_FRACTION = 0.45
"""Visible area of every object over its own area, likewise."""
MIN_VISIBLE_PART = 0.7
"""Visible area of a head patch over its own area: without the patch the label is a guess."""
NOISE = (0.01, 0.03)
"""Range of the standard deviation of the pixel noise, of intensities in [0, 1]."""
VOID_BORDER = True
"""Mark pixels that straddle an outline as 255 (void), as PASCAL VOC does."""

VOID = 255
JPEG_QUALITY = 92
LAYOUTS = ("voc",)
_KNOBS = (
    "PART_FRACTION",
    "HEAD_CONTRAST",
    "TINT_OVERLAP",
    "COEXISTENCE",
    "CONTEXT_ALONE",
    "LIVERY_HUES",
    "TEXTURE_SIMILARITY",
    "CAMOUFLAGE",
    "OBJECTS_PER_IMAGE",
    "MIN_VISIBLE_AREA",
    "MIN_VISIBLE_FRACTION",
    "MIN_VISIBLE_PART",
    "NOISE",
    "VOID_BORDER",
)  # go into shapes.json, so that a tree drawn with other constants is not taken for this one
SUPERSAMPLING = 2
FIRST_VAL = 500_001  # image numbers: training from 1, validation from here

Floats = NDArray[Any]  # float32
Mask = NDArray[np.bool_]
Color = tuple[float, float, float]
Rng = np.random.Generator


@dataclass
class ShapeObject:
    """One object of a sample.

    Attributes:
        name: its class, one of ``CLASSES``.
        box: visible extent (xmin, ymin, xmax, ymax) in pixels, 0-based, last pixel included.
        area: visible area over the image's area.
        part_fraction: visible head patch over visible object; 0 for classes without.
    """

    name: str
    box: tuple[int, int, int, int]
    area: float
    part_fraction: float


@dataclass
class Sample:
    """One generated image.

    Attributes:
        image: (S, S, 3) uint8 RGB.
        mask: (S, S) uint8, 0 background, 1..C in the order of ``CLASSES``, 255 void.
        objects: from back to front.
        background: name of the background family.
        contexts: which of "water" and "rails" were drawn.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    objects: list[ShapeObject]
    background: str
    contexts: tuple[str, ...]


def class_names() -> tuple[str, ...]:
    """The foreground classes; position k is mask value k + 1."""
    return CLASSES


# --- colour and texture --------------------------------------------------------------------------


def _hsv(hue: float, saturation: float, value: float) -> Color:
    """RGB in [0, 1] of a hue in degrees."""
    return colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)


def _rgb(*color: float) -> Floats:
    return np.asarray(color, np.float32)


def _darker(color: Color, factor: float) -> Color:
    return color[0] * factor, color[1] * factor, color[2] * factor


def _mix(weight: Floats, low: Color, high: Color) -> Floats:
    """(..., 3) colours that go from ``low`` (weight 0) to ``high`` (weight 1)."""
    return np.asarray(_rgb(*low) + weight[..., None] * (_rgb(*high) - _rgb(*low)))


def _noise(rng: Rng, size: int, rows: int, cols: int | None = None) -> Floats:
    """(size, size) smooth value noise in [0, 1] from a random grid of ``rows`` x ``cols`` cells."""
    grid = rng.random((rows, cols or rows), dtype=np.float32)
    return np.clip(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)


def _wave(t: Floats, sharpness: float = 6.0) -> Floats:
    """Soft square wave in [0, 1] of period 1."""
    return 0.5 + 0.5 * np.tanh(sharpness * np.sin(2 * math.pi * t))


def _checks(u: Floats, v: Floats, period: float) -> Floats:
    a, b = _wave(u / period), _wave(v / period)
    return np.asarray(a * (1 - b) + b * (1 - a))


def _dots(u: Floats, v: Floats, period: float, fill: float) -> Floats:
    """Round dots on a square grid; ``fill`` is their radius over the period."""
    du, dv = u / period - np.round(u / period), v / period - np.round(v / period)
    return np.clip((fill - np.hypot(du, dv)) * 10 + 0.5, 0, 1)


def _rotate(u: Floats, v: Floats, degrees: float) -> tuple[Floats, Floats]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return u * c + v * s, v * c - u * s


# --- backgrounds: (size, size, 3) from the unit-square coordinates x, y --------------------------

FOLIAGE_HUE, FOLIAGE_SATURATION, FOLIAGE_VALUES = 125.0, 0.42, (0.25, 0.6)


def _foliage_noise(rng: Rng, size: int) -> Floats:
    coarse, fine = _noise(rng, size, 10), _noise(rng, size, 26)
    return np.clip((0.45 * coarse + 0.55 * fine - 0.5) * 1.8 + 0.5, 0, 1)


def _foliage(rng: Rng, x: Floats, y: Floats) -> Floats:
    hue = FOLIAGE_HUE + rng.uniform(-15, 15)
    dark, light = FOLIAGE_VALUES
    texture = _foliage_noise(rng, len(x))
    return _mix(
        texture, _hsv(hue, FOLIAGE_SATURATION, dark), _hsv(hue - 15, FOLIAGE_SATURATION, light)
    )


def _stripes(rng: Rng, x: Floats, y: Floats) -> Floats:
    u, _ = _rotate(x, y, rng.uniform(0, 180))
    hue, value = rng.uniform(150, 270), rng.uniform(0.45, 0.75)
    texture = _wave(u / rng.uniform(0.08, 0.2) + rng.random(), 2.0)
    return _mix(texture, _hsv(hue, 0.15, value), _hsv(hue, 0.25, value - 0.2))


def _gradient(rng: Rng, x: Floats, y: Floats) -> Floats:
    u, _ = _rotate(x - 0.5, y - 0.5, rng.uniform(0, 360))
    hue = rng.uniform(180, 230)
    texture = np.clip(u + 0.5 + 0.25 * (_noise(rng, len(x), 5) - 0.5), 0, 1)
    return _mix(texture, _hsv(hue, 0.12, 0.95), _hsv(hue, 0.4, 0.7))


def _blobs(rng: Rng, x: Floats, y: Floats) -> Floats:
    hue, value = rng.uniform(200, 265), rng.uniform(0.5, 0.85)
    texture = np.clip((_noise(rng, len(x), 8) - 0.5) * 6 + 0.5, 0, 1)
    return _mix(texture, _hsv(hue, 0.1, value), _hsv(hue + 30, 0.25, value - 0.15))


def _checker(rng: Rng, x: Floats, y: Floats) -> Floats:
    u, v = _rotate(x, y, rng.uniform(0, 90))
    value = rng.uniform(0.4, 0.7)  # not the toys' white
    texture = _checks(u + rng.random(), v + rng.random(), rng.uniform(0.15, 0.3))
    return _mix(texture, _hsv(rng.uniform(0, 360), 0.06, value), _hsv(200, 0.08, value - 0.18))


BACKGROUNDS: dict[str, Callable[[Rng, Floats, Floats], Floats]] = {
    "foliage": _foliage,
    "stripes": _stripes,
    "gradient": _gradient,
    "blobs": _blobs,
    "checker": _checker,
}


def _water(rng: Rng, x: Floats, y: Floats) -> Floats:
    ripple = y + 0.012 * np.sin(2 * math.pi * (x / 0.16 + rng.random()))
    texture = 0.7 * _wave(ripple / 0.06, 1.5) + 0.3 * _noise(rng, len(x), 20, 6)
    hue = rng.uniform(198, 210)
    return _mix(texture, _hsv(hue, 0.85, 0.55), _hsv(hue - 6, 0.6, 0.85))


def _rails(rng: Rng, x: Floats, y: Floats, top: float, height: float) -> Floats:
    gravel = _mix(_noise(rng, len(x), 48), _hsv(30, 0.05, 0.35), _hsv(30, 0.05, 0.7))
    sleepers = _wave(x / 0.09 + rng.random())
    band = np.clip(1.4 - 2.6 * np.abs((y - top) / height - 0.5) * 1.6, 0, 1)
    out: Floats = gravel + (sleepers * band)[..., None] * (_rgb(0.2, 0.13, 0.1) - gravel)
    for position in (0.3, 0.7):
        rail = np.clip(1.5 - np.abs(y - top - position * height) / 0.012, 0, 1)
        out = out + rail[..., None] * (_rgb(0.85, 0.87, 0.9) - out)
    return out


# --- objects: outlines in units of the diameter, y down, centred ---------------------------------


@dataclass
class _Figure:
    """An object before it is placed: polygons (N, 2) and a painter.

    ``paint(u, v, part)`` gets coordinates that are rotated with the object and measured in image
    widths, so a texture keeps its wavelength at every object scale, and the part's mask.
    """

    name: str
    diameter: float
    angle: float
    flip: bool
    outline: list[Floats]
    paint: Callable[[Floats, Floats, Mask], Floats]
    part: list[Floats] = field(default_factory=list)

    def polygons(self, parts: Sequence[Floats], center: tuple[float, float]) -> list[Floats]:
        """``parts`` in the image's unit square."""
        c, s = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        turn = np.array([[c, s], [-s, c]]) @ np.diag([-1.0 if self.flip else 1.0, 1.0])
        return [np.asarray(p @ turn.T * self.diameter + center, np.float32) for p in parts]


def _ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> Floats:
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = rx * np.cos(t), ry * np.sin(t)
    return np.stack([cx + c * x - s * y, cy + s * x + c * y], 1).astype(np.float32)


def _polygon(*points: tuple[float, float]) -> Floats:
    return np.asarray(points, np.float32)


def _box(x0: float, y0: float, x1: float, y1: float) -> Floats:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


# Head patches: the pattern and its two colours. Nothing else of a beast is peculiar to its class.
_HEADS: dict[str, tuple[Callable[[Floats, Floats], Floats], Color, Color]] = {
    "fox": (lambda u, v: _wave(u / 0.055), _hsv(6, 0.85, 0.78), _hsv(20, 0.12, 1.0)),
    "lynx": (lambda u, v: _checks(u, v, 0.07), _hsv(52, 0.9, 0.95), _hsv(225, 0.9, 0.6)),
    "hare": (lambda u, v: _dots(u, v, 0.06, 0.33), (0.97, 0.97, 0.97), (0.05, 0.05, 0.05)),
    "bear": (lambda u, v: _wave(np.hypot(u, v) / 0.06), _hsv(322, 0.8, 0.6), _hsv(328, 0.4, 0.95)),
}
# Body tints (hue, saturation, value), which no background has.
_TINTS = {
    "fox": (8.0, 0.7, 0.62),
    "lynx": (44.0, 0.66, 0.74),
    "hare": (22.0, 0.22, 0.82),
    "bear": (330.0, 0.5, 0.55),
}


def _beast(rng: Rng, name: str) -> _Figure:
    body_x, body_y = 0.36, rng.uniform(0.19, 0.25)
    outline = [_ellipse(-0.06, -0.04, body_x, body_y)]
    for x in (-0.32, 0.06):  # fore and hind legs
        x += rng.uniform(-0.03, 0.03)
        outline.append(_box(x, 0.0, x + 0.15, body_y + rng.uniform(0.08, 0.14)))
    tail = rng.uniform(-0.25, 0.05)
    outline.append(_polygon((-0.35, -0.12), (-0.52, tail - 0.04), (-0.52, tail + 0.04), (-0.35, 0)))
    rest = _area(outline)
    # About 30 % of the head lies over the body, so the object's area is rest + 0.7 head.
    fraction = rng.uniform(*PART_FRACTION)
    radius = math.sqrt(fraction * rest / (1 - 0.7 * fraction) / math.pi)
    squeeze = rng.uniform(0.85, 1.15)
    head = _ellipse(0.34, -rng.uniform(0.1, 0.2), radius * squeeze, radius / squeeze)
    outline.append(head)

    own, other = _TINTS[name], _TINTS[BEASTS[rng.integers(len(BEASTS))]]
    hue, saturation, value = own if rng.random() >= TINT_OVERLAP else other
    hue, saturation = hue + rng.uniform(-6, 6), saturation + rng.uniform(-0.06, 0.06)
    value += rng.uniform(-0.06, 0.06)
    streaks = rng.random()
    tint = _rgb(*_hsv(hue, saturation, value))
    pattern, first, second = _HEADS[name]
    turn, shift = rng.uniform(-20, 20), rng.uniform(-0.03, 0.03, 2)
    fur_seed = int(rng.integers(2**32))

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        fur = _noise(np.random.default_rng(fur_seed), max(u.shape), 48, 20)
        fur = fur[: u.shape[0], : u.shape[1]]
        texture = 0.75 * fur + 0.25 * _wave(u / 0.08 + v / 0.2 + streaks, 1.0)
        color = (0.8 + 0.2 * texture[..., None]) * tint
        hu, hv = _rotate(u, v, turn)
        patch = _mix(pattern(hu + np.float32(shift[0]), hv + np.float32(shift[1])), first, second)
        patch = tint + HEAD_CONTRAST * (patch - tint)
        return np.where(part[..., None], patch, color)

    return _Figure(
        name,
        rng.uniform(0.5, 0.8),
        rng.uniform(-15, 15),
        rng.random() < 0.5,
        outline,
        paint,
        [head],
    )


def _boat(rng: Rng) -> _Figure:
    bow, keel = rng.uniform(0.12, 0.2), rng.uniform(0.2, 0.26)
    mast = rng.uniform(-0.1, 0.08)
    outline = [
        _polygon((-0.5, -0.02), (0.5, -0.02), (0.5 - bow, keel), (-0.5 + 0.8 * bow, keel)),
        _polygon((mast, -0.5), (mast + rng.uniform(0.28, 0.38), -0.08), (mast, -0.08)),
        _polygon((mast - 0.05, -0.42), (mast - 0.05, -0.08), (mast - 0.3, -0.08)),
        _box(mast - 0.05, -0.5, mast, 0.0),
    ]
    color = _hsv(350 + LIVERY_HUES * (rng.random() - 0.5), 0.75, rng.uniform(0.7, 0.95))
    diameter = rng.uniform(0.42, 0.72)

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        return _mix(_wave(v / 0.045, 3.0), color, _darker(color, 0.5))

    return _Figure("boat", diameter, rng.uniform(-6, 6), rng.random() < 0.5, outline, paint)


def _train(rng: Rng) -> _Figure:
    top = -rng.uniform(0.18, 0.24)
    outline = [
        _polygon((-0.5, top), (0.4, top), (0.48, top + 0.12), (0.5, 0.2), (-0.5, 0.2)),
        *[_ellipse(x, 0.2, 0.065, 0.065) for x in (-0.36, -0.18, 0.18, 0.36)],
        _box(-0.3, top - 0.05, -0.05, top + 0.02),
    ]
    hue, phase = 165 + LIVERY_HUES * (rng.random() - 0.5), rng.random()
    wagon = _hsv(hue, rng.uniform(0.5, 0.85), rng.uniform(0.4, 0.7))
    diameter = rng.uniform(0.5, 0.8)

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        windows = _wave(u / 0.065 + phase, 4.0) * _wave(v / 0.11 + 0.25, 4.0)
        return _mix(windows, wagon, _hsv(hue, 0.12, 1.0))

    return _Figure("train", diameter, 0.0, rng.random() < 0.5, outline, paint)


def _lizard(rng: Rng) -> _Figure:
    outline = [
        _ellipse(0.0, 0.0, 0.32, rng.uniform(0.18, 0.22)),
        _ellipse(0.34, rng.uniform(-0.06, 0.06), 0.14, 0.1),
        _polygon((-0.2, -0.16), (-0.52, rng.uniform(-0.12, 0.12)), (-0.2, 0.16)),
    ]
    for x, side in ((-0.15, -1), (-0.15, 1), (0.18, -1), (0.18, 1)):
        outline.append(_ellipse(x, side * 0.2, 0.07, 0.12, side * rng.uniform(-35, 0)))
    hue = (1 - TEXTURE_SIMILARITY) * 62 + TEXTURE_SIMILARITY * FOLIAGE_HUE + rng.uniform(-8, 8)
    saturation = (1 - TEXTURE_SIMILARITY) * 0.9 + TEXTURE_SIMILARITY * FOLIAGE_SATURATION
    lift = (1 - TEXTURE_SIMILARITY) * 0.3
    skin_seed = int(rng.integers(2**32))

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        skin = _foliage_noise(np.random.default_rng(skin_seed), max(u.shape))
        dark, light = FOLIAGE_VALUES
        color = _mix(
            skin[: u.shape[0], : u.shape[1]],
            _hsv(hue, saturation, dark + lift),
            _hsv(hue - 15, saturation, light + lift),
        )
        spots = (1 - TEXTURE_SIMILARITY) * _dots(u, v, 0.05, 0.3)
        return np.asarray(color + spots[..., None] * (_rgb(0.1, 0.15, 0.05) - color))

    return _Figure(
        "lizard", rng.uniform(0.5, 0.8), rng.uniform(0, 360), rng.random() < 0.5, outline, paint
    )


# The paint of each toy; the rest of it is the white of all toys.
_PAINTS: dict[str, Color] = {
    "ball": _hsv(275, 0.65, 0.7),
    "star": _hsv(50, 0.85, 0.95),
    "crate": _hsv(24, 0.8, 0.6),
}


def _toy(rng: Rng, name: str) -> _Figure:
    """A body in large patches of the toy's own paint and of the white that all toys share."""
    scale = rng.uniform(0.14, 0.18)  # of the patches, in image widths
    if name == "ball":
        outline, diameter = [_ellipse(0, 0, 0.5, 0.5)], rng.uniform(0.36, 0.58)
    elif name == "star":
        angles = np.arange(10) * math.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 0.52, rng.uniform(0.32, 0.38))
        points = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], 1)
        outline, diameter = [points.astype(np.float32)], rng.uniform(0.44, 0.72)
    else:
        height = rng.uniform(0.28, 0.36)
        outline, diameter = [_box(-0.36, -height, 0.36, height)], rng.uniform(0.44, 0.68)
    hue, saturation, value = colorsys.rgb_to_hsv(*_PAINTS[name])
    paint_color = _hsv(360 * hue + rng.uniform(-8, 8), saturation, value + rng.uniform(-0.05, 0.05))
    white = _hsv(rng.uniform(0, 360), 0.04, rng.uniform(0.9, 0.98))

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        if name == "ball":  # sectors
            patches = _wave(np.arctan2(v, u) * (3 / (2 * math.pi)), 4.0)
        elif name == "star":  # rings
            patches = _wave(np.hypot(u, v) / scale + 0.25, 4.0)
        else:  # planks
            patches = _wave(v / scale, 4.0)
        return _mix(patches, white, paint_color)

    return _Figure(name, diameter, rng.uniform(0, 180), False, outline, paint)


def _figure(rng: Rng, name: str) -> _Figure:
    makers = {"boat": _boat, "train": _train, "lizard": _lizard}
    if name in BEASTS:
        return _beast(rng, name)
    return _toy(rng, name) if name in TOYS else makers[name](rng)


def _area(outline: Sequence[Floats]) -> float:
    """Area of the union of polygons given in units of the diameter."""
    return float(_fill([p + 1.0 for p in outline], 128, scale=64.0).sum()) / 64.0**2


def _fill(polygons: Sequence[Floats], size: int, scale: float | None = None) -> Mask:
    """(size, size) union of polygons given in the unit square (or in units of ``scale`` pixels)."""
    canvas = np.zeros((size, size), np.uint8)
    for polygon in polygons:  # one by one: together they would be filled by the even-odd rule
        points = np.round((polygon * (scale or size) - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(canvas, [points], 1, shift=4)
    return canvas.astype(bool)


# --- one image -----------------------------------------------------------------------------------


@dataclass
class _Placed:
    figure: _Figure
    center: tuple[float, float]
    mask: Mask  # before occlusion
    part: Mask


def _place(rng: Rng, figures: Sequence[_Figure], size: int) -> tuple[list[_Placed], float, float]:
    """Draw positions until every object can be seen; returns them, the waterline and the railhead.

    Later objects cover earlier ones. Each new attempt shrinks the objects a little, so the loop
    ends: 60 attempts are far beyond what three objects need.
    """
    for attempt in range(60):
        waterline, railhead = rng.uniform(0.35, 0.7), rng.uniform(0.5, 0.8)
        placed = []
        for figure in figures:
            if attempt:
                figure.diameter *= 0.985
            d = figure.diameter
            x, y = rng.uniform(min(0.4 * d, 0.5), max(1 - 0.4 * d, 0.5), 2)
            if figure.name == "boat":
                y = waterline - 0.1 * d + rng.uniform(0, 0.04)
            elif figure.name == "train":
                y = railhead - 0.22 * d + rng.uniform(0, 0.02)
            outline = _fill(figure.polygons(figure.outline, (x, y)), size)
            part = _fill(figure.polygons(figure.part, (x, y)), size)
            placed.append(_Placed(figure, (x, y), outline, part))
        covered = np.zeros((size, size), bool)
        for item in reversed(placed):
            visible = item.mask & ~covered
            # Whole pixels only: the ones that the object shares become void.
            if _blocks(visible).all(-1).mean() < MIN_VISIBLE_AREA:
                break
            if visible.sum() < MIN_VISIBLE_FRACTION * item.mask.sum():
                break
            whole = sum(_area([p]) for p in item.figure.part) * item.figure.diameter**2 * size**2
            if (item.part & visible).sum() < MIN_VISIBLE_PART * whole:
                break
            covered |= item.mask
        else:
            return placed, waterline, railhead
    raise RuntimeError(
        f"shapes: no visible placement of {[f.name for f in figures]} in 60 attempts; lower "
        "MIN_VISIBLE_AREA, MIN_VISIBLE_FRACTION or MIN_VISIBLE_PART"
    )


def _blocks(array: NDArray[Any]) -> NDArray[Any]:
    """(S * k, S * k) to (S, S, k * k): the supersampled values of each pixel."""
    k, size = SUPERSAMPLING, len(array) // SUPERSAMPLING
    return array.reshape(size, k, size, k).transpose(0, 2, 1, 3).reshape(size, size, k * k)


def render(number: int, image_size: int = 96, seed: int = 0) -> Sample:
    """Draw image ``number``.

    Args:
        number: image number, not negative; a pure function of it, the size and the seed.
        image_size: side in pixels, at least 32.
        seed: seed of the data set, not negative.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check("number", number, 0)
    _check("image_size", image_size, 32)
    _check("seed", seed, 0)
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))
    size = SUPERSAMPLING * image_size
    count = 1 + int(rng.choice(3, p=OBJECTS_PER_IMAGE))
    names = [CLASSES[k] for k in rng.integers(len(CLASSES), size=count)]
    placed, waterline, railhead = _place(rng, [_figure(rng, name) for name in names], size)

    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    if "lizard" in names and rng.random() < CAMOUFLAGE:
        background = "foliage"
    canvas = BACKGROUNDS[background](rng, x, y)
    contexts = []
    if rng.random() < (COEXISTENCE if "boat" in names else CONTEXT_ALONE):
        contexts.append("water")
        shore = waterline + 0.01 * np.sin(2 * math.pi * (x / 0.4 + rng.random()))
        band = (y > shore) & (y < waterline + rng.uniform(0.3, 0.5))
        canvas = np.where(band[..., None], _water(rng, x, y), canvas)
    if rng.random() < (COEXISTENCE if "train" in names else CONTEXT_ALONE):
        contexts.append("rails")
        height = rng.uniform(0.16, 0.24)
        band = (y > railhead - 0.02) & (y < railhead - 0.02 + height)
        canvas = np.where(band[..., None], _rails(rng, x, y, railhead - 0.02, height), canvas)

    owner = np.zeros((size, size), np.int64)  # 0 background, k + 1 the k-th object
    for k, item in enumerate(placed):
        _paint(canvas, item, x, y)
        owner[item.mask] = k + 1

    image = cv2.resize(canvas, (image_size, image_size), interpolation=cv2.INTER_AREA)
    lx, ly = x[::SUPERSAMPLING, ::SUPERSAMPLING], y[::SUPERSAMPLING, ::SUPERSAMPLING]
    light = rng.uniform(0.9, 1.08) + rng.uniform(-0.12, 0.12) * (lx - 0.5)
    image = image * (light + rng.uniform(-0.12, 0.12) * (ly - 0.5))[..., None]
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(*NOISE)
    pixels = np.clip(np.round((image + noise) * 255), 0, 255).astype(np.uint8)
    mask, objects = _labels(owner, placed)
    return Sample(pixels, mask, objects, background, tuple(contexts))


def _paint(canvas: Floats, item: _Placed, x: Floats, y: Floats) -> None:
    """Paint one object into ``canvas`` in place."""
    rows, cols = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    u, v = _rotate(x[window] - item.center[0], y[window] - item.center[1], -item.figure.angle)
    if item.figure.flip:
        u = -u
    color = item.figure.paint(u, v, item.part[window])
    shade = 1.0 - 0.25 * np.clip((y[window] - item.center[1]) / item.figure.diameter, -0.5, 0.5)
    np.copyto(canvas[window], color * shade[..., None], where=item.mask[window][..., None])


def _labels(
    owner: NDArray[np.int64], placed: Sequence[_Placed]
) -> tuple[NDArray[np.uint8], list[ShapeObject]]:
    """Mask and objects at the final resolution from the supersampled owner map."""
    votes = (_blocks(owner)[..., None] == np.arange(len(placed) + 1)).sum(2)
    winner = votes.argmax(-1)
    values = np.array([0, *(CLASSES.index(p.figure.name) + 1 for p in placed)], np.uint8)
    mask = values[winner]
    if VOID_BORDER:
        mask[votes.max(-1) < SUPERSAMPLING**2] = VOID
    objects = []
    for k, item in enumerate(placed):
        visible = winner == k + 1
        rows, cols = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        seen = owner == k + 1
        objects.append(
            ShapeObject(
                name=item.figure.name,
                box=(int(cols[0]), int(rows[0]), int(cols[-1]), int(rows[-1])),
                area=float(visible.mean()),
                part_fraction=float((item.part & seen).sum() / seen.sum()),
            )
        )
    return mask, objects


# --- the tree on disk ----------------------------------------------------------------------------


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
    _check("train", train, 1, FIRST_VAL - 1)
    _check("val", val, 1, 499_999)
    _check("image_size", image_size, 32)
    _check("seed", seed, 0)
    parameters: dict[str, Any] = {
        "version": VERSION,
        "train": train,
        "val": val,
        "image_size": image_size,
        "seed": seed,
        "layout": layout,
        **{knob.lower(): globals()[knob] for knob in _KNOBS},
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


def _check(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"shapes: {name}={value} is out of range; give at least {low}{upper}")


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
