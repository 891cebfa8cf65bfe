"""A tiny untrained method and images for it; curves made of invented pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.commands.conftest import TINY, compose
from wsss.analysis.collect import DYNAMIC, CheckpointAnalysis, NetworkScore, Thresholds
from wsss.analysis.counts import ConfidenceCounts
from wsss.analysis.summary import CheckpointCurves
from wsss.build import build_method, build_network
from wsss.data.batch import EvalBatch
from wsss.methods.base import Method

CLASSES = ("cat", "dog", "hen")


@pytest.fixture
def make_method() -> Callable[..., Method]:
    """Makes an untrained method of the given settings."""

    def make(*overrides: str, name: str = "cosa") -> Method:
        own = ("method.loss_warmup", "method.threshold", "experiment=")
        settings = [o for o in TINY if name == "cosa" or not o.startswith(own)]
        if name != "cosa":
            settings = ["experiment=shapes", f"method={name}", *settings]
        config = compose("train", [*settings, "data.root=nowhere", *overrides])
        torch.manual_seed(0)
        method = build_method(config, build_network(config, len(CLASSES)), CLASSES).eval()
        for parameter in method.networks()[method.network_names[0]].parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # networks that differ
        return method

    return make


@pytest.fixture
def batches() -> list[EvalBatch]:
    """Three images in two batches, masks of their own sizes with void; one image has no class."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(50, 64), (33, 40), (64, 64)]
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=generator, dtype=torch.uint8)
    values = torch.tensor([0, 0, 1, 2, 3, 255])
    masks = [values[torch.randint(0, 6, size, generator=generator)] for size in sizes]
    return [
        EvalBatch(images[:2], labels[:2], masks[:2], ["a", "b"]),
        EvalBatch(images[2:], labels[2:], masks[2:], ["c"]),
    ]


@pytest.fixture
def make_curves() -> Callable[..., CheckpointCurves]:
    """Makes the curves of invented pixels; later steps are better."""

    def make(step: int, kind: str = DYNAMIC, seed: int = 0) -> CheckpointCurves:
        generator = torch.Generator().manual_seed(seed + step)
        found = []
        for xi, number in ((0.4, 4000), (0.3, 4000), (0.4, 3000)):
            counts = ConfidenceCounts(2, xi)
            nu = torch.rand(number, generator=generator)
            right = torch.rand(number, generator=generator) < 0.3 + step / 1000 * (nu - xi).abs()
            strongest = torch.randint(0, 2, (number,), generator=generator)
            true = torch.where(nu >= xi, strongest + 1, 0)
            counts.update(nu, strongest, torch.where(right, true, (true + 1) % 3))
            found.append(counts)
        networks = [NetworkScore(step, "an", math.nan, 0.5), NetworkScore(step, "on", 0.3, 0.4)]
        thresholds = Thresholds(0.4, 0.3, kind)
        return CheckpointCurves.of(CheckpointAnalysis(step, thresholds, *found, networks))

    return make
