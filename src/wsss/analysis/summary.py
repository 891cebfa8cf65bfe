"""The curves of one checkpoint, the tables that are written, and the one that is printed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAVY
from rich.markup import escape
from rich.table import Table

from wsss.analysis.collect import CheckpointAnalysis, NetworkScore, Thresholds
from wsss.analysis.counts import ConfidenceCounts
from wsss.analysis.curves import (
    LABELS,
    AccuracyBin,
    HistogramBin,
    LabelReliability,
    RegionScore,
    ThresholdScore,
    accuracy_by_confidence,
    accuracy_by_perplexity,
    accuracy_of_share,
    best_threshold,
    confidence_histogram,
    rank_correlation,
    region_score,
    reliability_by_label,
    scores_by_threshold,
    separation,
    threshold_score,
)
from wsss.analysis.metrics_file import ThresholdRow

#: fixed thresholds that are always looked at: the paper's best one, and that of its Table 1
FIXED_THRESHOLDS = (0.45, 0.5)
#: parts of the pixels on which M and M_early are compared
REGIONS = ("all pixels", "own low perplexity", "Omega")


@dataclass
class CamCurves:
    """Everything about one of the two CAMs of a checkpoint.

    Attributes:
        threshold: xi of the checkpoint.
        by_confidence: accuracy at xi in bins of confidence.
        by_perplexity: the same in bins of perplexity, by kind of pseudo-label.
        histogram: true background and foreground by confidence.
        by_threshold: scores at fixed thresholds.
        at_threshold: score at xi.
        fixed: scores at ``FIXED_THRESHOLDS``.
        best: best of ``by_threshold``.
        low, high: accuracy of the fifth of the pixels with the lowest and highest perplexity.
        separation: how often a right pixel has a lower perplexity than a wrong one.
        correlation: Spearman's, of perplexity and accuracy over the bins.
        regions: scores on ``REGIONS``.
        reliability: what RAW makes of the pixels of each label.
    """

    threshold: float
    by_confidence: list[AccuracyBin]
    by_perplexity: dict[str, list[AccuracyBin]]
    histogram: list[HistogramBin]
    by_threshold: list[ThresholdScore]
    at_threshold: ThresholdScore
    fixed: list[ThresholdScore]
    best: ThresholdScore
    low: float
    high: float
    separation: float
    correlation: float
    regions: list[RegionScore]
    reliability: list[LabelReliability]

    @classmethod
    def of(cls, counts: ConfidenceCounts, omega: ConfidenceCounts | None = None) -> CamCurves:
        """From counts; ``omega`` holds those in Omega, None where the CAM's own region is it."""
        by_threshold = scores_by_threshold(counts)
        by_perplexity = {label: accuracy_by_perplexity(counts, label) for label in LABELS}
        total = int(counts.counts.sum())
        own = region_score(counts, REGIONS[1], total, counts.low_perplexity)
        return cls(
            counts.threshold,
            accuracy_by_confidence(counts),
            by_perplexity,
            confidence_histogram(counts),
            by_threshold,
            threshold_score(counts, counts.threshold),
            [threshold_score(counts, value) for value in FIXED_THRESHOLDS],
            best_threshold(by_threshold),
            accuracy_of_share(counts, 0.2),
            accuracy_of_share(counts, -0.2),
            separation(counts),
            rank_correlation(by_perplexity["all"]),
            [
                region_score(counts, REGIONS[0], total),
                own,
                own._replace(region=REGIONS[2])
                if omega is None
                else region_score(omega, REGIONS[2], total),
            ],
            reliability_by_label(counts),
        )


@dataclass
class CheckpointCurves:
    """Everything about one checkpoint."""

    step: int
    thresholds: Thresholds
    max_perplexity: float
    cam: CamCurves
    early_cam: CamCurves
    networks: list[NetworkScore]

    @classmethod
    def of(cls, analysis: CheckpointAnalysis) -> CheckpointCurves:
        """From what was counted."""
        return cls(
            analysis.step,
            analysis.thresholds,
            analysis.cam.max_perplexity,
            CamCurves.of(analysis.cam, analysis.cam_in_omega),
            CamCurves.of(analysis.early_cam),
            analysis.networks,
        )

    def cams(self) -> dict[str, CamCurves]:
        """Both, by name."""
        return {"cam": self.cam, "early_cam": self.early_cam}


# --- files ---------------------------------------------------------------------------------------


def csv_tables(
    curves: Sequence[CheckpointCurves],
    networks: Sequence[NetworkScore],
    thresholds: Sequence[ThresholdRow],
    classes: Sequence[str],
) -> dict[str, str]:
    """CSV text by file name, of every figure and of the summary; shares and scores in [0, 1]."""
    names = ["background", *classes]
    tables = {
        "summary.csv": _csv(summary_rows(curves)),
        "accuracy_by_confidence.csv": _csv(
            _rows(curves, lambda c: ({}, c.by_confidence)),
        ),
        "accuracy_by_perplexity.csv": _csv(
            _rows(curves, *(_perplexity_rows(label) for label in LABELS))
        ),
        "confidence.csv": _csv(_rows(curves, lambda c: ({}, c.histogram))),
        "miou_by_threshold.csv": _csv(
            _rows(
                curves,
                lambda c: ({"which": "fixed"}, c.by_threshold),
                lambda c: ({"which": "of the checkpoint"}, [c.at_threshold]),
                lambda c: ({"which": "best fixed"}, [c.best]),
            )
        ),
        "cam_against_early_cam.csv": _csv(_rows(curves, lambda c: ({}, c.regions))),
        "reliability_by_class.csv": _csv(
            {"step": row["step"], "cam": row["cam"], "class": names[row["label"]], **row}
            for row in _rows(curves, lambda c: ({}, c.reliability))
        ),
    }
    if networks:
        tables["networks.csv"] = _csv(row._asdict() for row in networks)
    if thresholds:
        tables["threshold_over_steps.csv"] = _csv(row._asdict() for row in thresholds)
    return tables


def summary_rows(curves: Sequence[CheckpointCurves]) -> list[dict[str, Any]]:
    """The main numbers, a row for each checkpoint and CAM."""
    return [
        {
            "step": item.step,
            "cam": name,
            "threshold": cam.threshold,
            "threshold_kind": item.thresholds.kind,
            "best_threshold": cam.best.threshold,
            "miou_at_threshold": cam.at_threshold.miou,
            "miou_at_best": cam.best.miou,
            **{f"miou_at_{score.threshold:.2f}": score.miou for score in cam.fixed},
            "accuracy": cam.at_threshold.accuracy,
            "accuracy_lowest_perplexity_fifth": cam.low,
            "accuracy_highest_perplexity_fifth": cam.high,
            "perplexity_auroc": cam.separation,
            "perplexity_spearman": cam.correlation,
        }
        for item in curves
        for name, cam in item.cams().items()
    ]


Part = Callable[[CamCurves], tuple[dict[str, str], Sequence[Any]]]


def _perplexity_rows(label: str) -> Part:
    return lambda cam: ({"label": label}, cam.by_perplexity[label])


def _rows(curves: Sequence[CheckpointCurves], *parts: Part) -> Iterator[dict[str, Any]]:
    for item in curves:
        for name, cam in item.cams().items():
            for part in parts:
                columns, rows = part(cam)
                for row in rows:
                    yield {"step": item.step, "cam": name, **columns, **row._asdict()}


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Six digits; empty where there is no value."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


# --- terminal ------------------------------------------------------------------------------------


def printed_table(curves: Sequence[CheckpointCurves]) -> Table:
    """The main numbers, a row a checkpoint: M first, then M against M_early."""
    table = Table(
        title="CAM pseudo-labels (CPL), in %",
        title_justify="left",
        box=SIMPLE_HEAVY,
        collapse_padding=True,
        pad_edge=False,
        caption="fifths: of the pixels, by perplexity. AUC: how often a right pixel has a lower "
        "perplexity than a wrong one",
        caption_justify="left",
    )
    limit = f"P<={curves[0].max_perplexity:g}"
    for heading in (
        "step",
        "xi",
        "best\nxi",
        "mIoU\nat xi",
        "mIoU\nbest",
        "acc.\nlow\nfifth",
        "acc.\nhigh\nfifth",
        "AUC",
        "acc.\nM",
        "acc.\nM\nearly",
        f"acc.\nM\n{limit}",
        f"acc.\nearly\n{limit}",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in curves:
        cam, early = item.cam, item.early_cam
        table.add_row(
            str(item.step),
            f"{cam.threshold:.3f}",
            f"{cam.best.threshold:.2f}",
            percent(cam.at_threshold.miou),
            percent(cam.best.miou),
            percent(cam.low),
            percent(cam.high),
            percent(cam.separation),
            percent(cam.regions[0].accuracy),
            percent(early.regions[0].accuracy),
            percent(cam.regions[1].accuracy),
            percent(early.regions[1].accuracy),
        )
    return table


def class_table(item: CheckpointCurves, classes: Sequence[str]) -> Table:
    """What RAW makes of the pixels of each class, M's pseudo-labels of one checkpoint."""
    table = Table(
        title=f"Step {item.step}: reliability weighting by true class",
        title_justify="left",
        box=SIMPLE_HEAVY,
        collapse_padding=True,
        pad_edge=False,
        caption="weight: of the pixels whose pseudo-label is right or wrong, 1 is the mean of all",
        caption_justify="left",
    )
    table.add_column("class", overflow="fold")
    for heading in ("right\n%", "by\nweight", "weight\nright", "weight\nwrong"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in zip(["background", *classes], item.cam.reliability, strict=True):
        if row.pixels:
            weights = (row.weight_right, row.weight_wrong)
            table.add_row(
                escape(name),
                percent(row.right),
                percent(row.right_by_weight),
                *(f"{w:.2f}" if math.isfinite(w) else "-" for w in weights),
            )
    return table


def sentences(item: CheckpointCurves) -> list[str]:
    """What the figures say of one checkpoint."""
    cam = item.cam
    foreground, background = (
        rank_correlation(cam.by_perplexity[label]) for label in ("foreground", "background")
    )
    loss = 100 * (cam.best.miou - cam.at_threshold.miou)
    return [
        f"Step {item.step}: xi {cam.threshold:.3f} ({item.thresholds.kind}) is "
        f"{cam.threshold - cam.best.threshold:+.3f} from the best fixed threshold "
        f"{cam.best.threshold:.2f} and costs {loss:.2f} points of CPL mIoU.",
        f"Spearman of perplexity and accuracy over bins: {_signed(cam.correlation)}; pixels "
        f"labelled foreground {_signed(foreground)}, background {_signed(background)}.",
    ]


def percent(value: float) -> str:
    """One decimal; a dash where there is no value."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def _signed(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else "-"
