"""The generated data set ``shapes``: its files, its statistics, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.data import shapes
from wsss.data.images import VOID
from wsss.data.shapes import difficulty, voc_tree
from wsss.data.shapes import tree as tree_module

SMALL: dict[str, Any] = {"train": 12, "val": 6, "image_size": 64, "seed": 3}


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "tree"
    shapes.generate(root, **SMALL)
    return root


@pytest.fixture(scope="module")
def samples() -> list[shapes.Sample]:
    return [shapes.render(number, 64, seed=1) for number in range(250)]


@pytest.fixture(scope="module")
def many() -> list[shapes.Sample]:
    return [shapes.render(number, 32, seed=1) for number in range(800)]


def names_of(sample: shapes.Sample) -> set[str]:
    return {thing.name for thing in sample.objects}


def classes_in(mask: np.ndarray) -> set[str]:
    return {shapes.CLASSES[value - 1] for value in np.unique(mask) if 0 < value < VOID}


# --- the tree --------------------------------------------------------------------------------


def test_tree_has_the_voc_layout(tree: Path) -> None:
    lists = {s: (tree / f"ImageSets/Segmentation/{s}.txt").read_text() for s in ("train", "val")}
    train, val = lists["train"].split(), lists["val"].split()
    assert lists["train"].endswith("\n")
    assert (len(train), len(val)) == (12, 6)
    assert train[0] == "shapes_000001"
    assert not set(train) & set(val)
    for folder, suffix in (
        ("JPEGImages", ".jpg"),
        ("SegmentationClass", ".png"),
        ("Annotations", ".xml"),
    ):
        assert {p.name for p in (tree / folder).iterdir()} == {n + suffix for n in train + val}
    assert tuple((tree / "classes.txt").read_text().split()) == shapes.CLASSES
    assert shapes.class_names() == shapes.CLASSES
    assert len(set(shapes.CLASSES)) >= 8
    assert set(shapes.COEXISTENCE_CLASSES) <= set(shapes.CLASSES)


def test_masks_are_palette_pngs_and_agree_with_the_annotations(tree: Path) -> None:
    for path in sorted((tree / "SegmentationClass").iterdir()):
        with Image.open(path) as png, Image.open(tree / "JPEGImages" / f"{path.stem}.jpg") as jpg:
            assert png.mode == "P"
            assert jpg.mode == "RGB"
            assert png.size == jpg.size == (64, 64)
            palette = png.getpalette()
            mask = np.asarray(png)
        assert palette is not None
        # black, maroon, green, olive ... and cream for void: PASCAL VOC's own colours
        assert palette[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert palette[-3:] == [224, 224, 192]
        assert set(np.unique(mask)) <= {*range(len(shapes.CLASSES) + 1), VOID}
        annotation = ET.parse(tree / "Annotations" / f"{path.stem}.xml").getroot()
        assert annotation.findtext("filename") == f"{path.stem}.jpg"
        assert annotation.findtext("size/width") == "64"
        things = annotation.findall("object")
        assert {thing.findtext("name") for thing in things} == classes_in(mask)
        for thing in things:
            x0, y0, x1, y1 = (
                int(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")
            )
            assert 1 <= x0 <= x1 <= 64
            assert 1 <= y0 <= y1 <= 64
            value = shapes.CLASSES.index(thing.findtext("name", "")) + 1
            assert (mask[y0 - 1 : y1, x0 - 1 : x1] == value).any()


def test_files_hold_what_render_draws(tree: Path) -> None:
    sample = shapes.render(5, 64, seed=3)
    with Image.open(tree / "SegmentationClass/shapes_000005.png") as png:
        np.testing.assert_array_equal(np.asarray(png), sample.mask)
    with Image.open(tree / "JPEGImages/shapes_000005.jpg") as jpg:
        error = np.abs(np.asarray(jpg, np.float64) - sample.image)
    assert error.mean() < 5


def test_same_seed_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    shapes.generate(tmp_path / "again", **SMALL)
    assert digest(tmp_path / "again") == digest(tree)


def test_images_do_not_depend_on_counts_but_on_the_seed(tree: Path, tmp_path: Path) -> None:
    shapes.generate(tmp_path / "fewer", train=2, val=3, image_size=64, seed=3)
    whole, fewer = digest(tree), digest(tmp_path / "fewer")
    images = {name for name in fewer if name.startswith(("JPEG", "Seg", "Ann"))}
    assert len(images) == 15
    assert all(fewer[name] == whole[name] for name in images)
    other = shapes.render(1, 64, seed=4)
    assert not np.array_equal(other.image, shapes.render(1, 64, seed=3).image)


def test_second_call_does_nothing(tree: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    shapes.generate(tree, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"train": 13}, {"image_size": 96}, {"seed": 4}])
def test_refuses_a_root_with_other_parameters(tree: Path, change: dict[str, int]) -> None:
    before = digest(tree)
    key, value = next(iter(change.items()))
    with pytest.raises(
        FileExistsError, match=rf"{key}: {SMALL[key]} there, {value} asked .*remove"
    ):
        shapes.generate(tree, **{**SMALL, **change})
    assert digest(tree) == before


def test_refuses_a_root_drawn_with_other_constants(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(difficulty, "COEXISTENCE", 0.5)
    with pytest.raises(FileExistsError, match=r"coexistence: [\d.]+ there, 0.5 asked for"):
        shapes.generate(tree, **SMALL)


def test_refuses_a_root_with_files_missing(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shapes.generate(root, train=2, val=1, image_size=32)
    (root / "Annotations" / "shapes_000002.xml").unlink()
    with pytest.raises(
        FileExistsError, match=r"lacks 1 of 12 files, such as Annot.*02\.xml; remove"
    ):
        shapes.generate(root, train=2, val=1, image_size=32)


def test_refuses_a_foreign_folder_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no shapes\.json"):
        shapes.generate(tmp_path, train=1, val=1, image_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="cannot be read"):
        shapes.generate(tmp_path / "thesis.txt", train=1, val=1, image_size=32)
    (tmp_path / "shapes.json").write_text("{broken")
    with pytest.raises(FileExistsError, match="cannot be read"):
        shapes.generate(tmp_path, train=1, val=1, image_size=32)
    (tmp_path / "shapes.json").write_text(json.dumps([1]))
    with pytest.raises(FileExistsError, match="other parameters"):
        shapes.generate(tmp_path, train=1, val=1, image_size=32)


def test_an_empty_root_is_filled(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    shapes.generate(root, train=1, val=1, image_size=32)
    assert (root / "shapes.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    draw = shapes.render

    def interrupted(number: int, image_size: int, seed: int) -> shapes.Sample:
        if number == 4:
            raise error
        return draw(number, image_size, seed)

    monkeypatch.setattr(tree_module, "render", interrupted)
    with pytest.raises(error):
        shapes.generate(tmp_path / "deep" / "tree", train=6, val=1, image_size=32)
    assert list((tmp_path / "deep").iterdir()) == []
    monkeypatch.undo()
    shapes.generate(tmp_path / "deep" / "tree", train=6, val=1, image_size=32)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tree"]


def test_another_process_finishing_first_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, write = tmp_path / "tree", voc_tree.write
    arguments: dict[str, Any] = {"train": 2, "val": 1, "image_size": 32}

    def raced(partial: Path, *rest: Any) -> None:
        monkeypatch.setattr(voc_tree, "write", write)
        shapes.generate(root, **arguments)
        write(partial, *rest)

    monkeypatch.setattr(voc_tree, "write", raced)
    shapes.generate(root, **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "png"}, "layout='png' is unknown; valid values: voc, coco, acdc, folder"),
        ({"train": 0}, "train=0 .*at least 1"),
        ({"train": 600_000}, "train=600000 .*at most 500000"),
        ({"val": 0}, "val=0 .*at least 1"),
        ({"image_size": 16}, "image_size=16 .*at least 32"),
        ({"seed": -1}, "seed=-1 .*at least 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.generate(tmp_path / "tree", **{**SMALL, **change})
    assert not list(tmp_path.iterdir())


# --- the images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96, 128])
def test_image_sizes(size: int) -> None:
    for number in range(6):
        sample = shapes.render(number, size, seed=2)
        assert sample.image.shape == (size, size, 3)
        assert sample.image.dtype == np.uint8
        assert sample.mask.shape == (size, size)
        assert sample.mask.dtype == np.uint8
        assert classes_in(sample.mask) == names_of(sample)
        assert 0.02 < sample.image.std() / 255 < 0.5


def test_every_labelled_object_can_be_seen(samples: list[shapes.Sample]) -> None:
    for sample in samples:
        assert 1 <= len(sample.objects) <= 3
        assert classes_in(sample.mask) == names_of(sample)
        for thing in sample.objects:
            value = shapes.CLASSES.index(thing.name) + 1
            x0, y0, x1, y1 = thing.box
            inside = (sample.mask == value)[y0 : y1 + 1, x0 : x1 + 1]
            assert inside.mean() * inside.size / sample.mask.size >= difficulty.MIN_VISIBLE_AREA
            assert thing.area >= difficulty.MIN_VISIBLE_AREA


def test_void_is_a_thin_border(samples: list[shapes.Sample]) -> None:
    share = np.mean([(sample.mask == VOID).mean() for sample in samples])
    assert 0 < share < 0.06
    for sample in samples[:50]:
        void = sample.mask == VOID
        solid = void[:-2, 1:-1] & void[2:, 1:-1] & void[1:-1, :-2] & void[1:-1, 2:]
        assert (solid & void[1:-1, 1:-1]).mean() < 0.01


def test_classes_are_balanced(samples: list[shapes.Sample]) -> None:
    counts = {name: sum(name in names_of(s) for s in samples) for name in shapes.CLASSES}
    assert min(counts.values()) > 0.6 * np.mean(list(counts.values())), counts
    assert max(counts.values()) < 1.4 * np.mean(list(counts.values())), counts


def test_sizes_vary_and_objects_overlap(samples: list[shapes.Sample]) -> None:
    areas = [thing.area for sample in samples for thing in sample.objects]
    assert np.quantile(areas, 0.95) > 3 * np.quantile(areas, 0.05)
    assert {len(sample.objects) for sample in samples} == {1, 2, 3}


def test_discriminative_parts_are_small(samples: list[shapes.Sample]) -> None:
    things = [t for s in samples for t in s.objects]
    fractions = [t.part_fraction for t in things if t.name in shapes.BEASTS]
    low, high = difficulty.PART_FRACTION
    assert low < np.median(fractions) < high
    assert np.quantile(fractions, 0.9) < 0.3  # occlusion of the body raises the fraction
    assert {t.part_fraction for t in things if t.name not in shapes.BEASTS} == {0.0}


def test_toys_share_their_white(many: list[shapes.Sample]) -> None:
    """About half of every toy is white, the rest is not."""
    for name in shapes.TOYS:
        white = []
        for sample in many:
            if names_of(sample) == {name}:
                value = shapes.CLASSES.index(name) + 1
                pixels = sample.image[sample.mask == value].astype(float)
                white.append((np.ptp(pixels, axis=1) < 60).mean())
        assert 0.3 < np.mean(white) < 0.7, name


@pytest.mark.parametrize(("name", "context"), [("boat", "water"), ("train", "rails")])
def test_coexistence(many: list[shapes.Sample], name: str, context: str) -> None:
    with_class = [context in s.contexts for s in many if name in names_of(s)]
    without = [context in s.contexts for s in many if name not in names_of(s)]
    # About 140 images: four standard deviations of a share.
    spread = 4 * (difficulty.COEXISTENCE * (1 - difficulty.COEXISTENCE) / len(with_class)) ** 0.5
    assert abs(np.mean(with_class) - difficulty.COEXISTENCE) < spread
    assert 0 < np.mean(without) < 2 * difficulty.CONTEXT_ALONE


def test_context_is_background_next_to_the_object(samples: list[shapes.Sample]) -> None:
    """Under a boat the image is blue and the mask is 0."""
    excess = []
    for sample in samples:
        if names_of(sample) != {"boat"} or "water" not in sample.contexts:
            continue
        bottom = max(thing.box[3] for thing in sample.objects)
        row = min(bottom + 2, 63)
        background = sample.mask[row] == 0
        assert background.mean() > 0.5
        red, _, blue = sample.image[row][background].astype(float).mean(0)
        excess.append(blue - red)
    # Most of them: a boat at the lower edge of its band has other ground two pixels below.
    assert len(excess) >= 3
    assert np.median(excess) > 40


def test_lizards_resemble_foliage(samples: list[shapes.Sample]) -> None:
    """Mean colours: a lizard is nearer to the foliage behind it than any other class."""
    distances: dict[str, list[float]] = {name: [] for name in shapes.CLASSES}
    for sample in samples:
        if sample.background != "foliage" or sample.contexts:
            continue
        behind = sample.image[sample.mask == 0].astype(float).mean(0)
        for name in names_of(sample):
            own = sample.image[sample.mask == shapes.CLASSES.index(name) + 1].astype(float).mean(0)
            distances[name].append(float(np.linalg.norm(own - behind)))
    means = {name: np.mean(values) for name, values in distances.items() if values}
    assert min(means, key=lambda name: means[name]) == "lizard"


def test_knobs_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty, "COEXISTENCE", 0.0)
    monkeypatch.setattr(difficulty, "CONTEXT_ALONE", 0.0)
    monkeypatch.setattr(difficulty, "PART_FRACTION", (0.3, 0.3))
    monkeypatch.setattr(difficulty, "VOID_BORDER", False)
    drawn = [shapes.render(number, 32, seed=1) for number in range(60)]
    assert not any(sample.contexts for sample in drawn)
    assert not any((sample.mask == VOID).any() for sample in drawn)
    fractions = [t.part_fraction for s in drawn for t in s.objects if t.part_fraction]
    assert np.median(fractions) > 0.25


def test_impossible_placement_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty, "MIN_VISIBLE_AREA", 0.9)
    with pytest.raises(RuntimeError, match=r"no visible placement .* lower MIN_VISIBLE_AREA"):
        shapes.render(1, 32)
