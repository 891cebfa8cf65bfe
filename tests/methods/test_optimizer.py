"""Learning rates and weight decay by parameter."""

from __future__ import annotations

import pytest
import torch

from tests.methods.test_cam import make
from wsss.errors import UserError
from wsss.methods.optimizer import make_optimizer
from wsss.nn import WSSSNetwork


def network() -> WSSSNetwork:
    vit = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}
    return WSSSNetwork("vit_tiny_patch16_224", 2, early_block=-1, **vit)


def settings(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    return {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_trained_parameter_once(name: str) -> None:
    net = network()
    net.decoder.requires_grad_(False)
    optimizer = make_optimizer(net, name, 0.1, 10.0, 0.01)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert all(group["params"] for group in optimizer.param_groups)


def test_adamw() -> None:
    net = network()
    optimizer = make_optimizer(net, "adamw", 0.1, 10.0, 0.01, (0.8, 0.9))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    found = settings(optimizer)
    heads = {id(p) for p in net.head_parameters()}
    for p in net.parameters():
        assert found[id(p)] == (1.0 if id(p) in heads else 0.1, 0.01)


def test_sgd() -> None:
    net = network()
    net.decoder = torch.nn.Conv2d(24, 3, 1)  # a head with a bias
    optimizer = make_optimizer(net, "sgd", 0.1, 10.0, 0.01, momentum=0.7)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}
    found = settings(optimizer)
    heads = {id(p) for p in net.head_parameters()}
    for name, p in net.named_parameters():
        rate = 1.0 if id(p) in heads else 0.1
        expected = (2 * rate, 0.0) if name.endswith("bias") else (rate, 0.01)
        assert found[id(p)] == pytest.approx(expected), name


def test_unknown() -> None:
    with pytest.raises(UserError, match=r"method\.optimizer='adam': choose one of adamw, sgd"):
        make(optimizer="adam")
