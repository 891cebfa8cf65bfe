"""The largest confusions against a count by loops."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle import confusions as oracle
from wsss.report.confusion import shares, top_confusions

CLASSES = ["background", "cat", "dog", "eel", "fox"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most", [1, 4, 100])
def test_largest_shares_of_the_truth(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 1000, (5, 5)) * rng.integers(0, 2, (5, 5))
    matrix[3] = 0  # eels are in no mask, but predicted
    found = top_confusions(matrix, CLASSES, most)
    expected = oracle.top_confusions(matrix.tolist(), CLASSES, most)
    assert [(c.truth, c.predicted, c.pixels) for c in found] == [
        (t, p, n) for t, p, _, n in expected
    ]
    assert [c.share for c in found] == pytest.approx([share for _, _, share, _ in expected])


def test_by_hand() -> None:
    matrix = [[90, 10, 0], [5, 4, 1], [0, 0, 0]]
    first, second, third = top_confusions(matrix, CLASSES[:3])
    assert first == ("cat", "background", 50.0, 5)
    assert second == ("background", "cat", 10.0, 10)  # more pixels than the next, same share
    assert third == ("cat", "dog", 10.0, 1)


def test_rows_sum_to_100_and_empty_ones_are_nan() -> None:
    share = shares([[3, 1], [0, 0]])
    assert share[0].tolist() == [75.0, 25.0]
    assert np.isnan(share[1]).all()


def test_nothing_confused_and_wrong_size() -> None:
    assert top_confusions(np.eye(3), CLASSES[:3]) == []
    with pytest.raises(ValueError, match=r"\(3, 3\) for 5 classes"):
        top_confusions(np.eye(3), CLASSES)
