"""CoSA: what a step computes and when, schedule, moving average."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.methods.made import batch, total
from wsss.callbacks.ema import AssignmentEMA
from wsss.errors import UserError
from wsss.methods import CoSA
from wsss.methods.schedule import warmup_poly
from wsss.nn import WSSSNetwork

CLASSES = ("cat", "dog", "cow")


def make(step: int = 10, **kwargs: Any) -> CoSA:
    """A tiny CoSA as if training at optimizer step ``step``."""
    torch.manual_seed(0)
    network = WSSSNetwork("vit_tiny_patch16_224", 3, depth=3, embed_dim=24, num_heads=2)
    torch.nn.init.normal_(network.decoder.classifier.weight)  # type: ignore[union-attr,arg-type]
    options: dict[str, Any] = {"cam_scales": (1.0, 0.5), "loss_warmup_steps": 6}
    method = CoSA(network=network, classes=CLASSES, **(options | kwargs))
    method._trainer = SimpleNamespace(global_step=step, max_steps=100)  # type: ignore[assignment]
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return method.train()


def test_all_terms_and_gradients() -> None:
    method = make()
    terms = method.step(batch()).terms
    assert set(terms) == {"cls", "cls_early", "c2s", "c2s_early", "s2c", "csc"}
    total(method, terms).backward()
    assert all(p.grad is not None for p in method.network.parameters())
    assert all(p.grad is None for p in method.assignment.parameters())


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


def test_nothing_valid_is_finite() -> None:
    method = make()
    b = batch()
    b.valid[:] = False
    loss = total(method, method.step(b).terms)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("threshold", ["otsu", "gmm", "gmm_full", "min_error", 0.45])
def test_every_threshold(threshold: str | float) -> None:
    method = make(threshold=threshold)
    assert total(method, method.step(batch()).terms).isfinite()
    if isinstance(threshold, float):
        assert float(method.threshold.value) == pytest.approx(threshold)  # type: ignore[arg-type]


class TestWarmUp:
    """Classification alone, without paying for pseudo-labels nobody uses."""

    def test_assignment_network_and_decoder_do_not_run(self) -> None:
        method = make(step=0, threshold_fill_steps=2)
        ran: list[str] = []
        for name, module in (
            ("assignment", method.assignment),
            ("decoder", method.network.decoder),
        ):
            module.register_forward_hook(lambda *_, n=name: ran.append(n))
        method.step(batch())
        assert ran == []

    def test_queue_is_filled_towards_the_end(self) -> None:
        counts = {}
        for step in (3, 4, 5):
            method = make(step=step, threshold_fill_steps=2)
            method.step(batch())
            counts[step] = int(method.threshold.count)  # type: ignore[arg-type]
        assert counts == {3: 0, 4: 1, 5: 1}

    def test_decoder_has_zero_gradients(self) -> None:
        # As in the published code, whose other terms are multiplied by 0: AdamW counts the step.
        method = make(step=0)
        total(method, method.step(batch()).terms).backward()
        for parameter in method.network.decoder.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_cam_pseudo_labels_follow_the_image_labels() -> None:
    method = make()
    b = batch()
    assigned = method.assign(b)
    pseudo = method.label(assigned, method.update_thresholds(assigned, b.valid), b)
    assert set(pseudo.cpl[0].unique().tolist()) <= {0, 1}
    assert set(pseudo.cpl[1].unique().tolist()) <= {0, 2, 3, 255}
    assert (pseudo.cpl == 255).equal(~b.valid)
    assert not pseudo.spl[0, 2:].any()
    assert pseudo.weight is not None
    assert float(pseudo.weight[b.valid].mean()) == pytest.approx(1.0, rel=1e-4)
    assert not pseudo.weight[~b.valid].any()


def test_parts_switch_off() -> None:
    plain = make(raw=False)
    assigned = plain.assign(batch())
    pseudo = plain.label(assigned, plain.update_thresholds(assigned, batch().valid), batch())
    assert pseudo.weight is None
    assert make(csc_weight=0.0).loss_weights()["csc"] == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("raw_alpha", 1.0),
        ("raw_alpha", 0.0),
        ("raw_beta", -1.0),
        ("spl_temperature", 0.0),
        ("csc_temperature", 0.0),
        ("early_cam_scales", [1.5]),
        ("early_cam_scales", "first"),
        ("early_cam_scales", []),
    ],
)
def test_a_setting_out_of_range_fails_at_once(key: str, value: Any) -> None:
    """Not after the warm-up, when it would first be used."""
    with pytest.raises(UserError, match=rf"method\.{key}="):
        make(**{key: value})


@pytest.mark.parametrize("key", ["energy_scale", "energy_sigma_rgb", "energy_sigma_xy"])
def test_so_does_one_of_the_dense_energy(key: str) -> None:
    with pytest.raises(ValueError, match="dense energy"):
        make(**{key: 0.0})


@pytest.mark.parametrize(
    "settings", [{"threshold_queue": 0}, {"threshold_momentum": 1.5}, {"threshold_min": 0.95}]
)
@pytest.mark.parametrize("threshold", ["otsu", "gmm3"])
def test_so_does_one_of_the_threshold(settings: dict[str, float], threshold: str) -> None:
    with pytest.raises(ValueError, match="threshold"):
        make(threshold=threshold, raw=False, csc_weight=0.0, **settings)


@pytest.mark.parametrize("threshold", ["otsu", "gmm3", 0.45])
def test_thresholds_are_logged_as_fitted_too(threshold: str | float) -> None:
    logged: dict[str, float] = {}
    method = make(threshold=threshold, raw=False, csc_weight=0.0, threshold_momentum=0.5)
    method.log = lambda name, value, **k: logged.update({name: float(value)})  # type: ignore
    for _ in range(3):
        method.step(batch())
    for cam, estimator in (("cam", method.threshold), ("early_cam", method.early_threshold)):
        if threshold == 0.45:
            assert f"threshold/{cam}_raw" not in logged
            continue
        raw = estimator.raw[-1] if threshold == "gmm3" else estimator.raw  # type: ignore[index]
        assert logged[f"threshold/{cam}_raw"] == float(raw)  # type: ignore[arg-type]
        assert (f"threshold/{cam}_raw_low" in logged) == (threshold == "gmm3")


@pytest.mark.parametrize("detach", ["none", "feature", "classifier", "both"])
def test_detach_keeps_seg2cam_out(detach: str) -> None:
    method = make(detach=detach)
    terms = method.step(batch()).terms
    if not terms["s2c"].requires_grad:
        assert detach == "both"
        return
    terms["s2c"].backward()
    weight = method.network.classifier.weight.grad
    encoder = method.network.encoder.vit.patch_embed.proj.weight.grad
    assert (weight is not None) == (detach in ("none", "feature"))
    assert (encoder is not None) == (detach in ("none", "classifier"))


class TestMovingAverage:
    """AN <- m AN + (1 - m) ON after real optimizer steps."""

    def step(self, method: CoSA, callback: AssignmentEMA, step: int) -> None:
        trainer = SimpleNamespace(global_step=step)
        callback.on_train_batch_end(trainer, method, None, None, 0)  # type: ignore[arg-type]

    def test_arithmetic(self) -> None:
        method, callback = make(), AssignmentEMA(0.9)
        before = [p.clone() for p in method.assignment.parameters()]
        with torch.no_grad():
            for p in method.network.parameters():
                p.add_(1.0)
        self.step(method, callback, 1)
        for old, new, online in zip(
            before, method.assignment.parameters(), method.network.parameters(), strict=True
        ):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * online)

    def test_acts_once_per_optimizer_step(self) -> None:
        method, callback = make(), AssignmentEMA(0.5)
        with torch.no_grad():
            method.network.classifier.weight.add_(1.0)
        start = method.assignment.classifier.weight.clone()
        self.step(method, callback, 0)  # a micro-batch without an optimizer step
        assert torch.equal(method.assignment.classifier.weight, start)
        self.step(method, callback, 1)
        self.step(method, callback, 1)
        torch.testing.assert_close(method.assignment.classifier.weight, start + 0.5)

    def test_starts_as_a_copy_and_stays_in_eval(self) -> None:
        method = make()
        for a, b in zip(method.network.parameters(), method.assignment.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a is not b
        assert not any(m.training for m in method.assignment.modules())

    @pytest.mark.parametrize("momentum", [-0.1, 1.5])
    def test_momentum_out_of_range(self, momentum: float) -> None:
        with pytest.raises(ValueError, match=r"method\.momentum"):
            AssignmentEMA(momentum)


class TestSchedule:
    """Values stated for 1500 warm-up steps of 20 000."""

    def test_stated_values(self) -> None:
        assert 6e-5 * warmup_poly(0, 20000) == pytest.approx(6e-11)
        assert 6e-5 * warmup_poly(1499, 20000) == pytest.approx(5.996e-5, rel=1e-4)
        assert 6e-5 * warmup_poly(1500, 20000) == pytest.approx(5.593e-5, rel=1e-4)
        assert warmup_poly(20000, 20000) == 0.0

    def test_groups(self) -> None:
        method = make()
        method._trainer.max_steps = 100  # type: ignore[union-attr]
        optimizer = method.configure_optimizers()["optimizer"]
        backbone, heads = optimizer.param_groups
        assert heads["lr"] == pytest.approx(10 * backbone["lr"])
        assert backbone["weight_decay"] == heads["weight_decay"] == 0.01
        counted = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
        assert counted == sum(p.numel() for p in method.network.parameters())
