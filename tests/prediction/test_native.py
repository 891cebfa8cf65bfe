"""Bands and windows against the whole and against a version that takes pixel by pixel."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.windows import label_map as slow_label_map
from wsss.prediction import native
from wsss.prediction.native import Window, label_map, label_map_of, resize_rows, windows


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- resizing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_labels", [1, 3, 7])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((32, 32), (187, 250)),
        ((448, 8), (1333, 5)),
        ((40, 30), (17, 9)),
        ((8, 8), (8, 21)),
        ((1, 1), (20, 3)),
        ((5, 3), (1, 1)),
    ],
)
@pytest.mark.parametrize("band", [1, 7, 100])
def test_bands_equal_the_whole(
    num_labels: int, source: tuple[int, int], target: tuple[int, int], band: int
) -> None:
    x = logits(num_labels, *source)
    whole = F.interpolate(x[None], size=target, mode="bilinear", align_corners=False)[0]
    parts = [
        resize_rows(x, *target, start, min(start + band, target[0]))
        for start in range(0, target[0], band)
    ]
    assert all(part.shape[1] <= band for part in parts)
    # The last bits alone: a position that is rounded otherwise shows at 1e-4 in 448 rows.
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    assert torch.equal(resize_rows(x, *target, 0, target[0]), whole)


def test_a_band_costs_the_rows_that_it_reads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    interpolate = F.interpolate

    def spy(x: Tensor, **options: Any) -> Tensor:
        seen.append(x.shape[2])
        return interpolate(x, **options)

    monkeypatch.setattr(F, "interpolate", spy)
    resize_rows(logits(3, 100, 10), 1000, 10, 500, 510)
    assert seen == [3]  # rows 49 to 51: positions 49.55 to 50.45, and the row below


# --- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [1, 9, 10, 11, 17, 18, 40, 103])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
def test_windows_cover_the_image(height: int, overlap: float) -> None:
    rows = windows(height, 13, 10, overlap)
    assert [[w.left for w in row] for row in rows] == [[w.left for w in rows[0]]] * len(rows)
    covered = np.zeros((height, 13), dtype=int)
    for row in rows:
        assert len({(w.top, w.height) for w in row}) == 1
        for w in row:
            assert w.height == min(10, height)
            assert w.width == 10
            covered[w.top : w.top + w.height, w.left : w.left + w.width] += 1
    assert covered.min() == 1 or overlap
    assert covered.min() >= 1
    tops = [row[0].top for row in rows]
    assert tops[0] == 0
    assert tops[-1] + rows[-1][0].height == height
    steps = np.diff(tops)
    if len(steps):
        assert steps.max() <= max(1, int(10 * (1 - overlap)))
        assert steps.min() >= steps.max() - 1
        # One window less would not do.
        assert (len(tops) - 2) * max(1, int(10 * (1 - overlap))) < height - 10


def test_windows_are_rows_from_the_top() -> None:
    assert windows(10, 25, 10, 0.25) == [
        [Window(0, 0, 10, 10), Window(0, 5, 10, 10), Window(0, 10, 10, 10), Window(0, 15, 10, 10)]
    ]
    assert windows(12, 4, 10, 0) == [[Window(0, 0, 10, 4)], [Window(2, 0, 10, 4)]]
    assert windows(30, 20, None) == [[Window(0, 0, 30, 20)]]


@pytest.mark.parametrize(("side", "overlap"), [(0, 0.25), (10, 1), (10, -0.1)])
def test_windows_that_never_arrive(side: int, overlap: float) -> None:
    with pytest.raises(ValueError, match="side="):
        windows(10, 10, side, overlap)


# --- label maps --------------------------------------------------------------------------------


def window_logits(rows: Sequence[Sequence[Window]], num_labels: int = 4) -> list[list[Tensor]]:
    return [
        [logits(num_labels, 5, 4, seed=100 * i + j) for j in range(len(row))]
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("band", [1, 150, 2**24])
@pytest.mark.parametrize(
    ("height", "width", "side", "overlap"),
    [
        (23, 17, None, 0.25),
        (23, 17, 8, 0.25),
        (23, 17, 8, 0.0),
        (17, 9, 16, 0.5),
        (12, 20, 5, 0.8),
        (6, 30, 9, 0.25),
        (30, 6, 9, 0.25),
        (1, 1, None, 0.25),
        (1, 1, 4, 0.25),
    ],
)
def test_against_the_slow_version(
    height: int,
    width: int,
    side: int | None,
    overlap: float,
    band: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "BAND_ELEMENTS", band)
    rows = windows(height, width, side, overlap)
    values = window_logits(rows)
    result = label_map(height, width, rows, values)
    placed = [
        (*window, x)
        for row, tensors in zip(rows, values, strict=True)
        for window, x in zip(row, tensors, strict=True)
    ]
    mask, area, confidence = slow_label_map(height, width, placed)
    assert result.mask.dtype == np.uint8
    assert result.mask.tolist() == mask
    assert result.area.tolist() == area
    np.testing.assert_allclose(result.confidence, confidence, rtol=1e-5)
    np.testing.assert_allclose(result.share, np.array(area) / (height * width))
    assert result.share.sum() == pytest.approx(1)


def test_one_window_is_what_evaluation_computes() -> None:
    x = logits(21, 14, 14)
    resized = F.interpolate(x[None], size=(75, 50), mode="bilinear", align_corners=False)
    result = label_map(75, 50, windows(75, 50, None), [[x]])
    assert np.array_equal(result.mask, resized.argmax(1)[0].numpy())


def test_bands_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BAND_ELEMENTS", 4 * 50 * 3)  # three rows
    sizes = []

    def spy(x: Tensor, height: int, width: int, start: int, stop: int) -> Tensor:
        sizes.append(stop - start)
        return resize_rows(x, height, width, start, stop)

    monkeypatch.setattr(native, "resize_rows", spy)
    label_map(100, 50, windows(100, 50, None), [[logits(4, 9, 9)]])
    assert max(sizes) == 3
    assert sum(sizes) == 100


def test_logits_are_asked_for_by_rows_and_let_go() -> None:
    rows = windows(60, 10, 10, 0)
    assert len(rows) == 6
    alive: list[int] = []
    references: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[list[Tensor]]:
        for i in range(len(rows)):
            alive.append(sum(r() is not None for r in references))
            x = logits(3, 4, 4, seed=i)
            references.append(weakref.ref(x))
            yield [x]
            del x

    label_map(60, 10, rows, stream())
    # When a row is asked for, those that end above it are gone.
    assert max(alive) == 0


def test_labels_without_a_pixel_have_no_confidence() -> None:
    x = logits(3, 4, 4)
    x[1] = -50
    result = label_map(8, 8, windows(8, 8, None), [[x]])
    assert result.area[1] == 0
    assert result.confidence[1] == 0
    assert (result.confidence[[0, 2]] > 0.5).all()


def test_of_probabilities() -> None:
    p = logits(4, 6, 5).softmax(0)
    result = label_map_of(p)
    expected = label_map(6, 5, windows(6, 5, None), [[p.log()]])
    assert np.array_equal(result.mask, expected.mask)
    assert np.array_equal(result.area, expected.area)
    np.testing.assert_allclose(result.confidence, expected.confidence, rtol=1e-5)
    assert result.mask.shape == (6, 5)


def test_many_labels() -> None:
    x = logits(256, 3, 3)
    x[255, 0, 0] = x[200, 2, 2] = 1000
    result = label_map(3, 3, windows(3, 3, None), [[x]])
    assert result.mask[0, 0] == 255
    assert result.mask[2, 2] == 200
    assert result.area.shape == (256,)
