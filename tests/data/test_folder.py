"""A folder of images with labels: tidy, as people have it, and wrong."""

from __future__ import annotations

import os
import shutil
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsss.data.folder import Folder
from wsss.data.images import DatasetError
from wsss.data.layout import Split
from wsss.data.manifest import Manifest

SIZE = (20, 28)  # height, width
LABELS = {"a": "cat;dog", "b": "cat", "c": "dog", "d": "fox"}

Build = Callable[..., Path]


def pixels(name: str, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Two grey halves, which all formats keep: the left one tells the image."""
    image = np.full((*size, 3), 200, np.uint8)
    image[:, : size[1] // 2] = sum(name.encode()) % 150
    return image


def write_image(root: Path, file: str, size: tuple[int, int] = SIZE, **options: Any) -> Path:
    path = root / "images" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(path.stem, size)).save(path, **options)
    return path


def write_mask(root: Path, name: str, value: int = 1, size: tuple[int, int] = SIZE) -> Path:
    path = root / "masks" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.full(size, value, np.uint8)
    mask[0] = 255
    mask[1] = 0
    Image.fromarray(mask).save(path)
    return path


def write_labels(root: Path, labels: Mapping[str, str], columns: str = "image,labels") -> Path:
    path = root / "labels.csv"
    path.write_text("".join(f"{line}\n" for line in [columns, *map(",".join, labels.items())]))
    return path


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images a, b, c and d, labelled; a and c are train, b and d val."""
    root = tmp_path / "mine"
    for name in LABELS:
        write_image(root, f"{name}.jpg")
    write_labels(root, {f"{name}.jpg": labels for name, labels in LABELS.items()})
    write_lines(root / "train.txt", ["a", "c"])
    write_lines(root / "val.txt", ["b", "d"])
    return root


def train(root: Path, on_error: Any = "raise", min_side: int = 1, **options: Any) -> Split:
    return Folder(root, **options).open("train", "train", on_error, min_side)


def classes_of(data: Split) -> dict[str, list[str]]:
    rows = zip(data.names, data.labels, strict=True)
    return {name: [data.classes[i] for i in np.flatnonzero(row)] for name, row in rows}


def members(root: Path, **options: Any) -> tuple[list[str], list[str]]:
    layout = Folder(root, **options)
    train, val = (layout.prepare(split) for split in ("train", "val"))
    return [item.name for item in train.items], [item.name for item in val.items]


def notes(root: Path, split: str = "train") -> str:
    return "\n".join(Folder(root).prepare(split).notes)


# --- reading ---------------------------------------------------------------------------------


def test_reads_images_labels_and_masks(root: Path) -> None:
    for name, value in (("b", 1), ("d", 3)):
        write_mask(root, name, value)
    data = train(root)
    assert data.classes == ("cat", "dog", "fox")
    assert classes_of(data) == {"a": ["cat", "dog"], "c": ["dog"]}
    assert data.sizes == [SIZE] * 2
    assert not data.has_masks
    for index, name in enumerate(data.names):
        assert np.abs(data.load_image(index).astype(int) - pixels(name)).max() <= 3
    val = Folder(root).open("val")
    assert val.has_masks
    assert classes_of(val) == {"b": ["cat"], "d": ["fox"]}
    assert [np.unique(val.load_mask(i)).tolist() for i in range(2)] == [[0, 1, 255], [0, 3, 255]]


def test_without_masks_nothing_is_scored(root: Path) -> None:
    val = Folder(root).open("val", "evaluate")
    assert (val.names, val.has_masks) == (["b", "d"], False)
    with pytest.raises(DatasetError, match=r"image 'b' of .* has no mask"):
        val.load_mask(0)
    with pytest.raises(DatasetError, match=r"masks/a\.png: no such mask; add it, or take the im"):
        Folder(root).open("train", "train_masks")


def test_classes_file_decides_names_and_order(root: Path) -> None:
    assert "classes: from labels.csv, as there is no classes.txt" in notes(root)
    write_lines(root / "classes.txt", ["fox", "dog", "cow", "cat"])
    data = train(root)
    assert data.classes == ("fox", "dog", "cow", "cat")
    assert classes_of(data) == {"a": ["dog", "cat"], "c": ["dog"]}
    assert "classes" not in notes(root)
    write_lines(root / "classes.txt", ["dog", "cat"])
    with pytest.raises(DatasetError, match=r"labels\.csv: unknown class 'fox' of 'd', known: dog"):
        train(root)


@pytest.mark.parametrize("kind", ["json", "npy", "tsv"])
def test_kinds_of_label_files(root: Path, kind: str) -> None:
    (root / "labels.csv").unlink()
    path = root / f"labels.{kind}"
    write_lines(root / "classes.txt", ["cat", "dog", "fox"])
    if kind == "npy":
        np.save(path, {"a": np.array([1, 1, 0.0]), "c": np.array([0, 1, 0.0])})  # type: ignore[arg-type]
    else:
        path.write_text(
            '{"a.jpg": ["dog", "cat"], "c": ["dog"]}'
            if kind == "json"
            else "image\tcat\tdog\tfox\na\t1\t1\t0\nc\t0\t1\t0\n"
        )
    assert classes_of(train(root)) == {"a": ["cat", "dog"], "c": ["dog"]}


def test_label_file_elsewhere_and_two_of_them(root: Path, tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text("image,labels\na,fox\nc,fox\n")
    assert classes_of(train(root, labels_file=tmp_path / "tags.csv"))["a"] == ["fox"]
    (root / "other.csv").write_text("image,labels\na,cow\nc,cow\n")
    assert classes_of(train(root, labels_file="other.csv"))["a"] == ["cow"]
    with pytest.raises(DatasetError, match=r"no\.csv: no such label file"):
        train(root, labels_file="no.csv")
    (root / "labels.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"labels\.csv and labels\.json; keep one, or name it"):
        train(root)
    assert len(train(root, labels_file="labels.csv")) == 2


@pytest.mark.parametrize(
    "form",
    ["{}", "{}.jpg", "{}.PNG", "images/{}.jpg", "./images/{}.jpg", "images\\{}.jpg", "{root}/{}"],
)
def test_names_may_say_where_the_image_is(root: Path, form: str) -> None:
    def say(name: str) -> str:
        return form.replace("{root}", f"{root}/images").replace("{}", name)

    write_labels(root, {say(name): labels for name, labels in LABELS.items()})
    write_lines(root / "train.txt", [say("a"), say("c"), say("a")])
    assert classes_of(train(root)) == {"a": ["cat", "dog"], "c": ["dog"]}


def test_folders_blanks_and_accents(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Fuß ö") for form in ("NFC", "NFD"))
    for file in ("2024/05/my cat v1.5.jpg", f"{composed}.jpg", f"{apart}/猫.png", "images/x.jpg"):
        write_image(tmp_path, file)
    labels = {f"{apart}.jpg": "cat", f"{composed}/猫": "cat", "images/x.jpg": "dog"}
    write_labels(tmp_path, {"2024\\05\\my cat v1.5.jpg": "dog", **labels})
    write_mask(tmp_path, f"{composed}/猫")
    write_mask(tmp_path, "2024/05/my cat v1.5", 2)
    data = train(tmp_path)
    assert classes_of(data) == {composed: ["cat"], "images/x": ["dog"]}
    val = Folder(tmp_path).open("val")
    assert classes_of(val) == {"2024/05/my cat v1.5": ["dog"], f"{composed}/猫": ["cat"]}
    assert np.abs(val.load_image(1).astype(int) - pixels("猫")).max() == 0
    assert np.unique(val.load_mask(0)).tolist() == [0, 2, 255]


def test_formats(tmp_path: Path) -> None:
    """What PIL reads is an image, whatever its suffix says."""
    grey = Image.fromarray(pixels("grey")[..., 0])
    rgb = Image.fromarray(pixels("rgb"))
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "jpg.JPG": (rgb, {"quality": 95}),
        "jpeg.jpeg": (rgb, {"quality": 95}),
        "png.png": (rgb, {}),
        "bmp.bmp": (rgb, {}),
        "webp.webp": (rgb, {"lossless": True}),
        "tif.tif": (rgb, {}),
        "tiff.tiff": (rgb, {"compression": "tiff_lzw"}),
        "named.jpg": (rgb, {"format": "PNG"}),
        "grey.png": (grey, {}),
        "sixteen.png": (Image.fromarray(pixels("grey")[..., 0].astype(np.uint16) * 257), {}),
        "rgba.png": (rgb.convert("RGBA"), {}),
        "palette.png": (rgb.quantize(4), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {"quality": 95}),
    }
    (tmp_path / "images").mkdir()
    for file, (image, options) in files.items():
        image.save(tmp_path / "images" / file, **options)
    write_labels(tmp_path, dict.fromkeys([*files, "other"], "cat"))
    write_mask(tmp_path, "other")
    write_image(tmp_path, "other.png")
    for decode in (False, True):
        assert all(i.problem is None for i in Folder(tmp_path).prepare("train", decode).items)
        data = train(tmp_path)
        assert sorted(data.names) == sorted(Path(file).stem for file in files)
        assert data.sizes == [SIZE] * len(files)
    for index, name in enumerate(data.names):
        source = "grey" if name in ("grey", "sixteen") else "rgb"
        assert np.abs(data.load_image(index).astype(int) - pixels(source)).max() <= 3, name


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Stored lying, with the turn in EXIF: image, size and mask are those of the viewer."""
    upright = np.zeros((*SIZE, 3), np.uint8)
    upright[:10, :8] = 240  # the upper left corner
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    (tmp_path / "images").mkdir()
    Image.fromarray(stored).save(tmp_path / f"images/a.{suffix}", exif=exif, quality=95)
    write_image(tmp_path, "b.png")
    write_labels(tmp_path, {"a": "cat", "b": "cat"})
    write_mask(tmp_path, "a")
    for decode in (False, True):
        (item,) = Folder(tmp_path).prepare("val", decode).items
        assert item.problem is item.mask_problem is None
        assert item.size == SIZE
    val = Folder(tmp_path).open("val")
    difference = np.abs(val.load_image(0).astype(int) - upright)
    assert difference.mean() < 4
    assert val.load_mask(0).shape == SIZE
    if orientation >= 5:
        write_mask(tmp_path, "a", size=SIZE[::-1])
        with pytest.raises(DatasetError, match=r"a\.png: mask is 20x28 but its image is 28x20"):
            Folder(tmp_path).open("val")


def test_links_to_folders_are_followed_and_circles_end(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (root / "images/a.jpg").rename(tmp_path / "disk/a.jpg")
    (root / "images/more").symlink_to(tmp_path / "disk")
    (root / "images/more/back").symlink_to(root / "images")
    write_labels(root, {"more/a.jpg": "cat", "c": "dog"})
    write_lines(root / "train.txt", ["more/a", "c"])
    assert train(root).names == ["more/a", "c"]
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    write_mask(root, "b")
    assert [item.name for item in Folder(root).prepare("train").items] == ["c", "d", "more/a"]


def test_hidden_and_foreign_files_are_left_alone(root: Path) -> None:
    for file in (".a.jpg", "._b.jpg", ".cache/e.jpg", "e.jpg.d/readme.txt", "f.heic"):
        path = root / "images" / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    assert sorted([*members(root)[0], *members(root)[1]]) == ["a", "b", "c", "d"]
    assert "images: 2 files of a kind that is not read, such as e.jpg.d/readme.txt" in notes(root)


# --- which images are train and which val ----------------------------------------------------


def test_split_column_comes_first(root: Path) -> None:
    write_mask(root, "c")
    splits = {"a.jpg": "cat,val", "b.jpg": "cat,train", "d.jpg": "fox,"}
    write_labels(root, {"c.jpg": "dog,test", **splits}, "image,labels,split")
    assert members(root) == (["b", "d"], ["a"])  # d says nothing
    assert Folder(root).splits() == ["test", "train", "val"]
    assert Folder(root).open("test").names == ["c"]
    assert "splits: from the split column of labels.csv" in notes(root)
    with pytest.raises(DatasetError, match=r"split 'tset' of .*: there are test, train, val; cho"):
        Folder(root).prepare("tset")


def test_split_column_for_some_images_alone(root: Path) -> None:
    """Images without an entry are for training, whether the file names them or not."""
    write_labels(root, {"b": "cat,val", "a": "cat,"}, "image,labels,split")
    for name in ("c", "d"):
        write_mask(root, name, 1)
    assert Folder(root).splits() == ["train", "val"]
    assert members(root) == (["a", "c", "d"], ["b"])
    (root / "images/a.jpg").unlink()
    write_labels(root, dict.fromkeys("bcd", "cat,val"), "image,labels,split")
    with pytest.raises(DatasetError, match=r"split 'train' of .*: there are val"):
        Folder(root).prepare("train")


def test_lists_come_next(root: Path) -> None:
    write_mask(root, "a")
    write_mask(root, "b")
    write_mask(root, "d", 3)
    assert members(root) == (["a", "c"], ["b", "d"])
    assert "splits: from train.txt and val.txt" in notes(root)
    write_lines(root / "train.txt", ["c.jpg", "", "a.jpg", "c", "b"])
    assert members(root)[0] == ["c", "a", "b"]
    assert "splits: 1 image in both lists, such as b" in notes(root, "val")


def test_other_lists(root: Path) -> None:
    """A text file is no split, unless somebody says so."""
    write_lines(root / "README.txt", ["about these images"])
    write_lines(root / "few.txt", ["d"])
    assert Folder(root).splits() == ["train", "val"]
    assert Folder(root).open("few").names == ["d"]
    write_lines(root / "test.txt", ["a"])
    assert Folder(root).splits() == ["train", "val", "test"]
    with pytest.raises(DatasetError, match=r"split 'more' of .*: there are train, val, test"):
        Folder(root).prepare("more")


def test_wrong_lists(root: Path) -> None:
    write_lines(root / "val.txt", [" "])
    with pytest.raises(DatasetError, match=r"val\.txt: the image list is empty"):
        Folder(root).prepare("val")
    (root / "val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DatasetError, match=r"val\.txt: not readable .*; save it as UTF-8"):
        Folder(root).prepare("val")
    (root / "val.txt").unlink()
    for split in ("train", "val"):
        with pytest.raises(DatasetError, match=r"val\.txt: no such list, but there is train\.txt"):
            Folder(root).prepare(split)


def test_masks_come_third(root: Path) -> None:
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    write_mask(root, "b")
    write_mask(root, "c", 2)
    assert members(root) == (["a", "d"], ["b", "c"])
    assert "splits: the images with a mask are val, the others train" in notes(root)
    with pytest.raises(DatasetError, match=r"split 'test' of .*: there are train, val"):
        Folder(root).prepare("test")


def numbered(root: Path, number: int) -> None:
    """Images of one size, so small that a hundred cost nothing."""
    for i in range(number):
        write_image(root, f"{i:03}.png", (2, 2))
    write_labels(root, {f"{i:03}.png": "cat" for i in range(number)})


def test_a_share_by_name_comes_last(tmp_path: Path) -> None:
    numbered(tmp_path, 60)
    train, val = members(tmp_path)
    assert sorted(train + val) == [f"{i:03}" for i in range(60)]
    assert 2 <= len(val) <= 12  # about a tenth
    assert f"splits: {len(val)} of 60 images are val, chosen by their names" in notes(tmp_path)
    _, third = members(tmp_path, val_fraction=0.3)
    assert 10 <= len(third) <= 26
    assert set(val) < set(third)
    # Masks for all decide nothing.
    for i in range(60):
        write_mask(tmp_path, f"{i:03}", size=(2, 2))
    assert members(tmp_path) == (train, val)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7])
def test_images_that_are_added_move_no_other(tmp_path: Path, fraction: float) -> None:
    numbered(tmp_path, 40)
    train, val = members(tmp_path, val_fraction=fraction)
    numbered(tmp_path, 70)
    more_train, more_val = members(tmp_path, val_fraction=fraction)
    assert set(train) < set(more_train)
    assert set(val) < set(more_val)


def test_two_images_and_one(tmp_path: Path) -> None:
    numbered(tmp_path, 2)
    for fraction in (0.001, 0.5, 0.999):
        train, val = members(tmp_path, val_fraction=fraction)
        assert sorted(train + val) == ["000", "001"]
        assert len(train) == len(val) == 1
    (tmp_path / "images/001.png").unlink()
    numbered(tmp_path, 1)
    with pytest.raises(DatasetError, match=r"images: 1 image cannot be split into train and val"):
        Folder(tmp_path).prepare("val")
    for split in ("train", "val"):
        write_lines(tmp_path / f"{split}.txt", ["000"])
    assert members(tmp_path) == (["000"], ["000"])


@pytest.mark.parametrize("fraction", [-0.1, 0, 1, 1.5])
def test_val_fraction_out_of_range(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DatasetError, match=rf"val_fraction={fraction}: expected .* between 0 and"):
        Folder(tmp_path, val_fraction=fraction)


# --- images and labels that do not fit -------------------------------------------------------


def test_images_that_the_label_file_does_not_name(root: Path) -> None:
    write_labels(root, {"b": "cat", "c": "dog"})
    with pytest.raises(DatasetError) as caught:
        train(root)
    assert "1 problem in split 'train'" in str(caught.value)
    assert f"{root / 'images/a.jpg'}: labels.csv does not name it; add a line" in str(caught.value)
    with pytest.warns(UserWarning, match=r"left out 1 of 2 images:\n.*a\.jpg"):
        assert train(root, on_error="skip").names == ["c"]
    assert Folder(root).open("val").names == ["b", "d"]  # nothing is scored without masks


def test_the_mask_says_what_nothing_else_says(root: Path) -> None:
    write_labels(root, {"a": "cat", "d": "dog"})
    write_mask(root, "b", 2)
    write_mask(root, "d", 1)
    assert classes_of(Folder(root).open("val")) == {"b": ["dog"], "d": ["dog"]}
    write_mask(root, "b", 3)
    with pytest.raises(DatasetError, match=r"b\.png: mask holds the values 3, allowed are 0\.\.2"):
        Folder(root).open("val")


def test_masks_and_classes_without_a_label_file(root: Path) -> None:
    (root / "labels.csv").unlink()
    write_lines(root / "classes.txt", ["cat", "dog"])
    with pytest.raises(DatasetError, match=r"mine: no label file \(labels\.csv, .*Write one"):
        train(root)
    for name in LABELS:
        write_mask(root, name, 2)
    assert classes_of(train(root)) == {"a": ["dog"], "c": ["dog"]}
    (root / "classes.txt").unlink()
    (root / "tags.csv").write_text("")
    with pytest.raises(DatasetError, match=r"no label file .*data\.dataset\.labels_file=tags\.csv"):
        train(root)


def test_empty_labels_are_left_out_of_training(root: Path) -> None:
    write_labels(root, LABELS | {"a": ""})
    with pytest.warns(UserWarning, match=r"left out 1 image without any labelled class:\n  - a"):
        assert train(root).names == ["c"]


def test_labels_of_images_that_are_not_there(root: Path) -> None:
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    write_mask(root, "b")
    (root / "images/sub").mkdir()
    (root / "images/c.jpg").rename(root / "images/sub/C.jpg")
    write_labels(root, {**LABELS, "lost": "cat", "sub/C": "dog"})
    with pytest.raises(DatasetError) as caught:
        train(root)
    assert "2 problems" in str(caught.value)
    assert "images/lost.*: named for train, but no such image\n" in str(caught.value)
    assert "images/c.*: named for train, but no such image; did you mean 'sub/C'?" in str(
        caught.value
    )
    with pytest.warns(UserWarning, match="left out 2 of 5"):
        assert train(root, on_error="skip").names == ["a", "d", "sub/C"]


def test_two_files_of_one_name(root: Path) -> None:
    write_image(root, "a.png")
    with pytest.raises(DatasetError, match=r"images: a\.jpg and a\.png have one name; rename"):
        train(root)
    with pytest.warns(UserWarning, match="left out 1 of 2"):
        assert train(root, on_error="skip").names == ["c"]


def test_file_names_that_are_not_text(root: Path) -> None:
    for place in ("images/caf\udce9.jpg", "images/caf\udce9/e.jpg", "images/\udce9/ok.txt"):
        path = os.fsencode(root / place)
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        shutil.copy(os.fsencode(root / "images/a.jpg"), path)
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    write_mask(root, "b")
    with pytest.raises(DatasetError) as caught:
        train(root)
    assert "images/caf\ufffd: the file's name is not UTF-8; rename it" in str(caught.value)
    assert str(caught.value).encode()  # can be printed
    path = Folder(root).prepare("train").path
    assert path is not None
    assert Manifest.load(path) is not None
    with pytest.warns(UserWarning, match="left out 2 of 5"):
        assert train(root, on_error="skip").names == ["a", "c", "d"]
    assert Folder(root).open("val").names == ["b"]


# --- masks that do not fit -------------------------------------------------------------------


def test_masks_for_some_of_val_only(root: Path) -> None:
    write_mask(root, "b")
    with pytest.raises(DatasetError, match=r"masks/d\.png: no such mask; add it, or take the"):
        Folder(root).open("val")
    with pytest.warns(UserWarning, match="left out 1 of 2"):
        val = Folder(root).open("val", on_error="skip")
    assert (val.names, val.has_masks) == (["b"], True)


def test_wrong_masks(root: Path) -> None:
    for name in LABELS:
        write_mask(root, name)
    write_mask(root, "b", size=(20, 29))
    with pytest.raises(DatasetError, match=r"b\.png: mask is 29x20 but its image is 28x20"):
        Folder(root).open("val")
    write_mask(root, "b", 7)
    Image.fromarray(pixels("x")).save(root / "masks/d.png")
    problems = [i.mask_problem for i in Folder(root).prepare("val", decode=True).items]
    assert "b.png: mask holds the values 7, allowed are 0..3 and 255; map" in str(problems[0])
    assert "d.png: mask has mode RGB, expected class numbers" in str(problems[1])
    with pytest.raises(DatasetError, match="2 problems"):
        Folder(root).open("val")
    assert len(train(root)) == 2  # does not look at masks


def test_masks_that_are_not_taken_are_told(root: Path) -> None:
    (root / "masks").mkdir()
    Image.fromarray(pixels("x")).save(root / "masks/b.jpg")
    write_mask(root, "b_mask")
    write_mask(root, "d_mask")
    assert not Folder(root).open("val").has_masks
    assert "masks: 1 file not PNG, so not read, such as b.jpg" in notes(root)
    assert "masks: 2 files without an image of that name, such as b_mask.png" in notes(root)


# --- files and folders that are wrong --------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jpg: empty file \(0 bytes\)"),
        (b"<html>not found</html>", r"a\.jpg: not a readable image"),
        (None, r"a\.jpg: cannot decode the image .*truncated"),
    ],
)
def test_broken_images(root: Path, content: bytes | None, message: str) -> None:
    path = write_image(root, "a.jpg", (64, 64))
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(DatasetError, match=message):
        train(root)
    with pytest.warns(UserWarning, match=r"left out 1 of 2 images:"):
        assert train(root, on_error="skip").names == ["c"]


def test_broken_link(root: Path) -> None:
    (root / "images/a.jpg").unlink()
    (root / "images/a.jpg").symlink_to(root / "nowhere.jpg")
    with pytest.raises(DatasetError, match=r"a\.jpg: not a readable image .*No such file"):
        train(root)


@pytest.mark.parametrize("size", [(1, 1), (10, 10), (15, 400)])
def test_small_images(root: Path, size: tuple[int, int]) -> None:
    write_image(root, "a.jpg", size)
    assert train(root).sizes[0] == size
    message = rf"a\.jpg: {size[1]}x{size[0]} pixels, the shorter side must have data\.min_side=16"
    with pytest.raises(DatasetError, match=message):
        train(root, min_side=16)
    with pytest.warns(UserWarning, match="left out 1 of 2"):
        assert train(root, on_error="skip", min_side=16).names == ["c"]


def test_wrong_roots(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"nowhere' is not a folder; set data\.root to the fol"):
        train(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"images: no such folder.*\nDid you mean data\.root="):
        train(tmp_path)
    for place in (root / "images", Path()):
        monkeypatch.chdir(root / "images")
        with pytest.raises(DatasetError) as caught:
            train(place)
        assert f"Did you mean data.root={root} ?" in str(caught.value)
    assert not any(tmp_path.rglob("wsss"))  # nothing is written where nothing belongs


def test_no_image(root: Path) -> None:
    shutil.rmtree(root / "images")
    with pytest.raises(DatasetError, match=r"images: no such folder; put the images there$"):
        train(root)
    (root / "images").mkdir()
    with pytest.raises(DatasetError, match=r"images: holds no image \(\.jpg, .*\.tiff\)$"):
        train(root)
    (root / "images/a.heic").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"images: holds no image .*; found a\.heic"):
        train(root)


def test_unreadable_folder_is_no_empty_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that cannot be seen must not be missed in silence."""
    real = os.scandir
    (root / "images/more").mkdir()

    def scandir(path: Any) -> Any:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DatasetError, match=r"mine: .*Permission denied.*images/more"):
        train(root)


def test_nothing_is_warned_about_a_tidy_folder(root: Path) -> None:
    for name, value in (("b", 1), ("d", 3)):
        write_mask(root, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(train(root, min_side=16)) == len(Folder(root).open("val", min_side=16)) == 2


# --- labels that would leak from the truth ------------------------------------------------------


def test_masks_do_not_label_what_the_label_file_leaves_out(root: Path) -> None:
    """A file of labels with wrong names must not become training on the truth, unnoticed."""
    for name in LABELS:
        write_mask(root, name)
    write_labels(root, {f"IM_{name}.jpg": labels for name, labels in LABELS.items()})
    with pytest.raises(DatasetError, match=r"2 problems.*\n.*a\.jpg: labels\.csv does not name it"):
        train(root)
    assert "labels.csv: 4 names without an image, such as IM_a" in notes(root)
    # With its masks for full supervision, and for scores that know the labels, they do.
    assert classes_of(Folder(root).open("train", "train_masks")) == {"a": ["cat"], "c": ["cat"]}
    assert classes_of(Folder(root).open("val")) == {"b": ["cat"], "d": ["cat"]}
    (root / "labels.csv").unlink()
    write_lines(root / "classes.txt", ["cat", "dog", "fox"])
    assert classes_of(train(root)) == {"a": ["cat"], "c": ["cat"]}


def test_a_forgotten_mask_does_not_make_the_training_set(root: Path) -> None:
    for split in ("train", "val"):
        (root / f"{split}.txt").unlink()
    names = [f"n{i:02}" for i in range(12)]
    shutil.rmtree(root / "images")
    for name in names:
        write_image(root, f"{name}.jpg")
        write_mask(root, name)
    write_labels(root, dict.fromkeys([*names, "gone"], "cat"))
    manifests = [Folder(root).prepare(split) for split in ("train", "val")]
    problems = [item.problem for made in manifests for item in made.items if item.problem]
    assert len(problems) == 1
    assert "images/gone.*: named for" in problems[0]
    write_labels(root, dict.fromkeys(names, "cat"))
    assert len(train(root).names) + len(Folder(root).open("val").names) == 12
    (root / "masks" / "n05.png").unlink()
    with pytest.raises(DatasetError, match="1 of 12 images have no mask, such as n05; as the oth"):
        train(root)
    for name in ("n06", "n07"):
        (root / "masks" / f"{name}.png").unlink()
    assert train(root).names == ["n05", "n06", "n07"]


@pytest.mark.parametrize("order", [("cat", "dog", "fox"), ("dog", "cat", "fox")])
def test_doubts_an_order_of_classes(root: Path, order: tuple[str, ...]) -> None:
    write_labels(root, {"a": "cat", "b": "cat", "c": "dog", "d": "dog"})
    write_lines(root / "classes.txt", order)
    for name, value in (("b", 1), ("d", 2)):
        write_mask(root, name, value)
    doubt = Folder(root).open("val").doubt()
    if order[0] == "cat":
        assert doubt is None
    else:
        assert doubt is not None
        assert (
            "2 of 2 masks hold classes that the image's labels do not, such as d: labels " in doubt
        )
        assert "labels dog, mask cat. Are the classes in the order" in doubt
