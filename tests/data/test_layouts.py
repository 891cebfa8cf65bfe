"""One data set in all four layouts: every reader finds the same images, labels and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.data.snapshot import snapshot
from wsss.data import shapes
from wsss.data.acdc import ACDC
from wsss.data.coco import COCO
from wsss.data.folder import Folder
from wsss.data.images import VOID
from wsss.data.layout import Layout, Purpose, Split
from wsss.data.voc import VOC

# Three slices in a volume of ACDC and more: a volume of one would hide whose scale it has.
SMALL: dict[str, Any] = {"train": 21, "val": 7, "image_size": 48, "seed": 3}
READERS: dict[str, type[Layout]] = {"voc": VOC, "coco": COCO, "acdc": ACDC, "folder": Folder}
OTHERS = [layout for layout in READERS if layout != "voc"]
PURPOSES: list[Purpose] = ["train", "train_masks", "evaluate"]

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    for layout in READERS:
        shapes.generate(folder / layout, **SMALL, layout=layout)
    return {layout: folder / layout for layout in READERS}


def names(roots: dict[str, Path], data: Split) -> list[str]:
    """Image names, those of ACDC's slices looked up."""
    if data.names[0] in (known := json.loads((roots["acdc"] / "slices.json").read_text())):
        return [known[name] for name in data.names]
    return data.names


def luma(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return image @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("layout", READERS)
def test_each_is_read_by_its_reader(roots: dict[str, Path], layout: str) -> None:
    found = shapes.open_tree(roots[layout])
    assert type(found) is READERS[layout]
    assert found.kind == layout
    assert {"train", "val"} <= set(found.splits())
    assert found.classes == shapes.CLASSES


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", OTHERS)
def test_same_items(roots: dict[str, Path], layout: str, split: str, purpose: Purpose) -> None:
    expected = VOC(roots["voc"]).open(split, purpose)
    found = READERS[layout](roots[layout]).open(split, purpose)
    assert len(found) == len(expected) == SMALL[split]
    assert names(roots, found) == expected.names
    assert found.classes == expected.classes
    assert found.sizes == expected.sizes == [(48, 48)] * SMALL[split]
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.has_masks
    assert expected.has_masks
    assert found.left_out == expected.left_out == 0
    assert all(bool(group) == (layout == "acdc") for group in found.groups)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", OTHERS)
def test_same_masks(roots: dict[str, Path], layout: str, split: str) -> None:
    expected = VOC(roots["voc"]).open(split)
    found = READERS[layout](roots[layout]).open(split)
    void = 0
    for i, name in enumerate(expected.names):
        mask = expected.load_mask(i)
        void += int((mask == VOID).sum())
        if layout == "acdc":  # has no void: outlines are background
            mask = np.where(mask == VOID, 0, mask)
        np.testing.assert_array_equal(found.load_mask(i), mask, err_msg=name)
    assert void


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", ["coco", "folder"])
def test_same_pixels(roots: dict[str, Path], layout: str, split: str) -> None:
    expected = VOC(roots["voc"]).open(split)
    found = READERS[layout](roots[layout]).open(split)
    for i, name in enumerate(expected.names):
        image = found.load_image(i)
        np.testing.assert_array_equal(image, expected.load_image(i), err_msg=name)


@pytest.mark.parametrize("percentiles", [(0.5, 99.5), (0, 100)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_acdc_is_the_luma_scaled_by_volume(
    roots: dict[str, Path], split: str, percentiles: tuple[float, float]
) -> None:
    """Grey = clip(a luma + b) with one a > 0 and b for a volume.

    Both luma and grey value are rounded, by half at most each: the line through a volume misses a
    grey value by (a + 1) / 2 and no more. Clipped values, 0 and 255, say nothing of the line.
    """
    expected = VOC(roots["voc"]).open(split)
    found = ACDC(roots["acdc"], percentiles).open(split)
    volumes: dict[str, list[int]] = {}
    for i, name in enumerate(found.names):
        volumes.setdefault(name.rsplit("_slice_", 1)[0], []).append(i)
    assert min(len(members) for members in volumes.values()) >= 3
    for volume, members in volumes.items():
        # PIL's own luma of the JPEG is what was written; this one is within half of it.
        light = np.stack([luma(expected.load_image(i)) for i in members]).ravel()
        images = [found.load_image(i) for i in members]
        assert all((image == image[..., :1]).all() for image in images)
        grey = np.stack([image[..., 0] for image in images]).ravel().astype(np.float64)
        inner = (grey > 0) & (grey < 255)
        assert inner.mean() > 0.9, volume
        slope, offset = np.polyfit(light[inner], grey[inner], 1)
        assert slope > 0
        line = np.clip(slope * light + offset, 0, 255)
        assert np.abs(line - grey).max() <= (slope + 1) / 2 + 0.1, volume  # 0.1: of the fit
        # The whole range is used: the volume's extremes, no others, are black and white.
        clipped = 2 * percentiles[0] / 100
        assert (grey == 0).mean() + (grey == 255).mean() < clipped + 0.03
        assert grey.min() == 0
        assert grey.max() == 255


def test_second_opening_writes_nothing(roots: dict[str, Path]) -> None:
    for layout, root in roots.items():
        for split in ("train", "val"):
            READERS[layout](root).prepare(split, decode=True)
        before = snapshot(root)
        for split in ("train", "val"):
            READERS[layout](root).open(split, "train_masks")
            READERS[layout](root).prepare(split, decode=True)
        assert snapshot(root) == before, layout
