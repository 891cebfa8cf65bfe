"""Tables, sentences and figures say what was counted."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from wsss.analysis import drawing
from wsss.analysis.collect import UNFITTED, NetworkScore
from wsss.analysis.curves import LabelReliability, rank_correlation
from wsss.analysis.metrics_file import ThresholdRow
from wsss.analysis.summary import (
    CheckpointCurves,
    class_table,
    csv_tables,
    printed_table,
    sentences,
)

MakeCurves = Callable[..., CheckpointCurves]


@pytest.fixture
def curves(make_curves: MakeCurves) -> list[CheckpointCurves]:
    return [make_curves(step) for step in (100, 500, 1000)]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# --- tables --------------------------------------------------------------------------------


def test_files(curves: list[CheckpointCurves]) -> None:
    networks = [row for item in curves for row in item.networks]
    thresholds = [ThresholdRow(9, 0.3, math.nan)]
    tables = {
        name: read(text)
        for name, text in csv_tables(curves, networks, thresholds, ["cat", "dog"]).items()
    }
    assert {name: len(rows) for name, rows in tables.items()} == {
        "summary.csv": 3 * 2,
        "accuracy_by_confidence.csv": 3 * 2 * 20,
        "accuracy_by_perplexity.csv": 3 * 2 * 3 * 17,
        "confidence.csv": 3 * 2 * 50,
        "miou_by_threshold.csv": 3 * 2 * 101,
        "cam_against_early_cam.csv": 3 * 2 * 3,
        "reliability_by_class.csv": 3 * 2 * 3,
        "networks.csv": 6,
        "threshold_over_steps.csv": 1,
    }
    assert "networks.csv" not in csv_tables(curves, [], [], ["cat", "dog"])
    assert tables["threshold_over_steps.csv"] == [{"step": "9", "cam": "0.3", "early_cam": ""}]
    assert tables["networks.csv"][0] == {"step": "100", "network": "an", "seg": "", "cpl": "0.5"}

    early = curves[1].early_cam
    row = tables["accuracy_by_perplexity.csv"][3 * 17 * 3 + 17 + 4]
    found = early.by_perplexity["foreground"][4]
    assert (row["step"], row["cam"], row["label"]) == ("500", "early_cam", "foreground")
    assert int(row["pixels"]) == found.pixels
    assert float(row["accuracy"]) == pytest.approx(found.accuracy, rel=1e-5)
    row = tables["miou_by_threshold.csv"][3 * 101 + 99]
    assert (row["which"], row["threshold"]) == ("of the checkpoint", "0.3")
    row = tables["miou_by_threshold.csv"][3 * 101 + 100]
    assert row["which"] == "best fixed"
    assert float(row["miou"]) == pytest.approx(early.best.miou, rel=1e-5)


def test_summary(curves: list[CheckpointCurves]) -> None:
    rows = read(csv_tables(curves, [], [], ["cat", "dog"])["summary.csv"])
    assert [(row["step"], row["cam"]) for row in rows[:2]] == [("100", "cam"), ("100", "early_cam")]
    cam = curves[0].cam
    expected = {
        "threshold": 0.4,
        "best_threshold": cam.best.threshold,
        "miou_at_threshold": cam.at_threshold.miou,
        "miou_at_best": cam.best.miou,
        "miou_at_0.45": cam.by_threshold[44].miou,
        "miou_at_0.50": cam.by_threshold[49].miou,
        "accuracy": cam.regions[0].accuracy,
        "accuracy_lowest_perplexity_fifth": cam.low,
        "accuracy_highest_perplexity_fifth": cam.high,
        "perplexity_auroc": cam.separation,
        "perplexity_spearman": cam.correlation,
    }
    for name, value in expected.items():
        assert float(rows[0][name]) == pytest.approx(value, rel=1e-5), name
    assert cam.low > cam.high


def test_regions(curves: list[CheckpointCurves]) -> None:
    cam, early = curves[2].cam, curves[2].early_cam
    assert [r.region for r in cam.regions] == ["all pixels", "own low perplexity", "Omega"]
    # M in Omega was counted apart; Omega of M_early is its own region.
    assert early.regions[1][1:] == early.regions[2][1:]
    assert cam.regions[1][1:] != cam.regions[2][1:]
    assert cam.regions[0].share == 1
    assert 0 < cam.regions[1].share < 1
    assert cam.regions[2].share == 0.75  # of the invented pixels


def test_printed_table_fits_a_terminal(curves: list[CheckpointCurves]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(printed_table(curves))
    text = console.export_text()
    assert "…" not in text
    cells = next(line for line in text.splitlines() if line.split()[:1] == ["500"]).split()
    cam, early = curves[1].cam, curves[1].early_cam
    assert cells[1:3] == ["0.400", f"{cam.best.threshold:.2f}"]
    shown = [cam.at_threshold.miou, cam.best.miou, cam.low, cam.high, cam.separation]
    shown += [cam.regions[0].accuracy, early.regions[0].accuracy]
    shown += [cam.regions[1].accuracy, early.regions[1].accuracy]
    assert cells[3:] == [f"{100 * value:.1f}" for value in shown]


def test_classes(curves: list[CheckpointCurves]) -> None:
    rows = read(csv_tables(curves, [], [], ["cat", "dog"])["reliability_by_class.csv"])
    assert [row["class"] for row in rows[:3]] == ["background", "cat", "dog"]
    found = curves[2].cam.reliability[1]
    row = rows[2 * 2 * 3 + 1]
    assert (row["step"], row["cam"], int(row["pixels"])) == ("1000", "cam", found.pixels)
    assert float(row["right_by_weight"]) == pytest.approx(found.right_by_weight, rel=1e-5)

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(class_table(curves[2], ["cat", "dog"]))
    cells = next(r for r in console.export_text().splitlines() if r.split()[:1] == ["cat"]).split()
    shares = [f"{100 * value:.1f}" for value in (found.right, found.right_by_weight)]
    assert cells[1:] == [*shares, f"{found.weight_right:.2f}", f"{found.weight_wrong:.2f}"]


def test_a_class_without_pixels_is_not_shown(make_curves: MakeCurves) -> None:
    item = make_curves(100)
    item.cam.reliability[2] = LabelReliability(2, 0, *[math.nan] * 4)
    item.cam.reliability[1] = LabelReliability(1, 5, 1.0, 1.0, 0.5, math.nan)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(class_table(item, ["[/cat]", "dog"]))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["[/cat]", "100.0", "100.0", "0.50", "-"] in lines  # no pixel is wrong
    assert not any(line[:1] == ["dog"] for line in lines)


def test_sentences(make_curves: MakeCurves) -> None:
    item = make_curves(1000, UNFITTED)
    first, second = sentences(item)
    best = item.cam.best
    assert f"Step 1000: xi 0.400 (not fitted yet) is {0.4 - best.threshold:+.3f} from" in first
    assert f"costs {100 * (best.miou - item.cam.at_threshold.miou):.2f} points" in first
    correlations = {k: rank_correlation(bins) for k, bins in item.cam.by_perplexity.items()}
    assert len(set(correlations.values())) == 3
    assert (
        f"{correlations['all']:+.2f}; pixels labelled foreground "
        f"{correlations['foreground']:+.2f}, background {correlations['background']:+.2f}."
    ) in second
    assert item.cam.correlation == correlations["all"]


# --- figures -------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are handed over instead of their pictures."""
    monkeypatch.setattr(drawing, "_png", lambda figure: figure)


def figure_of(content: Any) -> Figure:
    assert isinstance(content, Figure)
    return content


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Points of the named lines."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


@pytest.mark.usefixtures("drawn")
def test_accuracy_by_confidence_has_a_curve_a_checkpoint(curves: list[CheckpointCurves]) -> None:
    (axes,) = figure_of(drawing.draw_accuracy_by_confidence(curves)).axes
    found = lines(axes)
    assert list(found) == ["step 100", "step 500", "step 1000"]
    x, y = found["step 500"]
    assert x == pytest.approx([i / 20 + 0.025 for i in range(20)])
    assert y == pytest.approx([b.accuracy for b in curves[1].cam.by_confidence])
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert marks == [0.4, 0.4, 0.4]
    assert "confidence" in axes.get_xlabel()
    assert "accuracy" in axes.get_ylabel()
    assert axes.get_legend() is not None


@pytest.mark.usefixtures("drawn")
def test_accuracy_by_perplexity(curves: list[CheckpointCurves]) -> None:
    panels = figure_of(drawing.draw_accuracy_by_perplexity(curves)).axes
    assert len(panels) == 4
    for axes, label in zip(panels, ("all", "foreground", "background"), strict=False):
        bins = [b for b in curves[2].cam.by_perplexity[label] if b.share > 1e-4]
        x, y = lines(axes)["step 1000"]
        assert y == pytest.approx([b.accuracy for b in bins])
        assert x[0] == pytest.approx((bins[0].low + bins[0].high) / 2)
        assert max(x) < 6  # the bin without an end is drawn as wide as the others
        assert axes.lines[-1].get_xdata()[0] == 1.0  # epsilon
    stairs = panels[3].patches[2].get_data()
    assert stairs.values == pytest.approx([b.share for b in curves[2].cam.by_perplexity["all"]])
    assert np.isfinite(stairs.edges).all()


@pytest.mark.usefixtures("drawn")
def test_confidence(make_curves: MakeCurves) -> None:
    item = make_curves(500, UNFITTED)
    upper, lower = figure_of(drawing.draw_confidence(item)).axes
    bins = item.cam.histogram
    total = sum(b.background + b.foreground for b in bins)
    assert upper.patches[0].get_data().values == pytest.approx([b.background / total for b in bins])
    assert upper.patches[2].get_data().values == pytest.approx([b.foreground / total for b in bins])
    found = lines(lower)
    assert list(found)[:2] == ["$M$", "$M_{early}$"]
    for name, cam in (("$M$", item.cam), ("$M_{early}$", item.early_cam)):
        assert found[name][0] == [s.threshold for s in cam.by_threshold]
        assert found[name][1] == [s.miou for s in cam.by_threshold]
    assert f"$\\xi$ ({UNFITTED})" in found
    points = {
        (line.get_marker(), line.get_xdata()[0], line.get_ydata()[0])
        for line in lower.lines
        if len(line.get_xdata()) == 1
    }
    assert points == {
        (marker, score.threshold, score.miou)
        for cam in (item.cam, item.early_cam)
        for marker, score in (("o", cam.at_threshold), ("*", cam.best))
    }
    for axes in (upper, lower):
        marks = [
            (line.get_linestyle(), line.get_xdata()[0])
            for line in axes.lines
            if len(line.get_xdata()) == 2
        ]
        assert marks == [("-", 0.4), ("--", item.cam.best.threshold), (":", 0.45), (":", 0.5)]


@pytest.mark.usefixtures("drawn")
def test_cams_over_steps(curves: list[CheckpointCurves]) -> None:
    panels = figure_of(drawing.draw_cams(curves)).axes
    assert len(panels) == 6
    for i, axes in enumerate(panels):
        score = ("accuracy", "miou")[i % 2]
        for name, cams in (
            ("$M$", [c.cam for c in curves]),
            ("$M_{early}$", [c.early_cam for c in curves]),
        ):
            x, y = lines(axes)[name]
            assert x == [100, 500, 1000]
            assert y == [getattr(cam.regions[i // 2], score) for cam in cams]
    assert panels[0].get_legend() is not None


@pytest.mark.usefixtures("drawn")
def test_cams_of_one_checkpoint_are_bars(make_curves: MakeCurves) -> None:
    item = make_curves(500)
    panels = figure_of(drawing.draw_cams([item])).axes
    for i, axes in enumerate(panels):
        score = ("accuracy", "miou")[i % 2]
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [
            getattr(cam.regions[i // 2], score) for cam in (item.cam, item.early_cam)
        ]
        assert [t.get_text() for t in axes.texts] == [f"{100 * h:.1f}" for h in heights]


@pytest.mark.usefixtures("drawn")
def test_networks() -> None:
    rows = [NetworkScore(10, "an", 0.1, 0.2), NetworkScore(10, "on", 0.3, 0.4)]
    rows += [NetworkScore(20, "an", 0.5, 0.6), NetworkScore(20, "on", 0.7, 0.8)]
    seg, cpl = figure_of(drawing.draw_networks(rows, 0.45)).axes
    assert lines(seg) == {"AN": ([10, 20], [0.1, 0.5]), "ON": ([10, 20], [0.3, 0.7])}
    assert lines(cpl) == {"AN": ([10, 20], [0.2, 0.6]), "ON": ([10, 20], [0.4, 0.8])}
    assert "0.45" in cpl.get_title(loc="left")


@pytest.mark.usefixtures("drawn")
def test_thresholds(curves: list[CheckpointCurves]) -> None:
    rows = [ThresholdRow(5, 0.4, 0.3), ThresholdRow(15, 0.5, 0.2)]
    (axes,) = figure_of(drawing.draw_thresholds(rows, curves)).axes
    found = lines(axes)
    assert found["$\\xi$ of $M$"] == ([5, 15], [0.4, 0.5])
    assert found["$\\xi$ of $M_{early}$"] == ([5, 15], [0.3, 0.2])
    best = [c.early_cam.best.threshold for c in curves]
    assert found["best fixed for $M_{early}$"] == ([100, 500, 1000], best)


@pytest.mark.usefixtures("drawn")
def test_many_checkpoints_have_a_colour_bar(make_curves: MakeCurves) -> None:
    many = [make_curves(step) for step in range(100, 900, 100)]
    axes, bar = figure_of(drawing.draw_accuracy_by_confidence(many)).axes
    assert axes.get_legend() is None
    ticks = [t.get_text() for t in bar.get_yticklabels()]
    assert (ticks[0], ticks[-1]) == ("100", "800")
    colours = [line.get_color() for line in axes.lines if line.get_marker() == "o"]
    assert len(set(colours)) == 8
    light = [0.3 * r + 0.6 * g + 0.1 * b for r, g, b, _ in colours]
    assert light == sorted(light, reverse=True)  # later is darker, also without colour


def test_pictures(make_curves: MakeCurves) -> None:
    for content in (
        drawing.draw_confidence(make_curves(500)),
        drawing.draw_accuracy_by_perplexity([make_curves(s) for s in range(100, 900, 100)]),
    ):
        picture = Image.open(io.BytesIO(content))
        assert picture.format == "PNG"
        assert picture.width == 1024
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
