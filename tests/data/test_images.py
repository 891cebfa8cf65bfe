"""Files as cameras and programs write them: orientation, odd EXIF tags, PNGs of few bits."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wsss.data.images import DatasetError, inspect_image, inspect_mask, read_mask, read_rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are none
def test_turned_as_pil_turns(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        expected = np.array(ImageOps.exif_transpose(opened))
    assert np.array_equal(read_rgb(path, exif=True), expected)
    for decode in (False, True):
        assert inspect_image(path, decode=decode, exif=True) == (expected.shape[:2], None)
    assert np.array_equal(read_rgb(path), PIXELS)


def test_a_tag_of_the_wrong_type_hinders_nothing(tmp_path: Path) -> None:
    """Orientation 6, and an XResolution that is text: PIL's own way raises a TypeError."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(
        "<HHI4s", 0x011A, 2, 4, b"72\0"
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0"
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, exif=exif)
    with pytest.raises(TypeError), Image.open(path) as opened:
        ImageOps.exif_transpose(opened)
    with Image.open(path) as opened:
        stored = np.array(opened)
    assert np.array_equal(read_rgb(path, exif=True), np.rot90(stored, -1))
    assert inspect_image(path, exif=True) == ((9, 6), None)


def grey_png(values: NDArray[np.uint8], bits: int) -> bytes:
    """A grey PNG of few bits a pixel, which PIL does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    height, width = values.shape
    rows = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    data = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_keep_their_values(tmp_path: Path, bits: int) -> None:
    values = np.arange(min(2**bits, 20), dtype=np.uint8).repeat(3).reshape(-1, 3)
    path = tmp_path / "a.png"
    path.write_bytes(grey_png(values, bits))
    assert np.array_equal(read_mask(path, 20, values.shape), values)


def test_a_mask_s_header_and_end_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS[..., 0] % 3).save(path)
    assert inspect_mask(path, 2, (6, 9)) is None
    assert "mask is 9x6 but its image is 6x9" in str(inspect_mask(path, 2, (9, 6)))
    whole = path.read_bytes()
    path.write_bytes(whole + b"appended")  # harmless
    assert inspect_mask(path, 2, (6, 9)) is None
    path.write_bytes(whole[:60])
    assert "cannot decode the mask" in str(inspect_mask(path, 2, (6, 9)))
    path.write_bytes(b"")
    assert "not a readable mask" in str(inspect_mask(path, 2, (6, 9)))
    Image.fromarray(PIXELS).save(path)
    assert "mask has mode RGB, expected class numbers 0..2" in str(inspect_mask(path, 2, (6, 9)))
    path.unlink()
    assert "no such mask file" in str(inspect_mask(path, 2, (6, 9)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("longest", "part"), [(97, 1), (49, 1), (48, 2), (25, 2), (24, 4), (13, 4), (12, 8), (1, 8)]
)
def test_jpegs_are_decoded_at_the_fraction_that_is_enough(
    tmp_path: Path, mode: str, longest: int, part: int
) -> None:
    """Area means of the pixels, turned afterwards; 97 x 61 pixels."""
    rows, columns = np.mgrid[:61, :97]
    image = Image.fromarray(np.stack([rows * 3, columns * 2, rows + columns], 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert(mode).save(tmp_path / "a.jpg", quality=98, exif=exif)
    whole = read_rgb(tmp_path / "a.jpg").astype(int)
    found = read_rgb(tmp_path / "a.jpg", longest=longest)
    assert found.shape == (-(-61 // part), -(-97 // part), 3)
    inner = whole[: 61 // part * part, : 97 // part * part]
    means = inner.reshape(61 // part, part, 97 // part, part, 3).mean((1, 3))
    assert np.abs(found[: 61 // part, : 97 // part] - means).max() <= 6
    turned = read_rgb(tmp_path / "a.jpg", exif=True, longest=longest)
    assert np.array_equal(turned, np.rot90(found, -1))


def test_a_fraction_of_a_thin_or_broken_image(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS.repeat(40, 0).repeat(40, 1))
    image.save(tmp_path / "a.png")  # no JPEG: as it is
    assert read_rgb(tmp_path / "a.png", longest=10).shape == (240, 360, 3)
    image.resize((400, 1)).save(tmp_path / "thin.jpg")
    assert read_rgb(tmp_path / "thin.jpg", longest=10).shape[0] == 1
    image.save(tmp_path / "b.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-3000])
    with pytest.raises(DatasetError, match=r"cut\.jpg: cannot decode"):
        read_rgb(tmp_path / "cut.jpg", longest=10)
