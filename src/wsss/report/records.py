"""What a run folder holds beside its scores: environment, metrics over time, scores by image."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsss.errors import UserError

#: steps and values of one column of metrics.csv
Series = list[tuple[int, float]]


def read_environment(folder: Path) -> dict[str, Any]:
    """``environment.json``; empty where there is none, as in older runs.

    Raises:
        UserError: the file is not JSON.
    """
    path = folder / "environment.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}). Delete it to go without.") from error
    return content if isinstance(content, dict) else {}


def metrics_files(folder: Path) -> list[Path]:
    """``metrics.1.csv``, ``metrics.2.csv`` ... of a resumed run, then ``metrics.csv``."""
    earlier = [p for p in folder.glob("metrics.*.csv") if p.name.split(".")[1].isdecimal()]
    earlier.sort(key=lambda path: int(path.name.split(".")[1]))
    return [*earlier, *(p for p in [folder / "metrics.csv"] if p.is_file())]


def read_metrics(folder: Path) -> dict[str, Series]:
    """Columns of a run's metrics over steps, the parts of a resumed run joined.

    A part starts where its checkpoint was written, perhaps before the part that it follows ended:
    from its first step on it replaces what came before. Values that are not finite are left out.

    Returns:
        Column to its (step, value) pairs in the order of the steps.

    Raises:
        UserError: a cell is no number, or there is no column ``step``.
    """
    joined: dict[str, dict[int, float]] = {}
    for path in metrics_files(folder):
        part = _read_part(path)
        first = min((step for values in part.values() for step in values), default=math.inf)
        for values in joined.values():
            for step in [step for step in values if step >= first]:
                del values[step]
        for column, values in part.items():
            joined.setdefault(column, {}).update(values)
    return {column: sorted(values.items()) for column, values in joined.items() if values}


def _read_part(path: Path) -> dict[str, dict[int, float]]:
    columns: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header and "step" not in header:
            raise UserError(f"'{path}' has no column step. Delete it to go without curves.")
        for number, row in enumerate(rows, start=2):
            if len(row) < len(header):
                continue  # cut off in the middle of the last line
            try:
                cells = {name: float(cell) for name, cell in zip(header, row, strict=True) if cell}
                step = int(cells.pop("step"))
            except (ValueError, KeyError) as error:
                raise UserError(
                    f"'{path}', line {number}: not as wsss.train writes it ({error}). Mend the "
                    "line, or delete the file to go without curves."
                ) from error
            cells.pop("epoch", None)
            for name, value in cells.items():
                if math.isfinite(value):
                    columns.setdefault(name, {})[step] = value
    return columns


def read_image_scores(folder: Path, order: Sequence[str]) -> tuple[str, dict[str, float]] | None:
    """Scores of a run's images by the first protocol that has any.

    Args:
        folder: of the run.
        order: full names, best first; columns that it does not name come last.

    Returns:
        The protocol's full name and the percentages by image name, without the images that have
        no score; None where there is no ``images.csv`` or nothing in it.

    Raises:
        UserError: the file is not as ``wsss.train`` writes it.
    """
    path = folder / "images.csv"
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = [column for column in (rows[0] if rows else []) if column != "name"]
        columns.sort(key=lambda c: order.index(c) if c in order else len(order))
        for column in columns:
            scores = {row["name"]: float(row[column]) for row in rows if row[column]}
            if scores:
                return column, scores
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is not as wsss.train writes it ({error}). Delete it to go without."
        ) from error
    return None


def worst_and_best(scores: Mapping[str, float], count: int) -> tuple[list[str], list[str]]:
    """Names of the images with the lowest scores, and of those with the highest, best first.

    Args:
        scores: by image name.
        count: images in all; of an odd number one more of the worst.
    """
    ranked = sorted(scores, key=lambda name: (scores[name], name))
    count = min(count, len(ranked))
    worst = (count + 1) // 2
    return ranked[:worst], ranked[::-1][: count - worst]
