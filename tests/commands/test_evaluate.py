"""``wsss evaluate``: files, mistakes, two processes, the zip for the server, folders of masks."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import wsss.evaluate
from tests.commands.conftest import TINY, Run, compose
from tests.oracle.boundary import boundary_f
from tests.oracle.metrics import mean, segmentation_scores
from wsss.build import build_method, build_network
from wsss.checkpoints import read_checkpoint, saved_config, with_data
from wsss.data.images import encode_mask, read_rgb, voc_palette
from wsss.data.shapes import generate
from wsss.data.views import resize_image
from wsss.data.voc import VOC_CLASSES
from wsss.errors import UserError
from wsss.evaluate import default_folder, evaluate, log_tables
from wsss.inference import Inference
from wsss.metrics import protocols
from wsss.report import tables

QUIET = ["threads=1", "accelerator=cpu", "pictures=0"]
SEGMENTATION = ["seg/miou_ss", "seg/miou_ms_flip", "seg_given_tags/miou_ss"]

Evaluate = Callable[..., dict[str, float]]


def save_checkpoint(
    path: Path, classes: Sequence[str], *overrides: str, method_name: str = "cosa"
) -> Path:
    """A method with random weights, as training writes it; assignment and online network differ."""
    start = TINY
    if method_name != "cosa":
        own = ("method.loss_warmup", "method.threshold", "experiment=")
        kept = [o for o in TINY if not o.startswith(own)]
        start = ["experiment=shapes", f"method={method_name}", *kept]
    config = compose("train", [*start, *overrides])
    torch.manual_seed(0)
    network = build_network(config, len(classes))
    torch.nn.init.normal_(network.decoder.classifier.weight, std=0.5)  # type: ignore[union-attr,arg-type]
    method = build_method(config, network, tuple(classes))
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def classes(shapes_root: Path) -> list[str]:
    return (shapes_root / "classes.txt").read_text().split()


@pytest.fixture(scope="module")
def checkpoint(
    shapes_root: Path, classes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return save_checkpoint(folder / "checkpoints/best.ckpt", classes, f"data.root={shapes_root}")


@pytest.fixture
def score(checkpoint: Path, tmp_path: Path) -> Evaluate:
    """Evaluates the checkpoint into ``tmp_path / "out"`` with more overrides."""

    def call(*overrides: str) -> dict[str, float]:
        common = [f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'out'}", *QUIET]
        return evaluate(compose("evaluate", [*common, *overrides]))

    return call


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_markdown(path: Path) -> list[list[list[str]]]:
    """The tables of a file: rows of cells, without the rule below the heading."""
    found: list[list[list[str]]] = [[]]
    for line in path.read_text().splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def scores_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return content


# --- the files ---------------------------------------------------------------------------------


def test_files_of_a_checkpoint(
    score: Evaluate,
    classes: list[str],
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = score("pictures=2", f"coexistence=[{classes[1]},{classes[4]}]", "cpl_threshold=0.4")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        *("scores.json", "scores.csv", "scores.md", "images.csv", "pictures")
    }
    assert len([*(out / "pictures").iterdir()]) == 1
    content = scores_in(out)
    names = ["background", *classes]
    assert content["classes"] == names
    assert (content["name"], content["method"], content["step"]) == ("cosa_shapes", "cosa", 7)
    assert content["settings"] == {
        "split": "val",
        "images": 6,
        "image_size": 64,
        "scales": [1.0, 0.5],
        "cam_scales": [1.0, 0.5],
        "cpl_threshold": 0.4,
        "crf": None,
    }
    assert content["scores"] == {
        name: None if math.isnan(value) else round(100 * value, 2) for name, value in found.items()
    }
    for network in ("an", "on"):
        assert {f"{network}/{p}" for p in (*SEGMENTATION, "cpl_ensemble/miou_ms_flip")} <= {*found}
        for name in ("seg/cmiou_ss", "seg/boundary_f_ms_flip", "cpl/jf_ms_flip", "cls/map"):
            assert f"{network}/{name}" in found
    for name, by_class in content["per_class"].items():
        few = {c: by_class[c] for c in (classes[1], classes[4])}
        for score_name, of in ((name, by_class), (name.replace("miou", "cmiou"), few)):
            known = [v for v in of.values() if v is not None]
            average = sum(known) / len(known) if known else None
            assert content["scores"][score_name] == pytest.approx(average, abs=0.01), score_name

    rows = read_csv(out / "scores.csv")
    assert [row.pop("class") for row in rows] == [*names, "mean"]
    assert {k: None if v == "" else float(v) for k, v in rows[-1].items()} == content["scores"]
    boundaries, precisions = content["boundary_f"], content["average_precision"]
    assert boundaries
    assert precisions
    for c, row in zip(names, rows[:-1], strict=True):
        expected = {name: content["per_class"][name][c] for name in content["per_class"]}
        for full, by_class in content["details"].items():
            if full.endswith(("/seg/miou_ms_flip", "/cpl/miou_ms_flip")):
                for name, value in by_class[c].items():
                    share = value is not None and name == "confusion_ratio"
                    expected[full.replace("miou", name)] = 100 * value if share else value
        if c != "background":
            for name, by_class in boundaries.items():
                expected[name.replace("miou", "boundary_f")] = by_class[c]
            for network, by_class in precisions.items():
                expected[f"{network}/cls/map"] = by_class[c]
        filled = {k: float(v) for k, v in row.items() if v}
        known = {k: pytest.approx(v) for k, v in expected.items() if v is not None}
        assert filled == known, c

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    (_, *lines), (heading, *class_lines) = read_markdown(out / "scores.md")
    assert lines == [[name, shown(value)] for name, value in content["scores"].items()]
    assert heading[1:] == [*content["per_class"]]
    assert class_lines[-1] == ["mean", *(shown(content["scores"][n]) for n in heading[1:])]
    for line in class_lines[:-1]:
        assert line[1:] == [shown(content["per_class"][n][line[0]]) for n in heading[1:]]
    assert [line[0] for line in class_lines[:-1]] == names
    assert "- cpl threshold: 0.4\n" in (out / "scores.md").read_text()

    images = read_csv(out / "images.csv")
    listed = (shapes_root / "ImageSets/Segmentation/val.txt").read_text().split()
    assert [row["name"] for row in images] == sorted(listed)
    assert set(images[0]) == {"name", *content["per_class"]}
    assert all(0 <= float(v) <= 100 for row in images for k, v in row.items() if k != "name")

    printed = capsys.readouterr().out
    for text in (*names, "seg/miou_ms_flip", "cls/map", f"Written to {out}"):
        assert text in printed


def test_a_part_scores_as_among_all(score: Evaluate, checkpoint: Path, tmp_path: Path) -> None:
    whole = score()
    images = read_csv(tmp_path / "out/images.csv")
    part = score("networks=[an]", "protocols=[seg/miou_ss,cpl/miou_ms_flip]", "boundary=false")
    labels = {f"an/cls/{name}" for name in ("map", "image_ap")}
    means = {f"an/cpl/{name}_ms_flip" for name in ("precision", "recall", "confusion_ratio")}
    assert set(part) == {"an/seg/miou_ss", "an/cpl/miou_ms_flip"} | labels | means
    assert part == {name: whole[name] for name in part}
    rows = read_csv(tmp_path / "out/images.csv")
    assert [*rows[0]] == ["name", "an/seg/miou_ss", "an/cpl/miou_ms_flip"]
    assert rows == [{k: row[k] for k in rows[0]} for row in images]
    # A name alone is a list of one; also the only protocol may be one that is no headline.
    alone = score("networks=on", "protocols=cpl_ensemble/miou_ms_flip", "boundary=false")
    assert set(alone) == {"on/cpl_ensemble/miou_ms_flip", "on/cls/map", "on/cls/image_ap"}
    assert alone == {name: whole[name] for name in alone}


def test_scales_and_thresholds_of_the_command(score: Evaluate, tmp_path: Path) -> None:
    usual = score("networks=[an]")
    changed = score("networks=[an]", "eval_scales=[0.5]", "cam_scales=[0.5]", "cpl_threshold=0.7")
    assert changed["an/seg/miou_ss"] == usual["an/seg/miou_ss"]
    for name in ("an/seg/miou_ms_flip", "an/cpl/miou_ms_flip"):
        assert changed[name] != usual[name]
    settings = scores_in(tmp_path / "out")["settings"]
    assert (settings["scales"], settings["cam_scales"], settings["cpl_threshold"]) == (
        [0.5],
        [0.5],
        0.7,
    )


def test_the_folder_of_the_files(checkpoint: Path, tmp_path: Path) -> None:
    """Beside the run's checkpoints/, or beside a checkpoint that lies alone."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent, run / "checkpoints")
    quick = [*QUIET, "networks=[an]", "protocols=[seg/miou_ss]", "data.max_val_images=1"]
    evaluate(compose("evaluate", [f"checkpoint={run}", *quick]))
    assert (run / "evaluation/scores.json").is_file()
    alone = tmp_path / "downloads" / "best.ckpt"
    alone.parent.mkdir()
    shutil.copy(checkpoint, alone)
    evaluate(compose("evaluate", [f"checkpoint={alone}", *quick]))
    assert (alone.parent / "evaluation/scores.json").is_file()


def brighten(image: torch.Tensor, probabilities: torch.Tensor, preset: str) -> torch.Tensor:
    """In place of the CRF."""
    changed = probabilities.clone()
    changed[0] += 0.3 * image.float().mean(-1).to(changed) / 255
    return changed


@pytest.fixture
def crf(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the CRF; gives the presets that it was called with."""
    presets: list[str] = []

    def call(image: torch.Tensor, probabilities: torch.Tensor, preset: str) -> torch.Tensor:
        presets.append(preset)
        return brighten(image, probabilities, preset)

    for module in (wsss.evaluate, protocols, sys.modules["wsss.submission"]):
        monkeypatch.setattr(module, "dense_crf", call)
    return presets


def test_with_a_crf(score: Evaluate, crf: list[str], tmp_path: Path) -> None:
    found = score("networks=[an]", "crf=afa", "protocols=[seg/miou_ms_flip_crf]", "boundary=false")
    assert set(crf) == {"afa"}
    assert len(crf) == 1 + 6
    assert 0 <= found["an/seg/miou_ms_flip_crf"] <= 1
    content = scores_in(tmp_path / "out")
    assert content["settings"]["crf"] == "afa"
    assert list(content["confusion"]) == ["an/seg/miou_ms_flip_crf"]
    assert "- crf: afa\n" in (tmp_path / "out/scores.md").read_text()


# --- two processes -----------------------------------------------------------------------------


def test_two_processes_equal_one(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Five images over two ranks: one has a batch more than the other."""
    common = [
        f"checkpoint={checkpoint}",
        "data.max_val_images=5",
        "data.eval_batch_size=1",
        "data.num_workers=0",
        *QUIET,
    ]
    evaluate(compose("evaluate", [*common, f"output_dir={tmp_path / 'one'}"]))
    done = run("evaluate", *common, f"output_dir={tmp_path / 'two'}", "devices=2")
    assert done.stdout.count("Written to") == 1
    for name in ("scores.json", "images.csv", "scores.csv", "scores.md"):
        one, two = ((tmp_path / folder / name).read_text() for folder in ("one", "two"))
        assert one == two, name
    assert len(read_csv(tmp_path / "two/images.csv")) == 5
    assert "sync_dist" not in done.stderr


# --- mistakes ----------------------------------------------------------------------------------


@pytest.fixture
def _data_must_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the data set was opened")

    monkeypatch.setattr(wsss.evaluate, "build_data", refuse)


@pytest.mark.usefixtures("_data_must_not_be_read")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crf=coza", "crf=coza: no such preset. Did you mean 'cosa'?"),
        ("crf=x", "crf=x: no such preset. Known: cosa, toco_seg,"),
        ("protocols=[seg/miou_msflip]", "no 'seg/miou_msflip'. Did you mean 'seg/miou_ms_flip'"),
        ("protocols=[seg/miou_ms_flip_crf]", "'seg/miou_ms_flip_crf' needs a preset"),
        ("networks=[am]", "networks: no 'am'. Did you mean 'an'?"),
        ("networks=teacher", "networks: no 'teacher'. Known: an, on."),
        ("coexistence=[{nearly}]", "coexistence: no class '{nearly}'. Did you mean '{name}'?"),
        ("eval_scales=[]", "eval_scales=[]: give positive factors"),
        ("eval_scales=[1.0,0]", "eval_scales=[1.0, 0]: give positive"),
        ("cam_scales=[1.0,one]", "cam_scales=[1.0, 'one']: give positive"),
        ("cam_scales=1.0", "cam_scales=1.0: give positive factors"),
        ("eval_scales=[1.0,1.0]", "each once"),
        ("cpl_threshold=26", "cpl_threshold=26: CAMs lie between 0 and 1"),
    ],
)
def test_wrong_names(score: Evaluate, classes: list[str], override: str, message: str) -> None:
    words = {"name": classes[2], "nearly": f"{classes[2]}e"}
    with pytest.raises(UserError) as error:
        score(override.format(**words))
    assert message.format(**words) in str(error.value)


@pytest.mark.usefixtures("_data_must_not_be_read")
def test_a_crf_without_its_package(score: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"pip install 'wsss\[crf\]'"):
        score("crf=cosa")


@pytest.mark.usefixtures("_data_must_not_be_read")
def test_protocols_that_the_method_lacks(classes: list[str], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "cam.ckpt", classes, "data.root=x", method_name="cam")
    more = [f"checkpoint={path}", *QUIET]
    with pytest.raises(UserError, match=r"does not train what 'seg/miou_ss' scores.*cpl/miou_ms"):
        evaluate(compose("evaluate", [*more, "protocols=[cpl/miou_ms_flip,seg/miou_ss]"]))


def test_no_checkpoint() -> None:
    with pytest.raises(UserError, match="checkpoint is not set"):
        evaluate(compose("evaluate", QUIET))


def test_a_checkpoint_of_other_classes(
    classes: list[str], shapes_root: Path, tmp_path: Path
) -> None:
    for others, message in (
        (["moon", *classes[1:]], f"'moon' as class 1, the data set has '{classes[0]}'"),
        (classes[:-2], f"{len(classes) - 2} classes, the data set has {len(classes)}"),
    ):
        path = save_checkpoint(tmp_path / "other.ckpt", others, f"data.root={shapes_root}")
        with pytest.raises(UserError, match=r"other\.ckpt' was trained with") as error:
            evaluate(compose("evaluate", [f"checkpoint={path}", *QUIET]))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=fp8", "precision='fp8': choose one of auto"),
        ("accelerator=abacus", "accelerator=abacus"),
    ],
)
def test_devices_and_precisions_that_are_not_there(
    score: Evaluate, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        score(override)


def test_a_split_that_is_not_there(score: Evaluate) -> None:
    with pytest.raises(UserError, match=r"tests\.txt"):
        score("split=tests")


def test_a_split_without_masks_that_is_not_voc(checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    generate(root, train=2, val=2, image_size=64, seed=0, layout="folder")
    shutil.rmtree(root / "masks")
    (root / "shapes.json").unlink()
    more = [f"checkpoint={checkpoint}", "data=folder", f"data.root={root}", *QUIET]
    with pytest.raises(UserError, match=r"split 'val' of .* has no masks: there is nothing"):
        evaluate(compose("evaluate", more))


def test_output_folder_that_is_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    more = [f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'file'}", *QUIET]
    with pytest.raises(UserError, match=r"output_dir=.*cannot be written"):
        evaluate(compose("evaluate", more))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output_folder(checkpoint: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    more = [f"checkpoint={checkpoint}", f"output_dir={locked / 'out'}", *QUIET]
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(compose("evaluate", more))


def test_a_full_disk_keeps_what_was_written(
    score: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick = ["networks=[an]", "data.max_val_images=2", "protocols=[seg/miou_ss]"]
    score(*quick)
    old = (tmp_path / "out/images.csv").read_bytes()
    (tmp_path / "out/scores.json").unlink()
    capsys.readouterr()
    write = tables.write_atomically

    def fails(path: Path, content: bytes) -> None:
        if path.suffix == ".csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(tables, "write_atomically", fails)
    with pytest.raises(UserError, match=r"No space left on device.*output_dir=\.\.\."):
        score(*quick)
    assert "an" in scores_in(tmp_path / "out")["confusion"].popitem()[0]
    assert (tmp_path / "out/images.csv").read_bytes() == old
    assert "seg/miou_ss" in capsys.readouterr().out


def test_the_remedy_for_a_broken_image_helps(
    checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    first = (root / "ImageSets/Segmentation/val.txt").read_text().split()[0]
    (root / f"JPEGImages/{first}.jpg").write_bytes(b"")
    out = tmp_path / "out"
    quick = ["networks=[an]", "protocols=[seg/miou_ss]", f"output_dir={out}", *QUIET]
    more = [f"checkpoint={checkpoint}", f"data.root={root}", *quick]
    with pytest.raises(UserError, match=r"empty file.*\n.*data\.on_error=skip"):
        evaluate(compose("evaluate", more))
    with pytest.warns(UserWarning, match="left out 1 of 6 images"):
        evaluate(compose("evaluate", [*more, "data.on_error=skip"]))
    assert scores_in(out)["settings"]["images"] == 5


# --- W&B ---------------------------------------------------------------------------------------


def test_wandb_offline(score: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb")
    summary: dict[str, float] = {}
    finish = wandb.finish

    def finished(**how: int) -> None:
        summary.update(wandb.run.summary)
        finish(**how)

    monkeypatch.setattr(wandb, "finish", finished)
    score("logger=wandb", "networks=[an]", "protocols=[seg/miou_ss]", "data.max_val_images=2")
    assert wandb.run is None
    (folder,) = (tmp_path / "out/wandb").glob("offline-run-*")
    assert [*folder.glob("*.wandb")]
    assert [*folder.rglob("classes*.table.json")]
    value = scores_in(tmp_path / "out")["scores"]["an/seg/miou_ss"]
    assert summary["an/seg/miou_ss"] == pytest.approx(value / 100, abs=1e-4)


def test_what_wandb_is_given(score: Evaluate, tmp_path: Path) -> None:
    found = score("networks=[an]", "data.max_val_images=3")
    summary: dict[str, float] = {}
    logged: list[dict[str, Any]] = []
    logger = SimpleNamespace(
        experiment=SimpleNamespace(summary=summary),
        log_table=lambda key, columns, data: logged.append(
            {"key": key, "columns": columns, "data": data}
        ),
    )
    log_tables(logger, found, scores_in(tmp_path / "out"))  # type: ignore[arg-type]
    assert summary == pytest.approx(found, nan_ok=True)  # in [0, 1], as training logs them
    (table,) = logged
    rows = read_csv(tmp_path / "out/scores.csv")
    assert table["columns"] == [*rows[0]]
    for written, given in zip(rows, table["data"], strict=True):
        assert [*written.values()] == ["" if cell is None else str(cell) for cell in given]


# --- the zip for VOC's server --------------------------------------------------------------------

SIZES = {"2008_000006": (37, 50), "2008_000011": (50, 33), "2008_000012": (44, 44)}
FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


@pytest.fixture(scope="module")
def test_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC's tree as its test archive leaves it: images of several sizes and a list, no masks."""
    root = tmp_path_factory.mktemp("voc") / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation", "Annotations"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        blocks = resize_image(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), height, width)
        Image.fromarray(blocks).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Segmentation/test.txt").write_text("\n".join(SIZES))
    return root


@pytest.fixture(scope="module")
def voc_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc_run")
    return save_checkpoint(folder / "checkpoints/best.ckpt", VOC_CLASSES, "data.root=x")


@pytest.fixture
def submit(voc_checkpoint: Path, test_split: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs ``split=test``; gives the folder of the zip."""

    def call(*overrides: str) -> Path:
        common = [f"checkpoint={voc_checkpoint}", f"output_dir={tmp_path / 'out'}", *QUIET]
        data = ["data=voc", f"data.root={test_split}", "data.eval_size=64", "data.num_workers=0"]
        size = ["data.eval_batch_size=2", "split=test"]
        assert evaluate(compose("evaluate", [*common, *data, *size, *overrides])) == {}
        return tmp_path / "out"

    return call


def expected_labels(
    checkpoint: Path, root: Path, network: str | None = None, crf: bool = False
) -> dict[str, np.ndarray]:
    """Argmax of the multi-scale logits at each image's size."""
    inference = Inference.load(checkpoint, network, device="cpu")
    found = {}
    for name, size in SIZES.items():
        image = read_rgb(root / f"JPEGImages/{name}.jpg")
        square = torch.from_numpy(resize_image(image, 64, 64)).permute(2, 0, 1)[None]
        logits = inference(square).seg_logits
        assert logits is not None
        at_home = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
        if crf:
            at_home = brighten(torch.from_numpy(image), at_home.softmax(0), "cosa")
        found[name] = at_home.argmax(0).numpy()
    return found


def assert_holds(path: Path, expected: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == [f"{FOLDER}/{name}.png" for name in sorted(expected)]
        for name, label in expected.items():
            image = Image.open(io.BytesIO(archive.read(f"{FOLDER}/{name}.png")))
            assert image.mode == "P"
            assert image.size == label.shape[::-1]
            # PIL may leave out the colours behind the last that is used.
            colours = image.getpalette() or []
            assert colours == voc_palette().flatten().tolist()[: len(colours)]
            values = np.array(image)
            assert len(colours) > 3 * values.max()
            # A batch of two differs from an image alone in the last bit.
            assert (values != label).mean() < 0.002, name
            assert len(np.unique(label)) > 2


def test_zip_for_the_server(
    submit: Callable[..., Path],
    voc_checkpoint: Path,
    test_split: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = submit()
    assert [p.name for p in out.iterdir()] == ["voc2012_test.zip"]
    assert_holds(out / "voc2012_test.zip", expected_labels(voc_checkpoint, test_split))
    assert "3 masks of split 'test'" in capsys.readouterr().out


def test_zip_of_the_other_network_and_a_list_elsewhere(
    submit: Callable[..., Path], voc_checkpoint: Path, test_split: Path, tmp_path: Path
) -> None:
    own = tmp_path / "lists" / "mine.txt"
    own.parent.mkdir()
    own.write_text("\n".join(SIZES))
    out = submit("networks=[on]", f"split={own}")
    assert [p.name for p in out.iterdir()] == ["voc2012_mine_on.zip"]
    expected = expected_labels(voc_checkpoint, test_split, "on")
    assert_holds(out / "voc2012_mine_on.zip", expected)
    deployed = expected_labels(voc_checkpoint, test_split)
    assert any((deployed[name] != expected[name]).mean() > 0.05 for name in SIZES)


def test_zip_with_a_crf(
    submit: Callable[..., Path], voc_checkpoint: Path, test_split: Path, crf: list[str]
) -> None:
    out = submit("crf=cosa")
    assert set(crf) == {"cosa"}
    expected = expected_labels(voc_checkpoint, test_split, crf=True)
    assert_holds(out / "voc2012_test_cosa.zip", expected)


def test_zip_holds_one_network(submit: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="masks of one network"):
        submit("networks=[an,on]")


def test_no_zip_without_a_segmentation(
    submit: Callable[..., Path], voc_checkpoint: Path, tmp_path: Path
) -> None:
    cam = save_checkpoint(tmp_path / "cam.ckpt", VOC_CLASSES, "data.root=x", method_name="cam")
    with pytest.raises(UserError, match="trains no segmentation"):
        submit(f"checkpoint={cam}")
    assert not [*tmp_path.glob("out/*")]


def test_a_full_disk_keeps_the_old_zip(
    submit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = submit()
    old = (out / "voc2012_test.zip").read_bytes()

    def fails(self: zipfile.ZipFile, *_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fails)
    with pytest.raises(UserError, match=r"voc2012_test\.zip' cannot be written \(No space left"):
        submit()
    assert (out / "voc2012_test.zip").read_bytes() == old
    assert [p.name for p in out.iterdir()] == ["voc2012_test.zip"]


# --- mask files ----------------------------------------------------------------------------------


@pytest.fixture
def truth(shapes_root: Path) -> dict[str, np.ndarray]:
    names = (shapes_root / "ImageSets/Segmentation/val.txt").read_text().split()
    folder = shapes_root / "SegmentationClass"
    return {name: np.array(Image.open(folder / f"{name}.png")) for name in names}


@pytest.fixture
def score_masks(shapes_root: Path, tmp_path: Path) -> Evaluate:
    """Scores ``tmp_path / "masks"``."""

    def call(*overrides: str) -> dict[str, float]:
        data = ["data=shapes", "~data.generate", f"data.root={shapes_root}"]
        common = [f"masks={tmp_path / 'masks'}", *QUIET, *data]
        return evaluate(compose("evaluate", [*common, *overrides]))

    return call


def write_masks(folder: Path, masks: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for name, mask in masks.items():
        (folder / f"{name}.png").write_bytes(encode_mask(mask))


def disturbed(truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moved masks with an undecided corner."""
    masks = {name: np.roll(mask, 3, axis=1) for name, mask in truth.items()}
    for mask in masks.values():
        mask[mask == 255] = 0
        mask[:16, :16] = 255
    return masks


@pytest.mark.parametrize("void", [None, 0])
@pytest.mark.parametrize("touched", [0, 1])
def test_the_ground_truth_as_pseudo_labels(
    score_masks: Evaluate,
    truth: dict[str, np.ndarray],
    tmp_path: Path,
    void: int | None,
    touched: int,
) -> None:
    """Also where a tool has written background in place of void, or somebody a pixel."""
    masks = {name: mask.copy() for name, mask in truth.items()}
    assert any((mask == 255).any() for mask in masks.values())
    for mask in masks.values():
        if void is not None:
            mask[mask == 255] = void
    first = next(iter(masks.values()))
    row, column = np.argwhere(first == 0)[0]
    first[row, column] = touched
    write_masks(tmp_path / "masks", masks)
    with pytest.warns(UserWarning, match="THESE MASKS ARE THE GROUND TRUTH: .* pixels of 6 m"):
        found = score_masks()
    assert (found["masks/miou"] == 1) == (not touched)
    assert scores_in(tmp_path / "masks_scores")["identical_to_truth"] == 6 - touched


@pytest.mark.filterwarnings("error:THESE MASKS")
def test_masks_are_scored_at_their_own_size(
    score_masks: Evaluate,
    truth: dict[str, np.ndarray],
    classes: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    masks = disturbed(truth)
    masks[next(iter(masks))] = next(iter(truth.values()))  # one of them may equal the truth
    write_masks(tmp_path / "masks", masks)
    found = score_masks(f"output_dir={tmp_path / 'here'}")
    pairs = []
    for name, mask in masks.items():
        filled = torch.from_numpy(np.where(mask == 255, 0, mask)).long()
        pairs.append((filled, torch.from_numpy(truth[name]).long()))
    iou = segmentation_scores(pairs, len(classes) + 1)["iou"]
    f = mean(boundary_f(pairs, len(classes) + 1)["f"])
    expected = {"masks/miou": mean(iou), "masks/boundary_f": f, "masks/jf": (mean(iou) + f) / 2}
    assert found == pytest.approx(expected)
    content = scores_in(tmp_path / "here")
    assert content["scores"] == {k: round(100 * v, 2) for k, v in expected.items()}
    assert content["per_class"] == {
        name: None if math.isnan(v) else round(100 * v, 2)
        for name, v in zip(["background", *classes], iou, strict=True)
    }
    assert (content["split"], content["images"], content["left_out"]) == ("val", 6, 0)
    assert content["identical_to_truth"] == 1
    undecided = sum(int((m == 255).sum()) for m in masks.values())
    share = undecided / sum(m.size for m in masks.values())
    assert content["undecided"] == round(share, 4) > 0.01
    printed = capsys.readouterr().out
    assert f"6 masks, {100 * share:.2f} % of their pixels undecided (255)." in printed
    assert "masks/jf" in printed


def test_masks_without_boundaries_of_another_split(
    score_masks: Evaluate, shapes_root: Path, tmp_path: Path
) -> None:
    names = (shapes_root / "ImageSets/Segmentation/train.txt").read_text().split()
    folder = shapes_root / "SegmentationClass"
    masks = {name: np.array(Image.open(folder / f"{name}.png")) for name in names}
    write_masks(tmp_path / "masks", disturbed(masks))
    found = score_masks("split=train", "boundary=false")
    assert set(found) == {"masks/miou"}
    content = scores_in(tmp_path / "masks_scores")
    assert (content["split"], content["images"]) == ("train", 24)
    with pytest.raises(UserError, match=r"no mask of split 'val', such as .*\.png.*another split"):
        score_masks()


def test_masks_that_are_missing_or_broken(
    score_masks: Evaluate, truth: dict[str, np.ndarray], tmp_path: Path
) -> None:
    masks = disturbed(truth)
    gone, small, foreign, *_ = masks
    masks[small] = masks[small][:-1]
    masks[foreign] = np.full_like(masks[foreign], 77)
    del masks[gone]
    write_masks(tmp_path / "masks", masks)
    with pytest.raises(UserError, match=rf"1 of 6 cannot be scored:\n.*{gone}\.png: no such mask"):
        score_masks()
    found = score_masks("data.on_error=skip")
    content = scores_in(tmp_path / "masks_scores")
    assert (content["images"], content["left_out"]) == (3, 3)
    assert 0 < found["masks/miou"] < 1

    write = {gone: disturbed(truth)[gone]}
    (tmp_path / f"masks/{gone}.png").write_bytes(encode_mask(write[gone]))
    with pytest.raises(UserError, match="2 of 6 cannot be scored") as error:
        score_masks()
    assert f"{small}.png: mask is 64x63 but its image is 64x64" in str(error.value)
    assert f"{foreign}.png: mask holds the values 77" in str(error.value)
    assert "data.on_error=skip" in str(error.value)

    for name in truth:
        (tmp_path / f"masks/{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="6 of 6 cannot be scored"):
        score_masks("data.on_error=skip")


def test_what_masks_need(
    score_masks: Evaluate, checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"masks='.*masks': no such folder"):
        score_masks()
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match=r"needs the data set.*data=voc"):
        evaluate(compose("evaluate", [f"masks={tmp_path / 'masks'}"]))
    with pytest.raises(UserError, match="masks and checkpoint are both set"):
        score_masks(f"checkpoint={checkpoint}")
    for setting in ("networks=[an]", "coexistence=[cat]", "eval_scales=[1.0]"):
        with pytest.raises(UserError, match=f"{setting.split('=')[0]}=.* would do nothing"):
            score_masks(setting)
    with pytest.raises(UserError, match="no mask of split 'val'"):
        score_masks()


def test_masks_of_a_split_without_truth(test_split: Path, tmp_path: Path) -> None:
    masks = {name: np.zeros(size, np.uint8) for name, size in SIZES.items()}
    write_masks(tmp_path / "masks", masks)
    more = ["data=voc", f"data.root={test_split}", "split=test", *QUIET]
    with pytest.raises(UserError, match="has no masks to compare with"):
        evaluate(compose("evaluate", [f"masks={tmp_path / 'masks'}", *more]))


# --- where its files go ------------------------------------------------------------------------


def test_one_evaluation_does_not_replace_another(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    last = checkpoint.with_name("last.ckpt")
    last.touch()
    (checkpoint.parent / "step_000001.ckpt").touch()

    def folder(path: Path, *overrides: str) -> str:
        cfg = compose("evaluate", [f"checkpoint={path}", *overrides])
        return default_folder(cfg, path).relative_to(run).as_posix()

    try:
        assert folder(checkpoint) == "evaluation"
        assert folder(last) == "evaluation_last"
        assert folder(checkpoint, "split=train", "crf=cosa") == "evaluation_train_cosa"
        assert folder(checkpoint, "data=voc", "data.root=/d/VOC2012") == "evaluation_VOC2012"
        assert folder(last, "split=/lists/hard.txt") == "evaluation_last_hard"
        assert folder(checkpoint, "data=voc") == "evaluation"  # told when the data are opened
    finally:
        for name in ("last.ckpt", "step_000001.ckpt"):
            checkpoint.with_name(name).unlink()


def test_images_have_the_size_of_the_run_on_other_data_too(
    checkpoint: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saved_config(read_checkpoint(checkpoint), checkpoint)
    assert saved.data.eval_size == 64
    other = compose("evaluate", ["data=voc", f"data.root={shapes_root}"]).data
    assert with_data(saved, other).data.eval_size == 64
    typed = SimpleNamespace(overrides=SimpleNamespace(task=["data=voc", "data.eval_size=448"]))
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.initialized", lambda: True)
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: typed)
    assert with_data(saved, other).data.eval_size == 448


def test_pictures_are_of_the_checkpoints_step_and_of_the_scored_threshold(
    score: Evaluate, tmp_path: Path
) -> None:
    few = ["pictures=2", "networks=[an]", "protocols=[cpl/miou_ms_flip]", "data.max_val_images=2"]
    drawn = []
    for threshold in (0.0, 1.0):  # all of an image is the class, none of it
        score(*few, f"cpl_threshold={threshold}")
        (picture,) = (tmp_path / "out/pictures").iterdir()
        assert picture.name == "step_000007.png"
        drawn.append(picture.read_bytes())
    assert drawn[0] != drawn[1]
