"""Sinkhorn, affinity, random walk and mutual complementing against loops."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import unia_affinity as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.pseudo import mutual_complement, random_walk, sinkhorn, symmetric_affinity

CASES = ["attention", "unnormalised", "one_position", "constant", "sharp", "sink", "zeros", "empty"]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attention(name: str = "attention") -> Tensor:
    logits = _random(2, 5, 5) * 3
    attention = logits.softmax(2)
    if name == "unnormalised":
        attention = _random(2, 5, 5) * 40
    elif name == "one_position":
        attention = _random(2, 1, 1)
    elif name == "constant":
        attention = torch.full_like(attention, 0.2)
    elif name == "sharp":
        attention = (logits * 10).softmax(2)
    elif name == "sink":  # all attend to one position
        attention = torch.full_like(attention, 1e-6)
        attention[..., 0] = 1
    elif name == "zeros":
        attention[0, 1] = 0
        attention[1, :, 2] = 0
    elif name == "empty":
        attention[0] = 0
    return attention


def _weighted(matrix: Tensor) -> Tensor:
    """0-dim function of a matrix.

    Weights of rows plus weights of columns would have no gradient: all their sums are 1.
    """
    weight = _random(*matrix.shape, seed=3).to(matrix)
    return (matrix * weight).sum() + matrix.square().sum()


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_sinkhorn_value_and_gradient(name: str, iterations: int) -> None:
    attention = _attention(name)
    found = sinkhorn(attention, tolerance=0, max_iterations=iterations)
    expected = oracle.sinkhorn(attention, iterations)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert_matches_oracle(
        lambda a: _weighted(sinkhorn(a, 0, iterations)),
        lambda a: _weighted(oracle.sinkhorn(a, iterations)),
        attention,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinkhorn_in_low_precision(dtype: torch.dtype) -> None:
    for name in ("attention", "unnormalised"):
        assert_matches_oracle(
            lambda a: _weighted(sinkhorn(a, 0, 4)),
            lambda a: _weighted(oracle.sinkhorn(a, 4)),
            _attention(name),
            dtype,
        )


@pytest.mark.parametrize("name", CASES)
def test_sums_are_one_within_the_tolerance(name: str) -> None:
    found = sinkhorn(_attention(name), tolerance=1e-6, max_iterations=10_000)
    ones = torch.ones(found.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(found.sum(2), ones, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sum(1), ones, rtol=0, atol=1e-12)
    assert (found >= 0).all()


def test_stops_at_the_first_look_within_the_tolerance() -> None:
    """Each image on its own, every 5 iterations; never later than ``max_iterations``."""
    attention = torch.cat([_attention("sharp"), _attention("constant")[:1]])
    tolerance = 0.03
    needed = []
    for b in range(3):
        errors = {
            n: oracle.row_error(oracle.sinkhorn(attention[b : b + 1], n)[0]) for n in (5, 10, 15)
        }
        needed.append(min(n for n, error in errors.items() if error <= tolerance))
    assert needed == [10, 15, 5]
    for maximum in (100, 12):
        found = sinkhorn(attention, tolerance, maximum)
        for b, n in enumerate(needed):
            expected = oracle.sinkhorn(attention[b : b + 1], min(n, maximum))[0]
            torch.testing.assert_close(found[b], expected, rtol=1e-9, atol=1e-14)


def test_gradient_of_images_that_stop_at_different_times() -> None:
    attention = torch.cat([_attention("sharp"), _attention("constant")[:1]])
    together = value_and_gradient(lambda a: _weighted(sinkhorn(a, 1e-2)), attention)[1]
    for b in range(3):

        def alone(a: Tensor, b: int = b) -> Tensor:
            return _weighted(torch.cat([attention[:b], sinkhorn(a, 1e-2), attention[b + 1 :]]))

        gradient = value_and_gradient(alone, attention[b : b + 1])[1]
        torch.testing.assert_close(together[b], gradient[0], rtol=1e-9, atol=1e-12)


def test_defaults() -> None:
    attention = _attention("sharp")
    torch.testing.assert_close(sinkhorn(attention), sinkhorn(attention, 1e-4, 100))
    hard = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)  # converges as 1 / n
    torch.testing.assert_close(sinkhorn(hard), oracle.sinkhorn(hard, 100))


def test_rows_and_columns_of_zeros_count_as_constant() -> None:
    attention = _attention("zeros")
    filled = attention.clone()
    filled[0, 1] = 0.3
    filled[1, :, 2] = 7.0
    torch.testing.assert_close(sinkhorn(attention, 0, 40), sinkhorn(filled, 0, 40))
    torch.testing.assert_close(
        sinkhorn(_attention("empty"))[0], torch.full((5, 5), 0.2, dtype=torch.float64)
    )
    gradient = value_and_gradient(lambda a: _weighted(sinkhorn(a)), attention)[1]
    assert gradient.isfinite().all()
    below = attention - 1e-3 * (attention == 0)  # negative: as zero, and without a gradient
    torch.testing.assert_close(sinkhorn(below), sinkhorn(attention))
    gradient = value_and_gradient(lambda a: _weighted(sinkhorn(a)), below)[1]
    assert not gradient[0, 1].any()
    assert not gradient[1, :, 2].any()
    assert gradient[0, 0].any()


def test_underflowing_attention_stays_finite() -> None:
    attention = (_random(1, 6, 6) * 200).softmax(2).float()
    value, gradient = value_and_gradient(lambda a: _weighted(sinkhorn(a)), attention)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_scale_of_rows_and_columns_does_not_matter() -> None:
    attention = _attention()
    rows, columns = _random(2, 5, 1, seed=1) + 0.1, _random(2, 1, 5, seed=2) + 0.1
    found = sinkhorn(attention * rows * columns, 1e-10, 1000)
    torch.testing.assert_close(found, sinkhorn(attention, 1e-10, 1000), rtol=0, atol=1e-8)


def test_computed_in_float32_under_autocast() -> None:
    attention = _attention().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn(attention)
        (gradient,) = torch.autograd.grad(_weighted(found), attention)
    assert found.dtype == torch.float32
    value, expected = value_and_gradient(lambda a: _weighted(sinkhorn(a)), attention)
    torch.testing.assert_close(_weighted(found).detach(), value)
    torch.testing.assert_close(gradient, expected)


def test_sinkhorn_gradcheck() -> None:
    attention = (_random(2, 4, 4) + 0.1).requires_grad_()
    for options in ((0, 7), (1e-4, 100)):
        assert torch.autograd.gradcheck(lambda a, o=options: sinkhorn(a, *o), attention)
        assert torch.autograd.gradcheck(lambda a, o=options: symmetric_affinity(a, *o), attention)


def test_memory_of_the_gradient_does_not_grow_with_matrices() -> None:
    saved = []
    attention = _attention().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        sinkhorn(attention, 0, 50)
    assert sum(t.dim() == 3 for t in saved) <= 3


class _Waits(TorchDispatchMode):
    """Counts how often a value is read from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "options", "looks"),
    [("sharp", (1e-12, 50), 9), ("sharp", (0, 50), 0), ("constant", (1e-4, 100), 1)],
    ids=str,
)
def test_waits_for_the_device(name: str, options: tuple[float, int], looks: int) -> None:
    """Every 5 iterations, not at the end; the backward pass never."""
    attention = _attention(name).requires_grad_()
    with _Waits() as seen:
        sinkhorn(attention, *options).square().sum().backward()
    assert seen.count == looks


def test_input_is_left_alone() -> None:
    attention, before = _attention("zeros"), _attention("zeros")
    sinkhorn(attention)
    symmetric_affinity(attention)
    assert torch.equal(attention, before)


@pytest.mark.parametrize("name", CASES)
def test_symmetric_affinity(name: str) -> None:
    attention = _attention(name)
    found = symmetric_affinity(attention, 0, 3)
    torch.testing.assert_close(found, oracle.symmetric_affinity(attention, 3), rtol=1e-9, atol=0)
    found = symmetric_affinity(attention)
    assert torch.equal(found, found.transpose(1, 2))


def test_symmetric_affinity_passes_the_settings_on() -> None:
    attention = _attention("sharp")
    doubly = sinkhorn(attention)
    torch.testing.assert_close(symmetric_affinity(attention), (doubly + doubly.mT) / 2)
    loose = sinkhorn(attention, 0.5)
    assert not torch.allclose(loose, doubly, atol=1e-4)
    torch.testing.assert_close(symmetric_affinity(attention, 0.5), (loose + loose.mT) / 2)


@pytest.mark.parametrize("bad", [(5, 5), (1, 4, 5), (1, 1, 5, 5)])
def test_attention_that_is_not_square(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, N, N\)"):
        sinkhorn(torch.rand(bad))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tolerance": -1e-3}, "tolerance=-0.001"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"max_iterations": 0}, "max_iterations=0"),
    ],
)
def test_impossible_settings(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sinkhorn(torch.rand(1, 2, 2), **options)


# random walk

GRIDS = [(2, 3), (3, 2), (1, 5), (1, 1)]


def _walk(grid: tuple[int, int] = (2, 3)) -> tuple[Tensor, Tensor]:
    """A CAM of two images and three classes, and an affinity that is not symmetric."""
    count = grid[0] * grid[1]
    return _random(2, 3, *grid), _random(2, count, count, seed=1)


@pytest.mark.parametrize("settings", [(2.0, 1), (8.0, 4), (0.5, 2), (1.0, 0)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_random_walk(grid: tuple[int, int], settings: tuple[float, int]) -> None:
    cam, affinity = _walk(grid)
    power, iterations = settings
    torch.testing.assert_close(
        random_walk(cam, affinity, power, iterations),
        oracle.random_walk(cam, affinity, power, iterations),
        rtol=1e-9,
        atol=1e-12,
    )


def test_random_walk_defaults_are_those_of_afa() -> None:
    cam, affinity = _walk()
    torch.testing.assert_close(random_walk(cam, affinity), oracle.random_walk(cam, affinity, 2, 1))


def test_random_walk_keeps_constant_maps_and_the_range() -> None:
    cam, affinity = _walk()
    for iterations in (1, 256):
        flat = random_walk(torch.full_like(cam, 0.4), affinity, 8, iterations)
        torch.testing.assert_close(flat, torch.full_like(cam, 0.4))
    found = random_walk(cam, affinity, 8, 1).flatten(2)
    assert (found.amax(2) <= cam.flatten(2).amax(2)).all()
    assert (found.amin(2) >= cam.flatten(2).amin(2)).all()


def test_random_walk_spreads_along_the_affinity_only() -> None:
    affinity = torch.eye(6).repeat(1, 1, 1)
    affinity[0, :3, :3] = 1  # the upper row of the grid is one object
    cam = torch.zeros(1, 2, 2, 3)
    cam[0, 0, 0, 0] = 0.9
    found = random_walk(cam, affinity)
    torch.testing.assert_close(found[0, 0], torch.tensor([[0.3, 0.3, 0.3], [0.0, 0.0, 0.0]]))
    assert not found[0, 1].any()


def test_random_walk_of_small_affinities() -> None:
    """Those of 784 tokens are about 1/784; to the power 16 that is 0 in float32."""
    cam, affinity = _walk()
    expected = oracle.random_walk(cam, affinity, 16, 2)
    found = random_walk(cam.float(), affinity.float() / 784, 16, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_random_walk_without_affinity() -> None:
    cam, affinity = _walk()
    affinity[0, 2] = 0
    found = random_walk(cam, affinity)
    torch.testing.assert_close(found, oracle.random_walk(cam, affinity, 2, 1))
    assert not found[0, :, 0, 2].any()
    assert not random_walk(cam, torch.zeros_like(affinity)).any()


def test_random_walk_gradcheck() -> None:
    cam, affinity = (x[:1].clone().requires_grad_() for x in _walk())
    assert torch.autograd.gradcheck(lambda c, a: random_walk(c, a, 3, 2), (cam, affinity))


def test_random_walk_in_low_precision() -> None:
    cam, affinity = (x.bfloat16() for x in _walk())
    expected = oracle.random_walk(cam.double(), affinity.double(), 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = random_walk(cam, affinity, 2, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert random_walk(cam.double(), affinity).dtype == torch.float32


@pytest.mark.parametrize(
    ("cam", "affinity"),
    [((1, 2, 2, 3), (1, 5, 5)), ((2, 2, 2, 3), (1, 6, 6)), ((2, 2, 3), (2, 3, 3))],
)
def test_random_walk_shapes_that_do_not_fit(
    cam: tuple[int, ...], affinity: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"N = h \* w"):
        random_walk(torch.rand(cam), torch.rand(affinity))


@pytest.mark.parametrize("options", [{"power": 0.0}, {"iterations": -1}], ids=str)
def test_random_walk_impossible_settings(options: dict[str, Any]) -> None:
    cam, affinity = _walk()
    with pytest.raises(ValueError, match="=".join(str(v) for v in next(iter(options.items())))):
        random_walk(cam, affinity, **options)


# mutual complementing

TRIPLES = list(product((0, 1, 2, 255), repeat=3))


def _labels() -> list[Tensor]:
    """All 64 triples as three maps of two images."""
    return [torch.tensor(p).view(2, 4, 8) for p in zip(*TRIPLES, strict=True)]


def test_mutual_complement_of_all_triples() -> None:
    found = mutual_complement(*_labels())
    assert found.dtype == torch.int64
    assert found.shape == (2, 4, 8)
    for triple, label in zip(TRIPLES, found.flatten().tolist(), strict=True):
        assert label == oracle.mutual_complement(*triple, classes=2), triple


def test_mutual_complement_departs_from_eq_14_only_at_undecided_pixels() -> None:
    found = mutual_complement(*_labels()).flatten().tolist()
    for triple, label in zip(TRIPLES, found, strict=True):
        printed = oracle.mutual_complement(*triple, classes=2, printed=True)
        if triple[:2] == (255, 255):
            assert printed == 255 + label  # no label
        else:
            assert printed == label


def test_mutual_complement_by_hand() -> None:
    p1, p2 = torch.tensor([0, 0, 1, 2, 1, 255]), torch.tensor([3, 3, 1, 1, 0, 255])
    p3 = torch.tensor([0, 255, 2, 2, 3, 0])
    assert mutual_complement(p1, p2, p3).tolist() == [3, 3, 1, 2, 3, 0]


def test_mutual_complement_leaves_its_inputs_alone() -> None:
    labels = _labels()
    mutual_complement(*labels)
    for label, before in zip(labels, _labels(), strict=True):
        assert torch.equal(label, before)


@pytest.mark.parametrize("which", range(3))
def test_mutual_complement_shapes_that_differ(which: int) -> None:
    labels = _labels()
    labels[which] = labels[which][:1]
    with pytest.raises(ValueError, match="shapes differ"):
        mutual_complement(*labels)
