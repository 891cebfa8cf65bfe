"""The layouts of ``shapes``, each read back without this library's readers."""

from __future__ import annotations

import csv
import hashlib
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from wsss.data import shapes
from wsss.data.shapes import acdc_tree, tree
from wsss.data.shapes.files import image_numbers

SMALL: dict[str, Any] = {"train": 9, "val": 3, "image_size": 48, "seed": 5}
LAYOUTS = tuple(tree.LAYOUTS)
VOID = 255

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same data set in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        shapes.generate(folder / layout, **SMALL, layout=layout)
    return {layout: folder / layout for layout in LAYOUTS}


def digest(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def listed(voc: Path, split: str) -> list[str]:
    return (voc / f"ImageSets/Segmentation/{split}.txt").read_text().split()


def voc_mask(voc: Path, name: str) -> np.ndarray:
    with Image.open(voc / f"SegmentationClass/{name}.png") as png:
        return np.asarray(png)


def voc_labels(voc: Path, name: str) -> set[str]:
    objects = ET.parse(voc / f"Annotations/{name}.xml").getroot().iterfind("object")
    return {thing.findtext("name", "") for thing in objects}


# --- every layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_promised(roots: dict[str, Path], layout: str) -> None:
    promised = list(tree.LAYOUTS[layout].files(image_numbers(SMALL["train"], SMALL["val"])))
    assert len(promised) == len(set(promised))
    assert {*promised, "shapes.json"} == set(digest(roots[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_seed_gives_the_same_bytes(
    roots: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    shapes.generate(tmp_path / "again", **SMALL, layout=layout)
    assert digest(tmp_path / "again") == digest(roots[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_call_does_nothing(roots: dict[str, Path], layout: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in roots[layout].rglob("*")}
    shapes.generate(roots[layout], **SMALL, layout=layout)
    assert {path: path.stat().st_mtime_ns for path in roots[layout].rglob("*")} == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refuses_other_parameters(roots: dict[str, Path], layout: str) -> None:
    with pytest.raises(FileExistsError, match="val: 3 there, 2 asked for"):
        shapes.generate(roots[layout], **{**SMALL, "val": 2}, layout=layout)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    with pytest.raises(FileExistsError, match=f"layout: '{layout}' there, '{other}' asked for"):
        shapes.generate(roots[layout], **SMALL, layout=other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_missing_file_is_noticed(roots: dict[str, Path], tmp_path: Path, layout: str) -> None:
    names = sorted(set(digest(roots[layout])) - {"shapes.json"})
    for name in names:
        away = tmp_path / "away"
        (roots[layout] / name).rename(away)
        try:
            with pytest.raises(FileExistsError, match=f"lacks 1 of {len(names)} files, .* {name};"):
                shapes.generate(roots[layout], **SMALL, layout=layout)
        finally:
            away.rename(roots[layout] / name)
    shapes.generate(roots[layout], **SMALL, layout=layout)


# --- coco --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_is_the_voc_tree(roots: dict[str, Path], split: str) -> None:
    voc, root = roots["voc"], roots["coco"]
    coco = COCO(root / f"annotations/instances_{split}2017.json")
    assert set(coco.dataset) == {"info", "licenses", "images", "annotations", "categories"}
    categories = coco.dataset["categories"]
    assert [category["name"] for category in categories] == list(shapes.CLASSES)
    ids = [category["id"] for category in categories]
    assert ids == sorted(set(ids))
    assert ids[-1] > len(ids)  # with gaps
    names = {image["id"]: Path(image["file_name"]).stem for image in coco.dataset["images"]}
    assert list(names.values()) == listed(voc, split)
    for number, name in names.items():
        assert name == f"shapes_{number:06d}"
        image = root / f"{split}2017" / f"{name}.jpg"
        assert image.read_bytes() == (voc / f"JPEGImages/{name}.jpg").read_bytes()
        assert (coco.imgs[number]["height"], coco.imgs[number]["width"]) == (48, 48)
        annotations = coco.imgToAnns[number]
        painted, layers = np.zeros((48, 48), np.uint8), np.zeros((48, 48), np.uint8)
        for annotation in annotations:
            pixels = coco.annToMask(annotation)
            value = VOID if annotation["iscrowd"] else ids.index(annotation["category_id"]) + 1
            painted[pixels == 1] = value
            layers += pixels
        np.testing.assert_array_equal(painted, voc_mask(voc, name))
        assert layers.max() == 1
        for crowd, expected in ((0, voc_labels(voc, name)), (1, set())):
            labels = {
                shapes.CLASSES[ids.index(annotation["category_id"])]
                for annotation in annotations
                if annotation["iscrowd"] == crowd
            }
            assert expected <= labels <= voc_labels(voc, name)


def test_coco_annotations_are_consistent(roots: dict[str, Path]) -> None:
    """Area and box are those of the pixels; ids are unique over both splits."""
    ids = []
    for split in ("train", "val"):
        coco = COCO(roots["coco"] / f"annotations/instances_{split}2017.json")
        for annotation in coco.dataset["annotations"]:
            assert isinstance(annotation["segmentation"]["counts"], list)
            assert sum(annotation["segmentation"]["counts"]) == 48 * 48
            encoded = coco.annToRLE(annotation)
            assert annotation["area"] == rle.area(encoded) > 0
            assert annotation["bbox"] == rle.toBbox(encoded).tolist()
            ids.append(annotation["id"])
        assert any(annotation["iscrowd"] for annotation in coco.dataset["annotations"])
    assert len(set(ids)) == len(ids)


# --- folder ------------------------------------------------------------------------------------


def test_folder_is_the_voc_tree(roots: dict[str, Path]) -> None:
    voc, root = roots["voc"], roots["folder"]
    files = digest(voc)
    images = {name.split("/")[1]: h for name, h in files.items() if name.startswith("JPEGImages/")}
    masks = {name.split("/")[1]: h for name, h in files.items() if name.startswith("Segmentation")}
    assert len(images) == len(masks) == 12
    assert digest(root / "images") == images
    assert digest(root / "masks") == masks
    assert (root / "classes.txt").read_bytes() == (voc / "classes.txt").read_bytes()
    with (root / "labels.csv").open(newline="") as file:
        table = csv.DictReader(file)
        assert table.fieldnames == ["image", "labels", "split"]
        rows = list(table)
    for split in ("train", "val"):
        of_split = [row["image"] for row in rows if row["split"] == split]
        assert of_split == [f"{name}.jpg" for name in listed(voc, split)]
    assert len(rows) == 12
    for row in rows:
        labels = row["labels"].split(";")
        assert len(set(labels)) == len(labels)
        assert set(labels) == voc_labels(voc, Path(row["image"]).stem)
    assert any(";" in row["labels"] for row in rows)


# --- acdc --------------------------------------------------------------------------------------


def read_volume(path: Path) -> tuple[np.ndarray, Any]:
    image = nibabel.load(path)
    return np.asanyarray(image.dataobj), image


def test_acdc_slices_are_the_voc_images(roots: dict[str, Path]) -> None:
    voc, root = roots["voc"], roots["acdc"]
    names = json.loads((root / "slices.json").read_text())
    assert (root / "classes.txt").read_bytes() == (voc / "classes.txt").read_bytes()
    seen: dict[str, list[str]] = {"train": [], "val": []}
    factors = []
    patients = sorted((root / "training").iterdir())
    assert [p.name for p in patients] == [f"patient{k + 1:03d}" for k in range(len(patients))]
    for index, patient in enumerate(patients):
        info = dict(line.split(": ") for line in (patient / "Info.cfg").read_text().splitlines())
        assert list(info) == ["ED", "ES", "Group", "Height", "NbFrame", "Weight"]
        for frame in (int(info["ED"]), int(info["ES"])):
            stem = f"{patient.name}_frame{frame:02d}"
            volume, image = read_volume(patient / f"{stem}.nii.gz")
            gt, gt_image = read_volume(patient / f"{stem}_gt.nii.gz")
            assert (volume.dtype, gt.dtype) == (np.int16, np.uint8)
            assert volume.shape == gt.shape
            assert volume.shape[:2] == (48, 48)
            assert 1 <= volume.shape[2] <= 10
            for header in (image.header, gt_image.header):
                assert header.get_zooms() == (1.5, 1.5, 10.0)
                assert header.get_xyzt_units()[0] == "mm"
            assert volume.min() < volume.max()
            lumas = []
            for z in range(volume.shape[2]):
                name = names.pop(f"{stem}_slice_{z}")
                seen["val" if index % 4 == 3 else "train"].append(name)
                with Image.open(voc / f"JPEGImages/{name}.jpg") as jpg:
                    lumas.append(np.asarray(jpg.convert("L")))
                mask = voc_mask(voc, name)
                np.testing.assert_array_equal(gt[:, :, z].T, np.where(mask == VOID, 0, mask))
            luma = np.stack(lumas)
            factor = volume.max() // luma.max()
            np.testing.assert_array_equal(volume.transpose(2, 1, 0), luma.astype(int) * factor)
            factors.append(factor)
    assert names == {}  # nothing named that is not there
    assert set(factors) == {1, 2, 3}
    for split, found in seen.items():
        assert found == listed(voc, split)


@pytest.mark.parametrize(
    ("train", "val", "patients"),
    [(6, 2, 4), (9, 3, 4), (60, 20, 4), (61, 20, 5), (60, 21, 8), (8, 4, 4), (1200, 200, 79)],
)
def test_acdc_deals_images_evenly(train: int, val: int, patients: int) -> None:
    numbers = image_numbers(train, val)
    dealt = acdc_tree._patients(numbers)
    assert len(dealt) == patients
    by_split: dict[str, list[list[int]]] = {"train": [], "val": []}
    for index, volumes in enumerate(dealt.values()):
        assert len(volumes) == 2
        by_split["val" if index % 4 == 3 else "train"] += volumes.values()
    for split, stacks in by_split.items():
        assert sum(stacks, []) == list(numbers[split])  # noqa: RUF017
        counts = [len(stack) for stack in stacks]
        assert 1 <= min(counts) <= max(counts) <= 10
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("train", "val", "need_train", "need_val"),
    [(5, 2, 6, 2), (6, 1, 6, 2), (1, 1, 6, 2), (6, 200, 60, 20), (1200, 10, 120, 38)],
)
def test_acdc_refuses_counts_that_leave_a_volume_empty(
    tmp_path: Path, train: int, val: int, need_train: int, need_val: int
) -> None:
    message = f"train={train} and val={val} .* at least {need_train} and val at least {need_val},"
    with pytest.raises(ValueError, match=message):
        shapes.generate(tmp_path / "tree", train, val, image_size=32, layout="acdc")
    assert not list(tmp_path.iterdir())
    acdc_tree._patients(image_numbers(max(train, need_train), max(val, need_val)))  # as advised
