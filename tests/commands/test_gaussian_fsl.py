"""``wsss analyse gaussian_fsl`` through the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import Run, compose
from wsss.analysis.gaussian_command import gaussian_fsl
from wsss.errors import UserError


def test_command(run: Run, shapes_root: Path, tmp_path: Path) -> None:
    arguments = ["gaussian_fsl", "data=shapes", "~data.generate", f"data.root={shapes_root}"]
    more = ["resolution=0.5", "mu=[2,2.5]", "sigma=[2,3]", "at=[2.5,3]", "steps=4", "area=[0.01,1]"]
    printed = run("analyse", *arguments, *more, "output_dir=out", "pictures=2").stdout
    assert "Best J&F at mu" in printed
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["mu"], row["sigma"]) for row in rows[1:]] == [
        ("2", "3"),
        ("2.5", "2"),
        ("2.5", "3"),
    ]
    for row in rows:
        mean = (float(row["J"]) + float(row["F"])) / 2
        assert float(row["J&F"]) == pytest.approx(mean, abs=0.011)
    for name in ("curves.png", "strip.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate=none", "gate='none'"),
        ("steps=0", "steps=0"),
        ("resolution=0", "resolution=0"),
        ("sigma=[5,-1]", "sigma=-1"),
        ("at=[2.5]", r"at=\[2\.5\]"),
        ("area=[0.6,0.2]", r"area=\[0\.6, 0\.2\]"),
        ("area=[0.98,0.99]", "no image with one connected object"),
    ],
)
def test_mistakes(override: str, message: str, shapes_root: Path, tmp_path: Path) -> None:
    more = ["data=shapes", "~data.generate", f"data.root={shapes_root}", f"output_dir={tmp_path}"]
    with pytest.raises(UserError, match=message):
        gaussian_fsl(compose("gaussian_fsl", [*more, override]))
