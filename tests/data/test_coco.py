"""COCO's annotations as masks and labels, against pycocotools and pixel by pixel."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO as Official

from tests.data.snapshot import snapshot
from wsss.data import coco
from wsss.data.coco import COCO, paint
from wsss.data.images import DatasetError
from wsss.data.layout import Split

SIZE = (24, 32)  # height, width
# Out of order and with gaps: the order of the ids decides, not that of the list.
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "brush"}]
CLASSES = ("person", "dog", "brush")
PERSON, DOG, BRUSH = 1, 18, 90

Json = dict[str, Any]
Pixels = NDArray[np.bool_]

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def box(top: int, left: int, height: int, width: int, size: tuple[int, int] = SIZE) -> Pixels:
    pixels = np.zeros(size, bool)
    pixels[top : top + height, left : left + width] = True
    return pixels


def polygon(top: float, left: float, height: float, width: float) -> list[float]:
    bottom, right = top + height, left + width
    return [left, top, right, top, right, bottom, left, bottom]


def runs_of(pixels: Pixels) -> Json:
    """Uncompressed run lengths, pixel after pixel down the columns."""
    counts, value = [0], False
    for pixel in pixels.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"counts": counts, "size": list(pixels.shape)}


def packed_of(pixels: Pixels) -> Json:
    """Compressed run lengths, as pycocotools writes them and JSON holds them."""
    packed = rle.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"counts": packed["counts"].decode(), "size": [int(side) for side in packed["size"]]}


def thing(category: int, segmentation: Any, crowd: int = 0, **more: Any) -> Json:
    if isinstance(segmentation, np.ndarray):
        segmentation = runs_of(segmentation)
    return {"category_id": category, "segmentation": segmentation, "iscrowd": crowd, **more}


ABC = {
    "a": [thing(DOG, [polygon(2, 3, 8, 9)]), thing(PERSON, box(15, 20, 5, 6))],
    "b": [thing(BRUSH, box(0, 0, 4, 4), crowd=1)],
    "c": [],
}


def write_json(
    root: Path,
    images: dict[str, list[Json]],
    split: str = "train",
    year: int = 2017,
    categories: list[Json] = CATEGORIES,
    change: Callable[[Json], Any] = lambda content: None,
) -> Path:
    numbers = {name: 100 + i for i, name in enumerate(images)}
    annotations = [{"image_id": numbers[name], **a} for name, own in images.items() for a in own]
    content = {
        "images": [
            {"id": number, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for name, number in numbers.items()
        ],
        "annotations": [{"id": 7000 + i, **a} for i, a in enumerate(annotations)],
        "categories": categories,
    }
    change(content)
    path = root / f"annotations/instances_{split}{year}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_tree(
    root: Path,
    images: dict[str, list[Json]],
    split: str = "train",
    year: int = 2017,
    folder: str | None = None,
    **more: Any,
) -> Path:
    place = root / (folder or f"{split}{year}")
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in images:
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{name}.jpg")
    write_json(root, images, split, year, **more)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Split `train` of the images a, b and c, of which c has no annotation."""
    return write_tree(tmp_path / "coco", ABC)


def notes(root: Path, split: str = "train") -> str:
    return "\n".join(COCO(root).prepare(split).notes)


def masks(root: Path, split: str = "train") -> dict[str, NDArray[np.uint8]]:
    data = COCO(root).open(split)
    return {name: data.load_mask(i) for i, name in enumerate(data.names)}


def labels(data: Split) -> dict[str, list[str]]:
    return {
        name: [data.classes[i] for i in np.flatnonzero(row)]
        for name, row in zip(data.names, data.labels, strict=True)
    }


# --- the rule ----------------------------------------------------------------------------------


def test_reads_names_labels_images_and_masks(root: Path) -> None:
    data = COCO(root).open("train", "train_masks")
    assert data.classes == CLASSES
    assert data.names == ["a", "b"]
    assert data.sizes == [SIZE] * 2
    assert labels(data) == {"a": ["person", "dog"], "b": ["brush"]}
    with Image.open(root / "train2017/b.jpg") as image:
        np.testing.assert_array_equal(data.load_image(1), np.asarray(image))
    expected = np.zeros(SIZE, np.uint8)
    expected[2:10, 3:12] = 2
    expected[15:20, 20:26] = 1
    np.testing.assert_array_equal(data.load_mask(0), expected)
    np.testing.assert_array_equal(data.load_mask(1), np.where(box(0, 0, 4, 4), 255, 0))


def test_images_without_annotations_are_out_and_counted(root: Path) -> None:
    assert "1 image of 3 without annotations: out" in notes(root)
    (root / "train2017/c.jpg").unlink()  # nor does anyone look for them
    assert COCO(root).open("train").names == ["a", "b"]


BIG, MIDDLE, SMALL = box(0, 0, 20, 20), box(5, 5, 10, 10), box(8, 8, 3, 3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_small_instances_lie_on_large_ones(order: tuple[int, ...]) -> None:
    all_three = [thing(PERSON, BIG), thing(DOG, MIDDLE), thing(PERSON, SMALL)]
    found, _ = paint(*SIZE, [all_three[i] for i in order], {PERSON: 0, DOG: 1})
    expected = np.zeros(SIZE, np.uint8)
    for pixels, value in ((BIG, 1), (MIDDLE, 2), (SMALL, 1)):
        expected[pixels] = value
    np.testing.assert_array_equal(found, expected)


def test_area_is_counted_not_read() -> None:
    """The JSON's `area` is that of the polygon before it was made pixels, or wrong."""
    pair = [thing(PERSON, SMALL, area=999), thing(DOG, BIG, area=1)]
    found, _ = paint(*SIZE, pair, {PERSON: 0, DOG: 1})
    assert (found[SMALL] == 1).all()


def test_of_equal_areas_the_later_one_is_on_top() -> None:
    left, right = box(0, 0, 6, 6), box(0, 3, 6, 6)
    both = left & right
    for first, second in ((left, right), (right, left)):
        pair = [thing(PERSON, first), thing(DOG, second)]
        found, _ = paint(*SIZE, pair, {PERSON: 0, DOG: 1})
        assert (found[both] == 2).all()


@pytest.mark.parametrize("crowd_first", [True, False])
@pytest.mark.parametrize("crowd", [BIG, SMALL])
def test_crowds_lie_below_all_instances(crowd: Pixels, crowd_first: bool) -> None:
    pair = [thing(PERSON, crowd, crowd=1), thing(DOG, MIDDLE)]
    found, _ = paint(*SIZE, pair if crowd_first else pair[::-1], {PERSON: 0, DOG: 1})
    np.testing.assert_array_equal(found, np.where(MIDDLE, 2, np.where(crowd, 255, 0)))


def winner(layers: list[tuple[Pixels, int, bool]], row: int, column: int) -> int:
    """The rule for one pixel: the smallest instance there, the last of equal ones, else crowd."""
    best, value = None, 0
    for order, (pixels, layer_value, crowd) in enumerate(layers):
        if not pixels[row, column]:
            continue
        if crowd:
            value = 255 if best is None else value
            continue
        rank = (int(pixels.sum()), -order)
        if best is None or rank < best:
            best, value = rank, layer_value
    return value


def test_random_scenes_pixel_by_pixel() -> None:
    rng, size = np.random.default_rng(3), (9, 11)
    index = {10: 0, 20: 1, 30: 2}
    forms = (
        runs_of,
        packed_of,
        lambda p: {**packed_of(p), "counts": packed_of(p)["counts"].encode()},
    )
    seen = set()
    for scene in range(60):
        layers, annotations = [], []
        for _ in range(rng.integers(1, 8)):
            if rng.random() < 0.5:
                top, left, height, width = (int(v) for v in rng.integers(0, 7, 4))
                pixels = box(top, left, height + 1, width + 1, size)
            else:  # in many runs
                pixels = rng.random(size) < rng.random()
            category, crowd = int(rng.choice([10, 20, 30])), bool(rng.random() < 0.3)
            layers.append((pixels, index[category] + 1, crowd))
            form = forms[rng.integers(3)]
            annotations.append(thing(category, form(pixels), crowd=int(crowd)))
        expected = [[winner(layers, y, x) for x in range(size[1])] for y in range(size[0])]
        found, _ = paint(*size, annotations, index)
        np.testing.assert_array_equal(found, expected, err_msg=f"scene {scene}")
        seen |= set(np.unique(found).tolist())
    assert seen == {0, 1, 2, 3, 255}


# --- the three forms of a region ---------------------------------------------------------------


def test_forms_of_regions_agree() -> None:
    pixels = box(3, 4, 7, 11) ^ box(5, 6, 9, 2)
    packed = packed_of(pixels)
    for segmentation in (runs_of(pixels), packed, {**packed, "counts": packed["counts"].encode()}):
        found, _ = paint(*SIZE, [thing(DOG, segmentation)], {DOG: 6})
        np.testing.assert_array_equal(found, np.where(pixels, 7, 0))


@pytest.mark.parametrize(
    "pixels", [np.ones(SIZE, bool), box(0, 0, 1, 1), box(23, 31, 1, 1), box(0, 5, 24, 3)]
)
def test_runs_at_the_edges(pixels: Pixels) -> None:
    for segmentation in (runs_of(pixels), packed_of(pixels)):
        found, _ = paint(*SIZE, [thing(DOG, segmentation)], {DOG: 0})
        np.testing.assert_array_equal(found, pixels)


def test_long_runs_are_unpacked() -> None:
    """Numbers of several digits, and negative differences."""
    rng = np.random.default_rng(0)
    flat = np.zeros(700 * 900, bool)
    for start in rng.integers(0, flat.size, 40):
        flat[start : start + int(rng.choice([1, 30, 1000, 40_000]))] ^= True
    pixels = flat.reshape(900, 700).T
    found, _ = paint(700, 900, [thing(DOG, packed_of(pixels))], {DOG: 0})
    np.testing.assert_array_equal(found, pixels)


def test_polygons_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        parts = [
            (rng.random(2 * int(rng.integers(3, 9))) * 44 - 6).tolist()  # some of it outside
            for _ in range(rng.integers(1, 4))
        ]
        expected = np.zeros(SIZE, bool)
        for part in parts:  # one by one: a region is the union of its parts
            expected |= rle.decode(rle.frPyObjects([part], *SIZE))[:, :, 0].astype(bool)
        found, _ = paint(*SIZE, [thing(DOG, parts)], {DOG: 0})
        np.testing.assert_array_equal(found, expected)


DEGENERATE = {
    "no polygon": [],
    "two points": [[1, 1, 9, 9]],
    "one point thrice": [[5, 5, 5, 5, 5, 5]],
    "outside": [[-9, -9, -3, -9, -3, -3]],
    "no runs": runs_of(np.zeros(SIZE, bool)),
}


@pytest.mark.parametrize("segmentation", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("crowd", [0, 1])
def test_annotations_without_area(tmp_path: Path, segmentation: Any, crowd: int) -> None:
    empty = thing(PERSON, segmentation, crowd=crowd, id=12345)
    write_tree(tmp_path, {"a": [empty, thing(DOG, BIG)], "b": [empty]})
    assert "2 annotations without area" in notes(tmp_path)
    assert "annotation 12345 of b" in notes(tmp_path)
    found = masks(tmp_path)
    np.testing.assert_array_equal(found["a"], np.where(BIG, 2, 0))
    assert not found["b"].any()
    expected = {"a": ["person", "dog"], "b": ["person"]}
    assert labels(COCO(tmp_path).open("train")) == expected


def test_degenerate_parts_of_a_polygon_are_left_out() -> None:
    parts = [[1, 1, 9, 9], polygon(2, 3, 8, 9)]
    found, empty = paint(*SIZE, [thing(DOG, parts)], {DOG: 0})
    np.testing.assert_array_equal(found, box(2, 3, 8, 9))
    assert empty == []


def test_whole_trees_have_no_note_of_empty_annotations(root: Path) -> None:
    assert "without area" not in notes(root)


# --- annotations that are not right ------------------------------------------------------------


UNPAINTABLE: dict[str, tuple[Any, str]] = {
    "runs of another size": (
        runs_of(np.ones((24, 31), bool)),
        r"\[24, 31\] in an image \[24, 32\]",
    ),
    "turned": (runs_of(np.ones((32, 24), bool)), r"\[32, 24\] in an image \[24, 32\]"),
    "packed, of another size": (packed_of(np.ones((3, 3), bool)), r"region of \[3, 3\]"),
    # pycocotools would read memory that was never written
    "too few runs": (
        {"counts": [3, 4], "size": list(SIZE)},
        "runs over 7 pixels, the image has 768",
    ),
    "too many runs": ({"counts": [3, 4000], "size": list(SIZE)}, "runs over 4003 pixels"),
    "no text": ({"counts": "", "size": list(SIZE)}, "runs over 0 pixels"),
    "half the text": (
        {"counts": packed_of(box(3, 3, 9, 9))["counts"][:5], "size": list(SIZE)},
        "runs over [0-9]+ pixels",
    ),
    "no packed text": ({"counts": "häh?", "size": list(SIZE)}, "in packed run lengths"),
    "negative run": ({"counts": [3, -4, 769], "size": list(SIZE)}, "runs over"),
    "huge run": ({"counts": [10**30], "size": list(SIZE)}, "OverflowError"),
    "words": ([["a", "b", "c", "d", "e", "f"]], "ValueError"),
    "flat": ([1, 1, 9, 1, 9, 9], "TypeError"),
    "none": (None, "TypeError"),
}


@pytest.mark.parametrize(("segmentation", "message"), UNPAINTABLE.values(), ids=UNPAINTABLE)
def test_annotations_that_cannot_be_painted(
    tmp_path: Path, segmentation: Any, message: str
) -> None:
    write_tree(tmp_path, {"a": [thing(DOG, segmentation)], "b": [thing(DOG, BIG)]})
    path = tmp_path / "annotations/instances_train2017.json"
    with pytest.raises(DatasetError, match=f"1 problem in (.|\n)*{path}: .*image 100 .*{message}"):
        COCO(tmp_path).open("train")
    with pytest.warns(UserWarning, match=r"left out 1 of 2 images:(.|\n)*cannot be painted"):
        data = COCO(tmp_path).open("train", "train_masks", on_error="skip")
    assert data.names == ["b"]
    write_json(tmp_path, {"a": [thing(DOG, SMALL)], "b": [thing(DOG, BIG)]})
    assert set(masks(tmp_path)) == {"a", "b"}  # mended


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e12, 1e5])
def test_coordinates_that_pycocotools_would_not_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """It takes minutes and all memory for them; so they must not come to it, here either."""

    def reached(*args: Any) -> Any:
        raise AssertionError("reached")

    monkeypatch.setattr(coco.rle, "frPyObjects", reached)
    write_tree(tmp_path, {"a": [thing(DOG, [[1, 1, value, 9, 9, 9]])]})
    with pytest.raises(DatasetError, match=r"image 100 .*coordinates .* no numbers below 100000"):
        COCO(tmp_path).open("train")


def test_unknown_category(root: Path) -> None:
    path = write_json(root, {**ABC, "b": [thing(DOG, BIG), thing(77, SMALL)]})
    with pytest.raises(DatasetError, match=rf"{path}: .*\(b\.jpg\) has the unknown category_id 77"):
        COCO(root).open("train")
    with pytest.warns(UserWarning, match="left out 1 of 2 images"):
        assert COCO(root).open("train", on_error="skip").names == ["a"]


def test_missing_images_are_named_and_found_when_they_come(root: Path) -> None:
    image = root / "train2017/b.jpg"
    away = image.rename(root / "away.jpg")
    with pytest.raises(DatasetError, match=f"{image}: listed in instances_train2017.json, but no"):
        COCO(root).open("train")
    with pytest.warns(UserWarning, match="left out 1 of 2 images"):
        assert COCO(root).open("train", on_error="skip").names == ["a"]
    away.rename(image)
    assert COCO(root).open("train").names == ["a", "b"]


def test_the_file_name_decides_not_its_stem(root: Path) -> None:
    """A stray file of the same stem neither hides an image nor stands in for it."""
    with Image.open(root / "train2017/a.jpg") as image:
        image.save(root / "train2017/a.png")
    write_json(root, ABC, change=lambda c: c["images"][0].update(file_name="a.png"))
    assert COCO(root).open("train").names == ["a", "b"]
    (root / "train2017/a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.png: listed"):
        COCO(root).open("train")


def test_names_that_two_images_have(root: Path) -> None:
    path = write_json(root, ABC, change=lambda c: c["images"][1].update(file_name="a.jpg"))
    with pytest.raises(DatasetError, match=f"{path}: two images are called 'a'"):
        COCO(root).open("train")
    with pytest.warns(UserWarning, match="left out 1 of 2 images"):
        data = COCO(root).open("train", on_error="skip")
    assert labels(data) == {"a": ["person", "dog"]}
    assert set(np.unique(data.load_mask(0))) == {0, 1, 2}


def test_ids_that_two_images_have(root: Path) -> None:
    """Whose annotations they are cannot be known: neither image is used."""
    path = write_json(root, ABC, change=lambda c: c["images"][2].update(id=c["images"][1]["id"]))
    with pytest.raises(DatasetError, match=rf"{path}: 2 images have the id 101, 'b\.jpg' is one"):
        COCO(root).open("train")
    with pytest.warns(UserWarning, match="left out 2 of 3 images"):
        assert COCO(root).open("train", on_error="skip").names == ["a"]


def test_an_image_that_is_listed_twice(root: Path) -> None:
    """Both are the same image: its annotations are its own."""
    write_json(root, ABC, change=lambda c: c["images"].append(c["images"][0]))
    with pytest.raises(DatasetError, match="two images are called 'a'"):
        COCO(root).open("train")
    with pytest.warns(UserWarning, match="left out 1 of 3 images"):
        assert COCO(root).open("train", on_error="skip").names == ["a", "b"]


def test_annotations_of_images_that_are_not_listed_are_counted(root: Path) -> None:
    assert "not listed" not in notes(root)
    write_json(root, ABC, change=lambda c: c["annotations"][1].update(image_id="100"))
    assert "1 annotation of images that are not listed, of image_id '100' for one" in notes(root)
    assert labels(COCO(root).open("train")) == {"a": ["dog"], "b": ["brush"]}


def test_ids_of_another_kind_in_annotations(root: Path) -> None:
    def as_text(content: Json) -> None:
        for annotation in content["annotations"]:
            annotation["image_id"] = str(annotation["image_id"])

    path = write_json(root, ABC, change=as_text)
    message = f"{path}: .*no annotation is of an image in 'images': image_id '100', and ids like 10"
    with pytest.raises(DatasetError, match=message):
        COCO(root).open("train")


def test_image_of_another_size_than_its_annotations(root: Path) -> None:
    Image.new("RGB", (30, 24)).save(root / "train2017/b.jpg")
    with pytest.raises(DatasetError, match=r"b\.png: mask is 32x24 but its image is 30x24"):
        COCO(root).open("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "KeyError: 'annotations'"),
        (lambda c: c["images"][0].pop("file_name"), "KeyError: 'file_name'"),
        (lambda c: c["annotations"][0].pop("image_id"), "KeyError: 'image_id'"),
        (lambda c: c["annotations"][0].pop("category_id"), "KeyError: 'category_id'"),
        (lambda c: c["annotations"][0].update(category_id=[1]), r"category_id \[1\]"),
        (lambda c: c["images"][0].update(file_name=7), "file_name 7 in 'images'"),
        (lambda c: c["categories"][0].update(id="x"), "id 'x' in 'categories'"),
        (lambda c: c["categories"][1].update(id=DOG), f"two categories have the id {DOG}"),
        (lambda c: c["categories"][1].update(name="dog"), "two categories have the name 'dog'"),
        (lambda c: c.update(images=None), "TypeError"),
        (lambda c: c["categories"].clear(), "0 categories, 1 to 254 fit"),
    ],
)
def test_json_without_what_it_needs(
    root: Path, change: Callable[[Json], Any], message: str
) -> None:
    path = write_json(root, ABC, change=change, categories=[dict(c) for c in CATEGORIES])
    with pytest.raises(DatasetError, match=f"{path}: .*{message}"):
        COCO(root).open("train")


def test_too_many_categories(root: Path) -> None:
    many = [{"id": i, "name": f"c{i}"} for i in range(255)]
    write_json(root, ABC, categories=many)
    with pytest.raises(DatasetError, match="255 categories, 1 to 254 fit an 8-bit mask"):
        COCO(root).open("train")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_half_written_json(root: Path, share: float) -> None:
    path = root / "annotations/instances_train2017.json"
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(DatasetError, match=f"{path}: not readable as COCO .*unpack it again"):
        COCO(root).open("train")
    path.write_text(text)
    assert COCO(root).open("train").names == ["a", "b"]


# --- the tree ----------------------------------------------------------------------------------


def test_no_annotations(tmp_path: Path) -> None:
    expected = rf"{tmp_path}/annotations: no .*instances_val\*\.json of 2014 or 2017; unpack"
    with pytest.raises(DatasetError, match=expected):
        COCO(tmp_path).open("train")


@pytest.mark.parametrize("year", [None, 2017])
@pytest.mark.parametrize("below", ["coco", "data/coco"])
def test_folder_above_the_tree_is_recognised(tmp_path: Path, below: str, year: int | None) -> None:
    write_tree(tmp_path / below, ABC)
    with pytest.raises(DatasetError, match=f"Did you mean data.root={tmp_path / below} ?"):
        COCO(tmp_path, year=year).open("train")


def test_no_image_folder(root: Path) -> None:
    shutil.rmtree(root / "train2017")
    with pytest.raises(
        DatasetError, match=r"coco/train2017: no such folder .*train2017\.zip there"
    ):
        COCO(root).open("train")


def test_images_may_lie_in_images(tmp_path: Path) -> None:
    write_tree(tmp_path, ABC, folder="images/train2017")
    data = COCO(tmp_path).open("train")
    assert data.names == ["a", "b"]
    assert data.load_image(0).shape == (*SIZE, 3)


def test_split_that_is_not_there(root: Path) -> None:
    assert COCO(root).splits() == ["train"]
    expected = r"instances_val2017\.json: no such file; splits there are: train"
    with pytest.raises(DatasetError, match=expected):
        COCO(root).open("val")


def test_years(tmp_path: Path) -> None:
    write_tree(tmp_path, {"new": ABC["a"]}, year=2017)
    assert COCO(tmp_path).year == 2017
    write_tree(tmp_path, {"old": ABC["a"]}, year=2014)
    assert COCO(tmp_path).year == 2014
    assert COCO(tmp_path).open("train").names == ["old"]
    assert COCO(tmp_path, year=2017).open("train").names == ["new"]
    assert COCO(tmp_path, year=2014).open("train").names == ["old"]
    with pytest.raises(DatasetError, match=r"year=2015: COCO has 2014 and 2017"):
        COCO(tmp_path, year=2015)


def test_year_that_is_not_there(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"no instances_train\*\.json .* of 2014; unpack"):
        COCO(root, year=2014).open("train")


def test_splits_must_have_the_same_categories(root: Path) -> None:
    write_tree(root, {"v": [thing(PERSON, BIG)]}, "val", categories=CATEGORIES[:2])
    with pytest.raises(DatasetError, match="train and val list different categories"):
        COCO(root).open("train")


def test_train_and_val(root: Path) -> None:
    write_tree(root, {"v": [thing(BRUSH, BIG)]}, "val")
    assert COCO(root).splits() == ["train", "val"]
    assert COCO(root).open("val", "evaluate").names == ["v"]
    np.testing.assert_array_equal(masks(root, "val")["v"], np.where(BIG, 3, 0))
    assert set(masks(root)) == {"a", "b"}


# --- preparing again ---------------------------------------------------------------------------


def test_second_call_changes_nothing_and_reads_no_annotations(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = COCO(root).prepare("train", decode=True)
    before = snapshot(root)
    monkeypatch.setattr(coco, "_Annotations", None)  # would fail
    second = COCO(root).prepare("train", decode=True)
    assert second == first
    assert COCO(root).open("train").names == ["a", "b"]
    assert snapshot(root) == before


@pytest.mark.parametrize("same_size", [True, False])
def test_changed_annotations_are_painted_anew(root: Path, same_size: bool) -> None:
    assert set(np.unique(masks(root)["a"])) == {0, 1, 2}
    text = (root / "annotations/instances_train2017.json").read_text()
    changed = {**ABC, "a": [thing(BRUSH, BIG)]}
    path = write_json(root, changed)
    if same_size:  # then the time alone tells
        path.write_text(text.replace('"category_id": 18', '"category_id": 90'))
        assert path.stat().st_size == len(text)
        assert set(np.unique(masks(root)["a"])) == {0, 1, 3}
    else:
        np.testing.assert_array_equal(masks(root)["a"], np.where(BIG, 3, 0))


def test_annotations_of_an_older_time_are_painted_anew(root: Path) -> None:
    """An archive unpacked again gives its files the time they had."""
    masks(root)
    path = write_json(root, {**ABC, "a": [thing(BRUSH, BIG)]})
    os.utime(path, (1e9, 1e9))
    np.testing.assert_array_equal(masks(root)["a"], np.where(BIG, 3, 0))


def test_only_missing_masks_are_painted(root: Path) -> None:
    COCO(root).prepare("train")
    folder = root / "wsss/masks_train2017"
    (folder / "a.png").unlink()
    kept = (folder / "b.png").stat().st_mtime_ns
    assert set(np.unique(masks(root)["a"])) == {0, 1, 2}
    assert (folder / "b.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize("marker", ["{", "[]", "{}"])
def test_damaged_marker_is_harmless(root: Path, marker: str) -> None:
    before = masks(root)
    (root / "wsss/masks_train2017/source.json").write_text(marker)
    (root / "wsss/masks_train2017/a.png").unlink()
    np.testing.assert_array_equal(masks(root)["a"], before["a"])


def test_interrupted_painting_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = thing(DOG, [])
    names = [f"{i:02}" for i in range(40)]
    write_tree(tmp_path, {name: [empty, thing(PERSON, BIG)] for name in names})
    painted, real = [], paint

    def stop_after_ten(*args: Any) -> Any:
        if len(painted) == 10:
            raise KeyboardInterrupt
        painted.append(args)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(coco, "paint", stop_after_ten)
        patch.setattr("wsss.data.layout._THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            COCO(tmp_path).prepare("train")
    folder = tmp_path / "wsss/masks_train2017"
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(first) == 10
    assert not list((tmp_path / "wsss").glob("coco-train*.json"))

    again: list[Any] = []
    monkeypatch.setattr(coco, "paint", lambda *args: again.append(args) or real(*args))
    manifest = COCO(tmp_path).prepare("train")
    assert len(again) == 30
    assert {name: (folder / name).stat().st_mtime_ns for name in first} == first
    assert "40 annotations without area" in "\n".join(manifest.notes)
    assert all((mask == np.where(BIG, 1, 0)).all() for mask in masks(tmp_path).values())


def test_killed_painting_resumes(root: Path) -> None:
    """Killed without a word: some masks are there, one half written, and no manifest."""
    expected = masks(root)
    folder = root / "wsss/masks_train2017"
    (folder / "b.png").rename(folder / ".b.png.0123abcd.part")
    (folder / ".b.png.0123abcd.part").write_bytes(b"\x89PNG")
    kept = (folder / "a.png").stat().st_mtime_ns
    for manifest in (root / "wsss").glob("coco-train*.json"):
        manifest.unlink()
    found = masks(root)
    for name in ("a", "b"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert (folder / "a.png").stat().st_mtime_ns == kept


def test_read_only_root(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("WSSS_CACHE", raising=False)
    (root / "wsss").touch()  # in the way; root's permissions would not stop the superuser
    root.chmod(0o555)
    try:
        before = snapshot(root)
        data = COCO(root).open("train", "train_masks")
        assert set(np.unique(data.load_mask(0))) == {0, 1, 2}
        assert snapshot(root) == before
    finally:
        root.chmod(0o755)
    (folder,) = (home / ".cache/wsss").iterdir()
    assert folder.name.startswith("coco-")
    assert (folder / "masks_train2017/a.png").is_file()
    before = snapshot(folder)
    assert COCO(root).open("train", "train_masks").names == ["a", "b"]
    assert snapshot(folder) == before


# --- the real thing ----------------------------------------------------------------------------


@pytest.fixture
def coco_mini(shared_dir: Path) -> Path:
    root = shared_dir / "data/coco_mini"
    if not root.is_dir():
        pytest.skip("coco_mini is not in the shared folder")
    return root


@pytest.mark.parametrize(("split", "number"), [("train", 80), ("val", 79)])
def test_coco_mini_against_pycocotools(coco_mini: Path, split: str, number: int) -> None:
    data = COCO(coco_mini).open(split, "train_masks")
    official = Official(coco_mini / f"annotations/instances_{split}2017.json")
    categories = sorted(official.getCatIds())
    assert (len(data), len(categories)) == (number, 80)
    assert list(data.classes) == [c["name"] for c in official.loadCats(categories)]
    images = {Path(image["file_name"]).stem: image for image in official.imgs.values()}
    crowds = 0
    for i, name in enumerate(data.names):
        image = images.pop(name)
        size = (image["height"], image["width"])
        # For every pixel the smallest area of the instances there, the last one of equal ones.
        area = np.full(size, np.inf)
        expected = np.zeros(size, np.uint8)
        crowd = np.zeros(size, bool)
        held = set()
        for annotation in official.imgToAnns[image["id"]]:
            held.add(categories.index(annotation["category_id"]))
            pixels = official.annToMask(annotation) == 1
            if annotation["iscrowd"]:
                crowd |= pixels
                crowds += 1
                continue
            number = int(pixels.sum())
            wins = pixels & (number <= area)
            area[wins] = number
            expected[wins] = categories.index(annotation["category_id"]) + 1
        expected[crowd & np.isinf(area)] = 255
        np.testing.assert_array_equal(data.load_mask(i), expected, err_msg=name)
        assert set(np.flatnonzero(data.labels[i])) == held
        assert data.load_image(i).shape == (*size, 3)
    assert not images
    assert crowds == {"train": 8, "val": 5}[split]
