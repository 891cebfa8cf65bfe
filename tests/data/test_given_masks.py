"""Masks of a folder in place of the data set's own."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.data.datamodule import WSSSDataModule
from wsss.data.given_masks import GivenMasks
from wsss.data.images import DatasetError, encode_mask, read_mask
from wsss.data.views import TwoViews
from wsss.data.voc import VOC
from wsss.errors import UserError


@pytest.fixture
def masks(shapes_root: Path, tmp_path: Path) -> Path:
    """The training masks with a stripe of another class: pseudo-labels."""
    folder = tmp_path / "labels" / "cpl"
    folder.mkdir(parents=True)
    for name in VOC(shapes_root).open("train").names:
        mask = read_mask(shapes_root / "SegmentationClass" / f"{name}.png", 10)
        mask[:4] = 3
        mask[4:6] = 255
        (folder / f"{name}.png").write_bytes(encode_mask(mask))
    return folder


def given(root: Path, folder: Path, **kwargs: Any) -> GivenMasks:
    return GivenMasks(VOC(root).open("train"), folder, **kwargs)


def record(folder: Path, classes: list[str], kind: str = "cpl") -> None:
    content = {"settings": {"all": {"classes": classes}, kind: {}}, "checkpoint": "/runs/a.ckpt"}
    (folder.parent / "pseudo_labels.json").write_text(json.dumps(content))


def test_images_and_labels_are_the_splits_and_masks_the_folders(
    shapes_root: Path, masks: Path
) -> None:
    own, found = VOC(shapes_root).open("train"), given(shapes_root, masks)
    assert (found.names, found.classes, found.groups) == (own.names, own.classes, own.groups)
    assert len(found) == len(own) == 24
    np.testing.assert_array_equal(found.labels, own.labels)
    for i in (0, 23):
        np.testing.assert_array_equal(found.load_image(i), own.load_image(i))
        assert (found.load_mask(i)[:4] == 3).all()
        assert (found.load_mask(i)[4:6] == 255).all()
        np.testing.assert_array_equal(found.load_mask(i)[6:], own.load_mask(i)[6:])
    assert found.about == f"24 pseudo-labels of {masks}"


def test_the_record_says_where_they_come_from(shapes_root: Path, masks: Path) -> None:
    record(masks, list(VOC(shapes_root).classes))
    assert given(shapes_root, masks).about.endswith("made by /runs/a.ckpt")


def test_masks_of_other_classes(shapes_root: Path, masks: Path) -> None:
    record(masks, ["fox", "cow"])
    with pytest.raises(DatasetError, match=r"other classes \(2: fox, cow"):
        given(shapes_root, masks)


@pytest.mark.parametrize("recorded", [False, True])
def test_missing_and_broken_masks(shapes_root: Path, masks: Path, recorded: bool) -> None:
    if recorded:
        record(masks, list(VOC(shapes_root).classes))
    names = VOC(shapes_root).open("train").names
    (masks / f"{names[2]}.png").unlink()
    Image.new("L", (10, 12)).save(masks / f"{names[5]}.png")
    with pytest.raises(DatasetError, match=r"2 of 24 images(.|\n)*no such mask(.|\n)*10x12"):
        given(shapes_root, masks)
    with pytest.warns(UserWarning, match="left out 2 of 24"):
        found = given(shapes_root, masks, on_error="skip")
    assert found.names == [n for i, n in enumerate(names) if i not in (2, 5)]
    assert len(found.labels) == len(found.groups) == len(found) == 22
    own = VOC(shapes_root).open("train")
    np.testing.assert_array_equal(found.load_mask(3)[6:], own.load_mask(4)[6:])
    np.testing.assert_array_equal(found.load_image(3), own.load_image(4))
    np.testing.assert_array_equal(found.labels[3], own.labels[4])
    assert found.about.startswith("22 ")


def test_every_value_of_masks_that_nothing_is_recorded_of(shapes_root: Path, masks: Path) -> None:
    name = VOC(shapes_root).open("train").names[7]
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(masks / f"{name}.png")
    with pytest.raises(DatasetError, match="holds the values 77"):
        given(shapes_root, masks)


def test_no_folder_or_the_one_above(shapes_root: Path, masks: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        given(shapes_root, masks / "x")
    with pytest.raises(DatasetError, match=f"Did you mean data.masks={masks}"):
        given(shapes_root, masks.parent)
    for path in masks.iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="24 of 24"):
        given(shapes_root, masks, on_error="skip")


def test_ground_truth_under_another_name(shapes_root: Path, tmp_path: Path) -> None:
    copies = tmp_path / "mine"
    shutil.copytree(shapes_root / "SegmentationClass", copies)
    names = VOC(shapes_root).open("train").names
    truth = shapes_root / "SegmentationClass"
    for folder in (copies, truth):
        with pytest.raises(DatasetError, match="the data set's own masks"):
            given(shapes_root, folder)
    found = given(shapes_root, truth, allow_truth=True)
    assert found.about.startswith("ground truth")
    # Neither a few other pixels nor wider borders make pseudo-labels of them.
    for name in names:
        mask = read_mask(copies / f"{name}.png", 10)
        mask[0, 0] = 1 - min(int(mask[0, 0]), 1)
        inside = mask != 0
        mask[1:][inside[1:] != inside[:-1]] = 255
        (copies / f"{name}.png").write_bytes(encode_mask(mask))
    with pytest.raises(DatasetError, match=r"own masks \(the same on 9.* of 24 masks that were co"):
        given(shapes_root, copies)
    for name in names[:4]:  # of every sixth image somebody has drawn the objects otherwise
        mask = read_mask(copies / f"{name}.png", 10)
        mask[mask != 255] = 3
        (copies / f"{name}.png").write_bytes(encode_mask(mask))
    assert given(shapes_root, copies).about.startswith("24 pseudo-labels")


def without_truth(root: Path, target: Path, missing: list[str], broken: list[str]) -> Path:
    """The data set with masks lost and cut off, the image labels in its XML."""
    shutil.copytree(root, target, ignore=shutil.ignore_patterns("wsss"))
    for name in missing:
        (target / f"SegmentationClass/{name}.png").unlink()
    for name in broken:
        path = target / f"SegmentationClass/{name}.png"
        path.write_bytes(path.read_bytes()[:60])
    return target


def test_ground_truth_where_some_of_it_is_missing_or_broken(
    shapes_root: Path, masks: Path, tmp_path: Path
) -> None:
    names = VOC(shapes_root).open("train").names
    record(masks, list(VOC(shapes_root).classes))
    for i, (missing, broken) in enumerate([(names[:1], []), ([], names[-2:]), (names[3:], [])]):
        root = without_truth(shapes_root, tmp_path / str(i), missing, broken)
        split = VOC(root).open("train", "train")
        compared = 24 - len(missing) - len(broken)
        with pytest.raises(DatasetError, match=f"of {compared} masks that were compared"):
            GivenMasks(split, shapes_root / "SegmentationClass")
        # Of one's own masks nothing is trained on, and nothing of them stands in the way.
        assert len(GivenMasks(split, masks)) == 24


def test_images_of_background_say_nothing(shapes_root: Path, tmp_path: Path) -> None:
    """Nearly all pixels of small objects agree, whatever the masks are worth."""
    root = without_truth(shapes_root, tmp_path / "small", [], [])
    folder = tmp_path / "labels"
    folder.mkdir()
    for name in VOC(shapes_root).open("train").names:
        mask = np.zeros((64, 64), np.uint8)
        (folder / f"{name}.png").write_bytes(encode_mask(mask))
        mask[5, 5] = 1
        (root / f"SegmentationClass/{name}.png").write_bytes(encode_mask(mask))
    assert given(root, folder).about.startswith("24 pseudo-labels")


def module(root: Path, **kwargs: Any) -> WSSSDataModule:
    view = TwoViews(crop_size=32)
    return WSSSDataModule(
        partial(VOC), str(root), view, train_split="train", num_workers=0, **kwargs
    )


def test_data_module_trains_on_them_and_scores_the_truth(shapes_root: Path, masks: Path) -> None:
    data = module(shapes_root, load_masks=True, masks=str(masks))
    data.setup("fit")
    assert isinstance(data.train_images, GivenMasks)
    assert data.about_masks == f"24 pseudo-labels of {masks}"
    assert data.val_images is not None
    assert data.val_images.has_masks
    assert not isinstance(data.val_images, GivenMasks)
    truth = module(shapes_root, load_masks=True)
    truth.setup("fit")
    assert truth.about_masks == "ground truth of split 'train' (full supervision)"
    neither = module(shapes_root)
    neither.setup("fit")
    assert neither.about_masks is None


def test_data_without_masks_of_its_own(shapes_root: Path, masks: Path, tmp_path: Path) -> None:
    """The usual case of a second stage: nothing to train on but the pseudo-labels."""
    root = tmp_path / "bare"
    shutil.copytree(shapes_root, root, ignore=shutil.ignore_patterns("SegmentationClass", "wsss"))
    data = module(root, load_masks=True, masks=str(masks))
    data.setup("fit")
    assert len(data.train_images or []) == 24
    with pytest.raises(DatasetError, match="no such mask"):
        module(root, load_masks=True).setup("fit")


def test_a_method_that_looks_at_no_masks(shapes_root: Path, masks: Path) -> None:
    with pytest.raises(UserError, match="method=supervised"):
        module(shapes_root, masks=str(masks)).setup("fit")
    module(shapes_root, masks=str(masks)).setup("validate")
