"""Run what RESULTS.md reports, and write its tables.

    python benchmarks/results.py --list
    python benchmarks/results.py --voc VOC2012 --weights vit_tiny.safetensors --jobs 2
    python benchmarks/results.py --only 'unia_shapes/*' --seeds 0 1 2
    python benchmarks/results.py --seeds 0 1 2 3 4 --set trainer.max_steps=15000   # with a GPU
    python benchmarks/results.py --write RESULTS.md       # no runs: tables of those that are done

Rows are in ``benchmarks/results.yaml``. Each is one ``wsss train`` in a process of its own, with a
folder and a log in ``--out``; rows of several tables with the same settings run once. A second call
leaves out what is done and resumes what was cut off; a run of other settings than its row has now
is moved aside, named, and begins anew. All rows run with the first seed before any with the second,
so that an early end leaves whole tables. Rows whose data is not given are left out, named. A second
stage is trained on the pseudo-labels of another row's run of the same seed (``labels_of``), which
are written first; it waits for that run.

``--write`` puts the scores of the runs in ``--out`` into ``benchmarks/results.json`` first, then
makes the tables from that file: runs of several machines, or of folders that are gone, come
together there. Each has a hash of its row's settings. A run of other settings than its row has now
is left out, named. A row of the page of which no run is known stays as it is. Runs with ``--set``
have a page of their own, which is made where there is none: ``--write longer.md --set ...``.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from wsss.build import flat_settings, leave_out_foreign_settings, method_class
from wsss.cli import config_dir
from wsss.files import write_atomically
from wsss.train import apply_variant

ROWS = Path(__file__).with_suffix(".yaml")
#: scores of the runs that the tables are made of, by the names of their folders
RECORD = Path(__file__).with_suffix(".json")
#: columns: heading and score of the network to deploy
COLUMNS = {
    "seg": "seg/miou_ms_flip",
    "F": "seg/boundary_f_ms_flip",
    "precision": "seg/precision_ms_flip",
    "recall": "seg/recall_ms_flip",
    "FP/TP": "seg/confusion_ratio_ms_flip",
    "Dice": "seg/group_dice_ms_flip",
    "CPL": "cpl/miou_ms_flip",
    "CPL F": "cpl/boundary_f_ms_flip",
    "CPL J&F": "cpl/jf_ms_flip",
}
#: the row that others' segmentations are set in relation to
BOUND = "supervised"
#: groups of the configuration that make a run what it is
COMPARED = ("method", "view", "backbone", "decoder", "neck", "addon", "trainer", "data")
#: keys that do not: where things lie, what the machine decides, and what says the same as another
IGNORED = (
    "data.root",
    "data.masks",
    "backbone.weights",
    "data.view.",
    "data.seed",
    "trainer.precision",
)
#: keys that do nothing where a method has no CAM
OF_CAMS = ("method.cam_scales", "method.cpl_threshold")
#: what a recorded run has its row's fingerprint under
SETTINGS = "settings"
console = Console(markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Row:
    """One row of a table: ``settings`` are those of ``wsss train``, without the seed.

    ``labels_of`` is the row of the first stage, of a second one, whose weights ``{first}`` stands
    for; ``bound`` the row that its segmentation is set in relation to.
    """

    table: str
    name: str
    settings: tuple[str, ...]
    labels_of: Row | None = None
    #: settings given with --set, which come after all others
    more: tuple[str, ...] = ()
    bound: str = BOUND

    def folder(self, out: Path, seed: int) -> Path:
        """Of its run; rows with the same settings share it."""
        own = [s.split("=", 1) for s in self.settings if "{" not in s]
        short = [v for k, v in own if k in ("experiment", "method", "variant", "neck", "addon")]
        short += self.more
        name = re.sub(r"[^\w.]+", "-", "_".join(short)).strip("-")
        if self.labels_of is not None:
            name += "_from_encoder" if "{first}" in "".join(self.settings) else ""
            name += f"_on_{self.labels_of.folder(out, seed).name.rpartition('-seed')[0]}"
        return out / f"{name}-seed{seed}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("voc", "acdc", "coco", "weights"):
        parser.add_argument(f"--{name}", help="path, for the rows that need it")
    parser.add_argument("--only", nargs="+", default=["*"], help="rows as table/name, with * and ?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time, one thread each"
    )
    parser.add_argument("--set", nargs="+", default=[], help="settings of all runs, key=value")
    parser.add_argument("--out", type=Path, default=Path("outputs/results"))
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument(
        "--write", type=Path, help="this file's tables, from what is done, and stop"
    )
    parser.add_argument(
        "--record", type=Path, default=RECORD, help="scores of runs, which --write adds to"
    )
    arguments = parser.parse_args()
    every = read_rows(more=arguments.set)
    rows = [
        r for r in every if any(fnmatch.fnmatch(f"{r.table}/{r.name}", p) for p in arguments.only)
    ]
    if not rows:
        parser.error(f"--only {arguments.only}: no such row; --list prints them")
    if arguments.list:
        for row in rows:
            console.print(f"{row.table}/{row.name}: {' '.join(row.settings)}")
    elif arguments.write:
        page_text(arguments.write, every)  # refused before anything is recorded
        runs = update_record(arguments.record, every, arguments.out)
        write_tables(arguments.write, every, runs)
    else:
        paths = {name: getattr(arguments, name) for name in ("voc", "acdc", "coco", "weights")}
        sys.exit(run_all(rows, arguments.seeds, paths, arguments.out, arguments.jobs))


def read_rows(path: Path = ROWS, more: Sequence[str] = ()) -> list[Row]:
    """All rows in the order of their tables."""
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    rows: dict[tuple[str, str], Row] = {}
    for table, about in content["tables"].items():
        for name, own in about["rows"].items():
            row = own if isinstance(own, dict) else {"settings": own}
            settings = (*row["settings"], *content["data"][about["data"]], *content["all"], *more)
            first = rows[table, row["labels_of"]] if "labels_of" in row else None
            if first is None and "{first}" in "".join(settings):
                raise ValueError(f"{table}/{name} has {{first}} and no labels_of")
            bound = row.get("bound", BOUND)
            rows[table, name] = Row(table, name, settings, first, tuple(more), bound)
    return list(rows.values())


# --- runs ----------------------------------------------------------------------------------


def run_all(
    rows: Sequence[Row],
    seeds: Sequence[int],
    paths: dict[str, str | None],
    out: Path,
    jobs: int,
) -> int:
    """Run what is not done, ``jobs`` at a time; the number of runs that failed."""
    move_stale(rows, seeds, out)
    waiting: dict[Path, tuple[list[str], Path | None]] = {}
    for seed in seeds:
        for row in rows:
            folder = row.folder(out, seed)
            lacking = [
                n for n, p in paths.items() if p is None and f"{{{n}}}" in "".join(row.settings)
            ]
            if lacking and seed == seeds[0]:
                console.print(f"left out, give --{' --'.join(lacking)}: {row.table}/{row.name}")
            if not lacking and not (folder / "scores.json").is_file():
                first = row.labels_of.folder(out, seed) if row.labels_of else None
                filled = [
                    setting.format(**paths, first=None if first is None else weights_of(first))
                    for setting in row.settings
                ]
                waiting.setdefault(folder, ([*filled, f"seed={seed}"], first))
    console.print(f"{len(waiting)} runs to do")
    out.mkdir(parents=True, exist_ok=True)
    todo, running, failed = list(waiting.items()), {}, 0
    try:
        while todo or running:
            while len(running) < jobs and (ready := [x for x in todo if is_ready(x[1][1])]):
                todo.remove(ready[0])
                folder, (settings, first) = ready[0]
                running[folder] = start(folder, settings, first)
                console.print(f"{time.strftime('%H:%M')} started  {folder.name}")
            if not running:  # what they wait for failed, or is no part of --only
                for folder, (_, first) in todo:
                    console.print(f"left out, {first} is not done: {folder.name}")
                return failed + len(todo)
            time.sleep(1)
            for folder, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[folder]
                failed += process.returncode != 0
                state = "finished" if process.returncode == 0 else f"FAILED, see {log_of(folder)}:"
                console.print(f"{time.strftime('%H:%M')} {state} {folder.name}")
    except KeyboardInterrupt:
        for process in running.values():
            process.wait()  # they were interrupted too, save their state and end
        console.print("Stopped. The same command goes on here.")
        return 130
    return failed


def move_stale(rows: Sequence[Row], seeds: Sequence[int], out: Path) -> None:
    """Move runs of other settings than their rows have now aside, neither to go on nor to count.

    With them, of whatever row, the second stages trained on their pseudo-labels.
    """
    stale: dict[Path, list[str]] = {}
    for row in [*rows, *(row.labels_of for row in rows if row.labels_of is not None)]:
        for seed in seeds:
            folder = row.folder(out, seed)
            if folder not in stale and (changed := changed_settings(row, folder)):
                stale[folder] = changed
                for second in out.glob(f"*_on_{folder.name}"):
                    stale.setdefault(second, [f"labels of {it}" for it in changed])
    for folder, changed in stale.items():
        if not folder.is_dir():  # a second stage that has not begun
            continue
        aside, number = folder.with_name(f"{folder.name}-old"), 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{folder.name}-old{number}")
        folder.rename(aside)
        if log_of(folder).is_file():
            log_of(folder).rename(log_of(aside))
        console.print(f"now {aside.name}, trained with {'; '.join(changed)}: {folder.name}")


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def weights_of(run: Path) -> Path:
    """The weights that a run's scores are of."""
    return run / "checkpoints" / "last.ckpt"


def is_ready(first: Path | None) -> bool:
    """Whether a run can start: its first stage, if it has one, is done."""
    return first is None or (first / "scores.json").is_file()


def start(
    folder: Path, settings: Iterable[str], first: Path | None = None
) -> subprocess.Popen[bytes]:
    """One training in the background, resumed where an earlier one ended.

    On the pseudo-labels of the run ``first``, if there is one, which are completed before.
    """
    command = [sys.executable, "-m", "wsss.train", *settings, f"output_dir={folder}", "ckpt=last"]
    if first is not None:
        labels = first / "pseudo_labels" / "results"
        command.append(f"data.masks={labels / 'cpl'}")
        label = [sys.executable, "-m", "wsss.pseudo_label", f"checkpoint={weights_of(first)}"]
        label.append("threads=1")
        command = [
            "sh",
            "-c",
            f"{shlex.join([*label, f'output_dir={labels}'])} && {shlex.join(command)}",
        ]
    with log_of(folder).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


# --- tables --------------------------------------------------------------------------------


Runs = dict[str, dict[str, Any]]  # by the names of their folders


def update_record(path: Path, rows: Sequence[Row], out: Path) -> Runs:
    """All runs that are known: those of the file ``path`` with the ones done in ``out`` added.

    A run in ``out`` takes the place of a recorded one of the same name, unless its row has come to
    mean something else since. It is recorded with the fingerprint of its row, if its configuration
    is there to compare. Of a run recorded without one, which counts as today's, a folder of other
    settings tells better.
    """
    runs: Runs = json.loads(path.read_text()) if path.is_file() else {}
    for row in {row.folder(out, 0): row for row in rows}.values():
        name = row.folder(out, 0).name.removesuffix("0")
        for folder in sorted(out.glob(f"{name}*")):
            if not folder.name.removeprefix(name).isdecimal():
                continue
            if (run := read_run(folder)) is None:
                continue
            if changed := changed_settings(row, folder):
                console.print(f"left out, trained with {'; '.join(changed)}: {folder.name}")
                if runs.get(folder.name) == run:
                    runs[folder.name] = run | {SETTINGS: "changed"}
            else:
                known = (folder / "config.yaml").is_file()
                runs[folder.name] = run | ({SETTINGS: fingerprint(row)} if known else {})
    write_atomically(path, (json.dumps(runs, indent=1, sort_keys=True) + "\n").encode())
    return runs


def read_run(folder: Path) -> dict[str, Any] | None:
    """What the tables say of a run; None where it is not done."""
    if not (folder / "scores.json").is_file():
        return None
    content = json.loads((folder / "scores.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    run = {
        "seed": content["seed"],
        "on": device(environment),
        "minutes": minutes_of(environment),
        "commit": environment.get("commit"),
    }
    return run | {h: value for h in COLUMNS if (value := score(content["scores"], h)) is not None}


def changed_settings(row: Row, folder: Path) -> list[str]:
    """What a run's configuration says otherwise than its row would today, of keys both have.

    And that of the run beside it whose pseudo-labels it was trained on, for a second stage.
    """
    changed: list[str] = []
    if row.labels_of is not None:
        seed = int(folder.name.rpartition("-seed")[2])
        first = row.labels_of.folder(folder.parent, seed)
        changed = [f"labels of {it}" for it in changed_settings(row.labels_of, first)]
    file = folder / "config.yaml"
    if not file.is_file():
        return changed
    then = flat_settings(yaml.safe_load(file.read_text()))
    return changed + [
        f"{key}={then[key]}, not {value}"
        for key, value in compared_settings(row).items()
        if key in then and then[key] != value
    ]


@functools.cache
def compared_settings(row: Row) -> dict[str, Any]:
    """What makes a row's runs what they are, as it is configured today."""
    settings = [re.sub(r"{\w+}", "given", setting) for setting in row.settings]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = apply_variant(hydra.compose("train", overrides=settings))
    leave_out_foreign_settings(cfg, settings)
    groups = {
        group: OmegaConf.to_container(cfg[group], resolve=True)
        for group in COMPARED
        if cfg[group] is not None  # no add-on, say
    }
    ignored = IGNORED if method_class(cfg).evaluates_cam else (*IGNORED, *OF_CAMS)
    return {
        key: value for key, value in flat_settings(groups).items() if not key.startswith(ignored)
    }


def fingerprint(row: Row) -> str:
    """Short hash of a row's settings: another one says that the row has changed its meaning.

    Those of the row that a second stage has its pseudo-labels of are among them.

    A setting that is new changes it too, unless it is null. Whoever knows that it changes no run of
    before can have them back: without "settings" in the record, or with the run's folder at hand.
    """
    first = "" if row.labels_of is None else fingerprint(row.labels_of)
    # Without what is not set: a setting that is new, and null by default, changes nothing.
    own = {key: value for key, value in compared_settings(row).items() if value is not None}
    text = json.dumps([own, first], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_of_other_settings(run: dict[str, Any], row: Row) -> bool:
    """Of a recorded run; one of before there were fingerprints is not."""
    return SETTINGS in run and run[SETTINGS] != fingerprint(row)


def write_tables(path: Path, rows: Sequence[Row], runs: Runs) -> None:
    """Put every table between its markers in a Markdown file.

    The markers are ``<!-- table NAME -->`` and ``<!-- end -->``, each on a line of its own. A row
    of which no run is known stays as it is; a new one shows dashes.
    """
    text = page_text(path, rows)
    for table in dict.fromkeys(row.table for row in rows):
        start_mark = f"<!-- table {table} -->\n"
        if start_mark not in text:
            console.print(f"{path} has no marker for {table}")
            continue
        head, rest = text.split(start_mark, 1)
        old, tail = rest.split("<!-- end -->", 1)
        own = [row for row in rows if row.table == table]
        made = table_text(own, runs, read_table(old))
        text = f"{head}{start_mark}\n{made}\n<!-- end -->{tail}"
    write_atomically(path, text.encode())


def page_text(path: Path, rows: Sequence[Row]) -> str:
    """A page to write tables into; a new one where there is none.

    Its first line names the settings of --set, if there are any: runs of other settings have no
    place there, and its figures none beside them.
    """
    wanted = " ".join(["--set", *rows[0].more]) if rows[0].more else "no --set"
    if not path.is_file():
        tables = dict.fromkeys(row.table for row in rows)
        own = [f"## {table}\n\n<!-- table {table} -->\n<!-- end -->\n" for table in tables]
        return "\n".join([f"<!-- {wanted} -->\n"] * bool(rows[0].more) + own)
    text = path.read_text()
    mark = re.match(r"<!-- (--set .*) -->\n", text)
    has = mark[1] if mark else "no --set"
    if has != wanted:
        sys.exit(
            f"{path} is a page of runs with {has}: give those with {wanted} a page of their own "
            "(--write another.md, which is made if there is none)."
        )
    return text


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Cells that are no dash, by row and heading, of the one table in a Markdown text."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {
        line[0]: {h: cell for h, cell in zip(lines[0], line, strict=True) if h and cell != "-"}
        for line in lines[2:]
    }


def table_text(rows: Sequence[Row], runs: Runs, old: dict[str, dict[str, str]]) -> str:
    """Markdown table of one table: mean and standard deviation over the seeds that are known.

    Rows of which no run is known, not even one of other settings, are as in ``old``: nobody can
    say what settings those had.
    """
    seeds = sorted({run["seed"] for run in runs.values()})
    found: dict[str, list[dict[str, Any]]] = {}
    kept: dict[str, dict[str, str]] = {}
    for row in rows:
        names = [n for s in seeds if (n := row.folder(Path(), s).name) in runs]
        stale = [n for n in names if is_of_other_settings(runs[n], row)]
        found[row.name] = [runs[name] for name in names if name not in stale]
        if stale:
            console.print(f"{row.table}/{row.name}: recorded of other settings: {', '.join(stale)}")
        cells = old.get(row.name, {})
        if cells and not names:
            kept[row.name] = cells
        elif cells and len(cells.get("seeds", "").split(",")) > len(found[row.name]):
            console.print(f"{row.table}/{row.name}: gone are the page's seeds {cells.get('seeds')}")
    headings = [
        h
        for h in COLUMNS
        if any(h in run for own in found.values() for run in own)
        or any(h in cells for cells in kept.values())
    ]
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        own = found[row.name]
        cells = {h: deviation([run.get(h) for run in own]) for h in headings}
        cells["seeds"] = ", ".join(str(run["seed"]) for run in own)
        cells["on"] = ", ".join(sorted({run["on"] for run in own}))
        cells["minutes"] = deviation([run["minutes"] for run in own], 0)
        cells["commit"] = " ".join(sorted({run["commit"] or "-" for run in own}))
        table[row.name] = kept.get(row.name) or cells
    ratio = f"of {BOUND}"
    for row in rows:
        own_seg, bound_seg = (table.get(name, {}).get("seg", "-") for name in (row.name, row.bound))
        share = "-"
        if "-" not in (own_seg, bound_seg):
            share = f"{100 * float(own_seg.split()[0]) / float(bound_seg.split()[0]):.0f} %"
        table[row.name][ratio] = share
    if all(cells[ratio] == "-" for cells in table.values()):
        ratio = ""
    numbers = [*headings, ratio] if ratio else headings
    lines = [["", *numbers, "seeds", "on", "minutes", "commit"]]
    lines.append(["---", *["---:"] * len(numbers), "---:", "---", "---:", "---"])
    for name, cells in table.items():
        lines.append([name, *[cells.get(h) or "-" for h in lines[0][1:]]])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def score(scores: dict[str, float], heading: str) -> float | None:
    """In percent, of the network to deploy: the assignment network where there is one."""
    for network in ("an", "on"):
        value = scores.get(f"{network}/{COLUMNS[heading]}")
        if value is not None:
            return round(float(value), 3)
    return None


def minutes_of(environment: dict[str, Any]) -> float | None:
    """Wall time of a training; None of one that was resumed, whose first part is not known."""
    if environment.get("resumed_from_step") or "seconds" not in environment:
        return None
    return round(float(environment["seconds"]) / 60, 2)


def device(environment: dict[str, Any]) -> str:
    """What a run was trained on: the GPU's name, else the processor's, without its marks; and that
    it computed in float32, if it did."""
    found = environment.get("devices") or [environment.get("cpu") or "CPU"]
    name = str(found[0]["name"] if isinstance(found[0], dict) else found[0])
    name = re.sub(r"\((R|TM)\)|\d+-Core|Processor|CPU @.*", "", name).strip() or "CPU"
    return f"{name} (fp32)" if environment.get("precision") == "32-true" else name


def deviation(values: Iterable[float | None], digits: int = 1) -> str:
    """``mean ± sd`` (n - 1) of the values that exist."""
    kept = [value for value in values if value is not None]
    if not kept:
        return "-"
    mean = f"{statistics.fmean(kept):.{digits}f}"
    return mean if len(kept) < 2 else f"{mean} ± {statistics.stdev(kept):.{digits}f}"


if __name__ == "__main__":
    main()
