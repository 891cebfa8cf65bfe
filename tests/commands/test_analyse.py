"""``wsss.analyse`` through the real command line, and what it refuses."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.commands.conftest import TINY, Run, compose
from wsss.analyse import analyse, find_checkpoints, run_folder
from wsss.build import build_method, build_network
from wsss.data.shapes import CLASSES
from wsss.errors import UserError
from wsss.train import train

ALWAYS = {
    "summary.csv",
    *(
        f"{name}.{kind}"
        for name in (
            "accuracy_by_confidence",
            "accuracy_by_perplexity",
            "cam_against_early_cam",
        )
        for kind in ("csv", "png")
    ),
    "confidence.csv",
    "miou_by_threshold.csv",
    "reliability_by_class.csv",
}

Untrained = Callable[..., Path]


@pytest.fixture
def untrained(tmp_path: Path, shapes_root: Path) -> Untrained:
    """Writes the checkpoint of an untrained method, as training does."""

    def write(name: str, method: str = "cosa", step: int = 7, *overrides: str) -> Path:
        own = ("method.loss_warmup", "method.threshold", "experiment=")
        settings = TINY if method == "cosa" else [o for o in TINY if not o.startswith(own)]
        extra = [] if method == "cosa" else ["experiment=shapes", f"method={method}"]
        config = compose("train", [*extra, *settings, f"data.root={shapes_root}", *overrides])
        torch.manual_seed(step)
        module = build_method(config, build_network(config, len(CLASSES)), CLASSES)
        content: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": step}
        module.on_save_checkpoint(content)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        return path

    return write


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def settings(checkpoint: Path | str, *more: str) -> Any:
    return compose("analyse", [f"checkpoint='{checkpoint}'", "device=cpu", "threads=1", *more])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_over_its_steps(run: Run, tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["trainer.keep_every_n_steps=2", "trainer.val_every_n_steps=2"]
    more += ["trainer.log_every_n_steps=1", "trainer.max_steps=6"]
    scores = train(compose("train", [*tiny, *more]), out)
    done = run("analyse", f"checkpoint={out}", "device=cpu", "threads=1", "data.num_workers=0")
    assert "last.ckpt is at step 6 as step_000006.ckpt is: left out." in done.stdout
    assert "left out: " not in done.stdout
    assert done.stderr == ""
    folder = out / "analysis"
    steps = {f"confidence_{step:06d}.png" for step in (2, 4, 6)}
    extra = {"networks.csv", "networks.png", "threshold_over_steps.csv", "threshold_over_steps.png"}
    assert names(folder) == ALWAYS | steps | extra
    for path in folder.glob("*.png"):
        assert Image.open(path).width == 1024

    summary = rows(folder / "summary.csv")
    assert [(r["step"], r["cam"]) for r in summary] == [
        (step, cam) for step in ("2", "4", "6") for cam in ("cam", "early_cam")
    ]
    # What evaluation says of the CPL at 0.5, from the same pixels.
    expected = [("cpl", summary[4]), ("cpl_early", summary[5])]
    for protocol, row in expected:
        score = scores[f"an/{protocol}/miou_ms_flip"]
        assert float(row["miou_at_0.50"]) == pytest.approx(score, rel=1e-4)
    networks = rows(folder / "networks.csv")
    assert [(r["step"], r["network"]) for r in networks] == [
        (step, network) for step in ("2", "4", "6") for network in ("an", "on")
    ]
    assert float(networks[-1]["seg"]) == pytest.approx(scores["on/seg/miou_ms_flip"], rel=1e-4)
    # A threshold is logged as it is in the checkpoint of that step.
    logged = {r["step"]: r for r in rows(folder / "threshold_over_steps.csv")}
    state = torch.load(out / "checkpoints" / "step_000004.ckpt", weights_only=True)["state_dict"]
    assert float(logged["4"]["cam"]) == pytest.approx(float(state["threshold.value"]), rel=1e-4)
    assert float(summary[2]["threshold"]) == pytest.approx(float(logged["4"]["cam"]), rel=1e-4)
    early = float(state["early_threshold.value"])
    assert float(summary[3]["threshold"]) == pytest.approx(early, rel=1e-4)

    # Without the log, ON is run too, and says the same.
    (out / "metrics.csv").unlink()
    analyse(settings(out, f"output_dir={tmp_path / 'again'}", "data.num_workers=0"))
    again = rows(tmp_path / "again" / "networks.csv")
    assert [(r["step"], r["network"]) for r in again] == [
        (r["step"], r["network"]) for r in networks
    ]
    for a, b in zip(again, networks, strict=True):
        for score in ("seg", "cpl"):
            assert float(a[score]) == pytest.approx(float(b[score]), rel=1e-4)


def test_one_checkpoint(
    untrained: Untrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = untrained("run/checkpoints/last.ckpt")
    written = analyse(settings(path, "max_images=2"))
    folder = tmp_path / "run" / "analysis"
    assert set(written) == {folder / name for name in names(folder)}
    assert names(folder) == ALWAYS | {"confidence_000007.png"}
    printed = capsys.readouterr().out
    assert "xi = 0.5: the dynamic threshold is not fitted before" in printed
    assert "networks.png is left out: it needs two steps." in printed
    assert "threshold_over_steps.png is left out" in printed
    pixels = sum(int(r["pixels"]) for r in rows(folder / "accuracy_by_confidence.csv"))
    few = sum(int(r["pixels"]) for r in rows(folder / "cam_against_early_cam.csv")[:1])
    assert pixels == 2 * few  # of both CAMs

    analyse(settings(path, "split=train", f"output_dir={tmp_path / 'train'}", "online=true"))
    more = rows(tmp_path / "train" / "cam_against_early_cam.csv")[0]
    assert int(more["pixels"]) > 5 * few  # 24 images
    assert [r["network"] for r in rows(tmp_path / "train" / "networks.csv")] == ["an", "on"]
    assert not (tmp_path / "train" / "networks.png").exists()


def test_epsilon(untrained: Untrained, tmp_path: Path) -> None:
    path = untrained("run/last.ckpt", "cosa", 7, "method.csc_max_perplexity=100")

    def pixels(*more: str) -> tuple[int, ...]:
        analyse(settings(path, "max_images=2", *more))
        table = rows(tmp_path / "run" / "analysis" / "cam_against_early_cam.csv")
        return tuple(int(r["pixels"]) for r in table)

    everything = pixels()  # the run's own limit leaves nothing out
    assert len(set(everything)) == 1
    few = pixels("max_perplexity=0.6")
    assert few[0] == few[3] == everything[0]
    assert few[1] < few[0]
    assert few[2] == few[4] == few[5]  # both CAMs over one Omega


def test_a_method_with_one_network_and_no_threshold(
    untrained: Untrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = untrained("run/checkpoints/last.ckpt", "cam", 7, "method.cpl_threshold=0.42")
    analyse(settings(path, "max_images=2", "online=true"))
    printed = capsys.readouterr().out
    assert "xi = 0.42: the method has no threshold of its own" in printed
    assert "networks.png is left out: the method has one network." in printed
    folder = tmp_path / "run" / "analysis"
    assert names(folder) == ALWAYS | {"confidence_000007.png"}
    assert rows(folder / "summary.csv")[0]["threshold"] == "0.42"


# --- what is refused -----------------------------------------------------------------------


def test_a_method_without_cams(untrained: Untrained) -> None:
    path = untrained("run/last.ckpt", "supervised")
    with pytest.raises(UserError, match=r"last\.ckpt': method=supervised trains no CAMs"):
        analyse(settings(path))


def test_data_without_masks(untrained: Untrained, tmp_path: Path, shapes_root: Path) -> None:
    path = untrained("run/last.ckpt")
    bare = tmp_path / "bare"
    shutil.copytree(shapes_root, bare)
    shutil.rmtree(bare / "SegmentationClass")
    with pytest.raises(UserError, match=r"split 'val' of .*bare has no masks.*split="):
        analyse(settings(path, f"data.root={bare}"))


def test_data_of_other_classes(untrained: Untrained, tmp_path: Path, shapes_root: Path) -> None:
    path = untrained("run/last.ckpt")
    content = torch.load(path, weights_only=True)
    content["wsss"]["classes"] = ["cat", *content["wsss"]["classes"][1:]]
    torch.save(content, path)
    with pytest.raises(UserError, match="trained with 'cat' as class 1"):
        analyse(settings(path))


def test_missing_data(untrained: Untrained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        analyse(settings(untrained("run/last.ckpt"), f"data.root={tmp_path / 'nowhere'}"))


def test_mistakes_end_with_code_2(run: Run, tmp_path: Path) -> None:
    done = run("analyse", f"checkpoint={tmp_path / 'gone.ckpt'}", code=2)
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


# --- finding checkpoints -------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three runs: with steps, without, and a folder of loose files."""
    for name in (
        "a/checkpoints/step_000050.ckpt",
        "a/checkpoints/step_000100.ckpt",
        "a/checkpoints/last.ckpt",
        "a/checkpoints/best.ckpt",
        "b/checkpoints/best.ckpt",
        "b/checkpoints/last.ckpt",
        "c/one.ckpt",
        "c/two.ckpt",
        "c/notes.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_names_folders_and_globs(tree: Path) -> None:
    def found(*given: str) -> list[str]:
        paths = find_checkpoints(None, [str(tree / name) for name in given])
        assert find_checkpoints(str(tree / given[0]), None) == paths[: len(paths)] or given[1:]
        return [str(path.relative_to(tree)) for path in paths]

    steps = ["a/checkpoints/step_000050.ckpt", "a/checkpoints/step_000100.ckpt"]
    assert found("a") == found("a/checkpoints") == [*steps, "a/checkpoints/last.ckpt"]
    assert found("b") == ["b/checkpoints/best.ckpt"]
    assert found("a/checkpoints/best.ckpt") == ["a/checkpoints/best.ckpt"]
    assert found("a/checkpoints/step_*.ckpt") == steps
    assert found("c/*") == ["c/one.ckpt", "c/two.ckpt"]
    assert found("c/two.ckpt", "c/*", "c/../c/one.ckpt") == ["c/two.ckpt", "c/one.ckpt"]
    odd = tree / "lr=[1].ckpt"
    odd.touch()
    assert found("lr=[1].ckpt") == ["lr=[1].ckpt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None), "give checkpoint="),
        (("a", ["b"]), "give checkpoint="),
        ((None, []), "checkpoints is empty"),
        (("{}/c/thre.ckpt", None), r"no such file\. There are: one\.ckpt, two\.ckpt"),
        (("{}/c/three*", None), "matches no checkpoint"),
        (("{}/c", None), "folder without checkpoints"),
    ],
)
def test_nothing_found(tree: Path, given: tuple[Any, Any], message: str) -> None:
    checkpoint = given[0].format(tree) if given[0] else None
    with pytest.raises(UserError, match=message):
        find_checkpoints(checkpoint, given[1])


def test_one_run_at_a_time(tree: Path) -> None:
    assert run_folder(find_checkpoints(str(tree / "a"), None)) == tree / "a"
    assert run_folder(find_checkpoints(str(tree / "c" / "*"), None)) == tree / "c"
    both = find_checkpoints(None, [str(tree / "a"), str(tree / "b")])
    with pytest.raises(UserError, match=r"checkpoints of 2 runs: .*/a, .*/b\. "):
        run_folder(both)
