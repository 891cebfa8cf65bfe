"""UniA: what a step computes and when, its labels, and what add-ons see."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.made import batch, total
from tests.methods.test_cosa import CLASSES
from tests.oracle import labels as label_oracle
from tests.oracle import unia_affinity as affinity_oracle
from wsss.addons import Affinity, Distribution, FeatureSimilarity
from wsss.errors import UserError
from wsss.losses import (
    cam2seg_loss,
    classification_loss,
    contrastive_affinity_loss,
    dense_energy_loss,
    distribution_loss,
)
from wsss.methods import UniA
from wsss.nn import NetworkOutput, UncertaintyNeck, WSSSNetwork
from wsss.pseudo import MultiScaleOutput, MutualRefinement, multi_scale, symmetric_affinity
from wsss.resize import cell_centres

VIT: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 64, "patch_size": 8}
#: thresholds at which all labels of the made batch have classes, background and 255
SOON: dict[str, Any] = {"aux_steps": 20, "loss_warmup_steps": 4, "high": 0.6, "low": 0.3}


def make(
    step: int = 10, neck: Any = UncertaintyNeck, network: WSSSNetwork | None = None, **kwargs: Any
) -> UniA:
    """A tiny UniA as if training at optimizer step ``step``."""
    torch.manual_seed(0)
    if network is None:
        network = WSSSNetwork("vit_tiny_patch16_224", len(CLASSES), neck=neck, **VIT)
        for block in network.encoder.vit.blocks:  # type: ignore[union-attr]
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)  # attention that is not all alike
        torch.nn.init.normal_(network.decoder.classifier.weight)  # type: ignore[union-attr,arg-type]
    options = {"cam_scales": (1.0, 0.5), **SOON}
    method = UniA(network=network, classes=CLASSES, **(options | kwargs))
    at(method, step)
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return method.train()


def at(method: UniA, step: int) -> UniA:
    method._trainer = SimpleNamespace(global_step=step, max_steps=100)  # type: ignore[assignment]
    return method


def own(method: UniA) -> tuple[NetworkOutput, MultiScaleOutput]:
    """The pass on the strong view, and the activations of the weak one, as a step makes them."""
    b = batch()
    method.network.eval()
    with torch.no_grad():
        activations = multi_scale(method.network, b.weak, method.cam_scales, labels=b.labels)
    method.network.train()
    return method.network(b.strong), activations


class TestTerms:
    def test_each_is_its_loss_on_the_methods_own_outputs(self) -> None:
        method, b = make(), batch()
        terms = method.step(b).terms
        assert set(terms) == {"cls", "cls_early", "token", "seg", "energy"}
        output, activations = own(method)
        assert output.seg_logits is not None
        assert output.attention is not None
        for name, logits in (
            ("cls", output.class_logits),
            ("cls_early", output.early_class_logits),
        ):
            torch.testing.assert_close(terms[name], classification_loss(logits, b.labels))

        affinity = symmetric_affinity(output.attention.detach())
        refinement = MutualRefinement(high=0.6, low=0.3)
        label = refinement(activations.early_cam, affinity, (6, 8), b.weak, b.labels, b.valid).label
        assert {0, 255} < set(label.unique().tolist())
        torch.testing.assert_close(
            terms["seg"], cam2seg_loss(output.seg_logits, label, balanced=True)
        )
        probabilities = F.interpolate(
            output.seg_logits, size=(48, 64), mode="bilinear", align_corners=False
        ).softmax(1)
        energy = dense_energy_loss(
            probabilities, b.weak * 255, label, b.valid, 1e-7, 15.0, 100.0, 0.5
        )
        torch.testing.assert_close(terms["energy"], energy)
        assert energy < 0

        # Token contrast, by the loops: of what comes before the neck, by the early CAM.
        tokens = method.token_label(activations, b, output.cam)
        expected = affinity_oracle.token_contrast(output.tokens.double(), tokens)  # type: ignore[union-attr]
        torch.testing.assert_close(terms["token"].double(), expected, rtol=1e-4, atol=1e-6)
        other = affinity_oracle.token_contrast(output.features.double(), tokens)
        assert (other - expected).abs() > 1e-3

    def test_options_reach_the_losses(self) -> None:
        base = make(aux_steps=0).step(batch()).terms
        for options, changed in (
            ({"balanced": False}, {"seg"}),
            ({"energy_scale": 0.25}, {"energy"}),
            ({"energy_sigma_rgb": 60.0}, {"energy"}),
            ({"energy_sigma_xy": 5.0}, {"energy"}),
            ({"energy_factor": 2e-7}, {"energy"}),
            ({"cam_scales": (1.0,)}, {"seg", "token", "energy"}),
        ):
            terms = make(aux_steps=0, **options).step(batch()).terms  # type: ignore[arg-type]
            found = {name for name in terms if not torch.allclose(terms[name], base[name])}
            assert found == changed, options

    def test_weights(self) -> None:
        weights = make(seg_weight=0.2, token_weight=0.5, energy_weight=0.1).loss_weights()
        assert weights == {"seg": 0.2, "token": 0.5, "energy": 0.1}

    def test_what_does_not_count_is_not_computed(self) -> None:
        terms = make(token_weight=0, energy_weight=0).step(batch()).terms
        assert set(terms) == {"cls", "cls_early", "seg"}
        assert set(make(step=0, token_weight=0).step(batch()).terms) == {"cls", "cls_early", "seg"}

    def test_labels_are_of_the_weak_view(self) -> None:
        """The strong view has other colours; what is trained on is the strong one."""
        b = batch()
        shown = replace(b, strong=torch.flip(b.strong, (1,)) * 0.5)
        method = make()
        base, terms = method.step(b), method.step(shown)
        assert torch.equal(base.views[0].activations, terms.views[0].activations)
        assert torch.equal(base.views[0].images, terms.views[0].images)
        assert not torch.allclose(base.terms["cls"], terms.terms["cls"])

    @pytest.mark.parametrize(
        ("refine", "precision"), [("mutual", "fp32"), ("mutual", "bf16"), ("par", "fp32")]
    )
    @pytest.mark.parametrize(
        "labels",
        [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]],
        ids=["none", "all", "one image without"],
    )
    def test_label_edge_cases_are_finite(
        self, labels: list[list[int]], precision: str, refine: str
    ) -> None:
        addons = {"distribution": Distribution(), "affinity": Affinity(log=True)}
        method = make(refine=refine, addons=addons)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            terms, _ = method.with_addons(method.step(batch(labels=labels)))
            loss = total(method, terms)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.network.parameters())

    def test_nothing_valid_is_finite(self) -> None:
        b = batch()
        b.valid[:] = False
        method = make(addons={"distribution": Distribution(), "affinity": Affinity()})
        terms, _ = method.with_addons(method.step(b))
        total(method, terms).backward()
        assert all(term.isfinite() for term in terms.values())
        assert terms["seg"] == terms["energy"] == terms["affinity"] == 0
        assert terms["token"] == 0.5


class TestSchedule:
    @pytest.mark.parametrize("warmup", [0, 4])
    def test_aux_to_final_at_the_exact_step(self, warmup: int) -> None:
        method = make(loss_warmup_steps=warmup, aux_steps=7)
        _, activations = own(method)
        for step, early in ((0, True), (6, True), (7, False), (50, False)):
            cam = method.label_cam(activations) if at(method, step) else None
            assert cam is (activations.early_cam if early else activations.cam), step
            made = method.step(batch())
            assert made.views[0].activations is not None
            expected = activations.early_cam if early else activations.cam
            torch.testing.assert_close(made.views[0].activations, expected)
        assert not torch.allclose(activations.early_cam, activations.cam)

    def test_label_follows_the_switch(self) -> None:
        method = make(refine="none", aux_steps=7)
        output, activations = own(method)
        b = batch()
        for step, cam in ((6, activations.early_cam), (7, activations.cam)):
            label = at(method, step).label(activations, None, output, b)
            assert torch.equal(label, label_oracle.two_threshold(cam, 0.3, 0.6, b.valid))
            torch.testing.assert_close(
                method.step(b).terms["seg"], cam2seg_loss(output.seg_logits, label, balanced=True)
            )

    def test_warm_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        method = make(step=3)
        calls: list[int] = []
        decoder = type(method.network.decoder)
        forward = decoder.forward
        monkeypatch.setattr(decoder, "forward", lambda s, x: calls.append(1) or forward(s, x))
        terms = method.step(batch()).terms
        assert set(terms) == {"cls", "cls_early", "token", "seg"}
        assert terms["seg"] == 0
        assert not calls
        terms = at(method, 4).step(batch()).terms
        assert set(terms) == {"cls", "cls_early", "token", "seg", "energy"}
        assert terms["seg"] > 0
        assert len(calls) == 1

    @pytest.mark.parametrize("aux_steps", [0, 100])
    def test_tokens_have_the_label_of_the_early_cam_whatever_the_step(self, aux_steps: int) -> None:
        method, b = make(aux_steps=aux_steps, refine="none"), batch()
        output, activations = own(method)
        small = F.interpolate(activations.early_cam, (6, 8), mode="bilinear", align_corners=False)
        valid = torch.ones(2, 6, 8, dtype=torch.bool)
        valid[1, :, :2] = False
        expected = label_oracle.two_threshold(small, 0.3, 0.6, valid)
        assert output.tokens is not None
        found = method.token_label(activations, b, output.tokens)
        assert torch.equal(found, expected)
        assert {0, 255} < set(found.unique().tolist())
        wanted = affinity_oracle.token_contrast(output.tokens.double(), expected)
        for step in (0, 10):
            term = at(method, step).step(b).terms["token"]
            torch.testing.assert_close(term.double(), wanted, rtol=1e-4, atol=1e-6)


class TestRefinement:
    def found(self, step: int = 10, **options: Any) -> tuple[UniA, Tensor, bool, Tensor]:
        """The method, its label, whether add-ons are shown it, and its activations."""
        method = make(step, **options)
        output, activations = own(method)
        shown = method.step(batch()).views[0]
        label = method.label(activations, shown.affinity, output, batch())
        mutual = shown.label is not None
        assert not mutual or torch.equal(shown.label, label)  # type: ignore[arg-type]
        assert label[1, :, :16].eq(255).all()  # padding
        return method, label, mutual, activations.early_cam

    def test_mutual(self) -> None:
        options = {"walk_power": 4.0, "walk_steps": 2, "renormalise": True, "par_scale": 1.0}
        for chosen in ({}, options):
            method, label, mutual, cam = self.found(**chosen)
            output, _ = own(method)
            assert output.attention is not None
            affinity = symmetric_affinity(output.attention.detach())
            b = batch()
            refinement = MutualRefinement(high=0.6, low=0.3, **chosen)  # type: ignore[arg-type]
            labels = refinement(cam, affinity, (6, 8), b.weak, b.labels, b.valid)
            assert mutual
            assert torch.equal(label, labels.label)
            assert not torch.equal(label, labels.p2)

    def test_par(self) -> None:
        method, label, mutual, cam = self.found(refine="par")
        b = batch()
        expected = MutualRefinement(0.6, 0.3).label(cam, b.weak, b.labels, b.valid)
        assert torch.equal(label, expected)
        assert not mutual
        assert method.network.wanted_attention == ()
        assert method.step(b).views[0].affinity is None

    def test_none(self) -> None:
        method, label, mutual, cam = self.found(refine="none")
        assert torch.equal(label, label_oracle.two_threshold(cam, 0.3, 0.6, batch().valid))
        assert not mutual
        assert method.network.wanted_attention == ()

    def test_the_three_differ(self) -> None:
        labels = [self.found(refine=r)[1] for r in ("mutual", "par", "none")]
        assert not torch.equal(labels[0], labels[1])
        assert not torch.equal(labels[1], labels[2])
        assert not torch.equal(labels[0], labels[2])

    def test_start_step(self) -> None:
        """Refinement alone before, exactly."""
        _, par, _, _ = self.found(refine="par")
        for step, mutual in ((8, False), (9, True)):
            method, label, is_mutual, _ = self.found(step, refine_start_step=9)
            assert is_mutual == mutual
            assert torch.equal(label, par) != mutual
            view = method.step(batch()).views[0]
            assert (view.label is not None) == mutual
            assert (view.affinity is not None) == mutual

    def test_blocks(self) -> None:
        assert make(blocks=(0, -1)).network.wanted_attention == (0, 2)
        assert make().network.wanted_attention == (0, 1, 2)

    @pytest.mark.parametrize("key", ["energy_scale", "energy_sigma_rgb", "energy_sigma_xy"])
    def test_a_dense_energy_that_cannot_be_fails_at_once(self, key: str) -> None:
        with pytest.raises(ValueError, match="dense energy"):
            make(**{key: 0.0})

    def test_on_a_cnn(self) -> None:
        options = {"channels": [8, 8, 16, 24], "output_stride": 8, "early_block": -2}
        network = WSSSNetwork("resnet10t", len(CLASSES), **options)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"backbone\.name='resnet10t'.*plain ViT"):
            make(network=network)
        terms = make(network=network, refine="par").step(batch()).terms
        assert terms["seg"] > 0


class TestViews:
    def test_carry_what_the_step_made(self) -> None:
        method, b = make(aux_steps=0), batch()
        made = method.step(b)
        output, activations = own(method)
        assert output.attention is not None
        final, early = made.views
        assert (final.cam, final.term, early.cam, early.term) == (
            "cam",
            "cls",
            "early_cam",
            "cls_early",
        )
        torch.testing.assert_close(final.scores, output.cam)
        torch.testing.assert_close(early.scores, output.early_cam)
        assert final.images is b.weak
        assert final.output is early.output
        torch.testing.assert_close(final.output.features, output.features)  # type: ignore[union-attr]
        torch.testing.assert_close(final.activations, activations.cam)
        torch.testing.assert_close(early.activations, activations.early_cam)
        affinity = symmetric_affinity(output.attention)
        torch.testing.assert_close(final.affinity, affinity)
        assert final.affinity.requires_grad  # type: ignore[union-attr]
        label = method.label(activations, affinity, output, b)
        assert torch.equal(final.label, label)
        assert early.affinity is None
        assert early.label is None

    def test_final_cam_has_the_activations_that_labels_come_from(self) -> None:
        made = make(aux_steps=100).step(batch())
        assert torch.equal(made.views[0].activations, made.views[1].activations)

    def test_in_warm_up(self) -> None:
        method = make(step=0)
        final, early = method.step(batch()).views
        assert final.affinity is final.label is None
        _, activations = own(method)
        torch.testing.assert_close(final.activations, activations.early_cam)
        torch.testing.assert_close(early.activations, activations.early_cam)
        assert final.output.attention is not None  # type: ignore[union-attr]

    def test_a_label_that_is_not_mutually_refined_is_kept_back(self) -> None:
        for refine in ("par", "none"):
            final, _ = make(refine=refine, addons={"affinity": Affinity()}).step(batch()).views
            assert final.label is None
            assert final.affinity is None
            assert final.output.attention is not None  # type: ignore[union-attr]

    def test_mode_is_restored(self) -> None:
        method = make()
        for step in (0, 10):
            at(method, step).step(batch())
            assert all(module.training for module in method.network.modules())
        method.network.eval()
        at(method, 0).step(batch())
        assert not any(module.training for module in method.network.modules())

    def test_activations_are_those_of_evaluation(self) -> None:
        """No stochastic depth in what becomes a label."""
        torch.manual_seed(0)
        network = WSSSNetwork(
            "vit_tiny_patch16_224", len(CLASSES), neck=UncertaintyNeck, **VIT, drop_path_rate=0.5
        )
        method = make(network=network)
        first, second = (method.step(batch()) for _ in range(2))
        assert torch.equal(first.views[0].activations, second.views[0].activations)
        assert not torch.equal(first.views[0].scores, second.views[0].scores)


class TestAddOns:
    def test_are_their_losses_on_what_the_step_made(self) -> None:
        addons = {
            "distribution": Distribution(num_samples=0, threshold=0.6),
            "affinity": Affinity(),  # whose own label would be of 0.7
        }
        method, b = make(addons=addons), batch()
        made = method.step(b)
        terms, weights = method.with_addons(made)
        assert set(terms) == {
            *("cls", "cls_early", "token", "seg", "energy"),
            *("distribution", "affinity"),
        }
        assert {k: weights[k] for k in addons} == {"distribution": 0.1, "affinity": 0.1}
        output, activations = own(method)
        assert output.neck is not None
        assert output.attention is not None
        expected = distribution_loss(
            output.neck.mu,  # type: ignore[arg-type]
            output.neck.sigma,  # type: ignore[arg-type]
            activations.early_cam,
            0.6,
            0,
            valid=b.valid,
        )
        torch.testing.assert_close(terms["distribution"], expected)
        affinity = symmetric_affinity(output.attention)
        label = method.label(activations, affinity, output, b)
        torch.testing.assert_close(
            terms["affinity"], contrastive_affinity_loss(affinity, cell_centres(label, (6, 8)), 0.5)
        )

    @pytest.mark.parametrize("start", [0, 8])
    @pytest.mark.parametrize(
        ("neck", "names"),
        [
            (None, ()),
            (None, ("affinity",)),
            (UncertaintyNeck, ()),
            (UncertaintyNeck, ("distribution",)),
            (UncertaintyNeck, ("affinity",)),
            (UncertaintyNeck, ("distribution", "affinity")),
        ],
        ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
    )
    def test_every_trained_parameter_has_a_gradient(
        self, neck: Any, names: tuple[str, ...], start: int
    ) -> None:
        """As DDP wants it: zero perhaps, in warm-up, but there."""
        kinds: dict[str, Any] = {"distribution": Distribution, "affinity": Affinity}
        addons = {name: kinds[name](start_step=start) for name in names}
        method = make(neck=neck, refine="mutual" if start else "none", addons=addons)
        for step in (3, 10):
            method.zero_grad()
            terms, weights = method.with_addons(at(method, step).step(batch()))
            torch.stack([weights.get(k, 1.0) * v for k, v in terms.items()]).sum().backward()
            assert set(addons) & set(terms) == (set(addons) if step >= start else set())
            for name, parameter in method.network.named_parameters():
                assert parameter.grad is not None, (step, name)
                if step == 3 and name.startswith("decoder"):
                    assert not parameter.grad.any(), name

    @pytest.mark.parametrize(
        ("options", "starts", "reads"),
        [
            ({"refine_start_step": 9}, (), (False, False, True)),
            ({"refine_start_step": 2}, (), (False, True, True)),  # after the decoder's start
            ({"refine": "par"}, (), (False, False, False)),
            ({"refine": "par"}, (3,), (True, True, True)),
            ({"refine_start_step": 9}, (8,), (False, True, True)),
        ],
    )
    def test_attention_is_kept_when_it_is_read(
        self, options: dict[str, Any], starts: tuple[int, ...], reads: tuple[bool, ...]
    ) -> None:
        addons = {f"affinity{i}": Affinity(start_step=start) for i, start in enumerate(starts)}
        method = make(addons=addons, **options)
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        method.optimizers = lambda: optimizer  # type: ignore[method-assign,assignment]
        seen = []
        method.network.register_forward_hook(
            lambda module, inputs, output: (
                seen.append(output.attention is not None) if module.training else None
            )
        )
        for step in (3, 8, 9):
            at(method, step).training_step(batch(), step)
        assert tuple(seen) == reads

    def test_one_that_knows_nothing_of_unia(self) -> None:
        method = make(addons={"fsl": FeatureSimilarity()})
        assert "fsl" in method.with_addons(method.step(batch()))[0]

    def test_one_value_for_the_blocks(self) -> None:
        with pytest.raises(UserError, match=r"method\.blocks and addon\.affinity\.blocks"):
            make(blocks=(0,), addons={"affinity": Affinity(blocks=(-1,))})
        for blocks in (None, (-3,)):  # whatever the method takes, and the same
            method = make(blocks=(0,), addons={"affinity": Affinity(blocks=blocks)})
            assert method.network.wanted_attention == (0,)
        method = make(refine="par", blocks=(0,), addons={"affinity": Affinity()})
        assert method.network.wanted_attention == (0, 1, 2)  # the method takes none

    def test_distribution_needs_its_neck(self) -> None:
        with pytest.raises(UserError, match="neck=uncertainty"):
            make(neck=None, addons={"distribution": Distribution()})


def test_without_neck_and_addons_it_is_the_baseline() -> None:
    method = make(neck=None)
    assert set(method.step(batch()).terms) == {"cls", "cls_early", "token", "seg", "energy"}
    assert method.step(batch()).views[0].output.neck.mu is None  # type: ignore[union-attr]


def test_defaults_are_the_published_ones() -> None:
    torch.manual_seed(0)
    method = UniA(network=WSSSNetwork("vit_tiny_patch16_224", 3, **VIT), classes=CLASSES)
    expected = {
        "refine": "mutual",
        "refine_start_step": 0,
        "high": 0.7,
        "low": 0.25,
        "aux_steps": 8000,
        "loss_warmup_steps": 2000,
        "seg_weight": 0.15,
        "token_weight": 0.3,
        "energy_weight": 0.05,
        "balanced": True,
        "energy_scale": 0.5,
        "energy_sigma_rgb": 15.0,
        "energy_sigma_xy": 100.0,
        "energy_factor": 1e-7,
    }
    assert {name: getattr(method, name) for name in expected} == expected
    assert method.monitor == "on/seg/miou_ms_flip"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"refine": "walk"}, UserError, r"method\.refine='walk': choose one of mutual, par, none"),
        ({"blocks": (3,)}, UserError, r"blocks=\[3\]"),
        ({"blocks": ()}, UserError, r"blocks=\[\]"),
        ({"blocks": "last"}, UserError, "blocks=last"),
        ({"low": 0.9}, ValueError, r"low=0\.9"),
        ({"high": 1.2}, ValueError, r"high=1\.2"),
        ({"par_scale": 0.0}, ValueError, r"par_scale=0\.0"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize("options", [{"walk_power": 0.0}, {"walk_steps": -1}], ids=str)
def test_a_walk_that_cannot_be_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises((UserError, ValueError)):
        make(**options)


def test_an_affinity_loss_with_labels_of_its_own_is_refused() -> None:
    """With mutual refinement it takes the method's."""
    for name, value in (("high", 0.9), ("renormalise", True), ("walk_power", 8.0)):
        with pytest.raises(UserError, match=rf"addon\.affinity\.{name}={value}: .*method\.{name}="):
            make(addons={"affinity": Affinity(**{name: value})})
    make(refine="par", addons={"affinity": Affinity(high=0.6)})
    make(high=0.6, addons={"affinity": Affinity(high=0.6)})
