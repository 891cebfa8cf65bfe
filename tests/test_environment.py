"""environment.json: what a run ran on."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import wsss
from tests.commands.conftest import TINY, compose
from wsss import environment
from wsss.environment import describe, write_environment
from wsss.methods import CoSA
from wsss.train import train


def test_description_is_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["wsss", "train", "seed=3"])
    about = json.loads(json.dumps(describe("bf16-mixed", 2)))
    assert about["wsss"] == wsss.__version__
    assert about["python"] == ".".join(map(str, sys.version_info[:3]))
    assert about["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"lightning", "timm", "numpy", "platform"} <= set(about)
    assert about["command"] == ["wsss", "train", "seed=3"]
    assert (about["precision"], about["world_size"]) == ("bf16-mixed", 2)
    assert about["threads"] == torch.get_num_threads()
    assert about["cores"] >= 1
    assert about["cpu"]
    assert about["devices"] == []
    assert about["resumed_from_step"] is None
    assert describe("32-true", 1, resumed=7)["resumed_from_step"] == 7
    assert (
        len(describe("32-true", 1, range(torch.cuda.device_count()))["devices"])
        == torch.cuda.device_count()
    )
    age = datetime.now(UTC) - datetime.fromisoformat(about["started"])
    assert 0 <= age.total_seconds() < 600


def test_a_machine_without_a_list_of_processors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert describe("32-true", 1)["cpu"]


def test_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = describe("32-true", 1)
    about["started"] = "2024-02-29T23:59:30+00:00"
    monkeypatch.setattr(environment, "_now", lambda: "2024-03-01T00:01:00+00:00")
    path = tmp_path / "environment.json"
    write_environment(path, about)
    assert json.loads(path.read_text()) == about
    assert "finished" not in about
    write_environment(path, about, finished=True)
    end = {"finished": "2024-03-01T00:01:00+00:00", "seconds": 90.0}
    assert json.loads(path.read_text()) == about | end


def test_a_run_writes_it_at_its_start_and_completes_it(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*TINY, f"data.root={shapes_root}", "trainer.max_steps=1", "evaluate=false"]
    path = tmp_path / "environment.json"
    with monkeypatch.context() as broken:
        broken.setattr(CoSA, "step", lambda self, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(compose("train", few), tmp_path)
    start = json.loads(path.read_text())
    assert (start["precision"], start["world_size"]) == ("32-true", 1)
    assert "finished" not in start
    train(compose("train", few), tmp_path)
    end = json.loads(path.read_text())
    assert end["finished"] >= end["started"]
    assert end["seconds"] >= 0
    assert end["resumed_from_step"] is None
    train(compose("train", [*few, "trainer.max_steps=2", "ckpt=last"]), tmp_path)
    assert json.loads(path.read_text())["resumed_from_step"] == 1
