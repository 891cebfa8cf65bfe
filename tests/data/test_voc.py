"""The VOC tree: what it reads, and what it says about a tree that is not right."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.data.images import DatasetError, read_mask, read_rgb
from wsss.data.layout import Split
from wsss.data.voc import VOC, VOC_CLASSES

SIZE = (24, 32)  # height, width
OBJECTS = {"a": ["cat", "dog"], "b": ["person"], "c": ["train"]}


def write_xml(root: Path, name: str, objects: Sequence[str]) -> None:
    part = "<part><name>head</name></part>"  # VOC's person layout: not an object's name
    items = "".join(
        f"<object>{part}<name>{item}</name><difficult>1</difficult></object>" for item in objects
    )
    (root / f"Annotations/{name}.xml").write_text(
        f"<annotation><filename>{name}.jpg</filename>{items}</annotation>"
    )


def write_mask(root: Path, name: str, values: Sequence[int], size: tuple[int, int] = SIZE) -> None:
    mask = np.zeros(size, np.uint8)
    mask[:, : len(values)] = values
    mask[0, -1] = 255
    image = Image.fromarray(mask)
    image.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
    image.save(root / f"SegmentationClassAug/{name}.png")


def write_list(root: Path, split: str, lines: Sequence[str]) -> None:
    (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{x}\n" for x in lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree of three images, split `train_aug`."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, objects in OBJECTS.items():
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg", quality=90)
        write_xml(root, name, objects)
        write_mask(root, name, [VOC_CLASSES.index(item) + 1 for item in objects])
    write_list(root, "train_aug", list(OBJECTS))
    return root


def read(
    root: Path, split: str, masks: bool = False, on_error: Any = "raise", **options: Any
) -> Split:
    """A split opened for training, with or without masks."""
    return VOC(root, **options).open(split, "train_masks" if masks else "train", on_error)


def classes_of(data: Split, index: int) -> list[str]:
    return [data.classes[i] for i in np.flatnonzero(data.labels[index])]


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("image_labels", ["auto", "xml", "mask"])
def test_reads_names_labels_images_and_masks(root: Path, image_labels: str) -> None:
    data = read(root, "train_aug", image_labels=image_labels, masks=True)
    assert len(data) == 3
    assert data.classes == VOC_CLASSES
    assert list(data.names) == ["a", "b", "c"]
    assert data.labels.shape == (3, 20)
    assert data.labels.dtype == np.float32
    assert [classes_of(data, i) for i in range(3)] == list(OBJECTS.values())
    assert data.load_image(0).shape == (*SIZE, 3)
    assert data.load_image(0).dtype == np.uint8
    assert data.load_mask(2).dtype == np.uint8
    assert set(np.unique(data.load_mask(2))) == {0, 19, 255}
    assert data.sizes == [SIZE] * 3


def test_auto_takes_the_mask_where_there_is_no_xml(root: Path) -> None:
    (root / "Annotations/b.xml").unlink()
    write_mask(root, "b", [1, 20])
    data = read(root, "train_aug")
    assert classes_of(data, 0) == ["cat", "dog"]
    assert classes_of(data, 1) == ["aeroplane", "tvmonitor"]


def test_masks_are_not_needed_for_xml_labels(root: Path) -> None:
    shutil.rmtree(root / "SegmentationClassAug")
    data = read(root, "train_aug")
    assert len(data) == 3
    with pytest.raises(DatasetError, match=r"image 'a' of .* has no mask"):
        data.load_mask(0)


def test_original_masks_are_the_second_choice(root: Path) -> None:
    (root / "SegmentationClass").mkdir()
    write_mask(root, "a", [3])
    shutil.move(root / "SegmentationClassAug/a.png", root / "SegmentationClass/a.png")
    data = read(root, "train_aug", masks=True)
    assert set(np.unique(data.load_mask(0))) == {0, 3, 255}
    assert set(np.unique(data.load_mask(1))) == {0, 15, 255}


def test_classes_txt(root: Path) -> None:
    (root / "classes.txt").write_text("dog\ncat\nperson\ntrain\n")
    for name in OBJECTS:
        write_mask(root, name, [4])
    data = read(root, "train_aug")
    assert data.classes == ("dog", "cat", "person", "train")
    np.testing.assert_array_equal(data.labels, [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert classes_of(read(root, "train_aug", image_labels="mask"), 0) == ["train"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "one foreground class"), ("a\na\n", "each once"), ("background\na\n", "background")],
)
def test_wrong_classes_txt(root: Path, text: str, message: str) -> None:
    (root / "classes.txt").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read(root, "train_aug")


@pytest.mark.parametrize(
    "lines",
    [
        ["b", "a"],
        ["b  ", "", "a"],
        ["b.jpg", "JPEGImages/a.jpg"],
        ["/JPEGImages/b.jpg /SegmentationClassAug/b.png", "JPEGImages/a.jpg Seg/a.png"],
    ],
)
def test_forms_of_lists(root: Path, lines: list[str]) -> None:
    write_list(root, "mine", lines)
    assert list(read(root, "mine").names) == ["b", "a"]
    assert list(read(root, "mine.txt").names) == ["b", "a"]
    path = root / "ImageSets/Segmentation/mine.txt"
    assert list(read(root, str(path)).names) == ["b", "a"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(read(root, "mine").names) == ["b", "a"]


def test_names_can_be_given_and_may_hold_dots_and_spaces(root: Path) -> None:
    shutil.copy(root / "JPEGImages/a.jpg", root / "JPEGImages/my cat v1.5.jpg")
    write_xml(root, "my cat v1.5", ["cat"])
    write_list(root, "mine", ["my cat v1.5"])
    assert list(read(root, "mine").names) == ["my cat v1.5"]


# --- images of every kind --------------------------------------------------------------------


def test_modes_become_rgb(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (9, 11), dtype=np.uint8)
    grey = rgb[..., 0]
    cases = {
        "rgb": (Image.fromarray(rgb), rgb),
        "grey": (Image.fromarray(grey), np.repeat(grey[..., None], 3, 2)),
        "one_bit": (
            Image.fromarray(grey > 99),
            np.repeat((grey > 99)[..., None] * np.uint8(255), 3, 2),
        ),
        "rgba": (
            Image.fromarray(np.dstack([rgb, alpha])),
            np.round(rgb * (alpha[..., None] / 255)),
        ),
        "grey_alpha": (
            Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))),
            np.repeat(np.round(grey * (alpha / 255))[..., None], 3, 2),
        ),
        "sixteen_bit": (
            Image.fromarray(grey.astype(np.uint16) * 257),
            np.repeat(grey[..., None], 3, 2),
        ),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        result = read_rgb(tmp_path / f"{name}.png")
        assert result.dtype == np.uint8, name
        assert result.shape == (9, 11, 3), name
        assert np.abs(result.astype(float) - expected).max() <= 1, name


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    image.putpalette([10, 20, 30, 200, 0, 0, 7, 8, 9])
    image.save(tmp_path / "plain.png")
    expected = [[[10, 20, 30], [200, 0, 0]], [[7, 8, 9], [200, 0, 0]]]
    assert read_rgb(tmp_path / "plain.png").tolist() == expected
    image.save(tmp_path / "transparent.png", transparency=1)
    expected[0][1] = expected[1][1] = [0, 0, 0]
    assert read_rgb(tmp_path / "transparent.png").tolist() == expected


def test_cmyk(tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 16), (200, 60, 30))
    flat.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    with Image.open(tmp_path / "cmyk.jpg") as stored:
        assert stored.mode == "CMYK"
    assert np.abs(read_rgb(tmp_path / "cmyk.jpg").astype(int) - [200, 60, 30]).max() <= 6


def test_sixteen_bits_use_the_whole_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert read_rgb(tmp_path / "x.png")[0, :, 0].tolist() == [0, 128, 255]


def test_exif_orientation_is_not_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees to display
    with Image.open(root / "JPEGImages/a.jpg") as image:
        image.save(root / "JPEGImages/a.jpg", exif=exif)
    data = read(root, "train_aug", masks=True)
    assert data.load_image(0).shape[:2] == data.load_mask(0).shape == SIZE


def test_png_and_other_suffixes(root: Path) -> None:
    for name, suffix in (("a", ".png"), ("b", ".jpeg"), ("c", ".JPG")):
        path = root / f"JPEGImages/{name}.jpg"
        with Image.open(path) as image:
            copy = image.copy()
        path.unlink()
        copy.save(path.with_suffix(suffix))
    data = read(root, "train_aug")
    assert [data.load_image(i).shape for i in range(3)] == [(*SIZE, 3)] * 3


# --- trees that are not right ----------------------------------------------------------------


def test_no_root(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere.* is not a folder; set data\.root"):
        read(tmp_path / "nowhere", "val")


def test_half_a_tree_names_every_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, "val", masks=True)
    for folder in ("JPEGImages", "ImageSets/Segmentation", "Annotations"):
        assert str(tmp_path / folder) in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "image_labels", "load_masks"),
    [
        ("JPEGImages", "auto", False),
        ("ImageSets", "auto", False),
        ("Annotations", "xml", False),
        ("SegmentationClassAug", "mask", False),
    ],
)
def test_missing_folder(root: Path, gone: str, image_labels: str, load_masks: bool) -> None:
    shutil.rmtree(root / gone)
    with pytest.raises(DatasetError, match=f"not a whole VOC tree(.|\n)*{gone}"):
        read(root, "train_aug", image_labels=image_labels, masks=load_masks)


def test_folder_above_the_tree_is_recognised(root: Path) -> None:
    with pytest.raises(DatasetError, match=re.escape(f"Did you mean data.root={root} ?")):
        read(root.parent, "train_aug")


def test_missing_list_names_those_there_are(root: Path) -> None:
    write_list(root, "val", ["a"])
    with pytest.raises(DatasetError, match=r"vall\.txt.*there are: train_aug, val.*mean 'val'"):
        read(root, "vall")


def test_empty_and_repeating_lists(root: Path) -> None:
    write_list(root, "empty", [""])
    with pytest.raises(DatasetError, match=r"empty\.txt: the image list is empty"):
        read(root, "empty")
    write_list(root, "twice", ["a", "b", "a"])
    with pytest.raises(DatasetError, match=r"twice\.txt: 'a' is listed more than once"):
        read(root, "twice")


def test_missing_images_are_counted_and_the_first_ten_named(root: Path) -> None:
    write_list(root, "long", [*OBJECTS, *(f"lost{i:02}" for i in range(14))])
    with pytest.raises(DatasetError) as caught:
        read(root, "long")
    message = str(caught.value)
    assert "14 problems in split 'long'" in message
    assert "lost09.jpg" in message
    assert "lost10" not in message
    assert "and 4 more" in message
    listed = Path(message.split("all of them: ")[1].splitlines()[0])
    assert len(listed.read_text().splitlines()) == 14


def test_all_kinds_of_problems_are_gathered_in_one_error(root: Path) -> None:
    write_list(root, "train_aug", [*OBJECTS, "lost"])
    write_xml(root, "a", ["cat", "pesron"])
    (root / "Annotations/b.xml").write_text("<annotation><object>")
    write_mask(root, "c", [19], size=(SIZE[0], SIZE[1] + 1))
    with pytest.raises(DatasetError) as caught:
        read(root, "train_aug", masks=True)
    message = str(caught.value)
    assert "4 problems" in message
    assert "lost.jpg" in message
    assert re.search(r"a\.xml: unknown class 'pesron', did you mean 'person'", message)
    assert re.search(r"b\.xml: not readable as XML", message)
    assert re.search(r"c\.png: mask is 33x24 but its image is 32x24", message)


def test_unknown_class_without_a_near_one_lists_all(root: Path) -> None:
    write_xml(root, "a", ["zzqx"])
    with pytest.raises(DatasetError, match="unknown class 'zzqx', known: aeroplane, bicycle"):
        read(root, "train_aug")


def test_label_source_missing(root: Path) -> None:
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(DatasetError, match=r"b\.xml: no such file; image_labels=auto"):
        read(root, "train_aug", image_labels="xml")
    (root / "SegmentationClassAug/b.png").unlink()
    with pytest.raises(DatasetError, match=r"b\.xml: no such file, and no mask 'b\.png'"):
        read(root, "train_aug")
    with pytest.raises(DatasetError, match=r"b\.png: no such mask"):
        read(root, "train_aug", image_labels="mask")


def test_missing_mask_is_found_before_the_run(root: Path) -> None:
    (root / "SegmentationClassAug/c.png").unlink()
    assert len(read(root, "train_aug")) == 3
    with pytest.raises(DatasetError, match=r"c\.png: no such mask"):
        read(root, "train_aug", masks=True)


def test_unlabelled_images_are_left_out_of_training_only(root: Path) -> None:
    write_xml(root, "b", [])
    write_mask(root, "b", [0])
    with pytest.warns(UserWarning, match=r"left out 1 image without any labelled(.|\n)*- b"):
        data = read(root, "train_aug")
    assert list(data.names) == ["a", "c"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = VOC(root).open("train_aug", "evaluate")
    assert list(kept.names) == ["a", "b", "c"]
    assert not kept.labels[1].any()


def test_nothing_left(root: Path) -> None:
    for name in OBJECTS:
        write_xml(root, name, [])
    with (
        pytest.warns(UserWarning, match="left out 3"),
        pytest.raises(DatasetError, match="no usable image is left"),
    ):
        read(root, "train_aug")


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"image_labels": "masks"}, "expected auto, xml"), ({"on_error": "no"}, "raise or skip")],
)
def test_wrong_choice(root: Path, argument: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(root, "train_aug", **argument)


# --- broken files ----------------------------------------------------------------------------


def truncate(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"b\.jpg: cannot decode the image .*truncated"),
        (b"", r"b\.jpg: empty file"),
        (b"<html>404 Not Found</html>", r"b\.jpg: not a readable image"),
        (b"\xff\xd8\xff", r"b\.jpg: not a readable image"),
    ],
)
def test_broken_image_is_found_up_front(root: Path, content: bytes | None, message: str) -> None:
    path = root / "JPEGImages/b.jpg"
    truncate(path) if content is None else path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read(root, "train_aug")
    assert "on_error=skip" in str(caught.value)


def test_truncated_png_is_found_up_front(root: Path) -> None:
    with Image.open(root / "JPEGImages/b.jpg") as image:
        image.save(root / "JPEGImages/b.png")
    (root / "JPEGImages/b.jpg").unlink()
    truncate(root / "JPEGImages/b.png")
    with pytest.raises(DatasetError, match=r"b\.png"):
        read(root, "train_aug")


def test_bytes_after_the_end_marker_are_harmless(root: Path) -> None:
    with (root / "JPEGImages/b.jpg").open("ab") as file:
        file.write(b"camera maker's notes")
    assert len(read(root, "train_aug")) == 3


def test_skip_leaves_bad_images_out_and_names_them(root: Path) -> None:
    truncate(root / "JPEGImages/b.jpg")
    write_list(root, "train_aug", [*OBJECTS, "lost"])
    with pytest.warns(UserWarning, match=r"left out 2 of 4 images:(.|\n)*b\.jpg(.|\n)*lost\.jpg"):
        data = read(root, "train_aug", on_error="skip")
    assert list(data.names) == ["a", "c"]
    assert [classes_of(data, i) for i in range(2)] == [["cat", "dog"], ["train"]]


def test_skip_leaves_out_wrong_labels_and_masks_too(root: Path) -> None:
    write_xml(root, "a", ["pesron"])
    write_mask(root, "b", [15], size=(9, 9))
    with pytest.warns(UserWarning, match=r"left out 1 of 3 images:(.|\n)*pesron"):
        assert read(root, "train_aug", on_error="skip").names == ["b", "c"]
    with pytest.warns(UserWarning, match=r"left out 2 of 3(.|\n)*b\.png: mask is 9x9"):
        assert read(root, "train_aug", masks=True, on_error="skip").names == ["c"]


def test_repeated_names_can_be_skipped(root: Path) -> None:
    write_list(root, "twice", ["a", "b", "a"])
    with pytest.warns(UserWarning, match="left out 1 of 3"):
        assert read(root, "twice", on_error="skip").names == ["a", "b"]


def test_image_that_breaks_later_names_the_file(root: Path) -> None:
    data = read(root, "train_aug")
    truncate(root / "JPEGImages/b.jpg")
    with pytest.raises(DatasetError, match=r"b\.jpg: cannot decode"):
        data.load_image(1)
    (root / "JPEGImages/b.jpg").unlink()
    with pytest.raises(DatasetError, match=r"b\.jpg: no such image file"):
        data.load_image(1)


def test_mask_values_outside_the_classes(root: Path) -> None:
    write_mask(root, "a", [8, 21, 100])
    data = read(root, "train_aug", masks=True)
    with pytest.raises(DatasetError, match=r"a\.png: mask holds the values 21, 100, .*0\.\.20"):
        data.load_mask(0)
    with pytest.raises(DatasetError, match=r"a\.png: mask holds the values 21"):
        read(root, "train_aug", image_labels="mask")


def test_mask_in_colours_and_broken_mask(root: Path) -> None:
    path = root / "SegmentationClassAug/a.png"
    with Image.open(path) as mask:
        mask.convert("RGB").save(path)
    with pytest.raises(DatasetError, match=r"a\.png: mask has mode RGB.*palette or grey"):
        read(root, "train_aug", masks=True).load_mask(0)
    path.write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"a\.png: not a readable mask"):
        read(root, "train_aug", masks=True)


def test_mask_size_is_checked_at_load_too(root: Path) -> None:
    with pytest.raises(DatasetError, match="mask is 32x24 but its image is 10x10"):
        read_mask(root / "SegmentationClassAug/a.png", 20, (10, 10))


def test_grey_and_sixteen_bit_masks_are_read_as_they_are(tmp_path: Path) -> None:
    values = np.array([[0, 1, 20, 255]])
    for dtype in (np.uint8, np.uint16):
        Image.fromarray(values.astype(dtype)).save(tmp_path / "mask.png")
        mask = read_mask(tmp_path / "mask.png", 20)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, values)


# --- the real thing --------------------------------------------------------------------------


@pytest.fixture
def voc_mini(shared_dir: Path) -> Path:
    root = shared_dir / "data/voc_mini/VOC2012"
    if not root.is_dir():
        pytest.skip("voc_mini is not in the shared folder")
    return root


def test_voc_mini_counts(voc_mini: Path) -> None:
    train = read(voc_mini, "train_aug")
    val = read(voc_mini, "val", masks=True)
    assert (len(train), len(val)) == (811, 321)
    assert train.classes == val.classes == VOC_CLASSES
    assert train.labels.any(1).all()
    assert val.labels.any(0).all()
    assert train.load_image(0).shape[:2] == train.sizes[0]


def test_xml_and_mask_labels_agree_on_voc_mini(voc_mini: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in (voc_mini / "Annotations").glob("*.xml"))
    assert len(names) == 632
    path = tmp_path / "2007.txt"
    path.write_text("\n".join(names))
    by_xml = read(voc_mini, str(path), image_labels="xml")
    by_mask = read(voc_mini, str(path), image_labels="mask")
    np.testing.assert_array_equal(by_xml.labels, by_mask.labels)


def test_list_that_is_not_utf8(root: Path) -> None:
    (root / "ImageSets/Segmentation/train_aug.txt").write_bytes("b\xfcro\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"train_aug\.txt: not UTF-8"):
        read(root, "train_aug")
