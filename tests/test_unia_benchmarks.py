"""benchmarks/unia_labels.py and unia_step.py: what they measure is what they say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.commands.conftest import compose
from wsss.build import build_method, build_network
from wsss.inference import Inference
from wsss.methods.base import Method
from wsss.nn.attention import choose_blocks

SCRIPTS = ("unia_labels", "unia_step", "memory", "noise")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def labels(scripts: None) -> ModuleType:
    return importlib.import_module("unia_labels")


def method(*settings: str) -> Method:
    cfg = compose("train", ["data.root=none", *settings])
    return build_method(cfg, build_network(cfg, 3), ("a", "b", "c")).eval()


def test_labels_are_made_with_the_runs_settings(
    labels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["method.blocks=[-1]", "method.high=0.6", "method.low=0.2", "method.walk_steps=2"]
    unia = method("experiment=unia_shapes", *own)
    (last,) = choose_blocks(unia.network.encoder, [-1])
    text = f"blocks {last}, thresholds 0.2 and 0.6, walk of power 2.0 and 2 steps, PAR at scale 0.5"
    assert labels.settings_text(unia) == text
    # PAR alone wants no attention, and has the thresholds.
    par = method("experiment=unia_shapes", "method.refine=par", "addon=none", *own)
    assert labels.settings_text(par) == text.replace(f"blocks {last}", "blocks all")
    # A method without any has the published ones.
    assert "blocks all, thresholds 0.25 and 0.7" in labels.settings_text(
        method("experiment=cam_shapes")
    )
    # They are used, not just printed.
    asked: list[object] = []
    affinity_of = labels.affinity_of

    def noted(network: object, images: object, blocks: object) -> object:
        asked.append(blocks)
        return affinity_of(network, images, blocks)

    monkeypatch.setattr(labels, "affinity_of", noted)
    batch = SimpleNamespace(
        images=torch.randint(256, (1, 3, 48, 48), dtype=torch.uint8),
        labels=torch.tensor([[1.0, 0.0, 0.0]]),
        masks=[torch.zeros(48, 48, dtype=torch.int64)],
    )
    data = SimpleNamespace(eval_batch_size=1, val_dataloader=lambda: [batch])
    counts = labels.count(Inference(unia, device="cpu"), data, False, 1)
    assert asked == [(last,)]
    assert {"CAM", "PAR", "P", "P*"} <= set(counts)
    made = labels.refinement(unia, True)
    assert (made.high, made.low, made.walk_steps, made.renormalise) == (0.6, 0.2, 2, True)


def test_affinities_are_means_over_pairs_of_cells(
    labels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    unia = method("experiment=unia_shapes")
    truth = torch.tensor([[0, 0, 255], [1, 1, 2]])
    values = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(labels, "affinity_of", lambda *_: (values, (2, 3)))
    batch = SimpleNamespace(
        images=torch.zeros(2, 3, 32, 48, dtype=torch.uint8),
        masks=[truth.repeat_interleave(11, 0).repeat_interleave(7, 1), truth],
    )
    data = SimpleNamespace(eval_batch_size=2, val_dataloader=lambda: [batch])
    inference = SimpleNamespace(network=unia.network, device="cpu")
    for images in (1, 2):
        sums: dict[tuple[bool, bool], list[float]] = {}
        for image in range(images):
            for i, j in ((i, j) for i in range(6) for j in range(6) if i != j):
                a, b = int(truth.flatten()[i]), int(truth.flatten()[j])
                if 255 not in (a, b):
                    sums.setdefault((a > 0, a == b), []).append(6 * float(values[image, i, j]))
        order = [(True, True), (True, False), (False, True), (False, False)]
        expected = [sum(sums[kind]) / len(sums[kind]) for kind in order]
        made = labels.affinities(inference, data, images)
        assert list(made) == ["0", "1", "2", "3", "all"]
        for value in made.values():
            assert value == pytest.approx(expected)


def test_a_variant_leaves_only_its_weights(scripts: None) -> None:
    """What else it left would count as the memory of the variant whose turn is next."""
    step = importlib.import_module("unia_step")
    arguments = SimpleNamespace(device="cpu", experiment="unia_shapes", classes=3, precision="fp32")
    made = step.build("base", arguments)
    batch = step.noise(1, 48, 3, "cpu")
    weights = sum(4 * p.numel() for p in made.parameters())
    assert weights <= step.held(made) < 1.1 * weights
    assert step.run(made, batch, arguments) > 0
    assert all(p.grad is None for p in made.parameters())
