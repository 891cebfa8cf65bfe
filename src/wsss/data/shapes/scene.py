"""One image of ``shapes``: objects placed, painted and labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from wsss.data.images import VOID
from wsss.data.shapes import difficulty
from wsss.data.shapes.difficulty import CLASSES
from wsss.data.shapes.figures import Figure, Mask, area, fill, make_figure
from wsss.data.shapes.textures import BACKGROUNDS, Floats, Rng, rails, rotate, water

SUPERSAMPLING = 2


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


@dataclass
class _Placed:
    figure: Figure
    center: tuple[float, float]
    mask: Mask  # before occlusion
    part: Mask


def _place(rng: Rng, figures: Sequence[Figure], size: int) -> tuple[list[_Placed], float, float]:
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
            outline = fill(figure.polygons(figure.outline, (x, y)), size)
            part = fill(figure.polygons(figure.part, (x, y)), size)
            placed.append(_Placed(figure, (x, y), outline, part))
        covered = np.zeros((size, size), bool)
        for item in reversed(placed):
            visible = item.mask & ~covered
            # Whole pixels only: the ones that the object shares become void.
            if blocks(visible).all(0).mean() < difficulty.MIN_VISIBLE_AREA:
                break
            if visible.sum() < difficulty.MIN_VISIBLE_FRACTION * item.mask.sum():
                break
            whole = sum(area([p]) for p in item.figure.part) * item.figure.diameter**2 * size**2
            if (item.part & visible).sum() < difficulty.MIN_VISIBLE_PART * whole:
                break
            covered |= item.mask
        else:
            return placed, waterline, railhead
    raise RuntimeError(
        f"shapes: no visible placement of {[f.name for f in figures]} in 60 attempts; lower "
        "MIN_VISIBLE_AREA, difficulty.MIN_VISIBLE_FRACTION or MIN_VISIBLE_PART"
    )


def blocks(array: NDArray[Any]) -> NDArray[Any]:
    """(S * k, S * k) to (k * k, S, S): the supersampled values of each pixel."""
    k, size = SUPERSAMPLING, len(array) // SUPERSAMPLING
    return array.reshape(size, k, size, k).transpose(1, 3, 0, 2).reshape(k * k, size, size)


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"shapes: {name}={value} is out of range; give at least {low}{upper}")


def render(number: int, image_size: int = 96, seed: int = 0) -> Sample:
    """Draw image ``number``.

    Args:
        number: image number, not negative; a pure function of it, the size and the seed.
        image_size: side in pixels, at least 32.
        seed: seed of the data set, not negative.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_range("number", number, 0)
    check_range("image_size", image_size, 32)
    check_range("seed", seed, 0)
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))
    size = SUPERSAMPLING * image_size
    count = 1 + int(rng.choice(3, p=difficulty.OBJECTS_PER_IMAGE))
    names = [CLASSES[k] for k in rng.integers(len(CLASSES), size=count)]
    placed, waterline, railhead = _place(rng, [make_figure(rng, name) for name in names], size)

    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    if "lizard" in names and rng.random() < difficulty.CAMOUFLAGE:
        background = "foliage"
    canvas = BACKGROUNDS[background](rng, x, y)
    contexts = []
    if rng.random() < (difficulty.COEXISTENCE if "boat" in names else difficulty.CONTEXT_ALONE):
        contexts.append("water")
        shore = waterline + 0.01 * np.sin(2 * math.pi * (x / 0.4 + rng.random()))
        band = (y > shore) & (y < waterline + rng.uniform(0.3, 0.5))
        canvas = np.where(band[..., None], water(rng, x, y), canvas)
    if rng.random() < (difficulty.COEXISTENCE if "train" in names else difficulty.CONTEXT_ALONE):
        contexts.append("rails")
        height = rng.uniform(0.16, 0.24)
        band = (y > railhead - 0.02) & (y < railhead - 0.02 + height)
        canvas = np.where(band[..., None], rails(rng, x, y, railhead - 0.02, height), canvas)

    owner = np.zeros((size, size), np.uint8)  # 0 background, k + 1 the k-th object
    for k, item in enumerate(placed):
        _paint(canvas, item, x, y)
        owner[item.mask] = k + 1

    image = cv2.resize(canvas, (image_size, image_size), interpolation=cv2.INTER_AREA)
    lx, ly = x[::SUPERSAMPLING, ::SUPERSAMPLING], y[::SUPERSAMPLING, ::SUPERSAMPLING]
    light = rng.uniform(0.9, 1.08) + rng.uniform(-0.12, 0.12) * (lx - 0.5)
    image = image * (light + rng.uniform(-0.12, 0.12) * (ly - 0.5))[..., None]
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(*difficulty.NOISE)
    pixels = np.clip(np.round((image + noise) * 255), 0, 255).astype(np.uint8)
    mask, objects = _labels(owner, placed)
    return Sample(pixels, mask, objects, background, tuple(contexts))


def _paint(canvas: Floats, item: _Placed, x: Floats, y: Floats) -> None:
    """Paint one object into ``canvas`` in place."""
    rows, cols = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    u, v = rotate(x[window] - item.center[0], y[window] - item.center[1], -item.figure.angle)
    if item.figure.flip:
        u = -u
    color = item.figure.paint(u, v, item.part[window])
    shade = 1.0 - 0.25 * np.clip((y[window] - item.center[1]) / item.figure.diameter, -0.5, 0.5)
    np.copyto(canvas[window], color * shade[..., None], where=item.mask[window][..., None])


def _labels(
    owner: NDArray[np.uint8], placed: Sequence[_Placed]
) -> tuple[NDArray[np.uint8], list[ShapeObject]]:
    """Mask and objects at the final resolution from the supersampled owner map."""
    owners = blocks(owner)
    votes = np.stack([(owners == k).sum(0) for k in range(len(placed) + 1)])
    winner = votes.argmax(0)
    values = np.array([0, *(CLASSES.index(p.figure.name) + 1 for p in placed)], np.uint8)
    mask = values[winner]
    if difficulty.VOID_BORDER:
        mask[votes.max(0) < SUPERSAMPLING**2] = VOID
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
