"""What the masks hold, against counting by hand and pixel by pixel."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from tests.oracle.metrics import mean, segmentation_scores
from wsss.data.images import encode_mask
from wsss.data.layout import Split
from wsss.data.manifest import Item, Manifest
from wsss.errors import UserError
from wsss.labelling.folder import LabelFolder
from wsss.labelling.summary import print_summary, summarise

CLASSES = ("cat", "dog", "hen")
SIZES = [(5, 8), (6, 4), (7, 7), (3, 9)]
SCORE = "an/cpl/miou_ms_flip"


def _mask(seed: int, size: tuple[int, int], values: list[int]) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).choice(values, size).astype(np.uint8)


def _split(root: Path, numbers: list[int]) -> Split:
    items = [
        Item(f"i{n}", f"images/i{n}.png", SIZES[n], [n % 3], f"masks/i{n}.png") for n in numbers
    ]
    return Split(root, Manifest("folder", "train", CLASSES, items), items)


@pytest.fixture
def tree(tmp_path: Path) -> tuple[LabelFolder, list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Four masks, the last without a hen or an undecided pixel, and the true ones."""
    folder = LabelFolder(tmp_path / "out")
    predicted = [_mask(n, size, [0, 1, 2, 3, 255]) for n, size in enumerate(SIZES)]
    predicted[3] = _mask(3, SIZES[3], [0, 2])
    true = [_mask(9 + n, size, [0, 1, 2, 255]) for n, size in enumerate(SIZES)]
    for n in range(4):
        for path, mask in (
            (folder.path("cpl", f"i{n}"), predicted[n]),
            (tmp_path / f"masks/i{n}.png", true[n]),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_mask(mask))
    return folder, predicted, true


def _expected(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> dict[str, list[float]]:
    return segmentation_scores(
        [(torch.from_numpy(p).long(), torch.from_numpy(t).long()) for p, t in pairs], 4
    )


def test_shares_and_scores(tree: tuple, tmp_path: Path) -> None:
    folder, predicted, true = tree
    images, truth = _split(tmp_path, [0, 1, 2, 3]), _split(tmp_path, [3, 1, 0])
    found = summarise(folder, "cpl", images, [0, 1, 2, 3], truth, SCORE)
    for key, inside in (
        ("background", lambda m: m == 0),
        ("foreground", lambda m: (m > 0) & (m < 4)),
        ("undecided", lambda m: m == 255),
    ):
        share = sum(100 * inside(mask).mean() for mask in predicted) / 4
        assert found[key] == pytest.approx(share, abs=0.006)
    assert found["images"] == 4
    assert found["images_of_class"] == {
        name: sum((mask == k + 1).any() for mask in predicted) for k, name in enumerate(CLASSES)
    }
    assert found["images_of_class"]["hen"] < 4

    check = found["check"]
    assert check["images"] == 3
    compared = [0, 1, 3]
    as_background = [(np.where(predicted[n] == 255, 0, predicted[n]), true[n]) for n in compared]
    expected = _expected(as_background)
    assert check["scores"][SCORE] == pytest.approx(100 * mean(expected["iou"]), abs=0.006)
    for name, value in zip(("background", *CLASSES), expected["iou"], strict=True):
        assert check["per_class"][name] == pytest.approx(100 * value, abs=0.006)
    decided = [
        (p, np.where(p == 255, 255, t)) for p, t in ((predicted[n], true[n]) for n in compared)
    ]
    expected = _expected([(np.where(p == 255, 0, p), t) for p, t in decided])
    assert check["scores"][f"{SCORE}_decided"] == pytest.approx(
        100 * mean(expected["iou"]), abs=0.006
    )
    assert list(check["scores"]) == [SCORE, f"{SCORE}_decided"]


def test_a_class_without_a_pixel_is_left_out(tree: tuple, tmp_path: Path) -> None:
    folder, predicted, true = tree
    images = _split(tmp_path, [0, 3])
    found = summarise(folder, "cpl", images, [1], images, SCORE)
    assert found["images"] == 1
    assert list(found["check"]["scores"]) == [SCORE]  # nothing is undecided
    expected = _expected([(predicted[3], true[3])])
    assert math.isnan(expected["iou"][3])
    assert found["check"]["per_class"]["hen"] is None
    assert found["check"]["scores"][SCORE] == pytest.approx(100 * mean(expected["iou"]), abs=0.006)


def test_without_true_masks_nothing_is_compared(tree: tuple, tmp_path: Path) -> None:
    folder, _, _ = tree
    images = _split(tmp_path, [0, 1])
    assert "check" not in summarise(folder, "cpl", images, [0, 1], None, SCORE)
    assert "check" not in summarise(folder, "cpl", images, [0, 1], _split(tmp_path, [2]), SCORE)


def test_a_true_mask_that_cannot_be_used_is_passed_over(tree: tuple, tmp_path: Path) -> None:
    folder, _, _ = tree
    images = _split(tmp_path, [0, 1, 2])
    (tmp_path / "masks/i1.png").write_bytes(b"no mask")
    (tmp_path / "masks/i2.png").write_bytes(encode_mask(np.zeros((2, 2), np.uint8)))
    assert summarise(folder, "cpl", images, [0, 1, 2], images, SCORE)["check"]["images"] == 1


def test_masks_that_another_program_changed(tree: tuple, tmp_path: Path) -> None:
    folder, predicted, _ = tree
    images = _split(tmp_path, [0, 1, 2])
    folder.path("cpl", "i0").write_bytes(b"")
    Image.fromarray(predicted[1]).convert("RGB").save(folder.path("cpl", "i1"))
    with pytest.raises(UserError, match=r"2 of 3 masks in .*cpl cannot be used(.|\n)*i0\.png"):
        summarise(folder, "cpl", images, [0, 1, 2], None, SCORE)


def test_print(tree: tuple, tmp_path: Path) -> None:
    folder, _, _ = tree
    images = _split(tmp_path, [0, 1, 2, 3])
    results = {"cpl": summarise(folder, "cpl", images, [0, 1, 2], images, SCORE)}
    console = Console(file=io.StringIO(), width=120)
    print_summary(results, images, [0, 1, 2], console)
    text = console.file.getvalue()
    cat = next(line for line in text.splitlines() if "cat" in line)
    value = f"{results['cpl']['check']['per_class']['cat']:.2f}"
    assert cat.replace("│", "").split() == ["cat", "1", "3", value]  # of 4 images 2 are labelled
    assert f"{results['cpl']['undecided']:.2f}" in text
    for name, score in results["cpl"]["check"]["scores"].items():
        assert f"{name} {score:.2f} % on 3 images with masks: a check, used for nothing" in text
