"""Views: shared geometry, appearance as PIL has it, and nothing random but the generator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from wsss.data import views
from wsss.data.order import sample_rng
from wsss.data.views import (
    APPEARANCE,
    TwoViews,
    ViewPair,
    apply_appearance,
    resize_image,
    resize_mask,
    resize_part,
)
from wsss.errors import UserError

HEIGHT, WIDTH, BLOCK = 160, 224, 16


def coordinate_image() -> np.ndarray:
    """Red is the column, green the row: a pixel says where it comes from."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([columns, rows, np.full_like(rows, 90)], -1).astype(np.uint8)


def block_mask() -> np.ndarray:
    """Every 16 x 16 block has its own value, below 255."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (rows // BLOCK * (WIDTH // BLOCK) + columns // BLOCK).astype(np.uint8)


def textured_image(height: int = 61, width: int = 47) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.integers(30, 200, (height, width, 3))
    ramp = np.linspace(0, 50, width)[None, :, None]
    return (noise + ramp).astype(np.uint8)


def valid_part(view: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Cut the rectangle of valid pixels; fails if they are no rectangle."""
    rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    assert valid[part].all()
    assert valid.sum() == valid[part].size
    return view[part]


def by_pil(image: np.ndarray, name: str, u: float) -> np.ndarray:
    """Table 10 as PIL does it."""
    pil, factor = Image.fromarray(image), 0.05 + (0.95 - 0.05) * u
    results = {
        "identity": lambda: pil,
        "autocontrast": lambda: ImageOps.autocontrast(pil),
        "equalize": lambda: ImageOps.equalize(pil),
        "solarize": lambda: ImageOps.solarize(pil, int(256 * u)),
        "color": lambda: ImageEnhance.Color(pil).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(pil).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(pil).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(pil).enhance(factor),
        "posterize": lambda: ImageOps.posterize(pil, 4 + int(5 * u)),
    }
    return np.asarray(results[name]())


def slow_views(
    view: TwoViews, image: np.ndarray, rng: np.random.Generator, mask: np.ndarray
) -> ViewPair:
    """The views in the plain order: resize the whole, mirror the whole, crop, blur, PIL."""
    u = [float(x) for x in rng.random(8)]
    ratio = view.scale[0] + (view.scale[1] - view.scale[0]) * u[0]
    size = tuple(max(1, round(side * ratio)) for side in image.shape[:2])
    full, full_mask = resize_image(image, *size), resize_mask(mask, *size)
    if u[1] < view.flip:
        full, full_mask = full[:, ::-1], full_mask[:, ::-1]
    source, target = [], []
    for side, crop, place in zip(size, view.crop_size, u[2:4], strict=True):
        start, length = int(place * (abs(side - crop) + 1)), min(side, crop)
        source.append(slice(start, start + length) if side >= crop else slice(0, side))
        target.append(slice(0, crop) if side >= crop else slice(start, start + length))
    part = np.ascontiguousarray(full[tuple(source)])
    if u[4] < view.blur:
        part = cv2.GaussianBlur(part, (0, 0), 0.1 + (2.0 - 0.1) * u[5])
    inside = tuple(target)
    weak, strong = (np.zeros((*view.crop_size, 3), np.uint8) for _ in range(2))
    valid, crop_mask = np.zeros(view.crop_size, bool), np.full(view.crop_size, 255, np.uint8)
    weak[inside] = part
    strong[inside] = by_pil(part, view.appearance[int(u[6] * len(view.appearance))], u[7])
    valid[inside] = True
    crop_mask[inside] = full_mask[tuple(source)]
    return ViewPair(weak, strong, valid, crop_mask)


# --- the plain way ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        TwoViews(96),
        TwoViews((50, 140), scale=(0.9, 3.0)),
        TwoViews(64, scale=(0.2, 1.0), flip=1.0),
        TwoViews(100, scale=(1.0, 1.0), flip=0.3, blur=1.0),
    ],
)
def test_views_are_those_of_the_plain_way_bit_by_bit(view: TwoViews) -> None:
    rng = np.random.default_rng(5)
    for n in range(60):
        height, width = rng.integers(1, 220, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = rng.integers(0, 21, (height, width), dtype=np.uint8)
        image.flags.writeable = mask.flags.writeable = False
        fast = view(image, sample_rng(3, n), mask)
        slow = slow_views(view, image, sample_rng(3, n), mask)
        for field, result in fast._asdict().items():
            np.testing.assert_array_equal(result, getattr(slow, field), err_msg=f"{field}, {n}")


def test_part_of_a_resized_image_is_cut_from_the_whole() -> None:
    rng = np.random.default_rng(6)
    for n in range(300):
        shape = rng.integers(1, 300, 2) if n % 5 else rng.integers(1, 6, 2)
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        height, width = (max(1, round(side * (0.3 + 2.7 * rng.random()))) for side in shape)
        top, left = rng.integers(0, height), rng.integers(0, width)
        rows = slice(int(top), int(rng.integers(top, height)) + 1)
        columns = slice(int(left), int(rng.integers(left, width)) + 1)
        np.testing.assert_array_equal(
            resize_part(image, height, width, rows, columns),
            resize_image(image, height, width)[rows, columns],
        )


def test_stacked_views_are_channels_first_in_memory() -> None:
    """The collate function's (B, 3, h, w) tensor then costs one plain copy."""
    pair = TwoViews(32)(textured_image(), sample_rng(0, 0))
    stacked = np.stack([pair.weak, pair.strong])
    assert stacked.shape == (2, 32, 32, 3)
    assert stacked.transpose(0, 3, 1, 2).flags.c_contiguous


# --- geometry --------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [96, 448, (64, 300)])
def test_crop_is_one_rescaled_flipped_piece_of_the_image(crop: Any) -> None:
    """Along each axis the source coordinate is linear, with slope +-1/scale, and stays inside."""
    view = TwoViews(crop, blur=0.0, appearance=["identity"])
    signs, ratios = set(), []
    for n in range(40):
        pair = view(coordinate_image(), sample_rng(0, n))
        part = valid_part(pair.weak, pair.valid).astype(float)
        assert (part[..., 2] == 90).all()  # no black has crept in
        inner = part[2:-2, 2:-2]  # the outermost pixels are clamped
        x = np.polyfit(np.arange(inner.shape[1]), inner[0, :, 0], 1)
        y = np.polyfit(np.arange(inner.shape[0]), inner[:, 0, 1], 1)
        assert np.abs(np.polyval(x, np.arange(inner.shape[1])) - inner[:, :, 0]).max() < 1.5
        assert (
            np.abs(np.polyval(y, np.arange(inner.shape[0]))[:, None] - inner[:, :, 1]).max() < 1.5
        )
        assert abs(x[0]) == pytest.approx(y[0], rel=0.05)
        signs.add(bool(x[0] > 0))
        ratios.append(1 / y[0])
    assert signs == {True, False}
    assert 0.45 < min(ratios) < 0.8
    assert 1.6 < max(ratios) < 2.2


def test_mask_follows_the_image_pixel_by_pixel() -> None:
    view = TwoViews(200, appearance=["identity"], blur=0.0)
    across = WIDTH // BLOCK
    for n in range(30):
        pair = view(coordinate_image(), sample_rng(1, n), block_mask())
        assert pair.mask is not None
        x, y = valid_part(pair.weak, pair.valid)[..., :2].astype(float).transpose(2, 0, 1)
        block = valid_part(pair.mask, pair.valid).astype(int)
        off_x = np.abs(x - (block % across * BLOCK + (BLOCK - 1) / 2))
        off_y = np.abs(y - (block // across * BLOCK + (BLOCK - 1) / 2))
        # 7.5 to the outermost pixel of a block, and less than 1 to where sampling rounds
        assert off_x.max() <= BLOCK / 2 + 0.5
        assert off_y.max() <= BLOCK / 2 + 0.5
        assert (off_x <= BLOCK / 2).mean() > 0.95


@pytest.mark.parametrize("name", APPEARANCE)
def test_strong_weak_and_mask_agree_on_where_every_pixel_comes_from(name: str) -> None:
    """At scale 1 exactly: the weak view says the place, and its mask and strong view follow."""
    view = TwoViews((120, 300), scale=(1, 1), blur=0, appearance=[name])
    image, mask = coordinate_image(), block_mask()
    flips = set()
    for n in range(12):
        pair = view(image, sample_rng(2, n), mask)
        x, y = pair.weak[pair.valid][:, :2].T.astype(int)
        assert pair.mask is not None
        np.testing.assert_array_equal(pair.mask[pair.valid], mask[y, x])
        np.testing.assert_array_equal(pair.weak[pair.valid], image[y, x])
        part = np.ascontiguousarray(valid_part(pair.weak, pair.valid))
        u = float(sample_rng(2, n).random(8)[7])
        np.testing.assert_array_equal(valid_part(pair.strong, pair.valid), by_pil(part, name, u))
        flips.add(bool(part[0, 0, 0] > part[0, 1, 0]))
    assert flips == {True, False}


def test_mask_values_are_never_mixed() -> None:
    mask = np.where(np.indices((50, 60)).sum(0) % 7 < 3, 20, 255).astype(np.uint8)
    for n in range(10):
        pair = TwoViews(64)(textured_image(50, 60), sample_rng(0, n), mask)
        assert pair.mask is not None
        assert set(np.unique(pair.mask)) <= {20, 255}


def test_resized_mask_samples_pixel_centres() -> None:
    mask = np.array([[1, 2, 3]], np.uint8)
    assert resize_mask(mask, 1, 6).tolist() == [[1, 1, 2, 2, 3, 3]]
    assert resize_mask(np.arange(1, 10, dtype=np.uint8)[None], 1, 3).tolist() == [[2, 5, 8]]


def test_padding_is_black_invalid_and_void_in_both_views() -> None:
    light = np.full((40, 50, 3), 255, np.uint8)
    mask = np.ones((40, 50), np.uint8)
    for n in range(60):
        pair = TwoViews(128)(light, sample_rng(0, n), mask)
        outside = ~pair.valid
        assert outside.any()
        assert not pair.weak[outside].any()
        assert not pair.strong[outside].any()
        assert pair.mask is not None
        assert (pair.mask[outside] == 255).all()
        assert (pair.mask[pair.valid] == 1).all()
        assert (pair.weak[pair.valid] == 255).all()  # blur draws no black in


def test_places_reach_every_corner() -> None:
    """Small images lie anywhere in the crop, and crops anywhere in large images."""
    small, large = np.full((4, 4, 3), 9, np.uint8), coordinate_image()
    fixed: dict[str, Any] = {"scale": (1, 1), "flip": 0, "blur": 0, "appearance": ["identity"]}
    starts = Counter()
    for n in range(400):
        valid = TwoViews(6, **fixed)(small, sample_rng(0, n)).valid
        starts[int(np.flatnonzero(valid.any(1))[0]), int(np.flatnonzero(valid.any(0))[0])] += 1
    assert set(starts) == {(i, j) for i in range(3) for j in range(3)}
    view = TwoViews((HEIGHT - 1, WIDTH - 1), **fixed)
    corners = {tuple(view(large, sample_rng(0, n)).weak[0, 0, :2]) for n in range(60)}
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_identity_settings_return_the_image() -> None:
    view = TwoViews((HEIGHT, WIDTH), scale=(1, 1), flip=0, blur=0, appearance=["identity"])
    pair = view(coordinate_image(), sample_rng(0, 0), block_mask())
    np.testing.assert_array_equal(pair.weak, coordinate_image())
    np.testing.assert_array_equal(pair.mask, block_mask())
    assert pair.valid.all()


def test_certain_flip_mirrors() -> None:
    view = TwoViews((HEIGHT, WIDTH), scale=(1, 1), flip=1, blur=0, appearance=["identity"])
    pair = view(coordinate_image(), sample_rng(0, 0), block_mask())
    np.testing.assert_array_equal(pair.weak, coordinate_image()[:, ::-1])
    np.testing.assert_array_equal(pair.mask, block_mask()[:, ::-1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (700, 2)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    for n in range(30):
        pair = TwoViews(32)(np.full((*shape, 3), 50, np.uint8), sample_rng(0, n))
        assert pair.weak.shape == (32, 32, 3)
        assert pair.valid.any()


# --- randomness ------------------------------------------------------------------------------


def test_same_generator_same_views() -> None:
    view, image = TwoViews(64), textured_image()
    for n in range(20):
        first, second = view(image, sample_rng(0, n)), view(image, sample_rng(0, n))
        for a, b in zip(first[:3], second[:3], strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(
        view(image, sample_rng(0, 0)).weak, view(image, sample_rng(0, 1)).weak
    )


def test_draws_do_not_depend_on_settings_or_masks() -> None:
    """Turning a part off leaves every other draw as it was."""
    image = textured_image()
    full, plain = TwoViews(64, blur=0), TwoViews(64, blur=0, appearance=["identity"])
    for n in range(10):
        rngs = [sample_rng(0, n) for _ in range(2)]
        mask = np.zeros(image.shape[:2], np.uint8)
        np.testing.assert_array_equal(full(image, rngs[0]).weak, plain(image, rngs[1], mask).weak)
        assert rngs[0].random() == rngs[1].random()


def test_input_is_left_alone() -> None:
    image = textured_image()
    before = image.copy()
    for n in range(20):
        pair = TwoViews((61, 47), scale=(1, 1))(image, sample_rng(0, n))
        pair.weak[:] = 0
    np.testing.assert_array_equal(image, before)


def test_transforms_are_drawn_uniformly_with_spread_strengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[str, float]] = []

    def record(image: np.ndarray, name: str, u: float) -> np.ndarray:
        drawn.append((name, u))
        return image

    monkeypatch.setattr(views, "apply_appearance", record)
    view, image = TwoViews(8), np.zeros((8, 8, 3), np.uint8)
    for n in range(4500):
        view(image, sample_rng(0, n))
    counts = Counter(name for name, _ in drawn)
    chi_square = sum((counts[name] - 500) ** 2 / 500 for name in APPEARANCE)
    assert sum(counts.values()) == 4500
    assert chi_square < 20.1  # 1 % of 8 degrees of freedom
    for name in APPEARANCE:
        strengths = [u for drawn_name, u in drawn if drawn_name == name]
        assert np.mean(strengths) == pytest.approx(0.5, abs=0.06)


def test_flip_and_blur_happen_half_the_time() -> None:
    image = coordinate_image()
    still: dict[str, Any] = {"scale": (1, 1), "appearance": ["identity"]}
    flips = [
        TwoViews((HEIGHT, WIDTH), blur=0, **still)(image, sample_rng(0, n)).weak[0, 0, 0] > 0
        for n in range(300)
    ]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.09)
    noise = textured_image()
    view = TwoViews(noise.shape[:2], flip=0, **still)
    blurred = [not np.array_equal(view(noise, sample_rng(0, n)).weak, noise) for n in range(300)]
    assert np.mean(blurred) == pytest.approx(0.5, abs=0.09)


# --- appearance ------------------------------------------------------------------------------


def grey_of(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("L")).astype(float)


def blend(image: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    return np.clip(other + factor * (image.astype(float) - other), 0, 255)


def expected(image: np.ndarray, name: str, u: float) -> np.ndarray:
    """Table 10, written out; PIL only where the operation is PIL's own."""
    factor, values = 0.05 + 0.9 * u, image.astype(int)
    match name:
        case "identity":
            return values
        case "autocontrast":
            low, high = values.min((0, 1)), values.max((0, 1))
            return (values - low) * 255 / (high - low)
        case "equalize":
            return np.asarray(ImageOps.equalize(Image.fromarray(image))).astype(int)
        case "solarize":
            return np.where(values >= int(256 * u), 255 - values, values)
        case "color":
            return blend(image, grey_of(image)[..., None], factor)
        case "contrast":
            return blend(image, np.round(grey_of(image).mean()), factor)
        case "brightness":
            return blend(image, 0.0, factor)
        case "sharpness":
            smooth = Image.fromarray(image).filter(ImageFilter.SMOOTH)
            return blend(image, np.asarray(smooth).astype(float), factor)
        case "posterize":
            bits = 4 + int(5 * u)
            return values >> (8 - bits) << (8 - bits)
    raise AssertionError(name)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("name", APPEARANCE)
def test_appearance_is_within_one_grey_level(name: str, u: float) -> None:
    image = textured_image()
    result = apply_appearance(image, name, u)
    assert result.dtype == np.uint8
    assert np.abs(result.astype(float) - expected(image, name, u)).max() <= 1


@pytest.mark.parametrize("name", APPEARANCE)
def test_appearance_is_pils_bit_by_bit(name: str) -> None:
    rng = np.random.default_rng(7)
    images = [
        rng.integers(0, 256, (90, 70, 3), dtype=np.uint8),
        rng.integers(100, 120, (40, 50, 3), dtype=np.uint8),  # little contrast
        rng.integers(0, 256, (1, 1, 3), dtype=np.uint8) + np.zeros((9, 8, 1), np.uint8),  # none
        np.indices((256, 256, 3)).sum(0).astype(np.uint8),  # every value beside its neighbours
    ]
    images += [rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((1, 1), (2, 9), (9, 1))]
    for image in images:
        for u in (0.0, 0.5, 0.9999, *rng.random(6)):
            result = apply_appearance(image, name, u)
            np.testing.assert_array_equal(result, by_pil(image, name, u), err_msg=f"{u}")


def test_blend_with_any_grey_is_pils() -> None:
    """Every mean that contrast may find, every value, many strengths."""
    values = np.arange(256, dtype=np.uint8)[None]
    for factor in 0.05 + 0.9 * np.random.default_rng(8).random(8):
        for grey in range(256):
            base = Image.new("L", (256, 1), grey)
            expected_row = np.asarray(Image.blend(base, Image.fromarray(values), factor))
            np.testing.assert_array_equal(
                views._blend_with(values, grey, float(factor)), expected_row
            )


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("color", ImageEnhance.Color),
        ("contrast", ImageEnhance.Contrast),
        ("brightness", ImageEnhance.Brightness),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_factor_runs_from_5_to_95_percent(name: str, enhancer: Any) -> None:
    image = textured_image()
    for u, factor in ((0.0, 0.05), (0.5, 0.5), (1.0, 0.95)):
        by_pil = np.asarray(enhancer(Image.fromarray(image)).enhance(factor))
        np.testing.assert_array_equal(apply_appearance(image, name, u), by_pil)


@pytest.mark.parametrize("name", APPEARANCE)
def test_strong_is_one_transform_of_weak_untouched_by_padding(name: str) -> None:
    view, image = TwoViews(80, scale=(0.8, 1.2), appearance=[name]), textured_image()
    for n in range(6):
        pair = view(image, sample_rng(0, n))
        assert not pair.valid.all()
        u = float(sample_rng(0, n).random(8)[7])
        weak = np.ascontiguousarray(valid_part(pair.weak, pair.valid))
        strong = valid_part(pair.strong, pair.valid)
        assert np.abs(strong.astype(float) - expected(weak, name, u)).max() <= 1


# --- resizing --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(90, 90), (122, 94), (61, 80)])
def test_enlarging_is_bilinear(size: tuple[int, int]) -> None:
    image = textured_image()
    by_pil = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.abs(resize_image(image, *size).astype(int) - np.asarray(by_pil)).max() <= 1


def test_shrinking_averages() -> None:
    image = textured_image(60, 40)
    mean = image.reshape(20, 3, 20, 2, 3).mean((1, 3))
    assert np.abs(resize_image(image, 20, 20) - mean).max() <= 1


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "view.crop_size=0"),
        ({"crop_size": [1, 2, 3]}, "height, width"),
        ({"scale": (2.0, 0.5)}, "view.scale"),
        ({"scale": (0.0, 1.0)}, "view.scale"),
        ({"flip": 1.5}, "view.flip=1.5"),
        ({"blur": -0.1}, "view.blur"),
        ({"appearance": ["solarise"]}, "did you mean 'solarize'"),
        ({"appearance": []}, "empty"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwoViews(**arguments)


EXTRA = [{"name": "GaussNoise", "p": 1.0, "std_range": [0.1, 0.2]}, {"name": "ToGray", "p": 0.5}]


def test_albumentations_change_the_strong_view_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    plain = TwoViews(crop_size=32, appearance=["identity"])
    more = TwoViews(crop_size=32, appearance=["identity"], extra=EXTRA)
    a = plain(image, np.random.default_rng(1))
    b, again = (more(image, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(a.weak, b.weak)
    assert not np.array_equal(a.strong, b.strong)
    assert np.array_equal(b.strong, again.strong)  # the sample's generator decides
    assert not b.strong[~b.valid].any()


@pytest.mark.parametrize(
    ("name", "message"),
    [("GausNoise", "Did you mean 'GaussNoise'"), ("Rotate", "moves pixels"), ("Compose", "has no")],
)
def test_unfit_albumentations_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwoViews(extra=[{"name": name}])
