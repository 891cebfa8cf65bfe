"""Scores of one run: as a file that other commands read, and as tables for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from wsss.files import write_atomically
from wsss.methods.base import RATIO, Method

#: protocols from the headline down; of a network's scores the first that exists is shown per class
PROTOCOL_ORDER = (
    "seg/miou_ms_flip",
    "seg/precision_ms_flip",
    "seg/recall_ms_flip",
    "seg/confusion_ratio_ms_flip",
    "seg/miou_ss",
    "seg_given_tags/miou_ms_flip",
    "seg_given_tags/miou_ss",
    "cpl/miou_ms_flip",
    "cpl/precision_ms_flip",
    "cpl/recall_ms_flip",
    "cpl/confusion_ratio_ms_flip",
    "cpl_early/miou_ms_flip",
    "cpl_ensemble/miou_ms_flip",
)


def collect(method: Method, step: int | None = None) -> dict[str, Any]:
    """All scores of a validated method, as plain containers.

    The metrics keep what they computed at the end of validation, so this costs nothing, warns of
    nothing twice, and may be called on one rank alone.

    Args:
        method: just validated.
        step: optimizer steps of the weights; None takes the trainer's.

    Returns:
        ``name``, ``method``, ``seed`` and ``step`` of the run; ``settings``, what decides scores
        besides their names; ``classes``, background first; ``scores`` in percent by full name;
        ``per_class``, IoU in percent by full name and class; ``details``, the same of precision,
        recall and ``confusion_ratio`` FP / TP, here as it is; ``means`` of these over classes;
        ``confusion``, pixels of the
        headline protocol of each network, truth in rows; ``average_precision`` of the image labels,
        in percent by network and class; where it was taken, ``boundary_f`` in percent by full name
        and class. Data with groups (patients) also has ``dice``, in percent by full name, group
        ("all images" first) and foreground class, and its mean over groups and classes in
        ``means``. A value that does not exist (class without a pixel) is None.
    """
    classes = ["background", *method.classes]
    scores: dict[str, float | None] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    details: dict[str, dict[str, dict[str, float | None]]] = {}
    means: dict[str, dict[str, float | None]] = {}
    dice: dict[str, dict[str, dict[str, float | None]]] = {}
    confusion: dict[str, list[list[int]]] = {}
    boundary: dict[str, dict[str, float | None]] = {}
    precision: dict[str, dict[str, float | None]] = {}

    def by_class(values: Tensor) -> dict[str, float | None]:
        return {c: _percent(v) for c, v in zip(method.classes, values.reshape(-1), strict=True)}

    data = method.run_config.get("data", {})
    settings = {
        "split": data.get("val_split"),
        "images": max(map(len, method.image_scores.values()), default=0),
        "image_size": data.get("eval_size"),
    }
    for protocol_scores in method.scores.values():  # the same of every network
        for name in ("scales", "cam_scales", "cpl_threshold", "crf"):
            settings[name] = getattr(protocol_scores, name)
    scores |= {name: _percent(value) for name, value in method.compute_scores().items()}
    for network, by_protocol in method.compute_tables().items():
        headline = next(name for name in (*PROTOCOL_ORDER, *by_protocol) if name in by_protocol)
        confusion[f"{network}/{headline}"] = by_protocol[headline]["confusion"].tolist()
        found = method.scores[network].compute_classification()  # type: ignore[operator]
        if found:
            precision[network] = by_class(found["ap"])
        for protocol, value in by_protocol.items():
            full = f"{network}/{protocol}"
            if "boundary_f" in value:
                boundary[full] = by_class(value["boundary_f"])
            per_class[full] = {
                name: _percent(iou) for name, iou in zip(classes, value["iou"], strict=True)
            }
            details[full] = {
                name: {"precision": _percent(p), "recall": _percent(r), RATIO: _rounded(c, 4)}
                for name, p, r, c in zip(
                    classes, value["precision"], value["recall"], value[RATIO], strict=True
                )
            }
            means[full] = {
                "precision": _percent(value["mean_precision"]),
                "recall": _percent(value["mean_recall"]),
                RATIO: _rounded(value["mean_confusion_ratio"], 4),
            }
            if "group_dice" in value:
                means[full]["group_dice"] = _percent(value["mean_group_dice"])
                rows = zip(
                    ["all images", *method.groups],
                    [value["dice"], *value["group_dice"]],
                    strict=True,
                )
                dice[full] = {
                    group: {c: _percent(v) for c, v in zip(classes[1:], row[1:], strict=True)}
                    for group, row in rows
                }
    return {
        "name": method.run_config.get("name"),
        "method": method.short_name(),
        "seed": method.run_config.get("seed"),
        "step": method.global_step if step is None else step,
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
        "classes": classes,
        "scores": scores,
        "means": means,
        "per_class": per_class,
        "details": details,
        "confusion": confusion,
        **({"average_precision": precision} if precision else {}),
        **({"boundary_f": boundary} if boundary else {}),
        **({"dice": dice} if dice else {}),
    }


def write_scores(path: Path, method: Method, step: int | None = None) -> None:
    """Write :func:`collect` as JSON; the file is always whole, old or new."""
    text = json.dumps(collect(method, step), indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def write_image_scores(path: Path, method: Method) -> None:
    """Write the mIoU of every validated image in percent, a row an image, as CSV.

    The first column is the image's name, the others are protocols by full name; a cell is empty
    where an image has no pixel to score.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    tables = list(method.image_scores.values())
    columns = [
        f"{network}/{protocol}"
        for network in method.image_scores
        for protocol in method.scores[network].protocols  # type: ignore[union-attr]
    ]
    writer.writerow(["name", *columns])
    for name in sorted(tables[0]) if tables else []:
        values = [value for table in tables for value in table[name]]
        writer.writerow([name, *("" if math.isnan(v) else f"{v * 100:.2f}" for v in values)])
    write_atomically(path, buffer.getvalue().encode())


def class_rows(content: Mapping[str, Any]) -> list[list[Any]]:
    """Every score of :func:`collect` in percent as a table: heading, a row a class, their mean.

    A column a score, by full name; None where a score has no value for a class.
    """
    columns: dict[str, Mapping[str, float | None]] = {name: {} for name in content["scores"]}
    columns |= content["per_class"]
    for full, by_class in content.get("details", {}).items():
        for name, factor in (("precision", 1), ("recall", 1), (RATIO, 100)):
            column = full.replace("miou", name)
            if column in columns:
                columns[column] = {
                    c: None if v[name] is None else factor * v[name] for c, v in by_class.items()
                }
    for name, by_class in content.get("boundary_f", {}).items():
        columns[name.replace("miou", "boundary_f")] = by_class
    for network, by_class in content.get("average_precision", {}).items():
        columns[f"{network}/cls/map"] = by_class
    return [
        ["class", *columns],
        *([c, *(by_class.get(c) for by_class in columns.values())] for c in content["classes"]),
        ["mean", *(content["scores"][name] for name in columns)],
    ]


def write_class_tables(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``scores.csv``, see :func:`class_rows`, and ``scores.md``: all scores, IoU by class.

    Args:
        folder: where they go.
        content: see :func:`collect`.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [["" if cell is None else cell for cell in row] for row in class_rows(content)]
    )
    write_atomically(folder / "scores.csv", buffer.getvalue().encode())

    per_class = content["per_class"]
    scores = [["score", "%"], *([k, number(v)] for k, v in content["scores"].items())]
    classes = [
        ["IoU (%)", *per_class],
        *([c, *(number(iou[c]) for iou in per_class.values())] for c in content["classes"]),
        ["mean", *(number(content["scores"][name]) for name in per_class)],
    ]
    about = {key: content[key] for key in ("name", "method", "seed", "step")} | content["settings"]
    text = "# Scores\n\n" + "".join(
        f"- {k.replace('_', ' ')}: {'none' if v is None else v}\n" for k, v in about.items()
    )
    for table in (scores, classes):
        rule = ["---", *["---:"] * (len(table[0]) - 1)]
        lines = [[cell.replace("|", "\\|") for cell in row] for row in table]
        lines.insert(1, rule)
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(folder / "scores.md", text.encode())


def print_scores(method: Method, console: Console | None = None) -> None:
    """Print networks by protocols, and the headline protocol by class."""
    console = console or Console()
    content = collect(method)
    console.print(scores_table(content["scores"]))
    console.print(class_table(content["per_class"], content["details"]))
    if "dice" in content:
        console.print(dice_table(content["dice"], content["means"]))


def scores_table(scores: Mapping[str, float | None]) -> Table:
    """Table with a row per score and a column per network, in percent."""
    networks, protocols = _split_names(scores)
    table = Table(title="Scores (%)", title_justify="left")
    table.add_column("protocol", no_wrap=True)
    for network in networks:
        table.add_column(network.upper(), justify="right")
    for protocol in protocols:
        table.add_row(protocol, *(number(scores.get(f"{n}/{protocol}")) for n in networks))
    return table


def class_table(
    per_class: Mapping[str, Mapping[str, float | None]],
    details: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None,
) -> Table:
    """Table with a row per class: IoU in percent of every network, headline protocol.

    With ``details`` (see :func:`collect`) also precision and recall in percent and the confusion
    ratio FP / TP of the first network.
    """
    networks, protocols = _split_names(per_class)
    table = Table(title_justify="left")
    if not protocols:
        return table
    headline = protocols[0]
    table.title = f"IoU (%), {headline}"
    table.min_width = len(table.title) + 2  # rich would break the title
    table.add_column("class", no_wrap=True)
    columns = [n for n in networks if f"{n}/{headline}" in per_class]
    for network in columns:
        table.add_column(network.upper(), justify="right")
    more = (details or {}).get(f"{columns[0]}/{headline}", {})
    for heading in ("precision", "recall", "FP/TP") if more else ():
        table.add_column(heading, justify="right")
    for name in per_class[f"{columns[0]}/{headline}"]:
        ious = (number(per_class[f"{n}/{headline}"][name]) for n in columns)
        table.add_row(
            escape(name), *ious, *(number(value) for value in more.get(name, {}).values())
        )
    if more and len(columns) > 1:
        table.caption = f"precision, recall, FP/TP: {columns[0].upper()}"
        table.caption_justify = "left"
    return table


def dice_table(
    dice: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    means: Mapping[str, Mapping[str, float | None]],
) -> Table:
    """Table with a row per group (patient): Dice in percent, first network, headline protocol."""
    networks, protocols = _split_names(dice)
    full = f"{networks[0]}/{protocols[0]}"
    table = Table(title=f"Dice (%), {full.replace('miou', 'group_dice')}", title_justify="left")
    classes = list(next(iter(dice[full].values())))
    for heading in ("", *classes):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for group, values in dice[full].items():
        table.add_row(
            group, *(number(values[c]) for c in classes), end_section=group == "all images"
        )
    table.caption = f"mean over patients and classes: {number(means[full]['group_dice'])}"
    table.caption_justify = "left"
    return table


def number(value: float | None) -> str:
    """Two decimals; a dash where there is no value."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _split_names(names: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Networks and protocols of full names, protocols from the headline down."""
    networks = list(dict.fromkeys(name.split("/", 1)[0] for name in names))
    protocols = list(dict.fromkeys(name.split("/", 1)[1] for name in names))
    known = [p for p in PROTOCOL_ORDER if p in protocols]
    return networks, known + [p for p in protocols if p not in PROTOCOL_ORDER]


def _percent(value: Tensor) -> float | None:
    return _rounded(value * 100, 2)


def _rounded(value: Tensor, digits: int) -> float | None:
    plain = float(value)
    return round(plain, digits) if math.isfinite(plain) else None
