"""Training through the real command line: run, evaluate, resume, two processes, interruptions."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from tests.commands.conftest import Run, command_environment, compose
from wsss.addons import Step
from wsss.callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint
from wsss.errors import UserError
from wsss.methods import CoSA
from wsss.train import bring_best, train


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    """State of the method in a run's checkpoint: both networks and the thresholds."""
    content = torch.load(folder / "checkpoints" / name, weights_only=True)
    state: dict[str, torch.Tensor] = content["state_dict"]
    return state


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=atol, rtol=0, equal_nan=True, msg=key)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_train_then_evaluate_gives_the_same_scores(
    run: Run, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    printed = run("train", *tiny, f"output_dir={out}", "trainer.val_every_n_steps=3", "pictures=2")
    assert "seg/miou_ms_flip" in printed.stdout
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "scores.json", "config.yaml"):
        assert (out / name).is_file(), name
    assert sorted(p.name for p in (out / "pictures").iterdir()) == [
        "step_000003.png",
        "step_000005.png",
    ]
    scores = json.loads((out / "scores.json").read_text())
    assert scores["step"] == 5
    protocols = {name.split("/", 1)[1] for name in scores["scores"]}
    assert {"seg/miou_ss", "seg/miou_ms_flip", "seg_given_tags/miou_ms_flip"} <= protocols
    assert {"cpl/miou_ms_flip", "cpl_early/miou_ms_flip"} <= protocols

    again = tmp_path / "again"
    run(
        "evaluate",
        f"checkpoint={out}/checkpoints/last.ckpt",
        f"output_dir={again}",
        "threads=1",
        "accelerator=cpu",
    )
    evaluated = json.loads((again / "scores.json").read_text())["scores"]
    assert {name: evaluated[name] for name in scores["scores"]} == scores["scores"]
    more = {name.split("/")[2] for name in set(evaluated) - set(scores["scores"])}
    assert more == {"boundary_f_ms_flip", "jf_ms_flip"}  # evaluate alone takes the time for these

    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row.get("an/seg/miou_ms_flip") for row in rows)


@pytest.mark.parametrize("method", ["cam", "supervised"])
def test_bounds_train(method: str, tiny: list[str], tmp_path: Path) -> None:
    own = ("method.loss_warmup", "method.threshold", "experiment=")
    overrides = ["experiment=shapes", f"method={method}"]
    overrides += [o for o in tiny if not o.startswith(own)]
    scores = train(compose("train", overrides), tmp_path)
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()  # also without in-loop evaluation
    expected = "on/cpl/miou_ms_flip" if method == "cam" else "on/seg/miou_ms_flip"
    assert expected in scores
    assert not any(name.startswith("on/seg" if method == "cam" else "on/cpl") for name in scores)


def test_killed_run_resumes_bit_for_bit(tiny: list[str], tmp_path: Path) -> None:
    steps = ["trainer.max_steps=30", "trainer.save_every_n_steps=2", "evaluate=false"]
    train(compose("train", [*tiny, *steps]), tmp_path / "whole")

    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "wsss.train", *tiny, *steps, f"output_dir={out}"],
        cwd=tmp_path,
        env=command_environment(),
    )
    last = out / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not last.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Whatever step that was: the file is whole, and the run goes on from it.
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 30
    (out / "metrics.csv").write_text("the log of the first start\n")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(compose("train", [*tiny, *steps, "ckpt=last"]), out)
    assert not [w for w in said if "resum" in str(w.message)]  # Lightning's doubts are unfounded
    assert (out / "metrics.1.csv").read_text() == "the log of the first start\n"
    assert_same(weights(tmp_path / "whole"), weights(out))
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, "130"), (signal.SIGTERM, "143")])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    number: signal.Signals,
    code: str,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of co-training: the moving average of the last step is saved with the rest."""
    steps = ["trainer.max_steps=7", "trainer.save_every_n_steps=1000", "evaluate=false"]
    train(compose("train", [*tiny, *steps]), tmp_path / "whole")
    original = CoSA.step

    def step(self: CoSA, batch: object) -> Step:
        if self.trainer.global_step == 4:
            signal.raise_signal(number)
        return original(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(CoSA, "step", step)
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit, match=code):
        train(compose("train", [*tiny, *steps]), out)
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    monkeypatch.undo()
    train(compose("train", [*tiny, *steps, "ckpt=last"]), out)
    assert_same(weights(tmp_path / "whole"), weights(out))


def test_two_processes_equal_one(run: Run, tiny: list[str], tmp_path: Path) -> None:
    more = [
        *("evaluate=true", "trainer.max_steps=5", "method.threshold_fill_steps=1"),
        "trainer.log_every_n_steps=1",
    ]
    one = train(compose("train", [*tiny, *more]), tmp_path / "one")
    run(
        "train",
        *tiny,
        *more,
        f"output_dir={tmp_path / 'two'}",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    )
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert float(a["threshold.value"]) != 0.5  # it has moved
    assert_same(a, b, atol=1e-5)
    two = json.loads((tmp_path / "two" / "scores.json").read_text())["scores"]
    for name, value in one.items():
        assert two[name] == pytest.approx(100 * value, abs=0.02), name
    # The curves are those of the global batch, not of the first rank's share.
    curves = [read_csv(tmp_path / folder / "metrics.csv") for folder in ("one", "two")]
    for first, second in zip(*curves, strict=True):
        for name in first:
            if name.startswith("loss/") and first[name]:
                assert float(second[name]) == pytest.approx(float(first[name]), abs=1e-4), name


def test_accumulation_steps_the_moving_average_once(tiny: list[str], tmp_path: Path) -> None:
    # Warm-up only: its losses are means over images, so two halves equal one whole batch.
    more = ["method.loss_warmup_steps=5", "method.threshold_fill_steps=0", "evaluate=false"]
    train(compose("train", [*tiny, *more]), tmp_path / "one")
    accumulate = ["trainer.accumulate_grad_batches=2"]
    train(compose("train", [*tiny, *more, *accumulate]), tmp_path / "two")
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-6)


def test_ctrl_c_saves_and_says_how_to_resume(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "wsss.train", *tiny, f"output_dir={out}"),
            *("trainer.max_steps=5000", "trainer.save_every_n_steps=1000"),
        ],
        cwd=tmp_path,
        env=command_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = out / "config.yaml"
    deadline = time.monotonic() + 200
    while not metrics.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 130, printed
    assert "ckpt=" in printed
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0


def test_sweep_leaves_runs_side_by_side_and_resumes(
    run: Run, tiny: list[str], tmp_path: Path
) -> None:
    few = [o for o in tiny if not o.startswith("trainer.max_steps")]
    sweep = ["-m", *few, "method.momentum=0.99,0.995", "evaluate=false", "output_dir=runs"]
    run("train", *sweep, "trainer.max_steps=2")

    def runs() -> list[tuple[str, float, int]]:
        found = []
        for path in sorted(tmp_path.rglob("last.ckpt")):
            content = torch.load(path, weights_only=True)
            momentum = content["wsss"]["config"]["method"]["momentum"]
            folder = path.parents[1].relative_to(tmp_path).as_posix()
            found.append((folder, momentum, content["global_step"]))
        return found

    assert runs() == [("runs/0", 0.99, 2), ("runs/1", 0.995, 2)]
    assert "holds a run at step 2" in run("train", *sweep, "trainer.max_steps=3", code=2).stderr
    run("train", *sweep, "trainer.max_steps=3", "ckpt=last")
    assert runs() == [("runs/0", 0.99, 3), ("runs/1", 0.995, 3)]
    log = (tmp_path / "runs/1/train.log").read_text()
    for line in ("runs/1 at step 2.", "[WARNING] - Settings other than", "max_steps=3 (was 2)"):
        assert line in log


def test_nan_loss_names_the_term_and_keeps_the_checkpoint(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CoSA.step

    def step(self: CoSA, batch: object) -> Step:
        made = original(self, batch)  # type: ignore[arg-type]
        if self.trainer.global_step == 4:
            made.terms["s2c"] = made.terms["s2c"] * float("nan")
        return made

    monkeypatch.setattr(CoSA, "step", step)
    with pytest.raises(UserError, match=r"loss/s2c is nan at step 4"):
        train(compose("train", [*tiny, "trainer.save_every_n_steps=2"]), tmp_path)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    assert all(v.isfinite().all() for k, v in content["state_dict"].items() if "network" in k)


def test_weights_that_are_not_finite_are_not_saved(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of NaN below a finite loss."""
    original = CoSA.step

    def step(self: CoSA, batch: object) -> Step:
        made = original(self, batch)  # type: ignore[arg-type]
        if self.trainer.global_step == 3:
            made.terms["cls"].register_hook(lambda gradient: gradient * float("nan"))
        return made

    monkeypatch.setattr(CoSA, "step", step)
    with pytest.raises(UserError, match=r"weights are not finite after step 4"):
        train(compose("train", [*tiny, "trainer.save_every_n_steps=2"]), tmp_path)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2


def test_checkpoint_of_other_classes_is_refused(tiny: list[str], tmp_path: Path) -> None:
    train(compose("train", [*tiny, "evaluate=false"]), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["wsss"]["classes"] = content["wsss"]["classes"][:-1]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"last\.ckpt' was trained with 9 classes.*has 10"):
        train(compose("train", [*tiny, f"ckpt={path}"]), tmp_path / "again")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output_folder(tiny: list[str], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        train(compose("train", tiny), locked / "run")


def test_output_folder_that_is_a_file(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"output_dir=.*cannot be written"):
        train(compose("train", tiny), tmp_path / "file")


def test_missing_data_is_told_before_anything_is_built(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, f"data.root={tmp_path / 'nowhere'}"]
    with pytest.raises(UserError, match="nowhere"):
        train(compose("train", overrides), tmp_path / "run")


def test_global_batch_that_does_not_divide(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=4"):
        train(compose("train", [*tiny, "trainer.accumulate_grad_batches=3"]), tmp_path)


@pytest.mark.parametrize("choice", ["method", "data"])
def test_files_that_no_run_is_made_of_are_no_choices(choice: str, tmp_path: Path) -> None:
    cfg = compose("train", ["experiment=shapes", f"data.root={tmp_path}", f"{choice}=base"])
    with pytest.raises(UserError, match=f"{choice}=base is what all .* share: choose"):
        train(cfg, tmp_path / "run")


def test_weights_of_another_model(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"backbone\.weights=.*is not a 'vit_tiny_patch16_224'"):
        train(compose("train", [*tiny, f"backbone.weights={path}"]), tmp_path / "run")


def test_cut_off_checkpoint(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.ckpt"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        train(compose("train", [*tiny, f"ckpt={path}"]), tmp_path / "run")


def test_kept_checkpoints_are_those_of_their_steps(tiny: list[str], tmp_path: Path) -> None:
    # As often as `last`: the two must not be taken for one.
    more = ["trainer.keep_every_n_steps=2", "trainer.save_every_n_steps=2", "evaluate=false"]
    more += ["trainer.max_steps=6", "trainer.val_every_n_steps=null"]
    out = tmp_path / "run"
    train(compose("train", [*tiny, *more]), out)
    kept = [f"step_{step:06d}.ckpt" for step in (2, 4, 6)]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["last.ckpt", *kept]
    steps = [torch.load(out / "checkpoints" / name, weights_only=True) for name in kept]
    assert [content["global_step"] for content in steps] == [2, 4, 6]
    assert_same(weights(out, kept[2]), weights(out))
    assert float(weights(out, kept[0])["threshold.value"]) != float(
        weights(out, kept[1])["threshold.value"]
    )

    # A run goes on from any of them, and keeps the rest again, under the same names.
    first = out / "checkpoints" / kept[0]
    again = tmp_path / "again"
    train(compose("train", [*tiny, *more, f"ckpt={first}"]), again)
    assert sorted(p.name for p in (again / "checkpoints").iterdir()) == ["last.ckpt", *kept[1:]]
    for name in kept[1:]:
        assert_same(weights(again, name), weights(out, name))
    train(compose("train", [*tiny, *more, f"ckpt={first}"]), out)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["last.ckpt", *kept]


def test_no_steps_are_kept_unless_asked_for(tiny: list[str], tmp_path: Path) -> None:
    more = ["evaluate=false", "trainer.save_every_n_steps=1", "trainer.val_every_n_steps=2"]
    train(compose("train", [*tiny, *more]), tmp_path)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt"}


def test_a_folder_that_holds_a_run_is_left_alone(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*tiny, "trainer.max_steps=2", "evaluate=false"]
    train(compose("train", few), tmp_path)
    kept = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    wanted = r"holds a run at step 2: ckpt=last goes on with it; .*overwrite=true, starts anew"
    with pytest.raises(UserError, match=wanted):
        train(compose("train", [*few, "data.root=nowhere"]), tmp_path)  # told before that mistake
    for ckpt in ("last", f"'{tmp_path}/checkpoints/last.ckpt'"):
        with pytest.raises(UserError, match="leave out one of them"):
            train(compose("train", [*few, "overwrite=true", f"ckpt={ckpt}"]), tmp_path)
    with pytest.raises(UserError, match="nowhere"):  # a mistake costs nothing
        train(compose("train", [*few, "overwrite=true", "data.root=nowhere"]), tmp_path)
    for weights in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        with pytest.raises(UserError, match=r"would remove backbone\.weights=.*another output_dir"):
            train(
                compose("train", [*few, "overwrite=true", f"backbone.weights={weights}"]), tmp_path
            )
    assert kept == sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())

    # No rank may wait for one that has refused.
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(UserError, match=wanted):
        train(compose("train", [*few, "data.root=nowhere"]), tmp_path)


def test_overwriting_leaves_nothing_of_the_run_before(tiny: list[str], tmp_path: Path) -> None:
    few = [*tiny, "trainer.max_steps=2"]
    train(compose("train", [*few, "trainer.keep_every_n_steps=1", "pictures=1"]), tmp_path)
    for name in ("metrics.csv", "metrics.1.csv"):
        (tmp_path / name).write_text("step\n1\n")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/a.png").write_text("of another command")
    assert list((tmp_path / "pictures").iterdir())
    assert (tmp_path / "scores.json").is_file()
    train(compose("train", [*few, "overwrite=true", "evaluate=false", "seed=3"]), tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        "checkpoints/last.ckpt",
        "config.yaml",
        "environment.json",
        "predictions/a.png",
    }
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["wsss"]["config"]["seed"] == 3


def test_the_best_score_of_earlier_checkpoints_is_found() -> None:
    """They hold it under the name of Lightning's class."""
    same = {"monitor": "a", "mode": "max", "save_on_train_epoch_end": False}
    assert BestCheckpoint(**same).state_key == ModelCheckpoint(**same).state_key  # type: ignore[arg-type]


def best_checkpoint(folder: Path, score: float | None = None) -> BestCheckpoint:
    """The callback of a run in ``folder``, which has kept a ``best.ckpt`` of that score."""
    made = BestCheckpoint(folder, filename="best", monitor="a", mode="max")
    if score is not None:
        path = str(folder / "best.ckpt")
        Path(path).touch()
        made.best_k_models = {path: torch.tensor(score)}
        made.best_model_path = made.kth_best_model_path = path
        made.best_model_score = made.kth_value = torch.tensor(score)
    return made


def test_the_best_score_survives_a_folder_that_moved(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    state = best_checkpoint(tmp_path / "old", 0.7).state_dict()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = best_checkpoint(tmp_path / "new")
    moved.load_state_dict(state)
    path = str(tmp_path / "new" / "best.ckpt")
    assert float(moved.best_model_score) == pytest.approx(0.7)  # type: ignore[arg-type]
    assert moved.best_model_path == moved.kth_best_model_path == path
    assert list(moved.best_k_models) == [path]
    # Without its file there is nothing that the score could be of.
    (tmp_path / "new" / "best.ckpt").unlink()
    other = best_checkpoint(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says so
        other.load_state_dict(state)
    assert other.best_model_score is None


def test_a_run_that_goes_on_elsewhere_brings_its_best_weights(tmp_path: Path) -> None:
    old, new = tmp_path / "old" / "checkpoints", tmp_path / "new" / "checkpoints"
    old.mkdir(parents=True)
    for name in ("last.ckpt", "best.ckpt", "step_000001.ckpt"):
        (old / name).write_text(name)
    bring_best(old / "step_000001.ckpt", new)
    assert not new.exists()  # of that step the best may be a later one
    bring_best(old / "last.ckpt", new)
    assert (new / "best.ckpt").read_text() == "best.ckpt"
    (new / "best.ckpt").write_text("own")
    bring_best(old / "last.ckpt", new)
    assert (new / "best.ckpt").read_text() == "own"


def test_a_finished_run_that_is_scored_again_keeps_its_times(
    tiny: list[str], tmp_path: Path
) -> None:
    few = [*tiny, "trainer.max_steps=1", "evaluate=false"]
    train(compose("train", few), tmp_path)
    before = (tmp_path / "environment.json").read_text()
    train(compose("train", [*few, "ckpt=last"]), tmp_path)
    assert (tmp_path / "environment.json").read_text() == before
    assert json.loads(before)["finished"]


def test_gradients_are_clipped_in_mixed_precision(tiny: list[str], tmp_path: Path) -> None:
    few = [*tiny, "trainer.max_steps=1", "evaluate=false", "trainer.precision=bf16-mixed"]
    clipped = "trainer.gradient_clip_val=1e-9"
    train(compose("train", [*few, clipped, "method.weight_decay=0"]), tmp_path)
    moments = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    norm = sum(float(s["exp_avg"].square().sum()) for s in moments[0]["state"].values()) ** 0.5
    assert 0 < norm < 1e-9  # a tenth of the clipped gradient


def test_a_full_disk_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(1)}, target)

    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"could not be written .*is whole\. Make room, then go on"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1)}, target)
    assert torch.load(target, weights_only=True)["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
