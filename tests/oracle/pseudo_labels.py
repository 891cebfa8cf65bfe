"""Pseudo-labels of one image in loops, from its CAMs or logits at another size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tests.oracle.resize import bilinear

IGNORE = 255

#: (K, H, W) scores to (K, H, W) scores
Refine = Callable[[Tensor], Tensor]


def cpl(
    cam: Tensor,
    classes: Sequence[int],
    low: float,
    high: float,
    size: tuple[int, int],
    refine: Refine | None = None,
) -> list[list[int]]:
    """Background is one more channel, the threshold everywhere; the largest channel wins.

    Twice: with ``high`` in that channel the class is certain, and so is background with ``low``
    where ``high`` says the same; what is left is undecided. Ties go to the class without
    refinement.
    """
    height, width = size
    resized = bilinear(cam.double(), height, width)
    answers = []
    for threshold in (high, low):
        background = resized.new_full((1, height, width), threshold)
        channels = [*background, *resized]
        scores = _stack(channels)
        scores = scores if refine is None else refine(scores)
        answers.append(
            [
                [
                    _winner([float(scores[k, y, x]) for k in range(len(classes) + 1)])
                    for x in range(width)
                ]
                for y in range(height)
            ]
        )
    sure, maybe = answers
    result = []
    for y in range(height):
        row = []
        for x in range(width):
            if sure[y][x] > 0:
                row.append(classes[sure[y][x] - 1] + 1)
            else:
                row.append(0 if maybe[y][x] == 0 else IGNORE)
        result.append(row)
    return result


def spl(
    logits: Tensor, classes: Sequence[int], size: tuple[int, int], refine: Refine | None = None
) -> list[list[int]]:
    """The largest of background and the classes the image holds, softmax first if refined."""
    height, width = size
    values = [0, *(c + 1 for c in classes)]
    resized = bilinear(logits.double(), height, width)
    scores = _stack([resized[v] for v in values])
    if refine is not None:
        exponentials = scores.exp()
        scores = refine(exponentials / exponentials.sum(0))
    return [
        [
            values[max(range(len(values)), key=lambda k: float(scores[k, y, x]))]
            for x in range(width)
        ]
        for y in range(height)
    ]


def _stack(channels: Sequence[Tensor]) -> Tensor:
    result = channels[0].new_zeros((len(channels), *channels[0].shape))
    for k, channel in enumerate(channels):
        result[k] = channel
    return result


def _winner(scores: list[float]) -> int:
    best = max(range(1, len(scores)), key=lambda k: scores[k])
    return best if scores[best] >= scores[0] else 0
