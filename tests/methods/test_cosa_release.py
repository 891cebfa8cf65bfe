"""What the published code does otherwise, and the ablations: each by arguments alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.methods.made import batch, total
from tests.methods.test_cosa import make
from wsss.callbacks.ema import AssignmentEMA
from wsss.errors import UserError
from wsss.losses import dense_energy_loss, seg2cam_loss
from wsss.methods import CoSA, Supervised
from wsss.pseudo import multi_scale

PAIR: dict[str, Any] = {"threshold": [0.25, 0.7], "raw": False, "csc_weight": 0.0}
RELEASE: dict[str, Any] = {
    **PAIR,
    "cpl_softmax": True,
    "fuse": "sum",
    "early_cam_scales": [0.5],
    "energy_weight": 0.05,
    "s2c_relu": True,
    "assignment_init": "independent",
    "freeze_position": True,
}


@pytest.mark.parametrize("threshold", [[0.25, 0.7], "gmm3"], ids=str)
def test_release_terms_and_gradients(threshold: object) -> None:
    method = make(**RELEASE | {"threshold": threshold})
    terms = method.step(batch()).terms
    assert set(terms) == {"cls", "cls_early", "c2s", "c2s_early", "s2c", "energy"}
    total(method, terms).backward()
    without = [name for name, p in method.network.named_parameters() if p.grad is None]
    assert without == ["encoder.vit.pos_embed"]
    assert all(bool(term.isfinite()) for term in terms.values())


def test_pixels_in_between_are_undecided() -> None:
    method = make(**PAIR)
    b = batch()
    assigned = method.assign(b)
    pseudo = method.label(assigned, method.update_thresholds(assigned, b.valid), b)
    nu = assigned.cam.amax(1)
    between = (nu >= 0.25) & (nu < 0.7) & b.valid
    assert between.any()
    assert (pseudo.cpl[between] == 255).all()
    assert (pseudo.cpl[(nu < 0.25) & b.valid] == 0).all()
    assert (pseudo.cpl[(nu >= 0.7) & b.valid] > 0).all()


def test_sum_fusion_and_the_early_scale_that_survives() -> None:
    method, b = make(**RELEASE), batch()
    found = method.assign(b)
    everything = multi_scale(method.assignment, b.weak, (1.0, 0.5), fuse="sum", labels=b.labels)
    early = multi_scale(method.assignment, b.weak, (0.5,), fuse="sum", labels=b.labels)
    torch.testing.assert_close(found.cam, everything.cam)
    torch.testing.assert_close(found.seg_logits, everything.seg_logits)
    torch.testing.assert_close(found.early_cam, early.early_cam)
    assert not torch.allclose(found.early_cam, everything.early_cam)


def test_the_last_scale_may_be_named_as_such() -> None:
    assert make(early_cam_scales="last", cam_scales=(1.0, 0.5)).early_cam_scales == (0.5,)


def test_early_scales_must_be_among_the_cams() -> None:
    with pytest.raises(ValueError, match="early_cam_scales"):
        multi_scale(make().assignment, batch().weak, (1.0, 0.5), early_cam_scales=[1.5])


def test_energy_is_that_of_the_upsampled_softmax_and_the_weak_view() -> None:
    method, b = make(**RELEASE | {"energy_factor": 3e-7, "energy_scale": 1.0}), batch()
    assigned = method.assign(b)
    pseudo = method.label(assigned, method.update_thresholds(assigned, b.valid), b)
    output = method.network(b.strong)
    found = method.co_training(output, pseudo, b)["energy"]
    assert output.seg_logits is not None
    logits = F.interpolate(output.seg_logits, size=b.weak.shape[-2:], mode="bilinear")
    expected = dense_energy_loss(
        logits.softmax(1), b.weak * 255, pseudo.cpl, b.valid, weight=3e-7, scale=1.0
    )
    torch.testing.assert_close(found, expected)
    assert float(found.detach()) < 0


def test_independent_heads_share_the_encoder() -> None:
    method = make(assignment_init="independent")
    ours, theirs = method.network, method.assignment
    assert not torch.equal(ours.classifier.weight, theirs.classifier.weight)
    assert not torch.equal(ours.early_classifier.weight, theirs.early_classifier.weight)
    first = [next(n.decoder.parameters()) for n in (ours, theirs)]
    assert not torch.equal(*first)
    for a, b in zip(ours.encoder.parameters(), theirs.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in theirs.parameters())


def test_position_embedding_is_frozen_and_not_in_the_optimizer() -> None:
    assert make().network.encoder.vit.pos_embed.requires_grad
    method = make(freeze_position=True)
    groups = method.configure_optimizers()["optimizer"].param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert id(method.network.encoder.vit.pos_embed) not in trained


class TestGuidance:
    def target(self, source: str, **changes: Any) -> torch.Tensor | None:
        method = make(guidance=source, oracle=source in ("gt", "noise"))
        b = replace(batch(), **changes)
        assigned = method.assign(b)
        torch.manual_seed(3)
        return method.label(assigned, method.update_thresholds(assigned, b.valid), b).spl

    def test_none_leaves_the_term_out(self) -> None:
        assert self.target("none") is None
        method = make(guidance="none")
        assert set(method.step(batch()).terms) == {"cls", "cls_early", "c2s", "c2s_early", "csc"}

    def test_truth(self) -> None:
        mask = torch.zeros(2, 48, 64, dtype=torch.int64)
        mask[0, 16:32, 16:48] = 1
        mask[0, :16] = 255
        target = self.target("gt", mask=mask)
        assert target is not None
        assert target.shape == (2, 4, 3, 4)
        torch.testing.assert_close(target.sum(1), torch.ones(2, 3, 4))
        expected = torch.zeros(3, 4)
        expected[1, 1:3] = 1
        torch.testing.assert_close(target[0, 1], expected)
        assert (target[0, 0, 0] == 1).all()  # void: background
        assert (target[1, 0] == 1).all()

    def test_truth_needs_masks(self) -> None:
        with pytest.raises(UserError, match="load_masks"):
            self.target("gt")

    def test_noise_is_a_random_mask_of_what_is_present(self) -> None:
        target = self.target("noise")
        assert target is not None
        assert set(target.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(target.sum(1), torch.ones(2, 3, 4))
        assert not target[0, 2:].any()
        assert not target[1, 1].any()
        assert 0 < float(target[0, 1].mean()) < 1
        torch.testing.assert_close(self.target("noise"), target)  # a function of the seed

    @pytest.mark.parametrize("source", ["gt", "noise"])
    def test_oracles_are_refused_unless_asked_for_and_named(self, source: str) -> None:
        with pytest.raises(UserError, match=r"oracle.*method\.oracle=true"):
            make(guidance=source)
        method = make(guidance=source, oracle=True)
        b = replace(batch(), mask=torch.zeros(2, 48, 64, dtype=torch.int64))
        name = f"s2c_{source}"
        assert name in method.step(b).terms
        assert method.loss_weights()[name] == method.s2c_weight

    def test_the_target_is_what_the_loss_learns_from(self) -> None:
        method, b = make(guidance="noise", oracle=True), batch()
        assigned = method.assign(b)
        pseudo = method.label(assigned, method.update_thresholds(assigned, b.valid), b)
        output = method.network(b.strong)
        assert pseudo.spl is not None
        torch.testing.assert_close(
            method.co_training(output, pseudo, b)["s2c_noise"],
            seg2cam_loss(output.cam, pseudo.spl),
        )


def test_only_methods_that_learn_from_masks_ask_for_them() -> None:
    assert CoSA.wants_masks({"guidance": "gt"})
    assert not CoSA.wants_masks({"guidance": "spl"})
    assert not CoSA.wants_masks({})
    assert Supervised.wants_masks({})


def test_csc_that_does_not_count_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(csc_weight=0.0)
    monkeypatch.setattr(method, "_contrastive_separation", _fail)
    assert "csc" not in method.step(batch()).terms


def _fail(*_: object) -> None:
    raise AssertionError("computed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": [0.25, 0.7]}, "RAW and CSC"),
        ({"threshold": "gmm3", "csc_weight": 0.0}, "RAW and CSC"),
        ({"cpl_softmax": True}, "two thresholds"),
        ({"guidance": "truth"}, "choose one of spl, none, gt, noise"),
        ({"fuse": "mean"}, "choose one of max, sum"),
        ({"assignment_init": "random"}, "choose one of copy, independent"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize("labels", [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]], ids=str)
def test_release_edge_cases_are_finite(labels: list[list[int]]) -> None:
    method = make(**RELEASE)
    terms = method.step(batch(labels=labels)).terms
    total(method, terms).backward()
    assert all(bool(term.isfinite()) for term in terms.values())


def test_nothing_valid_is_finite() -> None:
    method, b = make(**RELEASE), batch()
    terms = method.step(replace(b, valid=torch.zeros_like(b.valid))).terms
    assert all(bool(term.isfinite()) for term in terms.values())


def test_momentum_zero_is_no_swapping() -> None:
    """SA off: labels come from ON's own weights."""
    method = make(momentum=0.0)
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(0.1)
    trainer = SimpleNamespace(global_step=1)
    AssignmentEMA(0.0).on_train_batch_end(trainer, method, None, None, 0)  # type: ignore[arg-type]
    for a, b in zip(method.network.parameters(), method.assignment.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_early_cam_has_a_threshold_of_its_own() -> None:
    method = make(**PAIR | {"early_threshold": [0.1, 0.9]})
    b = batch()
    assigned = method.assign(b)
    pseudo = method.label(assigned, method.update_thresholds(assigned, b.valid), b)
    for cam, label, (low, high) in (
        (assigned.cam, pseudo.cpl, (0.25, 0.7)),
        (assigned.early_cam, pseudo.early_cpl, (0.1, 0.9)),
    ):
        nu = cam.amax(1)
        assert torch.equal((label == 0) & b.valid, (nu < low) & b.valid)
        assert torch.equal((label == 255) & b.valid, (nu >= low) & (nu < high) & b.valid)
    with pytest.raises(UserError, match="give both one threshold, or both two"):
        make(**PAIR | {"early_threshold": 0.4})
