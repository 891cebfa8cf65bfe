"""SEAM's losses against their oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import seam as oracle
from tests.oracle.compare import TOLERANCE, assert_matches_oracle, value_and_gradient
from wsss.losses.equivariance import (
    equivariant_cross_loss,
    equivariant_loss,
    max_norm,
    min_pooling_loss,
)

DTYPES = list(TOLERANCE)
LABELS = {
    "mixed": [[1, 0, 1], [0, 1, 0]],
    "none": [[0, 0, 0], [0, 0, 0]],
    "all": [[1, 1, 1], [1, 1, 1]],
}
GRIDS = [(3, 4), (4, 2), (1, 1)]


def _maps(grid: tuple[int, int] = (3, 4), channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *grid, generator=generator, dtype=torch.float64)


def _labels(name: str) -> Tensor:
    return torch.tensor(LABELS[name], dtype=torch.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_max_norm(grid: tuple[int, int]) -> None:
    maps = _maps(grid)
    expected = [[[[float(v) for v in r] for r in c] for c in b] for b in oracle.max_norm(maps)]
    torch.testing.assert_close(max_norm(maps), torch.tensor(expected, dtype=torch.float64))


def test_max_norm_of_positive_maps_starts_at_their_minimum() -> None:
    maps = torch.tensor([2.0, 3.0, 4.0]).view(1, 1, 1, 3)
    torch.testing.assert_close(
        max_norm(maps).flatten(), torch.tensor([0.0, 0.5, 1.0]), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equivariant(grid: tuple[int, int], labels: str) -> None:
    other, present = _maps(grid, seed=1), _labels(labels)
    for first in (True, False):  # the gradient reaches both
        assert_matches_oracle(
            lambda m, f=first: equivariant_loss(*((m, other) if f else (other, m)), present),
            lambda m, f=first: oracle.equivariant(*((m, other) if f else (other, m)), present),
            _maps(grid),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equivariant_in_low_precision(dtype: torch.dtype) -> None:
    other = _maps(seed=1).bfloat16().double()
    assert_matches_oracle(
        lambda m: equivariant_loss(m, other.to(m.dtype), _labels("mixed")),
        lambda m: oracle.equivariant(m, other, _labels("mixed")),
        _maps().bfloat16().double(),
        dtype,
    )


def test_equivariant_of_equal_maps_is_nothing() -> None:
    assert equivariant_loss(_maps(), _maps(), _labels("all")) == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0, 1e-6])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cross(grid: tuple[int, int], labels: str, share: float) -> None:
    large, small, present = _maps(grid), _maps(grid, seed=1), _labels(labels)
    refined, small_refined = _maps(grid, 4, seed=2), _maps(grid, 4, seed=3)
    assert_matches_oracle(
        lambda m: equivariant_cross_loss(large, small, m, small_refined, present, share),
        lambda m: (
            oracle.equivariant_cross(small, m, present, share)
            + oracle.equivariant_cross(large, small_refined, present, share)
        ),
        refined,
    )
    _, gradient = value_and_gradient(
        lambda m: equivariant_cross_loss(large, small, refined, m, present, share), small_refined
    )
    _, expected = value_and_gradient(
        lambda m: oracle.equivariant_cross(large, m, present, share), small_refined
    )
    torch.testing.assert_close(gradient, expected)


def test_a_fifth_of_the_values_counts_unless_said_otherwise() -> None:
    arguments = (_maps(), _maps(seed=1), _maps(channels=4), _maps(channels=4, seed=3))
    present = _labels("mixed")
    assert equivariant_cross_loss(*arguments, present) == equivariant_cross_loss(
        *arguments, present, 0.2
    )
    assert equivariant_cross_loss(*arguments, present) > equivariant_cross_loss(
        *arguments, present, 1.0
    )


def test_the_cam_is_a_target_without_gradient() -> None:
    large, small = _maps().requires_grad_(), _maps(seed=1).requires_grad_()
    refined = _maps(channels=4).requires_grad_()
    equivariant_cross_loss(large, small, refined, refined, _labels("all")).backward()
    assert large.grad is None
    assert small.grad is None
    assert refined.grad is not None


def test_cross_of_a_constant_map_is_finite() -> None:
    cam = torch.ones(2, 3, 2, 2, requires_grad=True)
    refined = torch.ones(2, 4, 2, 2, requires_grad=True)
    loss = equivariant_cross_loss(cam, cam, refined, refined, _labels("all"))
    loss = loss + equivariant_loss(cam, cam, _labels("all"))
    loss.backward()
    assert loss.isfinite()
    assert refined.grad is not None
    assert refined.grad.isfinite().all()


@pytest.mark.parametrize("share", [0.25, 0.5, 1e-6])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_min_pooling(grid: tuple[int, int], labels: str, share: float) -> None:
    present = _labels(labels)
    assert_matches_oracle(
        lambda m: min_pooling_loss(m, present, share),
        lambda m: oracle.min_pooling(m, present, share),
        _maps(grid) + 0.5,
    )


def test_min_pooling_takes_the_lowest_quarter() -> None:
    maps = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.7, 0.6, 0.5, 0.4]).view(1, 1, 2, 4)
    torch.testing.assert_close(min_pooling_loss(maps, torch.ones(1, 1)), torch.tensor(0.2))
