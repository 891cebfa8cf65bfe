"""Training and evaluation on every layout, through the commands; real data where it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import TINY, Run, compose
from wsss.checkpoints import find_checkpoint
from wsss.data.shapes import generate
from wsss.errors import UserError
from wsss.evaluate import evaluate
from wsss.train import train


def tree(root: Path, layout: str) -> list[str]:
    """A generated tree, and the overrides of a short run on it."""
    generate(root, train=18, val=6, image_size=64, seed=0, layout=layout)
    return [*TINY, f"data.root={root}"]


@pytest.mark.parametrize("layout", ["coco", "folder"])
def test_layouts_give_the_run_that_the_voc_tree_gives(tmp_path: Path, layout: str) -> None:
    """The same images, labels and masks through another reader: the same weights and scores."""
    runs = {}
    for name in ("voc", layout):
        overrides = tree(tmp_path / name / "data", name)
        scores = train(compose("train", overrides), tmp_path / name / "run")
        last = torch.load(tmp_path / name / "run/checkpoints/last.ckpt", weights_only=True)
        runs[name] = (scores, last["state_dict"])
    assert runs[layout][0] == pytest.approx(runs["voc"][0], nan_ok=True)
    for key, value in runs["voc"][1].items():
        torch.testing.assert_close(runs[layout][1][key], value, rtol=0, atol=0, equal_nan=True)


def test_acdc_is_scored_by_patient(run: Run, tmp_path: Path) -> None:
    overrides = tree(tmp_path / "data", "acdc")
    printed = run("train", *overrides, f"output_dir={tmp_path / 'run'}", "method.cpl_threshold=0.3")
    assert "mean over patients and classes" in printed.stdout
    content = json.loads((tmp_path / "run/scores.json").read_text())
    dice = content["dice"]["an/cpl/miou_ms_flip"]
    patients = sorted(p.name for p in (tmp_path / "data/training").iterdir())[3::4]
    assert list(dice) == ["all images", *patients]
    assert set(dice["all images"]) == set(content["classes"]) - {"background"}
    # One patient: its Dice is that of all images.
    assert len(patients) == 1
    assert dice[patients[0]] == dice["all images"]
    present = [value for value in dice[patients[0]].values() if value is not None]
    mean = content["means"]["an/cpl/miou_ms_flip"]["group_dice"]
    assert mean == pytest.approx(sum(present) / len(present), abs=0.01)
    assert mean > 0


def test_one_class_through_every_command(run: Run, tmp_path: Path) -> None:
    """One class: torchmetrics and numpy turn tables of one row into scalars."""
    overrides = tree(tmp_path / "data", "folder")
    (tmp_path / "data/shapes.json").unlink()
    rows = (tmp_path / "data/labels.csv").read_text().splitlines()
    name = (tmp_path / "data/classes.txt").read_text().splitlines()[0]
    (tmp_path / "data/classes.txt").write_text(f"{name}\n")
    here = [row.split(",")[0] + "," + (name if name in row else "") for row in rows[1:]]
    (tmp_path / "data/labels.csv").write_text("\n".join(["image,labels", *here]) + "\n")
    for path in (tmp_path / "data/masks").rglob("*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 255, mask == 1).astype(np.uint8)).save(path)
    out = tmp_path / "run"
    overrides = ["experiment=cosa_shapes", "data=folder", *overrides[2:]]  # no ~data.generate
    run("train", *overrides, f"output_dir={out}", "data.val_split=val")
    scores = json.loads((out / "scores.json").read_text())
    assert scores["classes"] == ["background", name]
    assert 0 < scores["scores"]["an/cls/map"] <= 100
    run("evaluate", f"checkpoint={out}", "boundary=true", f"output_dir={tmp_path / 'e'}")
    written = json.loads((tmp_path / "e/scores.json").read_text())["scores"]
    shared = {key: value for key, value in written.items() if key in scores["scores"]}
    assert shared == pytest.approx(scores["scores"], abs=0.011)
    run("pseudo_label", f"checkpoint={out}", "labels=both", "cam=true")
    run("predict", f"checkpoint={out}", f"input={tmp_path / 'data/images'}", "output_dir=p")
    run("analyse", f"checkpoint={out}")
    run("report", f"run={out}")


def test_a_folder_without_masks_trains_and_draws(run: Run, tmp_path: Path) -> None:
    """What most users have: images and tags alone."""
    overrides = tree(tmp_path / "data", "folder")
    shutil.rmtree(tmp_path / "data/masks")
    (tmp_path / "data/shapes.json").unlink()
    overrides = ["experiment=cosa_shapes", "data=folder", *overrides[2:]]  # no ~data.generate
    out = tmp_path / "run"
    printed = run(
        "train",
        *overrides,
        f"output_dir={out}",
        "pictures=2",
        "trainer.val_every_n_steps=2",
    )
    assert (
        "has no masks, so only the image labels were scored (an/cls/map "
        in printed.stdout + printed.stderr
    )
    for noise in ("classes without a pixel", "``compute`` method"):
        assert noise not in printed.stderr
    assert (out / "pictures/step_000005.png").is_file()
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert scores
    labels = {name for name in scores if "/cls/" in name}
    assert labels == {f"{n}/cls/{s}" for n in ("an", "on") for s in ("map", "image_ap")}
    assert all((value is not None) == (name in labels) for name, value in scores.items())
    best, last = (
        torch.load(out / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last")
    )
    assert best["global_step"] == last["global_step"] == 5
    cfg = compose("evaluate", [f"checkpoint={out}/checkpoints/last.ckpt", "threads=1"])
    with pytest.raises(UserError, match=r"split 'val' of .* has no masks"):
        evaluate(cfg)


def test_without_masks_the_first_validation_is_not_the_best(tmp_path: Path) -> None:
    """Nothing tells which weights are best: while the run goes on its last ones stand for it."""
    overrides = tree(tmp_path / "data", "folder")
    shutil.rmtree(tmp_path / "data/masks")
    (tmp_path / "data/shapes.json").unlink()
    overrides = ["experiment=cosa_shapes", "data=folder", *overrides[2:]]
    steps = ["trainer.val_every_n_steps=2", "trainer.save_every_n_steps=1", "evaluate=false"]
    train(compose("train", [*overrides, *steps]), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["last.ckpt"]
    assert find_checkpoint(tmp_path / "run").name == "last.ckpt"


@pytest.mark.parametrize(("data", "folder"), [("coco", "coco_mini"), ("acdc", "acdc_mini")])
def test_real_data(data: str, folder: str, shared_dir: Path, tmp_path: Path) -> None:
    if not (shared_dir / "data" / folder).is_dir():
        pytest.skip(f"{folder} is not in the shared folder")
    weights = shared_dir / "data/weights/vit_tiny_patch16_224.safetensors"
    overrides = [
        "experiment=cosa_voc_mini",
        f"data={data}",
        f"data.root={shared_dir / 'data' / folder}",
        f"backbone.weights={weights}",
        "data.num_workers=0",
        "data.max_val_images=2",
        "data.batch_size=2",
        "view.crop_size=96",
        "data.eval_size=96",
        "data.eval_batch_size=1",
        "method.eval_scales=[1.0]",
        "method.cam_scales=[1.0]",
        "method.loss_warmup_steps=1",
        "method.threshold_fill_steps=1",
        "trainer.max_steps=3",
        "trainer.threads=1",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "logger=csv",
        "pictures=0",
    ]
    scores = train(compose("train", overrides), tmp_path)
    assert 0 <= scores["an/seg/miou_ms_flip"] <= 1
    assert ("an/seg/group_dice_ms_flip" in scores) == (data == "acdc")
