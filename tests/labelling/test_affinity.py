"""A run of AffinityNet spreads scores as its features say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.commands.conftest import compose
from tests.oracle import pixel_affinity as oracle
from wsss.build import build_method, build_network
from wsss.data.views import resize_image
from wsss.labelling.affinity import AffinityRun
from wsss.methods import AffinityNet
from wsss.nn.affinity_net import AffinityNetwork

CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AffinityNet]:
    overrides = ["experiment=affinity_net_shapes", "data.root=/data", "data.eval_size=40"]
    overrides += ["backbone.options.channels=[8,8,8,8]", "method.radius=3"]
    config = compose("train", overrides)
    torch.manual_seed(0)
    method = build_method(config, build_network(config, len(CLASSES)), CLASSES)
    assert isinstance(method, AffinityNet)
    method.network.affinity_head.common.weight.data /= 3  # type: ignore[union-attr,operator]
    content: dict[str, Any] = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(content)
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    torch.save(content, path)
    return path, method


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("beta", "logt"), [(8.0, 6), (3.0, 1), (8.0, 0)], ids=str)
def test_spread(saved: tuple[Path, AffinityNet], beta: float, logt: int) -> None:
    path, method = saved
    run = AffinityRun(str(path), CLASSES, torch.device("cpu"), beta, logt)
    image = (_random(50, 70, 3) * 255).to(torch.uint8)
    scores = _random(3, 20, 30, seed=1)
    found = run.spread(scores, image)
    assert (found.shape, found.dtype) == ((3, 5, 5), torch.float32)
    pixels = torch.from_numpy(resize_image(image.numpy(), 40, 40)).permute(2, 0, 1)[None] / 255
    network = method.eval().network
    assert isinstance(network, AffinityNetwork)
    with torch.no_grad():
        features = network.affinity_features(pixels)[0].double()
    averaged = oracle.block_mean(scores, (5, 5))
    expected = oracle.walk(averaged, features, 3, beta, logt)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (expected - averaged).abs().max() > 1e-3  # the walk does something
    assert run.settings().keys() == {"affinity_sha256", "affinity_beta", "affinity_logt"}


def test_published_defaults(saved: tuple[Path, AffinityNet]) -> None:
    run = AffinityRun(str(saved[0]), CLASSES, torch.device("cpu"))
    assert (run.beta, run.logt, run.radius, run.size) == (8.0, 6, 3, 40)
    config = compose("pseudo_label", [])
    assert (config.affinity_beta, config.affinity_logt) == (8, 6)
    method = compose("train", ["experiment=affinity_net_voc", "data.root=/data"]).method
    assert (method.radius, method.lr, method.head_lr_factor) == (5, 0.01, 10)
    assert (method.optimizer, method.weight_decay, method.power) == ("sgd", 5e-4, 0.9)
