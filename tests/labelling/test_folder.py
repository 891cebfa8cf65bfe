"""The record of a folder of pseudo-labels: what goes on, what is refused, what is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wsss.errors import UserError
from wsss.labelling.folder import RECORD, LabelFolder

NAMES = ["one", "sub/two", "three"]
LABELS = {"one": "cat", "sub/two": "cat;dog", "three": ""}


def _settings(**changes: Any) -> dict[str, dict[str, Any]]:
    """Of the CPL; ``network`` is a setting of all kinds."""
    common = {"network": "an", "classes": ("cat", "dog")}
    cpl = {"low": 0.5, "refine": "none"}
    for key, value in changes.items():
        (common if key in common else cpl)[key] = value
    return {"all": common, "cpl": cpl}


def _claim(folder: LabelFolder, settings: Any = None, **options: Any) -> list[str]:
    options = {"labels": LABELS, "about": {"checkpoint": "c", "step": 7}, "mine": NAMES} | options
    return folder.claim(_settings() if settings is None else settings, **options)


def _write(folder: LabelFolder, *names: str, kind: str = "cpl") -> None:
    for name in names:
        folder.path(kind, name).parent.mkdir(parents=True, exist_ok=True)
        folder.path(kind, name).write_text(f"{kind} of {name}")


def _there(folder: LabelFolder) -> list[str]:
    files = (p for p in folder.root.rglob("*") if p.is_file() and not p.name.startswith("."))
    return sorted(p.relative_to(folder.root).as_posix() for p in files if p.name != RECORD)


@pytest.fixture
def folder(tmp_path: Path) -> LabelFolder:
    """Claimed, with two of three masks and results."""
    folder = LabelFolder(tmp_path / "out")
    folder.root.mkdir()
    assert _claim(folder) == NAMES
    _write(folder, "one", "three")
    folder.record_results({"cpl": {"images": 2}})
    return folder


def _record(folder: LabelFolder) -> dict[str, Any]:
    return json.loads((folder.root / RECORD).read_text())


def test_what_is_missing_is_asked_for_again(folder: LabelFolder) -> None:
    assert _claim(folder, mine=["three", "one"]) == []
    assert _record(folder)["results"] == {"cpl": {"images": 2}}
    assert _claim(folder) == ["sub/two"]
    record = _record(folder)
    assert record["results"] == {}  # they would not be those of all files
    assert record["settings"] == json.loads(json.dumps(_settings()))
    assert (record["labels"], record["step"]) == (LABELS, 7)
    assert list(record)[-1] == "labels"
    assert _there(folder) == ["cpl/one.png", "cpl/three.png"]


def test_other_settings_are_refused_by_name(folder: LabelFolder) -> None:
    before = (folder.root / RECORD).read_text()
    with pytest.raises(UserError) as error:
        _claim(folder, _settings(low=0.3, network="on", crf="afa"))
    for part in (
        "checkpoint c, step 7",
        "network: an there, on now",
        "low of cpl: 0.5 there, 0.3 now",
        "crf of cpl: None there, afa now",
        "overwrite=true",
        str(folder.root),
    ):
        assert part in str(error.value)
    assert "refine" not in str(error.value)
    assert (folder.root / RECORD).read_text() == before


def test_overwriting_removes_what_the_record_names(folder: LabelFolder) -> None:
    _write(folder, "mine")  # a stranger's, which no record names
    assert _claim(folder, _settings(low=0.3), mine=["one"], overwrite=True) == ["one"]
    assert _there(folder) == ["cpl/mine.png"]  # three belonged to the old setting
    record = _record(folder)
    assert record["settings"]["cpl"]["low"] == 0.3
    assert record["results"] == {}


def test_overwriting_with_the_same_settings_leaves_other_shards_alone(folder: LabelFolder) -> None:
    assert _claim(folder, mine=["one"], overwrite=True) == ["one"]
    assert _there(folder) == ["cpl/three.png"]


def test_a_kind_can_be_added(folder: LabelFolder) -> None:
    more = {"all": _settings()["all"], "spl": {"refine": "par"}}
    assert _claim(folder, more) == NAMES
    assert _there(folder) == ["cpl/one.png", "cpl/three.png"]
    record = _record(folder)
    assert set(record["settings"]) == {"all", "cpl", "spl"}
    assert record["results"] == {"cpl": {"images": 2}}
    _write(folder, *NAMES, kind="spl")
    assert _claim(folder, more) == []
    assert _claim(folder, _settings() | {"spl": {"refine": "par"}}) == ["sub/two"]
    with pytest.raises(UserError, match="refine of spl: par there, crf now"):
        _claim(folder, more | {"spl": {"refine": "crf"}})
    with pytest.raises(UserError, match="low of cpl"):
        _claim(folder, _settings(low=0.1))


def test_overwriting_one_kind_keeps_the_others(folder: LabelFolder) -> None:
    more = {"all": _settings()["all"], "spl": {"refine": "par"}}
    _claim(folder, more)
    _write(folder, *NAMES, kind="spl")
    folder.record_results({"spl": {"images": 3}})
    changed = more | {"spl": {"refine": "none"}}
    assert _claim(folder, changed, overwrite=True) == NAMES
    assert _there(folder) == ["cpl/one.png", "cpl/three.png"]
    assert _record(folder)["results"] == {"cpl": {"images": 2}}
    # Other weights: no kind is true any more, asked for or not.
    _write(folder, *NAMES, kind="spl")
    other = {"all": _settings(network="on")["all"], "spl": {"refine": "none"}}
    assert _claim(folder, other, overwrite=True) == NAMES
    assert _there(folder) == []
    assert set(_record(folder)["settings"]) == {"all", "spl"}


def test_another_split_forgets_the_names_of_the_first(folder: LabelFolder) -> None:
    labels = {"four": "dog"}
    _claim(folder, _settings(network="on"), labels=labels, mine=["four"], overwrite=True)
    assert _record(folder)["labels"] == labels
    assert _there(folder) == []


def test_changed_image_labels_are_labelled_again(folder: LabelFolder) -> None:
    _write(folder, "sub/two")
    changed = LABELS | {"three": "dog", "four": "cat"}
    assert _claim(folder, labels=changed, mine=["one", "sub/two"]) == []
    assert _there(folder) == ["cpl/one.png", "cpl/sub/two.png"]  # three was another shard's
    assert _record(folder)["labels"] == changed
    assert _claim(folder, labels=changed, mine=[*NAMES, "four"]) == ["three", "four"]


def test_an_image_that_left_the_list_keeps_its_mask(folder: LabelFolder) -> None:
    assert _claim(folder, labels={"one": "cat"}, mine=["one"]) == []
    assert _there(folder) == ["cpl/one.png", "cpl/three.png"]
    assert set(_record(folder)["labels"]) == set(LABELS)


def test_files_that_nothing_is_known_of_are_left_alone(tmp_path: Path) -> None:
    folder = LabelFolder(tmp_path)
    _write(folder, "sub/two", "other")
    with pytest.raises(UserError, match=r"1 file that .* says nothing of, such as .*sub/two\.png"):
        _claim(folder)
    assert _there(folder) == ["cpl/other.png", "cpl/sub/two.png"]
    assert not (tmp_path / RECORD).exists()
    assert _claim(folder, mine=["one"], overwrite=True) == ["one"]
    assert _there(folder) == ["cpl/other.png"]

    # Another kind's, though one is recorded.
    _write(folder, "one", kind="spl")
    with pytest.raises(UserError, match=r"says nothing of, such as .*spl/one\.png"):
        _claim(folder, {"all": _settings()["all"], "spl": {"refine": "par"}})
    # Of an image that the list now also names.
    with pytest.raises(UserError, match=r"says nothing of, such as .*other\.png"):
        _claim(folder, labels=LABELS | {"other": "cat"})


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_record(folder: LabelFolder, text: str) -> None:
    (folder.root / RECORD).write_text(text)
    with pytest.raises(UserError, match=r"pseudo_labels\.json cannot be read"):
        _claim(folder)


def test_a_full_disk(folder: LabelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    before = (folder.root / RECORD).read_text()
    monkeypatch.setattr("wsss.labelling.folder.write_atomically", write)
    with pytest.raises(UserError, match=r"pseudo_labels\.json: cannot be written \(No space left"):
        folder.record_results({"cpl": {}})
    assert (folder.root / RECORD).read_text() == before


def test_paths(tmp_path: Path) -> None:
    folder = LabelFolder(tmp_path)
    assert folder.path("spl", "a/b.c") == tmp_path / "spl/a/b.c.png"
    assert folder.path("cam", "a") == tmp_path / "cam/a.npz"
    _write(folder, "one")
    assert folder.has(["cpl"], "one")
    assert not folder.has(["cpl", "cam"], "one")
