"""W&B's part of a run: online or not, one run for each, and the same one when it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.commands.conftest import TINY, compose
from wsss.loggers import make_wandb_logger, wandb_is_offline, wandb_run_ends
from wsss.resume import start_anew
from wsss.train import train

wandb = pytest.importorskip("wandb")


@pytest.fixture
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("_no_account")
def test_runs_stay_here_without_a_key_or_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wandb_is_offline()
    file = tmp_path / "netrc"
    file.write_text("machine wb.lab.example login user password key\n")
    assert wandb_is_offline()  # of another server
    monkeypatch.setenv("WANDB_BASE_URL", "https://wb.lab.example")
    assert not wandb_is_offline()
    monkeypatch.delenv("WANDB_BASE_URL")
    file.write_text("machine api.wandb.ai login user password key\n")
    assert not wandb_is_offline()
    for mode, offline in (("offline", True), ("disabled", True), ("online", False)):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert wandb_is_offline() is offline


def test_each_run_is_one_of_wandb_and_goes_on_as_the_same(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    few = [*TINY, f"data.root={shapes_root}", "logger=wandb", "evaluate=false"]
    for seed in (0, 1):
        train(compose("train", [*few, "trainer.max_steps=1", f"seed={seed}"]), tmp_path / str(seed))
        assert wandb.run is None
    ids = [(tmp_path / str(seed) / "wandb_run.txt").read_text().strip() for seed in (0, 1)]
    assert ids[0] != ids[1]

    def runs(seed: int) -> list[str]:
        folder = tmp_path / str(seed) / "wandb"
        return sorted(p.stem for p in folder.glob("offline-run-*/run-*.wandb"))

    assert runs(0) == [f"run-{ids[0]}"]
    assert runs(1) == [f"run-{ids[1]}"]
    train(compose("train", [*few, "trainer.max_steps=2", "ckpt=last"]), tmp_path / "0")
    assert set(runs(0)) == {f"run-{ids[0]}"}
    start_anew(tmp_path / "0")
    assert not (tmp_path / "0" / "wandb_run.txt").exists()


def test_a_run_of_somebody_elses_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    own = wandb.init(mode="disabled", dir=tmp_path)
    try:
        with wandb_run_ends():
            pass
        assert wandb.run is own
    finally:
        wandb.finish()


def test_a_run_that_is_switched_off_stays_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with wandb_run_ends():
        logger = make_wandb_logger(
            compose("train", ["data.root=x", "logger=wandb"]), tmp_path, resumable=True
        )
        assert logger is not None
        logger.log_metrics({"a": 1.0})
    assert os.environ["WANDB_MODE"] == "disabled"
    assert not [*tmp_path.rglob("*.wandb")]
