"""SBD beside a VOC tree: train_aug derived, masks built; and fetching both, and COCO."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import sparse
from scipy.io import savemat

from tests.data.snapshot import snapshot
from tests.data.test_download import tar_bytes, zip_bytes
from wsss.data import sbd
from wsss.data.coco import COCO
from wsss.data.download import ARCHIVES, fetch_and_unpack
from wsss.data.images import DatasetError
from wsss.data.layout import Split
from wsss.data.sbd import SBD, read_sbd_mask
from wsss.data.voc import VOC

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = (14, 18)  # height, width
# In VOC's train and in its val; in SBD's train and in its val, which overlap them.
VOC_LISTS = {"train": ["v1", "both"], "val": ["w1", "w2"]}
SBD_LISTS = {"train": ["s9", "both", "w1"], "val": ["s1"]}
TRAIN_AUG = ["both", "s1", "s9", "v1"]


def mask_of(value: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    mask = np.zeros(size, np.uint8)
    mask[2:9, 1:6] = value
    return mask


def write_mat(path: Path, mask: NDArray[Any]) -> Path:
    """The structure of SBD's own files."""
    flat = mask.reshape(len(mask), -1)
    boundaries = np.empty((20, 1), object)
    for i in range(20):
        boundaries[i, 0] = sparse.csc_matrix(flat == i + 1, dtype=bool)
    content = {
        "Boundaries": boundaries,
        "Segmentation": mask,
        "CategoriesPresent": np.setdiff1d(flat, [0]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"GTcls": content}, do_compression=True)
    return path


def write_sbd(folder: Path, lists: dict[str, list[str]] = SBD_LISTS) -> Path:
    (folder / "cls").mkdir(parents=True)
    for split, names in lists.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            write_mat(folder / f"cls/{name}.mat", mask_of(7))
    return folder


def write_png(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask_of(value)).save(path)


def write_xml(root: Path, name: str, kind: str) -> None:
    (root / "Annotations").mkdir(exist_ok=True)
    text = f"<annotation><object><name>{kind}</name></object></annotation>"
    (root / f"Annotations/{name}.xml").write_text(text)


def write_voc(root: Path) -> Path:
    """A tree as VOC's archive has it: masks of its own lists, images of SBD's too."""
    for folder in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for split, names in VOC_LISTS.items():
        lines = "".join(f"{name}\n" for name in names)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(lines)
        for name in names:
            write_png(root / f"SegmentationClass/{name}.png", 3)
    for i, name in enumerate(sorted({*VOC_LISTS["train"], *VOC_LISTS["val"], *TRAIN_AUG})):
        color = (40 * i, 250 - 40 * i, 99)
        Image.new("RGB", SIZE[::-1], color).save(root / f"JPEGImages/{name}.jpg")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_voc(tmp_path / "devkit/VOC2012")
    write_sbd(root / "SBD")
    return root


def classes(data: Split) -> dict[str, list[str]]:
    return {
        name: [data.classes[i] for i in np.flatnonzero(row)]
        for name, row in zip(data.names, data.labels, strict=True)
    }


def values(data: Split) -> dict[str, list[int]]:
    """Values of each mask."""
    return {n: np.unique(data.load_mask(i)).tolist() for i, n in enumerate(data.names)}


# --- train_aug ---------------------------------------------------------------------------------


def test_train_aug_is_derived(root: Path) -> None:
    layout = VOC(root)
    assert layout.splits() == ["train", "val", "train_aug"]
    data = layout.open("train_aug", "train_masks")
    assert data.names == TRAIN_AUG
    # VOC's own mask where there is one, SBD's where not; labels from whichever it is
    assert values(data) == {"both": [0, 3], "s1": [0, 7], "s9": [0, 7], "v1": [0, 3]}
    assert classes(data) == {"both": ["bird"], "s1": ["car"], "s9": ["car"], "v1": ["bird"]}
    np.testing.assert_array_equal(data.load_mask(1), mask_of(7))
    built = root / "wsss/SegmentationClassAug"
    assert sorted(path.name for path in built.iterdir()) == ["s1.png", "s9.png"]
    notes = "\n".join(layout.prepare("train_aug").notes)
    assert "train_aug: 4 images, derived from VOC train and SBD train and val without" in notes
    assert f"2 masks from SBD in {built}" in notes


def test_built_masks_are_png_like_vocs_own(root: Path) -> None:
    VOC(root).prepare("train_aug")
    with Image.open(root / "wsss/SegmentationClassAug/s1.png") as png:
        assert png.mode == "P"
        assert png.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]


def test_xml_goes_before_the_built_mask(root: Path) -> None:
    write_xml(root, "s1", "sofa")
    data = VOC(root).open("train_aug", "train_masks")
    assert classes(data)["s1"] == ["sofa"]
    assert values(data)["s1"] == [0, 7]


def test_a_list_of_that_name_is_preferred(root: Path) -> None:
    assert VOC(root).open("train_aug").names == TRAIN_AUG
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("s9\nv1\n")  # noticed
    assert VOC(root).open("train_aug").names == ["s9", "v1"]
    assert VOC(root).splits() == ["train", "train_aug", "val"]


def test_masks_in_order_of_preference(root: Path) -> None:
    def of_both_and_s1() -> list[list[int]]:
        found = values(VOC(root).open("train_aug", "train_masks"))
        return [found["both"], found["s1"]]

    assert of_both_and_s1() == [[0, 3], [0, 7]]
    write_png(root / "SegmentationClass/s1.png", 4)
    assert of_both_and_s1() == [[0, 3], [0, 4]]
    for name in ("both", "s1"):
        write_png(root / f"SegmentationClassAug/{name}.png", 5)
    assert of_both_and_s1() == [[0, 5], [0, 5]]
    for folder in ("SegmentationClassAug", "SegmentationClass"):
        (root / folder / "both.png").unlink()
    assert of_both_and_s1() == [[0, 7], [0, 5]]


def test_full_size_lists(shared_dir: Path, tmp_path: Path) -> None:
    lists = shared_dir / "data/voc_lists"
    if not lists.is_dir():
        pytest.skip("voc_lists is not in the shared folder")
    train_aug, val = ((lists / f"{n}.txt").read_text().split() for n in ("train_aug", "val"))
    assert (len(train_aug), len(val)) == (10582, 1449)
    rng = np.random.default_rng(0)
    train = [str(name) for name in rng.choice(train_aug, 1464, replace=False)]
    # SBD has most of VOC's train and much of its val, and is as large as it is.
    held = sorted(set(train_aug) - set(train[:330])) + [
        str(n) for n in rng.choice(val, 1103, False)
    ]
    held = [str(name) for name in rng.permutation(held)]
    assert len(held) == 8498 + 2857
    folder = tmp_path / "ImageSets/Segmentation"
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "SBD/cls").mkdir(parents=True)
    folder.mkdir(parents=True)
    for path, names in (
        (folder / "train.txt", train),
        (folder / "val.txt", val),
        (tmp_path / "SBD/train.txt", held[:8498]),
        (tmp_path / "SBD/val.txt", held[8498:]),
    ):
        path.write_text("\n".join(names) + "\n")
    layout = VOC(tmp_path)
    listing = layout.list_split("train_aug")
    assert [item.name for item in listing.items] == train_aug  # names and order
    assert any("10582 images" in note for note in listing.notes)
    assert [item.name for item in layout.list_split("val").items] == val


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_aug_needs_both_lists_of_voc(root: Path, split: str) -> None:
    path = root / f"ImageSets/Segmentation/{split}.txt"
    path.unlink()
    assert "train_aug" not in VOC(root).splits()
    with pytest.raises(DatasetError, match=f"{path}: no such image list; train_aug is derived"):
        VOC(root).open("train_aug")


def test_no_list_and_no_sbd(root: Path) -> None:
    shutil.rmtree(root / "SBD")
    with pytest.raises(DatasetError, match=rf"derived if SBD lies in {root / 'SBD'} \(cls, train"):
        VOC(root).open("train_aug")


# --- where SBD is sought -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SBD", "sbd", "benchmark_RELEASE/dataset"])
@pytest.mark.parametrize("above", [".", "..", "../.."])
def test_where_sbd_is_sought(root: Path, tmp_path: Path, name: str, above: str) -> None:
    place = (root / above).resolve() / name
    away = (root / "SBD").rename(tmp_path / "away")
    assert "train_aug" not in VOC(root).splits()
    place.parent.mkdir(parents=True, exist_ok=True)
    away.rename(place)
    found = SBD.find(root)
    assert found is not None
    assert found.root == place
    assert VOC(root).open("train_aug").names == TRAIN_AUG


def test_nearest_sbd_wins(root: Path) -> None:
    write_sbd(root.parent / "SBD", {"train": ["other"], "val": []})
    assert VOC(root).open("train_aug").names == TRAIN_AUG


def test_relative_roots(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "SBD").rename(root.parent / "SBD")
    monkeypatch.chdir(root)
    assert VOC(".").open("train_aug").names == TRAIN_AUG


@pytest.mark.parametrize("gone", ["cls", "train.txt", "val.txt"])
def test_half_an_sbd_is_none(root: Path, gone: str) -> None:
    path = root / "SBD" / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert SBD.find(root) is None
    with pytest.raises(DatasetError, match=r"sbd_root=.*holds no cls folder with train\.txt and"):
        VOC(root, sbd_root=root / "SBD")


@pytest.mark.parametrize("inside", [".", "dataset", "benchmark_RELEASE/dataset"])
def test_sbd_root(root: Path, tmp_path: Path, inside: str) -> None:
    (root / "SBD").rename(tmp_path / "away")
    place = tmp_path / "elsewhere" / inside
    place.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "away").rename(place)
    assert "train_aug" not in VOC(root).splits()
    data = VOC(root, sbd_root=tmp_path / "elsewhere").open("train_aug", "train_masks")
    assert values(data)["s1"] == [0, 7]


def test_wrong_sbd_root(root: Path, tmp_path: Path) -> None:
    for wrong in (root, tmp_path / "nowhere"):
        with pytest.raises(DatasetError, match=f"sbd_root='{wrong}': holds no cls folder"):
            VOC(root, sbd_root=wrong)  # although there is one where it is sought


# --- masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(14, 18), (1, 18), (14, 1), (1, 1)])
def test_mask_as_it_is_stored(tmp_path: Path, size: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 21, size, dtype=np.uint8)
    found = read_sbd_mask(write_mat(tmp_path / "a.mat", mask))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, mask)
    assert found.shape == size


def test_whole_numbers_of_other_types_are_classes(tmp_path: Path) -> None:
    found = read_sbd_mask(write_mat(tmp_path / "a.mat", mask_of(20).astype(np.float64)))
    np.testing.assert_array_equal(found, mask_of(20))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "not readable as an SBD mask"),
    "empty": (lambda p: p.write_bytes(b""), "not readable as an SBD mask"),
    "web page": (lambda p: p.write_bytes(b"<html>404</html>" * 20), "not readable as an SBD mask"),
    "instances": (lambda p: savemat(p, {"GTinst": {"Segmentation": mask_of(1)}}), "GTcls"),
    "no struct": (lambda p: savemat(p, {"GTcls": mask_of(1)}), "not readable as an SBD mask"),
    "no field": (lambda p: savemat(p, {"GTcls": {"Boundaries": mask_of(1)}}), "Segmentation"),
    "too large": (lambda p: write_mat(p, mask_of(7).astype(np.uint16) * 256), "0..1792, no class"),
    "fractions": (lambda p: write_mat(p, mask_of(7) / 2), r"0\.0\.\.3\.5, no class numbers"),
    "colours": (lambda p: write_mat(p, np.stack([mask_of(7)] * 3)), r"shape \(3, 14, 18\)"),
    "no pixel": (lambda p: savemat(p, {"GTcls": {"Segmentation": mask_of(7)[:0]}}), "shape"),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("xml", [True, False])
def test_damaged_mat(root: Path, spoil: Callable[[Path], Any], message: str, xml: bool) -> None:
    path = root / "SBD/cls/s1.mat"
    whole = path.read_bytes()
    spoil(path)
    if xml:  # then nothing but the mask is lost
        write_xml(root, "s1", "sofa")
        assert VOC(root).open("train_aug", "train").names == TRAIN_AUG
    with pytest.raises(DatasetError, match=f"1 problem in(.|\n)*{path}: .*{message}"):
        VOC(root).open("train_aug", "train_masks")
    with pytest.warns(UserWarning, match=f"left out 1 of 4 images:(.|\n)*{path}"):
        data = VOC(root).open("train_aug", "train_masks", on_error="skip")
    assert data.names == ["both", "s9", "v1"]
    with path.open("r+b") as file:  # in its place, so that the folder's time stays
        file.write(whole)
        file.truncate()
    assert values(VOC(root).open("train_aug", "train_masks"))["s1"] == [0, 7]


def test_damaged_mat_does_not_hide_a_wrong_xml(root: Path) -> None:
    cut(root / "SBD/cls/s1.mat")
    write_xml(root, "s1", "soffa")
    with pytest.raises(DatasetError, match=r"s1\.xml: unknown class 'soffa'"):
        VOC(root).open("train_aug", "train_masks")


def test_mat_of_another_size(root: Path) -> None:
    write_mat(root / "SBD/cls/s1.mat", mask_of(7, (18, 14)))
    with pytest.raises(DatasetError, match=r"s1\.png: mask is 14x18 but its image is 18x14"):
        VOC(root).open("train_aug", "train_masks")


def test_class_that_voc_has_not(root: Path) -> None:
    write_mat(root / "SBD/cls/s1.mat", mask_of(21))
    with pytest.raises(
        DatasetError, match=r"s1\.png: mask holds the values 21, allowed are 0\.\.20"
    ):
        VOC(root).open("train_aug", "train")


def test_listed_in_sbd_without_a_mat(root: Path) -> None:
    (root / "SBD/cls/s1.mat").unlink()
    with pytest.raises(DatasetError, match=r"s1\.xml: no such file, and no mask 's1\.png' either"):
        VOC(root).open("train_aug", "train")
    write_mat(root / "SBD/cls/s1.mat", mask_of(8))  # noticed
    assert classes(VOC(root).open("train_aug", "train"))["s1"] == ["cat"]


# --- preparing again ---------------------------------------------------------------------------


def test_second_call_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = VOC(root).prepare("train_aug", decode=True)
    before = snapshot(root)
    monkeypatch.setattr(sbd, "read_sbd_mask", None)  # would fail
    assert VOC(root).prepare("train_aug", decode=True) == first
    assert snapshot(root) == before
    (root / "SegmentationClassAug").mkdir()  # another look builds nothing again
    assert VOC(root).open("train_aug", "train_masks").names == TRAIN_AUG
    masks = {path: stamp for path, stamp in before.items() if "wsss/Seg" in path}
    assert {path: snapshot(root)[path] for path in masks} == masks


@pytest.mark.parametrize("age", [0.0, -1e6])
def test_changed_mat_is_built_anew(root: Path, age: float) -> None:
    """An archive unpacked again gives its files the time they had."""
    assert values(VOC(root).open("train_aug", "train_masks"))["s1"] == [0, 7]
    path = root / "SBD/cls/s1.mat"
    time = path.stat().st_mtime + age
    write_mat(path, mask_of(9))
    if age:
        os.utime(path, (time, time))
    data = VOC(root).open("train_aug", "train_masks")
    assert values(data)["s1"] == [0, 9]
    assert classes(data)["s1"] == ["chair"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("SBD/train.txt", "s9\n", ["both", "s1", "s9", "v1"]),
        ("SBD/val.txt", "", ["both", "s9", "v1"]),
        ("ImageSets/Segmentation/train.txt", "v1\nw9\n", ["both", "s1", "s9", "v1", "w9"]),
        ("ImageSets/Segmentation/val.txt", "both\n", ["s1", "s9", "v1", "w1"]),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_changed_lists_are_noticed(
    root: Path, tmp_path: Path, name: str, text: str, expected: list[str], link: bool
) -> None:
    shutil.copy(root / "JPEGImages/v1.jpg", root / "JPEGImages/w9.jpg")
    write_png(root / "SegmentationClass/w9.png", 3)
    place = root
    if link:  # with SBD beside the link, not beside what it leads to
        place = tmp_path / "links/VOC2012"
        place.parent.mkdir()
        (root / "SBD").rename(place.parent / "SBD")
        place.symlink_to(root)
        name = name.replace("SBD/", "../SBD/")
    assert VOC(place).open("train_aug").names == TRAIN_AUG
    Path(os.path.normpath(place / name)).write_text(text)
    assert VOC(place).open("train_aug").names == expected


def test_read_only_root(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("WSSS_CACHE", str(cache))
    before = snapshot(root)
    data = VOC(root).open("train_aug", "train_masks")
    assert values(data)["s1"] == [0, 7]
    assert snapshot(root) == before
    (folder,) = cache.iterdir()
    assert (folder / "SegmentationClassAug/s1.png").is_file()


# --- a split that nothing is known of ----------------------------------------------------------


@pytest.mark.parametrize("with_sbd", [True, False])
def test_test_split_opens_for_evaluation(root: Path, with_sbd: bool) -> None:
    if not with_sbd:
        shutil.rmtree(root / "SBD")
    for name in ("t1", "t2"):
        Image.new("RGB", (18, 14)).save(root / f"JPEGImages/{name}.jpg")
    (root / "ImageSets/Segmentation/test.txt").write_text("t1\nt2\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = VOC(root).open("test", "evaluate")
    assert data.names == ["t1", "t2"]
    assert not data.has_masks
    assert not data.labels.any()
    assert [item.labels for item in VOC(root).prepare("test").items] == [None, None]
    assert data.load_image(0).shape == (14, 18, 3)
    with pytest.raises(DatasetError, match=r"image 't1' of .* has no mask"):
        data.load_mask(0)
    with pytest.raises(DatasetError, match=r"2 problems in split 'test'(.|\n)*no labels"):
        VOC(root).open("test", "train")


# --- fetching ----------------------------------------------------------------------------------


class Shop:
    """Archives on loopback, in place of the official ones."""

    def __init__(self, folder: Path, url: str, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.url, self.patch = folder, url, patch
        self.asked: list[str] = []

    def offer(self, name: str, contents: list[dict[str, bytes]]) -> None:
        """Make ``ARCHIVES[name]`` hold archives of these members, all else as it is."""
        archives = []
        for archive, members in zip(ARCHIVES[name], contents, strict=True):
            zipped = archive.filename.endswith(".zip")
            mode = "w:gz" if archive.filename.endswith(".tgz") else "w"
            content = zip_bytes(members) if zipped else tar_bytes(members, mode)
            (self.folder / archive.filename).write_bytes(content)
            md5 = None if zipped else hashlib.md5(content).hexdigest()
            archives.append(replace(archive, url=f"{self.url}/{archive.filename}", md5=md5))
        self.patch.setitem(ARCHIVES, name, tuple(archives))

    def take(self) -> list[str]:
        """What was asked for since the last call."""
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def shop(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path_factory.mktemp("shop")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            shop.asked.append(self.path.lstrip("/"))

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as server:
        shop = Shop(folder, f"http://127.0.0.1:{server.server_address[1]}", monkeypatch)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield shop
        server.shutdown()
        thread.join()


def packed(folder: Path, prefix: str) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


VOC_TAR, SBD_TGZ = (ARCHIVES[name][0].filename for name in ("voc2012", "sbd"))
TREE = "VOCdevkit/VOC2012"


@pytest.fixture
def voc_shop(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """VOC 2012 and SBD, each with four images."""
    source = tmp_path_factory.mktemp("source")
    write_voc(source / "voc")
    write_png(source / "voc/SegmentationClass/2007_000032.png", 1)  # the marker
    write_sbd(source / "sbd")
    shop.offer("voc2012", [packed(source / "voc", TREE)])
    shop.offer("sbd", [packed(source / "sbd", "benchmark_RELEASE/dataset")])
    return shop


@pytest.mark.parametrize("given", [".", TREE])
def test_fetching_voc_and_sbd(voc_shop: Shop, tmp_path: Path, given: str) -> None:
    found = VOC.download(tmp_path / "data" / given, image_labels="auto", sbd_root=None)
    assert found == tmp_path / "data" / TREE
    assert voc_shop.take() == [VOC_TAR, SBD_TGZ]
    data = VOC(found).open("train_aug", "train_masks")
    assert data.names == TRAIN_AUG
    assert values(data)["s1"] == [0, 7]
    assert VOC(found).open("val").names == ["w1", "w2"]

    before = snapshot(tmp_path)
    assert VOC.download(tmp_path / "data" / given) == found
    assert voc_shop.take() == []
    assert snapshot(tmp_path) == before


def test_fetching_into_a_relative_root(
    voc_shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TREE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "VOCdevkit")
    VOC.download("VOC2012")
    assert (tmp_path / TREE / "JPEGImages").is_dir()
    assert VOC("VOC2012").open("train_aug").names == TRAIN_AUG


def test_archives_that_are_unpacked_may_go(voc_shop: Shop, tmp_path: Path) -> None:
    VOC.download(tmp_path)
    shutil.rmtree(tmp_path / "downloads")
    VOC.download(tmp_path)
    assert voc_shop.take() == [VOC_TAR, SBD_TGZ]


def test_a_tree_under_another_name_is_not_fetched_again(voc_shop: Shop, tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    assert VOC.download(root) == root
    assert voc_shop.take() == [SBD_TGZ]
    assert VOC(root).open("train_aug", "train_masks").names == TRAIN_AUG
    assert not (root / "VOCdevkit").exists()


@pytest.mark.parametrize("missing", ["list", "masks", None])
def test_sbd_is_fetched_where_train_aug_is_not_whole(
    voc_shop: Shop, tmp_path: Path, missing: str | None
) -> None:
    root = write_voc(tmp_path / TREE)
    if missing != "list":
        (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(TRAIN_AUG))
    if missing != "masks":
        for name in TRAIN_AUG:
            write_png(root / f"SegmentationClassAug/{name}.png", 5)
    write_png(root / "SegmentationClass/2007_000032.png", 1)
    VOC.download(root)
    assert voc_shop.take() == ([SBD_TGZ] if missing else [])
    data = VOC(root).open("train_aug", "train_masks")
    assert data.names == TRAIN_AUG
    assert values(data)["s1"] == ([0, 7] if missing == "masks" else [0, 5])


def test_sbd_that_is_there_is_not_fetched(voc_shop: Shop, tmp_path: Path) -> None:
    write_sbd(tmp_path / "mine")
    root = VOC.download(tmp_path / "a", sbd_root=tmp_path / "mine")
    assert voc_shop.take() == [VOC_TAR]
    assert VOC(root, sbd_root=tmp_path / "mine").open("train_aug").names == TRAIN_AUG
    write_sbd(tmp_path / "b/SBD")
    VOC.download(tmp_path / "b")
    assert voc_shop.take() == [VOC_TAR]
    with pytest.raises(DatasetError, match=r"sbd_root=.*holds no cls folder"):
        VOC.download(tmp_path / "c", sbd_root=tmp_path / "nowhere")
    assert voc_shop.take() == []  # before gigabytes have come


def coco_members(year: int) -> list[dict[str, bytes]]:
    """What COCO's three archives hold, with two images each."""
    folders, members = {}, []
    annotations: dict[str, bytes] = {}
    for archive, split in zip(ARCHIVES[f"coco{year}"], ("train", "val"), strict=False):
        marker = Path(archive.extracts_to)
        names = [marker.name, "z.jpg"]
        folders[split] = names
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6)).save(buffer, "JPEG")
        members.append({f"{split}{year}/{name}": buffer.getvalue() for name in names})
        content = {
            "images": [
                {"id": i, "file_name": name, "height": 6, "width": 8}
                for i, name in enumerate(names)
            ],
            "annotations": [
                {"image_id": i, "category_id": 5, "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}
                for i in range(2)
            ],
            "categories": [{"id": 5, "name": f"thing of {year}"}],
        }
        annotations[f"annotations/instances_{split}{year}.json"] = json.dumps(content).encode()
        annotations[f"annotations/captions_{split}{year}.json"] = b"{}"
    return [*members, annotations]


@pytest.fixture
def coco_shop(shop: Shop) -> Shop:
    for year in (2014, 2017):
        shop.offer(f"coco{year}", coco_members(year))
    return shop


def zips(year: int) -> list[str]:
    return [f"train{year}.zip", f"val{year}.zip", f"annotations_trainval{year}.zip"]


@pytest.mark.parametrize(("asked", "year"), [(None, 2014), (2014, 2014), (2017, 2017)])
def test_fetching_coco(coco_shop: Shop, tmp_path: Path, asked: int | None, year: int) -> None:
    root = COCO.download(tmp_path / "coco", year=asked)
    assert root == tmp_path / "coco"
    assert coco_shop.take() == zips(year)
    for split in ("train", "val"):
        data = COCO(root, year=asked).open(split, "train_masks")
        assert data.classes == (f"thing of {year}",)
        assert len(data) == 2
        assert data.load_mask(0).any()
    before = snapshot(root)
    COCO.download(root, year=asked)
    assert coco_shop.take() == []
    assert snapshot(root) == before


def test_fetching_coco_takes_the_year_that_is_there(coco_shop: Shop, tmp_path: Path) -> None:
    COCO.download(tmp_path, year=2017)
    shutil.rmtree(tmp_path / "val2017")
    coco_shop.take()
    shutil.rmtree(tmp_path / "downloads")
    COCO.download(tmp_path)
    assert coco_shop.take() == ["val2017.zip"]
    assert COCO(tmp_path).year == 2017


def test_coco_images_may_lie_in_images(coco_shop: Shop, tmp_path: Path) -> None:
    COCO.download(tmp_path, year=2017)
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").rename(tmp_path / f"images/{split}2017")
    shutil.rmtree(tmp_path / "downloads")
    coco_shop.take()
    COCO.download(tmp_path, year=2017)
    assert coco_shop.take() == []
    assert len(COCO(tmp_path).open("train", "train_masks")) == 2


def test_year_that_coco_has_not(coco_shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="year=2015: COCO has 2014 and 2017"):
        COCO.download(tmp_path, year=2015)
    assert coco_shop.take() == []


def test_what_failed_is_taken_up_again(coco_shop: Shop, tmp_path: Path) -> None:
    path = coco_shop.folder / "val2014.zip"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DatasetError, match=r"val2014\.zip: the server answers 404"):
        fetch_and_unpack("coco2014", tmp_path)
    assert (tmp_path / "train2014").is_dir()
    path.write_bytes(whole[:-40])
    with pytest.raises(DatasetError, match=r"val2014\.zip.*no whole zip archive"):
        fetch_and_unpack("coco2014", tmp_path)
    path.write_bytes(whole)
    coco_shop.take()
    fetch_and_unpack("coco2014", tmp_path)
    assert coco_shop.take() == zips(2014)[1:]
    assert len(COCO(tmp_path).open("val", "train_masks")) == 2


def test_archive_fetched_by_hand(voc_shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    shutil.copy(voc_shop.folder / VOC_TAR, tmp_path / "downloads")
    fetch_and_unpack("voc2012", tmp_path)
    assert voc_shop.take() == []
    assert VOC(tmp_path / TREE).open("val").names == ["w1", "w2"]


def test_archive_with_another_checksum(voc_shop: Shop, tmp_path: Path) -> None:
    with (voc_shop.folder / SBD_TGZ).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DatasetError, match=rf"{SBD_TGZ}: what came has md5 .*, expected"):
        VOC.download(tmp_path)
    assert (tmp_path / TREE).is_dir()
    assert not (tmp_path / "benchmark_RELEASE").exists()
