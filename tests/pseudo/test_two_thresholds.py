"""Low and high threshold: fixed, and from a mixture of three Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from wsss.pseudo import (
    DynamicThreshold,
    FixedThreshold,
    FixedThresholds,
    MixtureThresholds,
    make_threshold,
)


def _three_groups(count: int = 3000, seed: int = 0) -> Tensor:
    """Confidences around .2, .5 and .85, and as many near 0."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (centre + width * torch.randn(count, generator=generator)).clamp(0, 1)
        for centre, width in ((0.2, 0.03), (0.5, 0.03), (0.85, 0.03))
    ]
    return torch.cat([*parts, 0.04 * torch.rand(5 * count, generator=generator)])


def test_outer_means_of_three_groups() -> None:
    threshold = MixtureThresholds(momentum=0.0)
    low, high = threshold.update(_three_groups()).tolist()
    assert low == pytest.approx(0.2, abs=0.01)
    assert high == pytest.approx(0.85, abs=0.01)


def test_as_scikit_learn_on_the_values_themselves() -> None:
    values = _three_groups(1000, seed=1)
    kept = values[values >= 0.05].numpy()[:, None]
    mixture = GaussianMixture(
        3, means_init=np.quantile(kept, [0.1, 0.5, 0.9])[:, None], random_state=0
    ).fit(kept)
    expected = np.sort(mixture.means_[:, 0])[[0, 2]]
    found = MixtureThresholds(momentum=0.0).update(values)
    np.testing.assert_allclose(found.numpy(), expected, atol=0.01)


def test_small_values_are_left_out() -> None:
    """Without the floor the bulk near 0 would be a component of its own."""
    values = _three_groups()
    low = MixtureThresholds(momentum=0.0, floor=0.0, minimum=0.001).update(values)[0]
    assert float(low) < 0.05


def test_first_fit_counts_whole_then_it_is_smoothed() -> None:
    threshold = MixtureThresholds(queue_length=1, momentum=0.9)
    first = threshold.update(_three_groups())
    other = _three_groups() * 0.8
    second = threshold.update(other)
    expected = 0.9 * first + 0.1 * threshold.raw
    torch.testing.assert_close(second, expected)
    assert not torch.allclose(first, second)


def test_bounds() -> None:
    threshold = MixtureThresholds(minimum=0.3, maximum=0.6, momentum=0.0)
    assert threshold.update(_three_groups()).tolist() == pytest.approx([0.3, 0.6])


@pytest.mark.parametrize("values", [torch.zeros(50), torch.full((50,), 0.5), torch.zeros(0)])
def test_degenerate_leaves_it_as_it_was(values: Tensor) -> None:
    threshold = MixtureThresholds()
    assert threshold.update(values).tolist() == pytest.approx([0.25, 0.7])
    assert threshold.raw.isnan().all()
    assert not threshold.fitted
    threshold = MixtureThresholds(queue_length=1)
    kept = threshold.update(_three_groups())
    torch.testing.assert_close(threshold.update(values), kept)


def test_padding_is_left_out() -> None:
    values = _three_groups()
    padded = torch.cat([values, torch.full((9000,), 0.99)])
    valid = torch.arange(len(padded)) < len(values)
    found = MixtureThresholds(momentum=0.0).update(padded, valid)
    torch.testing.assert_close(found, MixtureThresholds(momentum=0.0).update(values))


def test_state_is_restored() -> None:
    threshold = MixtureThresholds(queue_length=3)
    threshold.update(_three_groups())
    other = MixtureThresholds(queue_length=3)
    other.load_state_dict(threshold.state_dict())
    torch.testing.assert_close(
        threshold.update(_three_groups(seed=4)), other.update(_three_groups(seed=4))
    )


@pytest.mark.parametrize("pair", [(0.0, 0.5), (0.6, 0.5), (0.5, 1.0)])
def test_fixed_pair_out_of_range(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low <= high"):
        FixedThresholds(*pair)


def test_bounds_out_of_range() -> None:
    with pytest.raises(ValueError, match="minimum"):
        MixtureThresholds(minimum=0.0)


@pytest.mark.parametrize(
    ("setting", "kind", "value"),
    [
        (0.45, FixedThreshold, [0.45]),
        ([0.25, 0.7], FixedThresholds, [0.25, 0.7]),
        ("gmm3", MixtureThresholds, [0.25, 0.7]),
        ("otsu", DynamicThreshold, [0.5]),
    ],
)
def test_make_threshold(setting: object, kind: type, value: list[float]) -> None:
    threshold = make_threshold(setting, 7, 0.2, 0.8, 0.5, 2)  # type: ignore[arg-type]
    assert type(threshold) is kind
    assert threshold.value.reshape(-1).tolist() == pytest.approx(value)
    if isinstance(threshold, DynamicThreshold | MixtureThresholds):
        found = (threshold.queue_length, threshold.minimum, threshold.maximum, threshold.momentum)
        assert (*found, threshold.stride) == (7, 0.2, 0.8, 0.5, 2)


@pytest.mark.parametrize("setting", ["otsi", [0.1, 0.2, 0.3], [0.5], 1.5, math.nan])
def test_unknown_threshold(setting: object) -> None:
    with pytest.raises(ValueError, match="threshold="):
        make_threshold(setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(("then", "now"), [(0.45, 0.6), ([0.25, 0.7], [0.3, 0.6])])
def test_a_constant_is_that_of_the_configuration(then: Any, now: Any) -> None:
    """Also after a checkpoint of another one was read."""
    mine = make_threshold(now)
    mine.load_state_dict(make_threshold(then).state_dict())
    assert torch.equal(mine.update(torch.rand(2)), torch.tensor(now))
