"""Image labels from the files people have: CSV, JSON, and the ``.npy`` dictionaries of papers."""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from wsss.data.images import VOID, DatasetError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Image file suffixes, in lower case, in order of preference."""

_NAME_COLUMNS = ("image", "name", "file", "filename", "file_name", "image_id", "path", "id")
_LABEL_COLUMNS = ("labels", "label", "classes", "class", "tags", "tag", "categories", "category")
_SPLIT_COLUMNS = ("split", "subset", "set")
_SEPARATORS = re.compile(r"[;|,]")


@dataclass
class LabelFile:
    """Content of a label file.

    Attributes:
        labels: class names by image key (:func:`image_key`).
        splits: split name by image key, where the file has such a column.
        classes: names in the order in which the file gives them, if it has an order (one-hot
            columns), else sorted.
    """

    labels: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def image_key(name: str) -> str:
    """What names of one image have in common: no suffix, ``/`` as separator, composed accents."""
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/")).removeprefix("./")
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)] if suffix else name


def class_name(name: str) -> str:
    """A class name without outer blanks, accents composed: what is compared."""
    return unicodedata.normalize("NFC", name.strip())


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without outer blanks, empty ones left out.

    Raises:
        DatasetError: not readable, or not in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise DatasetError(f"{path}: not readable ({error}); save it as UTF-8 text") from error
    return [line.strip() for line in lines if line.strip()]


def read_classes(path: Path) -> tuple[str, ...]:
    """Foreground class names, one a line.

    Raises:
        DatasetError: none, one twice, the background among them, or more than 254.
    """
    classes = tuple(map(class_name, read_lines(path)))
    if not classes or len(set(classes)) != len(classes):
        raise DatasetError(f"{path}: needs one foreground class name a line, each once")
    _check_classes(path, classes)
    return classes


def _check_classes(path: Path, classes: Sequence[str]) -> None:
    for name in classes:
        if name.strip("_").lower() == "background":
            raise DatasetError(f"{path}: remove '{name}'; it is always value 0, unlisted")
    if len(classes) >= VOID:
        raise DatasetError(f"{path}: {len(classes)} classes, at most {VOID - 1} fit an 8-bit mask")


def _derive_classes(path: Path, found: set[str]) -> tuple[str, ...]:
    """Class names in order: alphabetical, but 2 before 10."""
    spellings: dict[str, str] = {}
    for name in sorted(found):
        other = spellings.setdefault(name.casefold(), name)
        if other != name:
            raise DatasetError(f"{path}: '{other}' and '{name}' are one class; spell it one way")
    numbers = all(name.isdecimal() for name in found)
    return tuple(sorted(found, key=int if numbers else None))


def read_label_file(path: Path, classes: Sequence[str] | None = None) -> LabelFile:
    """Read a label file.

    Forms::

        image,labels,split            CSV (or ; or tab separated) with a heading; labels split by
        a.jpg,cat;dog,train           ; or |, an empty cell for none. A repeated image adds up.
        image,cat,dog                 CSV with one column of 0 and 1 for each class
        a.jpg,1,0
        {"a.jpg": ["cat", "dog"]}     JSON; also {"a.jpg": [1, 0]} where classes are known, and
        [{"image": "a.jpg", "labels": ["cat"], "split": "train"}]
        cls_labels.npy                a NumPy-saved dictionary of 0/1 vectors by image name

    Args:
        path: the file; its suffix decides the form.
        classes: the known foreground classes; needed for 0/1 vectors, and checked otherwise.

    Raises:
        DatasetError: not readable, no such form, or a class that is not among ``classes``.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: no such label file")
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise DatasetError(f"{path}: unknown kind of label file; use {', '.join(_READERS)}")
    try:
        rows = _READERS[suffix](path)
    except DatasetError:
        raise
    except (OSError, UnicodeError, ValueError, csv.Error) as error:
        raise DatasetError(
            f"{path}: not readable as {suffix[1:].upper()} in UTF-8 ({error}); mend the file"
        ) from error
    result = LabelFile(classes=tuple(classes or rows.columns))
    for name, value, split in rows.rows:
        key = image_key(name)
        if not key:
            raise DatasetError(f"{path}: one of the image names is empty; write it or remove it")
        names = _class_names(path, name, value, result.classes)
        known = result.labels.setdefault(key, [])
        known += [n for n in names if n not in known]
        if split and result.splits.setdefault(key, split) != split:
            raise DatasetError(f"{path}: '{name}' is in two splits, take it off one")
    if not result.labels:
        raise DatasetError(f"{path}: names no image")
    found = {n for names in result.labels.values() for n in names}
    if classes is None:
        result.classes = result.classes or _derive_classes(path, found)
        _check_classes(path, result.classes)
    if not result.classes:
        raise DatasetError(f"{path}: names no class; give the images labels, or write classes.txt")
    unknown = sorted(found - set(result.classes))
    if unknown:
        where = next(k for k, names in result.labels.items() if unknown[0] in names)
        others = f" (and {len(unknown) - 1} more unknown)" if len(unknown) > 1 else ""
        raise DatasetError(
            f"{path}: unknown class '{unknown[0]}' of '{where}', "
            f"{nearest(unknown[0], result.classes)}{others}"
        )
    return result


@dataclass
class _Rows:
    """(image, labels, split) triples; labels are names, one string, or a 0/1 vector."""

    rows: Iterable[tuple[str, Any, str]]
    columns: tuple[str, ...] = ()


def _class_names(path: Path, name: str, value: Any, classes: Sequence[str]) -> list[str]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):  # a Python list, as pandas writes it
            text = re.sub(r"""['"]""", "", text[1:-1])
        return [class_name(part) for part in _SEPARATORS.split(text) if part.strip()]
    values = value.ravel().tolist() if isinstance(value, np.ndarray) else value
    values = [] if values is None else values
    values = list(values) if isinstance(values, Sequence | set) else [values]
    if all(isinstance(v, str) for v in values):
        return [class_name(v) for v in values if v.strip()]
    if not all(isinstance(v, int | float | np.number | np.bool_) for v in values):
        raise DatasetError(
            f"{path}: labels of '{name}' should be class names, or values 0 and 1; found "
            f"{str(values)[:60]}"
        )
    if not classes:
        raise DatasetError(
            f"{path}: labels of '{name}' are numbers; give the names of the classes in classes.txt"
        )
    if len(values) != len(classes) or any(v not in (0, 1) for v in values):
        raise DatasetError(
            f"{path}: labels of '{name}' should be {len(classes)} values 0 or 1, one for each "
            f"class, or class names; found {len(values)} values {values[:5]}"
        )
    return [c for c, v in zip(classes, values, strict=True) if v == 1]


def _read_csv(path: Path) -> _Rows:
    text = path.read_text(encoding="utf-8-sig")
    heading = text.lstrip().split("\n", 1)[0]
    delimiter = next((d for d in ("\t", ",", ";") if d in heading), ",")
    table = _cells(path, text, delimiter)
    columns = [cell.strip() for cell in next(table, (0, []))[1]]
    while columns and not columns[-1]:
        columns.pop()
    repeated = [c for c, number in Counter(columns).items() if c and number > 1]
    if repeated:
        raise DatasetError(f"{path}: two columns are called '{repeated[0]}'; rename or remove one")
    index = {c.lower(): i for i, c in reversed([*enumerate(columns)])}
    name = next((index[c] for c in _NAME_COLUMNS if c in index), None)
    split = next((index[c] for c in _SPLIT_COLUMNS if c in index), None)
    labels = next((index[c] for c in _LABEL_COLUMNS if c in index), None)
    if name is None:
        raise DatasetError(
            f"{path}: the first line must name the columns, one of them 'image'; found {columns}"
        )
    # A column without a heading is a table's row number.
    one_hot = {c: i for i, c in enumerate(columns) if c and i not in (name, split)}
    if labels is None and not one_hot:
        raise DatasetError(f"{path}: needs a column 'labels', or one column for each class")

    rows: list[tuple[str, Any, str]] = []
    for line, cells in table:
        while len(cells) > len(columns) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(columns):
            raise DatasetError(
                f"{path}, line {line}: {len(cells)} columns, but the heading has {len(columns)}; "
                f"quote cells that hold '{delimiter}', or separate labels by '|'"
            )
        if not cells[name].strip():
            raise DatasetError(f"{path}, line {line}: the column '{columns[name]}' is empty")
        where = cells[split].strip() if split is not None else ""
        if labels is not None:
            rows.append((cells[name], cells[labels], where))
            continue
        chosen = []
        for column, i in one_hot.items():
            is_set = _VALUES.get(cells[i].strip().lower())
            if is_set is None:
                raise DatasetError(
                    f"{path}, line {line}: '{cells[i]}' in column '{column}', expected 0 or 1; "
                    "remove columns that are no classes, or name the one with labels 'labels'"
                )
            if is_set:
                chosen.append(column)
        rows.append((cells[name], chosen, where))
    return _Rows(rows, () if labels is not None else tuple(map(class_name, one_hot)))


def _cells(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the rows; spreadsheets leave rows of empty cells behind."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {reader.line_num}: {error}; look for a quotation mark without its pair"
        ) from error


_VALUES = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), True),
    **dict.fromkeys(("0", "0.0", "-1", "-1.0", "false", "no", ""), False),
}


def _read_json(path: Path) -> _Rows:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]
        if twice:
            raise DatasetError(f"{path}: '{twice[0]}' is there twice; keep one")
        return dict(pairs)

    content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    if isinstance(content, Mapping):
        if {"images", "annotations"} <= set(content):
            raise DatasetError(f"{path}: annotations in COCO's form; read them with data=coco")
        return _Rows([(str(name), value, "") for name, value in content.items()])
    if not isinstance(content, list) or not all(isinstance(e, Mapping) for e in content):
        raise DatasetError(f'{path}: expected {{"image": [labels]}} or a list of such objects')
    rows = []
    for number, entry in enumerate(content, start=1):
        name = next((entry[c] for c in _NAME_COLUMNS if c in entry), None)
        labels = next((c for c in _LABEL_COLUMNS if c in entry), None)
        if name is None or labels is None:
            raise DatasetError(
                f"{path}: object {number} needs 'image' and 'labels', has {[*entry]}"
            )
        split = next((entry[c] for c in _SPLIT_COLUMNS if c in entry), None)
        rows.append((str(name), entry[labels], str(split or "").strip()))
    return _Rows(rows)


def _read_npy(path: Path) -> _Rows:
    content = load_npy_dictionary(path)
    return _Rows([(_npy_name(key), value, "") for key, value in content.items()])


def _npy_name(key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode(errors="replace")
    text = str(key)
    if isinstance(key, int | np.integer) and len(text) == 10:
        return f"{text[:4]}_{text[4:]}"  # IRN's files say 2007000032 for VOC's 2007_000032
    return text


_READERS = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".npy": _read_npy}

# What a pickled NumPy dictionary of arrays names; nothing here runs code of the file's choice.
_ALLOWED = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        home = re.sub(r"^numpy\.core\.", "numpy._core.", module)  # its name before NumPy 2
        if (home, name) not in _ALLOWED:
            raise DatasetError(
                f"the file asks for {module}.{name}, which plain arrays do not need: it may run "
                "code. It is not read"
            )
        return super().find_class(home, name)


def load_npy_dictionary(path: Path) -> dict[Any, Any]:
    """A dictionary of arrays that ``numpy.save`` stored, as papers ship their image labels.

    NumPy stores it as a pickle. ``numpy.load(allow_pickle=True)`` would run whatever the file
    asks for; here only the constructors of plain arrays are allowed.

    Raises:
        DatasetError: not such a file, or one that asks for anything else.
    """
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            if dtype != np.dtype(object) or shape != ():
                raise DatasetError(
                    f"{path}: holds an array {shape} of {dtype}, expected a dictionary of label "
                    "vectors by image name"
                )
            content = _ArraysOnly(file, encoding="latin1").load()  # of Python 2 too
    except DatasetError as error:
        text = str(error)
        raise DatasetError(text if str(path) in text else f"{path}: {text}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DatasetError(f"{path}: not readable as a NumPy dictionary ({error})") from error
    content = content.item() if isinstance(content, np.ndarray) else content
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    return content
