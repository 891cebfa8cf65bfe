"""Perplexity (eq. 4) and RAW against their oracles, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.oracle import labels as oracle
from wsss.pseudo import perplexity, reliability_weight

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
XI = [0.1, 0.37, 0.5, 0.9]
#: distances from the threshold below this may be clamped
NEAR = 1e-3


def _confidences(threshold: float) -> Tensor:
    """0, 1 and random values, none so near to the threshold that it may be clamped."""
    values = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = values[(values - threshold).abs() > 4e-3]
    return torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), values])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1.0), (0.5, 2.0), (0.99, 0.5)])
@pytest.mark.parametrize("threshold", XI)
def test_perplexity(threshold: float, alpha: float, beta: float, dtype: torch.dtype) -> None:
    values = _confidences(threshold).to(dtype)
    if dtype == torch.bfloat16:
        values = values[(values.double() - threshold).abs() > NEAR]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-3}[dtype]
    for xi in (threshold, torch.tensor(threshold)):
        # float32 rounds a threshold given as a tensor
        expected = [oracle.perplexity(v, float(xi), alpha, beta) for v in values.double().tolist()]
        found = perplexity(values, xi, alpha, beta)
        assert found.shape == values.shape
        torch.testing.assert_close(
            found.double(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("threshold", XI)
def test_finite_and_largest_on_the_threshold(
    threshold: float, beta: float, dtype: torch.dtype
) -> None:
    xi = torch.tensor(threshold, dtype=torch.float64)
    near = torch.stack([xi, xi + 1e-12, xi - 1e-12, xi + 1e-7, xi - 1e-7]).to(dtype)
    found = perplexity(near, threshold, beta=beta)
    assert found.isfinite().all()
    far = perplexity(torch.tensor([0.0, 1.0], dtype=dtype), threshold, beta=beta)
    assert found.min() > far.max()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_alpha_that_allows_a_perplexity_of_zero_is_refused(alpha: float) -> None:
    """The reciprocal of a perplexity of 0 has no bound; beyond 1 the logarithm changes sign."""
    with pytest.raises(ValueError, match="alpha"):
        perplexity(torch.tensor([0.0, 0.3, 1.0]), 0.4, alpha=alpha)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_threshold_at_the_end_stays_finite(threshold: float) -> None:
    found = perplexity(torch.tensor([0.0, 0.3, 1.0]), threshold)
    assert found.isfinite().all()
    assert reliability_weight(found).isfinite().all()


@pytest.mark.parametrize("threshold", XI)
def test_monotone_on_both_sides(threshold: float) -> None:
    """The farther from the threshold, the lower: rising below it, falling above."""
    below = perplexity(torch.linspace(0, threshold - 1e-2, 50, dtype=torch.float64), threshold)
    above = perplexity(torch.linspace(threshold + 1e-2, 1, 50, dtype=torch.float64), threshold)
    assert (below.diff() > 0).all()
    assert (above.diff() < 0).all()


def test_both_ends_cost_the_same() -> None:
    found = perplexity(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.3)
    assert found.tolist() == pytest.approx([-math.log(0.8)] * 2)


def test_threshold_and_its_mirror_agree() -> None:
    values = _confidences(0.37)
    torch.testing.assert_close(perplexity(values, 0.37), perplexity(1 - values, 0.63))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1, 1, 1)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    values = torch.full(shape, 0.8)
    assert perplexity(values, 0.5).shape == shape
    assert reliability_weight(perplexity(values, 0.5)).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_reliability_weight(masked: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    values = (0.2 + 5 * torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)).to(dtype)
    valid = torch.rand(values.shape, generator=generator) < 0.5 if masked else None
    expected = oracle.reliability_weight(
        values.double().flatten().tolist(), None if valid is None else valid.flatten().tolist()
    )
    found = reliability_weight(values, valid)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(
        found.double().flatten(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("threshold", XI)
@pytest.mark.parametrize("masked", [False, True])
def test_weights_average_one(masked: bool, threshold: float) -> None:
    generator = torch.Generator().manual_seed(4)
    confidence = torch.rand(3, 8, 6, generator=generator)
    confidence[0] = 0  # as in an image without foreground
    valid = torch.rand(confidence.shape, generator=generator) < 0.7
    weight = reliability_weight(perplexity(confidence, threshold), valid if masked else None)
    if masked:
        assert not weight[~valid].any()
        weight = weight[valid]
    assert weight.mean().item() == pytest.approx(1, abs=1e-5)
    assert (weight > 0).all()


def test_padding_does_not_change_the_weights() -> None:
    inside = 0.3 + torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(5))
    padded = torch.nn.functional.pad(inside, (0, 3), value=0.01)
    valid = torch.arange(8).lt(5).expand(2, 4, 8)
    torch.testing.assert_close(
        reliability_weight(padded, valid)[..., :5], reliability_weight(inside)
    )


def test_equal_perplexities_weigh_one() -> None:
    torch.testing.assert_close(reliability_weight(torch.full((2, 3), 4.2)), torch.ones(2, 3))


def test_scale_of_the_perplexity_does_not_matter() -> None:
    values = 0.3 + torch.rand(50, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(reliability_weight(7 * values), reliability_weight(values))


def test_low_perplexity_weighs_more() -> None:
    weight = reliability_weight(torch.tensor([0.5, 1.0, 4.0]))
    assert (weight.diff() < 0).all()


def test_nothing_valid_weighs_nothing() -> None:
    found = reliability_weight(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(found, torch.zeros(2, 3))
