"""What a folder of pseudo-labels holds, read back from its files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsss.data.images import VOID, DatasetError, read_mask, summary
from wsss.data.layout import Split, in_threads
from wsss.errors import UserError
from wsss.labelling.folder import LabelFolder
from wsss.metrics import SegmentationScores
from wsss.report.tables import number

_VALUES = 256


@dataclass
class _Counts:
    """Pixels of one image by mask value (256,), and by true class and mask value (C + 1, 256)."""

    pixels: NDArray[np.int64]
    joint: NDArray[np.int64] | None


def summarise(
    folder: LabelFolder,
    kind: str,
    images: Split,
    indices: Sequence[int],
    truth: Split | None,
    score: str,
) -> dict[str, Any]:
    """Count what the masks of one kind hold, and compare them with the true ones.

    Args:
        folder: has a mask of each of these images.
        kind: ``cpl`` or ``spl``.
        images: the split.
        indices: the images of it that are looked at.
        truth: those of them that have a mask of their own; None: nothing is compared.
        score: name of the mIoU, such as ``an/cpl/miou_ms_flip``.

    Returns:
        ``images``; ``background``, ``foreground`` and ``undecided``, mean shares of an image in
        percent; ``images_of_class`` by class name, whose mask has a pixel of it. With ``truth``
        also ``check``: ``images``, ``scores`` and ``per_class`` in percent. Undecided pixels count
        as background in ``score`` and are left out in ``score`` + ``_decided``.

    Raises:
        UserError: masks that cannot be read, such as files changed by another program.
    """
    position = {name: i for i, name in enumerate(truth.names)} if truth is not None else {}
    num_labels = len(images.classes) + 1
    problems: list[str] = []

    def look(i: int) -> _Counts | None:
        name = images.names[i]
        try:
            mask = read_mask(folder.path(kind, name), num_labels - 1)
        except DatasetError as error:
            problems.append(str(error))
            return None
        joint = None
        if truth is not None and name in position:
            try:
                target = truth.load_mask(position[name])
            except DatasetError:  # the data set's own mask is broken: nothing to compare with
                target = np.zeros((0, 0), np.uint8)
            if target.shape == mask.shape:
                keep = target != VOID
                index = target[keep].astype(np.int64) * _VALUES + mask[keep]
                joint = np.bincount(index, minlength=num_labels * _VALUES)
                joint = joint.reshape(num_labels, _VALUES)
        return _Counts(np.bincount(mask.ravel(), minlength=_VALUES), joint)

    shares = np.zeros(_VALUES)
    holding = np.zeros(_VALUES, np.int64)
    joint = np.zeros((num_labels, _VALUES), np.int64)
    compared = 0
    for counts in in_threads(look, list(indices), f"Checking {kind}"):
        if counts is None:
            continue
        shares += counts.pixels / counts.pixels.sum()
        holding += counts.pixels > 0
        if counts.joint is not None:
            joint += counts.joint
            compared += 1
    if problems:
        raise UserError(
            f"{len(problems)} of {len(indices)} masks in {folder.root / kind} cannot be used:\n"
            f"{summary(problems)}\nRemove them; the same command writes them again."
        )
    shares *= 100 / max(len(indices), 1)
    result: dict[str, Any] = {
        "images": len(indices),
        "background": round(shares[0], 2),
        "foreground": round(shares[1:num_labels].sum(), 2),
        "undecided": round(shares[VOID], 2),
        "images_of_class": {c: int(holding[i + 1]) for i, c in enumerate(images.classes)},
    }
    if compared:
        result["check"] = {"images": compared, **_scores(joint, images.classes, score)}
    return result


def _scores(joint: NDArray[np.int64], classes: Sequence[str], name: str) -> dict[str, Any]:
    names = ("background", *classes)
    decided = joint[:, : len(names)]
    confusion = decided.copy()
    confusion[:, 0] += joint[:, VOID]
    scores: dict[str, float | None] = {}
    per_class: dict[str, float | None] = {}
    tables = {name: confusion} | ({f"{name}_decided": decided} if joint[:, VOID].any() else {})
    for full, matrix in tables.items():
        metric = SegmentationScores(len(names), class_names=names)
        metric.matrix += torch.from_numpy(matrix)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes without a pixel show as a dash in the table
            table = metric.compute()
        scores[full] = _percent(float(table["miou"]))
        if full == name:
            per_class = {c: _percent(float(v)) for c, v in zip(names, table["iou"], strict=True)}
    return {"scores": scores, "per_class": per_class}


def _percent(value: float) -> float | None:
    return round(100 * value, 2) if math.isfinite(value) else None


def print_summary(
    results: Mapping[str, Any], images: Split, indices: Sequence[int], console: Console
) -> None:
    """Print what :func:`summarise` found of each kind among ``indices``."""
    kinds = list(results)
    checked = [kind for kind in kinds if "check" in results[kind]]
    table = Table(title="Classes: images, and IoU (%) as a check", title_justify="left")
    table.add_column("class", no_wrap=True)
    table.add_column("labelled", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
        if kind in checked:
            table.add_column("IoU", justify="right")
    labelled = images.labels[indices].sum(0).astype(int)
    rows = [
        ("background", ""),
        *((c, str(n)) for c, n in zip(images.classes, labelled, strict=True)),
    ]
    for name, count in rows:
        cells = []
        for kind in kinds:
            found = results[kind]["images_of_class"].get(name)
            cells.append("" if found is None else str(found))
            if kind in checked:
                cells.append(number(results[kind]["check"]["per_class"][name]))
        table.add_row(escape(name), count, *cells)
    console.print(table)
    shares = Table(title="Mean share of an image (%)", title_justify="left")
    for heading in ("", "background", "foreground", "undecided (255)"):
        shares.add_column(heading, justify="right" if heading else "left")
    for kind in kinds:
        parts = ("background", "foreground", "undecided")
        shares.add_row(kind, *(number(results[kind][part]) for part in parts))
    console.print(shares)
    for kind in checked:
        check = results[kind]["check"]
        for name, value in check["scores"].items():
            console.print(
                f"{name} {number(value)} % on {check['images']} images with masks: a check, used "
                "for nothing",
                highlight=False,
            )
