"""``wsss.report``: reading runs, grouping seeds, comparing, and the files it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from wsss.build import build_method, build_network
from wsss.cli import config_dir
from wsss.data.shapes import CLASSES, generate
from wsss.errors import UserError
from wsss.report.__main__ import (
    Run,
    comparisons,
    find_runs,
    mean_and_deviation,
    read_run,
    report,
    run_titles,
    score_names,
    seed_groups,
    table_rows,
)

SCORES: dict[str, dict[str, float | None]] = {
    "cosa": {
        "on/seg/miou_ms_flip": 41.0,
        "an/cpl/miou_ms_flip": 52.5,
        "an/seg/miou_ms_flip": 45.0,
    },
    "cam": {"on/cpl/miou_ms_flip": 30.25, "on/cpl_early/miou_ms_flip": None},
    "supervised": {"on/seg/miou_ms_flip": 50.0},
}


def run(method: str, seed: int = 0, offset: float = 0.0, step: int = 9, **config: Any) -> Run:
    scores = {k: None if v is None else v + offset for k, v in SCORES[method].items()}
    content = {"name": method, "method": method, "seed": seed, "step": step, "scores": scores}
    data = {"seed": seed, "root": "there"}
    return Run(Path(f"{method}{seed}"), {"seed": seed, "data": data, **config}, content)


def compose(name: str, *overrides: str) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra.compose(name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().clear()


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


# --- finding and reading -------------------------------------------------------------------


def test_globs_find_run_folders_once_and_pass_over_others(runs: Path) -> None:
    found = find_runs([str(runs / "supervised"), str(runs / "*")])
    assert [p.name for p in found] == ["supervised", "cam", "cosa"]
    assert find_runs(str(runs / "cam")) == [runs / "cam"]


def test_folder_named_like_a_pattern_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "lr=[1]").mkdir()
    assert find_runs([str(tmp_path / "lr=[1]")]) == [tmp_path / "lr=[1]"]


@pytest.mark.parametrize(("names", "message"), [([], "runs is empty"), (["gone*"], "'gone\\*'")])
def test_no_run_found(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_runs(names)


def test_unfinished_run_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.yaml.*output_dir"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=rf"'{tmp_path}' has no scores.json.*ckpt=last"):
        read_run(tmp_path)
    (tmp_path / "scores.json").write_text('{"scores": ')
    with pytest.raises(UserError, match=r"not as wsss\.train writes it"):
        read_run(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="keys are missing"):
        read_run(tmp_path)


# --- numbers -------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_one_group() -> None:
    other_rate = run("cosa", seed=2, method_options={"lr": 1.0})
    shorter = run("cosa", seed=3, step=4)
    groups = seed_groups([run("cosa"), run("cam"), run("cosa", seed=1), other_rate, shorter])
    assert [[r.seed for r in group] for group in groups] == [["0", "1"], ["0"], ["2"], ["3"]]


def test_rows_end_with_mean_and_deviation_over_seeds() -> None:
    runs = [run("cosa"), run("cosa", 1, 2.0), run("cam")]
    names = score_names(runs)
    assert names == [
        "an/seg/miou_ms_flip",
        "an/cpl/miou_ms_flip",
        "on/seg/miou_ms_flip",
        "on/cpl/miou_ms_flip",
        "on/cpl_early/miou_ms_flip",
    ]
    header, rows = table_rows(runs, names)
    assert header == ["run", "method", "seed", "steps", *names]
    assert rows[0] == ["cosa", "cosa", "0", "9", "45.00", "52.50", "41.00", "-", "-"]
    assert rows[2] == ["cam", "cam", "0", "9", "-", "-", "-", "30.25", "-"]
    assert rows[3][:5] == ["cosa (n=2)", "cosa", "mean", "9", "46.00 +- 1.41"]
    assert len(rows) == 4


def test_mean_and_deviation_of_what_exists() -> None:
    assert mean_and_deviation([1.0, 2.0, None, 3.0]) == "2.00 +- 1.00"
    assert mean_and_deviation([1.0, None]) == "1.00"
    assert mean_and_deviation([None]) == "-"


def test_cosa_is_compared_with_its_bounds() -> None:
    runs = [run("cosa"), run("cosa", 1, 2.0), run("cam"), run("supervised")]
    ratio, gain = comparisons(runs)
    assert "46.00 is 92.0 % of supervised" in ratio
    assert "(mean of 2)" in ratio
    assert "53.50 is +23.25 points from cam" in gain
    assert comparisons([run("cam"), run("supervised")]) == []


def test_titles() -> None:
    runs = [run("cosa"), run("cosa", 1), run("cam")]
    assert run_titles(runs, None) == ["cosa seed 0", "cosa seed 1", "cam"]
    bounds = [run("cosa"), run("cam"), run("supervised")]
    for bound in bounds[1:]:
        bound.content["name"] = "shapes"
    assert run_titles(bounds, None) == ["cosa", "shapes cam", "shapes supervised"]
    assert run_titles(runs, ["a", "b", "c"]) == ["a", "b", "c"]
    with pytest.raises(UserError, match="titles has 1 names, runs stands for 3"):
        run_titles(runs, ["a"])


# --- whole command -------------------------------------------------------------------------


def test_report_writes_tables_and_one_picture(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ",".join(str(runs / name) for name in ("cosa", "cam", "supervised"))
    cfg = compose("report", f"runs=[{folders}]", f"output={tmp_path}", "pictures=2")
    written = report(cfg)
    assert [p.name for p in written] == ["table.md", "table.csv", "pictures.png"]
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


def test_missing_checkpoint_is_told_before_anything_is_written(runs: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    for name in ("config.yaml", "scores.json"):
        (run_folder / name).write_bytes((runs / "cam" / name).read_bytes())
    arguments = (f"runs=[{run_folder}]", f"output={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"last.ckpt.*pictures=0"):
        report(compose("report", *arguments))
    assert not (tmp_path / "out").exists()
    assert len(report(compose("report", *arguments, "pictures=0"))) == 2


def test_moved_data_and_scores_of_other_weights(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    checkpoint = torch.load(runs / "cam" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["wsss"]["config"]["data"]["root"] = str(tmp_path / "gone")
    torch.save(checkpoint, run_folder / "checkpoints" / "last.ckpt")
    content = json.loads((runs / "cam" / "scores.json").read_text())
    (run_folder / "scores.json").write_text(json.dumps({**content, "step": 12}))
    (run_folder / "config.yaml").write_bytes((runs / "cam" / "config.yaml").read_bytes())
    arguments = (f"runs=[{run_folder}]", f"output={tmp_path / 'out'}", "pictures=1")
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


def test_runs_must_be_given() -> None:
    with pytest.raises(UserError, match=r"runs is not set.*runs=\["):
        report(compose("report"))
