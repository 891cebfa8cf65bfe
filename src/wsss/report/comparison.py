"""Several runs side by side: tables, means over seeds, and CoSA next to its bounds."""

from __future__ import annotations

import csv
import io
import itertools
import re
import statistics
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsss.report.runs import (
    Run,
    differing_settings,
    naming_settings,
    seed_groups,
    setting,
    setting_names,
    settings_text,
)
from wsss.report.tables import PROTOCOL_ORDER, number

#: scores of a printed table where width is short
HEADLINES = (
    "seg/miou_ms_flip",
    "cpl/miou_ms_flip",
    "affinity/balanced_accuracy",  # AffinityNet has no other
)
#: scores of the tables to read; the CSV has all
MAIN_SCORES = (*HEADLINES, "cpl/boundary_f_ms_flip", "cpl/jf_ms_flip")
#: settings that say which images were scored
SCORED_ON = ("data.root", "data.val_split", "data.max_val_images")


def score_names(runs: Sequence[Run]) -> list[str]:
    """Full names of the scores that any run has: assignment network first, headline first."""
    return in_order({name for run in runs for name in run.content["scores"]})


def in_order(names: Iterable[str]) -> list[str]:
    """Full names by network, then from the headline down, then those without a place."""

    def place(name: str) -> tuple[str, int, str]:
        network, protocol = name.split("/", 1)
        known = protocol in PROTOCOL_ORDER
        return network, PROTOCOL_ORDER.index(protocol) if known else len(PROTOCOL_ORDER), protocol

    return sorted(names, key=place)


def main_scores(names: Iterable[str]) -> list[str]:
    """Those of the tables to read, in the order given."""
    return [name for name in names if name.split("/", 1)[1] in MAIN_SCORES]


# --- tables --------------------------------------------------------------------------------


def table_rows(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every run, then mean and standard deviation of those with more seeds."""
    keys = differing_settings(runs)
    header = ["run", "method", *keys, "seed", "steps", *names]
    rows = []
    for run in runs:
        scores = (number(run.score(name)) for name in names)
        rows.append([run.name, run.method, *_values(run, keys), run.seed, run.steps, *scores])
    for group in seed_groups(runs):
        if len(group) > 1:
            rows.append(_mean_row(group, keys, names))
    return header, rows


def group_rows(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every experiment once, with mean and standard deviation over its seeds."""
    keys = differing_settings(runs)
    header = ["run", "method", *keys, "seeds", "steps", *names]
    rows = []
    for group in seed_groups(runs):
        row = _mean_row(group, keys, names)
        row[0] = group[0].name
        row[2 + len(keys)] = str(len(group))
        rows.append(row)
    return header, rows


def _mean_row(group: Sequence[Run], keys: Sequence[str], names: Sequence[str]) -> list[str]:
    first = group[0]
    cells = [mean_and_deviation([run.score(name) for run in group]) for name in names]
    name = f"{first.name} (n={len(group)})"
    return [name, first.method, *_values(first, keys), "mean", first.steps, *cells]


def _values(run: Run, keys: Iterable[str]) -> list[str]:
    return [setting(run, key) for key in keys]


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """``mean +- sd`` (n - 1) of the values that exist, with their number where some do not."""
    kept = [v for v in values if v is not None]
    some = f" (n={len(kept)})" if 0 < len(kept) < len(values) else ""
    if len(kept) < 2:
        return number(kept[0] if kept else None) + some
    return f"{statistics.fmean(kept):.2f} +- {statistics.stdev(kept):.2f}{some}"


def rich_table(runs: Sequence[Run], console: Console) -> Table:
    """The main scores for the terminal: settings in one column, deviations on their own lines.

    Without those of contours where the console has no room for all.
    """
    names = main_scores(score_names(runs))
    table = _rich_table(runs, names)
    headlines = [name for name in names if name.split("/", 1)[1] in HEADLINES]
    unbounded = console.options.update(max_width=10_000)
    if headlines != names and console.measure(table, options=unbounded).maximum > console.width:
        table = _rich_table(runs, headlines)
        table.caption, table.caption_justify = "contours: table.md", "left"
    return table


def _rich_table(runs: Sequence[Run], scores: Sequence[str]) -> Table:
    header, rows = table_rows(runs, scores)
    first, last = 2, header.index("seed")
    naming = naming_settings(runs)
    shown = [i for i in range(first, last) if header[i] in naming]
    names = setting_names(naming)
    titles = [*header[:first], *(["settings"] if shown else []), *header[last:]]
    table = Table(title="Scores (%)", title_justify="left", box=SIMPLE_HEAVY, collapse_padding=True)
    for i, title in enumerate(titles):
        title = re.sub("/(miou|boundary_f|jf)_", r"/\n\1_\n", title)
        words = i < first + bool(shown)
        table.add_column(title, justify="left" if words else "right", overflow="fold")
    for row in rows:
        settings = "\n".join(f"{names[header[i]]}={row[i]}" for i in shown if row[i] != "-")
        cells = [*row[:first], *([settings] if shown else []), *row[last:]]
        table.add_row(*(escape(cell).replace(" +- ", "\n+- ") for cell in cells))
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]) -> str:
    """The rows as a Markdown table, the comparisons as a list below."""
    align = ["---" if i < 2 else "---:" for i in range(len(header))]
    text = "".join(f"| {' | '.join(row)} |\n" for row in (header, align, *rows))
    return f"Scores (%)\n\n{text}" + ("\n" if lines else "") + "".join(f"- {x}\n" for x in lines)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as CSV; empty where there is no value."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *([("" if c == "-" else c) for c in row] for row in rows)])
    return buffer.getvalue()


# --- bounds --------------------------------------------------------------------------------


def comparisons(runs: Sequence[Run]) -> list[str]:
    """CoSA next to its bounds on the same images: share of full supervision, gain over CAMs."""
    groups = seed_groups(runs)
    keys = naming_settings(runs)

    def pairs(bound: str) -> list[tuple[list[Run], list[Run]]]:
        return [
            (cosa, other)
            for cosa, other in itertools.product(groups, groups)
            if (cosa[0].method, other[0].method) == ("cosa", bound)
            and not other[0].config.get("data", {}).get("masks")  # a second stage is no bound
            and all(setting(cosa[0], key) == setting(other[0], key) for key in SCORED_ON)
        ]

    lines = []
    for cosa, other in pairs("supervised"):
        above, below = _mean(cosa, "an/seg/miou_ms_flip"), _mean(other, "on/seg/miou_ms_flip")
        if above is not None and below:
            lines.append(
                f"{_label(cosa, keys)} an/seg/miou_ms_flip {above:.2f} is "
                f"{100 * above / below:.1f} % of "
                f"{_label(other, keys)} on/seg/miou_ms_flip {below:.2f}"
            )
    for cosa, other in pairs("cam"):
        above, below = _mean(cosa, "an/cpl/miou_ms_flip"), _mean(other, "on/cpl/miou_ms_flip")
        if above is not None and below is not None:
            lines.append(
                f"{_label(cosa, keys)} an/cpl/miou_ms_flip {above:.2f} is "
                f"{above - below:+.2f} points "
                f"from {_label(other, keys)} on/cpl/miou_ms_flip {below:.2f}"
            )
    return lines


def _mean(group: Sequence[Run], name: str) -> float | None:
    values = [v for v in (run.score(name) for run in group) if v is not None]
    return statistics.fmean(values) if values else None


def _label(group: Sequence[Run], keys: Sequence[str]) -> str:
    first = group[0]
    name = first.name if first.method in first.name else f"{first.name} {first.method}"
    alike = f" (mean of {len(group)})" if len(group) > 1 else ""
    return " ".join(filter(None, (name, settings_text(first, keys)))) + alike
