"""Colours, textures and backgrounds of ``shapes``."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32
Color = tuple[float, float, float]
Rng = np.random.Generator


def hsv(hue: float, saturation: float, value: float) -> Color:
    """RGB in [0, 1] of a hue in degrees."""
    return colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)


def rgb(*color: float) -> Floats:
    return np.asarray(color, np.float32)


def mix(weight: Floats, low: Color, high: Color) -> Floats:
    """(..., 3) colours that go from ``low`` (weight 0) to ``high`` (weight 1)."""
    return np.asarray(rgb(*low) + weight[..., None] * (rgb(*high) - rgb(*low)))


def noise(rng: Rng, size: int, rows: int, cols: int | None = None) -> Floats:
    """(size, size) smooth value noise in [0, 1] from a random grid of ``rows`` x ``cols`` cells."""
    grid = rng.random((rows, cols or rows), dtype=np.float32)
    return np.clip(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)


def wave(t: Floats, sharpness: float = 6.0) -> Floats:
    """Soft square wave in [0, 1] of period 1."""
    return 0.5 + 0.5 * np.tanh(sharpness * np.sin(2 * math.pi * t))


def checks(u: Floats, v: Floats, period: float) -> Floats:
    a, b = wave(u / period), wave(v / period)
    return np.asarray(a * (1 - b) + b * (1 - a))


def dots(u: Floats, v: Floats, period: float, fill: float) -> Floats:
    """Round dots on a square grid; ``fill`` is their radius over the period."""
    du, dv = u / period - np.round(u / period), v / period - np.round(v / period)
    return np.clip((fill - np.hypot(du, dv)) * 10 + 0.5, 0, 1)


def rotate(u: Floats, v: Floats, degrees: float) -> tuple[Floats, Floats]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return u * c + v * s, v * c - u * s


# --- backgrounds: (size, size, 3) from the unit-square coordinates x, y --------------------------

FOLIAGE_HUE, FOLIAGE_SATURATION, FOLIAGE_VALUES = 125.0, 0.42, (0.25, 0.6)


def foliage_noise(rng: Rng, size: int) -> Floats:
    coarse, fine = noise(rng, size, 10), noise(rng, size, 26)
    return np.clip((0.45 * coarse + 0.55 * fine - 0.5) * 1.8 + 0.5, 0, 1)


def _foliage(rng: Rng, x: Floats, y: Floats) -> Floats:
    hue = FOLIAGE_HUE + rng.uniform(-15, 15)
    dark, light = FOLIAGE_VALUES
    texture = foliage_noise(rng, len(x))
    return mix(
        texture, hsv(hue, FOLIAGE_SATURATION, dark), hsv(hue - 15, FOLIAGE_SATURATION, light)
    )


def _stripes(rng: Rng, x: Floats, y: Floats) -> Floats:
    u, _ = rotate(x, y, rng.uniform(0, 180))
    hue, value = rng.uniform(200, 270), rng.uniform(0.45, 0.75)
    texture = wave(u / rng.uniform(0.08, 0.2) + rng.random(), 2.0)
    return mix(texture, hsv(hue, 0.15, value), hsv(hue, 0.25, value - 0.2))


def _gradient(rng: Rng, x: Floats, y: Floats) -> Floats:
    u, _ = rotate(x - 0.5, y - 0.5, rng.uniform(0, 360))
    hue = rng.uniform(180, 230)
    texture = np.clip(u + 0.5 + 0.25 * (noise(rng, len(x), 5) - 0.5), 0, 1)
    return mix(texture, hsv(hue, 0.12, 0.95), hsv(hue, 0.4, 0.7))


def _blobs(rng: Rng, x: Floats, y: Floats) -> Floats:
    hue, value = rng.uniform(200, 265), rng.uniform(0.5, 0.85)
    texture = np.clip((noise(rng, len(x), 8) - 0.5) * 6 + 0.5, 0, 1)
    return mix(texture, hsv(hue, 0.1, value), hsv(hue + 30, 0.25, value - 0.15))


def _checker(rng: Rng, x: Floats, y: Floats) -> Floats:
    u, v = rotate(x, y, rng.uniform(0, 90))
    value = rng.uniform(0.4, 0.7)  # not the toys' white
    texture = checks(u + rng.random(), v + rng.random(), rng.uniform(0.15, 0.3))
    return mix(texture, hsv(rng.uniform(0, 360), 0.06, value), hsv(200, 0.08, value - 0.18))


BACKGROUNDS: dict[str, Callable[[Rng, Floats, Floats], Floats]] = {
    "foliage": _foliage,
    "stripes": _stripes,
    "gradient": _gradient,
    "blobs": _blobs,
    "checker": _checker,
}


def water(rng: Rng, x: Floats, y: Floats) -> Floats:
    ripple = y + 0.012 * np.sin(2 * math.pi * (x / 0.16 + rng.random()))
    texture = 0.7 * wave(ripple / 0.06, 1.5) + 0.3 * noise(rng, len(x), 20, 6)
    hue = rng.uniform(198, 210)
    return mix(texture, hsv(hue, 0.85, 0.55), hsv(hue - 6, 0.6, 0.85))


def rails(rng: Rng, x: Floats, y: Floats, top: float, height: float) -> Floats:
    gravel = mix(noise(rng, len(x), 48), hsv(30, 0.05, 0.35), hsv(30, 0.05, 0.7))
    sleepers = wave(x / 0.09 + rng.random())
    band = np.clip(1.4 - 2.6 * np.abs((y - top) / height - 0.5) * 1.6, 0, 1)
    out: Floats = gravel + (sleepers * band)[..., None] * (rgb(0.2, 0.13, 0.1) - gravel)
    for position in (0.3, 0.7):
        rail = np.clip(1.5 - np.abs(y - top - position * height) / 0.012, 0, 1)
        out = out + rail[..., None] * (rgb(0.85, 0.87, 0.9) - out)
    return out
