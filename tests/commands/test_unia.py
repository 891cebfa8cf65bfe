"""method=unia through the command: what it chooses, resuming, two processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.commands.conftest import TINY, Run, compose
from tests.commands.test_train import assert_same, weights
from wsss.build import build_method, build_network
from wsss.methods import UniA
from wsss.nn import UncertaintyNeck
from wsss.train import train

OWN = ("experiment=", "method.loss", "method.thr", "trainer.max_steps")
#: four steps of warm-up, labels from both CAMs, and a label refined by PAR alone in between
SETTINGS = [
    "experiment=shapes",
    "method=unia",
    *(o for o in TINY if not o.startswith(OWN)),
    "method.loss_warmup_steps=2",
    "method.refine_start_step=3",
    "method.aux_steps=4",
    "method.high=0.6",
    "method.low=0.4",
    "addon.affinity.start_step=1",
    "trainer.max_steps=6",
]


@pytest.fixture
def unia(shapes_root: Path) -> list[str]:
    return [*SETTINGS, f"data.root={shapes_root}"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_chooses_neck_and_addons() -> None:
    cfg = compose("train", [*SETTINGS, "data.root=nowhere"])
    method = build_method(cfg, build_network(cfg, 2), ("a", "b"))
    assert isinstance(method, UniA)
    assert isinstance(method.network.neck, UncertaintyNeck)
    assert list(method.addons) == ["distribution", "affinity"]
    cfg = compose("train", [*SETTINGS[:-3], "data.root=nowhere", "neck=none", "addon=none"])
    method = build_method(cfg, build_network(cfg, 2), ("a", "b"))
    assert method.network.neck is None
    assert not method.addons
    for other in ("cosa", "cam"):
        assert "_target_" not in compose("train", [f"method={other}", "data.root=no"]).neck


def test_every_experiment_keeps_its_schedule_in_order() -> None:
    """Losses of labels start with the decoder, and the auxiliary CAM hands over within the run."""
    for name in ("voc", "coco", "acdc", "shapes", "voc_mini", "acdc_mini"):
        cfg = compose("train", [f"experiment=unia_{name}", "data.root=nowhere"])
        assert cfg.method._target_ == "wsss.methods.UniA"
        start = cfg.addon.distribution.start_step
        assert start == cfg.addon.affinity.start_step
        wanted = 16000 if name == "coco" else cfg.method.loss_warmup_steps
        assert start == wanted
        assert cfg.method.loss_warmup_steps < cfg.method.aux_steps < cfg.trainer.max_steps


def test_resumes_exactly(unia: list[str], tmp_path: Path) -> None:
    more = ["trainer.keep_every_n_steps=1", "trainer.save_every_n_steps=1", "evaluate=false"]
    more += ["trainer.val_every_n_steps=null", "trainer.log_every_n_steps=1"]
    whole = tmp_path / "whole"
    train(compose("train", [*unia, *more]), whole)
    for step in (1, 3):  # in the warm-up and after
        again = tmp_path / str(step)
        first = whole / "checkpoints" / f"step_{step:06d}.ckpt"
        train(compose("train", [*unia, *more, f"ckpt={first}"]), again)
        assert_same(weights(whole), weights(again))
    assert not torch.equal(
        weights(whole)["network.neck.masking.query.weight"],
        weights(whole, "step_000001.ckpt")["network.neck.masking.query.weight"],
    )
    found = rows(whole)
    assert len(found) == 6
    present = [{k.removeprefix("loss/") for k, v in row.items() if v} for row in found]
    assert ["energy" in names for names in present] == [False] * 2 + [True] * 4
    assert ["affinity" in names for names in present] == [False] + [True] * 5
    assert ["distribution" in names for names in present] == [False] * 3 + [True] * 3
    assert all({"cls", "cls_early", "token", "seg"} <= names for names in present)


def test_two_processes_equal_one(run: Run, unia: list[str], tmp_path: Path) -> None:
    """With the mean alone: samples are drawn by each process for itself."""
    more = ["addon.distribution.num_samples=0", "trainer.log_every_n_steps=1"]
    # Every term large enough to be seen in the weights.
    more += ["method.token_weight=3", "addon.affinity.weight=3", "addon.affinity.log=true"]
    more += ["method.energy_factor=1e-4", "method.energy_weight=1", "evaluate=false"]
    train(compose("train", [*unia, *more]), tmp_path / "one")
    run(
        "train",
        *unia,
        *more,
        f"output_dir={tmp_path / 'two'}",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    )
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-5)
    for name in ("affinity", "distribution", "token", "seg", "energy"):
        found = [abs(float(row[f"loss/{name}"] or 0)) for row in rows(tmp_path / "one")]
        assert max(found) > 0.01, name
