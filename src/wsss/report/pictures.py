"""Pictures of what a method sees: image, truth, CAM, pseudo-labels, prediction; PIL alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wsss.data.batch import EvalBatch, to_unit_range
from wsss.data.images import voc_palette
from wsss.files import write_atomically
from wsss.methods.base import Method
from wsss.pseudo import cam_pseudo_label, multi_scale, segmentation_pseudo_label
from wsss.report.unia import extra_maps

RGB = NDArray[np.uint8]

VOID_COLOUR = (224, 224, 192)  # VOC's own colour of index 255
_HEAT = np.array(  # dark blue, blue, cyan, yellow, red: cold to hot at equal steps
    [[0, 0, 96], [0, 64, 255], [0, 224, 224], [255, 224, 0], [224, 0, 0]], dtype=np.float32
)
_MARGIN = 4
_FONT_SIZE = 13
_LINE = 17


@dataclass
class PanelSet:
    """The pictures of one image.

    Attributes:
        name: of the image.
        classes: names of the foreground classes that the image holds.
        panels: title to (H, W, 3) uint8 picture, in the order of the columns.
    """

    name: str
    classes: tuple[str, ...]
    panels: dict[str, RGB]

    @property
    def caption(self) -> str:
        """Image name and its classes."""
        return f"{self.name}: {', '.join(self.classes)}" if self.classes else self.name


# --- colours -------------------------------------------------------------------------------


def colourise(label: Tensor | NDArray[np.integer], num_classes: int) -> RGB:
    """Label map in VOC's colours.

    Args:
        label: (H, W) integers, 0..num_classes-1 and 255 (drawn almost white).
        num_classes: background included (C + 1).

    Returns:
        (H, W, 3) uint8.
    """
    palette = np.empty((256, 3), dtype=np.uint8)
    palette[:num_classes] = voc_palette(num_classes)
    palette[num_classes:] = VOID_COLOUR
    return palette[_numpy(label).astype(np.uint8)]


def overlay(
    image: RGB, label: Tensor | NDArray[np.integer], num_classes: int, alpha: float = 0.8
) -> RGB:
    """Label map over a darkened image, with the regions' outlines.

    Args:
        image: (H, W, 3) uint8.
        label: (H, W) integers, 0..num_classes-1 and 255; background shows the image.
        num_classes: background included (C + 1).
        alpha: weight of the colour.
    """
    values = _numpy(label)
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    colour = colourise(values, num_classes).astype(np.float32)
    mixed = np.where((values == 0)[..., None], 0.4 * grey, (1 - alpha) * grey + alpha * colour)
    edge = np.zeros(values.shape, dtype=bool)
    edge[:, 1:] |= values[:, 1:] != values[:, :-1]
    edge[1:] |= values[1:] != values[:-1]
    mixed[edge] = 255
    return mixed.round().astype(np.uint8)


def heatmap(cam: Tensor | NDArray[np.floating], image: RGB | None = None) -> RGB:
    """Activation map in colours from blue (0) to red (1), over an image where one is given.

    Args:
        cam: (H, W) in [0, 1].
        image: (H, W, 3) uint8.
    """
    position = np.clip(_numpy(cam).astype(np.float32), 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(position.astype(np.int64), len(_HEAT) - 2)
    fraction = (position - low)[..., None]
    colour = _HEAT[low] * (1 - fraction) + _HEAT[low + 1] * fraction
    if image is not None:
        colour = 0.55 * colour + 0.45 * image.mean(axis=2, keepdims=True)
    return colour.round().astype(np.uint8)


# --- panels --------------------------------------------------------------------------------


@torch.no_grad()
def draw_panels(method: Method, batch: EvalBatch, threshold: float | None = None) -> list[PanelSet]:
    """What a method makes of images: multi-scale inference of the network to deploy.

    Columns: ``image``, ``truth``; ``CAM`` (strongest class that the image holds) and ``CPL`` of
    methods with CAMs; ``SPL`` (classes that the image holds) of methods that have CAMs and
    segmentation; ``prediction`` (all classes) of methods with segmentation. After ``CAM`` comes
    what :func:`~wsss.report.unia.extra_maps` finds, nothing without UniA's parts.

    Args:
        method: in eval mode, on the device of the images.
        batch: images as the data module hands them over, float or uint8.
        threshold: of the CPL; None takes the one that the method is at.
    """
    images = to_unit_range(batch.images)
    maps: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    if method.evaluates_segmentation or method.evaluates_cam:
        maps, labels = _infer(method, images, batch.labels, threshold)
    num_classes = len(method.classes) + 1
    size = (images.shape[-2], images.shape[-1])
    result = []
    for i, name in enumerate(batch.names):
        image = (images[i] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        truth = F.interpolate(batch.masks[i][None, None].float(), size=size, mode="nearest")[0, 0]
        panels = {"image": image, "truth": overlay(image, truth.long(), num_classes)}
        panels |= {key: heatmap(one[i], image) for key, one in maps.items()}
        panels |= {key: overlay(image, label[i], num_classes) for key, label in labels.items()}
        present = batch.labels[i].bool().tolist()
        classes = tuple(c for c, here in zip(method.classes, present, strict=True) if here)
        result.append(PanelSet(name, classes, panels))
    return result


def _infer(
    method: Method, images: Tensor, present: Tensor, threshold: float | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Maps (B, H, W) in [0, 1] and label maps (B, H, W) by title."""
    network_name = next(iter(method.scores))
    network, scores = method.networks()[network_name], method.scores[network_name]
    out = multi_scale(
        network,
        images,
        cast(Sequence[float], scores.scales),
        cam_scales=cast(Sequence[float], scores.cam_scales),
        decode=method.evaluates_segmentation,
    )
    cam = out.cam * present[:, :, None, None]
    maps, labels = extra_maps(method, network, images, cam, present)
    if method.evaluates_cam:
        labels["CPL"] = cam_pseudo_label(
            cam, current_threshold(method) if threshold is None else threshold
        )
    if out.seg_logits is not None:
        if method.evaluates_cam:
            labels["SPL"] = segmentation_pseudo_label(out.seg_logits, present).argmax(1)
        labels["prediction"] = out.seg_logits.argmax(1)
    if method.evaluates_cam:
        maps = {"CAM": cam.amax(1)} | maps
    return maps, labels


def current_threshold(method: Method) -> float | Tensor:
    """Background threshold of the CAMs: the method's own where it has one, else the scored one.

    (2,) where it has two, low and high.
    """
    threshold = getattr(method, "threshold", None)
    if not isinstance(threshold, torch.nn.Module):
        return scored_threshold(method)
    value = cast(Tensor, threshold.value)
    return value if value.dim() else float(value)


def scored_threshold(method: Method) -> float:
    """Background threshold at which the CPL is scored."""
    return float(cast(float, next(iter(method.scores.values())).cpl_threshold))


# --- composition ---------------------------------------------------------------------------


def strip(row: PanelSet, cell: int = 192) -> RGB:
    """One image's panels side by side under their titles."""
    return grid([row], cell=cell)


def grid(
    rows: Sequence[PanelSet],
    titles: Sequence[str] | None = None,
    legend: Sequence[str] = (),
    cell: int = 192,
) -> RGB:
    """Rows of panels as one picture: titles on top, each row's caption above it.

    Args:
        rows: with the same columns.
        titles: columns to draw and their order; None takes the first row's.
        legend: foreground class names in label order, explained by colour at the bottom.
        cell: width of a panel in pixels; the height follows the panel.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: no rows, or a row lacks a column.
    """
    if not rows:
        raise ValueError("grid() needs at least one row.")
    titles = list(rows[0].panels) if titles is None else list(titles)
    for row in rows:
        missing = [title for title in titles if title not in row.panels]
        if missing:
            raise ValueError(f"row '{row.name}' has no column '{missing[0]}'.")
    font = ImageFont.load_default(_FONT_SIZE)
    wrapped = [_wrap(title, font, cell) for title in titles]
    header = _LINE * max(len(lines) for lines in wrapped)
    cells = [[_fit(row.panels[title], cell) for title in titles] for row in rows]
    heights = [max(panel.height for panel in line) for line in cells]
    width = len(titles) * (cell + _MARGIN) + _MARGIN
    entries = _legend_lines(legend, font, width)
    height = header + _MARGIN + sum(h + _LINE + _MARGIN for h in heights) + len(entries) * _LINE
    canvas = Image.new("RGB", (width, height + _MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)

    for column, lines in enumerate(wrapped):
        x = _MARGIN + column * (cell + _MARGIN)
        for i, text in enumerate(lines):
            y = header - _LINE * (len(lines) - i)
            draw.text((x + cell / 2, y + 2), text, fill=(0, 0, 0), font=font, anchor="ma")
    y = header + _MARGIN
    for row, line, row_height in zip(rows, cells, heights, strict=True):
        draw.text((_MARGIN, y), _shorten(row.caption, font, width), fill=(80, 80, 80), font=font)
        for column, panel in enumerate(line):
            canvas.paste(panel, (_MARGIN + column * (cell + _MARGIN), y + _LINE))
        y += row_height + _LINE + _MARGIN
    for entry_line in entries:
        for x, name, colour in entry_line:
            draw.rectangle((x, y + 3, x + 11, y + 14), fill=colour, outline=(0, 0, 0))
            draw.text((x + 16, y), name, fill=(0, 0, 0), font=font)
        y += _LINE
    return np.asarray(canvas)


def save_png(picture: RGB, path: Path) -> None:
    """Write a PNG; the file is always whole, old or new."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` positions, evenly from the first to the last of ``total``."""
    count = min(count, total)
    return [int(i) for i in np.linspace(0, total - 1, count).round()] if count > 0 else []


def spread_over_classes(labels: Sequence[NDArray[Any]], count: int) -> list[int]:
    """At most ``count`` positions, one of every stretch of the list, that show many classes.

    Of each stretch the first image with a class that none of the chosen ones has; without such a
    one, the first. Scores have no say in it.

    Args:
        labels: (C,) 0/1 of every image.
        count: of positions.
    """
    chosen: list[int] = []
    shown: set[int] = set()
    for stretch in np.array_split(np.arange(len(labels)), max(1, min(count, len(labels)))):
        positions = [int(position) for position in stretch] if count > 0 else []
        new = [p for p in positions if not shown.issuperset(np.flatnonzero(labels[p]).tolist())]
        for position in (new or positions)[:1]:
            chosen.append(position)
            shown.update(np.flatnonzero(labels[position]).tolist())
    return chosen


def _fit(panel: RGB, cell: int) -> Image.Image:
    picture = Image.fromarray(panel)
    height = max(1, round(picture.height * cell / picture.width))
    # Enlarging shows pixels as they are; shrinking averages them.
    how = Image.Resampling.NEAREST if picture.width <= cell else Image.Resampling.BOX
    return picture.resize((cell, height), how)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines that fit, broken at spaces; a word that is too long is shortened."""
    lines: list[str] = []
    for word in text.split() or [""]:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_shorten(word, font, width))
    return lines


def _shorten(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _legend_lines(
    classes: Sequence[str], font: Font, width: int
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Position, name and colour of each entry, in lines that fit."""
    if not classes:
        return []
    palette = voc_palette(len(classes) + 1)
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = [[]]
    x = _MARGIN
    for i, name in enumerate(classes, start=1):
        step = 16 + round(font.getlength(name)) + 14
        if lines[-1] and x + step > width:
            lines.append([])
            x = _MARGIN
        r, g, b = (int(v) for v in palette[i])
        lines[-1].append((x, name, (r, g, b)))
        x += step
    return lines


def _numpy(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
