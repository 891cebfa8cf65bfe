"""Compare finished runs: ``python -m wsss.report runs=[outputs/cosa,outputs/cam]``.

Writes into ``output``: ``table.md`` and ``table.csv`` with the scores of every run, and
``pictures.png``, where every run's last weights are seen on the same validation images.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

from wsss.build import build_data
from wsss.checkpoints import read_checkpoint, restore_method, saved_config
from wsss.cli import hydra_command, quiet_libraries
from wsss.data.batch import EvalBatch
from wsss.data.datamodule import WSSSDataModule
from wsss.data.views import resize_image
from wsss.errors import UserError
from wsss.files import write_atomically
from wsss.methods.base import check_classes
from wsss.report.pictures import (
    RGB,
    PanelSet,
    draw_panels,
    grid,
    save_png,
    scored_threshold,
    spread,
)
from wsss.report.tables import PROTOCOL_ORDER, number

#: protocols of the printed table, narrow enough for a terminal; the CSV has all
MAIN_PROTOCOLS = ("seg/miou_ms_flip", "cpl/miou_ms_flip")
#: what may differ between runs that count as seeds of one experiment
SEED_KEYS = ("seed", "name", "output_dir", "ckpt", "logger", "pictures", "evaluate")


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: as the user named it.
        config: ``config.yaml`` as plain containers.
        content: ``scores.json``, see :func:`wsss.report.tables.collect`.
    """

    folder: Path
    config: dict[str, Any]
    content: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.content.get("name") or self.folder.name)

    @property
    def method(self) -> str:
        return str(self.content["method"])

    @property
    def seed(self) -> str:
        return str(self.content.get("seed"))

    @property
    def steps(self) -> str:
        return str(self.content.get("step", "-"))

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def score(self, name: str) -> float | None:
        """mIoU in percent; None where the run has none."""
        value = self.content["scores"].get(name)
        return None if value is None else float(value)


def report(cfg: DictConfig) -> list[Path]:
    """Compare the runs of ``conf/report.yaml``.

    Returns:
        The files written.

    Raises:
        UserError: no run, a run without scores or checkpoint, or runs on different classes.
    """
    quiet_libraries()
    if OmegaConf.is_missing(cfg, "runs"):
        raise UserError("runs is not set: give run folders, for example runs=[outputs/a,outputs/b]")
    runs = [read_run(folder) for folder in find_runs(cfg.runs)]
    titles = run_titles(runs, cfg.titles)
    output = Path(cfg.output)
    if cfg.pictures:
        # Before any table: what is missing should be known at once.
        for run in runs:
            if not run.checkpoint.is_file():
                raise UserError(
                    f"run '{run.folder}' has no checkpoints/last.ckpt to draw pictures with. "
                    "Copy the file there, or set pictures=0."
                )

    console = Console()
    names = score_names(runs)
    main_names = [n for n in names if n.split("/", 1)[1] in MAIN_PROTOCOLS]
    header, rows = table_rows(runs, main_names)
    console.print(rich_table(header, rows))
    lines = comparisons(runs)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    written = [output / "table.md", output / "table.csv"]
    write_atomically(written[0], markdown(header, rows, lines).encode())
    write_atomically(written[1], csv_text(*table_rows(runs, names)).encode())
    if cfg.pictures:
        written.append(output / "pictures.png")
        save_png(draw_runs(runs, titles, int(cfg.pictures), cfg.data_root), written[-1])
    for path in written:
        print(path)
    return written


# --- runs ----------------------------------------------------------------------------------


def find_runs(patterns: str | Iterable[str]) -> list[Path]:
    """Folders that names and globs stand for, each once, in order.

    Raises:
        UserError: a name that matches nothing.
    """
    names = [patterns] if isinstance(patterns, str) else [str(p) for p in patterns]
    if not names:
        raise UserError("runs is empty: give run folders, for example runs=[outputs/a,outputs/b].")
    found: dict[Path, Path] = {}
    for name in names:
        # A folder may be called like a pattern: the literal name goes first.
        if Path(name).is_dir():
            folders = [Path(name)]
        else:
            matches = sorted(glob.glob(name))  # noqa: PTH207 (Path.glob: relative patterns alone)
            folders = [Path(match) for match in matches if _is_run(Path(match))]
        if not folders:
            raise UserError(f"runs: '{name}' is no folder, and no run folder matches it.")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _is_run(folder: Path) -> bool:
    """Globs also meet folders that are something else; those are passed over."""
    return (folder / "config.yaml").is_file() or (folder / "scores.json").is_file()


def read_run(folder: Path) -> Run:
    """Configuration and scores of a run folder.

    Raises:
        UserError: one of the files is missing or not what ``wsss.train`` writes.
    """
    for name, remedy in (
        ("config.yaml", "Give the folder that wsss.train wrote, its output_dir."),
        (
            "scores.json",
            "It is written when training ends: let the run finish (ckpt=last resumes it), with "
            "evaluate=true.",
        ),
    ):
        if not (folder / name).is_file():
            raise UserError(f"run '{folder}' has no {name}. {remedy}")
    try:
        content = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        if not {"scores", "classes", "method"} <= set(content) or not isinstance(config, dict):
            raise ValueError("keys are missing")
    except Exception as error:  # JSON, YAML and OmegaConf each raise their own
        raise UserError(
            f"run '{folder}': scores.json or config.yaml is not as wsss.train writes it "
            f"({str(error).splitlines()[0]}). Train or evaluate again."
        ) from error
    return Run(folder, cast(dict[str, Any], config), content)


def run_titles(runs: Sequence[Run], titles: ListConfig | Sequence[str] | None) -> list[str]:
    """Names of the runs in the picture.

    Raises:
        UserError: not as many titles as runs.
    """
    if titles is not None:
        if len(titles) != len(runs):
            raise UserError(f"titles has {len(titles)} names, runs stands for {len(runs)} runs.")
        return [str(title) for title in titles]
    result = []
    for run in runs:
        alike = [other for other in runs if other.name == run.name]
        if len(alike) == 1:
            result.append(run.name)
        elif [other.method for other in alike].count(run.method) == 1:
            result.append(f"{run.name} {run.method}")
        else:
            result.append(f"{run.name} seed {run.seed}")
    return result


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together, in the order of their first ones."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = {k: v for k, v in run.config.items() if k not in SEED_KEYS}
        config["data"] = {k: v for k, v in config.get("data", {}).items() if k != "seed"}
        key = json.dumps([run.method, run.content.get("step"), config], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


# --- tables --------------------------------------------------------------------------------


def score_names(runs: Sequence[Run]) -> list[str]:
    """Full names of the scores that any run has: assignment network first, headline first."""
    names = {name for run in runs for name in run.content["scores"]}

    def place(name: str) -> tuple[str, int, str]:
        network, protocol = name.split("/", 1)
        known = protocol in PROTOCOL_ORDER
        return network, PROTOCOL_ORDER.index(protocol) if known else len(PROTOCOL_ORDER), protocol

    return sorted(names, key=place)


def table_rows(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every run, then mean and standard deviation of those with more seeds."""
    header = ["run", "method", "seed", "steps", *names]
    rows = [[r.name, r.method, r.seed, r.steps, *(number(r.score(n)) for n in names)] for r in runs]
    for group in seed_groups(runs):
        if len(group) > 1:
            cells = [mean_and_deviation([r.score(n) for r in group]) for n in names]
            first = group[0]
            name = f"{first.name} (n={len(group)})"
            rows.append([name, first.method, "mean", first.steps, *cells])
    return header, rows


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """``mean +- sd`` (n - 1) of the values that exist."""
    kept = [v for v in values if v is not None]
    if len(kept) < 2:
        return number(kept[0] if kept else None)
    return f"{statistics.fmean(kept):.2f} +- {statistics.stdev(kept):.2f}"


def rich_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The rows for the terminal: score names and deviations on lines of their own."""
    table = Table(title="mIoU (%)", title_justify="left", box=SIMPLE_HEAVY, collapse_padding=True)
    for i, name in enumerate(header):
        title = name.replace("/miou_", "/\nmiou_\n")
        table.add_column(title, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace(" +- ", "\n+- ") for cell in row))
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]) -> str:
    """The rows as a Markdown table, the comparisons as a list below."""
    align = ["---" if i < 2 else "---:" for i in range(len(header))]
    text = "".join(f"| {' | '.join(row)} |\n" for row in (header, align, *rows))
    return f"mIoU (%)\n\n{text}" + ("\n" if lines else "") + "".join(f"- {x}\n" for x in lines)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as CSV; empty where there is no value."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *([("" if c == "-" else c) for c in row] for row in rows)])
    return buffer.getvalue()


def comparisons(runs: Sequence[Run]) -> list[str]:
    """CoSA next to its bounds: share of full supervision, and gain over plain CAMs."""
    groups = seed_groups(runs)

    def of(method: str) -> list[list[Run]]:
        return [group for group in groups if group[0].method == method]

    lines = []
    for cosa, other in itertools.product(of("cosa"), of("supervised")):
        above, below = _mean(cosa, "an/seg/miou_ms_flip"), _mean(other, "on/seg/miou_ms_flip")
        if above is not None and below:
            lines.append(
                f"{_label(cosa)} an/seg/miou_ms_flip {above:.2f} is {100 * above / below:.1f} % of "
                f"{_label(other)} on/seg/miou_ms_flip {below:.2f}"
            )
    for cosa, other in itertools.product(of("cosa"), of("cam")):
        above, below = _mean(cosa, "an/cpl/miou_ms_flip"), _mean(other, "on/cpl/miou_ms_flip")
        if above is not None and below is not None:
            lines.append(
                f"{_label(cosa)} an/cpl/miou_ms_flip {above:.2f} is {above - below:+.2f} points "
                f"from {_label(other)} on/cpl/miou_ms_flip {below:.2f}"
            )
    return lines


def _mean(group: Sequence[Run], name: str) -> float | None:
    values = [v for v in (run.score(name) for run in group) if v is not None]
    return statistics.fmean(values) if values else None


def _label(group: Sequence[Run]) -> str:
    name = (
        group[0].name if group[0].method in group[0].name else f"{group[0].name} {group[0].method}"
    )
    return name + (f" (mean of {len(group)})" if len(group) > 1 else "")


# --- pictures ------------------------------------------------------------------------------


def draw_runs(
    runs: Sequence[Run], titles: Sequence[str], count: int, data_root: str | None = None
) -> RGB:
    """One grid: image and truth, then every run's prediction and, if it has CAMs, its CPL.

    A CoSA run gets both columns, a supervised one the prediction, a CAM one the CPL. Images are
    spread evenly over the first run's validation images; each run sees them at its own size.

    Raises:
        UserError: a checkpoint that cannot be read or is of other classes, or no data set.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data: WSSSDataModule | None = None
    rows: list[PanelSet] = []
    for run, title in zip(runs, titles, strict=True):
        checkpoint = read_checkpoint(run.checkpoint)
        cfg = saved_config(checkpoint, run.checkpoint)
        if data is None:
            data = open_data(cfg, data_root)
        check_classes(checkpoint, data.classes, str(run.checkpoint))
        if checkpoint.get("global_step") != run.content.get("step"):
            title = f"{title} at step {checkpoint.get('global_step')}"  # not what was scored
        method = restore_method(checkpoint, cfg, run.checkpoint).to(device)
        indices = data.val_indices()
        for i, position in enumerate(spread(len(indices), count)):
            batch = eval_batch(data, indices[position], int(cfg.data.eval_size), device)
            # At the threshold of the scores, so that table and picture speak of the same labels.
            drawn = draw_panels(method, batch, scored_threshold(method))[0]
            if i == len(rows):
                shared = {key: drawn.panels[key] for key in ("image", "truth")}
                rows.append(PanelSet(drawn.name, drawn.classes, shared))
            for key in ("prediction", "CPL"):
                if key in drawn.panels:
                    rows[i].panels[f"{title} {key}"] = drawn.panels[key]
    assert data is not None
    return grid(rows, legend=data.classes)


def open_data(cfg: DictConfig, root: str | None) -> WSSSDataModule:
    """The validation images of a run.

    Raises:
        UserError: they are not there.
    """
    if root is not None:
        cfg.data.root = root
    try:
        data = build_data(cfg)
        data.setup("validate")
    except (UserError, ValueError, OSError) as error:
        raise UserError(
            f"the runs' data set cannot be read: {error}. If it has moved, say where it is with "
            "data_root=..., or leave the pictures out with pictures=0."
        ) from error
    return data


def eval_batch(data: WSSSDataModule, index: int, size: int, device: torch.device) -> EvalBatch:
    """One validation image as evaluation sees it, at the inference size of a run."""
    images = data.val_images
    assert images is not None
    image = resize_image(images.load_image(index), size, size)
    mask = images.load_mask(index).astype(np.int64)
    return EvalBatch(
        images=torch.from_numpy(image).permute(2, 0, 1)[None].to(device),
        labels=torch.from_numpy(images.labels[index])[None].to(device),
        masks=[torch.from_numpy(mask).to(device)],
        names=[images.names[index]],
    )


def main() -> None:
    """Console entry point."""
    hydra_command("report", report)


if __name__ == "__main__":
    main()
