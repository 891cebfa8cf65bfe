"""The page of a report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss import __version__
from wsss.data.images import voc_palette
from wsss.report.comparison import (
    comparisons,
    group_rows,
    in_order,
    main_scores,
    score_names,
    table_rows,
)
from wsss.report.confusion import Confusion, top_confusions
from wsss.report.drawing import Drawing, Picture
from wsss.report.figures import (
    MOST_CLASSES,
    Chart,
    confusion_chart,
    loss_charts,
    threshold_chart,
    validation_charts,
)
from wsss.report.records import metrics_files, read_environment, read_metrics
from wsss.report.runs import Run, seed_groups
from wsss.report.tables import number

#: width of a panel in pixels; the page may show it smaller
CELL = 240
NOT_RECORDED = "not recorded"

_PAIR = "{key} {value}"
_NETWORKS = {"an": "assignment network (moving average)", "on": "online network"}
_PREFIXES = {
    "seg": "segmentation, nothing known of the image",
    "seg_given_tags": "segmentation among the classes that the image is known to hold",
    "cpl": "pseudo-label of the CAM, image labels known",
    "cpl_early": "pseudo-label of the early block's CAM, image labels known",
    "cpl_ensemble": "pseudo-label of the mean of both CAMs, image labels known",
    "cls": "image labels",
}
_KINDS = {
    "cmiou": "mean IoU over classes seen with their surroundings",
    "group_dice": "mean Dice over patients and classes",
    "boundary_f": "F of the boundaries",
    "jf": "mean of mIoU and boundary F",
    "map": "mean average precision over classes",
    "image_ap": "mean average precision over images",
}
_SCALES = {"_ss": "one scale", "_ms_flip": "several scales and flips"}


@dataclass(frozen=True)
class ImageCell:
    """One panel of the page.

    Attributes:
        title: of the panel.
        uri: the picture itself, ``data:image/...``.
        width, height: to show it at, in the image's own proportions.
        alt: the picture in words.
    """

    title: str
    uri: str
    width: int
    height: int
    alt: str


def render(
    runs: Sequence[Run],
    titles: Sequence[str],
    unfinished: Sequence[Path] = (),
    drawing: Drawing | None = None,
) -> str:
    """The page: for several runs their comparison first, then every run by itself.

    Args:
        runs: finished runs.
        titles: their names, all different.
        unfinished: folders of runs that are not finished.
        drawing: pictures of the runs; None for a page without.

    Raises:
        UserError: a file of a run folder that cannot be read.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures: list[list[Picture] | None] = [None] * len(runs)
    protocols: list[str | None] = [None] * len(runs)
    if drawing is not None:
        pictures, protocols = [*drawing.own], drawing.protocols
    sections = [
        _run_section(f"r{i}", run, title, own, protocol)
        for i, (run, title, own, protocol) in enumerate(
            zip(runs, titles, pictures, protocols, strict=True), start=1
        )
    ]
    compared = None
    if len(runs) > 1 or unfinished:
        shared = drawing.shared if drawing is not None and len(runs) > 1 else []
        compared = _comparison(runs, titles, shared)
    return environment.get_template("report.html").render(
        runs=sections,
        compared=compared,
        unfinished=[str(folder) for folder in unfinished],
        legend=legend(runs[0].content["classes"]),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        not_recorded=NOT_RECORDED,
        most_classes=MOST_CLASSES,
    )


def _comparison(
    runs: Sequence[Run], titles: Sequence[str], shared: Sequence[Picture]
) -> dict[str, Any]:
    names = main_scores(score_names(runs))
    several = len(seed_groups(runs)) < len(runs)
    header, rows = table_rows(runs, names)
    return {
        "titles": titles,
        "header": header,
        "rows": rows[: len(runs)],
        "text_columns": header.index("seed"),
        "groups": group_rows(runs, names) if several else None,
        "lines": comparisons(runs),
        "pictures": [figure_of(picture) for picture in shared],
    }


def _run_section(
    key: str,
    run: Run,
    title: str,
    pictures: Sequence[Picture] | None,
    protocol: str | None,
) -> dict[str, Any]:
    """What the template says of one run."""
    metrics = read_metrics(run.folder)
    content = run.content
    return {
        "key": key,
        "title": title,
        "facts": facts(run, read_environment(run.folder)),
        "config": (run.folder / "config.yaml").read_text(encoding="utf-8"),
        **_scores(content),
        "parts": len(metrics_files(run.folder)),
        "losses": loss_charts(metrics, key),
        "threshold": threshold_chart(metrics, key),
        "validation": validation_charts(metrics, key),
        **_classes(content),
        "dice": _dice(content),
        "confusion": _confusion(content, key),
        "pictures": None if pictures is None else [figure_of(p) for p in pictures],
        "protocol": protocol,
        "legend": legend(content["classes"]),
    }


# --- facts ---------------------------------------------------------------------------------


def facts(run: Run, environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what was run, on what, and for how long.

    Args:
        run: the run.
        environment: see :func:`wsss.report.records.read_environment`.
    """
    data = run.config.get("data", {})
    rows = [
        ("run", run.name),
        ("folder", str(run.folder)),
        ("method", run.method),
        ("optimizer steps", run.steps),
        ("seed", f"{run.seed} (data {data.get('seed', '-')})"),
        ("data", f"{data.get('root', '-')}, scored on {data.get('val_split', '-')}"),
    ]
    if not environment:
        return [*rows, ("command, versions, hardware, time", NOT_RECORDED)]

    def named(keys: Iterable[str], form: str) -> str:
        found = [(key, environment[key]) for key in keys if environment.get(key) is not None]
        return ", ".join(form.format(key=key, value=value) for key, value in found)

    command = [str(part) for part in environment.get("command") or [""]]
    seconds = environment.get("seconds")
    resumed = environment.get("resumed_from_step")
    since = f" from step {resumed} on" if resumed else ""
    hardware = [*(environment.get("devices") or []), named(["cpu"], "{value}")]
    rows += [
        # The first part is the program, perhaps of two words.
        ("command", f"{command[0]} {shlex.join(command[1:])}".strip()),
        ("versions", named(("wsss", "python", "torch", "lightning", "timm", "numpy"), _PAIR)),
        ("platform", named(["platform"], "{value}")),
        ("hardware", ", ".join(filter(None, map(str, hardware)))),
        ("run with", named(("cores", "threads", "world_size", "precision"), _PAIR)),
        ("started", named(["started"], "{value}")),
        ("finished", named(["finished"], "{value}")),
        ("duration", "" if seconds is None else duration(float(seconds)) + since),
    ]
    return [(name, value or NOT_RECORDED) for name, value in rows]


def duration(seconds: float) -> str:
    """``1 h 02 min 03 s``, from the largest unit that is not 0."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min {rest:02d} s"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def meaning(protocol: str) -> str:
    """One line on what a score is, from the parts of its name (``seg/miou_ms_flip``)."""
    prefix, _, score = protocol.partition("/")
    found = re.fullmatch(r"(.*?)(_ss|_ms_flip)?(_crf)?", score)
    assert found is not None
    kind, scales, crf = found.groups()
    parts = [
        _KINDS.get(kind),
        _PREFIXES.get(prefix),
        _SCALES.get(scales),
        "refined by a dense CRF" if crf else None,
    ]
    return "; ".join(filter(None, parts)) or "-"


# --- tables --------------------------------------------------------------------------------


def _scores(content: Mapping[str, Any]) -> dict[str, Any]:
    """Protocols in rows, networks in columns; means of the headline's other scores."""
    names = in_order(content["scores"])
    networks = list(dict.fromkeys(name.split("/", 1)[0] for name in names))
    rows = []
    for protocol in dict.fromkeys(name.split("/", 1)[1] for name in names):
        cells = [number(content["scores"].get(f"{network}/{protocol}")) for network in networks]
        rows.append((protocol, cells, meaning(protocol)))
    return {
        "networks": [(network, _NETWORKS.get(network, "")) for network in networks],
        "scores": rows,
        "scored": any(value is not None for value in content["scores"].values()),
    }


def _classes(content: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of percentages by class, and the classes in two orders."""
    per_class = content.get("per_class", {})
    chosen = in_order(main_scores(per_class)) or in_order(per_class)[:1]
    columns = {f"{name.replace('/miou', '/iou')}": per_class[name] for name in chosen}
    for network, values in content.get("average_precision", {}).items():
        columns[f"{network}/cls/ap"] = values
    boundary = content.get("boundary_f", {})
    for name in in_order(main_scores(boundary)):
        columns[name.replace("/miou", "/boundary_f")] = boundary[name]
    rows = [(c, [values.get(c) for values in columns.values()]) for c in content["classes"]]

    def badness(row: tuple[str, list[float | None]]) -> tuple[bool, float]:
        value = row[1][0] if row[1] else None
        return value is None, value or 0.0

    return {"class_columns": list(columns), "classes": rows, "worst": sorted(rows, key=badness)}


def _dice(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Dice by patient of the first protocol, where the data has patients."""
    dice = content.get("dice")
    if not dice:
        return None
    name = in_order(dice)[0]
    groups = dice[name]
    header = list(next(iter(groups.values())))
    rows = [[group, *(number(values[c]) for c in header)] for group, values in groups.items()]
    mean = number(content["means"][name].get("group_dice"))
    return {"protocol": name, "header": header, "rows": rows, "mean": mean}


def _confusion(content: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """The largest confusions of the first protocol; None where no matrix was kept."""
    matrices = content.get("confusion")
    if not matrices:
        return None
    name = in_order(matrices)[0]
    matrix, classes = np.asarray(matrices[name]), content["classes"]
    chart: Chart | None = None
    if len(classes) <= MOST_CLASSES and matrix.any():
        chart = confusion_chart(matrix, classes, f"{key}-confusion", f"confusions, {name}")
    top: list[Confusion] = top_confusions(matrix, classes)
    return {"protocol": name, "top": top, "chart": chart, "classes": len(classes)}


# --- pictures ------------------------------------------------------------------------------


def legend(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Colours and names of the foreground classes, then of pixels that do not count."""
    palette = voc_palette(256)
    colours = ["#{:02x}{:02x}{:02x}".format(*palette[i]) for i in (*range(1, len(classes)), 255)]
    return list(zip(colours, [*classes[1:], "not scored"], strict=True))


def figure_of(picture: Picture) -> dict[str, Any]:
    """Panels of one image for the page, in the proportions of the image."""
    panels = picture.panels
    height, width = picture.size
    shape = (CELL, max(1, round(CELL * height / width)))
    caption = f"{picture.rank}, {picture.score:.2f} %" if picture.rank else ""
    cells = [
        ImageCell(title, data_uri(panel, shape), *shape, f"{title} of {panels.name}")
        for title, panel in panels.panels.items()
    ]
    return {"name": panels.name, "classes": panels.classes, "rank": caption, "cells": cells}


def data_uri(panel: NDArray[np.uint8], shape: tuple[int, int]) -> str:
    """A panel as ``data:`` address, JPEG or PNG, whichever is smaller.

    Args:
        panel: (H, W, 3) uint8.
        shape: (width, height) to shrink it to; it is not enlarged, browsers do that.
    """
    picture = Image.fromarray(panel)
    picture = picture.resize(
        (min(shape[0], picture.width), min(shape[1], picture.height)), Image.Resampling.BOX
    )
    encoded = []
    for kind, options in (("jpeg", {"quality": 80, "optimize": True}), ("png", {"optimize": True})):
        buffer = io.BytesIO()
        picture.save(buffer, kind.upper(), **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
