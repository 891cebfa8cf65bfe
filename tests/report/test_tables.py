"""What scores.json and the terminal say about a validated method."""

from __future__ import annotations

import io
import json
import warnings
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
    class_table,
    collect,
    number,
    print_scores,
    scores_table,
    write_scores,
)

CLASSES = ("cat", "dog", "eel")


def tiny(kind: type[Method]) -> Method:
    torch.manual_seed(0)
    network = WSSSNetwork(
        "vit_tiny_patch16_224",
        len(CLASSES),
        early_block=-2,
        patch_size=8,
        img_size=32,
        depth=2,
        embed_dim=16,
        num_heads=2,
    )
    method = kind(network=network, classes=CLASSES, eval_scales=(1.0,), cam_scales=(1.0,))
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
        method.compute_tables()  # as Lightning does at the end of validation


@pytest.fixture(scope="module")
def cosa() -> Method:
    method = tiny(CoSA)
    validate(method)
    return method


def test_collect_names_every_network_and_protocol_in_percent(cosa: Method) -> None:
    content = collect(cosa, step=7)
    tables = cosa.compute_tables()
    assert set(content["scores"]) == {f"{n}/{p}" for n in ("an", "on") for p in tables["an"]}
    for name, value in content["scores"].items():
        network, protocol = name.split("/", 1)
        assert value == round(100 * float(tables[network][protocol]["miou"]), 2)
    assert content["classes"] == ["background", *CLASSES]
    assert {k: content[k] for k in ("name", "method", "seed", "step")} == {
        "name": "tiny",
        "method": "cosa",
        "seed": 3,
        "step": 7,
    }
    means = content["means"]["an/seg/miou_ms_flip"]
    assert set(means) == {"precision", "recall", "confusion_ratio"}


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
