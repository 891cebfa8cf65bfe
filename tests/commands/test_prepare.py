"""What ``prepare`` prints, writes and refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import Run, compose
from tests.data.snapshot import snapshot
from tests.data.test_folder import write_image, write_labels, write_lines, write_mask
from wsss.data import shapes
from wsss.data.folder import Folder
from wsss.data.manifest import Manifest
from wsss.errors import UserError
from wsss.prepare import prepare

SMALL: dict[str, Any] = {"train": 9, "val": 3, "image_size": 48, "seed": 5}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder: a and c are train, b and d val, with masks."""
    root = tmp_path / "mine"
    for name in "abcd":
        write_image(root, f"{name}.jpg")
    write_labels(root, {"a": "cat", "b": "cat;dog", "c": "", "d": "dog"})
    write_mask(root, "b", 1)
    write_mask(root, "d", 2)
    return root


def call(*overrides: str) -> dict[str, Manifest]:
    return prepare(compose("prepare", [*overrides]))


def cells(printed: str) -> list[list[str]]:
    """Cells of all tables."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def numbers(printed: str, split: str) -> list[int]:
    """A split's row: images, labelled, no class, no labels, masks, unusable."""
    (row,) = [row for row in cells(printed) if row[0] == split]
    return [int(cell) for cell in row[1:]]


# --- in order --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["voc", "coco", "acdc", "folder"])
def test_layouts(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / layout
    shapes.generate(root, **SMALL, layout=layout)
    overrides = [f"data={layout}", f"data.root={root}", "data.train_split=train"]
    first = call(*overrides)
    printed = capsys.readouterr().out
    assert list(first) == ["train", "val"]
    assert all(m.decoded and m.path is not None for m in first.values())
    assert f"{layout} data set in {root}" in printed.replace("\n", "")
    assert f"What was found is kept in {root / 'wsss'}" in printed.replace("\n", "")
    for split, manifest in first.items():
        total = len(manifest.items)
        labelled = sum(bool(item.labels) for item in manifest.items)
        expected = [total, labelled, total - labelled, 0, total, 0]
        if layout == "acdc":
            expected.append(len({item.group for item in manifest.items}))
        assert numbers(printed, split) == expected
    for index, name in enumerate(first["val"].classes):
        counts = [
            sum(index in (item.labels or []) for item in first[split].items)
            for split in ("train", "val")
        ]
        assert [str(index + 1), name, *map(str, counts)] in cells(printed)
    assert ("groups" in printed) == (layout == "acdc")
    assert "problem" not in printed
    assert "Are the classes in the order" not in printed

    before = snapshot(root)
    assert call(*overrides) == first
    assert capsys.readouterr().out == printed
    assert snapshot(root) == before


def test_what_training_opens_is_what_was_prepared(root: Path) -> None:
    manifests = call("data=folder", f"data.root={root}", "data.dataset.val_fraction=0.2")
    before = snapshot(root)
    assert Folder(root, val_fraction=0.2).prepare("val") == manifests["val"]
    with pytest.warns(UserWarning, match="left out 1 image without any labelled class"):
        assert Folder(root, val_fraction=0.2).open("train", "train").names == ["a"]
    assert snapshot(root) == before


def test_shapes_are_generated_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = [f"data.generate.{key}={value}" for key, value in SMALL.items()]
    root = tmp_path / "shapes"
    call("data=shapes", f"data.root={root}", "data.generate.layout=folder", *generate)
    printed = capsys.readouterr().out
    assert (root / "labels.csv").is_file()
    assert numbers(printed, "train")[0] == 9
    with pytest.raises(UserError, match=r"download=true: this data set is generated"):
        call("data=shapes", f"data.root={tmp_path / 'x'}", "download=true", *generate)


def test_the_real_command(root: Path, tmp_path: Path, run: Run) -> None:
    """A call with problems, one that leaves them out, and one more that changes nothing."""
    (root / "images/a.jpg").write_bytes(b"")
    write_image(root, "e.jpg")
    write_labels(root, {"b": "cat;dog", "c": "cat", "d": "dog", "a": "cat", "lost": "cat"})
    command = ("prepare", "data=folder", f"data.root={root}")
    done = run(*command, code=2)
    assert numbers(done.stdout, "train") == [4, 2, 0, 1, 0, 3]
    assert "split 'train': 3 problems; images without labels: 1\n" in done.stdout
    for text in (
        f"{root}/images/a.jpg: empty file (0 bytes); fetch it again",
        f"{root}/images/e.jpg: labels.csv does not name it; add a line for it",
        f"{root}/images/lost.*: named for train, but no such image",
    ):
        assert text in done.stdout
    assert done.stderr == (
        f"error: {root}: 3 images of split 'train' cannot be used, see above. Mend them, or leave "
        "them out with data.on_error=skip\n"
    )

    before = snapshot(root)
    again = run(*command, "data.on_error=skip")
    assert again.stdout == done.stdout
    assert again.stderr == ""
    assert snapshot(root) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]  # no logs where it was called


def test_help_and_typos(run: Run) -> None:
    text = run("prepare", "--help").stdout
    for part in ("data=folder data.root=/data/mine", "download: false", "on_error: raise", "coco"):
        assert part in text
    done = run("prepare", "data=folder", "data.rooot=/data", code=2)
    assert done.stderr == "error: data.rooot: no such key. Did you mean 'data.root'?\n"
    assert done.stdout == ""


# --- doubts ----------------------------------------------------------------------------------


def test_notes_of_the_layout_are_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "images/[bold]x.heic").write_bytes(b"")
    call("data=folder", f"data.root={root}")
    printed = capsys.readouterr().out
    for note in (
        "splits: the images with a mask are val, the others train",
        "classes: from labels.csv, as there is no classes.txt; check that the masks have",
        "images: 1 file of a kind that is not read, such as [bold]x.heic",
    ):
        assert printed.count(note) == 1


def test_masks_in_another_order_of_classes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mask(root, "b", 2)
    write_mask(root, "d", 1)
    call("data=folder", f"data.root={root}")
    assert (
        "split 'val': 1 of 2 masks hold classes that the image's labels do not, such as d: labels "
        "dog, mask cat. Are the classes in the order of the mask values?"
    ) in capsys.readouterr().out


def test_masks_of_black_and_white(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mask of one class, drawn as 0 and 255, holds nothing that is scored."""
    for name in "bd":
        write_mask(root, name, 255)
    call("data=folder", f"data.root={root}")
    assert (
        "split 'val': 2 of 2 masks hold no class, but the image's labels do, such as b: cat, dog. "
        "The first class is value 1; 255 is ignored"
    ) in capsys.readouterr().out


def test_classes_without_a_training_image(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("data=folder", f"data.root={root}")
    printed = capsys.readouterr().out
    assert "split 'train': no image is labelled dog\n" in printed
    assert numbers(printed, "train") == [2, 1, 1, 0, 0, 0]


# --- problems --------------------------------------------------------------------------------


def test_pixels_are_looked_at(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mask(root, "d", 7)
    Image.fromarray(np.zeros((20, 28, 3), np.uint8)).save(root / "masks/b.png")
    with pytest.raises(UserError, match=r"2 images of split 'val' cannot be used, see above"):
        call("data=folder", f"data.root={root}")
    printed = capsys.readouterr().out
    assert "b.png: mask has mode RGB, expected class numbers 0..2" in printed
    assert "d.png: mask holds the values 7, allowed are 0..2 and 255" in printed


def test_small_images_and_missing_masks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(root, "a.jpg", (8, 30))
    (root / "masks/d.png").unlink()
    for split, names in (("train", "ac"), ("val", "bd")):
        write_lines(root / f"{split}.txt", list(names))
    overrides = ("data=folder", f"data.root={root}")
    with pytest.raises(UserError, match=r"1 image of split 'train' and 1 image of split 'val' c"):
        call(*overrides)
    printed = capsys.readouterr().out
    assert "a.jpg: 30x8 pixels, the shorter side must have data.min_side=16" in printed
    assert "d.png: no such mask; add it, or take the image out of the split" in printed
    with pytest.raises(UserError, match=r"1 image of split 'val' cannot be used"):
        call(*overrides, "data.min_side=8")
    with pytest.raises(UserError, match=r"mine: split 'train' has no image that can be used"):
        call(*overrides, "data.on_error=skip")  # c has no class
    call(*overrides, "data.on_error=skip", "data.min_side=8")


def test_many_problems_are_counted_and_all_named_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    for i in range(15):
        write_image(root, f"{i:02}.png")
    write_mask(root, "00")
    write_labels(root, {"00": "cat"})
    (root / "images/03.png").write_bytes(b"")
    write_mask(root, "00", 7)
    with pytest.raises(
        UserError, match=r"mine: 14 images of split 'train' and 1 image of split 'val' cannot be"
    ):
        call("data=folder", f"data.root={root}")
    printed = capsys.readouterr().out
    assert "split 'train': 14 problems; images without labels: 13\n" in printed
    assert "split 'val': 1 problem\n" in printed
    assert "images/10.png" in printed
    assert "images/11.png" not in printed
    assert "... and 4 more" in printed
    (listed,) = (root / "wsss").glob("*-problems.txt")
    assert f"all of them: {listed}\n" in printed
    lines = listed.read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{root}/images/{i:02}.png" for i in range(1, 15)
    ]
    before = snapshot(root)
    with pytest.raises(UserError, match=r"14 problems in split 'train'") as caught:
        Folder(root).open("train", "train")  # says the same to training
    assert str(listed) in str(caught.value)
    assert snapshot(root) == before
    write_labels(root, {f"{i:02}": "cat" for i in range(15)})
    with pytest.raises(UserError, match=r"mine: 1 image of split 'train' and 1 image"):
        call("data=folder", f"data.root={root}")
    assert not listed.exists()


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        ("folder", "images: no such folder; put the images there"),
        ("voc", "JPEGImages: the images, NAME.jpg"),
        ("coco", "unpack COCO's annotations there"),
        ("acdc", "neither patient folders (training/patient001/Info.cfg) nor slices"),
    ],
)
def test_missing_parts_are_named_once(
    data: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        call(f"data={data}", f"data.root={tmp_path}")
    assert str(caught.value).count(missing) == 1
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"nowhere' is not a folder; set data\.root to the"):
        call(f"data={data}", f"data.root={tmp_path / 'nowhere'}")


def test_missing_split_says_where_it_belongs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "voc"
    shapes.generate(root, **SMALL, layout="voc")
    with pytest.raises(UserError) as caught:
        call("data=voc", f"data.root={root}")
    for part in ("train_aug.txt: no such image list", "there are: train, val", "SBD"):
        assert part in str(caught.value)
    assert numbers(capsys.readouterr().out, "val")[0] == 3  # the others are counted
    shutil.rmtree(root / "Annotations")
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(UserError, match=r"Annotations: the image labels, NAME\.xml"):
        call("data=voc", f"data.root={root}", "data.train_split=train")


def test_a_split_that_nobody_asked_for_may_be_broken(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, names in (("train", "a"), ("val", "b")):
        write_lines(root / f"{split}.txt", list(names))
    write_lines(root / "test.txt", [])
    call("data=folder", f"data.root={root}")
    printed = capsys.readouterr().out
    assert f"split 'test' cannot be used: {root}/test.txt: the image list is empty" in printed
    with pytest.raises(UserError, match=r"test\.txt: the image list is empty"):
        call("data=folder", f"data.root={root}", "data.val_split=test")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=folder"], r"data\.root is not set: give the folder that holds images"),
        (["data=folder", "data.root={root}", "data.on_error=no"], r"data\.on_error='no': expected"),
        (["data=folder", "data.root={root}", "data.val_split=vl"], r"split 'vl' .*: there are tra"),
        (["data=folder", "data.root={root}", "data.dataset.val_fraction=2"], r"val_fraction=2"),
        (["data=folder", "data.root={root}", "data.dataset.labels_file=x.csv"], r"x\.csv: no such"),
        (["data=folder", "data.root={root}", "download=true"], r"data=folder has no archives that"),
        (["data=acdc", "data.root={root}", "download=true"], r"download=true: .*ACDC"),
        (["data=from_checkpoint"], r"data=from_checkpoint is for commands that read a checkpoint"),
        (["data=base", "data.root={root}"], r"data=base is what all data sets share: choose voc"),
    ],
)
def test_wrong_settings(root: Path, overrides: list[str], message: str) -> None:
    before = snapshot(root)
    with pytest.raises(UserError, match=message):
        call(*(o.format(root=root) for o in overrides))
    if "data.val_split=vl" not in overrides:  # train can be prepared
        assert snapshot(root) == before
