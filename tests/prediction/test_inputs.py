"""Which images are meant, and reading them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.data.images import DatasetError
from wsss.data.views import resize_image
from wsss.errors import UserError
from wsss.prediction import inputs
from wsss.prediction.inputs import Reader, describe_others, find_images, fitted, own_pixel_limit

OUT = Path("predictions")


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")


def found(source: str, output_dir: Path = OUT) -> list[str]:
    return [str(p) for p in find_images(source, output_dir).files]


# --- which images ------------------------------------------------------------------------------


def test_a_folder_with_subfolders() -> None:
    touch("in/b.JPG", "in/a.png", "in/sub/deep/c.webp", "in/d.tif", "in/e.bmp", "in/f.jfif")
    touch("in/notes.txt", "in/Thumbs.db", "in/none", "in/g.psd")
    Path("in/folder.jpg").mkdir()
    result = find_images("in", OUT)
    names = [str(p.relative_to("in")) for p in result.files]
    assert names == ["a.png", "b.JPG", "d.tif", "e.bmp", "f.jfif", "sub/deep/c.webp"]
    assert result.base == Path("in")
    assert {p.name for p in result.passed_over} == {"notes.txt", "Thumbs.db", "none", "g.psd"}


def test_hidden_files_are_passed_over() -> None:
    touch("in/.a.jpg", "in/._b.jpg", "in/.git/c.jpg", "in/sub/.d/e.jpg", "in/f.jpg")
    result = find_images("in", OUT)
    assert [p.name for p in result.files] == ["f.jpg"]
    assert result.passed_over == ()
    assert found("in/**/*.jpg") == ["in/f.jpg"]
    touch(".cache/g.jpg")  # hidden above the folder that was named
    assert found(".cache") == [".cache/g.jpg"]


def test_a_file_may_be_of_any_kind() -> None:
    touch("a.xyz", "b[1].jpg", ".c.jpg")
    for name in ("a.xyz", "b[1].jpg", ".c.jpg"):
        result = find_images(name, OUT)
        assert result.files == (Path(name),)
        assert result.base == Path()


def test_patterns() -> None:
    touch("in/x/a.jpg", "in/x/b.png", "in/y/a.jpg", "in/y/c.psd", "in/y/d.txt", "in/e.jpg")
    Path("in/y/folder.jpg").mkdir()
    assert found("in/*/a.jpg") == ["in/x/a.jpg", "in/y/a.jpg"]
    assert found("in/**/*.jpg") == ["in/e.jpg", "in/x/a.jpg", "in/y/a.jpg"]
    assert found("in/y/[ac].*") == ["in/y/a.jpg", "in/y/c.psd"]
    result = find_images("in/y/*", OUT)
    assert result.base == Path("in/y")
    assert [p.name for p in result.passed_over] == ["d.txt"]
    assert find_images("in/*/a.jpg", OUT).base == Path("in")
    assert find_images(f"{Path.cwd()}/in/*/a.jpg", OUT).base == Path.cwd() / "in"


def test_a_pattern_below_a_folder_with_brackets() -> None:
    touch("[2024] trip/a.jpg", "[2024] trip/b.png", "2 trip/c.jpg")
    assert found("[2024] trip/*.jpg") == ["[2024] trip/a.jpg"]


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    touch("home/in/a.jpg")
    assert found("~/in") == found("~/in/*") == [str(tmp_path / "home/in/a.jpg")]


def test_a_broken_link_is_an_image_that_cannot_be_read() -> None:
    Path("in").mkdir()
    Path("in/a.jpg").symlink_to("nowhere.jpg")
    assert found("in") == ["in/a.jpg"]


def test_results_inside_the_input_are_no_images() -> None:
    touch("in/a.jpg", "in/predictions/a.png", "in/predictions/sub/b.png", "in/predictions/a.json")
    result = find_images("in", Path("in/predictions"))
    assert [str(p) for p in result.files] == ["in/a.jpg"]
    assert result.passed_over == ()
    assert found("**/*.*", Path("in/predictions")) == ["in/a.jpg"]
    assert len(found("in")) == 3  # of another run
    # The folder that holds the images' folder may hold the results.
    assert found("in/predictions", Path("in")) == [
        "in/predictions/a.png",
        "in/predictions/sub/b.png",
    ]


@pytest.mark.parametrize("source", ["in", "in/*.jpg", "./in/"])
def test_results_among_the_images(source: str) -> None:
    touch("in/a.jpg")
    with pytest.raises(UserError, match=r"output_dir='in' is the folder of the images"):
        find_images(source, Path("in"))


def test_a_name_that_is_missing_in_a_folder_called_like_a_pattern() -> None:
    touch("[2024] trip/a.jpg")
    with pytest.raises(UserError, match=r"no such file or folder"):
        find_images("[2024] trip/missing.jpg", OUT)
    assert len(find_images("[2024] trip/*.jpg", OUT).files) == 1


def test_nothing_there() -> None:
    touch("photos/a.jpg", "photos/b.heic", "empty/x.heic", "empty/y.heic", "empty/z", "Photo.jpeg")
    Path("nothing").mkdir()
    with pytest.raises(UserError, match=r"input='foto': no such file or folder\. Check the path"):
        find_images("foto", OUT)
    with pytest.raises(UserError, match=r"input='photo\.jpg'.* There is Photo\.jpeg"):
        find_images("photo.jpg", OUT)
    with pytest.raises(UserError, match=r"Found there: 3 other files \(\.heic, no suffix\)"):
        find_images("empty", OUT)
    with pytest.raises(UserError, match=r"input='nothing': no images\. Name a file.*\.tif"):
        find_images("nothing", OUT)
    with pytest.raises(UserError, match=r"input='photos/\*\.png': no images"):
        find_images("photos/*.png", OUT)


def test_kinds_of_other_files() -> None:
    files = tuple(Path(f"{i}.{'abcdefg'[i % 7]}") for i in range(9))
    assert describe_others(files) == "9 other files (.a, .b, .c, .d, .e, ...)"
    assert describe_others(files[:1]) == "1 other file (.a)"


# --- reading -----------------------------------------------------------------------------------


def reader(**options: Any) -> Reader:
    defaults: dict[str, Any] = {
        "size": 32,
        "exif": True,
        "max_pixels": 10_000,
        "remedy": "too many",
        "thumbnail": 40,
        "keep_native": False,
    }
    return Reader(**(defaults | options))


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_what_is_read() -> None:
    image = picture(50, 80)
    Image.fromarray(image).save("a.png")
    photo = reader()(Path("a.png"))
    assert (photo.height, photo.width) == (50, 80)
    assert np.array_equal(photo.square, resize_image(image, 32, 32))  # as evaluation does
    assert np.array_equal(photo.thumbnail, resize_image(image, 25, 40))
    assert photo.native is None
    native = reader(keep_native=True)(Path("a.png")).native
    assert native is not None
    assert np.array_equal(native, image)


def test_exif_orientation() -> None:
    image = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(image).save("a.png", exif=exif)
    turned = reader(keep_native=True)(Path("a.png"))
    assert (turned.height, turned.width) == (30, 20)
    assert turned.native is not None
    assert np.array_equal(turned.native, np.rot90(image, -1))
    stored = reader(exif=False)(Path("a.png"))
    assert (stored.height, stored.width) == (20, 30)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
def test_modes_and_sizes(mode: str) -> None:
    for size in ((1, 1), (1, 90), (90, 1), (33, 20)):
        if mode == "I;16":
            image = Image.fromarray(np.full(size[::-1], 40_000, np.uint16))
        else:
            image = Image.new(mode, size)
        image.save("a.tif")
        photo = reader(keep_native=True)(Path("a.tif"))
        assert (photo.width, photo.height) == size
        assert photo.square.shape == (32, 32, 3)
        assert photo.native is not None
        assert photo.native.shape == (size[1], size[0], 3)
        assert min(photo.thumbnail.shape) >= 1


def test_too_many_pixels() -> None:
    Image.new("L", (100, 100)).save("fits.png")
    Image.new("L", (101, 100)).save("large.png")
    reader()(Path("fits.png"))
    with pytest.raises(DatasetError, match=r"large\.png: 101x100 are 10100 pixels, too many"):
        reader()(Path("large.png"))


def test_pils_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (50, 50)).save("a.png")
    with pytest.raises(DatasetError, match="exceeds limit"):
        reader()(Path("a.png"))
    with own_pixel_limit():
        reader()(Path("a.png"))
    assert Image.MAX_IMAGE_PIXELS == 100


def test_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a.jpg")
    for name in ("a.jpg", "none.jpg"):
        with pytest.raises(DatasetError, match=name):
            reader()(Path(name))

    def broken(*_: object) -> None:
        raise IndexError("of a plugin")

    monkeypatch.setattr(inputs, "read_rgb", broken)
    with pytest.raises(DatasetError, match=r"a\.jpg: cannot decode .*IndexError: of a plugin"):
        reader()(Path("a.jpg"))


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (50, 50)).save("a.png")
    read = reader()
    locked: list[bool] = []

    def watched(image: np.ndarray, height: int, width: int) -> np.ndarray:
        locked.append(read._one_large.locked())
        return image

    monkeypatch.setattr(inputs, "resize_image", watched)
    read(Path("a.png"))
    assert locked == [False, False]
    monkeypatch.setattr(inputs, "_LARGE", 2499)
    read(Path("a.png"))
    assert locked[2:] == [True, True]
    assert not read._one_large.locked()


def test_fitted() -> None:
    assert fitted(50, 80, 40) == (25, 40)
    assert fitted(80, 50, 40) == (40, 25)
    assert fitted(10, 20, 40) == (10, 20)
    assert fitted(1, 5000, 100) == (1, 100)
    assert fitted(5000, 1, 100) == (100, 1)


def test_names_that_are_no_text() -> None:
    name = os.fsdecode(b"in/\xff.jpg")
    touch(name)
    assert found("in") == [name]
