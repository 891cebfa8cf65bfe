"""From logits to a mask at an image's own size, without ever holding its logits as a whole.

The logits of a 12 000 x 9 000 image and 21 classes would take 9 GB. They are resized, compared and
counted in bands of rows. The logits may be those of one square for the whole image, or of windows
that slide over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

#: logits held at native size at a time: 64 MiB of float32, and a few times that while they are used
BAND_ELEMENTS = 2**24


class Window(NamedTuple):
    """A rectangle of an image, in its own pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass
class LabelMap:
    """What an image holds.

    Attributes:
        mask: (H, W) uint8, 0 (background) to C.
        area: (C + 1,) pixels of each label.
        confidence: (C + 1,) mean probability of a label over the pixels where it won; 0 for a
            label without pixels.
    """

    mask: NDArray[np.uint8]
    area: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def share(self) -> NDArray[np.float64]:
        """(C + 1,) part of the image that each label covers; sums to 1."""
        return self.area / self.mask.size


class _Tally:
    """Fills a :class:`LabelMap` by rows."""

    def __init__(self, height: int, width: int, num_labels: int) -> None:
        self.mask = np.empty((height, width), dtype=np.uint8)
        self.area = np.zeros(num_labels, dtype=np.int64)
        self.total = np.zeros(num_labels)

    def add(self, start: int, label: Tensor, probability: Tensor) -> None:
        """Rows from ``start`` on: (n, W) winning label and its probability."""
        values = label.to(torch.uint8).cpu().numpy()
        self.mask[start : start + len(values)] = values
        flat = values.ravel()
        weights = probability.cpu().numpy().ravel()
        self.area += np.bincount(flat, minlength=len(self.area))
        self.total += np.bincount(flat, weights, minlength=len(self.area))  # adds in float64

    def result(self) -> LabelMap:
        return LabelMap(self.mask, self.area, self.total / np.maximum(self.area, 1))


def windows(height: int, width: int, side: int | None, overlap: float = 0.25) -> list[list[Window]]:
    """Cover an image: rows of windows from the top, each from the left.

    They lie at even distances from border to border, so neighbours overlap by at least
    ``overlap``. An axis shorter than ``side`` has one window of its own length.

    Args:
        height, width: of the image.
        side: of a window; None: one window, the whole image.
        overlap: part of ``side`` that neighbours share at least, in [0, 1).

    Raises:
        ValueError: a side below 1, or an overlap that never arrives.
    """
    if side is None:
        return [[Window(0, 0, height, width)]]
    if side < 1 or not 0 <= overlap < 1:
        raise ValueError(
            f"side={side}, overlap={overlap}: give a side from 1 and 0 <= overlap < 1."
        )
    step = max(1, math.floor(side * (1 - overlap)))
    return [
        [
            Window(top, left, min(side, height), min(side, width))
            for left in _starts(width, side, step)
        ]
        for top in _starts(height, side, step)
    ]


def _starts(length: int, side: int, step: int) -> list[int]:
    rest = max(0, length - side)
    count = math.ceil(rest / step)
    return [rest * i // count for i in range(count + 1)] if count else [0]


def label_map(
    height: int,
    width: int,
    rows: Sequence[Sequence[Window]],
    logits: Iterable[Sequence[Tensor]],
) -> LabelMap:
    """Label map of an image whose logits come by rows of windows.

    The windows' logits are resized (bilinear) to their own size and averaged where windows
    overlap; the largest wins. Of one window for the whole image that is what evaluation
    computes.

    Args:
        height, width: of the image.
        rows: :func:`windows` of it.
        logits: for each row, (C + 1, h, w) float logits of each of its windows, of any size.
            They are asked for row by row, and kept while a window covers pixels to come.
    """
    tally: _Tally | None = None
    live: list[tuple[Window, Tensor]] = []
    done = 0
    coming = iter(logits)  # zip() and enumerate() would hold on to the row before
    for i, row in enumerate(rows):
        live += zip(row, next(coming), strict=True)
        num_labels = live[0][1].shape[0]
        tally = tally or _Tally(height, width, num_labels)
        # Rows from the next windows' top on are not complete yet.
        end = rows[i + 1][0].top if i + 1 < len(rows) else height
        step = max(1, BAND_ELEMENTS // (num_labels * width))
        for start in range(done, end, step):
            mean = _mean_logits(live, start, min(start + step, end), width)
            largest, label = mean.max(0)
            tally.add(start, label, (largest - mean.logsumexp(0)).exp())
        done = end
        live = [(window, values) for window, values in live if window.top + window.height > done]
    assert tally is not None
    return tally.result()


def label_map_of(probabilities: Tensor) -> LabelMap:
    """Label map of (C + 1, H, W) probabilities at the image's own size."""
    tally = _Tally(probabilities.shape[1], probabilities.shape[2], probabilities.shape[0])
    largest, label = probabilities.max(0)
    tally.add(0, label, largest)
    return tally.result()


def _mean_logits(
    live: Sequence[tuple[Window, Tensor]], start: int, stop: int, width: int
) -> Tensor:
    """(C + 1, stop - start, width) mean over the windows that cover each pixel."""
    if len(live) == 1:  # then it is as wide as the image
        window, values = live[0]
        return resize_rows(values, window.height, width, start - window.top, stop - window.top)
    first = live[0][1]
    total = first.new_zeros((first.shape[0], stop - start, width))
    count = first.new_zeros((stop - start, width))
    for window, values in live:
        top, bottom = max(start, window.top), min(stop, window.top + window.height)
        if top >= bottom:
            continue
        part = resize_rows(
            values, window.height, window.width, top - window.top, bottom - window.top
        )
        place = (slice(top - start, bottom - start), slice(window.left, window.left + window.width))
        total[(slice(None), *place)] += part
        count[place] += 1
    return total.div_(count)


def resize_rows(x: Tensor, height: int, width: int, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of ``x`` resized to ``height`` x ``width``.

    Bilinear, ``align_corners=False``, in the steps and the precision of
    ``torch.nn.functional.interpolate``: equal to it up to the last bits, and exactly where all
    rows are asked for.

    Args:
        x: (C, h, w) float32.

    Returns:
        (C, stop - start, width).
    """
    if (start, stop) == (0, height):
        return F.interpolate(x[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    # The ratio is rounded to float32 and then used with one rounding more, as interpolate does:
    # exact numbers would be another position by up to 1e-5 of a pixel.
    ratio = float(np.float32(x.shape[1] / height))
    target = torch.arange(start, stop, dtype=torch.float64)
    position = ((target + 0.5) * ratio - 0.5).to(torch.float32).clamp(min=0)
    upper = position.long().clamp(max=x.shape[1] - 1)
    lower = (upper + 1).clamp(max=x.shape[1] - 1)
    weight = (position - upper).clamp(max=1)[:, None].to(x.device)
    first = int(upper[0])
    needed = x[None, :, first : int(lower[-1]) + 1]
    # With as many rows as before only the columns are interpolated.
    wide = F.interpolate(
        needed, size=(needed.shape[2], width), mode="bilinear", align_corners=False
    )[0]
    above, below = (wide.index_select(1, i.to(x.device) - first) for i in (upper, lower))
    return below.mul_(weight).addcmul_(above, 1 - weight)
