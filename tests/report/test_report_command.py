"""``wsss report``: the whole command on untrained runs, and the files it writes."""

from __future__ import annotations

import csv
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from tests.report.made import SCORES, run
from tests.report.pages import Page
from wsss.build import build_data, build_method, build_network, restore_method
from wsss.checkpoints import read_checkpoint, saved_config
from wsss.cli import config_dir
from wsss.data.shapes import CLASSES, generate
from wsss.errors import UserError
from wsss.report.__main__ import asked_for, report
from wsss.report.drawing import Drawing, draw_image, draw_runs, eval_batch
from wsss.report.runs import read_runs, run_titles


def compose(name: str, *overrides: str) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra.compose(name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().clear()


def copy_run(run_folder: Path, target: Path, checkpoint: bool = True) -> Path:
    target.mkdir(parents=True)
    for name in ("config.yaml", "scores.json"):
        (target / name).write_bytes((run_folder / name).read_bytes())
    if checkpoint:
        shutil.copytree(run_folder / "checkpoints", target / "checkpoints")
    return target


def draw(cfg: DictConfig) -> Drawing:
    found, _ = read_runs(asked_for(cfg))
    return draw_runs(found, run_titles(found), cfg.pictures, cfg.data_root)


def draw_at(root: Path, name: str) -> Any:
    with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three finished (untrained) runs and the data that they name."""
    root = tmp_path_factory.mktemp("runs")
    generate(root / "shapes", train=2, val=4, image_size=32)
    torch.manual_seed(0)
    for method in SCORES:
        options = "{patch_size: 8, img_size: 32, depth: 2, embed_dim: 16, num_heads: 2}"
        cfg = compose(
            "train",
            f"method={method}",
            "data=voc",
            "backbone=vit_shapes",
            f"name={method}",
            f"data.root={root / 'shapes'}",
            "data.train_split=train",
            "data.num_workers=0",
            "data.eval_size=" + ("48" if method == "cam" else "32"),
            f"backbone.options={options}",
            "output_dir=out",
        )
        network = build_network(cfg, len(CLASSES), load_weights=False)
        module = build_method(cfg, network, CLASSES)
        checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 9}
        module.on_save_checkpoint(checkpoint)
        folder = root / method
        (folder / "checkpoints").mkdir(parents=True)
        torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
        OmegaConf.save(OmegaConf.create(module.run_config), folder / "config.yaml")
        content = {**run(method).content, "classes": ["background", *CLASSES]}
        (folder / "scores.json").write_text(json.dumps(content))
    return root


def test_report_of_several_runs_writes_tables_one_picture_and_a_page(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ",".join(str(runs / name) for name in ("cosa", "cam", "supervised"))
    cfg = compose("report", f"runs=[{folders}]", f"output_dir={tmp_path}", "pictures=2")
    written = report(cfg)
    assert [p.name for p in written] == ["table.md", "table.csv", "pictures.png", "report.html"]
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in written)
    assert "90.0 % of supervised" in printed
    assert "+22.25 points from cam" in printed

    with written[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["cosa", "cam", "supervised"]
    assert rows[0]["an/seg/miou_ms_flip"] == "45.00"
    assert rows[1]["an/seg/miou_ms_flip"] == ""
    assert "| cosa | cosa | 0 | 9 | 45.00 |" in written[0].read_text()
    picture = np.asarray(Image.open(written[2]))
    # image, truth, cosa prediction and CPL, cam CPL, supervised prediction
    assert picture.shape[1] == 6 * 196 + 4
    assert picture.shape[0] > 2 * 192

    page = Page(written[3].read_text())
    # The shared images have what the picture has; then each run's own panels.
    assert [image["alt"].split(" of ")[0] for image in page.all("img")] == [
        *["image", "truth", "cosa prediction", "cosa CPL", "cam CPL", "supervised prediction"] * 2,
        *["image", "truth", "CAM", "CPL", "SPL", "prediction"] * 2,
        *["image", "truth", "CAM", "CPL"] * 2,
        *["image", "truth", "prediction"] * 2,
    ]
    assert written[3].stat().st_size < 500_000


def test_run_is_runs_of_one(runs: Path, tmp_path: Path) -> None:
    for i, option in enumerate((f"run={runs / 'cam'}", f"runs=[{runs / 'cam'}]")):
        report(compose("report", option, f"output_dir={tmp_path / str(i)}", "pictures=0"))
    for name in ("table.md", "table.csv", "report.html"):
        one, other = ((tmp_path / i / name).read_text() for i in "01")
        assert one.split("Written ")[0] == other.split("Written ")[0]
    page = Page((tmp_path / "0" / "report.html").read_text())
    assert "Comparison" not in page.sections
    assert not any(tag == "details" and a.get("class") for tag, a in page.elements)


def test_a_single_run_has_its_report_in_its_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = copy_run(runs / "cam", tmp_path / "one")
    two = copy_run(runs / "supervised", tmp_path / "two")
    for option in (f"run={one}", f"runs=[{two}]"):
        report(compose("report", option, "pictures=0"))
    names = {"report.html", "table.csv", "table.md"}
    for folder in (one, two):
        assert {p.name for p in (folder / "report").iterdir()} == names
    assert not Path("outputs").exists()
    before = (one / "report/report.html").read_bytes()
    written = report(compose("report", f"runs=[{one},{two}]", "pictures=0"))
    assert written[-1] == Path("outputs/report/report.html")
    assert (one / "report/report.html").read_bytes() == before
    # Runs of a sweep that is still going are several, whatever is finished.
    (two / "scores.json").unlink()
    written = report(compose("report", f"run={tmp_path}/*", "pictures=0"))
    assert written[-1] == Path("outputs/report/report.html")


def test_an_older_report_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("pictures.png", "notes.txt"):
        (out / name).write_text("my own")
    arguments = (f"run={runs / 'cam'}", f"output_dir={out}")
    report(compose("report", *arguments, "pictures=0"))
    assert (out / "pictures.png").read_text() == "my own"  # no report has written it
    report(compose("report", *arguments, "pictures=1"))
    assert (out / "pictures.png").stat().st_size > 1000
    report(compose("report", *arguments, "pictures=0"))
    assert {p.name for p in out.iterdir()} == {"notes.txt", "report.html", "table.csv", "table.md"}


def test_a_folder_that_cannot_be_written(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir='.*file/x' cannot be written"):
        report(compose("report", f"run={runs / 'cam'}", f"output_dir={tmp_path}/file/x"))


def test_worst_and_best_images_are_drawn(runs: Path, tmp_path: Path) -> None:
    folder = copy_run(runs / "supervised", tmp_path / "run")
    names = (runs / "shapes" / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    rows = zip(names, ("50.0", "", "20.5", "30.25"), strict=True)
    (folder / "images.csv").write_text(
        "name,on/seg/miou_ms_flip\n" + "".join(f"{n},{v}\n" for n, v in rows)
    )
    cfg = compose("report", f"run={folder}", f"output_dir={tmp_path / 'out'}", "pictures=2")
    page = Page(report(cfg)[-1].read_text())
    words = page.words("Images")
    assert f"{names[2]}: " in words
    assert words.index("(worst, 20.50 %)") < words.index("(best, 50.00 %)")
    assert [image["alt"].split(" of ")[1] for image in page.all("img")] == [
        *[names[2]] * 3,
        *[names[0]] * 3,
    ]

    (folder / "images.csv").write_text("name,on/seg/miou_ms_flip\nelsewhere,1\n")
    with pytest.raises(UserError, match=r"images.csv' has scores of 'elsewhere'.*pictures=0"):
        report(cfg)


def test_own_images_come_from_the_run_s_own_data(runs: Path, tmp_path: Path) -> None:
    # The same names and other images: a second data set.
    generate(tmp_path / "other", train=2, val=4, image_size=32, seed=9)
    folder = copy_run(runs / "supervised", tmp_path / "run")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["wsss"]["config"]["data"]["root"] = str(tmp_path / "other")
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    name = (tmp_path / "other" / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[0]
    (folder / "images.csv").write_text(f"name,on/seg/miou_ms_flip\n{name},1\n")
    cfg = compose("report", f"runs=[{runs / 'cam'},{folder}]", f"output_dir={tmp_path / 'o'}")
    cfg.pictures = 1
    drawing = draw(cfg)
    assert drawing.protocols == [None, "on/seg/miou_ms_flip"]
    (own,) = drawing.own[1]
    with Image.open(tmp_path / "other" / "JPEGImages" / f"{name}.jpg") as image:
        native = np.asarray(image.convert("RGB"))
    assert np.abs(own.panels.panels["image"].astype(int) - native).max() <= 1
    assert own.panels.name == drawing.shared[0].panels.name
    assert not np.array_equal(own.panels.panels["image"], drawing.shared[0].panels.panels["image"])
    # Where data_root says that all lies in one place, it is asked for there.
    cfg.data_root = str(runs / "shapes")
    (own,) = draw(cfg).own[1]
    assert np.array_equal(own.panels.panels["image"], draw_at(runs / "shapes", name))


def test_missing_checkpoint_is_told_before_anything_is_written(runs: Path, tmp_path: Path) -> None:
    run_folder = copy_run(runs / "cam", tmp_path / "run", checkpoint=False)
    arguments = (f"runs=[{run_folder}]", f"output_dir={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"last.ckpt.*pictures=0"):
        report(compose("report", *arguments))
    assert not (tmp_path / "out").exists()
    written = report(compose("report", *arguments, "pictures=0"))
    assert [p.name for p in written] == ["table.md", "table.csv", "report.html"]


def test_moved_data_and_scores_of_other_weights(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = copy_run(runs / "cam", tmp_path / "run")
    checkpoint = torch.load(runs / "cam" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["wsss"]["config"]["data"]["root"] = str(tmp_path / "gone")
    torch.save(checkpoint, run_folder / "checkpoints" / "last.ckpt")
    content = json.loads((runs / "cam" / "scores.json").read_text())
    (run_folder / "scores.json").write_text(json.dumps({**content, "step": 12}))
    arguments = (f"runs=[{run_folder}]", f"output_dir={tmp_path / 'out'}", "pictures=1")
    with pytest.raises(UserError, match=r"gone.*data_root=.*pictures=0"):
        report(compose("report", *arguments))

    titles: list[str] = []
    grid = report.__globals__["grid"]

    def spy(rows: Any, **kwargs: Any) -> Any:
        titles.extend(rows[0].panels)
        return grid(rows, **kwargs)

    monkeypatch.setitem(report.__globals__, "grid", spy)
    report(compose("report", *arguments, f"data_root={runs / 'shapes'}"))
    assert titles == ["image", "truth", "cam at step 9 CPL"]


def test_unfinished_runs_of_a_sweep_are_named_everywhere(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_run(runs / "cam", tmp_path / "sweep" / "0", checkpoint=False)
    # as sweeps name folders; brackets are markup to rich
    going = copy_run(runs / "cam", tmp_path / "sweep" / "addon=[unia,isl_fsl]", checkpoint=False)
    (going / "scores.json").unlink()
    cfg = compose(
        "report", f"run={tmp_path}/sweep/*", f"output_dir={tmp_path / 'out'}", "pictures=0"
    )
    table, _, page = report(cfg)
    said = f"1 of 2 runs not finished (no scores.json), left out: {going}"
    assert said in capsys.readouterr().out
    assert f"- {said}" in table.read_text()
    assert "1 of 2 runs not finished" in Page(page.read_text()).words("Comparison")


def test_panels_at_the_scored_threshold_and_the_image_s_own_size(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build_data(compose("train", "data=voc", f"data.root={runs / 'shapes'}"))
    data.setup("validate")
    assert data.val_images is not None
    image, mask = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    monkeypatch.setattr(data.val_images, "load_image", lambda index: image)
    monkeypatch.setattr(data.val_images, "load_mask", lambda index: mask)
    seen: list[Any] = []

    def spy(method: Any, batch: Any, threshold: float | None = None) -> Any:
        seen.append((tuple(batch.images.shape), threshold))
        return ["panels"]

    monkeypatch.setattr("wsss.report.drawing.draw_panels", spy)
    checkpoint = read_checkpoint(runs / "cosa" / "checkpoints" / "last.ckpt")
    config = saved_config(checkpoint, "")
    config.method.cpl_threshold = 0.625
    picture = draw_image(restore_method(checkpoint, config, ""), data, 1, 32)
    assert picture.size == (20, 30)
    assert seen == [((1, 3, 32, 32), 0.625)]


def test_images_without_masks_are_drawn_with_a_void_truth(runs: Path) -> None:
    data = build_data(compose("train", "data=voc", f"data.root={runs / 'shapes'}"))
    data.setup("validate")
    assert data.val_images is not None
    assert eval_batch(data, 0, 32, torch.device("cpu")).masks[0].unique().tolist()[0] == 0
    data.val_images.has_masks = False
    batch = eval_batch(data, 0, 48, torch.device("cpu"))
    assert batch.masks[0].shape == (32, 32)
    assert batch.masks[0].unique().tolist() == [255]
    assert batch.images.shape == (1, 3, 48, 48)


def test_one_of_run_and_runs_must_be_given() -> None:
    with pytest.raises(UserError, match=r"runs is not set.*run=.*runs=\["):
        report(compose("report"))
    with pytest.raises(UserError, match=r"run and runs are both set.*runs=\["):
        report(compose("report", "run=a", "runs=b"))
    with pytest.raises(UserError, match="runs is empty"):
        report(compose("report", "runs=[]"))


def test_templates_lie_in_the_package() -> None:
    folder = resources.files("wsss.report") / "templates"
    assert {"report.html", "parts.html", "style.css"} <= {p.name for p in folder.iterdir()}
