"""What is kept of a data set: equal when read again, made again when anything changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.snapshot import snapshot
from tests.data.test_folder import SIZE, write_image, write_labels, write_lines, write_mask
from wsss.data import layout as layout_module
from wsss.data import manifest as manifest_module
from wsss.data.folder import Folder
from wsss.data.images import DatasetError
from wsss.data.layout import Layout
from wsss.data.manifest import (
    Item,
    Manifest,
    files_by_stem,
    relative,
    work_folder,
)
from wsss.data.voc import VOC
from wsss.errors import UserError
from wsss.files import write_atomically


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder: a and sub/c are train, b and d val, with masks."""
    root = tmp_path / "mine"
    for file in ("a.jpg", "b.jpg", "sub/c.jpg", "d.jpg"):
        write_image(root, file)
    write_labels(root, {"a": "cat", "b": "cat;dog", "sub/c": "dog", "d": "dog"})
    for name in ("b", "d"):
        write_mask(root, name, 2)
    return root


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A VOC tree of two images."""
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        Image.fromarray(np.ones(SIZE, np.uint8)).save(root / f"SegmentationClass/{name}.png")
        text = "<annotation><object><name>aeroplane</name></object></annotation>"
        (root / f"Annotations/{name}.xml").write_text(text)
    write_lines(root / "ImageSets/Segmentation/val.txt", ["a", "b"])
    return root


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were looked at, one entry for each time."""
    found: list[str] = []
    real = Layout._scan

    def scan(self: Layout, split: str, *arguments: Any) -> Manifest:
        found.append(split)
        return real(self, split, *arguments)

    monkeypatch.setattr(Layout, "_scan", scan)
    return found


def touch(path: Path) -> None:
    """Another time of change; the content stays."""
    changed = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(changed, changed))


def kept(root: Path, split: str = "val") -> Path:
    path = Folder(root).prepare(split).path
    assert path is not None
    return path


# --- the file --------------------------------------------------------------------------------


def whole() -> Manifest:
    items = [
        Item("a", "images/a.jpg", (3, 4), [0, 2], "masks/a.png", "patient 1", mask_classes=[2]),
        Item("ü b", problem="missing"),
        Item("c", "/elsewhere/c.jpg", (5, 6), [], "m.png", source="c.xml", mask_problem="no"),
        Item("d", "images/d.jpg", (7, 8), mask_classes=[]),
    ]
    options = {"percentiles": [0.5, 99.5], "year": None, "name": "x"}
    return Manifest(
        "folder", "val", ("cat", "Hündin"), items, options, True, True, ["b", "c"], ["note"], "st"
    )


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    manifest = whole()
    manifest.save(tmp_path / "new/m.json")
    again = Manifest.load(tmp_path / "new/m.json")
    assert again == manifest
    assert again is not manifest
    assert again.path == manifest.path == tmp_path / "new/m.json"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.json"]
    assert "Hündin" in (tmp_path / "new/m.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: json.dumps({**json.loads(text), "format": 0}),
        lambda text: json.dumps({**json.loads(text), "newer": 1}),
        lambda text: json.dumps({**json.loads(text), "items": [{"neither": 1}]}),
        lambda text: json.dumps({**json.loads(text), "items": 3}),
        lambda text: text.encode("utf-16"),
    ],
)
def test_a_file_that_is_not_right_is_made_again(
    root: Path, scans: list[str], change: Callable[[str], str | bytes]
) -> None:
    path = kept(root)
    good = path.read_bytes()
    changed = change(good.decode())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    assert Manifest.load(path) is None
    assert Folder(root).open("val").names == ["b", "d"]
    assert scans == ["val", "val"]
    assert path.read_bytes() == good


def test_no_file(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path / "no.json") is None
    assert Manifest.load(tmp_path) is None


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"older")
    with path.open("rb") as reader:
        write_atomically(path, b"old")
        assert reader.read() == b"older"  # whoever reads it goes on reading

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_a_plain_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_module, "write_atomically", full)
    with pytest.raises(DatasetError, match=r"mine: .*No space left on device"):
        Folder(root).open("val")


# --- when it is out of date ------------------------------------------------------------------


def test_a_second_call_writes_nothing(root: Path, scans: list[str]) -> None:
    first = {split: Folder(root).prepare(split, decode=True) for split in ("train", "val")}
    before = snapshot(root)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}  # of folders, too
    second = {split: Folder(root).prepare(split, decode=True) for split in ("train", "val")}
    assert second == first
    assert Folder(root).prepare("train") == first["train"]  # more than asked for is enough
    assert scans == ["train", "val"]
    assert snapshot(root) == before
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_decoding_is_asked_for_later(root: Path, scans: list[str]) -> None:
    assert not Folder(root).prepare("val").decoded
    assert Folder(root).prepare("val", decode=True).decoded
    assert Folder(root).prepare("val").decoded
    assert scans == ["val", "val"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "image touched": lambda root: touch(root / "images/b.jpg"),
    "image replaced": lambda root: write_image(root, "b.jpg", (5, 6)),
    "image of a folder touched": lambda root: touch(root / "images/d.jpg"),
    "image added": lambda root: write_image(root, "e.jpg"),
    "image added below": lambda root: write_image(root, "sub/e.jpg"),
    "image added in a new folder": lambda root: write_image(root, "new/e.jpg"),
    "image of the other split removed": lambda root: (root / "images/sub/c.jpg").unlink(),
    "image renamed": lambda root: (root / "images/b.jpg").rename(root / "images/z.jpg"),
    "mask touched": lambda root: touch(root / "masks/b.png"),
    "mask added": lambda root: write_mask(root, "a"),
    "mask added below": lambda root: write_mask(root, "sub/c"),
    "mask removed": lambda root: (root / "masks/b.png").unlink(),
    "labels touched": lambda root: touch(root / "labels.csv"),
    "classes come": lambda root: write_lines(root / "classes.txt", ["cat", "dog"]),
    "lists come": lambda root: [
        write_lines(root / f"{split}.txt", ["b"]) for split in ("train", "val")
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_makes_it_out_of_date(root: Path, scans: list[str], change: str) -> None:
    write_mask(root, "b", 2)
    (root / "masks/sub").mkdir()
    Folder(root).prepare("val")
    CHANGES[change](root)
    Folder(root).prepare("val")
    assert scans == ["val", "val"]
    Folder(root).prepare("val")
    assert scans == ["val", "val"]


def test_a_label_file_that_comes_later_is_read(root: Path) -> None:
    """Labels came from masks; the classes do not change with the file."""
    (root / "labels.csv").unlink()
    write_lines(root / "classes.txt", ["cat", "dog"])
    for name in ("a", "sub/c"):
        write_mask(root, name, 2)
    layout = Folder(root)
    splits = {split: layout.open(split).labels.tolist() for split in ("train", "val")}
    assert {tuple(row) for rows in splits.values() for row in rows} == {(0, 1)}
    write_labels(root, dict.fromkeys(("a", "b", "sub/c", "d"), "cat"))
    for split in splits:
        assert {tuple(row) for row in Folder(root).open(split).labels.tolist()} == {(1, 0)}


def test_an_object_that_stays_sees_changes(root: Path) -> None:
    """As in a notebook: what was read before does not get into the new manifest."""
    layout = Folder(root)
    assert layout.open("val").labels.tolist() == [[1, 1], [0, 1]]
    write_labels(root, {"a": "cat", "b": "dog", "d": "emu", "sub/c": "fox"})
    assert layout.open("val").classes == ("cat", "dog", "emu", "fox")
    assert layout.open("val").labels.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert Folder(root).open("val").labels.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: touch(root / "Annotations/a.xml"),
        lambda root: (root / "Annotations/b.xml").unlink(),
        lambda root: touch(root / "JPEGImages/a.jpg"),
        lambda root: touch(root / "SegmentationClass/b.png"),
        lambda root: (root / "SegmentationClassAug").mkdir(),
        lambda root: write_lines(root / "ImageSets/Segmentation/val.txt", ["b"]),
        lambda root: write_lines(root / "classes.txt", ["aeroplane", "cow"]),
    ],
)
def test_changes_of_a_voc_tree(
    voc: Path, scans: list[str], change: Callable[[Path], object]
) -> None:
    VOC(voc).prepare("val")
    VOC(voc).prepare("val")
    assert scans == ["val"]
    change(voc)
    VOC(voc).prepare("val")
    assert scans == ["val", "val"]


def test_files_of_no_interest_change_nothing(root: Path, voc: Path, scans: list[str]) -> None:
    Folder(root).prepare("val")
    VOC(voc).prepare("val")
    for path in (root, voc):
        (path / "README.md").write_text("x")
        (path / "notes").mkdir()
        (path / "notes/x.jpg").write_text("x")
    write_lines(voc / "ImageSets/Segmentation/more.txt", ["a"])
    Folder(root).prepare("val")
    VOC(voc).prepare("val")
    assert scans == ["val", "val"]


def test_options_have_manifests_of_their_own(root: Path, scans: list[str]) -> None:
    (root / "other.csv").write_text("image,labels\nb,fox\nd,fox\n")
    paths = set()
    for options in ({}, {"val_fraction": 0.2}, {"labels_file": "other.csv"}):
        for _ in range(2):
            paths.add(Folder(root, **options).prepare("val").path)
    assert len(paths) == len(scans) == 3
    (root / "masks").rename(root / "no_masks")
    share = {f: Folder(root, val_fraction=f).open("val").names for f in (0.01, 0.99)}
    assert [len(names) for names in share.values()] == [1, 3]


def test_a_moved_folder_is_still_known(root: Path, tmp_path: Path, scans: list[str]) -> None:
    write_lines(root / "classes.txt", ["cat", "dog"])
    labels = root / "labels.csv"
    for options in ({}, {"labels_file": labels}):
        first = Folder(root, **options).prepare("val")
        assert all(not Path(source).is_absolute() for source in first.sources)
    (tmp_path / "deep").mkdir()
    moved = root.rename(tmp_path / "deep/other")
    for options in ({}, {"labels_file": moved / "labels.csv"}):
        assert Folder(moved, **options).prepare("val") == first or not options
    assert scans == ["val", "val"]
    assert np.unique(Folder(moved).open("val").load_mask(0)).tolist() == [0, 2, 255]


def test_a_label_file_behind_a_link_is_watched(
    root: Path, tmp_path: Path, scans: list[str]
) -> None:
    """Going up from a link does not lead to where the link lies."""
    (tmp_path / "disk/deep").mkdir(parents=True)
    root.rename(tmp_path / "disk/deep/mine")
    root.symlink_to(tmp_path / "disk/deep/mine")
    (tmp_path / "tags.csv").write_text("image,labels\nb,cat\nd,dog\n")
    for _ in range(2):
        Folder(root, labels_file=tmp_path / "tags.csv").prepare("val")
    assert scans == ["val"]
    touch(tmp_path / "tags.csv")
    Folder(root, labels_file=tmp_path / "tags.csv").prepare("val")
    assert scans == ["val", "val"]


def test_relative_roots(root: Path, monkeypatch: pytest.MonkeyPatch, scans: list[str]) -> None:
    first = Folder(root).prepare("val")
    monkeypatch.chdir(root.parent)
    assert Folder("mine").prepare("val") == first
    monkeypatch.chdir(root)
    assert Folder(".").prepare("val") == first
    assert Folder(".").open("val").load_image(0).shape == (*SIZE, 3)
    assert relative(root / "labels.csv", Path()) == "labels.csv"
    assert relative(root.parent / "x", Path()) == str(root.parent / "x")
    assert scans == ["val"]


def test_names_of_splits_do_not_meet(root: Path) -> None:
    for split in ("train", "val", "a b", "a_b", "a/b"):
        write_labels(root, dict.fromkeys("abd", f"cat,{split}"), "image,labels,split")
        assert [item.name for item in Folder(root).prepare(split).items][:2] == ["a", "b"]
    assert len(list((root / "wsss").glob("*.json"))) == 5
    assert all(len(list((root / "wsss").glob(f"folder-{s}-*.json"))) == 1 for s in ("train", "b"))


# --- where it is kept ------------------------------------------------------------------------


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[Path]:
    """Folders below these cannot be written (permissions do not hinder the superuser)."""
    places: set[Path] = set()
    real = manifest_module.is_writable

    def is_writable(folder: Path) -> bool:
        return not any(folder.is_relative_to(place) for place in places) and real(folder)

    monkeypatch.setattr(manifest_module, "is_writable", is_writable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return places


def test_beside_the_data(root: Path, read_only: set[Path], tmp_path: Path) -> None:
    assert kept(root).parent == root / "wsss"
    assert not (tmp_path / "home").exists()


def test_read_only_data_go_into_the_cache(
    root: Path, read_only: set[Path], tmp_path: Path, scans: list[str]
) -> None:
    read_only.add(root)
    before = snapshot(root)
    folder = kept(root).parent
    assert folder.parent == tmp_path / "home/.cache/wsss"
    assert folder.name.startswith("mine-")
    assert kept(root).parent == folder
    touch(root / "labels.csv")
    assert kept(root).parent == folder
    assert scans == ["val", "val"]
    assert len(snapshot(root)) == len(before)
    other = root.rename(tmp_path / "other")
    read_only.add(other)
    assert kept(other).parent != folder  # another data set of that path may come


def test_named_cache_comes_first(
    root: Path, read_only: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "named"))
    (folder,) = {kept(root).parent, kept(root, "train").parent}
    assert folder.parent == tmp_path / "named"
    assert not (root / "wsss").exists()
    monkeypatch.setenv("WSSS_CACHE", "~/mine")
    assert kept(root).parent.parent == tmp_path / "home/mine"


def test_what_somebody_else_prepared_is_read(
    root: Path, read_only: set[Path], tmp_path: Path, scans: list[str]
) -> None:
    """An administrator prepares, the others read: no copy, nothing built again."""
    first = Folder(root).prepare("val", decode=True)
    read_only.add(root)
    second = Folder(root).prepare("val")
    assert (second, second.path) == (first, first.path)
    assert scans == ["val"]
    assert not (tmp_path / "home").exists()
    touch(root / "labels.csv")
    assert kept(root).is_relative_to(tmp_path / "home")


def test_nowhere_to_write(
    root: Path, read_only: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only.update((root, tmp_path / "home"))
    with pytest.raises(UserError, match=r"mine/wsss and .*home/\.cache/wsss/mine-.* cannot be w"):
        Folder(root).open("val")
    with pytest.raises(UserError, match="set the environment variable WSSS_CACHE to a folder"):
        work_folder(root)
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"home/mine-\w+ cannot be written"):
        Folder(root).open("val")
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "free"))
    assert Folder(root).open("val").names == ["b", "d"]


def test_is_writable(tmp_path: Path) -> None:
    assert manifest_module.is_writable(tmp_path / "new/one")
    assert list((tmp_path / "new/one").iterdir()) == []
    (tmp_path / "file").touch()
    assert not manifest_module.is_writable(tmp_path / "file")
    assert not manifest_module.is_writable(tmp_path / "file/below")


# --- several at once -------------------------------------------------------------------------


def test_threads_make_one_manifest(
    root: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Barrier(4, timeout=20)
    found: list[Any] = []

    def look() -> None:
        layout = Folder(root)
        started.wait()
        try:
            found.append(layout.open("val").labels.tolist())
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [[[1, 1], [0, 1]]] * 4
    assert scans == ["val"]
    assert {p.suffix for p in (root / "wsss").iterdir()} <= {".json", ".lock"}


def test_processes_make_one_manifest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the ranks of a run do: they start together, and one works."""
    fork = multiprocessing.get_context("fork")
    started, answers = fork.Barrier(3), fork.Queue()
    real = Layout._scan

    def scan(self: Layout, *arguments: Any) -> Manifest:
        answers.put("scanned")
        time.sleep(0.3)  # the others arrive
        return real(self, *arguments)

    def look() -> None:
        started.wait(30)
        answers.put(Folder(root).open("val").names)

    monkeypatch.setattr(Layout, "_scan", scan)
    processes = [fork.Process(target=look) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=30) for _ in range(4)]
    for process in processes:
        process.join(30)
    assert found.count("scanned") == 1
    assert found.count(["b", "d"]) == 3
    (path,) = (root / "wsss").glob("*.json")
    assert Manifest.load(path) == Folder(root).prepare("val")


# --- what the pixels say ---------------------------------------------------------------------


def test_decoding_finds_what_headers_do_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for file in ("jpeg.jpg", "png.png", "good.jpg"):
        path = tmp_path / "images" / file
        Image.fromarray(noise).save(path)
        if file != "good.jpg":
            content = bytearray(path.read_bytes())
            middle = len(content) // 2
            # Of a JPEG, decoders mend most: what is there must be no code at all.
            content[middle : middle + 200] = b"\xff" * 200
            path.write_bytes(content)
    write_labels(tmp_path, dict.fromkeys(("jpeg", "png", "good"), "cat"))
    for name, value in (("jpeg", 1), ("png", 1), ("good", 9)):
        write_mask(tmp_path, name, value, (64, 64))
    for split in ("train", "val"):
        write_lines(tmp_path / f"{split}.txt", ["jpeg", "png", "good"])
    # PIL decodes a PNG to find its EXIF, which a folder asks for.
    monkeypatch.setattr(Folder, "exif", False)
    seen = Folder(tmp_path).prepare("val").items
    assert [(i.problem, i.mask_problem, i.mask_classes) for i in seen] == [(None, None, None)] * 3
    seen = Folder(tmp_path).prepare("val", decode=True).items
    for item, file in zip(seen[:2], ("jpeg.jpg", "png.png"), strict=True):
        assert f"images/{file}: cannot decode the image (" in str(item.problem)
    assert seen[2].problem is None
    assert "good.png: mask holds the values 9, allowed are 0..1" in str(seen[2].mask_problem)


def test_classes_of_masks_are_noted(root: Path) -> None:
    write_mask(root, "d", 0)
    first, second = Folder(root).prepare("val", decode=True).items
    assert (first.labels, first.mask_classes) == ([0, 1], [1])
    assert (second.labels, second.mask_classes) == ([1], [])


def test_long_lists_show_progress(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, bool]] = []

    def track(items: Any, description: str, disable: bool, **options: Any) -> Any:
        shown.append((description, not disable))
        return items

    monkeypatch.setattr(layout_module, "track", track)
    Folder(root).prepare("val")
    monkeypatch.setattr(layout_module, "_PROGRESS_FROM", 1)
    Folder(root).prepare("train")
    assert shown == [("Checking val", False), ("Checking train", True)]


def test_files_by_stem(tmp_path: Path) -> None:
    for file in ("a.png", "a.JPG", "b.jpeg", "b.jpg", "c.txt", "x y.v1.jpg"):
        (tmp_path / file).touch()
    found = files_by_stem(tmp_path, (".jpg", ".jpeg", ".png"))
    assert found == {"a": "a.JPG", "b": "b.jpg", "x y.v1": "x y.v1.jpg"}
