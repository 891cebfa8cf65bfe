"""MXNet's binary format, written here by hand from its description."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsss.errors import UserError
from wsss.nn.mxnet_params import read_mxnet_params

Array = np.ndarray
TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def first_header(shape: tuple[int, ...]) -> bytes:
    return struct.pack(f"<I{len(shape)}I", len(shape), *shape)


def second_header(shape: tuple[int, ...]) -> bytes:
    return struct.pack(f"<II{len(shape)}q", 0xF993FAC8, len(shape), *shape)


def third_header(shape: tuple[int, ...], storage: int = 0) -> bytes:
    return struct.pack(f"<IiI{len(shape)}q", 0xF993FAC9, storage, len(shape), *shape)


HEADERS = [first_header, second_header, third_header]


def array_bytes(array: Array, header: Callable[..., bytes] = first_header) -> bytes:
    # Saved from the second GPU: where an array came from does not matter.
    context = struct.pack("<iii", 2, 1, TYPES[array.dtype.name])
    return header(array.shape) + context + array.tobytes()


def file_bytes(arrays: list[bytes], names: list[str | bytes]) -> bytes:
    parts = [struct.pack("<QQQ", 0x112, 0, len(arrays)), *arrays, struct.pack("<Q", len(names))]
    for name in names:
        text = name.encode() if isinstance(name, str) else name
        parts += [struct.pack("<Q", len(text)), text]
    return b"".join(parts)


def write_params(
    path: Path, arrays: dict[str, Array], header: Callable[..., bytes] = first_header
) -> Path:
    """A ``.params`` file of named arrays; for other tests too."""
    content = [array_bytes(array, header) for array in arrays.values()]
    path.write_bytes(file_bytes(content, list(arrays)))
    return path


ARRAYS = {
    "arg:conv1a_weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7,
    "aux:bn7_moving_mean": np.array([-1.5, 2.0, 1e30], np.float32),
    "arg:ä": np.array([[7]], np.float64),
}


@pytest.mark.parametrize("header", HEADERS)
def test_round_trip(tmp_path: Path, header: Callable[..., bytes]) -> None:
    read = read_mxnet_params(write_params(tmp_path / "a.params", ARRAYS, header))
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_arrays_can_be_written_to(tmp_path: Path) -> None:
    read = read_mxnet_params(write_params(tmp_path / "a.params", ARRAYS))
    read["aux:bn7_moving_mean"][0] = 3
    assert read["aux:bn7_moving_mean"][0] == 3


@pytest.mark.parametrize("dtype", TYPES)
def test_element_types(tmp_path: Path, dtype: str) -> None:
    array = np.array([1, 2, 100], dtype)
    read = read_mxnet_params(write_params(tmp_path / "a.params", {"x": array}))["x"]
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_no_arrays(tmp_path: Path) -> None:
    assert read_mxnet_params(write_params(tmp_path / "a.params", {})) == {}


@pytest.mark.parametrize("header", HEADERS)
def test_every_shorter_file_is_refused(tmp_path: Path, header: Callable[..., bytes]) -> None:
    path = write_params(tmp_path / "a.params", ARRAYS, header)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"ends \d+ bytes early"):
            read_mxnet_params(path)


ONE = array_bytes(np.ones(2, np.float32))
HUGE = 2**31 - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04" + b"\0" * 30, "mark of an array list"),
        (struct.pack("<QQQQ", 0x112, 1, 0, 0), "reserved"),
        (struct.pack("<QQQ", 0x112, 0, 2**64 - 1), "early"),
        (file_bytes([ONE], ["a"]) + b"\0", "1 bytes follow"),
        (file_bytes([ONE, ONE], ["a"]), "2 arrays and 1 names"),
        (file_bytes([ONE], []), "1 arrays and 0 names"),
        (file_bytes([ONE, ONE], ["a", "a"]), "twice"),
        (file_bytes([ONE], [b"\xff"]), "not text"),
        (file_bytes([struct.pack("<I", 0)], ["a"]), "0 dimensions"),
        (file_bytes([first_header((1,) * 9) + b"\0" * 99], ["a"]), "9 dimensions"),
        (file_bytes([struct.pack("<I", 0xF993FACA) + b"\0" * 99], ["a"]), "unknown header"),
        (file_bytes([third_header((2,), storage=1) + b"\0" * 99], ["a"]), "storage type 1"),
        (file_bytes([first_header((2, 0)) + b"\0" * 99], ["a"]), r"shape \(2, 0\)"),
        (file_bytes([second_header((-2, -4)) + b"\0" * 99], ["a"]), r"shape \(-2, -4\)"),
        (file_bytes([first_header((1,)) + struct.pack("<3i", 1, 0, 7)], ["a"]), "element type 7"),
        # Far more than memory: refused by arithmetic, not by trying.
        (file_bytes([first_header((HUGE,) * 4) + b"\0" * 99], ["a"]), r"ends \d{30,} bytes early"),
        (file_bytes([ONE], [])[:-8] + struct.pack("<QQ", 1, 2**63), "early"),
    ],
)
def test_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.params"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.params' is not .*{message}.*Fetch it again"):
        read_mxnet_params(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No weights file"):
        read_mxnet_params(tmp_path / "none.params")
