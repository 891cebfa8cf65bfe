"""SEAM: what a step computes, what it trains, what add-ons see."""

from __future__ import annotations

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
from wsss.losses.equivariance import equivariant_cross_loss, equivariant_loss, min_pooling_loss
from wsss.methods import SEAM
from wsss.nn.seam import SEAMNetwork
from wsss.pseudo import multi_scale

CLASSES = ("cat", "dog", "cow")
batch = partial(made_batch, height=40, width=56)
TERMS = {"cls", "cls_small", "rvmin", "rvmin_small", "er", "ecr"}


def make(**kwargs: Any) -> SEAM:
    torch.manual_seed(0)
    network = SEAMNetwork("resnet10t", 3, early_block=-2, output_stride=8, channels=[8, 8, 16, 16])
    method = SEAM(network=network, classes=CLASSES, **kwargs)
    method._trainer = SimpleNamespace(global_step=0, max_steps=100)  # type: ignore[assignment]
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return method.train()


def test_all_terms_from_their_parts() -> None:
    method, b = make(dropout=0.0, small_scale=0.5, hardest=0.3, lowest=0.4).eval(), batch()
    network = method.network
    assert isinstance(network, SEAMNetwork)

    def resize(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=(20, 28), mode="bilinear", align_corners=False)

    large, refined = network.refine(b.strong)
    small, small_refined = network.refine(resize(b.strong))
    expected = {
        "cls": classification_loss(large.cam.mean((2, 3)), b.labels),
        "cls_small": classification_loss(small.cam.mean((2, 3)), b.labels),
        "rvmin": min_pooling_loss(refined[:, 1:], b.labels, 0.4),
        "rvmin_small": min_pooling_loss(small_refined[:, 1:], b.labels, 0.4),
        "er": equivariant_loss(resize(large.cam), resize(small.cam), b.labels),
        "ecr": equivariant_cross_loss(
            resize(large.cam),
            resize(small.cam),
            resize(refined),
            resize(small_refined),
            b.labels,
            0.3,
        ),
    }
    terms = method.step(b).terms
    assert set(terms) == TERMS
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(value != 0 for value in expected.values())


def test_weights() -> None:
    weights = make().loss_weights()
    assert [weights.get(name, 1.0) for name in sorted(TERMS)] == [0.5, 0.5, 1, 1, 0.5, 0.5]


def test_what_is_trained() -> None:
    method = make()
    total(method, method.step(batch()).terms).backward()
    for name, parameter in method.network.named_parameters():
        frozen = name.startswith(("decoder", "early_classifier"))
        assert parameter.requires_grad != frozen
        assert (parameter.grad is not None) != frozen, name


def test_views_are_the_scores_of_both_scales_in_the_colours_of_the_image() -> None:
    method, b = make(small_scale=0.5, dropout=0.0).eval(), batch()
    large, small = method.step(b).views
    assert (large.cam, large.term, small.cam, small.term) == ("cam", "cls", "cam", "cls_small")
    assert large.images is b.weak
    assert small.images.shape == (2, 3, 20, 28)
    torch.testing.assert_close(small.images.mean(), b.weak.mean(), rtol=0, atol=0.01)
    network = method.network
    torch.testing.assert_close(large.scores, network(b.strong).cam)
    assert small.scores.shape == (2, 3, 3, 4)
    for view in (large, small):
        assert view.scores.requires_grad
        assert view.labels is b.labels
        assert view.valid is b.valid


def test_addons_take_each_scale_with_its_weight() -> None:
    method = make()
    step, own = method.step(batch()), method.loss_weights()
    terms, weights = dict(step.terms), dict(own)
    for addon in (ImportanceSampling(weight=0.2), FeatureSimilarity()):
        addon.add_to(step, terms, weights, own, 1.0)
    assert set(terms) == TERMS | {"isl", "isl_small", "fsl", "fsl_small"}
    assert all(term.isfinite() for term in terms.values())
    assert {name: weights[name] for name in ("cls", "cls_small", "isl", "isl_small")} == {
        "cls": 0.4,
        "cls_small": 0.4,
        "isl": pytest.approx(0.1),
        "isl_small": pytest.approx(0.1),
    }
    assert weights["fsl"] == weights["fsl_small"] == 0.5


def test_published_size_of_the_small_image() -> None:
    assert make().small_size(torch.empty(1, 3, 448, 448)) == (134, 134)
    assert make().small_size(torch.empty(1, 3, 2, 2)) == (1, 1)


@pytest.mark.parametrize(
    "labels",
    [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]],
    ids=["none", "all", "one image without"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_label_edge_cases_are_finite(labels: list[list[int]], precision: str) -> None:
    method = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = total(method, method.step(batch(labels=labels)).terms)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.network.parameters())


def test_a_constant_image_and_one_cell_are_finite() -> None:
    method, b = make(), batch(height=8, width=8)
    b.strong[:] = 0.5
    loss = total(method, method.step(b).terms)
    loss.backward()
    assert loss.isfinite()


def test_inference_takes_the_refined_cam() -> None:
    method, b = make(), batch()
    method.eval()
    network = method.network
    out = multi_scale(network, b.weak, (1.0,), flip=False, decode=False)
    refined = network(b.weak).refined_cam
    assert refined is not None
    up = F.interpolate(refined, size=(40, 56), mode="bilinear", align_corners=False)
    low, high = up.amin((2, 3), keepdim=True), up.amax((2, 3), keepdim=True)
    torch.testing.assert_close(out.cam, (up - low) / (high - low + 1e-5))


def test_defaults_are_the_published_ones() -> None:
    method = make()
    assert (method.small_scale, method.hardest, method.lowest) == (0.3, 0.2, 0.25)
    assert isinstance(method.network, SEAMNetwork)
    assert method.network.dropout.p == 0.5
    assert method.network.classifier.pooling == "gap"
    assert not method.evaluates_segmentation
    assert set(method.scores["on"].protocols) == {"cpl/miou_ms_flip"}  # type: ignore[arg-type]
    assert method.monitor == "on/cpl/miou_ms_flip"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("small_scale", 0.0),
        ("small_scale", 1.1),
        ("hardest", 0.0),
        ("lowest", 2.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_options_out_of_range(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"method\.{key}={value}"):
        make(**{key: value})
