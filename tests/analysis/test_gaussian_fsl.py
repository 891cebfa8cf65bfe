"""Gaussian CAMs, what the loss makes of them, and the command."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from wsss.analysis.gaussian_fsl import (
    SingleObject,
    gaussian_scores,
    is_single_object,
    optimise,
    predictions,
    score,
    single_objects,
)
from wsss.data.voc import VOC


def square(size: int = 24, low: int = 8, high: int = 16) -> SingleObject:
    """A red square on green; its Gaussian is smaller than it."""
    mask = torch.zeros(size, size, dtype=torch.long)
    mask[low:high, low:high] = 2
    image = torch.zeros(3, size, size)
    image[1] = 1.0
    image[0, low:high, low:high], image[1, low:high, low:high] = 1.0, 0.0
    return SingleObject("a", 2, mask, image, gaussian_scores(mask == 2, (size, size)))


class TestGaussianScores:
    def test_oracle(self) -> None:
        generator = torch.Generator().manual_seed(0)
        foreground = torch.rand(9, 14, generator=generator) > 0.6
        places = [(r, c) for r in range(9) for c in range(14) if foreground[r, c]]
        rows, columns = [p[0] for p in places], [p[1] for p in places]
        my, mx = sum(rows) / len(rows), sum(columns) / len(columns)
        vy = sum((r - my) ** 2 for r in rows) / len(rows)
        vx = sum((c - mx) ** 2 for c in columns) / len(columns)
        found = gaussian_scores(foreground, (9, 14))
        for r in range(9):
            for c in range(14):
                g = math.exp(-0.5 * ((r - my) ** 2 / vy + (c - mx) ** 2 / vx))
                assert found[r, c] == pytest.approx(2 * g - 1, abs=1e-6)

    def test_at_another_resolution(self) -> None:
        """Pixel centres stay where they are: the middle of an even side is between two pixels."""
        foreground = torch.zeros(40, 20, dtype=torch.bool)
        foreground[10:30, 4:16] = True
        half = gaussian_scores(foreground, (20, 10))
        torch.testing.assert_close(half, half.flip(0))
        torch.testing.assert_close(half, half.flip(1))
        full = gaussian_scores(foreground, (40, 20))
        between = (full[19, 9] + full[20, 10]) / 2
        assert float(half[9, 4]) < float(between) < 1

    def test_one_pixel(self) -> None:
        foreground = torch.zeros(5, 5, dtype=torch.bool)
        foreground[1, 3] = True
        found = gaussian_scores(foreground, (5, 5))
        assert found.isfinite().all()
        assert found.argmax() == 8
        assert (found > 0).sum() == 1


@pytest.mark.parametrize(
    ("rows", "fits"),
    [
        (["000000", "011000", "011000", "000000"], True),
        (["000000", "010000", "001000", "000000"], True),  # diagonal neighbours are connected
        (["000000", "010010", "010010", "000000"], False),  # two objects
        (["000000", "012000", "012000", "000000"], False),  # another class
        (["000000", "019000", "019000", "000000"], True),  # void
        (["000000", "010000", "000000", "000000"], False),  # too small
        (["111111", "111111", "111111", "000000"], False),  # too large
    ],
)
def test_single_object(rows: list[str], fits: bool) -> None:
    mask = np.array([[255 if c == "9" else int(c) for c in row] for row in rows], np.uint8)
    assert is_single_object(mask, 1, (0.08, 0.6)) == fits


class TestOptimise:
    def test_grows_to_the_edge(self) -> None:
        item = square()
        before = score([item], item.scores[None, None], 3)
        scores = optimise([item], 2.5, 3.0, "binomial", steps=60)
        after = score([item], scores, 3)
        assert before.j < 85
        assert after.j > 99
        assert after.f > before.f + 20
        assert after.jf == pytest.approx((after.j + after.f) / 2)

    def test_max_norm_cannot_grow(self) -> None:
        """Where a score is negative its gradient is 0, as the paper says."""
        item = square()
        scores = optimise([item], 2.5, 3.0, "max_norm", steps=30)[0, 0]
        assert torch.equal(scores[item.scores < 0], item.scores[item.scores < 0])

    def test_images_do_not_touch_each_other(self) -> None:
        small, large = square(16, 4, 10), square(24)
        together = optimise([small, large], 2.5, 2.0, "binomial", steps=5)
        for i, item in enumerate((small, large)):
            alone = optimise([item], 2.5, 2.0, "binomial", steps=5)[0, 0]
            side = item.mask.shape[0]
            torch.testing.assert_close(together[i, 0, :side, :side], alone)
        assert (together[0, 0, 16:] == -1).all()

    def test_watch(self) -> None:
        seen: dict[int, torch.Tensor] = {}
        item = square()
        scores = optimise([item], 2.5, 2.0, steps=3, watch=lambda n, s: seen.update({n: s.clone()}))
        assert list(seen) == [0, 1, 2, 3]
        assert torch.equal(seen[0][0, 0], item.scores)
        assert torch.equal(seen[3], scores)

    def test_predictions_at_the_image_size(self) -> None:
        item = square()
        item = item._replace(mask=item.mask.repeat_interleave(2, 0).repeat_interleave(3, 1))
        found = next(predictions([item], item.scores[None, None]))
        assert found.shape == (48, 72)
        assert set(found.unique().tolist()) == {0, 2}


def test_chosen_images_have_one_object(shapes_root: Path) -> None:
    split = VOC(shapes_root).open("val")
    items = single_objects(split, 1, (0.0, 1.0), 0.5, seed=0)
    labels = [item.label for item in items]
    assert items
    assert labels == sorted(set(labels))
    for item in items:
        index = split.names.index(item.name)
        assert split.labels[index].sum() == split.labels[index][item.label - 1] == 1
        assert item.image.shape[1:] == item.scores.shape == (32, 32)
