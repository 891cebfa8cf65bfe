"""Weak and strong views of one image, and the view used for evaluation.

The two views of a sample are compared pixel by pixel, so the geometry is computed once: the
strong view is the finished weak view with one appearance transform on top (CoSA, Tables 8 to 10:
the strong chain is the weak chain, blur included, followed by ``OneOf(TransAppearance)``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from wsss.data.images import VOID
from wsss.errors import UserError

# Worker processes are the parallelism; OpenCV's own threads would only fight over the cores.
cv2.setNumThreads(0)

BLUR_SIGMA = (0.1, 2.0)
ENHANCE_RANGE = (0.05, 0.95)
POSTERIZE_BITS = (4, 8)

_Pixels = NDArray[np.uint8]
_Appearance = Callable[[_Pixels, float], _Pixels]


def _by_pil(operation: Callable[[Image.Image, float], Image.Image]) -> _Appearance:
    return lambda image, u: np.asarray(operation(Image.fromarray(image), u))


# What changes a value whatever its place is looked up, or done in bits: PIL's numbers without
# the conversions to and from PIL, which cost more than the operation.


def _autocontrast(image: _Pixels, u: float) -> _Pixels:
    low = image.min(0).min(0)  # axis by axis: numpy is 100 times slower over both at once
    high = image.max(0).max(0)
    values = np.arange(256)
    table = np.empty((1, 256, 3), np.uint8)
    for channel, (start, end) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if start == end:  # a flat channel stays as it is
            start, end = 0, 255
        scale = 255 / (end - start)
        table[0, :, channel] = np.clip(values * scale - start * scale, 0, 255)
    return np.asarray(cv2.LUT(image, table), np.uint8)


def _solarize(image: _Pixels, u: float) -> _Pixels:
    bright = (image >= int(u * 256)).view(np.uint8)
    return image ^ np.negative(bright)  # x ^ 255 is 255 - x


def _posterize(image: _Pixels, u: float) -> _Pixels:
    low, high = POSTERIZE_BITS
    bits = low + int(u * (high - low + 1))
    return image & np.uint8(256 - (1 << (8 - bits)))


def _factor(u: float) -> float:
    low, high = ENHANCE_RANGE
    return low + (high - low) * u


def _blend_with(image: _Pixels, value: int, factor: float) -> _Pixels:
    """``Image.blend`` of one value everywhere with ``image``: in float32, rounded down."""
    values = np.arange(256, dtype=np.float32)
    table = np.float32(value) + np.float32(factor) * (values - np.float32(value))
    return np.asarray(cv2.LUT(image, table.astype(np.uint8)), np.uint8)


def _color(image: Image.Image, u: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_factor(u))


def _contrast(image: _Pixels, u: float) -> _Pixels:
    grey = np.asarray(Image.fromarray(image).convert("L"))
    return _blend_with(image, int(float(grey.mean()) + 0.5), _factor(u))


def _brightness(image: _Pixels, u: float) -> _Pixels:
    return _blend_with(image, 0, _factor(u))


# PIL's SMOOTH. A multiple of 1/13 is never near a rounding boundary, so that every way to sum it
# gives the same bits, and OpenCV's is five times as fast.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _sharpness(image: _Pixels, u: float) -> _Pixels:
    smooth = image.copy()  # PIL leaves the outermost pixels as they are
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    blended = Image.blend(Image.fromarray(smooth), Image.fromarray(image), _factor(u))
    return np.asarray(blended)


# Table 10, in its order. Each takes the image and a number uniform in [0, 1).
_APPEARANCE: dict[str, _Appearance] = {
    "identity": lambda image, u: image,
    "autocontrast": _autocontrast,
    "equalize": _by_pil(lambda image, u: ImageOps.equalize(image)),
    "solarize": _solarize,
    "color": _by_pil(_color),
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "posterize": _posterize,
}

APPEARANCE = tuple(_APPEARANCE)
"""Names of the appearance transforms."""


def apply_appearance(image: NDArray[np.uint8], name: str, u: float) -> NDArray[np.uint8]:
    """One appearance transform of Table 10, with the numbers PIL gives bit by bit.

    Args:
        image: (H, W, 3) uint8 RGB.
        name: one of :data:`APPEARANCE`.
        u: strength in [0, 1): solarize threshold ``256 u``; enhancement factor
            ``0.05 + 0.9 u`` (1 would be the unchanged image); posterize ``4 + floor(5 u)`` bits;
            the others have no strength.

    Returns:
        (H, W, 3) uint8.
    """
    return _APPEARANCE[name](image, u)


def resize_image(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize with pixel centres aligned: area average to shrink, bilinear to enlarge.

    Shrinking averages over the covered source pixels, where plain bilinear interpolation would
    skip some and alias. An image that grows along either axis is interpolated along both.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (height, width, 3) uint8.
    """
    if (height, width) == image.shape[:2]:
        return image
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    # The EXACT variants compute in fixed point: the same bits on every processor.
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR_EXACT
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


def resize_mask(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Nearest-neighbour resize with pixel centres aligned; classes are never mixed."""
    # INTER_NEAREST takes floor(x * ratio), half a pixel off the image's bilinear grid.
    resized = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)


def resize_part(
    image: NDArray[np.uint8], height: int, width: int, rows: slice, columns: slice
) -> NDArray[np.uint8]:
    """``resize_image(image, height, width)[rows, columns]``, bit by bit, for less work.

    An enlarged image is computed up to the last row and column wanted. Bilinear interpolation
    reads the nearest neighbours alone and counts coordinates from the first pixel by the scale
    alone, so what follows can be left out. What precedes cannot: counted from another pixel,
    coordinates would round differently.
    """
    full_height, full_width = image.shape[:2]
    if height <= full_height and width <= full_width:
        return resize_image(image, height, width)[rows, columns]
    # The last pixel wanted lies at (stop - 0.5) * full / size - 0.5: two more than its floor
    # are enough to interpolate it away from the border.
    bottom = min(full_height, math.ceil(rows.stop * full_height / height) + 2)
    right = min(full_width, math.ceil(columns.stop * full_width / width) + 2)
    enlarged = cv2.resize(
        image[:bottom, :right],
        None,
        fx=width / full_width,
        fy=height / full_height,
        interpolation=cv2.INTER_LINEAR_EXACT,
    )
    return np.asarray(enlarged, np.uint8)[rows, columns]


def gaussian_blur(image: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Gaussian blur of an (H, W, 3) image, sigma in pixels; the border is mirrored."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)


def on_black(
    part: NDArray[np.uint8], inside: tuple[slice, slice], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Put the (h, w, 3) ``part`` at ``inside`` of a black image of size (H, W).

    Returns:
        (H, W, 3) uint8, channel after channel in memory.
    """
    planes = np.zeros((3, *size), np.uint8)
    cv2.split(part, [plane[inside] for plane in planes])
    return planes.transpose(1, 2, 0)


class ViewPair(NamedTuple):
    """Two views of the same crop; everything is aligned pixel by pixel.

    The images lie in memory channel after channel, as networks read them: stacking them to
    (B, 3, h, w) moves no pixel out of its row.

    Attributes:
        weak: (h, w, 3) uint8 RGB, 0 outside the image.
        strong: (h, w, 3) uint8 RGB, ``weak`` under one appearance transform, 0 outside.
        valid: (h, w) bool, False outside the image.
        mask: (h, w) uint8, 255 outside the image; None if no mask was given.
    """

    weak: NDArray[np.uint8]
    strong: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    mask: NDArray[np.uint8] | None


class TwoViews:
    """Random rescale, flip, crop and blur (weak), plus one appearance transform (strong).

    The rescaled image and the crop window are placed at random: where the image is larger than
    the crop the window moves over it, where it is smaller the image moves inside the window and
    the rest is black padding. Blur and appearance see only the image part of the crop: black
    padding neither bleeds into the image nor counts in its histogram.

    Args:
        crop_size: side of the crop in pixels, or (height, width).
        scale: range of the uniform rescale factor.
        flip: probability of a horizontal flip.
        blur: probability of a Gaussian blur, sigma uniform in [0.1, 2] pixels of the crop. Both
            views share it.
        appearance: transforms to draw from, uniformly, for the strong view. ``["identity"]``
            makes both views equal.
        extra: more appearance transforms for the strong view, from albumentations: mappings with
            its ``name`` and arguments, e.g. ``{"name": "GaussNoise", "p": 0.5}``. Only
            transforms that leave geometry alone are taken.

    Raises:
        UserError: a size, range, probability or name that cannot be.

    Example:
        >>> import numpy as np
        >>> views = TwoViews(crop_size=32)
        >>> pair = views(np.full((20, 30, 3), 7, np.uint8), np.random.default_rng(0))
        >>> pair.weak.shape, pair.valid.dtype, pair.mask
        ((32, 32, 3), dtype('bool'), None)
    """

    def __init__(
        self,
        crop_size: int | Sequence[int] = 448,
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        blur: float = 0.5,
        appearance: Sequence[str] = APPEARANCE,
        extra: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"view.crop_size={crop_size}: expected a side or (height, width)")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise UserError(f"view.scale={scale}: expected (low, high) with 0 < low <= high")
        for key, value in (("flip", flip), ("blur", blur)):
            if not 0 <= value <= 1:
                raise UserError(f"view.{key}={value}: expected a probability between 0 and 1")
        for name in appearance:
            if name not in _APPEARANCE:
                close = get_close_matches(name, APPEARANCE, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(APPEARANCE)}"
                raise UserError(f"view.appearance: unknown transform '{name}', {hint}")
        if not appearance:
            raise UserError("view.appearance is empty; [identity] leaves the strong view as is")
        self.crop_size = (int(size[0]), int(size[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.flip = float(flip)
        self.blur = float(blur)
        self.appearance = tuple(appearance)
        self.extra = _albumentations(extra) if extra else None

    def __call__(
        self,
        image: NDArray[np.uint8],
        rng: np.random.Generator,
        mask: NDArray[np.uint8] | None = None,
        max_side: int | None = None,
    ) -> ViewPair:
        """Draw one pair of views.

        Args:
            image: (H, W, 3) uint8 RGB.
            rng: the sample's own generator. Eight uniform numbers are drawn, whatever they are
                used for: scale, flip, vertical place, horizontal place, blur or not, blur sigma,
                appearance transform, its strength; with ``extra`` a seed for it after them.
            mask: (H, W) uint8 class mask to take along, or None.
            max_side: pixels of a longer side above which the scale is counted from that size.
        """
        draws = [float(u) for u in rng.random(8)]
        low, high = self.scale
        ratio = low + (high - low) * draws[0]
        if max_side is not None:
            ratio *= min(1.0, max_side / max(image.shape[:2]))
        height = max(1, round(image.shape[0] * ratio))
        width = max(1, round(image.shape[1] * ratio))
        flipped = draws[1] < self.flip
        rows = _place(height, self.crop_size[0], draws[2])
        columns = _place(width, self.crop_size[1], draws[3])
        kept = columns.source
        if flipped:  # cut first: mirroring what the crop leaves out would be for nothing
            kept = slice(width - kept.stop, width - kept.start)

        def orient(part: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return np.asarray(cv2.flip(part, 1), np.uint8) if flipped else part

        part = orient(resize_part(image, height, width, rows.source, kept))
        if draws[4] < self.blur:
            sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * draws[5]
            part = gaussian_blur(part, sigma)
        part = np.ascontiguousarray(part)
        name = self.appearance[int(draws[6] * len(self.appearance))]
        changed = apply_appearance(part, name, draws[7])
        if self.extra is not None:
            self.extra.set_random_seed(int(rng.integers(2**31)))
            changed = np.asarray(self.extra(image=changed)["image"], np.uint8)

        inside = (rows.target, columns.target)
        valid = np.zeros(self.crop_size, np.bool_)
        valid[inside] = True
        crop_mask = None
        if mask is not None:
            crop_mask = np.full(self.crop_size, VOID, np.uint8)
            crop_mask[inside] = orient(resize_mask(mask, height, width)[rows.source, kept])
        return ViewPair(
            on_black(part, inside, self.crop_size),
            on_black(changed, inside, self.crop_size),
            valid,
            crop_mask,
        )


def _albumentations(extra: Sequence[Mapping[str, Any]]) -> Any:
    """Compose albumentations transforms by name, those alone that leave geometry as it is."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network at import
    import albumentations

    transforms = []
    for entry in extra:
        options = dict(entry)
        name = str(options.pop("name", ""))
        kind = getattr(albumentations, name, None)
        if not (isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)):
            near = get_close_matches(name, dir(albumentations), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"view.extra: albumentations has no transform '{name}'.{hint}")
        if not issubclass(kind, albumentations.ImageOnlyTransform):
            raise UserError(
                f"view.extra: '{name}' moves pixels, and both views must share their geometry. "
                "Choose a transform of appearance."
            )
        transforms.append(kind(**options))
    return albumentations.Compose(transforms)


class _Placement(NamedTuple):
    source: slice  # what of the image is kept
    target: slice  # where it lies in the crop


def _place(size: int, crop: int, u: float) -> _Placement:
    """Place an image axis of ``size`` and a crop axis against each other; u in [0, 1)."""
    offset = int(u * (abs(size - crop) + 1))
    if size >= crop:
        return _Placement(slice(offset, offset + crop), slice(0, crop))
    return _Placement(slice(0, size), slice(offset, offset + size))
