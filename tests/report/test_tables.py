"""What scores.json and the terminal say about a validated method."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from wsss.data.batch import EvalBatch
from wsss.files import write_atomically
from wsss.methods import CAM, CoSA
from wsss.methods.base import Method
from wsss.nn import WSSSNetwork
from wsss.report.tables import (
    class_rows,
    class_table,
    collect,
    number,
    print_scores,
    scores_table,
    write_class_tables,
    write_image_scores,
    write_scores,
)

CLASSES = ("cat", "dog", "eel")


def tiny(kind: type[Method], classes: Sequence[str] = CLASSES) -> Method:
    torch.manual_seed(0)
    network = WSSSNetwork(
        "vit_tiny_patch16_224",
        len(classes),
        early_block=-2,
        patch_size=8,
        img_size=32,
        depth=2,
        embed_dim=16,
        num_heads=2,
    )
    method = kind(network=network, classes=classes, eval_scales=(1.0,), cam_scales=(1.0,))
    method.run_config = {"name": "tiny", "seed": 3}
    return method.eval()


def validate(method: Method) -> None:
    """One image of cat alone: no dog or eel can be in targets."""
    mask = torch.zeros(20, 30, dtype=torch.int64)
    mask[5:15, 5:15] = 1
    batch = EvalBatch(torch.rand(1, 3, 32, 32), torch.tensor([[1.0, 0, 0]]), [mask], ["one"])
    method.on_validation_epoch_start()
    method.validation_step(batch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method.compute_scores()  # as Lightning does at the end of validation


@pytest.fixture(scope="module")
def cosa() -> Method:
    method = tiny(CoSA)
    validate(method)
    return method


def test_collect_names_every_network_and_protocol_in_percent(cosa: Method) -> None:
    content = collect(cosa, step=7)
    tables = cosa.compute_tables()
    labels = ("cls/map", "cls/image_ap")
    means = ("precision", "recall", "confusion_ratio")
    headline = {f"{p}/{name}_ms_flip": (p, name) for p in ("seg", "cpl") for name in means}
    assert set(content["scores"]) == {
        f"{n}/{p}" for n in ("an", "on") for p in (*tables["an"], *labels, *headline)
    }
    for name, value in content["scores"].items():
        network, protocol = name.split("/", 1)
        if protocol in labels:
            found = cosa.scores[network].compute_classification()[protocol[4:]]
        elif protocol in headline:
            kind, mean = headline[protocol]
            found = tables[network][f"{kind}/miou_ms_flip"][f"mean_{mean}"]
        else:
            found = tables[network][protocol]["miou"]
        if value is None:  # a confusion ratio where nothing is right
            assert not found.isfinite()
        else:
            assert value == round(100 * float(found), 2)
    assert content["classes"] == ["background", *CLASSES]
    assert {k: content[k] for k in ("name", "method", "seed", "step")} == {
        "name": "tiny",
        "method": "cosa",
        "seed": 3,
        "step": 7,
    }
    means = content["means"]["an/seg/miou_ms_flip"]
    assert set(means) == {"precision", "recall", "confusion_ratio"}


def test_details_by_class(cosa: Method, tmp_path: Path) -> None:
    content = collect(cosa)
    table = cosa.compute_tables()["an"]["seg/miou_ms_flip"]
    details = content["details"]["an/seg/miou_ms_flip"]
    assert list(details) == content["classes"]
    for i, name in enumerate(content["classes"]):
        for key, factor in (("precision", 100), ("recall", 100), ("confusion_ratio", 1)):
            value, expected = details[name][key], factor * float(table[key][i])
            if value is None:
                assert not math.isfinite(expected)
            else:
                assert value == pytest.approx(expected, abs=0.006)
    made = class_table(
        {f"{n}/seg/miou_ms_flip": dict.fromkeys(details, 1.0) for n in ("an", "on")},
        {"an/seg/miou_ms_flip": {c: dict(zip("abc", (2, 3, 0.25), strict=True)) for c in details}},
    )
    headings = [str(column.header) for column in made.columns]
    assert headings == ["class", "AN", "ON", "precision", "recall", "FP/TP"]
    assert [next(iter(column.cells)) for column in made.columns[1:]] == [
        *("1.00", "1.00", "2.00", "3.00", "0.25")
    ]
    assert "AN" in str(made.caption)
    write_class_tables(tmp_path, content)
    with (tmp_path / "scores.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    cell = rows["background"]["an/seg/precision_ms_flip"]
    assert float(cell) == details["background"]["precision"]
    cell = rows["mean"]["an/seg/recall_ms_flip"]
    assert float(cell) == content["scores"]["an/seg/recall_ms_flip"]


def test_class_without_a_pixel_is_none_and_a_dash() -> None:
    method = tiny(CAM)
    validate(method)
    content = collect(method)
    # CPL knows the labels: dog and eel are neither in the target nor in the prediction.
    assert content["per_class"]["on/cpl/miou_ms_flip"]["dog"] is None
    console = Console(width=100, record=True, file=io.StringIO())
    print_scores(method, console)
    text = console.export_text()
    assert "on/" not in text
    assert "cpl_ensemble/miou_ms_flip" in text
    dog = next(line for line in text.splitlines() if "dog" in line)
    assert dog.split("│")[2].strip() == "-"


def test_nothing_is_warned_of_twice(cosa: Method, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_scores(tmp_path / "scores.json", cosa)
        collect(cosa)


def test_file_is_plain_json_and_leaves_nothing_beside_it(cosa: Method, tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    write_scores(path, cosa)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["method"] == "cosa"
    assert [p.name for p in path.parent.iterdir()] == ["scores.json"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, None)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_headline_protocol_comes_first() -> None:
    scores = {"an/cpl/miou_ms_flip": 3.0, "an/seg/miou_ss": 1.0, "an/seg/miou_ms_flip": 2.0}
    protocols = list(scores_table(scores).columns[0].cells)
    assert protocols == ["seg/miou_ms_flip", "seg/miou_ss", "cpl/miou_ms_flip"]
    per_class = {name: {"background": value} for name, value in scores.items()}
    assert "seg/miou_ms_flip" in str(class_table(per_class).title)
    assert class_table({}).columns == []


def test_number() -> None:
    assert (number(None), number(float("nan")), number(28.406)) == ("-", "-", "28.41")


# --- what ``wsss evaluate`` writes -------------------------------------------------------------


def test_settings_say_what_names_do_not(cosa: Method) -> None:
    method = tiny(CoSA)
    method.run_config["data"] = {"val_split": "val", "eval_size": 32}
    for scores in method.scores.values():
        scores.crf, scores.cpl_threshold = "afa", 0.4  # type: ignore[assignment]
    method.image_scores = {"an": {"one": [1.0], "two": [0.5]}}
    settings = collect_quietly(method)["settings"]
    assert settings == {
        "split": "val",
        "images": 2,
        "image_size": 32,
        "scales": [1.0],
        "cam_scales": [1.0],
        "cpl_threshold": 0.4,
        "crf": "afa",
    }
    assert collect(cosa)["settings"]["crf"] is None


def collect_quietly(method: Method) -> dict[str, object]:
    """Of a method that has seen nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect(method)


def test_confusion_of_the_headline_or_of_what_there_is(cosa: Method) -> None:
    assert [*collect(cosa)["confusion"]] == ["an/seg/miou_ms_flip", "on/seg/miou_ms_flip"]
    matrix = torch.tensor(collect(cosa)["confusion"]["an/seg/miou_ms_flip"])
    assert matrix.sum(1).tolist() == [500, 100, 0, 0]  # the mask of validate()
    method = tiny(CoSA)
    for scores in method.scores.values():
        scores.crf = "cosa"  # type: ignore[assignment]
        scores.chosen = ("seg_given_tags/miou_ms_flip_crf",)  # type: ignore[assignment]
        scores.reset()  # type: ignore[operator]
    assert [*collect_quietly(method)["confusion"]] == [  # type: ignore[misc]
        "an/seg_given_tags/miou_ms_flip_crf",
        "on/seg_given_tags/miou_ms_flip_crf",
    ]


def test_one_class_has_boundaries_and_precision_too() -> None:
    method = tiny(CAM, ["cat"])
    for scores in method.scores.values():
        scores.boundary = True  # type: ignore[assignment]
    mask = torch.zeros(20, 30, dtype=torch.int64)
    mask[5:15, 5:15] = 1
    method.on_validation_epoch_start()
    method.validation_step(
        EvalBatch(torch.rand(1, 3, 32, 32), torch.ones(1, 1), [mask], ["one"]), 0
    )
    content = collect(method)
    assert content["average_precision"] == {"on": {"cat": 100.0}}
    assert [*content["boundary_f"]["on/cpl/miou_ms_flip"]] == ["cat"]


CONTENT = {
    "name": "tiny",
    "method": "cam",
    "seed": 3,
    "step": 7,
    "settings": {"split": "val", "cpl_threshold": 0.5, "crf": None},
    "classes": ["background", "a|b", "-"],
    "scores": {
        "on/cpl/miou_ms_flip": 30.0,
        "on/cpl/boundary_f_ms_flip": None,
        "on/cpl/jf_ms_flip": 15.25,
        "on/cls/map": 75.5,
    },
    "per_class": {"on/cpl/miou_ms_flip": {"background": 50.126, "a|b": 10.0, "-": None}},
    "boundary_f": {"on/cpl/miou_ms_flip": {"a|b": None, "-": 4.5}},
    "average_precision": {"on": {"a|b": 51.0, "-": 100.0}},
}


def test_rows_by_class() -> None:
    assert class_rows(CONTENT) == [
        ["class", *CONTENT["scores"]],  # type: ignore[misc]
        ["background", 50.126, None, None, None],
        ["a|b", 10.0, None, None, 51.0],
        ["-", None, 4.5, None, 100.0],
        ["mean", 30.0, None, 15.25, 75.5],
    ]
    few = {k: v for k, v in CONTENT.items() if k not in ("boundary_f", "average_precision")}
    assert class_rows(few)[2] == ["a|b", 10.0, None, None, None]


def test_tables_as_files(tmp_path: Path) -> None:
    write_class_tables(tmp_path, CONTENT)
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    expected = [["" if v is None else str(v) for v in row] for row in class_rows(CONTENT)]
    assert rows == expected
    assert (
        (tmp_path / "scores.md").read_text()
        == """# Scores

- name: tiny
- method: cam
- seed: 3
- step: 7
- split: val
- cpl threshold: 0.5
- crf: none

| score | % |
| --- | ---: |
| on/cpl/miou_ms_flip | 30.00 |
| on/cpl/boundary_f_ms_flip | - |
| on/cpl/jf_ms_flip | 15.25 |
| on/cls/map | 75.50 |

| IoU (%) | on/cpl/miou_ms_flip |
| --- | ---: |
| background | 50.13 |
| a\\|b | 10.00 |
| - | - |
| mean | 30.00 |
"""
    )


def test_scores_of_images_as_a_file(tmp_path: Path) -> None:
    method = tiny(CoSA)
    for scores in method.scores.values():
        scores.chosen = ("seg/miou_ss", "cpl/miou_ms_flip")  # type: ignore[assignment]
        scores.reset()  # type: ignore[operator]
    method.image_scores = {
        "an": {"b,2": [0.12346, math.nan], "a": [0.0, 1.0]},
        "on": {"a": [0.5, 0.25], "b,2": [math.nan, math.nan]},
    }
    write_image_scores(tmp_path / "images.csv", method)
    with (tmp_path / "images.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["name", *(f"{n}/{p}" for n in ("an", "on") for p in ("seg/miou_ss", "cpl/miou_ms_flip"))],
        ["a", "0.00", "100.00", "50.00", "25.00"],
        ["b,2", "12.35", "", "", ""],
    ]


def test_images_of_a_validated_method(cosa: Method, tmp_path: Path) -> None:
    cosa.image_scores = {name: s.image_scores() for name, s in cosa.scores.items()}  # type: ignore[operator]
    write_image_scores(tmp_path / "images.csv", cosa)
    with (tmp_path / "images.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    content = collect(cosa)
    assert row.pop("name") == "one"
    # One image: its mean over the classes that it holds is that of the set.
    assert {k: float(v) for k, v in row.items()} == {
        name: content["scores"][name] for name in content["per_class"]
    }
