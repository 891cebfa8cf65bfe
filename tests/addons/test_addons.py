"""Add-ons: what they make of a view, and how they join a method's terms."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.made import batch
from tests.oracle.resize import mean_colours
from wsss.addons import (
    AddOn,
    Affinity,
    Distribution,
    FeatureSimilarity,
    ImportanceSampling,
    Step,
    View,
)
from wsss.addons.feature_similarity import _mean_colours
from wsss.errors import UserError
from wsss.losses import (
    contrastive_affinity_loss,
    distribution_loss,
    feature_similarity_loss,
    importance_sampling_loss,
)
from wsss.methods import CAM
from wsss.nn import NetworkOutput, UncertaintyNeck, WSSSNetwork
from wsss.nn.neck import NeckOutput
from wsss.pseudo import MutualRefinement, normalise_cam, symmetric_affinity
from wsss.resize import cell_centres


def view(term: str = "cls", cam: str = "cam", grid: tuple[int, int] = (7, 6)) -> View:
    generator = torch.Generator().manual_seed(3)
    valid = torch.ones(2, grid[0] * 8, grid[1] * 8, dtype=torch.bool)
    valid[1, :, :16] = False
    return View(
        cam,
        term,
        torch.randn(2, 3, *grid, generator=generator).requires_grad_(),
        torch.rand(2, 3, grid[0] * 8, grid[1] * 8, generator=generator),
        torch.tensor([[1.0, 0, 1], [0, 1, 0]]),
        valid,
    )


class Constant(AddOn):
    """A loss of 5, so that weights alone are seen."""

    name = "five"

    def loss(self, view: View) -> Tensor:
        return torch.tensor(5.0)


def join(addon: AddOn, step: Step, own: dict[str, float], scale: float = 0.1) -> dict[str, float]:
    terms, weights = dict(step.terms), dict(own)
    addon.add_to(step, terms, weights, own, scale)
    assert set(step.terms) <= set(terms)
    return {name: weights.get(name, 1.0) for name in terms}


TERMS = {"cls": torch.tensor(1.0), "cls_early": torch.tensor(1.0), "c2s": torch.tensor(1.0)}
STEP = Step(TERMS, (view(), view("cls_early", "early_cam")))


class TestJoining:
    def test_importance_sampling_takes_its_share(self) -> None:
        weights = join(ImportanceSampling(weight=0.2), STEP, {"c2s": 0.3})
        assert weights == pytest.approx({"cls": 0.8, "cls_early": 1, "c2s": 0.3, "isl": 0.02})

    def test_both_cams(self) -> None:
        addon = ImportanceSampling(weight=0.2, cams=("cam", "early_cam"), scale=1.0)
        weights = join(addon, STEP, {"cls_early": 0.5})
        expected = {"cls": 0.8, "cls_early": 0.4, "c2s": 1, "isl": 0.2, "isl_early": 0.1}
        assert weights == pytest.approx(expected)

    def test_feature_similarity_is_added(self) -> None:
        weights = join(FeatureSimilarity(), STEP, {"cls": 0.5})
        assert weights == pytest.approx({"cls": 0.5, "cls_early": 1, "c2s": 1, "fsl": 0.05})

    def test_one_after_another(self) -> None:
        """What the first leaves of a classification term does not change the second's weight."""
        terms, weights = dict(TERMS), {}
        ImportanceSampling(weight=0.25).add_to(STEP, terms, weights, {}, 1.0)
        FeatureSimilarity(scale=0.5).add_to(STEP, terms, weights, {}, 1.0)
        assert weights == pytest.approx({"cls": 0.75, "isl": 0.25, "fsl": 0.5})

    def test_two_views_of_one_cam(self) -> None:
        step = Step(TERMS, (view(), view("cls_small")))
        assert set(join(Constant(scale=2.0), step, {})) == {*TERMS, "five", "five_small"}

    def test_nothing_classified(self) -> None:
        assert set(join(Constant(), Step(TERMS), {})) == set(TERMS)


class TestImportanceSampling:
    @pytest.mark.parametrize("posterior", ["binomial", "multinomial"])
    def test_is_the_loss_on_the_grid(self, posterior: str) -> None:
        shown = view()
        torch.manual_seed(0)
        found = ImportanceSampling(num_samples=4, posterior=posterior).loss(shown)
        valid = torch.ones(2, 7, 6, dtype=torch.bool)
        valid[1, :, :2] = False
        torch.manual_seed(0)
        expected = importance_sampling_loss(
            shown.scores, shown.labels, 4, posterior=posterior, valid=valid
        )
        assert torch.equal(found, expected)

    def test_padding_is_never_drawn(self) -> None:
        shown = view()
        ImportanceSampling(num_samples=200).loss(shown).backward()
        assert shown.scores.grad is not None
        assert not shown.scores.grad[1, :, :, :2].any()
        assert shown.scores.grad[1, :, :, 2:].any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight": 1.2}, r"addon\.isl\.weight=1\.2"),
            ({"num_samples": 0}, r"addon\.isl\.num_samples=0"),
            ({"num_samples": 2.5}, "give a whole number of 1 or more"),
            ({"scale": -1.0}, r"addon\.isl\.scale=-1\.0: give a number of 0 or more"),
            ({"start_step": -1}, r"addon\.isl\.start_step=-1"),
            ({"posterior": "softmax"}, "binomial, multinomial"),
            ({"cams": ()}, r"addon\.isl\.cams=\[\]"),
            ({"cams": ("CAM",)}, "cam, early_cam"),
        ],
    )
    def test_mistakes(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            ImportanceSampling(**options)  # type: ignore[arg-type]


class TestFeatureSimilarity:
    @pytest.mark.parametrize(
        ("grid", "factor"), [((7, 6), 8), ((28, 20), 2), ((14, 32), 2), ((40, 56), 1), ((3, 64), 1)]
    )
    def test_upsamples_to_about_56(self, grid: tuple[int, int], factor: int) -> None:
        """Factor 4 from 14, 2 from 28 and 32, none from 56, as published."""
        shown = view(grid=grid)
        size = (grid[0] * factor, grid[1] * factor)
        images, share = (
            F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
            for x in (shown.images * shown.valid[:, None], shown.valid[:, None].float())
        )
        images = images / share.clamp(min=1e-9)
        valid = (
            F.interpolate(shown.valid[:, None].float(), size=size, mode="nearest-exact")[:, 0] > 0
        )
        scores = F.interpolate(shown.scores, size=size, mode="bilinear", align_corners=False)
        expected = feature_similarity_loss(
            scores, images, shown.labels, 2.5, 2.0, window=6, valid=valid
        )
        found = FeatureSimilarity(sigma=2.0).loss(shown)
        torch.testing.assert_close(found, expected)
        assert found != 0

    @pytest.mark.parametrize("size", [(7, 6), (14, 12), (5, 9)])
    @pytest.mark.parametrize("inside", ["all", "part", "one pixel", "none"])
    def test_colours_of_cells_are_the_oracle_s(self, size: tuple[int, int], inside: str) -> None:
        images = torch.rand(2, 3, 28, 36, generator=torch.Generator().manual_seed(1))
        valid = torch.zeros(2, 28, 36, dtype=torch.bool)
        if inside == "all":
            valid[:] = True
        elif inside == "part":
            valid[0, 3:21, 5:] = True
            valid[1, :, :17] = True
        elif inside == "one pixel":
            valid[:, 9, 11] = True
        expected = torch.tensor(mean_colours(images.tolist(), valid.tolist(), *size))
        torch.testing.assert_close(_mean_colours(images, valid, size), expected)

    def test_padding_has_no_say(self) -> None:
        """Of its colour nothing may come in; where the image ends is no edge."""
        shown = view()
        padding = ~shown.valid[:, None]
        found = FeatureSimilarity(sigma=2.0).loss(shown)
        for colour in (0.0, 1.0):
            other = replace(shown, images=shown.images.masked_fill(padding, colour))
            torch.testing.assert_close(FeatureSimilarity(sigma=2.0).loss(other), found)
        uniform = torch.full_like(shown.images, 0.9).masked_fill(padding, 0.0)
        narrow = shown.valid.clone()
        narrow[1, :, :20] = False  # the border inside a cell
        cut = replace(shown, images=uniform * narrow[:, None], valid=narrow)
        whole = replace(cut, images=torch.full_like(shown.images, 0.9))
        expected = FeatureSimilarity(sigma=2.0).loss(whole)
        torch.testing.assert_close(FeatureSimilarity(sigma=2.0).loss(cut), expected)

    def test_options_reach_the_loss(self) -> None:
        shown = view()
        base = {"sigma": 1.5, "upsample": 1}
        found = {
            str(more): float(FeatureSimilarity(**(base | more)).loss(shown))  # type: ignore[arg-type]
            for more in (
                {},
                {"mu": 1.0},
                {"sigma": 1.0},
                {"gate": "binomial"},
                {"gate": "multinomial"},
                {"upsample": 2},
                {"window": 1},
                {"background": True},
            )
        }
        assert len({round(value, 9) for value in found.values()}) == len(found), found

    def test_window_of_zero_is_exact(self) -> None:
        shown = view()
        found = FeatureSimilarity(sigma=1.5, upsample=1, window=0).loss(shown)
        wide = FeatureSimilarity(sigma=1.5, upsample=1, window=9).loss(shown)
        three = FeatureSimilarity(sigma=1.5, upsample=1).loss(shown)
        torch.testing.assert_close(found, wide)
        assert abs(float(three / found) - 1) < 0.02
        assert float(three) != float(found)

    def test_half_precision_scores(self) -> None:
        shown = view()
        half = replace(shown, scores=shown.scores.detach().bfloat16().requires_grad_())
        loss = FeatureSimilarity().loss(half)
        loss.backward()
        assert loss.dtype == torch.float32
        assert half.scores.grad is not None
        assert half.scores.grad.isfinite().all()
        assert math.isclose(loss.item(), FeatureSimilarity().loss(shown).item(), rel_tol=0.05)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gate": "none"}, "max_norm, binomial, multinomial"),
            ({"sigma": 0.0}, r"addon\.fsl\.sigma=0\.0"),
            ({"upsample": 0}, r"addon\.fsl\.upsample=0"),
            ({"window": -1}, r"addon\.fsl\.window=-1"),
            ({"window": 2.5}, r"addon\.fsl\.window=2\.5: give a whole number"),
            ({"upsample": math.nan}, r"addon\.fsl\.upsample=nan"),
            ({"mu": math.nan}, r"addon\.fsl\.mu=nan"),
            ({"mu": math.inf}, r"addon\.fsl\.mu=inf"),
        ],
    )
    def test_mistakes(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            FeatureSimilarity(**options)  # type: ignore[arg-type]


def seen(activations: bool = True) -> View:
    """A view with all that UniA's add-ons look at: a Gaussian and attention on a 7 x 6 grid."""
    shown = view()
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(2, 8, 7, 6, generator=generator).requires_grad_()
    deviation = torch.randn(2, 8, 7, 6, generator=generator).exp().requires_grad_()
    neck = NeckOutput(mean, mean, deviation)
    attention = (2 * torch.randn(2, 42, 42, generator=generator)).softmax(-1).requires_grad_()
    cam = shown.scores
    output = NetworkOutput(
        cam.mean((2, 3)), cam.mean((2, 3)), cam, cam, None, mean, neck=neck, attention=attention
    )
    fused = torch.rand(2, 3, 7, 6, generator=generator)
    fused = F.interpolate(fused, size=(56, 48), mode="bilinear") * shown.labels[:, :, None, None]
    return replace(shown, output=output, activations=fused if activations else None)


class TestCertainties:
    def test_are_the_methods_activations(self) -> None:
        shown = seen()
        assert shown.certainties() is shown.activations

    def test_at_the_size_of_the_valid_region(self) -> None:
        shown = seen()
        assert shown.activations is not None
        small = replace(shown, activations=shown.activations[..., ::2, ::3])
        expected = F.interpolate(
            small.activations, size=(56, 48), mode="bilinear", align_corners=False
        )
        assert torch.equal(small.certainties(), expected)

    def test_or_what_the_pass_says(self) -> None:
        shown = seen(activations=False)
        found = shown.certainties()
        assert found.shape == (2, 3, 56, 48)
        assert not found.requires_grad
        maps = normalise_cam(shown.scores.detach().clamp(min=0)) * shown.labels[:, :, None, None]
        expected = F.interpolate(maps, size=(56, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(found, expected)
        assert not found[0, 1].any()  # an absent class
        assert found.max() > 0.9
        assert found.min() == 0
        half = replace(shown, scores=shown.scores.detach().bfloat16())
        assert half.certainties().dtype == torch.float32


class TestDistribution:
    OPTIONS: dict[str, Any] = {  # noqa: RUF012
        "threshold": 0.5,
        "num_samples": 7,
        "epsilon": 0.05,
        "regulariser": 0.3,
    }

    @pytest.mark.parametrize("activations", [True, False])
    def test_is_the_loss_of_what_the_neck_infers(self, activations: bool) -> None:
        shown = seen(activations)
        assert shown.output is not None
        _, mu, sigma, _ = shown.output.neck  # type: ignore[misc]
        torch.manual_seed(0)
        found = Distribution(**self.OPTIONS).loss(shown)
        torch.manual_seed(0)
        expected = distribution_loss(
            mu,  # type: ignore[arg-type]
            sigma,  # type: ignore[arg-type]
            shown.certainties(),
            **self.OPTIONS,
            valid=shown.valid,
        )
        assert torch.equal(found, expected)
        found.backward()
        assert mu.grad is not None  # type: ignore[union-attr]
        assert sigma.grad.any()  # type: ignore[union-attr]
        assert not mu.grad[1, :, :, :2].any()  # type: ignore[union-attr,index]  # padding
        assert shown.scores.grad is None

    def test_every_option_counts(self) -> None:
        values = []
        for more in ({}, *({k: v} for k, v in self.OPTIONS.items()), {"num_samples": 0}):
            torch.manual_seed(0)
            values.append(float(Distribution(**more).loss(seen()).detach()))
        assert len({round(v, 6) for v in values}) == len(values), values

    def test_defaults(self) -> None:
        addon = Distribution()
        assert (addon.weight, addon.threshold, addon.num_samples) == (0.1, 0.7, 50)
        assert (addon.epsilon, addon.regulariser, addon.start_step) == (0.01, 0.01, 0)
        assert addon.cams == ("cam",)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_samples": -1}, r"addon\.distribution\.num_samples=-1"),
            ({"epsilon": 0.0}, r"addon\.distribution\.epsilon=0\.0"),
            ({"epsilon": 0.5}, r"addon\.distribution\.epsilon=0\.5"),
            ({"cams": ("late",)}, r"addon\.distribution\.cams=\['late'\]"),
        ],
    )
    def test_mistakes(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Distribution(**options)

    @pytest.mark.parametrize("neck", [None, torch.nn.Identity()])
    def test_needs_the_neck(self, neck: Any) -> None:
        with pytest.raises(UserError, match=r"addon\.distribution needs.*neck=uncertainty"):
            Distribution().prepare(network(neck=neck))
        Distribution().prepare(network(neck=UncertaintyNeck))


class TestAffinity:
    OPTIONS: dict[str, Any] = {  # noqa: RUF012
        "high": 0.6,
        "low": 0.3,
        "walk_power": 3.0,
        "walk_steps": 2,
        "renormalise": True,
        "par_scale": 1.0,
    }

    @pytest.mark.parametrize("log", [False, True])
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("activations", [True, False])
    def test_makes_its_own_label(self, activations: bool, scaled: bool, log: bool) -> None:
        shown = seen(activations)
        assert shown.output is not None
        attention = shown.output.attention
        assert attention is not None
        addon = Affinity(temperature=0.3, log=log, scale_affinity=scaled, **self.OPTIONS)
        found = addon.loss(shown)
        affinity = symmetric_affinity(attention)
        label = MutualRefinement(**self.OPTIONS)(
            shown.certainties(), affinity.detach(), (7, 6), shown.images, shown.labels, shown.valid
        ).label
        expected = contrastive_affinity_loss(
            affinity * (42 if scaled else 1), cell_centres(label, (7, 6)), 0.3, log
        )
        assert len(label.unique()) >= 3
        torch.testing.assert_close(found, expected)
        found.backward()
        assert attention.grad is not None
        assert attention.grad.any()
        assert shown.scores.grad is None

    def test_or_takes_the_methods(self) -> None:
        affinity = torch.rand(2, 42, 42, requires_grad=True)
        label = torch.randint(0, 3, (2, 56, 48))
        shown = replace(seen(), affinity=affinity, label=label, output=None, activations=None)
        found = Affinity(temperature=0.3, high=0.9).loss(shown)
        expected = contrastive_affinity_loss(affinity, label[:, 4::8, 4::8], 0.3)
        assert torch.equal(found, expected)
        found.backward()
        assert affinity.grad is not None

    def test_takes_the_affinity_alone(self) -> None:
        """A method that makes no mutually refined label has its affinity computed once."""
        shown = seen()
        assert shown.output is not None
        affinity = torch.rand(2, 42, 42)
        given = replace(shown, affinity=affinity)
        label = MutualRefinement()(
            given.certainties(), affinity, (7, 6), given.images, given.labels, given.valid
        ).label
        expected = contrastive_affinity_loss(affinity, cell_centres(label, (7, 6)), 0.5)
        torch.testing.assert_close(Affinity().loss(given), expected)

    def test_defaults(self) -> None:
        addon, refinement = Affinity(), MutualRefinement()
        assert (addon.weight, addon.temperature, addon.log, addon.start_step) == (
            0.1,
            0.5,
            False,
            0,
        )
        assert addon.cams == ("cam",)
        for name in self.OPTIONS:
            assert getattr(addon.refinement, name) == getattr(refinement, name)

    def test_asks_for_attention(self) -> None:
        for blocks, wanted in ((None, (0, 1)), ("all", (0, 1)), ((-1,), (1,))):
            net = network().train()
            Affinity(blocks=blocks).prepare(net)
            assert net.wanted_attention == wanted

    def test_needs_a_vit(self) -> None:
        cnn = WSSSNetwork("resnet10t", 3, early_block=-2, channels=[8, 8, 16, 16])
        with pytest.raises(UserError, match=r"backbone\.name='resnet10t'.*plain ViT"):
            Affinity().prepare(cnn)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"temperature": 0.0}, UserError, r"addon\.affinity\.temperature=0\.0"),
            ({"low": 0.8}, ValueError, r"low=0\.8, high=0\.7"),
            ({"par_scale": 2.0}, ValueError, r"par_scale=2\.0"),
        ],
    )
    def test_mistakes(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Affinity(**options)


def network(**kwargs: Any) -> WSSSNetwork:
    torch.manual_seed(0)
    vit = {"depth": 2, "embed_dim": 24, "num_heads": 2, "early_block": -2, "img_size": 48}
    return WSSSNetwork("vit_tiny_patch16_224", 3, **(vit | kwargs))  # type: ignore[arg-type]


class TestWeights:
    """UniA's losses have their weight whatever the optimizer; the others a factor of its."""

    def test_next_to_the_classification(self) -> None:
        step = Step(TERMS, (seen(), replace(seen(), cam="early_cam", term="cls_early")))
        own = {"cls": 0.5, "cls_early": 2.0}
        both = ("cam", "early_cam")
        for kind, name in ((Distribution, "distribution"), (Affinity, "affinity")):
            weights = join(kind(weight=0.3, cams=both), step, own)
            assert weights[name] == pytest.approx(0.15)
            assert weights[f"{name}_early"] == pytest.approx(0.6)
            assert {k: weights[k] for k in own} == own
            assert f"{name}_early" not in join(kind(), step, own)


class TestStartStep:
    @pytest.mark.parametrize(
        "addon",
        [
            Constant(start_step=3),
            Distribution(start_step=3),
            Affinity(start_step=3),
            FeatureSimilarity(start_step=3),
            ImportanceSampling(start_step=3),
        ],
        ids=lambda addon: addon.name,
    )
    def test_absent_before_and_present_at_it(self, addon: AddOn) -> None:
        method = CAM(
            network=network(neck=UncertaintyNeck), classes=("a", "b", "c"), addons={"one": addon}
        ).train()
        for step, there in ((0, False), (2, False), (3, True), (4, True)):
            method._trainer = SimpleNamespace(global_step=step)  # type: ignore[assignment]
            terms, weights = method.with_addons(method.step(batch()))
            assert ("one" in terms) == ("one" in weights) == there, step
            assert (weights.get("cls", 1.0) != 1.0) == (there and addon.keeps != 1.0), step

    def test_default_is_the_first(self) -> None:
        for kind in (Constant, Distribution, Affinity, FeatureSimilarity, ImportanceSampling):
            assert kind().start_step == 0


def test_a_method_prepares_its_addons() -> None:
    names = ("a", "b", "c")
    with pytest.raises(UserError, match=r"addon\.mine needs the distribution"):
        CAM(network=network(), classes=names, addons={"mine": Distribution()})
    method = CAM(network=network(), classes=names, addons={"mine": Affinity()}).train()
    assert method.network.wanted_attention == (0, 1)
    assert method.step(batch()).views[0].output.attention is not None  # type: ignore[union-attr]
