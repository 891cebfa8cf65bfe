"""One image's pseudo-labels against their oracles: size, thresholds, classes, refinements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracle import pixel_affinity
from tests.oracle import pseudo_labels as oracle
from tests.oracle.refine import pixel_adaptive_refinement
from tests.oracle.resize import bilinear
from wsss.data.views import resize_image
from wsss.labelling import recipe as module
from wsss.labelling.recipe import Recipe
from wsss.pseudo import MultiScaleOutput

SIZE = (7, 10)
CLASSES = torch.tensor([1, 3])  # of 5


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _image() -> Tensor:
    return (_random(*SIZE, 3, seed=5) * 255).to(torch.uint8)


def _blur(scores: Tensor) -> Tensor:
    """A stand-in for a refinement that looks at the image: neighbours above and left count."""
    grey = _image().double().mean(2) / 255
    moved = torch.roll(scores.double(), (1, 1), (1, 2))
    return (1 - grey) * scores + grey * moved


def _fake_crf(calls: list[str]) -> Any:
    def dense_crf(image: Tensor, probabilities: Tensor, preset: str) -> Tensor:
        assert torch.equal(image, _image())
        torch.testing.assert_close(probabilities.sum(0), torch.ones(SIZE))
        calls.append(preset)
        return _blur(probabilities)

    return dense_crf


def _divided(scores: Tensor) -> Tensor:
    """What the CRF is given: scores over their sum."""
    return _blur(scores / scores.sum(0))


def _par(scores: Tensor) -> Tensor:
    return pixel_adaptive_refinement(_image().permute(2, 0, 1)[None], scores[None])[0]


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.35, 0.35), (0.3, 0.7)])
@pytest.mark.parametrize("grid", [(4, 6), SIZE, (9, 9)], ids=str)
def test_cpl(grid: tuple[int, int], low: float, high: float) -> None:
    cam = _random(2, *grid)
    found = Recipe(low=low, high=high).cpl(cam, CLASSES, SIZE)
    assert found.dtype == np.uint8
    assert found.tolist() == oracle.cpl(cam, [1, 3], low, high, SIZE)
    assert set(np.unique(found)) == {0, 2, 4} | ({255} if low < high else set())


def test_the_threshold_belongs_to_the_class() -> None:
    cam = torch.tensor([0.25, 0.5, 0.75]).view(1, 1, 3)
    assert Recipe(low=0.5, high=0.5).cpl(cam, torch.tensor([0]), (1, 3)).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.35, 0.65)])
def test_par_of_the_cpl(low: float, high: float) -> None:
    """One pass over ones and CAMs is what a pass for each threshold gives."""
    cam = _random(2, 4, 6)
    found = Recipe(low=low, high=high, refine="par").cpl(cam, CLASSES, SIZE, _image())
    assert found.tolist() == oracle.cpl(cam, [1, 3], low, high, SIZE, _par)
    assert found.tolist() != Recipe(low=low, high=high).cpl(cam, CLASSES, SIZE).tolist()


def test_par_works_on_the_reduced_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAR_SIDE", 4)
    small = (3, 5)  # of 7 x 10: 4 / sqrt(70) = 0.48
    image = torch.from_numpy(resize_image(_image().numpy(), *small))

    def refined(scores: Tensor) -> Tensor:
        return pixel_adaptive_refinement(image.permute(2, 0, 1)[None], scores[None])[0]

    cam = _random(2, 4, 6)
    channels = torch.cat([torch.full((1, 4, 6), 0.5), cam]).double()
    expected = refined(bilinear(channels, *small))
    background = float(expected[0, 0, 0])
    found = Recipe(refine="par").cpl(cam, CLASSES, SIZE, _image())
    assert found.tolist() == oracle.cpl(expected[1:], [1, 3], background, background, SIZE)
    logits = 2 * torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1))
    kept = bilinear(logits[[0, 2, 4]].double(), *small)
    values = torch.zeros(6, *small, dtype=torch.float64)
    values[[0, 2, 4]] = refined(kept.exp() / kept.exp().sum(0))
    found = Recipe(refine="par").spl(logits, CLASSES, SIZE, _image())
    assert found.tolist() == oracle.spl(values, [1, 3], SIZE)


@pytest.mark.parametrize("size", [(375, 500), (3000, 4000), (200, 250), (1, 90000)])
def test_the_size_of_par(size: tuple[int, int]) -> None:
    height, width = module._par_size(size)
    if size == (200, 250):
        assert (height, width) == size
    elif size[0] > 1:
        assert height * width == pytest.approx(224**2, rel=0.01)
        assert height / width == pytest.approx(size[0] / size[1], rel=0.01)
    else:
        assert (height, width) == (1, 67200)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.35, 0.65)])
def test_crf_of_the_cpl(monkeypatch: pytest.MonkeyPatch, low: float, high: float) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "dense_crf", _fake_crf(calls))
    cam = _random(2, 4, 6)
    found = Recipe(low=low, high=high, refine="crf").cpl(cam, CLASSES, SIZE, _image())
    assert found.tolist() == oracle.cpl(cam, [1, 3], low, high, SIZE, _divided)
    assert calls == ["toco_cam"] * (1 if low == high else 2)
    assert (255 in found) == (low < high)


def test_without_refinement_the_crf_would_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "dense_crf", lambda image, probabilities, preset: probabilities)
    cam = _random(2, 4, 6)
    plain = Recipe(low=0.3, high=0.7).cpl(cam, CLASSES, SIZE)
    refined = Recipe(low=0.3, high=0.7, refine="crf").cpl(cam, CLASSES, SIZE, _image())
    assert np.array_equal(plain, refined)


@pytest.mark.parametrize("refine", ["none", "par", "crf"])
def test_no_class_is_all_background(refine: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    found = Recipe(refine=refine).cpl(torch.zeros(0, 4, 6), none, SIZE, _image())
    assert (found.shape, found.dtype, found.any()) == (SIZE, np.uint8, False)
    logits = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(0))
    assert not Recipe().spl(logits, none, SIZE).any()


def test_spl() -> None:
    logits = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1))
    logits[3] += 9  # an absent class
    found = Recipe().spl(logits, CLASSES, SIZE)
    assert found.dtype == np.uint8
    assert found.tolist() == oracle.spl(logits, [1, 3], SIZE)
    assert set(np.unique(found)) == {0, 2, 4}


def test_refined_spl(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 2 * torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1))
    plain = Recipe().spl(logits, CLASSES, SIZE).tolist()
    found = Recipe(refine="par").spl(logits, CLASSES, SIZE, _image()).tolist()
    assert found == oracle.spl(logits, [1, 3], SIZE, _par) != plain
    calls: list[str] = []
    monkeypatch.setattr(module, "dense_crf", _fake_crf(calls))
    found = Recipe(refine="crf").spl(logits, CLASSES, SIZE, _image()).tolist()
    assert found == oracle.spl(logits, [1, 3], SIZE, _blur) != plain
    assert calls == ["cosa"]


# --- the background as a power -------------------------------------------------------------


@pytest.mark.parametrize("alpha", [(4.0,), (1.0,), (1.0, 6.0), (4.0, 24.0)], ids=str)
@pytest.mark.parametrize("grid", [(4, 6), SIZE], ids=str)
def test_power_of_the_cpl(grid: tuple[int, int], alpha: tuple[float, ...]) -> None:
    cam = _random(2, *grid) ** 3
    found = Recipe(alpha=alpha).cpl(cam, CLASSES, SIZE)
    assert found.dtype == np.uint8
    assert found.tolist() == pixel_affinity.power_label(cam, [1, 3], alpha, SIZE)
    assert set(np.unique(found)) == {0, 2, 4} | ({255} if len(alpha) > 1 else set())


def test_the_low_power_is_of_confident_classes() -> None:
    """With 1 a class needs half, with 24 a tenth."""
    cam = torch.tensor([0.05, 0.3, 0.49, 0.51]).view(1, 1, 4)
    found = Recipe(alpha=(1.0, 24.0)).cpl(cam, torch.tensor([2]), (1, 4))
    assert found.tolist() == [[0, 255, 255, 3]]
    assert Recipe(alpha=(1.0,)).cpl(cam, torch.tensor([2]), (1, 4)).tolist() == [[0, 0, 0, 3]]
    assert Recipe(alpha=(24.0,)).cpl(cam, torch.tensor([2]), (1, 4)).tolist() == [[0, 3, 3, 3]]


@pytest.mark.parametrize("alpha", [(2.0,), (1.0, 6.0)], ids=str)
def test_par_with_a_power(alpha: tuple[float, ...]) -> None:
    cam = _random(2, 4, 6)
    found = Recipe(alpha=alpha, refine="par").cpl(cam, CLASSES, SIZE, _image())
    assert found.tolist() == pixel_affinity.power_label(cam, [1, 3], alpha, SIZE, _par)
    assert found.tolist() != Recipe(alpha=alpha).cpl(cam, CLASSES, SIZE).tolist()


@pytest.mark.parametrize("alpha", [(2.0,), (1.0, 6.0)], ids=str)
def test_crf_with_a_power(monkeypatch: pytest.MonkeyPatch, alpha: tuple[float, ...]) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "dense_crf", _fake_crf(calls))
    cam = _random(2, 4, 6)
    found = Recipe(alpha=alpha, refine="crf").cpl(cam, CLASSES, SIZE, _image())
    assert found.tolist() == pixel_affinity.power_label(cam, [1, 3], alpha, SIZE, _divided)
    assert calls == ["toco_cam"] * len(alpha)


def test_where_both_powers_contradict_each_other_it_is_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CRF may do so; of AffinityNet's code the second pass has the last word."""
    answers = iter(
        [torch.tensor([[[0.2, 0.2]], [[0.8, 0.8]]]), torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])]
    )
    monkeypatch.setattr(module, "dense_crf", lambda image, scores, preset: next(answers))
    cam, image = torch.full((1, 1, 2), 0.5), torch.zeros(1, 2, 3, dtype=torch.uint8)
    found = Recipe(alpha=(4.0, 24.0), refine="crf").cpl(cam, torch.tensor([0]), (1, 2), image)
    assert found.tolist() == [[0, 1]]


# --- AffinityNet ---------------------------------------------------------------------------

GRID = (3, 4)
FEATURES = _random(5, *GRID, seed=9) + 5 * torch.arange(4)  # columns keep to themselves


class _Walk:
    """What an affinity run does, in loops."""

    @staticmethod
    def spread(scores: Tensor, image: Tensor) -> Tensor:
        assert torch.equal(image, _image())
        averaged = pixel_affinity.block_mean(scores, GRID)
        return pixel_affinity.walk(averaged, FEATURES.double(), 3, 2, 2)


def _walk(scores: Tensor) -> Tensor:
    return _Walk.spread(scores, _image())


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.45, 0.55)])
def test_affinity_of_the_cpl(low: float, high: float) -> None:
    """Averaged to the grid from the inference size; the threshold stays what it is."""
    cam = _random(2, 6, 8)
    recipe = Recipe(low=low, high=high, refine="affinity", affinity=_Walk())  # type: ignore[arg-type]
    found = recipe.cpl(cam, CLASSES, SIZE, _image())
    assert found.tolist() == oracle.cpl(_walk(cam), [1, 3], low, high, SIZE)
    assert found.tolist() != Recipe(low=low, high=high).cpl(cam, CLASSES, SIZE).tolist()
    assert (255 in found) == (low < high)


@pytest.mark.parametrize("alpha", [(1.5,), (1.5, 6.0)], ids=str)
def test_affinity_with_a_power(alpha: tuple[float, ...]) -> None:
    cam = _random(2, 6, 8) * 0.1
    # From the left: a class, background, neither, the other class.
    for channel, column, value in ((0, 0, 0.7), (1, 4, 0.3), (1, 6, 0.7)):
        cam[channel, :, column : column + 2] += value
    recipe = Recipe(alpha=alpha, refine="affinity", affinity=_Walk())  # type: ignore[arg-type]
    found = recipe.cpl(cam, CLASSES, SIZE, _image())
    expected = pixel_affinity.power_label(cam, [1, 3], alpha, SIZE, _walk, resize_first=False)
    assert found.tolist() == expected
    assert set(np.unique(found)) == {0, 2, 4} | ({255} if len(alpha) > 1 else set())


def test_the_power_is_taken_before_the_average() -> None:
    """Of every other pixel 0.9 the mean is 0.45: more than 0.55^4, less than the mean of powers."""
    cam = torch.tensor([0.9, 0.0]).repeat(4).expand(1, 6, 8)
    recipe = Recipe(alpha=(4.0,), refine="affinity", affinity=_Walk())  # type: ignore[arg-type]
    assert not recipe.cpl(cam, CLASSES[:1], SIZE, _image()).any()


def test_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "dense_crf", _fake_crf(calls))
    chosen = Recipe(refine="crf", cpl_crf="afa", spl_crf="isl_fsl")
    chosen.cpl(_random(2, 4, 6), CLASSES, SIZE, _image())
    chosen.spl(_random(6, 4, 6), CLASSES, SIZE, _image())
    assert calls == ["afa", "isl_fsl"]


def test_sources() -> None:
    cam, early = _random(2, 5, 3, 4), _random(2, 5, 3, 4, seed=1)
    output = MultiScaleOutput(cam, early, None)
    for source, full in (("cam", cam), ("early_cam", early), ("ensemble", (cam + early) / 2)):
        found = Recipe(source=source).cam(output, 1, CLASSES)
        torch.testing.assert_close(found, torch.stack([full[1, 1], full[1, 3]]))
