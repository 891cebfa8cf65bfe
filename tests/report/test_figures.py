"""Curves and heat maps as inline SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf

from wsss.report.figures import (
    MOST_POINTS,
    confusion_chart,
    line_chart,
    loss_charts,
    thin,
    threshold_chart,
    validation_charts,
)

SVG = "{http://www.w3.org/2000/svg}"
METRICS = {
    "loss/cls": [(9, 2.0), (19, 1.0)],
    "loss/total": [(9, 3.0), (19, 2.0)],
    "loss/c2s": [(19, 0.5)],
    "loss/c2s_early": [(19, 0.75)],
    "lr": [(9, 0.25), (19, 0.125)],
    "threshold/cam": [(9, 0.4), (19, 0.45)],
    "threshold/early_cam": [(9, 0.3), (19, 0.35)],
    "on/seg/miou_ss": [(10, 0.2), (20, 0.3)],
    "an/seg/miou_ms_flip": [(10, 0.25), (20, 0.5)],
    "an/seg/miou_ss": [(10, 0.2), (20, 0.3)],
    "an/seg/miou_ms_flip_crf": [(10, 0.2), (20, 0.3)],
    "an/seg/group_dice_ss": [(10, 0.2), (20, 0.3)],
    "an/cls/map": [(10, 0.2), (20, 0.3)],
    "an/cls/image_ap": [(10, 0.2), (20, 0.3)],
    "an/cpl/once": [(20, 0.3)],
}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def label(svg: str) -> str:
    return ElementTree.fromstring(svg).attrib["aria-label"]


def test_a_chart_a_loss_with_the_early_one_beside_it() -> None:
    charts = loss_charts(METRICS, "k")
    assert [c.title for c in charts] == ["loss/total", "loss/c2s", "loss/cls", "learning rate"]
    assert label(charts[0].svg) == "loss/total: loss/total goes from 3 at step 9 to 2 at step 19."
    assert "loss/c2s_early goes from 0.75 at step 19 to 0.75" in label(charts[1].svg)
    assert {"loss/c2s", "loss/c2s_early"} <= set(texts(charts[1].svg))
    dashed = [
        c for c in loss_charts({**METRICS, "loss/c2s": METRICS["lr"]}, "k") if "dash" in c.svg
    ]
    assert [c.title for c in dashed] == ["loss/c2s"]  # the early one
    assert "loss/cls" not in texts(charts[2].svg)  # one line needs no legend
    assert "from 0.25 at step 9 to 0.125" in label(charts[3].svg)
    assert loss_charts({}, "k") == []


def test_thresholds_are_drawn_from_0_to_1() -> None:
    chart = threshold_chart(METRICS, "k")
    assert chart is not None
    assert {"threshold/cam", "threshold/early_cam", "0.0", "1.0"} <= set(texts(chart.svg))
    assert threshold_chart({"lr": [(1, 1.0)]}, "k") is None


def test_validation_by_network_and_kind_in_percent() -> None:
    charts = validation_charts(METRICS, "k")
    assert [c.title for c in charts] == [
        "an: miou (%)",
        "on: miou (%)",
        "an: group_dice (%)",
        "an: image labels (%)",
    ]
    words = label(charts[0].svg)
    assert "seg/miou_ms_flip goes from 25 at step 10 to 50 at step 20" in words
    assert "seg/miou_ms_flip_crf" in words
    assert "seg/miou_ss" in words
    assert "cls/map" in label(charts[3].svg)
    # One evaluation is no curve.
    assert all("once" not in label(chart.svg) for chart in charts)


def test_long_lines_are_thinned_to_means() -> None:
    values = [(10 * i, float(i % 2)) for i in range(2 * MOST_POINTS)]
    assert thin(values[:MOST_POINTS]) == values[:MOST_POINTS]
    thinned = thin(values)
    assert len(thinned) == MOST_POINTS
    assert thinned[:2] == [(5, 0.5), (25, 0.5)]
    assert thin([(0, 1.0), (2, 3.0), (4, 8.0)], 2) == [(1, 2.0), (4, 8.0)]
    assert thin([], 2) == []
    assert line_chart("a", {"a": values}, "k").note == "Each point is the mean of 2 logged values."
    assert line_chart("a", {"a": values[:MOST_POINTS]}, "k").note == ""


def test_heat_map_gives_shares_of_the_truth() -> None:
    matrix = [[90, 10, 0], [996, 4, 0], [0, 0, 0]]
    chart = confusion_chart(matrix, ["background", "a$b$c", "<b>"], "k", "title")
    numbers = [t for t in texts(chart.svg) if t.isdecimal()]
    assert sorted(numbers[: len(numbers) - 7], key=int) == ["10", "90", "100"]  # 0.4 % is not shown
    assert numbers[-7:] == ["0", "1", "5", "10", "25", "50", "100"]  # of the bar
    assert {"truth", "predicted"} <= set(texts(chart.svg))
    assert texts(chart.svg).count("a$b$c") == 2
    assert texts(chart.svg).count("<b>") == 2


def test_heat_map_has_room_beside_long_names() -> None:
    names = ["right ventricle, o", "right ventricle, on", "x" * 500]
    svg = confusion_chart(np.eye(3), names, "k", "title").svg
    assert {"right ventricle, o", "right ventricle, …", "x" * 17 + "…"} <= set(texts(svg))
    assert ElementTree.fromstring(svg).find(f".//{SVG}image") is not None


def test_figures_of_one_page_share_no_id_and_refer_to_nothing_outside() -> None:
    names = [chart.svg for key in ("r1", "r2") for chart in loss_charts(METRICS, key)]
    names.append(confusion_chart([[1, 2], [3, 4]], ["a", "b"], "r1-c", "t").svg)
    page = "".join(names)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for name in re.findall(r'href="([^"]*)"', page):
        assert name.startswith("data:") or name[1:] in ids, name
    for name in re.findall(r"url\(#([^)]*)\)", page):
        assert name in ids
    assert "<metadata" not in page
    assert "<style" not in page
    assert not re.search(r'<svg[^>]* width="', page)


def test_title_and_legend_are_escaped() -> None:
    svg = line_chart('"<x>', {"<script>": [(0, 1.0)], "&": [(1, 2.0)]}, "k").svg
    assert "<script>" not in svg
    assert label(svg).startswith('"<x>: <script> goes from 1 at step 0')
    assert {"<script>", "&"} <= set(texts(svg))


def test_same_figure_twice_and_no_trace_in_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    before, figures = dict(matplotlib.rcParams), dict(Gcf.figs)
    first, second = (line_chart("a", {"a": [(0, 1.0), (9, 2.0)]}, "k").svg for _ in range(2))
    assert first == second
    assert dict(matplotlib.rcParams) == before
    assert figures == Gcf.figs  # pyplot's list of open figures
    assert "red" not in first
    assert "#ff0000" not in first  # the user's own style does not get in
