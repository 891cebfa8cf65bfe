"""CAM, refine: AffinityNet between two stages, through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.commands.conftest import TINY, Run, compose
from wsss.build import build_method, build_network
from wsss.cli import config_dir
from wsss.errors import UserError
from wsss.evaluate import evaluate
from wsss.files import sha256_of
from wsss.labelling import affinity as module
from wsss.pseudo_label import Labelled, pseudo_label
from wsss.report.__main__ import report
from wsss.train import train

AFFINITY = [
    "experiment=affinity_net_shapes",
    "~data.generate",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.eval_size=48",
    "view.crop_size=48",
    "backbone.options.channels=[8,8,8,8]",
    "method.warmup_steps=1",
    "trainer.max_steps=4",
    "trainer.threads=1",
    "trainer.progress=false",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
]
SCORE = "on/affinity/balanced_accuracy"


@pytest.fixture(scope="module")
def cam_run(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """A checkpoint of a network whose heads are noise."""
    own = ("method.loss_warmup", "method.threshold", "experiment=")
    overrides = ["experiment=cam_shapes", *(o for o in TINY if not o.startswith(own))]
    config = compose("train", [*overrides, f"data.root={shapes_root}"])
    torch.manual_seed(0)
    classes = _classes(shapes_root)
    method = build_method(config, build_network(config, len(classes)), classes)
    method.network.classifier.weight.data.normal_()
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    path = tmp_path_factory.mktemp("cam") / "checkpoints/best.ckpt"
    path.parent.mkdir()
    torch.save(content, path)
    return path.parent.parent


def _classes(root: Path) -> tuple[str, ...]:
    from wsss.data.shapes import open_tree

    return tuple(open_tree(root=root).prepare("train").classes)


def _label(cam_run: Path, out: Path, *overrides: str) -> Labelled:
    basic = [f"checkpoint={cam_run}", f"output_dir={out}", "device=cpu", "threads=1"]
    return pseudo_label(compose("pseudo_label", [*basic, *overrides]))


@pytest.fixture(scope="module")
def confident(cam_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("confident")
    _label(cam_run, out, "alpha=[1,8]")
    return out


@pytest.fixture(scope="module")
def settings(confident: Path, shapes_root: Path) -> list[str]:
    return [*AFFINITY, f"data.root={shapes_root}", f"data.masks={confident / 'cpl'}"]


@pytest.fixture(scope="module")
def affinity_run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("affinity")
    scores = train(compose("train", [*settings, "pictures=2", "trainer.val_every_n_steps=2"]), out)
    assert SCORE in scores
    return out


def _masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted((folder / "cpl").iterdir())}


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pseudo_labels.json").read_text())["settings"]["cpl"]


def test_confident_labels(confident: Path) -> None:
    assert _record(confident)["alpha"] == [1.0, 8.0]
    assert not {"low", "high"} & set(_record(confident))
    masks = _masks(confident)
    assert len(masks) == 24
    values = np.unique(np.concatenate([mask.ravel() for mask in masks.values()]))
    assert {0, 255} < set(values.tolist())


@pytest.mark.parametrize(
    "setting",
    ["protocols=[seg/miou_ss]", "eval_scales=[1]", "cam_scales=[1]", "cpl_threshold=0.4"],
)
def test_settings_of_protocols_are_refused(
    affinity_run: Path, tmp_path: Path, setting: str
) -> None:
    command = [f"checkpoint={affinity_run}", setting, f"output_dir={tmp_path}"]
    message = rf"method=affinity_net, and {setting.split('=')[0]}=.* would do nothing"
    with pytest.raises(UserError, match=message):
        evaluate(compose("evaluate", [*command, "accelerator=cpu"]))


def test_what_a_run_leaves(affinity_run: Path, settings: list[str], tmp_path: Path) -> None:
    scores = json.loads((affinity_run / "scores.json").read_text())
    assert scores["method"] == "affinity_net"
    groups = ("foreground", "background", "negative", "balanced_accuracy")
    assert set(scores["scores"]) == {f"on/affinity/{name}" for name in groups}
    assert 0 <= scores["scores"][SCORE] <= 100
    assert not (affinity_run / "pictures").exists()
    for name in ("best", "last"):
        assert (affinity_run / f"checkpoints/{name}.ckpt").is_file()

    found = evaluate(
        compose(
            "evaluate",
            [
                f"checkpoint={affinity_run}/checkpoints/last.ckpt",
                "accelerator=cpu",
                "threads=1",
                f"output_dir={tmp_path / 'again'}",
            ],
        )
    )
    again = json.loads((tmp_path / "again/scores.json").read_text())["scores"]
    assert again == scores["scores"]
    assert 100 * found[SCORE] == pytest.approx(again[SCORE], abs=0.01)

    written = report(
        compose(
            "report", [f"run={affinity_run}", "pictures=1", f"output_dir={tmp_path / 'report'}"]
        )
    )
    table = next(path for path in written if path.name == "table.md").read_text()
    assert SCORE in table


def test_a_run_goes_on(settings: list[str], tmp_path: Path) -> None:
    steps = ["evaluate=false", "pictures=0", "trainer.keep_every_n_steps=2"]
    train(compose("train", [*settings, *steps]), tmp_path / "whole")
    half = tmp_path / "whole/checkpoints/step_000002.ckpt"
    train(compose("train", [*settings, *steps, f"ckpt={half}"]), tmp_path / "half")
    states = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "half")
    ]
    start = torch.load(half, weights_only=True)["state_dict"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], start[key]) for key in start)


def test_refined(cam_run: Path, affinity_run: Path, confident: Path, tmp_path: Path) -> None:
    own = ["refine=affinity", f"affinity={affinity_run}"]
    _label(cam_run, tmp_path / "plain")
    _label(cam_run, tmp_path / "none", *own, "affinity_beta=1e9", "affinity_logt=0")
    _label(cam_run, tmp_path / "much", *own, "affinity_beta=2", "affinity_logt=8")
    plain, none, much = (_masks(tmp_path / name) for name in ("plain", "none", "much"))

    def differ(other: dict[str, np.ndarray]) -> float:
        return float(np.mean([(plain[name] != other[name]).mean() for name in plain]))

    # With no neighbour left nothing but the coarser grid makes a difference.
    assert differ(none) < differ(much)
    assert differ(none) < 0.2
    record = _record(tmp_path / "much")
    path = module.find_checkpoint(affinity_run)
    assert record["affinity_sha256"] == sha256_of(path)
    assert (record["refine"], record["affinity_beta"], record["affinity_logt"]) == (
        "affinity",
        2,
        8,
    )
    about = json.loads((tmp_path / "much/pseudo_labels.json").read_text())
    assert about["affinity"] == str(path.resolve())
    with pytest.raises(UserError, match="affinity_logt of cpl: 8 there, 6 now"):
        _label(cam_run, tmp_path / "much", *own, "affinity_beta=2")
    _label(cam_run, tmp_path / "powers", *own, "alpha=[1,8]")
    assert any((mask == 255).any() for mask in _masks(tmp_path / "powers").values())


def test_refusals(
    cam_run: Path, affinity_run: Path, tmp_path: Path, settings: list[str], shapes_root: Path
) -> None:
    own = ["refine=affinity", f"affinity={affinity_run}"]
    content = torch.load(module.find_checkpoint(affinity_run), weights_only=True)
    content["wsss"]["classes"][0] = "unicorn"
    torch.save(content, tmp_path / "other.ckpt")
    cases: list[tuple[list[str], str]] = [
        (["refine=affinity"], "give both refine=affinity and affinity=..."),
        ([f"affinity={affinity_run}"], "refine=none, affinity="),
        ([*own, "labels=both"], "labels=both: refine=affinity is of the CPL alone"),
        ([*own, "affinity_beta=0"], "affinity_beta=0: give a positive number"),
        ([*own, "affinity_beta=true"], "affinity_beta=True: give a positive number"),
        ([*own, "affinity_logt=1.5"], "affinity_logt=1.5: give a whole number from 0 to 20"),
        ([*own, "affinity_logt=-1"], "affinity_logt=-1: give"),
        ([*own, "affinity_logt=21"], "affinity_logt=21: give"),
        (["alpha=0"], "alpha=0: give one positive number"),
        (["alpha=[24,4]"], "alpha=[24, 4]: give one positive number, or two with the smaller"),
        (["alpha=[4,4]"], "alpha=[4, 4]: give"),
        (["alpha=[1,2,3]"], "alpha=[1, 2, 3]: give"),
        (["alpha=[]"], "alpha=[]: give"),
        (["alpha=much"], "alpha=much: give"),
        (["alpha=true"], "alpha=True: give"),
        (["alpha=.inf"], "alpha=.inf: give"),
        (["alpha=4", "threshold=0.4"], "takes the place of thresholds"),
        (["alpha=4", "low=0.4", "high=0.5"], "takes the place of thresholds"),
        (["refine=affinity", f"affinity={cam_run}"], "was trained with method=cam: give a run of"),
        (["refine=affinity", "affinity=nowhere"], "affinity='nowhere': no such file"),
        (["refine=affinity", f"affinity={tmp_path}/other.ckpt"], "'unicorn' as class 1"),
        ([f"checkpoint={affinity_run}"], "affinity_net, trains neither CAMs nor a segmentation"),
        ([f"checkpoint={affinity_run}", "labels=spl"], "checkpoint=RUN refine=affinity"),
    ]
    for overrides, message in cases:
        with pytest.raises(UserError) as error:
            _label(cam_run, tmp_path / "out", *overrides)
        assert message in str(error.value), overrides
    assert not (tmp_path / "out").exists()
    without = [o for o in settings if not o.startswith("data.masks")]
    with pytest.raises(UserError, match=r"data\.masks is not set: method=affinity_net"):
        train(compose("train", without), tmp_path / "out")
    truth = [*without, f"data.masks={shapes_root / 'SegmentationClass'}"]
    with pytest.raises(UserError, match="the data set's own masks"):
        train(compose("train", truth), tmp_path / "out")


def test_the_commands_of_the_help_say_what_their_experiments_need() -> None:
    """ResNet-38d has no weights on any hub: without backbone.weights the command stops at once."""
    text = OmegaConf.load(config_dir() / "pseudo_label.yaml").hydra.help.header
    (line,) = (part for part in text.replace("\\\n", " ").splitlines() if "wsss train" in part)
    words = dict(word.split("=", 1) for word in line.split() if "=" in word)
    assert set(words) == {
        *("experiment", "data.root", "data.masks", "output_dir", "backbone.weights")
    }
    cfg = compose("train", [f"{key}={value}" for key, value in words.items()])
    assert cfg.backbone.weights == words["backbone.weights"]
    assert not cfg.backbone.pretrained


def test_the_command_line(
    run: Run, cam_run: Path, confident: Path, settings: list[str], tmp_path: Path
) -> None:
    """Three commands, one after the other, as the help shows them."""
    done = run("train", *settings, f"output_dir={tmp_path / 'run'}", "pictures=2")
    assert f"Training masks: 24 pseudo-labels of {confident / 'cpl'}, made by " in done.stdout
    assert "affinity/balanced_accuracy" in done.stdout
    done = run(
        "pseudo_label",
        f"checkpoint={cam_run}",
        "refine=affinity",
        f"affinity={tmp_path / 'run'}",
        f"output_dir={tmp_path / 'out'}",
        "device=cpu",
        "threads=1",
        "shard=1/4",
    )
    assert "threshold 0.5" in done.stdout
    assert "on/cpl/miou_ms_flip_affinity" in done.stdout
    assert len(_masks(tmp_path / "out")) == 6
