"""Objects of ``shapes``: outlines in units of the diameter, y down, centred."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from wsss.data.shapes import difficulty
from wsss.data.shapes.difficulty import BEASTS, TOYS
from wsss.data.shapes.textures import (
    FOLIAGE_HUE,
    FOLIAGE_SATURATION,
    FOLIAGE_VALUES,
    Color,
    Floats,
    Rng,
    checks,
    dots,
    foliage_noise,
    hsv,
    mix,
    noise,
    rgb,
    rotate,
    wave,
)

Mask = NDArray[np.bool_]


@dataclass
class Figure:
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


# Head patches: the pattern and its two colours. They alone name a beast for sure; tints only hint.
_HEADS: dict[str, tuple[Callable[[Floats, Floats], Floats], Color, Color]] = {
    "fox": (lambda u, v: wave(u / 0.055), hsv(6, 0.85, 0.78), hsv(20, 0.12, 1.0)),
    "lynx": (lambda u, v: checks(u, v, 0.07), hsv(225, 0.1, 1.0), hsv(225, 0.9, 0.6)),
    "hare": (lambda u, v: dots(u, v, 0.06, 0.33), (0.97, 0.97, 0.97), (0.05, 0.05, 0.05)),
    "bear": (lambda u, v: wave(np.hypot(u, v) / 0.06), hsv(322, 0.8, 0.6), hsv(328, 0.4, 0.95)),
}
# Body tints (hue, saturation, value), which no background has.
_TINTS = {
    "fox": (8.0, 0.7, 0.62),
    "lynx": (44.0, 0.66, 0.74),
    "hare": (22.0, 0.22, 0.82),
    "bear": (330.0, 0.5, 0.55),
}


def _beast(rng: Rng, name: str) -> Figure:
    body_x, body_y = 0.36, rng.uniform(0.19, 0.25)
    outline = [_ellipse(-0.06, -0.04, body_x, body_y)]
    for x in (-0.32, 0.06):  # fore and hind legs
        x += rng.uniform(-0.03, 0.03)
        outline.append(_box(x, 0.0, x + 0.15, body_y + rng.uniform(0.08, 0.14)))
    tail = rng.uniform(-0.25, 0.05)
    outline.append(_polygon((-0.35, -0.12), (-0.52, tail - 0.04), (-0.52, tail + 0.04), (-0.35, 0)))
    rest = area(outline)
    # About 30 % of the head lies over the body, so the object's area is rest + 0.7 head.
    fraction = rng.uniform(*difficulty.PART_FRACTION)
    radius = math.sqrt(fraction * rest / (1 - 0.7 * fraction) / math.pi)
    squeeze = rng.uniform(0.85, 1.15)
    head = _ellipse(0.34, -rng.uniform(0.1, 0.2), radius * squeeze, radius / squeeze)
    outline.append(head)

    own, other = _TINTS[name], _TINTS[BEASTS[rng.integers(len(BEASTS))]]
    hue, saturation, value = own if rng.random() >= difficulty.TINT_OVERLAP else other
    hue, saturation = hue + rng.uniform(-6, 6), saturation + rng.uniform(-0.06, 0.06)
    value += rng.uniform(-0.06, 0.06)
    streaks = rng.random()
    tint = rgb(*hsv(hue, saturation, value))
    pattern, first, second = _HEADS[name]
    turn, shift = rng.uniform(-20, 20), rng.uniform(-0.03, 0.03, 2)
    fur_seed = int(rng.integers(2**32))

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        fur = noise(np.random.default_rng(fur_seed), max(u.shape), 48, 20)
        fur = fur[: u.shape[0], : u.shape[1]]
        texture = 0.75 * fur + 0.25 * wave(u / 0.08 + v / 0.2 + streaks, 1.0)
        color = (0.8 + 0.2 * texture[..., None]) * tint
        hu, hv = rotate(u, v, turn)
        patch = mix(pattern(hu + np.float32(shift[0]), hv + np.float32(shift[1])), first, second)
        patch = tint + difficulty.HEAD_CONTRAST * (patch - tint)
        return np.where(part[..., None], patch, color)

    return Figure(
        name,
        rng.uniform(0.5, 0.8),
        rng.uniform(-15, 15),
        rng.random() < 0.5,
        outline,
        paint,
        [head],
    )


def _boat(rng: Rng) -> Figure:
    bow, keel = rng.uniform(0.12, 0.2), rng.uniform(0.2, 0.26)
    mast = rng.uniform(-0.1, 0.08)
    outline = [
        _polygon((-0.5, -0.02), (0.5, -0.02), (0.5 - bow, keel), (-0.5 + 0.8 * bow, keel)),
        _polygon((mast, -0.5), (mast + rng.uniform(0.28, 0.38), -0.08), (mast, -0.08)),
        _polygon((mast - 0.05, -0.42), (mast - 0.05, -0.08), (mast - 0.3, -0.08)),
        _box(mast - 0.05, -0.5, mast, 0.0),
    ]
    hue, phase = 350 + difficulty.LIVERY_HUES * (rng.random() - 0.5), rng.random()
    hull = hsv(hue, rng.uniform(0.65, 0.85), rng.uniform(0.55, 0.8))
    diameter = rng.uniform(0.48, 0.76)

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        holes = dots(u + np.float32(0.08 * phase), v, 0.08, 0.34)
        return mix(holes, hull, hsv(hue, 0.12, 1.0))

    return Figure("boat", diameter, rng.uniform(-6, 6), rng.random() < 0.5, outline, paint)


def _train(rng: Rng) -> Figure:
    top = -rng.uniform(0.18, 0.24)
    outline = [
        _polygon((-0.5, top), (0.4, top), (0.48, top + 0.12), (0.5, 0.2), (-0.5, 0.2)),
        *[_ellipse(x, 0.2, 0.065, 0.065) for x in (-0.36, -0.18, 0.18, 0.36)],
        _box(-0.3, top - 0.05, -0.05, top + 0.02),
    ]
    hue, phase = 165 + difficulty.LIVERY_HUES * (rng.random() - 0.5), rng.random()
    wagon = hsv(hue, rng.uniform(0.5, 0.85), rng.uniform(0.4, 0.7))
    diameter = rng.uniform(0.5, 0.8)

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        windows = wave(u / 0.065 + phase, 4.0) * wave(v / 0.11 + 0.25, 4.0)
        return mix(windows, wagon, hsv(hue, 0.12, 1.0))

    return Figure("train", diameter, 0.0, rng.random() < 0.5, outline, paint)


def _lizard(rng: Rng) -> Figure:
    outline = [
        _ellipse(0.0, 0.0, 0.32, rng.uniform(0.18, 0.22)),
        _ellipse(0.34, rng.uniform(-0.06, 0.06), 0.14, 0.1),
        _polygon((-0.2, -0.16), (-0.52, rng.uniform(-0.12, 0.12)), (-0.2, 0.16)),
    ]
    for x, side in ((-0.15, -1), (-0.15, 1), (0.18, -1), (0.18, 1)):
        outline.append(_ellipse(x, side * 0.2, 0.07, 0.12, side * rng.uniform(-35, 0)))
    hue = (
        (1 - difficulty.TEXTURE_SIMILARITY) * 62
        + difficulty.TEXTURE_SIMILARITY * FOLIAGE_HUE
        + rng.uniform(-8, 8)
    )
    saturation = (
        1 - difficulty.TEXTURE_SIMILARITY
    ) * 0.9 + difficulty.TEXTURE_SIMILARITY * FOLIAGE_SATURATION
    lift = (1 - difficulty.TEXTURE_SIMILARITY) * 0.3
    skin_seed = int(rng.integers(2**32))

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        skin = foliage_noise(np.random.default_rng(skin_seed), max(u.shape))
        dark, light = FOLIAGE_VALUES
        color = mix(
            skin[: u.shape[0], : u.shape[1]],
            hsv(hue, saturation, dark + lift),
            hsv(hue - 15, saturation, light + lift),
        )
        spots = (1 - difficulty.TEXTURE_SIMILARITY) * dots(u, v, 0.05, 0.3)
        return np.asarray(color + spots[..., None] * (rgb(0.1, 0.15, 0.05) - color))

    return Figure(
        "lizard", rng.uniform(0.5, 0.8), rng.uniform(0, 360), rng.random() < 0.5, outline, paint
    )


# The paint of each toy; the rest of it is the white of all toys.
_PAINTS: dict[str, Color] = {
    "ball": hsv(275, 0.65, 0.7),
    "star": hsv(50, 0.85, 0.95),
    "crate": hsv(24, 0.8, 0.6),
}


def _toy(rng: Rng, name: str) -> Figure:
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
    paint_color = hsv(360 * hue + rng.uniform(-8, 8), saturation, value + rng.uniform(-0.05, 0.05))
    white = hsv(rng.uniform(0, 360), 0.04, rng.uniform(0.9, 0.98))

    def paint(u: Floats, v: Floats, part: Mask) -> Floats:
        if name == "ball":  # bands
            patches = wave(v / scale + 0.25, 4.0)
        elif name == "star":  # rings
            patches = wave(np.hypot(u, v) / scale + 0.25, 4.0)
        else:  # planks
            patches = wave(v / scale, 4.0)
        return mix(patches, white, paint_color)

    return Figure(name, diameter, rng.uniform(0, 180), False, outline, paint)


def make_figure(rng: Rng, name: str) -> Figure:
    makers = {"boat": _boat, "train": _train, "lizard": _lizard}
    if name in BEASTS:
        return _beast(rng, name)
    return _toy(rng, name) if name in TOYS else makers[name](rng)


def area(outline: Sequence[Floats]) -> float:
    """Area of the union of polygons given in units of the diameter."""
    return float(fill([p + 1.0 for p in outline], 128, scale=64.0).sum()) / 64.0**2


def fill(polygons: Sequence[Floats], size: int, scale: float | None = None) -> Mask:
    """(size, size) union of polygons given in the unit square (or in units of ``scale`` pixels)."""
    canvas = np.zeros((size, size), np.uint8)
    for polygon in polygons:  # one by one: together they would be filled by the even-odd rule
        points = np.round((polygon * (scale or size) - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(canvas, [points], 1, shift=4)
    return canvas.astype(bool)
