"""Reader of MXNet's ``.params`` files: lists of named dense arrays, without MXNet or pickle.

The format, little-endian throughout (``NDArray::Save`` of MXNet's ``src/ndarray/ndarray.cc``)::

    file    uint64 0x112, uint64 0 (reserved), uint64 number of arrays, arrays,
            uint64 number of names, names
    name    uint64 length, that many bytes
    array   header, int32 device type, int32 device number, int32 element type, elements
    header  first:  uint32 dimensions, each as uint32
            second: uint32 0xF993FAC8, uint32 dimensions, each as int64
            third:  uint32 0xF993FAC9, int32 0 (dense storage), uint32 dimensions, each as int64

Names are those of the graph behind ``arg:`` (parameters) or ``aux:`` (running statistics).
"""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from wsss.errors import UserError

_LIST = 0x112
_INT64_SHAPE = 0xF993FAC8
_WITH_STORAGE = 0xF993FAC9
_MAX_DIMENSIONS = 8
_ELEMENTS = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}


def read_mxnet_params(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of a ``.params`` file by name, in the file's order.

    Nothing is allocated beyond the size of the file, whatever it says of itself.

    Raises:
        UserError: no such file, or anything that is not as the format says: unknown headers, sparse
            or empty arrays, sizes beyond the end, missing, repeated or unreadable names, bytes left
            over.
    """
    if not path.is_file():
        raise UserError(f"No weights file at '{path}'. Check the path.")
    with path.open("rb") as file:
        reader = _Reader(path, file)
        if reader.numbers("<Q")[0] != _LIST:
            raise reader.error("it does not begin with the mark of an array list")
        if reader.numbers("<Q")[0] != 0:
            raise reader.error("the reserved bytes are not 0")
        # Not a list of a length that the file claims: each array is read before the next is.
        arrays = []
        for _ in range(reader.numbers("<Q")[0]):
            arrays.append(_read_array(reader))
        count = reader.numbers("<Q")[0]
        if count != len(arrays):
            raise reader.error(f"it has {len(arrays)} arrays and {count} names")
        named = {_read_name(reader): array for array in arrays}
        if len(named) != len(arrays):
            raise reader.error("a name occurs twice")
        if reader.left:
            raise reader.error(f"{reader.left} bytes follow the last name")
    return named


class _Reader:
    """A file that is never read beyond its end."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path = path
        self.file = file
        self.left = path.stat().st_size

    def error(self, reason: str) -> UserError:
        return UserError(
            f"'{self.path}' is not a readable MXNet .params file: {reason}. "
            "Fetch it again, or convert it with the program that wrote it."
        )

    def take(self, size: int) -> bytearray:
        if size > self.left:
            raise self.error(f"it ends {size - self.left} bytes early")
        buffer = bytearray(size)
        if self.file.readinto(buffer) != size:
            raise self.error("it became shorter while it was read")
        self.left -= size
        return buffer

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))


def _read_array(reader: _Reader) -> np.ndarray[Any, Any]:
    (mark,) = reader.numbers("<I")
    dimensions, size = mark, "I"
    if mark in (_INT64_SHAPE, _WITH_STORAGE):
        if mark == _WITH_STORAGE:
            (storage,) = reader.numbers("<i")
            if storage != 0:
                raise reader.error(f"it has an array of storage type {storage}, not a dense one")
        (dimensions,) = reader.numbers("<I")
        size = "q"
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        raise reader.error(f"it has an array of {dimensions} dimensions, or an unknown header")
    shape = reader.numbers(f"<{dimensions}{size}")
    if min(shape) <= 0:
        raise reader.error(f"it has an array of shape {shape}")
    _, _, element = reader.numbers("<3i")
    if element not in _ELEMENTS:
        raise reader.error(f"it has an array of element type {element}")
    dtype = np.dtype(_ELEMENTS[element])
    # Python's integers: no product of sizes is too large to be compared with what is left.
    return np.frombuffer(reader.take(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _read_name(reader: _Reader) -> str:
    (length,) = reader.numbers("<Q")
    try:
        return reader.take(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise reader.error(f"a name is not text ({error.reason})") from error
