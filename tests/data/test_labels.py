"""Label files in the forms that people have, whole, wrong and hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import unicodedata
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from wsss.data.images import DatasetError
from wsss.data.labels import (
    image_key,
    load_npy_dictionary,
    read_classes,
    read_label_file,
    read_lines,
)

CLASSES = ("cat", "dog", "traffic light")
EXPECTED = {"a": ["cat", "dog"], "b": ["traffic light"], "c": []}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save(folder: Path, content: Any, name: str = "cls_labels.npy") -> Path:
    """As papers' scripts do it."""
    np.save(folder / name, content, allow_pickle=True)
    return folder / name


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# --- CSV -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "image,labels\na.jpg,cat;dog\nb.jpg,traffic light\nc.jpg,\n",
        "image,labels\na.jpg,cat|dog\nb.jpg,traffic light\nc.jpg,",
        'image,labels\na.jpg,"cat,dog"\n"b.jpg","traffic light"\nc.jpg,""\n',
        "Filename;Class\na.jpg;cat|dog\nb.jpg;traffic light\nc.jpg;\n",
        "path\ttags\na.jpg\tcat, dog\nb.jpg\ttraffic light\nc.jpg\t\n",
        "\ufeffimage,labels\r\na.jpg,cat;dog\r\nb.jpg,traffic light\r\nc.jpg,\r\n",
        "image,labels\ra.jpg,cat;dog\rb.jpg,traffic light\rc.jpg,\r",
        " id , LABEL \n a.jpg , cat ; dog ;\nb.jpg, traffic light\nc.jpg, ;; \n",
        "file_name,width,category\na.jpg,8,cat\na.jpg,8,dog\nb.jpg,9,traffic light\nc.jpg,9,\n",
        "image,labels\na,cat\nb,traffic light\n\nc,\na,dog\na,cat\n",
        ",image,labels\n0,a.jpg,\"['cat', 'dog']\"\n1,b.jpg,['traffic light']\n2,c.jpg,[]\n",
        "\n\nimage,labels,,\na.jpg,cat;dog,,\nb.jpg,traffic light,,\nc.jpg,,,\n,,,\n,,,\n",
        "image,cat,dog,traffic light\na.jpg,1,1,0\nb.jpg,0,0,1\nc.jpg,0,0,0\n",
        ",image,cat,dog,traffic light\n5,a.jpg,1.0,TRUE,-1\n6,b.jpg,,no,yes\n7,c.jpg,0,0,0.0\n",
        "cat;dog;traffic light;name\n1;1;0;a.jpg\n0;0;1;b.jpg\n0;0;0;c.jpg\n",
    ],
)
def test_forms_of_csv(tmp_path: Path, text: str) -> None:
    for name in ("labels.csv", "labels.TSV"):
        for classes in (None, CLASSES):
            found = read_label_file(write(tmp_path, name, text), classes)
            assert found.labels == EXPECTED
            assert found.classes == CLASSES
            assert found.splits == {}


def test_order_of_classes(tmp_path: Path) -> None:
    text = "image,labels\na,zebra\nb,Ant;cat\n"
    assert read_label_file(write(tmp_path, "l.csv", text)).classes == ("Ant", "cat", "zebra")
    text = "image,zebra,Ant\na,1,0\n"
    assert read_label_file(write(tmp_path, "l.csv", text)).classes == ("zebra", "Ant")
    fixed = read_label_file(tmp_path / "l.csv", ["cow", "Ant", "zebra"])
    assert fixed.classes == ("cow", "Ant", "zebra")
    assert fixed.labels == {"a": ["zebra"]}
    digits = "image,labels\na,10\nb,9;2\n"
    assert read_label_file(write(tmp_path, "l.csv", digits)).classes == ("2", "9", "10")


def test_split_column(tmp_path: Path) -> None:
    text = "image,labels,Subset\na,cat,train\nb,dog,val \nc,,\na,dog,\n"
    found = read_label_file(write(tmp_path, "l.csv", text))
    assert found.splits == {"a": "train", "b": "val"}
    assert found.labels == {"a": ["cat", "dog"], "b": ["dog"], "c": []}
    one_hot = "image,split,cat\na,train,1\nb,val,0\n"
    found = read_label_file(write(tmp_path, "l.csv", one_hot))
    assert found.classes == ("cat",)
    assert found.splits == {"a": "train", "b": "val"}
    with pytest.raises(DatasetError, match=r"l\.csv: 'a\.jpg' is in two splits"):
        read_label_file(write(tmp_path, "l.csv", "image,labels,split\na,x,train\na.jpg,y,val\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,labels\na,cat\nb,cat,dog\n", r"line 3: 3 columns, but the heading has 2; quote"),
        ("image,labels\n\n\na,cat\nb\n", r"line 5: 1 columns, but the heading has 2"),
        ("image;labels\na;cat;dog\n", r"line 2: 3 columns.*separate labels by '\|'"),
        ("image,labels\na,cat\n ,dog\n", r"line 3: the column 'image' is empty"),
        ('image,labels\na,cat\nb,"dog\nc,cat\n', r"line 4: unexpected end of data.*quotation"),
        ('image,labels\na,"cat"s\n', r"line 2: .*expected after.*quotation"),
        (
            "a.jpg,cat\nb.jpg,dog\n",
            r"the first line must name .* found \['a\.jpg', 'cat'\]",
        ),
        ("", r"the first line must name the columns.*found \[\]"),
        ("image\na\n", r"needs a column 'labels', or one column for each class"),
        ("image,split\na,train\n", r"needs a column 'labels'"),
        ("image,labels\n", r"names no image"),
        ("image,labels\na,\n", r"names no class; give the images labels"),
        ("image,width,cat\na,640,1\n", r"line 2: '640' in column 'width', expected 0 or 1; remove"),
        ("image,kind\na,cat\n", r"line 2: 'cat' in column 'kind', expected 0 or 1.*'labels'"),
        ("image,cat,cat\na,1,0\n", r"two columns are called 'cat'"),
        ("image,labels\na,cat\nb,Cat\n", r"'Cat' and 'cat' are one class; spell it one way"),
        ("image,labels\na,cat;background\n", r"remove 'background'; it is always value 0"),
        ("image,__Background__,cat\na,1,0\n", r"remove '__Background__'"),
        (b"image,labels\na,\xe9t\xe9\n", r"not readable as CSV in UTF-8"),
        (b"\xff\xfei\x00m\x00a\x00g\x00e\x00", r"not readable as CSV in UTF-8"),
    ],
)
def test_wrong_csv(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"labels\.csv(: |, ){message}"):
        read_label_file(write(tmp_path, "labels.csv", text))


def test_too_many_classes(tmp_path: Path) -> None:
    rows = [f"a,c{i}\n" for i in range(255)]
    path = write(tmp_path, "labels.csv", "image,labels\n" + "".join(rows))
    with pytest.raises(DatasetError, match=r"labels\.csv: 255 classes, at most 254 fit"):
        read_label_file(path)
    path = write(tmp_path, "labels.csv", "image,labels\n" + "".join(rows[1:]))
    assert len(read_label_file(path).classes) == 254


def test_unknown_class_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "l.csv", "image,labels\na,cat\nb,dgo\nc,zzqx\n")
    with pytest.raises(DatasetError, match=r"unknown class 'dgo' of 'b', did you mean 'dog'\?"):
        read_label_file(path, CLASSES)
    with pytest.raises(DatasetError, match=r"\(and 1 more unknown\)"):
        read_label_file(path, CLASSES)
    path = write(tmp_path, "l.csv", "image,labels\nc,zzqx\n")
    with pytest.raises(DatasetError, match=r"unknown class 'zzqx' of 'c', known: cat, dog, traf"):
        read_label_file(path, CLASSES)


def test_missing_file_and_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no\.csv: no such label file"):
        read_label_file(tmp_path / "no.csv")
    with pytest.raises(DatasetError, match=r"l\.xlsx: unknown kind.*use \.csv, \.tsv, \.json, \.n"):
        read_label_file(write(tmp_path, "l.xlsx", "x"))


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.jpg", "a"),
        ("a", "a"),
        ("./a.JPEG", "a"),
        ("sub/one/a.tiff", "sub/one/a"),
        ("sub\\one\\a.webp", "sub/one/a"),
        (" my cat v1.5.png ", "my cat v1.5"),
        ("a.png.jpg", "a.png"),
        ("a.gif", "a.gif"),
        ("2007_000032", "2007_000032"),
        (unicodedata.normalize("NFD", "Füße/Äpfel é.jpg"), "Füße/Äpfel é"),
        ("猫.jpg", "猫"),
    ],
)
def test_image_key(name: str, key: str) -> None:
    assert image_key(name) == key


def test_names_of_one_image_meet(tmp_path: Path) -> None:
    """In the file, in the class list and composed or not, one name is one."""
    composed, apart = (unicodedata.normalize(form, "né/Kätzchen") for form in ("NFC", "NFD"))
    assert composed != apart
    text = f"image,labels\n{composed}.jpg,{apart}\n{apart.replace('/', chr(92))},hund\n"
    found = read_label_file(write(tmp_path, "l.csv", text))
    assert found.labels == {composed: [composed, "hund"]}
    classes = read_classes(write(tmp_path, "classes.txt", f"hund\n{apart}\n"))
    assert classes == ("hund", composed)
    assert read_label_file(tmp_path / "l.csv", classes).labels == {composed: [composed, "hund"]}


def test_classes_file(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf traffic light \r\n\r\ncat\r\n"
    assert read_classes(write(tmp_path, "classes.txt", text)) == ("traffic light", "cat")
    for content, message in (
        (" \n", "needs one foreground class"),
        ("cat\ncat\n", "each once"),
        ("_background_\ncat\n", "remove '_background_'"),
        ("".join(f"c{i}\n" for i in range(255)), "255 classes"),
        (b"\xe9t\xe9\n", "save it as UTF-8"),
    ):
        with pytest.raises(DatasetError, match=rf"classes\.txt: .*{message}"):
            read_classes(write(tmp_path, "classes.txt", content))
    with pytest.raises(DatasetError, match=r"no\.txt: not readable"):
        read_lines(tmp_path / "no.txt")


# --- JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"a.jpg": ["cat", "dog"], "b.jpg": "traffic light", "c.jpg": []},
        {"a": "cat; dog", "b": ["traffic light", " "], "c": None},
        {"a.jpg": [1, 1, 0], "b.jpg": [0.0, 0.0, 1.0], "c.jpg": [False, False, False]},
        [
            {"image": "a.jpg", "labels": ["dog", "cat"]},
            {"filename": "b.jpg", "label": "traffic light"},
            {"id": "c.jpg", "classes": None},
        ],
        [
            {"image": "a.jpg", "labels": [1, 0, 0]},
            {"image": "a.jpg", "labels": [0, 1, 0]},
            {"image": "b.jpg", "labels": [0, 0, 1]},
            {"image": "c.jpg", "labels": []},
        ],
    ],
)
def test_forms_of_json(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path, "labels.json", "\ufeff" + json.dumps(content))
    found = read_label_file(path, CLASSES)
    assert {name: sorted(labels) for name, labels in found.labels.items()} == EXPECTED
    if "0" not in json.dumps(content) and "false" not in json.dumps(content):
        assert read_label_file(path).classes == CLASSES


def test_json_splits(tmp_path: Path) -> None:
    rows = [
        {"image": "a", "labels": ["cat"], "split": "val"},
        {"image": "b", "labels": ["cat"], "split": None},
    ]
    assert read_label_file(write(tmp_path, "l.json", json.dumps(rows))).splits == {"a": "val"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["cat"', r"not readable as JSON.*Expecting.*line 1"),
        ("", r"not readable as JSON"),
        ("3", r'expected \{"image": \[labels\]\} or a list of such objects'),
        ('["a", "b"]', r"expected .* or a list of such objects"),
        ('[{"image": "a"}]', r"object 1 needs 'image' and 'labels', has \['image'\]"),
        ('[{"labels": []}]', r"object 1 needs 'image' and 'labels'"),
        ('{"a": [1, 0]}', r"labels of 'a' should be 3 values 0 or 1.*found 2 values \[1, 0\]"),
        ('{"a": [2, 0, 0]}', r"labels of 'a' should be 3 values 0 or 1"),
        ('{"a": 2}', r"labels of 'a' should be 3 values 0 or 1.*found 1 values \[2\]"),
        ('{"a": [1, "cat"]}', r"labels of 'a' should be class names, or values 0 and 1; found \[1"),
        ('{"a": [["cat"], "dog"]}', r"labels of 'a' should be class names"),
        ('{"a": {"cat": 1}}', r"labels of 'a' should be class names"),
        ('{"a": ["cta"]}', r"unknown class 'cta' of 'a', did you mean 'cat'"),
        ('{"a": ["cat"], "a": ["dog"]}', r"'a' is there twice"),
        ('{"": ["cat"]}', r"one of the image names is empty"),
        ("{}", r"names no image"),
        (
            '{"images": [], "annotations": [], "info": {}}',
            r"annotations in COCO's form; read them with data=coco",
        ),
    ],
)
def test_wrong_json(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"labels\.json: {message}"):
        read_label_file(write(tmp_path, "labels.json", text), CLASSES)


def test_vectors_need_the_names_of_the_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "labels.json", '{"a": [1, 0]}')
    with pytest.raises(DatasetError, match=r"labels of 'a' are numbers; give .* in classes\.txt"):
        read_label_file(path)
    with pytest.raises(DatasetError, match=r"labels of 'a' are numbers"):
        read_label_file(save(tmp_path, {"a": vector(1, 0)}))


# --- NumPy dictionaries ----------------------------------------------------------------------

VECTORS = {"a": vector(1, 1, 0), "b": vector(0, 0, 1), "c": vector(0, 0, 0)}


@pytest.mark.parametrize(
    "content",
    [
        VECTORS,
        OrderedDict(VECTORS),
        {f"{name}.jpg": row.astype(np.uint8) for name, row in VECTORS.items()},
        {np.str_(name): row.astype(bool) for name, row in VECTORS.items()},
        {name.encode(): row.astype(np.float64)[None] for name, row in VECTORS.items()},
        {name: row.astype(int).tolist() for name, row in VECTORS.items()},
        {name: list(row) for name, row in VECTORS.items()},
        {name: np.array(labels) for name, labels in EXPECTED.items()},
        {name: set(labels) for name, labels in EXPECTED.items()},
    ],
)
def test_forms_of_npy(tmp_path: Path, content: dict[Any, Any]) -> None:
    found = read_label_file(save(tmp_path, content, "cls_labels_onehot.npy"), CLASSES)
    assert {name: sorted(labels) for name, labels in found.labels.items()} == EXPECTED


def test_numbers_for_voc_names(tmp_path: Path) -> None:
    """IRN's cls_labels.npy writes 2007_000032 as a number."""
    content = {np.int32(2007000032): vector(1, 0, 0), 42: vector(0, 1, 0)}
    found = read_label_file(save(tmp_path, content), CLASSES)
    assert found.labels == {"2007_000032": ["cat"], "42": ["dog"]}


def object_file(path: Path, pickled: bytes) -> Path:
    """A .npy file of one object whose pickle is given."""
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    path.write_bytes(buffer.getvalue() + pickled)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_files_of_older_numpy(tmp_path: Path, protocol: int) -> None:
    """NumPy 1 called numpy._core numpy.core."""
    pickled = pickle.dumps(np.array(VECTORS, dtype=object), protocol)
    assert b"numpy._core.multiarray" in pickled
    if protocol < 4:  # the older protocols end a name with a line feed
        pickled = pickled.replace(b"numpy._core", b"numpy.core")
    else:  # and newer ones give its length; the frame around it has one, too
        pickled = pickled.replace(
            b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
        )
        length = int.from_bytes(pickled[3:11], "little") - 1
        pickled = pickled[:3] + length.to_bytes(8, "little") + pickled[11:]
    assert b"numpy.core.multiarray" in pickled
    assert b"numpy._core" not in pickled
    path = object_file(tmp_path / "cls_labels.npy", pickled)
    assert np.load(path, allow_pickle=True).item().keys() == VECTORS.keys()  # it is such a file
    with np.testing.assert_no_warnings():
        assert read_label_file(path, CLASSES).labels == EXPECTED


def test_files_of_python_2(tmp_path: Path) -> None:
    """There, the bytes of an array are a string."""
    raw = vector(1, 0, 1).tobytes()
    pickled = (
        b"\x80\x02}U\x0b2007_000032cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"U" + bytes([len(raw)]) + raw + b"tbs."
    )  # fmt: skip
    assert b"\x80" in raw  # not ASCII
    path = object_file(tmp_path / "cls_labels.npy", pickled)
    assert read_label_file(path, CLASSES).labels == {"2007_000032": ["cat", "traffic light"]}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def test_code_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark.npy"
    touch = f"open({str(mark)!r}, 'w').close()"
    inner = pickle.dumps(Call(eval, touch))
    bomb = object_file(tmp_path / "bomb.npy", inner)
    calls = {
        f"{os.system.__module__}.system": Call(os.system, f"touch {mark}"),
        "builtins.eval": Call(eval, touch),
        "builtins.exec": Call(exec, touch),
        "subprocess.check_call": Call(subprocess.check_call, ["touch", str(mark)]),
        "numpy.load": Call(np.load, str(bomb), None, True),
        "numpy.save": Call(np.save, str(mark), 1),
        f"{np.testing.runstring.__module__}.runstring": Call(np.testing.runstring, touch, {}),
        "_pickle.loads": Call(pickle.loads, inner),
    }
    for name, call in calls.items():
        for content in ({"a": vector(1, 0, 0), "b": call}, {call: vector(1, 0, 0)}, call):
            path = save(tmp_path, content)
            np.load(path, allow_pickle=True)  # it would run
            assert mark.exists(), name
            mark.unlink()
            with pytest.raises(DatasetError, match=rf"labels\.npy: .*asks for {re.escape(name)}, "):
                read_label_file(path, CLASSES)
            assert not mark.exists(), name


def test_parts_of_what_is_allowed_are_refused(tmp_path: Path) -> None:
    """A dotted name would reach everything that an allowed class or module holds."""
    for module, name in (
        ("numpy", "ndarray.tofile"),
        ("numpy._core.multiarray", "_reconstruct.__call__"),
        ("numpy.core", "multiarray._reconstruct"),
        ("numpy.core.multiarray", "fromfile"),
        ("collections", "abc.sys.modules"),
    ):
        pickled = (
            pickle.PROTO
            + b"\x04"
            + b"".join(
                pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
                for text in (module, name)
            )
            + pickle.STACK_GLOBAL
            + pickle.STOP
        )
        path = object_file(tmp_path / "x.npy", pickled)
        with pytest.raises(DatasetError, match=rf"asks for {re.escape(module)}\.{re.escape(name)}"):
            load_npy_dictionary(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_damaged_npy(tmp_path: Path, share: float) -> None:
    path = save(tmp_path, VECTORS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DatasetError, match=r"cls_labels\.npy: not readable as a NumPy dict"):
        read_label_file(path, CLASSES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((5, 20), np.float32), r"holds an array \(5, 20\) of float32, expected a dictio"),
        (np.array([VECTORS, VECTORS], dtype=object), r"holds an array \(2,\) of object"),
        (["a", "b"], r"holds an array \(2,\) of <U1"),
        (np.array(None, dtype=object), r"holds a NoneType, expected a dictionary"),
        ({}, r"names no image"),
        ({"a": vector(1, 0)}, r"labels of 'a' should be 3 values 0 or 1.*found 2 values"),
        ({"a": vector(1, np.nan, 0)}, r"labels of 'a' should be 3 values 0 or 1"),
        ({"a": vector(0.5, 0, 0)}, r"labels of 'a' should be 3 values 0 or 1"),
    ],
)
def test_wrong_npy(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"cls_labels\.npy: {message}"):
        read_label_file(save(tmp_path, content), CLASSES)
