"""The script behind RESULTS.md: its rows fit, runs are told apart, tables come from their files."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.commands.conftest import compose
from wsss.train import apply_variant

SCRIPT = Path(__file__).parents[1] / "benchmarks/results.py"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["results"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def made(out: Path, folder: Path, seed: int, seg: float) -> None:
    folder.mkdir(parents=True)
    scores = {"an/seg/miou_ms_flip": seg, "on/cpl/miou_ms_flip": 30.0, "on/seg/miou_ms_flip": 1.0}
    (folder / "scores.json").write_text(json.dumps({"seed": seed, "scores": scores}))
    (folder / "environment.json").write_text(json.dumps({"seconds": 600, "commit": "abc"}))


def test_every_row_composes(results: ModuleType) -> None:
    for row in results.read_rows():
        paths = dict.fromkeys(("voc", "acdc", "coco", "weights", "first"), "somewhere")
        settings = [setting.format(**paths) for setting in row.settings]
        cfg = apply_variant(compose("train", settings))
        assert cfg.boundary
        assert cfg.trainer.threads == 1


def test_listed_settings_are_whole(
    results: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are markup to rich."""
    asked = ["results.py", "--list", "--only", "methods_voc_mini/cosa + unia + isl_fsl"]
    monkeypatch.setattr(sys, "argv", asked)
    results.main()
    assert "neck=uncertainty addon=[unia,isl_fsl] data.root={voc}" in capsys.readouterr().out


def test_a_start_from_no_first_stage(results: ModuleType, tmp_path: Path) -> None:
    rows = {
        "data": {"d": []},
        "all": [],
        "tables": {"t": {"data": "d", "rows": {"r": ["a={first}"]}}},
    }
    (tmp_path / "rows.yaml").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"t/r has {first} and no labels_of"):
        results.read_rows(tmp_path / "rows.yaml")


def test_settings_for_all_runs(results: ModuleType, tmp_path: Path) -> None:
    plain, longer = results.read_rows(), results.read_rows(more=["trainer.max_steps=9"])
    for a, b in zip(plain, longer, strict=True):
        assert b.settings == (*a.settings, "trainer.max_steps=9")
        assert b.folder(tmp_path, 0) != a.folder(tmp_path, 0)


def test_different_settings_have_different_folders(results: ModuleType, tmp_path: Path) -> None:
    settings: dict[Path, tuple[str, ...]] = {}
    for row in results.read_rows():
        folder = row.folder(tmp_path, 0)
        assert settings.setdefault(folder, row.settings) == row.settings, folder
        assert row.folder(tmp_path, 1) != folder


def test_runs_what_is_not_done(
    results: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        results.Row("t", "one", ("experiment=one", "data.root={voc}")),
        results.Row("t", "again", ("experiment=one", "data.root={voc}")),
        results.Row("t", "two", ("experiment=two",)),
        results.Row("t", "three", ("experiment=three", "data.root={acdc}")),
    ]
    made(tmp_path, rows[2].folder(tmp_path, 0), 0, 1.0)
    started: list[list[str]] = []

    class Ended:
        returncode = 0

        def __init__(self, folder: Path, settings: list[str], first: Path | None) -> None:
            assert first is None
            started.append(settings)
            self.returncode = int("seed=1" in settings and "experiment=two" in settings)

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(results, "start", Ended)
    monkeypatch.setattr(results.time, "sleep", lambda seconds: None)
    paths = {"voc": "/v", "acdc": None}
    assert results.run_all(rows, [0, 1], paths, tmp_path, 2) == 1
    assert started == [
        ["experiment=one", "data.root=/v", "seed=0"],
        ["experiment=one", "data.root=/v", "seed=1"],
        ["experiment=two", "seed=1"],
    ]
    printed = capsys.readouterr().out
    assert "left out, give --acdc: t/three" in printed
    assert "FAILED" in printed


def test_second_stage_waits_for_its_first(
    results: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = results.Row("t", "one", ("experiment=one",))
    bad = results.Row("t", "bad", ("experiment=bad",))
    rows = [
        results.Row("t", "two", ("experiment=two",), one),
        results.Row("t", "never", ("experiment=two",), bad),
        one,
        bad,
    ]
    order: list[str] = []

    class Run:
        """Ends at the third look; a run named bad fails."""

        def __init__(self, folder: Path, settings: list[str], first: Path | None) -> None:
            order.append(folder.name)
            assert first is None or (first / "scores.json").is_file()
            self.folder, self.looks, self.returncode = folder, 0, None

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks == 3 and "bad" in self.folder.name:
                self.returncode = 1
            elif self.looks == 3:
                made(self.folder, self.folder, 0, 1.0)
                self.returncode = 0
            return self.returncode

    monkeypatch.setattr(results, "start", Run)
    monkeypatch.setattr(results.time, "sleep", lambda seconds: None)
    assert results.run_all(rows, [0], {}, tmp_path, 2) == 2
    assert order == ["one-seed0", "bad-seed0", "two_on_one-seed0"]
    assert "is not done: two_on_bad-seed0" in capsys.readouterr().out


def test_runs_of_other_settings_begin_anew(
    results: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Done or cut off, and with them the second stages on their labels."""
    monkeypatch.setattr(results, "compared_settings", lambda row: {"view.blur": 0.5})
    same = results.Row("t", "same", ("experiment=same",))
    done = results.Row("t", "done", ("experiment=done",))
    cut = results.Row("t", "cut", ("experiment=cut",))
    second = results.Row("t", "second", ("experiment=second",), done)
    for row, blur in ((same, 0.5), (done, 0.0), (second, 0.5), (cut, 0.0)):
        folder = row.folder(tmp_path, 0)
        made(tmp_path, folder, 0, 1.0)
        (folder / "config.yaml").write_text(f"view: {{blur: {blur}}}")
    (cut.folder(tmp_path, 0) / "scores.json").unlink()
    (tmp_path / "cut-seed0-old").mkdir()
    (tmp_path / "cut-seed0.log").write_text("of then")
    started: list[str] = []

    class Ended:
        returncode = 0

        def __init__(self, folder: Path, settings: list[str], first: Path | None) -> None:
            assert not folder.exists()
            started.append(folder.name)

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(results, "start", Ended)
    monkeypatch.setattr(results.time, "sleep", lambda seconds: None)
    # The second stage is not among the rows asked for; its labels are no longer there.
    assert results.run_all([same, done, cut], [0], {}, tmp_path, 1) == 0
    assert started == ["done-seed0", "cut-seed0"]
    assert (tmp_path / "done-seed0-old" / "scores.json").is_file()
    assert (tmp_path / "second_on_done-seed0-old").is_dir()
    assert (tmp_path / "cut-seed0-old2" / "environment.json").is_file()
    assert (tmp_path / "cut-seed0-old2.log").read_text() == "of then"
    printed = capsys.readouterr().out
    assert "now cut-seed0-old2, trained with view.blur=0.0, not 0.5: cut-seed0" in printed
    # What was moved aside is in no table.
    assert list(results.update_record(tmp_path / "R.json", [done, same], tmp_path)) == [
        "same-seed0"
    ]


def test_labels_of_other_settings_teach_no_second_stage(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage is done, and not among the rows asked for."""
    monkeypatch.setattr(results, "compared_settings", lambda row: {"view.blur": 0.5})
    first = results.Row("t", "first", ("experiment=first",))
    made(tmp_path, first.folder(tmp_path, 0), 0, 1.0)
    (first.folder(tmp_path, 0) / "config.yaml").write_text("view: {blur: 0.0}")
    second = results.Row("t", "second", ("experiment=second",), first)
    assert results.run_all([second], [0], {}, tmp_path, 1) == 1


def test_command_of_a_second_stage(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        results.subprocess, "Popen", lambda command, **kwargs: commands.append(command)
    )
    folder, first = tmp_path / "two", tmp_path / "first run"
    results.start(folder, ["experiment=two"])
    results.start(folder, ["experiment=two"], first)
    assert commands[0][1:3] == ["-m", "wsss.train"]
    assert commands[1][:2] == ["sh", "-c"]
    label, train = (shlex.split(part) for part in commands[1][2].split(" && "))
    labels = first / "pseudo_labels" / "results"
    assert label[1:3] == ["-m", "wsss.pseudo_label"]
    assert f"checkpoint={first / 'checkpoints' / 'last.ckpt'}" in label
    assert f"output_dir={labels}" in label
    assert train == [*commands[0], f"data.masks={labels / 'cpl'}"]


def test_a_second_stage_that_starts_from_the_first_ones_encoder(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[Path, list[str]] = {}

    def start(folder: Path, settings: list[str], first: Path | None = None) -> Any:
        started[folder] = settings
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(results, "start", start)
    monkeypatch.setattr(results, "move_stale", lambda *given: None)
    one = results.Row("t", "one", ("experiment=one",))
    own = results.Row("t", "own", ("experiment=two",), one)
    from_it = results.Row("t", "from", ("experiment=two", "backbone.weights={first}"), one)
    made(tmp_path, one.folder(tmp_path, 3), 3, 1.0)
    results.run_all([own, from_it], [3], {"voc": None}, tmp_path, 1)
    assert [folder.name for folder in started] == [
        "two_on_one-seed3",
        "two_from_encoder_on_one-seed3",
    ]
    weights = tmp_path / "one-seed3" / "checkpoints" / "last.ckpt"
    assert list(started.values())[1][1] == f"backbone.weights={weights}"


def written(results: ModuleType, path: Path, rows: list[object]) -> str:
    """The page after --write of all runs beside it."""
    runs = results.update_record(path.with_suffix(".json"), rows, path.parent)
    results.write_tables(path, rows, runs)
    return path.read_text()


def test_tables(results: ModuleType, tmp_path: Path) -> None:
    row = results.Row("t", "one", ("experiment=one",))
    empty = results.Row("t", "two", ("experiment=two",))
    for seed, seg in ((0, 50.0), (2, 52.0)):
        made(tmp_path, row.folder(tmp_path, seed), seed, seg)
    path = tmp_path / "R.md"
    path.write_text("before\n<!-- table t -->\nold\n<!-- end -->\nafter\n<!-- end -->\n")
    text = written(results, path, [row, empty])
    assert text.startswith("before\n<!-- table t -->\n")
    assert text.endswith("<!-- end -->\nafter\n<!-- end -->\n")
    assert "old" not in text
    assert "|  | seg | CPL | seeds | on | minutes | commit |" in text
    assert "| one | 51.0 ± 1.4 | 30.0 ± 0.0 | 0, 2 | CPU | 10 ± 0 | abc |" in text
    assert "| two | - | - | - | - | - | - |" in text
    assert written(results, path, [row, empty]) == text
    # The time of a resumed run is of its last part alone.
    about = {"seconds": 60, "resumed_from_step": 100, "commit": "abc"}
    (row.folder(tmp_path, 2) / "environment.json").write_text(json.dumps(about))
    text = written(results, path, [row, empty])
    assert "| one | 51.0 ± 1.4 | 30.0 ± 0.0 | 0, 2 | CPU | 10 | abc |" in text
    bound = results.Row("t", "supervised", ("experiment=bound",))
    made(tmp_path, bound.folder(tmp_path, 1), 1, 60.0)
    text = written(results, path, [bound, row, empty])
    assert "|  | seg | CPL | of supervised | seeds |" in text
    assert "| one | 51.0 ± 1.4 | 30.0 ± 0.0 | 85 % | 0, 2 |" in text
    assert "| supervised | 60.0 | 30.0 | 100 % | 1 |" in text
    assert "| two | - | - | - | - | - | - | - |" in text


def test_runs_whose_folders_are_gone_stay_in_the_tables(
    results: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = results.Row("t", "one", ("experiment=one",))
    bound = results.Row("t", "supervised", ("experiment=bound",))
    path = tmp_path / "R.md"
    path.write_text(
        "<!-- table t -->\n|  | seg | F | seeds | on | minutes | commit |\n| --- | --- |\n"
        "| supervised | 80.0 ± 1.0 | 20.0 | 0, 1 | CPU | 3 | - |\n"
        "| one | 1.0 | 2.0 | 7 | CPU | 3 | - |\n<!-- end -->\n"
    )
    made(tmp_path, row.folder(tmp_path, 0), 0, 50.0)
    written(results, path, [bound, row])
    shutil.rmtree(row.folder(tmp_path, 0))
    made(tmp_path, row.folder(tmp_path, 1), 1, 60.0)
    text = written(results, path, [bound, row])
    assert "|  | seg | F | CPL | of supervised | seeds | on | minutes | commit |" in text
    assert "| one | 55.0 ± 7.1 | - | 30.0 ± 0.0 | 69 % | 0, 1 | CPU | 10 ± 0 | abc |" in text
    # A row of which no run is known, as it was.
    assert "| supervised | 80.0 ± 1.0 | 20.0 | - | 100 % | 0, 1 | CPU | 3 | - |" in text
    # One of which a run is known gives way, though it has more seeds: of what settings?
    made(tmp_path, bound.folder(tmp_path, 0), 0, 70.0)
    text = written(results, path, [bound, row])
    assert "| supervised | 70.0 | 30.0 | 100 % | 0 | CPU | 10 | abc |" in text
    assert "t/supervised: gone are the page's seeds 0, 1" in capsys.readouterr().out
    made(tmp_path, bound.folder(tmp_path, 5), 5, 72.0)
    text = written(results, path, [bound, row])
    assert "| supervised | 71.0 ± 1.4 | 30.0 ± 0.0 | 100 % | 0, 5 |" in text
    # A run that was done again replaces the recorded one.
    shutil.rmtree(row.folder(tmp_path, 1))
    made(tmp_path, row.folder(tmp_path, 1), 1, 52.0)
    assert "| one | 51.0 ± 1.4 |" in written(results, path, [bound, row])


def test_settings_for_all_runs_have_a_page_of_their_own(
    results: ModuleType, tmp_path: Path
) -> None:
    """Else they erase rows that exist nowhere else."""
    plain = results.Row("t", "one", ("experiment=one",))
    longer = results.Row("t", "one", plain.settings, more=("trainer.max_steps=9",))
    path, other = tmp_path / "R.md", tmp_path / "longer.md"
    path.write_text("<!-- table t -->\n| | seg |\n| --- | --- |\n| one | 80.0 |\n<!-- end -->\n")
    before = path.read_text()
    with pytest.raises(SystemExit, match="a page of their own"):
        results.write_tables(path, [longer], {})
    assert path.read_text() == before
    made(tmp_path, longer.folder(tmp_path, 0), 0, 60.0)
    text = written(results, other, [longer])
    assert text.startswith("<!-- --set trainer.max_steps=9 -->\n")
    assert "| one | 60.0 |" in text
    assert written(results, other, [longer]) == text
    for rows in ([plain], [results.Row("t", "one", plain.settings, more=("trainer.max_steps=8",))]):
        with pytest.raises(SystemExit, match="max_steps=9"):
            results.write_tables(other, rows, {})
    assert other.read_text() == text


def test_a_run_of_other_settings_is_left_out(
    results: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name may come to mean something else: supervised once saw CoSA's strong views."""
    row = next(
        r for r in results.read_rows() if (r.table, r.name) == ("methods_shapes", "supervised")
    )
    folder = row.folder(tmp_path, 0)
    made(tmp_path, folder, 0, 50.0)
    record = tmp_path / "R.json"
    cfg = compose("train", [*row.settings, "data.root=/elsewhere", "seed=3"])
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    assert folder.name in results.update_record(record, [row], tmp_path)
    cfg.method.cam_scales = [1.0, 2.0]  # of CAMs that it does not have
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    assert folder.name in results.update_record(record, [row], tmp_path)
    assert "trained with" not in capsys.readouterr().out
    cfg.view.blur = 0.5
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    record.unlink()
    assert results.update_record(record, [row], tmp_path) == {}
    assert f"trained with view.blur=0.5, not 0.0: {folder.name}" in capsys.readouterr().out


def test_a_recorded_run_of_other_settings_is_in_no_table(
    results: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its folder may be gone, and the page may still have it."""
    settings = {"view.blur": 0.0}
    monkeypatch.setattr(results, "compared_settings", lambda row: settings)
    row = results.Row("t", "one", ("experiment=one",))
    folder, out = row.folder(tmp_path, 0), tmp_path / "none"
    made(tmp_path, folder, 0, 50.0)
    path, record = tmp_path / "R.md", tmp_path / "R.json"
    path.write_text("<!-- table t -->\n<!-- end -->\n")
    # Without a configuration to compare there is no telling: it counts.
    assert results.SETTINGS not in results.update_record(record, [row], tmp_path)[folder.name]
    (folder / "config.yaml").write_text("view: {blur: 0.0}")
    runs = results.update_record(record, [row], tmp_path)
    assert runs[folder.name][results.SETTINGS] == results.fingerprint(row)
    assert results.update_record(record, [row], out) == runs
    results.write_tables(path, [row], runs)
    assert "| one | 50.0 |" in path.read_text()
    settings["view.blur"] = 0.5
    results.write_tables(path, [row], results.update_record(record, [row], out))
    assert "| one | - |" in path.read_text()
    assert f"t/one: recorded of other settings: {folder.name}" in capsys.readouterr().out
    settings["view.blur"] = 0.0
    results.write_tables(path, [row], results.update_record(record, [row], out))
    assert "| one | 50.0 |" in path.read_text()


def test_a_second_stage_is_one_of_its_first_stages_settings(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"experiment=one": {"view.blur": 0.0}, "experiment=two": {"trainer.max_steps": 9}}
    monkeypatch.setattr(results, "compared_settings", lambda row: now[row.settings[0]])
    one = results.Row("t", "one", ("experiment=one",))
    two = results.Row("t", "two", ("experiment=two",), one)
    for row, config in ((one, "view: {blur: 0.0}"), (two, "trainer: {max_steps: 9}")):
        made(tmp_path, row.folder(tmp_path, 3), 3, 50.0)
        (row.folder(tmp_path, 3) / "config.yaml").write_text(config)
    folder = two.folder(tmp_path, 3)
    assert results.changed_settings(two, folder) == []
    before = results.fingerprint(two)
    now["experiment=one"] = {"view.blur": 0.5}
    assert results.changed_settings(two, folder) == ["labels of view.blur=0.0, not 0.5"]
    assert results.update_record(tmp_path / "R.json", [one, two], tmp_path) == {}
    assert results.fingerprint(two) != before
    # Without the first stage's folder there is only its own configuration.
    shutil.rmtree(one.folder(tmp_path, 3))
    assert results.changed_settings(two, folder) == []


def test_a_run_recorded_without_settings_is_told_by_its_folder(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "compared_settings", lambda row: {"view.blur": 0.5})
    row = results.Row("t", "one", ("experiment=one",))
    record = tmp_path / "R.json"
    for seed in (0, 1):
        made(tmp_path, row.folder(tmp_path, seed), seed, 50.0 + seed)
    results.update_record(record, [row], tmp_path)
    (row.folder(tmp_path, 1) / "config.yaml").write_text("view: {blur: 0.0}")
    runs = results.update_record(record, [row], tmp_path)
    assert "| one | 50.0 | 30.0 | 0 |" in results.table_text([row], runs, {})


@pytest.mark.parametrize("wanted", ["+ network", "single stage"])
def test_settings_of_variants_are_compared(
    results: ModuleType, tmp_path: Path, wanted: str
) -> None:
    """Without add-ons there is no such group."""
    row = next(r for r in results.read_rows() if (r.table, r.name) == ("unia_shapes", wanted))
    made(tmp_path, row.folder(tmp_path, 1), 1, 50.0)
    cfg = apply_variant(compose("train", [*row.settings, "seed=1"]))
    OmegaConf.save(cfg, row.folder(tmp_path, 1) / "config.yaml", resolve=True)
    assert results.update_record(tmp_path / "R.json", [row], tmp_path)


def test_rows_have_the_bound_of_their_network(results: ModuleType) -> None:
    deep = results.Row("t", "deep", ("experiment=d",))
    stage = results.Row("t", "second stage", ("experiment=s",), deep, (), "deep")
    bound = results.Row("t", "supervised", ("experiment=b",))
    runs = {
        row.folder(Path(), 0).name: {"seed": 0, "seg": seg, "on": "CPU", "minutes": 1, "commit": ""}
        for row, seg in ((deep, 90.0), (stage, 81.0), (bound, 60.0))
    }
    text = results.table_text([bound, deep, stage], runs, {})
    assert "| second stage | 81.0 | 90 % |" in text
    assert "| deep | 90.0 | 150 % |" in text
    bounds = {(row.table, row.bound) for row in results.read_rows() if row.bound != "supervised"}
    decoders = ("DeepLabV3+", "LargeFOV", "UPerNet")
    assert bounds == {("methods_shapes", f"supervised, {decoder}") for decoder in decoders}
    names = {(row.table, row.name) for row in results.read_rows()}
    assert bounds <= names


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"cpu": "Intel(R) Xeon(R) Processor"}, "Intel Xeon"),
        ({"cpu": "AMD EPYC 7R13 48-Core Processor", "devices": []}, "AMD EPYC 7R13"),
        ({"cpu": "Intel(R) Xeon(R) CPU @ 2.00GHz"}, "Intel Xeon"),
        ({"devices": [{"name": "NVIDIA H100"}], "cpu": "x"}, "NVIDIA H100"),
        ({"cpu": "AMD EPYC", "precision": "32-true"}, "AMD EPYC (fp32)"),
        ({"cpu": "AMD EPYC", "precision": "bf16-mixed"}, "AMD EPYC"),
        ({}, "CPU"),
    ],
)
def test_names_of_devices(results: ModuleType, about: dict[str, object], name: str) -> None:
    assert results.device(about) == name


def test_the_record_fits_the_rows(results: ModuleType) -> None:
    """Every recorded run is of a row that there is, and has scores in percent."""
    runs = json.loads(results.RECORD.read_text())
    rows = results.read_rows()
    for name, run in runs.items():
        assert any(row.folder(Path(), run["seed"]).name == name for row in rows), name
        shares = [v for h, v in run.items() if h in results.COLUMNS and h != "FP/TP"]
        assert shares, name
        assert all(0 <= share <= 100 for share in shares), name
