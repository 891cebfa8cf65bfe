"""The overlay of a prediction."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.data.images import voc_palette
from wsss.report.legend import Entry, draw_prediction, percent
from wsss.report.pictures import overlay

ENTRIES = [Entry("hen", 3, 0.25), Entry("cat", 1, 0.125)]


def columns_with(picture: np.ndarray, label: int) -> np.ndarray:
    return np.flatnonzero((picture == voc_palette()[label]).all(2).any(0))


def test_the_picture_and_its_legend() -> None:
    image = np.full((60, 300, 3), 90, np.uint8)
    mask = np.zeros((60, 300), np.uint8)
    mask[10:40, 20:80] = 3
    picture = draw_prediction(image, mask, ENTRIES, 4)
    assert picture.shape[1] == 300
    assert np.array_equal(picture[:60], overlay(image, mask, 4, alpha=0.55))
    legend = picture[60:]
    assert 20 < len(legend) < 50
    hen, cat = columns_with(legend, 3), columns_with(legend, 1)
    assert 10 < len(hen) < 20
    assert len(hen) == len(cat)
    assert hen.max() + 30 < cat.min()  # a name between them
    assert len(columns_with(legend, 2)) == 0
    other = draw_prediction(image, mask, [Entry("ape", 3, 0.25), ENTRIES[1]], 4)
    assert not np.array_equal(other, picture)


def test_the_mask_may_be_of_any_size() -> None:
    image = np.full((30, 260, 3), 90, np.uint8)
    mask = np.zeros((300, 2600), np.uint8)
    mask[:, 1300:] = 1
    small = np.zeros((30, 260), np.uint8)
    small[:, 130:] = 1
    expected = overlay(image, small, 4, alpha=0.55)
    assert np.array_equal(draw_prediction(image, mask, ENTRIES, 4)[:30], expected)


def test_long_legends_take_more_lines() -> None:
    image = np.zeros((20, 260, 3), np.uint8)
    mask = np.zeros((20, 260), np.uint8)
    many = [Entry(f"class {i}", i, 0.01) for i in range(1, 31)]
    picture = draw_prediction(image, mask, many, 31)
    assert picture.shape[1] == 260
    for entry in many:
        assert len(columns_with(picture[20:], entry.label)) > 10
    one = draw_prediction(image, mask, many[:1], 31)
    assert len(picture) > len(one) + 10 * 15


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_tiny_images(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 77, np.uint8)
    picture = draw_prediction(image, np.zeros(size, np.uint8), ENTRIES, 4)
    assert picture.shape[1] >= 240
    assert np.array_equal(picture[: size[0], : size[1]], overlay(image, np.zeros(size), 4))
    assert len(columns_with(picture[size[0] :], 1)) > 10


def test_a_long_name_widens_the_picture() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    entry = Entry("a very long class name, longer than any picture " * 3, 1, 0.5)
    picture = draw_prediction(image, np.zeros((20, 20), np.uint8), [entry], 4)
    assert picture.shape[1] > 600
    assert (picture[20:, -10:] == 255).all()


def test_background_alone() -> None:
    image = np.zeros((20, 300, 3), np.uint8)
    picture = draw_prediction(image, np.zeros((20, 300), np.uint8), [], 4)
    assert (picture[20:] < 100).any()  # it says so


def test_percent() -> None:
    assert percent(0.1234) == "12.3 %"
    assert percent(1) == "100.0 %"
    assert percent(0.0005) == "0.1 %"
    assert percent(0.0004) == "<0.1 %"
    assert percent(0) == "0.0 %"
