"""The random walk of AffinityNet against a matrix of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import pixel_affinity as oracle
from wsss.pseudo import affinity_walk
from wsss.pseudo.pixel_affinity import pair_distance, pair_ends, pair_offsets


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("radius", [2, 3, 5])
def test_offsets_are_the_pairs_of_a_cell(radius: int) -> None:
    side = 2 * radius + 1
    middle = (radius, radius)
    pairs = [p for p in oracle.pairs(side, side, radius) if middle in p]
    offsets = pair_offsets(radius)
    both = [*offsets, *((-dy, -dx) for dy, dx in offsets)]
    other = {(p[0] if p[1] == middle else p[1]) for p in pairs}
    assert {(radius + dy, radius + dx) for dy, dx in both} == other
    assert len(set(both)) == len(both) == len(other)
    assert all(dy > 0 or (dy == 0 and dx > 0) for dy, dx in offsets)
    if radius == 5:
        assert len(offsets) == 34


@pytest.mark.parametrize("grid", [(4, 6), (7, 3), (1, 4), (1, 1)], ids=str)
def test_ends_and_distance(grid: tuple[int, int]) -> None:
    features = _random(1, 3, *grid)
    for dy, dx in pair_offsets(4):
        first, second = pair_ends(features, (dy, dx))
        starts = [
            (y, x)
            for y in range(grid[0])
            for x in range(grid[1])
            if y + dy < grid[0] and 0 <= x + dx < grid[1]
        ]
        distance = pair_distance(features, (dy, dx))
        assert first[0, 0].numel() == second[0, 0].numel() == distance[0].numel() == len(starts)
        flat = zip(
            starts, first[0].flatten(1).T, second[0].flatten(1).T, distance.flatten(), strict=True
        )
        for (y, x), a, b, d in flat:
            assert torch.equal(a, features[0, :, y, x])
            assert torch.equal(b, features[0, :, y + dy, x + dx])
            expected = oracle.affinity(features[0], (y, x), (y + dy, x + dx))
            torch.testing.assert_close((-d).exp(), expected)


@pytest.mark.parametrize("grid", [(4, 6), (7, 3), (1, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("radius", "beta", "logt"), [(2, 8, 1), (3, 2, 3), (5, 8, 6), (3, 0.5, 0)], ids=str
)
def test_walk(grid: tuple[int, int], radius: int, beta: float, logt: int) -> None:
    scores, features = _random(2, 3, *grid), _random(2, 4, *grid, seed=1)
    found = affinity_walk(scores, features, radius, beta, logt)
    assert (found.dtype, found.shape) == (torch.float64, scores.shape)
    for i in range(2):
        expected = oracle.walk(scores[i], features[i], radius, beta, logt)
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)


def test_defaults() -> None:
    scores, features = _random(1, 2, 6, 7), 0.2 * _random(1, 3, 6, 7, seed=1)
    torch.testing.assert_close(
        affinity_walk(scores, features), affinity_walk(scores, features, 5, 8.0, 6)
    )


def test_the_borders_of_objects_hold() -> None:
    """Two flat halves far apart: each becomes its own mean, but for what crosses the border."""
    features = torch.zeros(1, 2, 4, 8)
    features[..., 4:] = 3.0
    scores = _random(1, 1, 4, 8).float()
    found = affinity_walk(scores, features, beta=8, logt=10)
    assert found.dtype == torch.float32
    halves = (found[..., :4], found[..., 4:])
    for half in halves:
        assert float(half.max() - half.min()) < 1e-3
    assert abs(float(halves[0].mean() - halves[1].mean())) > 0.01


def test_a_constant_stays() -> None:
    features = 5 * _random(1, 3, 6, 7).float()
    found = affinity_walk(torch.full((1, 1, 6, 7), 0.39), features)
    torch.testing.assert_close(found, torch.full((1, 1, 6, 7), 0.39), rtol=1e-5, atol=0)


def test_under_autocast_it_is_computed_in_float32() -> None:
    scores, features = _random(1, 2, 6, 7).float(), _random(1, 3, 6, 7, seed=1).float()
    expected = affinity_walk(scores, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = affinity_walk(scores, features)
    assert torch.equal(found, expected)
    low = affinity_walk(scores.bfloat16(), features.bfloat16())
    assert low.dtype == torch.float32


@pytest.mark.parametrize(
    ("scores", "features", "options", "message"),
    [
        ((1, 2, 4, 5), (1, 3, 4, 6), {}, "expected"),
        ((1, 2, 4, 5), (1, 3, 3, 5), {}, "expected"),
        ((2, 2, 4, 5), (1, 3, 4, 5), {}, "expected"),
        ((2, 4, 5), (2, 4, 5), {}, "expected"),
        ((1, 2, 4, 5), (1, 3, 4, 5), {"beta": 0}, "beta=0"),
        ((1, 2, 4, 5), (1, 3, 4, 5), {"logt": -1}, "logt=-1"),
        ((1, 2, 4, 5), (1, 3, 4, 5), {"radius": 1}, "radius=1"),
    ],
    ids=str,
)
def test_wrong_arguments(
    scores: tuple[int, ...], features: tuple[int, ...], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        affinity_walk(torch.zeros(scores), torch.zeros(features), **options)
