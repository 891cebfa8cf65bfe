"""Largest confusions by counting, one cell at a time."""

from __future__ import annotations

from collections.abc import Sequence


def top_confusions(
    matrix: Sequence[Sequence[int]], classes: Sequence[str], most: int
) -> list[tuple[str, str, float, int]]:
    """(truth, predicted, percent of the truth's pixels, pixels), the largest percentage first."""
    cells = []
    for truth in range(len(classes)):
        total = 0
        for predicted in range(len(classes)):
            total = total + matrix[truth][predicted]
        for predicted in range(len(classes)):
            pixels = matrix[truth][predicted]
            if predicted == truth or pixels == 0:
                continue
            cells.append((classes[truth], classes[predicted], pixels * 100.0 / total, pixels))
    largest: list[tuple[str, str, float, int]] = []
    while cells and len(largest) < most:
        best = cells[0]
        for cell in cells:
            if cell[2] > best[2] or (cell[2] == best[2] and cell[3] > best[3]):
                best = cell
        largest.append(best)
        cells.remove(best)
    return largest
