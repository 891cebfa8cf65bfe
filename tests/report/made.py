"""Runs made up for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from wsss.report.runs import Run

SCORES: dict[str, dict[str, float | None]] = {
    "cosa": {
        "on/seg/miou_ms_flip": 41.0,
        "an/cpl/miou_ms_flip": 52.5,
        "an/seg/miou_ms_flip": 45.0,
    },
    "cam": {"on/cpl/miou_ms_flip": 30.25, "on/cpl_early/miou_ms_flip": None},
    "supervised": {"on/seg/miou_ms_flip": 50.0},
}


def run(method: str, /, seed: int = 0, offset: float = 0.0, step: int = 9, **config: Any) -> Run:
    """A run with the scores above, ``offset`` points better."""
    scores = {k: None if v is None else v + offset for k, v in SCORES[method].items()}
    content = {"name": method, "method": method, "seed": seed, "step": step, "scores": scores}
    data = {"seed": seed, "root": "there"}
    return Run(Path(f"{method}{seed}"), {"seed": seed, "data": data, **config}, content)


def write(made: Run, folder: Path, **content: Any) -> Run:
    """The run as a folder, with more of ``scores.json``; classes cat and dog."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(made.config))
    found = {"classes": ["background", "cat", "dog"], "means": {}, **made.content, **content}
    (folder / "scores.json").write_text(json.dumps(found))
    return Run(folder, made.config, found)
