"""ACDC's volumes as slices: which there are, how they are split, and what is grey in them."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.data.snapshot import snapshot
from wsss.data import acdc
from wsss.data.acdc import ACDC, ACDC_CLASSES
from wsss.data.images import DatasetError
from wsss.data.layout import Split

SHAPE = (12, 10, 3)  # X, Y, Z: width, height, slices

Volume = NDArray[Any]


def intensities(seed: int, shape: tuple[int, ...] = SHAPE) -> Volume:
    """Slices of very different brightness, with some voxels that stand out."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(0, 200, shape) + 300 * np.arange(shape[2])
    volume[0, 0, 0], volume[1, 1, -1] = -500, 9000
    return volume.astype(np.int16)


def regions(values: Iterable[int] = (1, 2, 3), shape: tuple[int, ...] = SHAPE) -> Volume:
    """A row of each value in every slice; a mask that is not symmetric."""
    mask = np.zeros(shape, np.uint8)
    for i, value in enumerate(values):
        mask[2 : 7 + i, 1 + i] = value
    return mask


def save(path: Path, volume: Volume) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.5, 1.5, 10.0, 1.0])), path)
    return path


def write_frame(
    folder: Path, number: int, image: Volume, mask: Volume | None, suffix: str = ".nii.gz"
) -> Path:
    stem = f"{folder.name}_frame{number:02d}"
    if mask is not None:
        save(folder / f"{stem}_gt{suffix}", mask)
    return save(folder / f"{stem}{suffix}", image)


def write_patient(folder: Path, seed: int, frames: Iterable[int] = (1, 12)) -> None:
    folder.mkdir(parents=True)
    frames = list(frames)
    for number in frames:
        write_frame(folder, number, intensities(100 * seed + number), regions())
    info = f"ED: {frames[0]}\nES: {frames[-1]}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\n"
    (folder / "Info.cfg").write_text(info)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four patients of two frames with three slices each: 18 in train, 6 in val."""
    for number in range(1, 5):
        write_patient(tmp_path / f"acdc/training/patient{number:03d}", number)
    return tmp_path / "acdc"


def patient(root: Path, number: int = 1) -> Path:
    return root / f"training/patient{number:03d}"


def masks(data: Split) -> dict[str, NDArray[np.uint8]]:
    return {name: data.load_mask(i) for i, name in enumerate(data.names)}


def pictures(data: Split) -> dict[str, NDArray[np.uint8]]:
    """Grey values by slice, after a look at the three channels."""
    found = {}
    for i, name in enumerate(data.names):
        image = data.load_image(i)
        assert (image == image[..., :1]).all()
        found[name] = image[..., 0]
    return found


def grey_values(volume: Volume, low: float = 0.5, high: float = 99.5) -> NDArray[np.uint8]:
    """The rule voxel by voxel: (Z, H, W) of an (X, Y, Z) volume."""
    values = sorted(float(v) for v in volume.ravel())

    def percentile(q: float) -> float:
        place = q / 100 * (len(values) - 1)
        below = math.floor(place)
        above = min(below + 1, len(values) - 1)
        return values[below] + (place - below) * (values[above] - values[below])

    black, white = percentile(low), percentile(high)
    result = np.zeros(volume.shape[::-1], np.uint8)
    for (x, y, z), value in np.ndenumerate(volume):
        share = (float(value) - black) / (white - black) if white > black else 0.0
        result[z, y, x] = round(255 * min(max(share, 0.0), 1.0))
    return result


# --- reading -----------------------------------------------------------------------------------


def test_reads_slices_of_the_two_frames(root: Path) -> None:
    save(patient(root) / "patient001_4d.nii.gz", np.zeros((*SHAPE, 30), np.int16))
    write_frame(patient(root), 7, intensities(99), regions())  # neither ED nor ES
    data = ACDC(root).open("train", "train_masks")
    expected = [
        f"patient{p:03d}_frame{f:02d}_slice_{z}"
        for p in (1, 2, 3)
        for f in (1, 12)
        for z in range(3)
    ]
    assert data.names == expected
    assert data.groups == [name[:10] for name in expected]
    assert data.classes == ACDC_CLASSES == ("right ventricle", "myocardium", "left ventricle")
    assert data.sizes == [(10, 12)] * 18
    assert data.labels.tolist() == [[1, 1, 1]] * 18
    for name, mask in masks(data).items():
        np.testing.assert_array_equal(mask, regions()[:, :, int(name[-1])].T)


def test_val_is_every_fourth_patient(root: Path) -> None:
    data = ACDC(root).open("val", "evaluate")
    assert set(data.groups) == {"patient004"}
    assert len(data) == 6
    assert data.has_masks
    assert ACDC(root).splits() == ["train", "val"]


def test_without_info_all_frames_are_taken(root: Path) -> None:
    (patient(root) / "Info.cfg").unlink()
    save(patient(root) / "patient001_4d.nii.gz", np.zeros((*SHAPE, 30), np.int16))
    write_frame(patient(root), 7, intensities(99), regions())
    names = ACDC(root).open("train").names
    assert len(names) == 21
    assert sum(name.startswith("patient001_frame07_") for name in names) == 3


@pytest.mark.parametrize("text", ["ED: 1\r\nES: 12\r\n", "Group: X\nES : 12\n ED:1\n"])
def test_forms_of_info(root: Path, text: str) -> None:
    (patient(root) / "Info.cfg").write_bytes(text.encode())
    write_frame(patient(root), 7, intensities(99), regions())
    assert len(ACDC(root).open("train")) == 18


@pytest.mark.parametrize("place", ["training", "database/training", "."])
def test_where_the_patients_lie(root: Path, tmp_path: Path, place: str) -> None:
    there = tmp_path / "there"
    (there / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(root / "training", there / place)
    assert len(ACDC(there).open("train")) == 18


def test_uncompressed_and_mixed_files(root: Path) -> None:
    folder = patient(root)
    for name in ("patient001_frame01.nii.gz", "patient001_frame12_gt.nii.gz"):
        path = folder / name
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    data = ACDC(root).open("train", "train_masks")
    assert len(data) == 18
    np.testing.assert_array_equal(masks(data)["patient001_frame12_slice_2"], regions()[:, :, 2].T)


def test_files_of_other_systems_are_not_taken(root: Path) -> None:
    """What macOS leaves in folders that its users pack."""
    for name in ("._patient001_frame01.nii.gz", "._patient001_frame05.nii.gz"):
        (patient(root) / name).write_bytes(b"Mac OS X")
    (patient(root) / "Info.cfg").unlink()
    (root / "training/patients.txt").write_text("four")
    (root / "training/patient_notes").mkdir()
    assert len(ACDC(root).open("train")) == 18


# --- splits ------------------------------------------------------------------------------------


def test_split_of_the_whole_challenge(tmp_path: Path) -> None:
    voxel = np.arange(4, dtype=np.int16).reshape(2, 2, 1)
    for number in range(1, 101):
        folder = tmp_path / f"training/patient{number:03d}"
        write_frame(folder, 1, voxel, (voxel > 0).astype(np.uint8))
    groups = {split: set(ACDC(tmp_path).open(split).groups) for split in ("train", "val")}
    assert {split: len(found) for split, found in groups.items()} == {"train": 75, "val": 25}
    assert not groups["train"] & groups["val"]
    held_out = sorted(int(name[7:]) for name in groups["val"])
    assert held_out == list(range(4, 101, 4))
    blocks = [(number - 1) // 20 for number in held_out]  # the five groups of diseases
    assert [blocks.count(block) for block in range(5)] == [5] * 5


def test_numbers_decide_not_the_letters_of_names(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4, 10, 11, 20, 30):
        write_frame(tmp_path / f"patient{number}", 1, intensities(number), regions())
    assert set(ACDC(tmp_path).open("val").groups) == {"patient4", "patient30"}


@pytest.mark.parametrize("number", [1, 3])
def test_too_few_patients(tmp_path: Path, number: int) -> None:
    for i in range(number):
        write_patient(tmp_path / f"training/patient{i:03d}", i)
    with pytest.raises(
        DatasetError, match=f"{number} patients; .*every fourth in val, 4 are needed"
    ):
        ACDC(tmp_path).open("train")


def test_patient_without_frames_keeps_its_place(root: Path) -> None:
    """If it were passed over, the patients after it would change sides."""
    for number in range(5, 9):
        write_patient(patient(root, number), number)
    shutil.rmtree(patient(root, 2))
    patient(root, 2).mkdir()
    message = r"patient002: holds no frame \(patient002_frame01\.nii\.gz\)"
    with pytest.raises(DatasetError, match=message):
        ACDC(root).open("train")
    with pytest.warns(UserWarning, match="patient002: holds no frame"):
        data = ACDC(root).open("train", on_error="skip")
    assert sorted(set(data.groups)) == [f"patient{i:03d}" for i in (1, 3, 5, 6, 7)]
    assert set(ACDC(root).open("val").groups) == {"patient004", "patient008"}


def test_testing_with_masks(root: Path) -> None:
    for number in (1, 101):  # one that training has as well
        write_patient(root / f"testing/patient{number:03d}", 7)
    assert ACDC(root).splits() == ["train", "val", "test"]
    train = ACDC(root).open("train")
    before = pictures(train)
    data = ACDC(root).open("test")
    assert set(data.groups) == {"patient001", "patient101"}
    assert len(data) == 12
    assert data.has_masks
    name = "patient001_frame01_slice_1"
    assert (pictures(data)[name] == grey_values(intensities(701))[1]).all()
    assert (pictures(train)[name] == before[name]).all()
    assert (before[name] == grey_values(intensities(101))[1]).all()


def test_testing_without_masks(root: Path) -> None:
    write_patient(root / "testing/patient101", 7)
    for path in (root / "testing/patient101").glob("*_gt.nii.gz"):
        path.unlink()
    data = ACDC(root).open("test", "evaluate")
    assert len(data) == 6
    assert not data.has_masks
    assert not data.labels.any()
    assert all(item.labels is None for item in ACDC(root).prepare("test").items)
    with pytest.raises(DatasetError, match=r"6 problems(.|\n)*'patient101_frame01_slice_0' has no"):
        ACDC(root).open("test", "train")


@pytest.mark.parametrize("split", ["test", "trian"])
def test_split_that_is_not_there(root: Path, split: str) -> None:
    with pytest.raises(DatasetError, match=f"split '{split}' of {root}: there are train, val"):
        ACDC(root).open(split)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with pytest.raises(DatasetError, match=r"neither patient folders.*nor slices.*Register at"):
        ACDC(tmp_path).open("train")
    with pytest.raises(DatasetError, match=r"is not a folder; set data\.root to the ACDC folder"):
        ACDC(tmp_path / "nowhere").open("train")


def test_folder_above_the_tree_is_recognised(root: Path) -> None:
    with pytest.raises(DatasetError, match=f"Did you mean data.root={root} ?"):
        ACDC(root.parent).open("train")


def test_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"download=true: ACDC .* registration\. Register at"):
        ACDC.download(tmp_path, percentiles=[1, 99])


# --- grey values -------------------------------------------------------------------------------


@pytest.mark.parametrize("percentiles", [(0.5, 99.5), (0.0, 100.0), (20, 60)])
def test_a_volume_is_scaled_as_a_whole(root: Path, percentiles: tuple[float, float]) -> None:
    found = pictures(ACDC(root, percentiles).open("train"))
    for frame in (1, 12):
        volume = intensities(200 + frame)
        expected = grey_values(volume, *percentiles)
        each_alone = [grey_values(volume[:, :, z : z + 1], *percentiles)[0] for z in range(3)]
        for z in range(3):
            grey = found[f"patient002_frame{frame:02d}_slice_{z}"]
            np.testing.assert_array_equal(grey, expected[z])
            assert (grey != each_alone[z]).any()


def test_other_percentiles_other_pictures(root: Path) -> None:
    narrow, wide = ACDC(root, [10, 90]), ACDC(root, (0, 100))
    first = pictures(narrow.open("train"))
    second = pictures(wide.open("train"))
    assert all((first[name] != second[name]).any() for name in first)
    before = snapshot(root)
    again = pictures(ACDC(root, [10, 90]).open("train"))  # both are kept
    assert all((first[name] == again[name]).all() for name in first)
    assert snapshot(root) == before


def test_percentiles_that_look_alike(root: Path) -> None:
    images = [pictures(ACDC(root, (0, high)).open("train")) for high in (99.9999999, 100)]
    folders = [path.name for path in (root / "wsss/acdc").iterdir()]
    assert len(folders) == 2
    assert len(images[0]) == len(images[1]) == 18


@pytest.mark.parametrize("percentiles", [(99, 1), (5, 5), (-1, 50), (0, 101), (1,), (1, 2, 3)])
def test_wrong_percentiles(tmp_path: Path, percentiles: tuple[float, ...]) -> None:
    with pytest.raises(DatasetError, match=r"percentiles=.*expected \[low, high\]"):
        ACDC(tmp_path, percentiles)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_constant_volume_is_black(root: Path, dtype: Any) -> None:
    write_frame(patient(root), 1, np.full(SHAPE, 700, dtype), regions())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pictures(ACDC(root).open("train"))
    assert all(not found[f"patient001_frame01_slice_{z}"].any() for z in range(3))


def test_nearly_constant_volume(root: Path) -> None:
    """Both percentiles are one value: what is above is white, without an overflow on the way."""
    volume = np.zeros((40, 40, 3), np.float32)
    volume[3, 4, 1] = 1e30
    write_frame(patient(root), 1, volume, regions(shape=volume.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pictures(ACDC(root).open("train"))
    assert np.argwhere(found["patient001_frame01_slice_1"] == 255).tolist() == [[4, 3]]
    assert all(found[f"patient001_frame01_slice_{z}"].sum() == 255 * (z == 1) for z in range(3))


def test_scale_of_the_header_is_applied(root: Path) -> None:
    image = nibabel.Nifti1Image(intensities(1), np.eye(4))
    image.header.set_slope_inter(0.5, -100)
    nibabel.save(image, patient(root) / "patient001_frame01.nii.gz")
    found = pictures(ACDC(root).open("train"))["patient001_frame01_slice_1"]
    np.testing.assert_array_equal(found, grey_values(intensities(1))[1])  # the same up to a scale


# --- labels ------------------------------------------------------------------------------------


def test_labels_are_the_values_of_the_mask(root: Path) -> None:
    mask = regions([3])
    mask[:, :, 1] = regions([2, 1])[:, :, 1]
    write_frame(patient(root), 1, intensities(1), mask)
    data = ACDC(root).open("train")
    assert data.labels[:3].tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 1]]


def test_slices_without_class_are_left_out_of_training_only(root: Path) -> None:
    for number in (1, 4):
        mask = regions()
        mask[:, :, 2] = 0
        write_frame(patient(root, number), 1, intensities(number), mask)
    message = r"left out 1 image without any labelled class:\n  - patient001_frame01_slice_2"
    with pytest.warns(UserWarning, match=message):
        data = ACDC(root).open("train", "train")
    assert len(data) == 17
    assert "patient001_frame01_slice_2" not in data.names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = ACDC(root).open("val", "evaluate")
    assert len(kept) == 6
    assert kept.labels.sum(1).tolist() == [3, 3, 0, 3, 3, 3]


def test_void_and_whole_floats_are_masks(root: Path) -> None:
    write_frame(patient(root), 1, intensities(1), regions([1, 255]).astype(np.float32))
    data = ACDC(root).open("train")
    assert data.labels[0].tolist() == [1, 0, 0]
    assert set(np.unique(data.load_mask(0))) == {0, 1, 255}


def test_classes_txt(root: Path) -> None:
    write_frame(patient(root), 1, intensities(1), regions([4]))
    with pytest.raises(DatasetError, match=r"frame01_gt\.nii\.gz: mask holds the values 4, "):
        ACDC(root).open("train")
    (root / "classes.txt").write_text("w\nx\ny\nz\n")
    data = ACDC(root).open("train")
    assert data.classes == ("w", "x", "y", "z")
    assert data.labels[0].tolist() == [0, 0, 0, 1]
    (root / "classes.txt").unlink()
    with pytest.raises(DatasetError, match=r"frame01_gt\.nii\.gz: mask holds the values 4, "):
        ACDC(root).open("train")


def test_training_volume_without_mask(root: Path) -> None:
    (patient(root) / "patient001_frame12_gt.nii.gz").rename(root / "away.nii.gz")
    for purpose in ("train", "evaluate"):
        with pytest.raises(
            DatasetError, match=r"3 problems(.|\n)*frame12_slice_0' has no mask; add"
        ):
            ACDC(root).open("train", purpose)
    with pytest.warns(UserWarning, match="left out 3 of 18"):
        assert len(ACDC(root).open("train", on_error="skip")) == 15
    (root / "away.nii.gz").rename(patient(root) / "patient001_frame12_gt.nii.gz")
    assert len(ACDC(root).open("train")) == 18  # noticed


# --- files that are not right ------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_value(value: float) -> Volume:
    mask = regions().astype(np.float32)
    mask[3, 3, 1] = value
    return mask


IMAGE, MASK = "patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz"
BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut": (IMAGE, cut, "not readable as NIfTI"),
    "cut mask": (MASK, cut, "not readable as NIfTI"),
    "empty": (IMAGE, lambda p: p.write_bytes(b""), "not readable as NIfTI"),
    "web page": (IMAGE, lambda p: p.write_bytes(b"<html>"), "not readable as NIfTI"),
    "absent": (IMAGE, Path.unlink, "no such file; Info.cfg names this frame"),
    "series": (IMAGE, lambda p: save(p, np.zeros((*SHAPE, 2))), r"array of \(12, 10, 3, 2\)"),
    "slice": (IMAGE, lambda p: save(p, np.zeros((12, 10))), r"array of \(12, 10\)"),
    "not a number": (IMAGE, lambda p: save(p, np.full(SHAPE, np.nan)), "no finite numbers"),
    "beyond 32 bits": (IMAGE, lambda p: save(p, np.full(SHAPE, 1e300)), "no finite numbers"),
    "complex": (IMAGE, lambda p: save(p, np.zeros(SHAPE, np.complex64)), "complex64 intensities"),
    "other size": (MASK, lambda p: save(p, regions(shape=(10, 12, 3))), r"mask of \(10, 12, 3\)"),
    "fewer slices": (MASK, lambda p: save(p, regions(shape=(12, 10, 2))), r"has \(12, 10, 3\)"),
    "fraction": (MASK, lambda p: save(p, with_value(1.5)), r"values 1\.5, allowed are 0\.\.3"),
    "near a class": (MASK, lambda p: save(p, with_value(2.001)), "values 2.001"),
    "negative": (MASK, lambda p: save(p, with_value(-1)), "values -1"),
    "unknown class": (MASK, lambda p: save(p, with_value(4)), "values 4, allowed are 0..3 and 255"),
    "wraps to a class": (MASK, lambda p: save(p, with_value(257)), "values 257"),
    "no number": (MASK, lambda p: save(p, with_value(np.nan)), "values nan"),
}


@pytest.mark.parametrize(("name", "spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_volume(root: Path, name: str, spoil: Callable[[Path], Any], message: str) -> None:
    path = patient(root) / name
    whole = path.read_bytes()
    spoil(path)
    with pytest.raises(DatasetError, match=f"1 problem in(.|\n)*{path}: .*{message}"):
        ACDC(root).open("train")
    with pytest.warns(UserWarning, match=f"left out 1 of (.|\n)*{path}"):
        data = ACDC(root).open("train", on_error="skip")
    assert len(data) == 15
    assert not any(name.startswith("patient001_frame01") for name in data.names)
    path.write_bytes(whole)
    assert len(ACDC(root).open("train")) == 18  # noticed


# --- preparing again ---------------------------------------------------------------------------


def forbid(*args: Any) -> Any:
    raise AssertionError("called")


def test_second_call_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {split: ACDC(root).prepare(split, decode=True) for split in ("train", "val")}
    before = snapshot(root)
    monkeypatch.setattr(acdc, "_load_nifti", forbid)
    for split, manifest in first.items():
        assert ACDC(root).prepare(split, decode=True) == manifest
        assert ACDC(root).prepare(split) == manifest
    assert snapshot(root) == before


def test_pictures_are_not_written_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that is lost, or asked to look closer, needs no volume again."""
    first = ACDC(root).prepare("train")
    folder = root / "wsss/acdc"
    before = snapshot(folder)
    monkeypatch.setattr(acdc, "_load_nifti", forbid)
    second = ACDC(root).prepare("train", decode=True)
    assert (first.decoded, second.decoded) == (False, True)
    assert second.items == first.items
    assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_lost_picture_is_written_again(root: Path, kind: str) -> None:
    before = pictures(ACDC(root).open("train"))
    (path,) = (root / "wsss/acdc").glob(f"*/{kind}/patient001_frame01_slice_1.png")
    path.unlink()
    data = ACDC(root).open("train", "train_masks")
    assert all((grey == before[name]).all() for name, grey in pictures(data).items())
    assert all(mask.any() for mask in masks(data).values())


@pytest.mark.parametrize("old", [False, True])
def test_changed_volume_is_cut_anew(root: Path, old: bool) -> None:
    ACDC(root).prepare("train")
    others = snapshot(root / "wsss/acdc")
    path = write_frame(patient(root), 1, intensities(77), regions([2]))
    if old:  # unpacked from an archive, it has the time it had there
        for changed in (path, path.with_name(MASK)):
            os.utime(changed, (1e9, 1e9))
    data = ACDC(root).open("train", "train_masks")
    np.testing.assert_array_equal(
        pictures(data)["patient001_frame01_slice_1"], grey_values(intensities(77))[1]
    )
    assert data.labels[0].tolist() == [0, 1, 0]
    for path, stamp in snapshot(root / "wsss/acdc").items():
        assert ("patient001_frame01" in path) == (stamp != others[path])


def test_changed_volume_of_the_same_size_is_cut_anew(root: Path) -> None:
    for path in patient(root).glob("patient001_frame01*"):
        path.unlink()
    path = write_frame(patient(root), 1, intensities(1), regions(), suffix=".nii")
    size = path.stat().st_size
    ACDC(root).prepare("train")
    save(path, intensities(77))
    assert path.stat().st_size == size
    found = pictures(ACDC(root).open("train"))["patient001_frame01_slice_1"]
    np.testing.assert_array_equal(found, grey_values(intensities(77))[1])


def test_new_patients_and_frames_are_noticed(root: Path) -> None:
    layout = ACDC(root)  # by a layout that is kept, too
    assert len(layout.open("train")) == 18
    write_patient(patient(root, 5), 5)
    assert len(layout.open("train")) == 24
    write_frame(patient(root), 7, intensities(9), regions())
    (patient(root) / "Info.cfg").write_text("ED: 1\nES: 7\n")
    names = layout.open("train").names
    assert "patient001_frame07_slice_0" in names
    assert "patient001_frame12_slice_0" not in names
    shutil.rmtree(patient(root, 2))
    assert set(layout.open("val").groups) == {"patient005"}


def test_interrupted_cutting_resumes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = acdc.write_atomically, iter(range(99))

    def stop_early(path: Path, content: bytes) -> None:
        if next(calls) >= 10:  # in the second volume
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(acdc, "write_atomically", stop_early)
        patch.setattr("wsss.data.layout._THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            ACDC(root).prepare("train")
    first = snapshot(root / "wsss/acdc")
    data = ACDC(root).open("train", "train_masks")
    found = pictures(data)
    for p in (1, 2, 3):
        for f in (1, 12):
            for z, expected in enumerate(grey_values(intensities(100 * p + f))):
                assert (found[f"patient{p:03d}_frame{f:02d}_slice_{z}"] == expected).all()
    kept = {k: v for k, v in snapshot(root / "wsss/acdc").items() if first.get(k) == v}
    assert len(kept) == 7  # the first volume and its record


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"source": 1}'])
def test_damaged_record_is_harmless(root: Path, text: str) -> None:
    ACDC(root).prepare("train")
    for record in (root / "wsss/acdc").rglob("*.json"):
        record.write_text(text)
    for manifest in (root / "wsss").glob("*.json"):
        manifest.unlink()
    assert len(ACDC(root).open("train", "train_masks")) == 18


# --- HDF5 slices -------------------------------------------------------------------------------


def write_slice(path: Path, image: Volume | None, label: Volume | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if image is not None:
            file["image"] = image
        if label is not None:
            file["label"] = label
    return path


def write_slices(folder: Path, patients: Iterable[int] = (1, 2, 3, 4), number: int = 12) -> Path:
    for p in patients:
        volume = intensities(p, (10, 8, number)).astype(np.float32)
        mask = regions(shape=volume.shape)
        for z in range(number):
            name = f"patient{p:03d}_frame01_slice_{z}.h5"
            write_slice(folder / name, volume[:, :, z], mask[:, :, z])
    return folder


@pytest.fixture
def slices(tmp_path: Path) -> Path:
    return write_slices(tmp_path / "slices_only")


def test_hdf5_slices_in_natural_order(slices: Path) -> None:
    data = ACDC(slices).open("train", "train_masks")
    expected = [f"patient{p:03d}_frame01_slice_{z}" for p in (1, 2, 3) for z in range(12)]
    assert data.names == expected
    assert data.groups == [name[:10] for name in expected]
    assert set(ACDC(slices).open("val").groups) == {"patient004"}
    found, drawn = masks(data), pictures(data)
    for p in (1, 2, 3):
        volume = intensities(p, (10, 8, 12))
        grey = grey_values(volume.transpose(1, 0, 2))  # stored as (H, W) already
        for z in range(12):
            name = f"patient{p:03d}_frame01_slice_{z}"
            np.testing.assert_array_equal(drawn[name], grey[z])
            np.testing.assert_array_equal(found[name], regions(shape=volume.shape)[:, :, z])


@pytest.mark.parametrize("place", [".", "slices", "data/slices"])
def test_where_hdf5_slices_lie(tmp_path: Path, place: str) -> None:
    write_slices(tmp_path / place, number=2)
    (tmp_path / "training").mkdir()  # empty: no reason to give up
    assert len(ACDC(tmp_path).open("train")) == 6


def test_hdf5_names(tmp_path: Path) -> None:
    write_slices(tmp_path, number=2)
    for path in tmp_path.glob("*.h5"):
        path.rename(tmp_path / path.name.replace("slice_", "slice"))
    for other in ("._", "~"):  # of macOS, of an editor
        (tmp_path / f"{other}patient001_frame01_slice0.h5").write_bytes(b"no slice")
    (tmp_path / "patient001_frame01.h5").write_bytes(b"a whole volume")
    assert ACDC(tmp_path).open("train").names[:2] == [
        "patient001_frame01_slice0",
        "patient001_frame01_slice1",
    ]


def test_hdf5_without_any_label(slices: Path) -> None:
    for path in slices.glob("*.h5"):
        with h5py.File(path, "a") as file:
            del file["label"]
    data = ACDC(slices).open("val", "evaluate")
    assert not data.has_masks
    with pytest.raises(DatasetError, match="'patient001_frame01_slice_0' has no mask"):
        ACDC(slices).open("train", "train")


FLAT = intensities(0, (10, 8, 12))[:, :, 0]
BROKEN_H5: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "not readable as a slice"),
    "empty": (lambda p: p.write_bytes(b""), "not readable as a slice"),
    "web page": (lambda p: p.write_bytes(b"<html>"), "not readable as a slice"),
    "no image": (lambda p: write_slice(p, None, FLAT * 0), "not readable .*'image'"),
    "no label": (lambda p: write_slice(p, FLAT, None), "some slices .* have a 'label', others not"),
    "other size": (lambda p: write_slice(p, FLAT, FLAT[1:] * 0), r"\(10, 8\) and label \(9, 8\)"),
    "volume": (lambda p: write_slice(p, FLAT[None], FLAT[None] * 0), r"image \(1, 10, 8\)"),
    "no pixel": (lambda p: write_slice(p, FLAT[:0], FLAT[:0]), r"image \(0, 8\)"),
    "not a number": (lambda p: write_slice(p, FLAT * np.nan, FLAT * 0), "no finite numbers"),
    "unknown class": (lambda p: write_slice(p, FLAT, FLAT * 0 + 5), "values 5, allowed are 0..3"),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN_H5.values(), ids=BROKEN_H5)
def test_broken_slice(slices: Path, spoil: Callable[[Path], Any], message: str) -> None:
    path = slices / "patient002_frame01_slice_3.h5"
    whole = path.read_bytes()
    spoil(path)
    named = path if message[:4] != "some" else slices / "patient002_frame01_slice_0.h5"
    with pytest.raises(DatasetError, match=f"{named}: .*{message}"):
        ACDC(slices).open("train")
    with pytest.warns(UserWarning, match="left out 1 of"):
        data = ACDC(slices).open("train", on_error="skip")
    assert set(data.groups) == {"patient001", "patient003"}
    path.write_bytes(whole)
    assert len(ACDC(slices).open("train")) == 36


def test_hdf5_second_call_changes_nothing(slices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ACDC(slices).prepare("train", decode=True)
    before = snapshot(slices)
    with monkeypatch.context() as patch:
        patch.setattr(acdc, "_as_intensities", forbid)
        assert ACDC(slices).prepare("train", decode=True) == first
    assert snapshot(slices) == before
    write_slices(slices, [5])
    assert len(ACDC(slices).open("train")) == 48


# --- the real thing ----------------------------------------------------------------------------


@pytest.fixture
def acdc_mini(shared_dir: Path) -> Path:
    root = shared_dir / "data/acdc_mini"
    if not root.is_dir():
        pytest.skip("acdc_mini is not in the shared folder")
    return root


def test_acdc_mini(acdc_mini: Path) -> None:
    layout = ACDC(acdc_mini)
    assert layout.splits() == ["train", "val"]
    splits = {split: layout.open(split) for split in layout.splits()}
    train, val = (set(splits[split].groups) for split in ("train", "val"))
    assert (len(train), len(val), len(train | val)) == (10, 3, 13)
    assert sum(len(data) for data in splits.values()) == 230
    seen = set()
    for data in splits.values():
        assert len(data.classes) == 3
        volumes: dict[str, list[int]] = {}
        for i, name in enumerate(data.names):
            with h5py.File(acdc_mini / f"slices/{name}.h5") as file:
                image, label = np.asarray(file["image"]), np.asarray(file["label"])
            np.testing.assert_array_equal(data.load_mask(i), label, err_msg=name)
            assert set(np.flatnonzero(data.labels[i]) + 1) == set(np.unique(label).tolist()) - {0}
            if i % 10 == 0:  # up to the clipping, grey values keep the order of the intensities
                grey = data.load_image(i)[..., 0].astype(int).ravel()
                assert (np.diff(grey[np.argsort(image, axis=None)]) >= 0).all(), name
            volume, z = name.rsplit("_", 1)
            volumes.setdefault(volume, []).append(int(z))
            seen.add(name)
        assert all(numbers == sorted(numbers) for numbers in volumes.values())
    assert seen == {path.stem for path in (acdc_mini / "slices").iterdir()}
