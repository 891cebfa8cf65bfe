"""Spatial-BCE and its companions against their oracles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracle import spatial_bce as oracle
from tests.oracle.compare import TOLERANCE, assert_matches_oracle, value_and_gradient
from wsss.losses.spatial_bce import (
    area_loss,
    area_threshold,
    spatial_bce_loss,
    threshold_loss,
)

DTYPES = list(TOLERANCE)
LABELS = {
    "mixed": [[1, 0, 1], [0, 1, 0]],
    "none": [[0, 0, 0], [0, 0, 0]],
    "all": [[1, 1, 1], [1, 1, 1]],
}
GRIDS = [(3, 4), (4, 2), (1, 1)]
THRESHOLD = torch.tensor([[0.3, 0.5, 0.8], [0.6, 0.45, 0.5]], dtype=torch.float64)
AREA = torch.tensor([[0.3, 0.5, 0.8], [0.1, 0.25, 0.99]], dtype=torch.float64)


def _scores(grid: tuple[int, int] = (3, 4)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *grid, generator=generator, dtype=torch.float64) * 2


def _labels(name: str) -> Tensor:
    return torch.tensor(LABELS[name], dtype=torch.float32)


def _valid(kind: str, grid: tuple[int, int]) -> Tensor | None:
    if kind == "whole":
        return None
    valid = torch.ones(2, *grid, dtype=torch.bool)
    valid[0, :, -1] = False
    return valid if kind == "padded" else valid & False


VALID = ["whole", "padded", "nothing"]


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_spatial_bce(grid: tuple[int, int], labels: str, kind: str) -> None:
    present, valid = _labels(labels), _valid(kind, grid)
    assert_matches_oracle(
        lambda s: spatial_bce_loss(s, present, THRESHOLD, valid),
        lambda s: oracle.spatial_bce(s, present, THRESHOLD, valid),
        _scores(grid),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    present, scores = _labels("mixed"), _scores().bfloat16().double()
    for ours, theirs, other in (
        (spatial_bce_loss, oracle.spatial_bce, THRESHOLD),
        (area_loss, oracle.area_loss, AREA),
    ):
        assert_matches_oracle(
            lambda s, f=ours, o=other: f(s, present, o),
            lambda s, f=theirs, o=other: f(s, present, o),
            scores,
            dtype,
        )


def test_pixels_of_a_present_class_are_pushed_apart() -> None:
    scores = torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0], dtype=torch.float64).view(1, 1, 1, 5)
    half = torch.full((1, 1), 0.5)
    _, gradient = value_and_gradient(lambda s: spatial_bce_loss(s, torch.ones(1, 1), half), scores)
    assert gradient.flatten().sign().tolist() == [1, 1, 0, -1, -1]
    _, gradient = value_and_gradient(lambda s: spatial_bce_loss(s, torch.zeros(1, 1), half), scores)
    assert (gradient > 0).all()


def test_curve() -> None:
    def loss(p: float, t: float) -> float:
        score = torch.full((1, 1, 1, 1), math.log(p / (1 - p)), dtype=torch.float64)
        return float(spatial_bce_loss(score, torch.ones(1, 1), torch.tensor([[t]])))

    assert loss(0.3, 0.3) == pytest.approx(1.0)
    assert loss(0.15, 0.3) == pytest.approx(0.75)
    assert loss(0.65, 0.3) == pytest.approx(0.75)
    assert loss(1 - 1e-9, 0.3) == pytest.approx(0.0, abs=1e-6)
    assert loss(1e-9, 0.3) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_thresholds_at_the_ends_are_finite(threshold: float) -> None:
    scores, t = _scores() * 100, torch.full((2, 3), threshold).requires_grad_()
    scores.requires_grad_()
    loss = spatial_bce_loss(scores, _labels("mixed"), t) + threshold_loss(scores, _labels("all"), t)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert t.grad is not None
    assert t.grad.isfinite().all()


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_threshold(grid: tuple[int, int], labels: str, kind: str) -> None:
    present, valid, scores = _labels(labels), _valid(kind, grid), _scores(grid)
    assert_matches_oracle(
        lambda t: threshold_loss(scores, present, t, valid),
        lambda t: oracle.threshold_loss(scores, present, t, valid),
        THRESHOLD,
    )


def test_each_loss_has_its_own_gradient() -> None:
    scores, threshold = _scores().requires_grad_(), THRESHOLD.clone().requires_grad_()
    spatial_bce_loss(scores, _labels("all"), threshold).backward()
    assert threshold.grad is None
    assert scores.grad is not None
    scores.grad = None
    threshold_loss(scores, _labels("all"), threshold).backward()
    assert threshold.grad is not None
    assert scores.grad is None
    area_loss(scores, _labels("all"), AREA.requires_grad_()).backward()
    assert AREA.grad is None
    AREA.requires_grad_(False)


def test_the_best_threshold_lies_between_two_groups() -> None:
    scores = torch.tensor([-3.0] * 6 + [3.0] * 2, dtype=torch.float64).view(1, 1, 2, 4)
    found = [
        float(threshold_loss(scores, torch.ones(1, 1), torch.tensor([[t / 20]]))) for t in range(20)
    ]
    assert found.index(min(found)) == 10


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_area(grid: tuple[int, int], labels: str, kind: str) -> None:
    present, valid = _labels(labels), _valid(kind, grid)
    assert_matches_oracle(
        lambda s: area_loss(s, present, AREA, valid),
        lambda s: oracle.area_loss(s, present, AREA, valid),
        _scores(grid),
    )


@pytest.mark.parametrize("area", [0.0, 1.0])
@pytest.mark.parametrize("score", [-500.0, 500.0])
def test_area_at_the_ends_is_finite(area: float, score: float) -> None:
    scores = torch.full((2, 3, 2, 2), score, requires_grad=True)
    loss = area_loss(scores, _labels("all"), torch.full((2, 3), area))
    loss.backward()
    assert loss.isfinite()
    assert loss > -1e-6
    assert (float(loss) < 1e-3) == ((area == 1) == (score > 0))
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("area", [0.0, 0.3, 0.5, 1.0, "own"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_area_threshold(grid: tuple[int, int], area: float | str, kind: str) -> None:
    areas = AREA if area == "own" else torch.full((2, 3), float(area))
    valid, scores = _valid(kind, grid), _scores(grid).requires_grad_()
    found = area_threshold(scores, areas, valid)
    assert not found.requires_grad
    torch.testing.assert_close(found, oracle.area_threshold(scores.detach(), areas, valid))


def test_that_share_of_the_pixels_lies_above() -> None:
    scores, area = _scores((10, 10)), torch.full((2, 3), 0.25)
    above = scores.sigmoid() > area_threshold(scores, area)[:, :, None, None]
    assert (above.flatten(2).sum(-1) == 25).all()
