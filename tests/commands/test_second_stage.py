"""Two stages through the real command line: pseudo-labels of a run, a network trained on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands.conftest import Run

SECOND = [
    "experiment=cosa_ms_shapes",
    "~data.generate",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.eval_size=64",
    "view.crop_size=64",
    "backbone.options.channels=[8,8,8,8]",
    "decoder.width=8",
    "method.eval_scales=[1.0]",
    "method.warmup_steps=1",
    "trainer.max_steps=3",
    "trainer.threads=1",
    "trainer.progress=false",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "pictures=2",
]


@pytest.fixture
def labels(run: Run, tiny: list[str], tmp_path: Path) -> Path:
    first = tmp_path / "first"
    run("train", *tiny, f"output_dir={first}", "evaluate=false")
    run("pseudo_label", f"checkpoint={first / 'checkpoints/last.ckpt'}", "device=cpu", "threads=1")
    return first / "pseudo_labels" / "train" / "cpl"


@pytest.mark.parametrize("decoder", ["largefov", "upernet"])
def test_small_networks(
    run: Run, labels: Path, shapes_root: Path, tmp_path: Path, decoder: str
) -> None:
    experiment, out = f"experiment=cosa_ms_{decoder}_shapes", tmp_path / "second"
    data = [f"data.root={shapes_root}", f"data.masks={labels}"]
    run("train", experiment, *SECOND[1:], *data, f"output_dir={out}")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert decoder in config["decoder"]["_target_"].lower()
    assert "on/seg/miou_ms_flip" in json.loads((out / "scores.json").read_text())["scores"]


def test_two_stages(run: Run, labels: Path, shapes_root: Path, tmp_path: Path) -> None:
    root, out = f"data.root={shapes_root}", tmp_path / "second"
    done = run("train", *SECOND, root, f"data.masks={labels}", f"output_dir={out}")
    assert f"Training masks: 24 pseudo-labels of {labels}, made by " in done.stdout
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["data"]["masks"] == str(labels)
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert "on/seg/miou_ms_flip" in scores
    assert not [name for name in scores if "cpl" in name]
    weights = torch.load(out / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert weights["network.decoder.classifier.weight"].any()
    # The decoder is known from the checkpoint; the pseudo-labels may be gone by then.
    for path in labels.iterdir():
        path.unlink()
    again = run("evaluate", f"checkpoint={out}", f"output_dir={tmp_path / 'again'}")
    found = json.loads((tmp_path / "again/scores.json").read_text())["scores"]
    assert found["on/seg/miou_ms_flip"] == pytest.approx(scores["on/seg/miou_ms_flip"])
    assert again.returncode == 0


def test_refusals(run: Run, shapes_root: Path) -> None:
    root = f"data.root={shapes_root}"
    done = run("train", *SECOND, root, code=2)
    assert "data.masks is not set" in done.stderr
    truth = f"data.masks={shapes_root / 'SegmentationClass'}"
    done = run("train", *SECOND, root, truth, code=2)
    assert "the data set's own masks" in done.stderr
    assert "data.masks_may_be_truth=true" in done.stderr
    done = run("train", *SECOND, root, "method.pseudo_labels=false")
    assert "Training masks: ground truth of split 'train' (full supervision)" in done.stdout
