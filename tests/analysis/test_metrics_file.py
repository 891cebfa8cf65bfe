"""Reading what a run logged, over its starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from wsss.analysis.collect import NetworkScore
from wsss.analysis.metrics_file import ThresholdRow, read_metrics, score_rows, threshold_rows
from wsss.errors import UserError

LOG = """\
an/cpl/miou_ms_flip,an/seg/miou_ms_flip,loss/total,on/cpl/miou_ms_flip,on/seg/miou_ms_flip,step,threshold/cam,threshold/early_cam
,,2.5,,,9,,
,,2.0,,,19,0.31,0.32
0.25,0.5,,0.75,0.125,19,,
,,1.0,,,29,0.33,
0.26,0.51,,0.76,0.126,39,,
0.27,0.52,,0.77,0.127,40,,
"""


def test_steps_are_those_done(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(LOG)
    rows = read_metrics(tmp_path, max_steps=40)
    assert [row["step"] for row in rows] == [10, 20, 20, 30, 40, 40]
    assert "threshold/cam" not in rows[0]
    first, second = threshold_rows(rows)
    assert first == ThresholdRow(20, 0.31, 0.32)
    assert second[:2] == (30, 0.33)
    assert math.isnan(second.early_cam)
    assert score_rows(rows, ["an", "on"]) == [
        NetworkScore(20, "an", 0.5, 0.25),
        NetworkScore(20, "on", 0.125, 0.75),
        NetworkScore(40, "an", 0.52, 0.27),  # after training, not in it
        NetworkScore(40, "on", 0.127, 0.77),
    ]
    assert [row.step for row in score_rows(rows, ["an"])] == [20, 40]


def test_a_method_without_segmentation(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("on/cpl/miou_ms_flip,step\n0.5,9\n")
    rows = read_metrics(tmp_path, 100)
    assert threshold_rows(rows) == []
    (row,) = score_rows(rows, ["on"])
    assert (row.step, row.cpl) == (10, 0.5)
    assert math.isnan(row.seg)


def log(*rows: tuple[int, float]) -> str:
    return "step,threshold/cam\n" + "".join(f"{step},{value}\n" for step, value in rows)


def test_earlier_starts_count_up_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.2.csv").write_text(log((20, 0.3), (30, 0.4), (40, 0.9)))
    (tmp_path / "metrics.1.csv").write_text(log((10, 0.1), (20, 0.8), (50, 0.7)))
    (tmp_path / "metrics.10.csv").write_text(log((40, 0.5), (50, 0.9)))
    (tmp_path / "metrics.csv").write_text(log((50, 0.6)))
    (tmp_path / "metrics.old.csv").write_text("no log\n")
    rows = threshold_rows(read_metrics(tmp_path, 1000))
    assert [(row.step, row.cam) for row in rows] == [
        (11, 0.1),
        (21, 0.3),
        (31, 0.4),
        (41, 0.5),
        (51, 0.6),
    ]


def test_a_run_begun_anew_replaces_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.1.csv").write_text(log((10, 0.1), (20, 0.8)))
    (tmp_path / "metrics.csv").write_text(log((10, 0.2)))
    assert [r.cam for r in threshold_rows(read_metrics(tmp_path, 1000))] == [0.2]


def test_no_log_or_an_empty_one(tmp_path: Path) -> None:
    assert read_metrics(tmp_path, 10) == []
    (tmp_path / "metrics.csv").write_text("")
    assert read_metrics(tmp_path, 10) == []
    (tmp_path / "metrics.1.csv").write_text(log((3, 0.4)))
    assert len(read_metrics(tmp_path, 10)) == 1


def test_a_broken_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,threshold/cam\n1,half\n")
    with pytest.raises(UserError, match=r"metrics\.csv' is not a log.*half.*Move it away"):
        read_metrics(tmp_path, 10)
