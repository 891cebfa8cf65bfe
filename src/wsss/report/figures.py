"""Curves and heat maps as inline SVG, drawn with matplotlib; nothing of pyplot's global state."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from wsss.report.confusion import shares
from wsss.report.records import Series

#: points of a line; a longer one is drawn through means, so that the page stays small
MOST_POINTS = 200
#: classes of a heat map, background included; more cannot be read
MOST_CLASSES = 21
#: letters of a class name in a heat map
LONGEST_NAME = 18

# Okabe and Ito's colours, which colour-blind readers tell apart, yellow left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
_STYLE = {
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "wsss",
    "text.parse_math": False,  # names may hold dollars
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Chart:
    """A picture for the page.

    Attributes:
        title: heading.
        svg: the inline picture, with its description in words.
        note: what a reader must know of it, or "".
    """

    title: str
    svg: Markup
    note: str = ""


# --- curves --------------------------------------------------------------------------------


def loss_charts(metrics: Mapping[str, Series], key: str) -> list[Chart]:
    """A chart a loss term, the total first, then the learning rate.

    A term of the early block (``c2s_early``) is drawn with the same one of the last (``c2s``).

    Args:
        metrics: see :func:`wsss.report.records.read_metrics`.
        key: unique in the page; part of the ids inside.
    """
    terms = [name for name in metrics if name.startswith("loss/")]
    terms.sort(key=lambda name: (name != "loss/total", name))
    groups: dict[str, dict[str, Series]] = {}
    for name in terms:
        groups.setdefault(name.removesuffix("_early"), {})[name] = metrics[name]
    if "lr" in metrics:
        groups["learning rate"] = {"learning rate": metrics["lr"]}
    return [
        line_chart(title, lines, f"{key}-loss{i}")
        for i, (title, lines) in enumerate(groups.items())
    ]


def threshold_chart(metrics: Mapping[str, Series], key: str) -> Chart | None:
    """The background thresholds of the CAMs, on the scale of the CAMs; None where none is kept."""
    lines = {name: values for name, values in metrics.items() if name.startswith("threshold/")}
    if not lines:
        return None
    return line_chart("background threshold", lines, f"{key}-threshold", limits=(0, 1))


def validation_charts(metrics: Mapping[str, Series], key: str) -> list[Chart]:
    """A chart for each network and kind of score, in percent, of what was validated repeatedly."""
    groups: dict[str, dict[str, Series]] = {}
    for name, values in metrics.items():
        if name.count("/") == 2 and len(values) > 1:
            network, prefix, score = name.split("/")
            kind = re.sub(r"(_ss|_ms_flip)?(_crf)?$", "", score)
            kind = "image labels" if prefix == "cls" else kind
            lines = groups.setdefault(f"{network}: {kind} (%)", {})
            lines[f"{prefix}/{score}"] = [(step, 100 * value) for step, value in values]
    order = sorted(groups, key=lambda title: (": miou " not in title, title))
    return [
        line_chart(title, groups[title], f"{key}-val{i}", markers=True)
        for i, title in enumerate(order)
    ]


def line_chart(
    title: str,
    lines: Mapping[str, Series],
    key: str,
    limits: tuple[float, float] | None = None,
    markers: bool = False,
) -> Chart:
    """Lines over steps.

    Args:
        title: of the chart.
        lines: name to (step, value) pairs; several have a legend.
        key: unique in the page; part of the ids inside.
        limits: of the vertical axis; None fits it to the values.
        markers: mark the points; they are few.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, (name, values) in enumerate(lines.items()):
            steps, heights = zip(*thin(values), strict=True)
            style = "--" if name.endswith(("_early", "_ss")) else "-"
            colour = _COLOURS[i % len(_COLOURS)]
            marker = "o" if markers or len(values) == 1 else None
            axes.plot(steps, heights, style, color=colour, marker=marker, markersize=3, label=name)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if limits is not None:
            axes.set_ylim(*limits)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=2)

    height = 2.4 + 0.17 * (len(lines) // 2)
    words = "; ".join(
        f"{name} goes from {values[0][1]:.4g} at step {values[0][0]} to {values[-1][1]:.4g} at "
        f"step {values[-1][0]}"
        for name, values in lines.items()
    )
    longest = max(len(values) for values in lines.values())
    every = -(-longest // MOST_POINTS)
    note = f"Each point is the mean of {every} logged values." if every > 1 else ""
    return Chart(title, _svg(draw, (4.2, height), key, f"{title}: {words}."), note)


def thin(values: Series, most: int = MOST_POINTS) -> Series:
    """At most ``most`` points: means of as many neighbours as it takes, at their mean step."""
    every = -(-len(values) // most)
    if every <= 1:
        return list(values)
    chunks = [values[i : i + every] for i in range(0, len(values), every)]
    return [
        (round(statistics.fmean(s for s, _ in chunk)), statistics.fmean(v for _, v in chunk))
        for chunk in chunks
    ]


# --- heat map ------------------------------------------------------------------------------


def confusion_chart(matrix: ArrayLike, classes: Sequence[str], key: str, title: str) -> Chart:
    """A confusion matrix as a heat map: truth in rows, shares of the truth's pixels as colours.

    Args:
        matrix: (K, K) pixel counts.
        classes: K names, background first.
        key: unique in the page; part of the ids inside.
        title: of the chart.
    """
    share = shares(matrix)
    size = len(classes)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(False)
        # Small shares are what one looks for: the colours spread them.
        norm = PowerNorm(0.5, 0, 100)
        image = axes.imshow(share, cmap="Blues", norm=norm, interpolation="none")
        # The picture keeps its room for the colours, whatever the names.
        names = [c if len(c) <= LONGEST_NAME else f"{c[: LONGEST_NAME - 1]}…" for c in classes]
        axes.set_xticks(range(size), names, rotation=90, fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
        axes.set_xlabel("predicted")
        axes.set_ylabel("truth")
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.5:
                colour = "white" if value > 40 else "black"
                text = f"{value:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
        bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=[0, 1, 5, 10, 25, 50, 100])
        bar.set_label("% of the truth's pixels")

    inches = max(3.4, 1.7 + 0.24 * size)
    words = f"{title}: heat map of {size} by {size} classes; the table lists the largest entries."
    # Narrow pages scroll it rather than shrink its letters away.
    return Chart(title, _svg(draw, (inches + 0.6, inches), key, words, least=0.8))


# --- SVG -----------------------------------------------------------------------------------


def _svg(
    draw: Callable[[Figure], None],
    inches: tuple[float, float],
    key: str,
    description: str,
    least: float = 0.0,
) -> Markup:
    """Draw on a figure of its own, and prepare the SVG for a page that holds several.

    The picture takes the width that the page gives it, between ``least`` times its own and a
    quarter more.
    """
    buffer = io.StringIO()
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=False)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would hold for the page
    # matplotlib numbers its elements anew in every figure.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", text)
    # The width comes from the page, the height from the viewBox.
    style = f"min-width:{least * inches[0]:.2f}in;max-width:{1.25 * inches[0]:.2f}in"
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', rf'\1 style="{style}"', text, count=1
    )
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
    return Markup(text)  # names in it went through matplotlib's own escaping
