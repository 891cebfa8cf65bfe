"""What a run goes on from: which checkpoint, whether it fits, and what was changed since."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import TINY, compose
from wsss.build import build_method, build_network, plain_config
from wsss.errors import UserError
from wsss.resume import (
    changed_settings,
    check_fits,
    find_checkpoint,
    read_resumed,
)
from wsss.train import train

CLASSES = ("cat", "dog", "hen")


def config(*overrides: str) -> Any:
    return compose("train", [*TINY, "data.root=nowhere", *overrides])


def changes(*overrides: str) -> dict[str, tuple[Any, Any]]:
    then, now = plain_config(config()), plain_config(config(*overrides))
    return {key: (old, new) for key, old, new in changed_settings(then, now)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "cosa"
    few = [f"data.root={shapes_root}", "trainer.max_steps=2", "evaluate=false"]
    train(compose("train", [*TINY, *few]), folder)
    return folder


def refused(run: Path, shapes_root: Path, tmp_path: Path, *overrides: str) -> str:
    """What is said of going on from ``run``; nothing may have been written by then."""
    few = [f"data.root={shapes_root}", "evaluate=false", f"ckpt={run}"]
    with pytest.raises(UserError) as error:
        train(compose("train", [*TINY, *few, *overrides]), tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    return str(error.value)


def test_a_folder_stands_for_its_last_checkpoint(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    assert find_checkpoint(str(run), tmp_path) == find_checkpoint("last", run) == last
    assert find_checkpoint("last", tmp_path) is None
    with pytest.raises(UserError, match=r"is a folder without checkpoints/last\.ckpt"):
        find_checkpoint(str(tmp_path), run)


def test_another_method_is_refused(run: Path, shapes_root: Path, tmp_path: Path) -> None:
    own = ("method.", "experiment=")
    few = ["experiment=shapes", "method=cam", f"ckpt={run}", f"data.root={shapes_root}"]
    with pytest.raises(UserError, match=r"with method=cosa, this run is method=cam: choose"):
        train(
            compose("train", [*few, *(o for o in TINY if not o.startswith(own))]), tmp_path / "new"
        )
    assert list((tmp_path / "new").iterdir()) == []


def test_another_network_names_tensor_and_setting(
    run: Path, shapes_root: Path, tmp_path: Path
) -> None:
    said = refused(run, shapes_root, tmp_path, "backbone.options.embed_dim=48", "method.lr=1")
    assert "has the shape (1, 1, 24) there, (1, 1, 48) here" in said
    assert "trained with backbone.options.embed_dim=24, this run has backbone.options.emb" in said
    said = refused(run, shapes_root, tmp_path, "neck=uncertainty")
    assert "'network.neck." in said
    assert "is not in the checkpoint. It was trained with neck=None" in said
    said = refused(run, shapes_root, tmp_path, "method.threshold=0.4", "method.c2s_weight=1")
    assert "'threshold." in said
    assert "this run has method.threshold=0.4: set it so" in said
    said = refused(run, shapes_root, tmp_path, "method.optimizer=sgd")
    assert "method.optimizer=adamw, this run has method.optimizer=sgd" in said
    # Steps would show other images than theirs.
    said = refused(run, shapes_root, tmp_path, "trainer.accumulate_grad_batches=2")
    assert "set trainer.accumulate_grad_batches=1, or choose another ckpt" in said
    # A table would take the result for the one of another seed.
    said = refused(run, shapes_root, tmp_path, "seed=5")
    assert "set seed=0, or choose another ckpt" in said


def test_weights_alone_are_no_state_to_go_on_from(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    del content["optimizer_states"]
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds weights alone"):
        read_resumed(tmp_path / "a.ckpt", config())


def test_tensors_that_fit_are_loaded(run: Path) -> None:
    resumed = read_resumed(run / "checkpoints/last.ckpt", config())
    names = tuple(resumed.content["wsss"]["classes"])
    method = build_method(config(), build_network(config(), len(names)), names)
    check_fits(resumed, method)
    assert resumed.step == 2


def test_what_changes_a_run_is_listed_and_the_rest_is_not() -> None:
    assert changes() == {}
    free = ["data.num_workers=3", "data.root=elsewhere", "output_dir=x", "logger=wandb", "name=b"]
    assert changes(*free, "trainer.progress=true", "trainer.accelerator=gpu", "pictures=3") == {}
    found = changes("seed=1", "method.lr=0.5", "data.batch_size=8", "trainer.max_steps=9")
    assert found["seed"] == (0, 1)
    assert found["trainer.max_steps"] == (5, 9)
    assert found["data.batch_size"] == (4, 8)
    assert found["method.lr"][1] == 0.5
    assert len(found) == 4
    assert list(changes("view.crop_size=32")) == ["view.crop_size"]
    # A part that was not there is one change, not one of each of its keys.
    assert list(changes("addon=isl")) == ["addon.isl"]


def test_a_resumed_run_says_so_and_warns_of_changes(
    run: Path,
    shapes_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = [f"data.root={shapes_root}", "trainer.max_steps=3", "evaluate=false", "seed=7"]
    with caplog.at_level(logging.WARNING):
        train(compose("train", [*TINY, *few, "ckpt=last"]), tmp_path)
        assert f"{tmp_path} has no checkpoint: starts at step 0." in capsys.readouterr().out
        assert "Settings" not in caplog.text
        train(compose("train", [*TINY, *few[:1], *few[2:], "ckpt=last"]), tmp_path)
    assert f"Resumes {tmp_path} at step 3." in capsys.readouterr().out
    assert "last.ckpt was trained with: trainer.max_steps=5 (was 3)" in caplog.text
