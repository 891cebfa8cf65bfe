"""The figures of the analysis, in matplotlib: small enough for a phone, plain enough for print."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from wsss.analysis.collect import NetworkScore
from wsss.analysis.curves import LABELS, AccuracyBin
from wsss.analysis.metrics_file import ThresholdRow
from wsss.analysis.summary import FIXED_THRESHOLDS, REGIONS, CamCurves, CheckpointCurves

# Okabe and Ito's colours, told apart by all kinds of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#707070"
WIDTH = 6.4  # inches; 1024 pixels
DPI = 160
#: with more checkpoints than this a colour bar takes the place of the legend
LEGEND_ENTRIES = 6
#: bins with a smaller share of the pixels are in the table but not in the curve: they are noise
LEAST_SHARE = 1e-4
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 1,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def draw_accuracy_by_confidence(curves: Sequence[CheckpointCurves]) -> bytes:
    """Fig. 3a of the paper: one curve a checkpoint, each with its threshold."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.subplots()
        for item, colour in _coloured(curves):
            x, y = _points(item.cam.by_confidence)
            axes.plot(x, y, "o-", color=colour, label=f"step {item.step}")
            axes.axvline(item.cam.threshold, color=colour, linestyle=":", linewidth=1.2)
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1.03),  # markers at 100 % stay whole
            xlabel="confidence $\\nu$ of the pixel (dotted: threshold $\\xi$)",
            ylabel="accuracy of the CPL",
        )
        _percent(axes)
        _steps_key(figure, [axes], curves)
        return _png(figure)


def draw_accuracy_by_perplexity(curves: Sequence[CheckpointCurves]) -> bytes:
    """Fig. 3c of the paper, for all pixels and for each kind of label; pixel shares below."""
    titles = {
        "all": "all pixels",
        "foreground": "labelled foreground ($\\nu \\geq \\xi$)",
        "background": "labelled background ($\\nu < \\xi$)",
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 9.2), layout="constrained")
        panels = figure.subplots(
            len(LABELS) + 1, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1, 1, 0.7]}
        )
        for item, colour in _coloured(curves):
            for axes, label in zip(panels[:-1], LABELS, strict=True):
                x, y = _points(item.cam.by_perplexity[label])
                axes.plot(x, y, "o-", color=colour, label=f"step {item.step}")
            bins = item.cam.by_perplexity["all"]
            panels[-1].stairs([b.share for b in bins], _edges(bins), color=colour, linewidth=1.8)
        for axes, label in zip(panels[:-1], LABELS, strict=True):
            axes.set(ylim=(0, 1.03), ylabel="accuracy")
            axes.set_title(titles[label], loc="left", fontsize=11)
            axes.axvline(curves[-1].max_perplexity, color=GREY, linestyle=":", linewidth=1.2)
            _percent(axes)
        panels[-1].set(
            ylabel="share",
            xlabel="perplexity of the pixel (last bin: and above)\n"
            f"dotted: $\\epsilon$ = {curves[-1].max_perplexity:g}",
        )
        panels[-1].set_title("share of the pixels", loc="left", fontsize=11)
        _percent(panels[-1])
        _steps_key(figure, list(panels), curves, panels[0])
        return _png(figure)


def draw_confidence(item: CheckpointCurves) -> bytes:
    """Fig. 3e of the paper with the truth in it, and below the CPL mIoU at every threshold."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        bins = item.cam.histogram
        total = sum(b.background + b.foreground for b in bins) or 1
        edges = [bins[0].low, *(b.high for b in bins)]
        for name, colour, pixels in (
            ("background", GREY, [b.background for b in bins]),
            ("foreground", BLUE, [b.foreground for b in bins]),
        ):
            shares = [n / total for n in pixels]
            upper.stairs(shares, edges, color=colour, linewidth=1.8, label=f"truth: {name}")
            upper.stairs(shares, edges, color=colour, alpha=0.2, fill=True)
        # The many pixels without any activation would press all others flat.
        upper.set_yscale("log")
        upper.set(ylabel=f"share of pixels per {bins[0].high - bins[0].low:g}")
        upper.set_title(f"step {item.step}", loc="left", fontsize=11)

        for cam, name, colour in (
            (item.cam, "$M$", BLUE),
            (item.early_cam, "$M_{early}$", ORANGE),
        ):
            x = [score.threshold for score in cam.by_threshold]
            lower.plot(x, [s.miou for s in cam.by_threshold], color=colour, label=name)
            for score, marker, size in ((cam.at_threshold, "o", 8), (cam.best, "*", 13)):
                lower.plot(score.threshold, score.miou, marker, color=colour, markersize=size)
        key = (("o", f"$\\xi$ ({item.thresholds.kind})", 8), ("*", "best fixed", 13))
        for marker, name, size in key:
            lower.plot([], [], marker, color="black", markersize=size, label=name)
        for axes in (upper, lower):
            axes.axvline(item.cam.threshold, color=BLUE, linewidth=1.4)
            axes.axvline(item.cam.best.threshold, color=BLUE, linestyle="--", linewidth=1.4)
            for value in FIXED_THRESHOLDS:
                axes.axvline(value, color=GREY, linestyle=":", linewidth=1.2)
            axes.set(xlim=(0, 1))
        upper.legend()
        lower.set(
            ylim=(0, None),
            ylabel="mIoU of the CPL",
            xlabel="confidence $\\nu$, threshold\nlines of $M$: full $\\xi$, dashed best fixed; "
            "dotted: 0.45 and 0.5",
        )
        lower.legend(ncols=2)
        _percent(lower)
        return _png(figure)


def draw_cams(curves: Sequence[CheckpointCurves]) -> bytes:
    """Fig. 4 of the paper: M against M_early, with and without the perplexity filter."""
    limit = f"{curves[-1].max_perplexity:g}"
    titles = [
        "all pixels",
        f"each CAM where its own perplexity $\\leq$ {limit}",
        f"both where that of $M_{{early}}$ is $\\leq$ {limit} ($\\Omega$)",
    ]
    names = (("$M$", BLUE, "o-"), ("$M_{early}$", ORANGE, "s--"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
        panels = figure.subplots(len(REGIONS), 2, sharey="col")
        for i, title in enumerate(titles):
            for j, score in enumerate(("accuracy", "miou")):
                axes: Axes = panels[i, j]
                for k, (name, colour, style) in enumerate(names):
                    cams = [(c.cam, c.early_cam)[k] for c in curves]
                    values = [getattr(cam.regions[i], score) for cam in cams]
                    if len(curves) > 1:
                        axes.plot([c.step for c in curves], values, style, color=colour, label=name)
                    else:
                        bar = axes.bar(k, values[0], width=0.6, color=colour, label=name)
                        axes.bar_label(bar, fmt=lambda v: f"{100 * v:.1f}", padding=2)
                _percent(axes)
                axes.set_ylabel({"accuracy": "accuracy", "miou": "mIoU"}[score] + " of the CPL")
                if len(curves) > 1:
                    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                else:
                    axes.set_xticks([0, 1], [name for name, _, _ in names])
                    axes.grid(visible=False, axis="x")
                    axes.margins(y=0.15)
            panels[i, 0].set_title(title, loc="left", fontsize=11)
        if len(curves) > 1:
            panels[0, 0].legend()
            for axes in panels[-1]:
                axes.set_xlabel("training step")
        else:
            panels[-1, 0].set_xlabel(f"step {curves[0].step}")
        return _png(figure)


def draw_networks(rows: Sequence[NetworkScore], cpl_threshold: float) -> bytes:
    """Assignment network against online network over steps, segmentation and CPL."""
    styles = {"an": (BLUE, "o-"), "on": (ORANGE, "s--")}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        titles = {"seg": "segmentation", "cpl": f"CPL at $\\xi$ = {cpl_threshold:g}"}
        for axes, score in zip(panels, titles, strict=True):
            for network in dict.fromkeys(row.network for row in rows):
                own = [row for row in rows if row.network == network]
                colour, style = styles.get(network, (GREEN, "^:"))
                axes.plot(
                    [row.step for row in own],
                    [getattr(row, score) for row in own],
                    style,
                    color=colour,
                    label=network.upper(),
                )
            axes.set_title(titles[score], loc="left", fontsize=11)
            axes.set_ylabel("mIoU")
            _percent(axes)
        panels[0].legend()
        panels[1].set_xlabel("training step")
        panels[1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _png(figure)


def draw_thresholds(rows: Sequence[ThresholdRow], curves: Sequence[CheckpointCurves]) -> bytes:
    """Fig. 9 (left) of the paper, with the best fixed threshold of every checkpoint."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        steps = [row.step for row in rows]
        cams: tuple[tuple[str, str, list[float], list[CamCurves]], ...] = (
            ("$M$", BLUE, [r.cam for r in rows], [c.cam for c in curves]),
            ("$M_{early}$", ORANGE, [r.early_cam for r in rows], [c.early_cam for c in curves]),
        )
        for name, colour, values, own in cams:
            axes.plot(steps, values, color=colour, label=f"$\\xi$ of {name}")
            axes.plot(
                [c.step for c in curves],
                [cam.best.threshold for cam in own],
                "*",
                color=colour,
                markersize=12,
                label=f"best fixed for {name}",
            )
        axes.set(ylim=(0, 1), xlabel="training step", ylabel="threshold $\\xi$")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(ncols=2)
        return _png(figure)


# --- helpers -------------------------------------------------------------------------------------


def _coloured(
    curves: Sequence[CheckpointCurves],
) -> Iterator[tuple[CheckpointCurves, tuple[float, float, float, float] | str]]:
    """Checkpoints from light to dark by step; the last one in the darkest colour."""
    if len(curves) == 1:
        yield curves[0], BLUE
        return
    scale = matplotlib.colormaps["viridis_r"]
    for i, item in enumerate(curves):
        yield item, scale(0.1 + 0.9 * i / (len(curves) - 1))


def _steps_key(
    figure: Figure,
    panels: list[Axes],
    curves: Sequence[CheckpointCurves],
    axes: Axes | None = None,
) -> None:
    """Which colour is which step."""
    if len(curves) <= LEGEND_ENTRIES:
        (axes or panels[0]).legend(loc="lower left", ncols=2)
        return
    order = Normalize(-0.1 / 0.9 * (len(curves) - 1), len(curves) - 1)
    bar = figure.colorbar(ScalarMappable(order, "viridis_r"), ax=panels, aspect=40)
    bar.ax.set_ylim(0, len(curves) - 1)
    shown = sorted({round(i * (len(curves) - 1) / 5) for i in range(6)})
    bar.set_ticks(shown, labels=[str(curves[i].step) for i in shown])
    bar.set_label("training step")


def _edges(bins: Sequence[AccuracyBin]) -> list[float]:
    """Edges to draw; a bin without an upper end is as wide as the one before it."""
    last = bins[-1]
    if last.high != float("inf"):
        return [*(b.low for b in bins), last.high]
    return [*(b.low for b in bins), 2 * last.low - bins[-2].low]


def _points(bins: Sequence[AccuracyBin]) -> tuple[list[float], list[float]]:
    """Middles and accuracies of the bins that hold enough pixels."""
    edges = _edges(bins)
    kept = [
        ((low + high) / 2, b.accuracy)
        for b, low, high in zip(bins, edges[:-1], edges[1:], strict=True)
        if b.share > LEAST_SHARE
    ]
    return [x for x, _ in kept], [y for _, y in kept]


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
