"""Figures of a run's pseudo-labels: ``python -m wsss.analyse checkpoint=outputs/.../run``.

What the CoSA paper shows of its CAM pseudo-labels (Fig. 3, 4 and 9), from checkpoints and logs of
our runs: each figure as PNG and its numbers as CSV.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from wsss.analysis import drawing
from wsss.analysis.collect import PAIR, SCORED, UNFITTED, NetworkScore, collect
from wsss.analysis.gaussian_command import gaussian_fsl
from wsss.analysis.metrics_file import read_metrics, score_rows, threshold_rows
from wsss.analysis.summary import (
    CheckpointCurves,
    class_table,
    csv_tables,
    printed_table,
    sentences,
)
from wsss.build import build_data, restore_method
from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_config, with_data
from wsss.cli import hydra_command, quiet_libraries
from wsss.data.batch import EvalBatch
from wsss.data.datamodule import WSSSDataModule
from wsss.errors import UserError
from wsss.files import check_writable, write_atomically
from wsss.inference import Inference, find_device, precision_after
from wsss.methods.base import Method, check_classes
from wsss.report.pictures import scored_threshold

#: said of a checkpoint whose threshold is not what a user would expect
THRESHOLD_NOTES = {
    UNFITTED: "the dynamic threshold is not fitted before the end of the loss warm-up",
    SCORED: "the method has no threshold of its own; that of the scores is taken",
    PAIR: "the method has two, with undecided pixels in between; that of the scores is taken",
}


def analyse(cfg: DictConfig) -> list[Path]:
    """Analyse the checkpoints of ``conf/analyse.yaml``.

    Returns:
        The files written.

    Raises:
        UserError: no such checkpoint, checkpoints of several runs or of other classes than the
            data, a method without CAMs, or data without masks.
    """
    quiet_libraries()
    paths = find_checkpoints(cfg.checkpoint, cfg.checkpoints)
    run = run_folder(paths)
    output_dir = Path(cfg.output_dir or run / "analysis")
    check_writable(output_dir)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    console = Console()
    data: WSSSDataModule | None = None
    method: Method | None = None
    with_networks: bool | None = cfg.online
    found: dict[int, tuple[Path, CheckpointCurves]] = {}
    for path in paths:
        content = read_checkpoint(path)
        step = int(content.get("global_step", 0))
        if step in found:
            print(f"{path.name} is at step {step} as {found[step][0].name} is: left out.")
            continue
        config = merge_data(saved_config(content, path), cfg)
        data = data or open_data(config)
        check_classes(content, data.classes, str(path))
        method = restore_method(content, config, path)
        del content  # weights of networks and optimizer
        if not (method.evaluates_cam and method.evaluates_early_cam):
            raise UserError(
                f"'{path}': method={method.short_name()} trains no "
                f"{'early CAM' if method.evaluates_cam else 'CAMs'}, and pseudo-labels of CAM and "
                "early CAM are what is analysed. Choose a run of cosa or cam."
            )
        if with_networks is None:
            logged = logged_scores(run, method)
            with_networks = len(paths) > 1 and len({row.step for row in logged}) < 2
        found[step] = (
            path,
            analyse_checkpoint(method, data, step, cfg, bool(with_networks), console),
        )

    assert method is not None
    curves = [found[step][1] for step in sorted(found)]
    written = write_figures(output_dir, run, method, curves, console)
    console.print(printed_table(curves))
    console.print(class_table(curves[-1], method.classes))
    for line in sentences(curves[-1]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print(f"{len(written)} files in {output_dir}")
    return written


def analyse_checkpoint(
    method: Method,
    data: WSSSDataModule,
    step: int,
    cfg: DictConfig,
    with_networks: bool,
    console: Console,
) -> CheckpointCurves:
    """Count what a checkpoint makes of the images, under a progress bar.

    Args:
        method: of the checkpoint.
        data: with masks.
        step: optimizer steps of the weights.
        cfg: ``conf/analyse.yaml`` composed.
        with_networks: also score every network of the method.
        console: for the bar.
    """
    trained = method.run_config["trainer"]["precision"]
    precision = cfg.precision or precision_after(trained, find_device(cfg.device))
    names = method.network_names if with_networks else method.network_names[:1]
    inferences = [
        Inference(method, name, cfg.device, precision, cam_scales=cfg.cam_scales) for name in names
    ]
    limit = cfg.max_perplexity
    if limit is None:
        limit = getattr(method, "csc_max_perplexity", 1.0)
    loader = data.val_dataloader()
    batches = track(
        cast(Iterable[EvalBatch], loader),
        f"Step {step}",
        total=len(loader),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log would get an empty line
    )
    analysis = collect(inferences[0], batches, step, float(limit), inferences[1:])
    return CheckpointCurves.of(analysis)


def write_figures(
    output_dir: Path,
    run: Path,
    method: Method,
    curves: Sequence[CheckpointCurves],
    console: Console,
) -> list[Path]:
    """Write figures and tables, and say which are left out and why."""

    def left_out(name: str, reason: str) -> None:
        console.print(
            f"{name} is left out: {reason}", markup=False, highlight=False, soft_wrap=True
        )

    for item in curves:
        if item.thresholds.kind in THRESHOLD_NOTES:
            console.print(
                f"Step {item.step}: xi = {item.thresholds.cam:g}: "
                f"{THRESHOLD_NOTES[item.thresholds.kind]}.",
                highlight=False,
                soft_wrap=True,
            )
    figures = {
        "accuracy_by_confidence.png": drawing.draw_accuracy_by_confidence(curves),
        "accuracy_by_perplexity.png": drawing.draw_accuracy_by_perplexity(curves),
        "cam_against_early_cam.png": drawing.draw_cams(curves),
        **{f"confidence_{item.step:06d}.png": drawing.draw_confidence(item) for item in curves},
    }

    networks = [row for item in curves for row in item.networks] or logged_scores(run, method)
    name = "networks.png"
    if len(method.network_names) < 2:
        networks = []
        left_out(name, "the method has one network.")
    elif len({row.step for row in networks}) < 2:
        left_out(
            name,
            "it needs two steps. Give several checkpoints (trainer.keep_every_n_steps keeps them) "
            "or a run with trainer.val_every_n_steps.",
        )
    else:
        figures[name] = drawing.draw_networks(networks, scored_threshold(method))

    thresholds = threshold_rows(read_log(run, method))
    if thresholds:
        figures["threshold_over_steps.png"] = drawing.draw_thresholds(thresholds, curves)
    else:
        left_out("threshold_over_steps.png", f"there is no threshold in {run / 'metrics.csv'}.")

    texts = csv_tables(curves, networks, thresholds, method.classes)
    contents = figures | {name: text.encode() for name, text in texts.items()}
    for name, content in contents.items():
        write_atomically(output_dir / name, content)
    return [output_dir / name for name in contents]


# --- what there is -------------------------------------------------------------------------------


def find_checkpoints(checkpoint: str | None, checkpoints: Iterable[str] | None) -> list[Path]:
    """Files that names and globs stand for, each once.

    A run's folder stands for its ``step_*.ckpt`` and ``last.ckpt``; without the former for its
    best checkpoint.

    Raises:
        UserError: neither or both are given, or a name that matches nothing.
    """
    if (checkpoint is None) == (checkpoints is None):
        raise UserError(
            "give checkpoint=... (a file, a run's folder or a glob) or checkpoints=[...] (several)."
        )
    names = [checkpoint] if checkpoint is not None else list(cast(Iterable[str], checkpoints))
    if not names:
        raise UserError("checkpoints is empty: give files, a run's folder or a glob.")
    found: dict[Path, Path] = {}
    for name in names:
        path = Path(name).expanduser()
        # A file may be called like a pattern: the literal name goes first.
        if path.exists() or not glob.has_magic(str(name)):
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob.glob(str(path)))  # noqa: PTH207 (relative too)
            matches = [p for p in matches if p.suffix == ".ckpt" or p.is_dir()]
            if not matches:
                raise UserError(f"'{name}' matches no checkpoint and no folder.")
        for match in matches:
            for file in _files(match):
                found.setdefault(file.resolve(), file)
    return list(found.values())


def _files(path: Path) -> list[Path]:
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(folder.glob("step_*.ckpt")) if path.is_dir() else []
    if not steps:
        return [find_checkpoint(path)]
    last = folder / "last.ckpt"
    return [*steps, *([last] if last.is_file() else [])]


def run_folder(paths: Sequence[Path]) -> Path:
    """The run that checkpoints are of.

    Raises:
        UserError: they lie in the folders of several runs.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        folders.setdefault(folder.resolve(), folder)
    if len(folders) > 1:
        raise UserError(
            f"checkpoints of {len(folders)} runs: {', '.join(map(str, folders.values()))}. The "
            "figures show one run over its steps: analyse one at a time."
        )
    return next(iter(folders.values()))


def merge_data(saved: DictConfig, cfg: DictConfig) -> DictConfig:
    """The training run's configuration with the data that the command asks for."""
    run = with_data(saved, cfg.data)
    if cfg.split is not None:
        run.data.val_split = cfg.split
    if cfg.max_images is not None:
        run.data.max_val_images = cfg.max_images
    return run


def open_data(config: DictConfig) -> WSSSDataModule:
    """Images with masks.

    Raises:
        UserError: they are not there, or have no masks.
    """
    data = build_data(config)
    try:
        data.setup("validate")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if not data.has_masks:
        raise UserError(
            f"split '{data.val_split}' of {data.root} has no masks: there is nothing to compare "
            "pseudo-labels with. Choose another with split=..."
        )
    return data


def read_log(run: Path, method: Method) -> list[dict[str, float]]:
    """What the run logged."""
    return read_metrics(run, int(method.run_config["trainer"]["max_steps"]))


def logged_scores(run: Path, method: Method) -> list[NetworkScore]:
    """Scores of the validations during training."""
    return score_rows(read_log(run, method), method.network_names)


def main() -> None:
    """Console entry point."""
    if sys.argv[1:2] == ["gaussian_fsl"]:
        del sys.argv[1]
        hydra_command("gaussian_fsl", gaussian_fsl)
    else:
        hydra_command("analyse", analyse)


if __name__ == "__main__":
    main()
