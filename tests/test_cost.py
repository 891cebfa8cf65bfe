"""benchmarks/cost.py: it counts the bytes and the operations that there are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import cost

    yield cost
    for name in ("cost", "noise"):
        sys.modules.pop(name, None)


def test_live_bytes_follow_the_memory_and_not_its_views(cost: ModuleType) -> None:
    with cost.LiveBytes() as live:
        x = torch.ones(MIB)
        y = x + 1
        assert live.now == 8 * MIB
        view = y[::2]
        del y
        assert live.now == 8 * MIB
        del view
        assert live.now == 4 * MIB
        x.add_(1)
        assert live.now == 4 * MIB
    assert live.peak == 8 * MIB


def test_live_bytes_see_what_backward_keeps(cost: ModuleType) -> None:
    with cost.LiveBytes() as live:
        x = torch.ones(MIB, requires_grad=True)
        total = x.exp().exp().sum()
        assert live.now == 12 * MIB + 4  # both exponentials are needed again
        total.backward()
        del total
        assert live.now == 8 * MIB  # the tensor and its gradient


def test_operations_of_fused_attention(cost: ModuleType) -> None:
    q = torch.randn(2, 3, 100, 64, requires_grad=True)
    forward = 2 * (2 * 2 * 3 * 100 * 100 * 64)  # two products, each element a product and a sum
    with FlopCounterMode(display=False, custom_mapping=cost.CPU_ATTENTION) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    # Backward has four products, and computes the first of forward again.
    assert counter.get_total_flops() == forward * 7 // 2


def test_a_line_goes_on(cost: ModuleType) -> None:
    assert cost.carry_on(7.0, 9.0, 16) == 7 + 2 * 14
    assert cost.carry_on(7.0, 9.0, 3) == 9


def test_a_small_experiment(cost: ModuleType) -> None:
    cfg = cost.settings("cosa_shapes")
    cfg.view.crop_size = 48
    work, peak = cost.measure(cfg, 3, 2)
    parameters = sum(p.numel() for p in cost.build(cfg, 3).network.parameters())
    # Online and averaged weights, gradients, and AdamW's two moments.
    assert peak > 4 * 5 * parameters
    twice, _ = cost.measure(cfg, 3, 4)
    assert twice == pytest.approx(2 * work)


@pytest.mark.parametrize("experiment", ["cosa_shapes", "unia_shapes", "seam_shapes"])
def test_noise_in_place_of_products_costs_the_same(cost: ModuleType, experiment: str) -> None:
    cfg = cost.settings(experiment)
    cfg.view.crop_size = 48
    work, peak = cost.measure(cfg, 3, 2)
    true_work, true_peak = cost.measure(cfg, 3, 2, skip=False)
    assert work == true_work > 0
    assert peak == pytest.approx(true_peak, rel=0.05)
