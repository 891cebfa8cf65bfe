"""The affinity head on encoders with and without stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.errors import UserError
from wsss.nn import UncertaintyNeck
from wsss.nn.affinity_net import AffinityHead, AffinityNetwork

CNN = {"backbone": "resnet10t", "output_stride": 8, "channels": [8, 8, 16, 24]}
VIT = {"backbone": "vit_tiny_patch16_224", "depth": 4, "embed_dim": 24, "num_heads": 2}
RES38 = {"backbone": "resnet38d", "width": 0.05, "freeze_bn": False, "freeze_stem": False}


def make(**options: Any) -> AffinityNetwork:
    torch.manual_seed(0)
    return AffinityNetwork(num_classes=3, **options)


def _head(network: AffinityNetwork, parts: list[Tensor]) -> Tensor:
    """1x1 convolutions as products over channels."""
    head = network.affinity_head
    embedded = []
    for layer, x in zip(head.stages, parts, strict=True):
        assert layer.bias is None
        embedded.append(F.elu(torch.einsum("oc,bchw->bohw", layer.weight[..., 0, 0], x)))
    joined = torch.cat(embedded, 1)
    assert head.common.bias is None
    return F.elu(torch.einsum("oc,bchw->bohw", head.common.weight[..., 0, 0], joined))


@pytest.mark.parametrize("options", [CNN, RES38], ids=["cnn", "resnet38d"])
def test_the_last_three_stages(options: dict[str, Any]) -> None:
    network = make(**options).eval()
    images = torch.rand(2, 3, 48, 40)
    stages = network.encoder.pyramid(images)[-3:]
    dims = [stage.shape[1] for stage in stages]
    assert [tuple(layer.weight.shape) for layer in network.affinity_head.stages] == [
        (64, dims[0], 1, 1),
        (128, dims[1], 1, 1),
        (256, dims[2], 1, 1),
    ]
    found = network.affinity_features(images)
    assert found.shape == (2, 448, 6, 5)
    torch.testing.assert_close(found, _head(network, stages), rtol=1e-4, atol=1e-4)


def test_finer_stages_are_averaged() -> None:
    network = make(**{**CNN, "output_stride": 32}).eval()
    assert network.encoder.stage_strides[-3:] == (8, 16, 32)
    images = torch.rand(1, 3, 64, 72)  # the last cells reach over the border
    stages = network.encoder.pyramid(images)[-3:]
    assert stages[0].shape[-2:] == (8, 9)
    fine = torch.stack(
        [
            torch.stack(
                [
                    stages[0][..., 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean((2, 3))
                    for x in range(3)
                ],
                -1,
            )
            for y in range(2)
        ],
        -2,
    )
    middle = F.avg_pool2d(stages[1], 2, ceil_mode=True)
    found = network.affinity_features(images)
    assert found.shape == (1, 448, 2, 3)
    expected = _head(network, [fine, middle, stages[2]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_early_and_final_features_of_a_vit() -> None:
    network = make(**VIT).eval()
    images = torch.rand(2, 3, 48, 40)
    final, early = network.encoder(images)
    found = network.affinity_features(images)
    assert found.shape == (2, 384, 3, 3)
    torch.testing.assert_close(found, _head(network, [early, final]), rtol=1e-4, atol=1e-4)


def test_heads_take_the_larger_learning_rate() -> None:
    network = make(**CNN)
    heads = {id(p) for p in network.head_parameters()}
    named = dict(network.named_parameters())
    own = {n for n in named if id(named[n]) in heads and n.startswith("affinity_head")}
    assert own == {f"affinity_head.stages.{i}.weight" for i in range(3)} | {
        "affinity_head.common.weight"
    }
    assert not any(id(p) in heads for p in network.encoder.parameters())


def test_the_size_of_fresh_weights() -> None:
    torch.manual_seed(0)
    head = AffinityHead((100, 200, 400))
    for layer, dim in zip(head.stages, (100, 200, 400), strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(
            (2 / dim) ** 0.5, rel=0.05
        )  # Kaiming
    limit = 4 * (6 / (448 + 448)) ** 0.5  # Xavier, gain 4
    assert float(head.common.weight.detach().abs().max()) == pytest.approx(limit, rel=0.01)


def test_a_neck_would_be_passed_by() -> None:
    with pytest.raises(UserError, match="Leave the neck out"):
        make(**CNN, neck=UncertaintyNeck)
