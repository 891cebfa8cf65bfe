"""Add-ons: what they make of a view, and how they join a method's terms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.addons import AddOn, FeatureSimilarity, ImportanceSampling, Step, View
from wsss.errors import UserError
from wsss.losses import feature_similarity_loss, importance_sampling_loss


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
        images = F.interpolate(
            shown.images, size=size, mode="bilinear", antialias=True, align_corners=False
        )
        valid = F.interpolate(shown.valid[:, None].float(), size=size)[:, 0] > 0
        scores = F.interpolate(shown.scores, size=size, mode="bilinear", align_corners=False)
        expected = feature_similarity_loss(
            scores, images, shown.labels, 2.5, 2.0, window=6, valid=valid
        )
        found = FeatureSimilarity(sigma=2.0).loss(shown)
        torch.testing.assert_close(found, expected)
        assert found != 0

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
        ],
    )
    def test_mistakes(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            FeatureSimilarity(**options)  # type: ignore[arg-type]
