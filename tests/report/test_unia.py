"""Pictures of UniA: columns of the methods that have its parts, and what is in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.addons import AddOn, Affinity, Distribution
from wsss.data.batch import EvalBatch
from wsss.errors import UserError
from wsss.methods import CAM, CoSA, Supervised, UniA
from wsss.methods.base import Method
from wsss.nn import UncertaintyNeck, WSSSNetwork
from wsss.pseudo import (
    MutualRefinement,
    multi_scale,
    sinkhorn,
)
from wsss.report import pictures
from wsss.report.pictures import draw_panels, heatmap, overlay
from wsss.report.unia import (
    affinity_of,
    attention_of,
    extra_maps,
    mutual_labels,
    refinement_of,
    uncertainty_map,
)

CLASSES = ("cat", "dog", "eel")
SIZE = (32, 48)
GRID = (4, 6)
LABELS = ["P1", "P2", "P3", "P"]


def tiny_network(neck: bool = True) -> WSSSNetwork:
    torch.manual_seed(0)
    network = WSSSNetwork(
        "vit_tiny_patch16_224",
        len(CLASSES),
        early_block=-2,
        neck=UncertaintyNeck if neck else None,
        patch_size=8,
        img_size=32,
        depth=3,
        embed_dim=16,
        num_heads=2,
        drop_path_rate=0.5,
    )
    # At its start a network attends to everything alike.
    with torch.no_grad():
        for block in network.encoder.vit.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight *= 15
    return network.eval()


def tiny(
    kind: type[Method], neck: bool = True, addons: dict[str, AddOn] | None = None, **kwargs: Any
) -> Method:
    scales: dict[str, Any] = {"eval_scales": (1.0,), "cam_scales": (1.0, 0.5)}
    method = kind(network=tiny_network(neck), classes=CLASSES, addons=addons, **scales, **kwargs)
    return method.eval()


def unia(neck: bool = True, **kwargs: Any) -> Method:
    return tiny(UniA, neck, high=0.6, low=0.3, **kwargs)


def images(count: int = 2) -> Tensor:
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=SIZE, mode="bilinear")


def eval_batch() -> EvalBatch:
    return EvalBatch(
        images=images(),
        labels=torch.tensor([[1.0, 0, 1], [0, 1.0, 0]]),
        masks=[torch.zeros(20, 30, dtype=torch.int64), torch.ones(25, 30, dtype=torch.int64)],
        names=["a", "b"],
    )


# --- columns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "columns"),
    [
        (
            lambda: unia(),
            ["image", "truth", "CAM", "uncertainty", *LABELS, "CPL", "SPL", "prediction"],
        ),
        (
            lambda: unia(neck=False),
            ["image", "truth", "CAM", *LABELS, "CPL", "SPL", "prediction"],
        ),
        (
            lambda: unia(refine="par"),
            ["image", "truth", "CAM", "uncertainty", "CPL", "SPL", "prediction"],
        ),
        (
            lambda: unia(neck=False, refine="none"),
            ["image", "truth", "CAM", "CPL", "SPL", "prediction"],
        ),
        (
            lambda: unia(refine="none", addons={"affinity": Affinity()}),
            ["image", "truth", "CAM", "uncertainty", *LABELS, "CPL", "SPL", "prediction"],
        ),
        (
            lambda: tiny(CoSA, False, {"mine": Affinity()}),
            ["image", "truth", "CAM", *LABELS, "CPL", "SPL", "prediction"],
        ),
        (
            lambda: tiny(CAM, True, {"distribution": Distribution()}),
            ["image", "truth", "CAM", "uncertainty", "CPL"],
        ),
        (lambda: tiny(CAM, False), ["image", "truth", "CAM", "CPL"]),
        (lambda: tiny(Supervised), ["image", "truth", "uncertainty", "prediction"]),
    ],
)
def test_columns(method: Any, columns: list[str]) -> None:
    for row in draw_panels(method(), eval_batch()):
        assert list(row.panels) == columns
        for panel in row.panels.values():
            assert panel.shape == (*SIZE, 3)
            assert panel.dtype == np.uint8


@pytest.mark.parametrize("kind", [CAM, CoSA, Supervised])
def test_without_its_parts_nothing_runs_and_nothing_changes(
    kind: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = tiny(kind, neck=False), eval_batch()
    passes: list[int] = []
    for network in method.networks().values():
        network.register_forward_hook(lambda *_: passes.append(1))
    with_hook = draw_panels(method, batch)
    count = len(passes)
    monkeypatch.setattr(pictures, "extra_maps", lambda *_: ({}, {}))
    without = draw_panels(method, batch)
    assert len(passes) == 2 * count
    for a, b in zip(with_hook, without, strict=True):
        assert list(a.panels) == list(b.panels)
        assert all(np.array_equal(a.panels[key], b.panels[key]) for key in a.panels)


def test_the_other_columns_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = unia(), eval_batch()
    rows = draw_panels(method, batch)
    monkeypatch.setattr(pictures, "extra_maps", lambda *_: ({}, {}))
    for more, row in zip(rows, draw_panels(method, batch), strict=True):
        for key, panel in row.panels.items():
            assert np.array_equal(more.panels[key], panel), key


# --- what is in them -----------------------------------------------------------------------


def test_panels_are_of_the_network_to_deploy_and_of_the_cam_beside_them() -> None:
    method = tiny(CoSA, True, {"affinity": Affinity(high=0.6, low=0.3, blocks=(1,))})
    assert isinstance(method, CoSA)
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.zero_()  # the online network must not matter
    batch = eval_batch()
    out = multi_scale(method.assignment, batch.images, (1.0,), cam_scales=(1.0, 0.5))
    cam = out.cam * batch.labels[:, :, None, None]
    refinement = MutualRefinement(0.6, 0.3)
    labels = mutual_labels(
        method.assignment, batch.images, cam, batch.labels, refinement, blocks=(1,)
    )
    other = mutual_labels(method.assignment, batch.images, cam, batch.labels, refinement)
    assert not torch.equal(labels.p3, other.p3)
    uncertainty = uncertainty_map(method.assignment, batch.images)
    for i, row in enumerate(draw_panels(method, batch)):
        image = row.panels["image"]
        for title, label in zip(LABELS, labels, strict=True):
            assert np.array_equal(row.panels[title], overlay(image, label[i], 4)), title
        low, high = uncertainty[i].min(), uncertainty[i].max()
        stretched = (uncertainty[i] - low) / (high - low)
        assert np.abs(row.panels["uncertainty"].astype(int) - heatmap(stretched, image)).max() <= 1


def test_uncertainty_is_the_mean_over_channels_at_the_size_of_the_images() -> None:
    network, batch = tiny_network(), images()
    with torch.no_grad():
        found = network(batch).neck
    assert found is not None
    assert found.uncertainty is not None
    mean = torch.stack([sum(u) / len(u) for u in found.uncertainty])  # type: ignore[arg-type]
    expected = F.interpolate(mean[:, None], size=SIZE, mode="bilinear")[:, 0]
    result = uncertainty_map(network, batch)
    torch.testing.assert_close(result, expected)
    assert not result.requires_grad
    with pytest.raises(ValueError, match="neck=uncertainty"):
        uncertainty_map(tiny_network(neck=False), batch)


@pytest.mark.parametrize("blocks", [(-1,), (0, 2), None])
def test_affinity_by_hand(blocks: tuple[int, ...] | None) -> None:
    network, batch = tiny_network(), images()
    seen: dict[int, Tensor] = {}
    for index, block in enumerate(network.encoder.vit.blocks):  # type: ignore[union-attr, arg-type]

        def keep(module: Any, inputs: Any, out: Tensor, index: int = index) -> None:
            query, key, _ = (part.unflatten(-1, (2, 8)) for part in out.chunk(3, dim=-1))
            logits = torch.einsum("bihd,bjhd->bhij", query, key) / 8**0.5
            seen[index] = logits.softmax(-1).mean(1)[:, 1:, 1:]  # without the class token

        block.attn.qkv.register_forward_hook(keep)
    chosen: dict[str, Any] = {} if blocks is None else {"blocks": blocks}
    attention, grid = attention_of(network, batch, **chosen)
    expected = torch.stack([seen[block % 3] for block in blocks or (0, 1, 2)]).mean(0)
    assert grid == GRID
    torch.testing.assert_close(attention, expected)
    affinity, grid = affinity_of(network, batch, **chosen)
    assert grid == GRID
    scaled = sinkhorn(expected)
    torch.testing.assert_close(affinity, (scaled + scaled.mT) / 2)
    assert not affinity.requires_grad
    torch.testing.assert_close(affinity.sum(2), torch.ones(2, 24), atol=1e-3, rtol=0)


def test_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="-3 to 2"):
        affinity_of(tiny_network(), images(), (3,))


def test_labels_by_hand() -> None:
    network, batch = tiny_network(), eval_batch()
    cam = multi_scale(network, batch.images, (), cam_scales=(1.0,), decode=False).cam
    cam = cam * batch.labels[:, :, None, None]
    found = mutual_labels(network, batch.images, cam, batch.labels)

    def cut(maps: Tensor) -> Tensor:
        value, channel = maps.max(1)
        return torch.where(value >= 0.7, channel + 1, torch.where(value < 0.25, 0, 255))

    assert torch.equal(found.p1, cut(cam * (cam > 0.7)))
    affinity, grid = affinity_of(network, batch.images)
    expected = MutualRefinement()(cam, affinity, grid, batch.images, batch.labels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({tuple(label.flatten().tolist()) for label in found}) >= 3


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_evaluation_meanwhile(training: bool) -> None:
    network, batch = tiny_network(), images()
    expected = uncertainty_map(network, batch), affinity_of(network, batch)[0]
    network.train(training)
    for _ in range(3):  # stochastic depth would differ
        torch.testing.assert_close(uncertainty_map(network, batch), expected[0])
        torch.testing.assert_close(affinity_of(network, batch)[0], expected[1])
    assert network.training is training
    assert network.encoder.training is training


def test_mode_comes_back_after_an_error() -> None:
    network = tiny_network().train()
    with pytest.raises(RuntimeError):
        uncertainty_map(network, torch.rand(2, 5, 32, 32))
    assert network.training


def test_uncertainty_is_stretched_image_by_image() -> None:
    method, batch = unia(refine="none"), images()
    maps, labels = extra_maps(
        method, method.network, batch, torch.zeros(2, 3, *SIZE), torch.ones(2, 3)
    )
    assert list(maps) == ["uncertainty"]
    assert labels == {}
    shown = maps["uncertainty"]
    torch.testing.assert_close(shown.amin((1, 2)), torch.zeros(2))
    torch.testing.assert_close(shown.amax((1, 2)), torch.ones(2))


def test_refinement_is_the_method_s_own_before_an_add_on_s() -> None:
    addon = Affinity()
    both = unia(addons={"affinity": addon})
    assert isinstance(both, UniA)
    assert refinement_of(both) is both.refinement
    assert refinement_of(unia(refine="par", addons={"mine": addon})) is addon.refinement
    assert refinement_of(unia(refine="par")) is None
    assert refinement_of(tiny(CAM, addons={"d": Distribution(), "a": addon})) is addon.refinement
