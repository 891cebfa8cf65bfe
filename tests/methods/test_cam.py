"""The plain classifier, and its single-stage form."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.methods.made import batch
from tests.methods.test_cosa import CLASSES
from wsss.addons import ImportanceSampling
from wsss.errors import UserError
from wsss.losses import cam2seg_loss, classification_loss
from wsss.methods import CAM
from wsss.methods.activations import own_activations
from wsss.nn import WSSSNetwork
from wsss.pseudo import cam_pseudo_label, multi_scale


def make(step: int = 10, backbone: str = "vit_tiny_patch16_224", **kwargs: Any) -> CAM:
    torch.manual_seed(0)
    vit = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64, "early_block": -2}
    cnn = {"channels": [8, 16, 16, 24], "output_stride": 8}
    network = WSSSNetwork(backbone, len(CLASSES), **(vit if "vit" in backbone else cnn))  # type: ignore[arg-type]
    method = CAM(network=network, classes=CLASSES, cam_scales=(1.0, 0.5), **kwargs)
    method._trainer = SimpleNamespace(global_step=step, max_steps=100)  # type: ignore[assignment]
    return method.train()


def test_classifier_alone() -> None:
    method = make()
    assert method.monitor == "on/cpl/miou_ms_flip"
    assert not method.evaluates_segmentation
    terms = method.step(batch()).terms
    assert set(terms) == {"cls", "cls_early"}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in method.network.decoder.parameters())
    assert all(p.grad is not None for p in method.network.classifier.parameters())


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet10t"])
class TestSingleStage:
    def test_decoder_learns_from_the_cams_of_the_weak_view(self, backbone: str) -> None:
        method = make(backbone=backbone, segment=True, threshold=0.3)
        assert method.monitor == "on/seg/miou_ms_flip"
        assert method.evaluates_segmentation
        shown = batch()
        statistics = [b.clone() for b in method.network.buffers()]
        label = method.label(
            own_activations(method.network, shown.weak, method.cam_scales, shown.labels), shown
        )
        assert method.network.training
        for before, after in zip(statistics, method.network.buffers(), strict=True):
            assert torch.equal(before, after)  # BatchNorm saw nothing
        with torch.no_grad():
            method.network.eval()
            out = multi_scale(method.network, shown.weak, (1.0, 0.5), labels=shown.labels)
            method.network.train()
        expected = cam_pseudo_label(out.cam, 0.3, shown.valid)
        assert torch.equal(label, expected)
        assert (label[~shown.valid] == 255).all()
        assert len(label.unique()) > 2

        torch.manual_seed(1)
        terms = method.step(shown).terms
        torch.manual_seed(1)
        output = method.network(shown.strong)
        torch.testing.assert_close(
            terms["c2s"], cam2seg_loss(output.seg_logits, label, balanced=True)
        )
        torch.testing.assert_close(
            terms["cls"], classification_loss(output.class_logits, shown.labels)
        )
        # The last layer of the decoder starts at 0: only it gets a gradient in the first step.
        (terms["c2s"]).backward()
        assert method.network.decoder.classifier.weight.grad.any()  # type: ignore[union-attr]

    def test_warm_up(self, backbone: str) -> None:
        method = make(step=4, backbone=backbone, segment=True, loss_warmup_steps=5)
        terms = method.step(batch()).terms
        assert terms["c2s"] == 0
        sum(terms.values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for p in method.network.decoder.parameters())
        method = make(step=5, backbone=backbone, segment=True, loss_warmup_steps=5)
        assert method.step(batch()).terms["c2s"] > 0


def test_weights() -> None:
    assert make(segment=True, c2s_weight=0.3).loss_weights() == {"c2s": 0.3}


def test_views_have_the_colours_of_the_image() -> None:
    shown = batch()
    for view, term in zip(make().step(shown).views, ("cls", "cls_early"), strict=True):
        assert view.term == term
        assert torch.equal(view.images, shown.weak)
        assert view.scores.requires_grad
        assert view.scores.shape[:2] == (2, 3)


@pytest.mark.parametrize("labels", [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]])
def test_label_edge_cases(labels: list[list[int]]) -> None:
    terms = make(segment=True).step(batch(labels=labels)).terms
    assert all(term.isfinite() for term in terms.values())


def test_pooling() -> None:
    """The mean of the features makes the mean of the CAM; the maximum does not."""
    images = torch.rand(2, 3, 48, 64)
    for pooling, equal in (("gap", True), ("gmp", False)):
        network = make(pooling=pooling).network.eval()
        output = network(images, decode=False)
        for logits, cam in (
            (output.class_logits, output.cam),
            (output.early_class_logits, output.early_cam),
        ):
            assert torch.allclose(logits, cam.mean((2, 3)), atol=1e-5) == equal
    with pytest.raises(UserError, match=r"method\.pooling='mean': choose one of gmp, gap"):
        make(pooling="mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 45}, r"method\.threshold=45: CAMs lie between 0 and 1"),
        ({"cpl_threshold": -0.1}, r"method\.cpl_threshold=-0\.1"),
        ({"eval_scales": ()}, r"method\.eval_scales=\(\): give positive factors"),
        ({"eval_scales": (1.0, -0.5)}, r"method\.eval_scales=\(1\.0, -0\.5\)"),
    ],
)
def test_settings_out_of_range_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(segment=True, **options)


def test_what_never_starts_is_told() -> None:
    method = make(segment=True, loss_warmup_steps=100, addons={"isl": ImportanceSampling()})
    with pytest.warns(
        UserWarning, match=r"method\.loss_warmup_steps=100 is not below .*=100: what"
    ):
        method.on_fit_start()
    late = {"isl": ImportanceSampling(start_step=500)}
    with pytest.warns(UserWarning, match=r"addon\.isl\.start_step=500 is not below"):
        make(addons=late).on_fit_start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(segment=True, loss_warmup_steps=99).on_fit_start()
