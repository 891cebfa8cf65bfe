"""What a run logged: ``metrics.csv``, and the logs of its earlier starts."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsss.analysis.collect import NetworkScore
from wsss.errors import UserError

Row = dict[str, float]


class ThresholdRow(NamedTuple):
    """Background thresholds after ``step`` optimizer steps; NaN where not logged."""

    step: int
    cam: float
    early_cam: float


def read_metrics(run: Path, max_steps: int) -> list[Row]:
    """All that a run logged, in order; nothing where there is no log.

    A run that was resumed has ``metrics.1.csv``, ``metrics.2.csv`` ... of its earlier starts; they
    count up to the step at which the next one begins.

    Args:
        run: the run's folder.
        max_steps: of the run, ``trainer.max_steps``.

    Returns:
        Rows with the values that are there; ``step`` is the number of optimizer steps done, as
        in checkpoints.

    Raises:
        UserError: a log that cannot be read.
    """
    rows: list[Row] = []
    for path in _logs(run):
        later = _read(path, max_steps)
        if later:
            first = min(row["step"] for row in later)
            rows = [row for row in rows if row["step"] < first] + later
    return rows


def threshold_rows(rows: Sequence[Row]) -> list[ThresholdRow]:
    """Thresholds over steps; empty where the method logged none."""
    return [
        ThresholdRow(
            int(row["step"]), row["threshold/cam"], row.get("threshold/early_cam", math.nan)
        )
        for row in rows
        if "threshold/cam" in row
    ]


def score_rows(rows: Sequence[Row], networks: Sequence[str]) -> list[NetworkScore]:
    """Scores over steps; of two validations at one step (in and after training) the later."""
    found: dict[tuple[int, str], NetworkScore] = {}
    for row in rows:
        for network in networks:
            seg, cpl = (row.get(f"{network}/{name}/miou_ms_flip") for name in ("seg", "cpl"))
            if seg is None and cpl is None:
                continue
            step = int(row["step"])
            found[step, network] = NetworkScore(
                step,
                network,
                math.nan if seg is None else seg,
                math.nan if cpl is None else cpl,
            )
    return sorted(found.values())


def _logs(run: Path) -> list[Path]:
    """Earlier starts first; the present log last."""
    numbered = {p: p.name.split(".")[1] for p in run.glob("metrics.*.csv")}
    earlier = sorted(
        (p for p, n in numbered.items() if n.isdigit()), key=lambda p: int(numbered[p])
    )
    present = run / "metrics.csv"
    return [*earlier, *([present] if present.is_file() else [])]


def _read(path: Path, max_steps: int) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_numbers(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"'{path}' is not a log as wsss.train writes it ({error}). Move it away to go without "
            "what it says."
        ) from error
    rows = [row for row in rows if "step" in row]
    for row in rows:
        # Lightning counts steps from 0 during training; the evaluation after it has them all.
        if row["step"] != max_steps:
            row["step"] += 1
    return rows


def _numbers(row: Mapping[str | None, str | None]) -> Row:
    return {key: float(text) for key, text in row.items() if key is not None and text}
