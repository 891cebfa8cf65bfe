"""Spatial-BCE: which step trains what, areas, thresholds, inference."""

from __future__ import annotations

import copy
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.methods.made import batch as made_batch
from tests.methods.made import total
from wsss.addons.feature_similarity import FeatureSimilarity
from wsss.addons.importance_sampling import ImportanceSampling
from wsss.errors import UserError
from wsss.losses import classification_loss
from wsss.losses.spatial_bce import area_loss, area_threshold, spatial_bce_loss, threshold_loss
from wsss.methods import SpatialBCE
from wsss.nn.spatial_bce import SpatialBCENetwork
from wsss.pseudo import cam_pseudo_label, multi_scale
from wsss.resize import valid_on_grid

CLASSES = ("cat", "dog", "cow")
batch = partial(made_batch, height=40, width=56)


def make(step: int = 20, **kwargs: Any) -> SpatialBCE:
    """Warm-up in steps 0 to 9; the last 2 of every 5 steps train the threshold."""
    torch.manual_seed(0)
    network = SpatialBCENetwork(
        "resnet10t", 3, early_block=-2, output_stride=8, channels=[8, 8, 16, 16]
    )
    torch.nn.init.normal_(network.threshold.weight, std=0.05)
    options: dict[str, Any] = {
        "loss_warmup_steps": 10,
        "phase_steps": 10,
        "cycle": 5,
        "threshold_steps": 2,
    }
    method = SpatialBCE(network=network, classes=CLASSES, **(options | kwargs))
    method._trainer = SimpleNamespace(global_step=step, max_steps=100)  # type: ignore[assignment]
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return method.train()


def still(step: int = 20, **kwargs: Any) -> SpatialBCE:
    """The same without the randomness of dropout."""
    method = make(step, **kwargs)
    for module in method.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return method


def test_what_steps_train() -> None:
    method, found = make(), {}
    for step in range(4, 16):
        method._trainer.global_step = step  # type: ignore[union-attr]
        found[step] = tuple(sorted(method.step(batch()).terms))
    assert found == {
        4: ("cls",),
        5: ("cls",),
        6: ("cls",),
        7: ("cls",),
        8: ("cls",),
        9: ("cls",),
        10: ("area", "cls"),
        11: ("area", "cls"),
        12: ("area", "cls"),
        13: ("area", "threshold"),
        14: ("area", "threshold"),
        15: ("area", "cls"),
    }


def test_network_steps_from_their_parts() -> None:
    method, b = still(), batch()
    method.previous.load_state_dict(method.network.state_dict())
    network = method.network
    assert isinstance(network, SpatialBCENetwork)
    step = method.step(b)
    output = network(b.strong)
    valid = valid_on_grid(b.valid, (5, 7))
    area = method.area(b)
    threshold = area_threshold(output.cam, area, valid)
    expected = spatial_bce_loss(output.cam, b.labels, threshold, valid)
    torch.testing.assert_close(step.terms["cls"], expected)
    torch.testing.assert_close(step.terms["area"], area_loss(output.cam, b.labels, area, valid))
    (view,) = step.views
    assert (view.cam, view.term) == ("cam", "cls")
    assert view.images is b.weak
    torch.testing.assert_close(view.scores, output.cam)


def test_warm_up_is_image_classification() -> None:
    method, b = still(step=5), batch()
    step = method.step(b)
    logits = method.network(b.strong).cam.mean((2, 3))
    torch.testing.assert_close(
        step.terms["cls"], classification_loss(logits, b.labels), rtol=1e-4, atol=1e-5
    )
    assert [view.term for view in step.views] == ["cls"]


@pytest.mark.parametrize("step", [13, 14])
def test_threshold_steps_from_their_parts(step: int) -> None:
    method, b = still(step), batch()
    network = method.network
    assert isinstance(network, SpatialBCENetwork)
    output = network(b.strong)
    threshold = network.threshold_logits(output.features).sigmoid()
    expected = threshold_loss(output.cam, b.labels, threshold, valid_on_grid(b.valid, (5, 7)))
    found = method.step(b)
    torch.testing.assert_close(found.terms["threshold"], expected)
    assert found.views == ()
    found.terms["threshold"].backward()
    assert network.threshold.weight.grad is not None
    assert network.threshold.weight.grad.any()
    assert network.classifier.weight.grad is not None
    assert not network.classifier.weight.grad.any()


@pytest.mark.parametrize("step", [5, 8, 11, 13, 14])
def test_every_trained_parameter_has_a_gradient(step: int) -> None:
    """DDP waits for all of them."""
    method = make(step)
    total(method, method.step(batch()).terms).backward()
    for name, parameter in method.network.named_parameters():
        frozen = name.startswith(("decoder", "early_classifier"))
        assert (parameter.grad is not None) != frozen, name
    assert all(p.grad is None for p in method.previous.parameters())
    threshold = method.network.threshold.weight.grad
    assert bool(threshold.any()) == (step in (13, 14))  # type: ignore[union-attr]


@pytest.mark.parametrize("step", [5, 10])
def test_addons_take_a_share_of_the_classification(step: int) -> None:
    method = make(step)
    made, own = method.step(batch()), method.loss_weights()
    terms, weights = dict(made.terms), dict(own)
    for addon in (ImportanceSampling(weight=0.2), FeatureSimilarity()):
        addon.add_to(made, terms, weights, own, 1.0)
    assert set(terms) == set(made.terms) | {"isl", "fsl"}
    assert all(term.isfinite() for term in terms.values())
    assert weights == own | {"cls": 0.8, "isl": 0.2, "fsl": 1.0}


def test_area_is_the_share_of_the_pseudo_label() -> None:
    method, b = make(area_scales=(1.0, 0.5), area_threshold=0.3), batch()
    network = copy.deepcopy(method.network).eval()
    network.adaptive = False
    assert network(b.weak).refined_cam is None
    out = multi_scale(network, b.weak, (1.0, 0.5), labels=b.labels, decode=False)
    label = cam_pseudo_label(out.cam, 0.3, b.valid, b.labels)
    area = method.area(b)
    for i in range(2):
        for c in range(3):
            share = float((label[i] == c + 1).sum() / b.valid[i].sum())
            assert float(area[i, c]) == pytest.approx(min(max(share, 0.01), 0.99))
    assert float(area[0, 0]) > 0.01


def test_areas_stay_in_their_range() -> None:
    area = make(area_range=(0.3, 0.31)).area(batch())
    assert area.min() == pytest.approx(0.3)
    assert area.max() <= 0.31 + 1e-6


def test_areas_come_from_the_network_as_it_was_when_the_phase_began() -> None:
    method = make(step=19)
    with torch.no_grad():
        method.network.classifier.weight.add_(1.0)
    old = method.previous.classifier.weight.clone()
    method.step(batch())
    assert torch.equal(method.previous.classifier.weight, old)
    method._trainer.global_step = 20  # type: ignore[union-attr]
    method.step(batch())
    assert torch.equal(method.previous.classifier.weight, method.network.classifier.weight)
    assert not any(module.training for module in method.previous.modules())


def test_without_adaptive_thresholds_every_step_trains_the_network() -> None:
    method = make(adaptive=False)
    assert not any(method.trains_threshold(step) for step in range(20))
    assert method.network.eval()(batch().weak).refined_cam is None
    method.train()
    total(method, method.step(batch()).terms).backward()
    trained = {n for n, p in method.network.named_parameters() if p.requires_grad}
    assert "threshold.weight" not in trained
    assert trained == {n for n, p in method.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("step", [0, 9])
def test_no_copy_during_warm_up(step: int) -> None:
    method = make(step)
    with torch.no_grad():
        method.network.classifier.weight.add_(1.0)
    method.step(batch())
    assert not torch.equal(method.previous.classifier.weight, method.network.classifier.weight)


def test_the_area_has_its_weight() -> None:
    assert make(area_weight=0.3).loss_weights() == {"area": 0.3}


@pytest.mark.parametrize(
    "labels",
    [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]],
    ids=["none", "all", "one image without"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [5, 10, 13])
def test_label_edge_cases_are_finite(labels: list[list[int]], precision: str, step: int) -> None:
    method = make(step)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = total(method, method.step(batch(labels=labels)).terms)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.network.parameters())


@pytest.mark.parametrize("step", [10, 13])
def test_one_cell_and_nothing_valid_are_finite(step: int) -> None:
    method, b = make(step), batch(height=8, width=8)
    b.valid[1] = False
    loss = total(method, method.step(b).terms)
    loss.backward()
    assert loss.isfinite()


class TestNetwork:
    """Scores with a scale, and what inference sees of them."""

    def test_scores(self) -> None:
        network = make().network.eval()
        assert isinstance(network, SpatialBCENetwork)
        images = torch.rand(2, 3, 16, 24)
        before = network(images)
        raw = network.classifier.cam(before.features)
        torch.testing.assert_close(before.cam, 10 * raw)
        torch.testing.assert_close(before.class_logits, before.cam.mean((2, 3)))
        with torch.no_grad():
            network.log_scale[1] = math.log(2.0)
        after = network(images).cam
        torch.testing.assert_close(after[:, 1], 2 * raw[:, 1])
        torch.testing.assert_close(after[:, 0], before.cam[:, 0])

    def test_refined_cam_is_half_at_the_threshold(self) -> None:
        network = make().network
        assert isinstance(network, SpatialBCENetwork)
        images = torch.rand(2, 3, 16, 24)
        assert network(images).refined_cam is None
        output = network.eval()(images)
        threshold = network.threshold_logits(output.features).sigmoid()[:, :, None, None]
        assert output.refined_cam is not None
        assert torch.equal(output.refined_cam > 0.5, output.cam.sigmoid() > threshold)
        p = output.cam.sigmoid()
        odds = p / (1 - p) * (1 - threshold) / threshold
        torch.testing.assert_close(output.refined_cam, odds / (1 + odds))

    def test_threshold_is_linear_in_the_mean_of_the_features(self) -> None:
        network = make().network
        assert isinstance(network, SpatialBCENetwork)
        features = torch.rand(2, network.encoder.dim, 3, 4)
        maps = F.conv2d(features, network.threshold.weight[:, :, None, None])
        torch.testing.assert_close(network.threshold_logits(features), maps.mean((2, 3)))

    def test_thresholds_start_at_a_half(self) -> None:
        network = SpatialBCENetwork(
            "resnet10t", 3, early_block=-2, output_stride=8, channels=[8, 8, 16, 16]
        )
        assert not network.threshold.weight.any()

    def test_heads(self) -> None:
        network = make().network
        assert isinstance(network, SpatialBCENetwork)
        heads = {id(p) for p in network.head_parameters()}
        for parameter in (
            network.log_scale,
            network.threshold.weight,
            network.classifier.weight,
        ):
            assert id(parameter) in heads
        assert not any(id(p) in heads for p in network.encoder.parameters())


def test_defaults() -> None:
    method = make()
    assert method.network.classifier.pooling == "gap"
    assert set(method.scores["on"].protocols) == {"cpl/miou_ms_flip"}  # type: ignore[arg-type]
    assert method.monitor == "on/cpl/miou_ms_flip"
    assert method.loss_weights() == {"area": 1.0}
    published = SpatialBCE(network=method.network, classes=CLASSES)
    trained = [published.trains_threshold(step) for step in range(1800, 2000)]
    assert trained == ([False] * 80 + [True] * 20) * 2
    assert not any(published.trains_threshold(step) for step in range(1764))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("phase_steps", 0),
        ("threshold_steps", -1),
        ("threshold_steps", 5),
        ("area_range", (0.0, 0.5)),
        ("area_range", (0.6, 0.5)),
        ("area_range", (0.1, 1.0)),
    ],
)
def test_options_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"method\.{key}="):
        make(**{key: value})
