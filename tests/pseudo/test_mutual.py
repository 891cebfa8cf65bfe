"""UniA's labels P1, P2, P3 and P against loops, and PAR alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import unia_labels as oracle
from wsss.pseudo import MutualLabels, MutualRefinement, symmetric_affinity
from wsss.pseudo.labels import PresentChannels

OPTIONS: dict[str, Any] = {
    "high": 0.7,
    "low": 0.25,
    "walk_power": 2.0,
    "walk_steps": 1,
    "renormalise": True,  # so that P2 and P3 have classes
    "par_scale": 0.5,
}
#: name: image size, grid, labels
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], list[list[int]]]] = {
    "several": ((8, 10), (3, 3), [[1, 0, 1, 0], [0, 1, 1, 0]]),
    "fewer_than_another": ((8, 6), (2, 3), [[0, 0, 0, 1], [1, 0, 1, 1]]),
    "none_in_one": ((7, 5), (3, 2), [[0, 0, 0], [0, 1, 1]]),
    "none_at_all": ((4, 6), (2, 3), [[0, 0], [0, 0]]),
    "all": ((6, 6), (3, 3), [[1, 1, 1], [1, 1, 1]]),
    "one_pixel": ((1, 1), (1, 1), [[1, 1, 0], [0, 1, 0]]),
    "one_cell": ((6, 5), (1, 1), [[0, 1], [1, 1]]),
    "one_class": ((5, 9), (2, 4), [[1], [0]]),
}


def made(case: str, seed: int | None = None) -> dict[str, Any]:
    """Smooth maps that reach 1, an affinity, and images of a few colours; float64."""
    size, grid, present = CASES[case]
    # With others two classes are all but equal somewhere, and rounding decides.
    seed = {"several": 1, "fewer_than_another": 1, "all": 6}.get(case, 0) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(present, dtype=torch.float32)
    images, classes = labels.shape
    coarse = torch.rand(images, classes, 4, 4, generator=generator, dtype=torch.float64)
    maps = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    if size != (1, 1):
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        maps = (maps - low) / (high - low + 1e-5)
    count = grid[0] * grid[1]
    logits = torch.randn(images, count, count, generator=generator, dtype=torch.float64)
    attention = (2 * logits).softmax(-1)
    colours = torch.rand(images, 3, 3, 2, generator=generator, dtype=torch.float64)
    noise = torch.rand(images, 3, *size, generator=generator, dtype=torch.float64)
    return {
        "activations": maps * labels[:, :, None, None],
        "affinity": symmetric_affinity(attention),
        "grid": grid,
        "images": 0.9 * F.interpolate(colours, size=size) + 0.1 * noise,
        "labels": labels,
    }


def padding(case: str) -> Tensor:
    size, _, present = CASES[case]
    valid = torch.ones(len(present), *size, dtype=torch.bool)
    valid[-1, :, : max(1, size[1] // 3)] = False
    valid[0, -1] = False
    return valid


def near_a_cut(maps: Tensor, high: float, low: float, margin: float) -> Tensor:
    """(B, H, W): rounding may decide here, by a threshold or between two classes."""
    largest = maps.topk(min(2, maps.shape[1]), dim=1).values
    best = largest[:, 0]
    near = ((best - high).abs() < margin) | ((best - low).abs() < margin)
    if largest.shape[1] == 2:
        near |= (best > low) & (best - largest[:, 1] < margin)
    return near


def assert_same(
    found: MutualLabels, expected: oracle.Mutual, valid: Tensor | None, margin: float = 1e-5
) -> None:
    """Equal everywhere; the inputs are such that no pixel is left to rounding."""
    for maps in expected.maps[1:]:  # P1 is cut from what was given
        near = near_a_cut(maps, OPTIONS["high"], OPTIONS["low"], margin)
        assert not near.any(), "choose another seed"
    for name in ("p1", "p2", "p3", "label"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == torch.int64
        assert torch.equal(one, other), name
        if valid is not None:
            assert one[~valid].eq(255).all(), name


def check(inputs: dict[str, Any], valid: Tensor | None = None, **options: Any) -> oracle.Mutual:
    settings = OPTIONS | options
    expected = oracle.mutual(**inputs, valid=valid, **settings)
    assert_same(MutualRefinement(**settings)(**inputs, valid=valid), expected, valid)
    return expected


@pytest.mark.parametrize(
    ("padded", "par_scale"),
    [(False, 0.5), (True, 0.5), (True, 1.0)],
    ids=["half", "half_padded", "full_padded"],
)
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case: str, padded: bool, par_scale: float) -> None:
    valid = padding(case) if padded else None
    expected = check(made(case), valid, par_scale=par_scale)
    if case == "none_at_all":
        assert set(expected.label.unique().tolist()) <= {0, 255}
    if case in ("several", "fewer_than_another"):  # there is something to see
        different = {tuple(p.flatten().tolist()) for p in (expected.p1, expected.p2, expected.p3)}
        assert len(different) == 3
        assert len(set(expected.label.unique().tolist()) - {0, 255}) >= 2
        assert not torch.equal(expected.label, expected.p3)


@pytest.mark.parametrize(
    "options",
    [{"walk_power": 4.0}, {"walk_steps": 0}, {"walk_steps": 3}, {"walk_power": 0.5}],
    ids=str,
)
def test_options_of_the_walk(options: dict[str, Any]) -> None:
    usual = oracle.mutual(**made("several"), valid=None, **OPTIONS)
    expected = check(made("several"), **options)
    assert torch.equal(usual.p2, expected.p2)
    assert not torch.equal(usual.p3, expected.p3)


def test_a_peak_of_one_pixel_sinks_unless_renormalised() -> None:
    """Both refinements average it away; then the image's own class has no pixel."""
    maps = torch.zeros(1, 1, 16, 16)
    maps[0, 0, 8, 8] = 1
    inputs = (maps, torch.full((1, 16, 16), 1 / 16), (4, 4), torch.rand(1, 3, 16, 16))
    labels = torch.ones(1, 1)
    sunk = MutualRefinement(par_scale=1.0)(*inputs, labels)
    assert sunk.p1.eq(1).sum() == 1
    assert not sunk.p2.eq(1).any()
    assert not sunk.p3.eq(1).any()
    kept = MutualRefinement(renormalise=True, par_scale=1.0)(*inputs, labels)
    assert kept.p2.eq(1).any()
    assert kept.label.eq(1).any()


def test_without_renormalising() -> None:
    usual = oracle.mutual(**made("several"), valid=None, **OPTIONS)
    expected = check(made("several"), renormalise=False)
    assert not torch.equal(usual.p2, expected.p2)
    assert not torch.equal(usual.p3, expected.p3)


@pytest.mark.parametrize(("high", "low"), [(0.5, 0.25), (0.7, 0.5), (0.6, 0.6), (0.9, 0.1)])
def test_thresholds(high: float, low: float) -> None:
    inputs = made("several", seed=3)
    settings = OPTIONS | {"high": high, "low": low}
    expected = oracle.mutual(**inputs, valid=None, **settings)
    found = MutualRefinement(**settings)(**inputs)
    sure = torch.ones_like(expected.p1, dtype=torch.bool)
    for maps in expected.maps[1:]:
        sure &= ~near_a_cut(maps, high, low, 1e-5)
    assert sure.float().mean() > 0.9
    for name in ("p1", "p2", "p3", "label"):
        assert torch.equal(getattr(found, name)[sure], getattr(expected, name)[sure]), name


def test_a_pixel_at_the_threshold() -> None:
    """Eq. 8 keeps what is above it, a label takes a class from there on."""
    maps = torch.tensor([0.75, 0.75 + 2**-20]).view(1, 1, 1, 2)
    refinement = MutualRefinement(high=0.75, low=0.25, par_scale=1.0, renormalise=False)
    assert refinement.reweighted(maps).flatten().tolist() == [0, 0.75 + 2**-20]
    affinity = torch.eye(2)[None]
    found = refinement(maps, affinity, (1, 2), torch.zeros(1, 3, 1, 2), torch.ones(1, 1))
    assert found.p1.flatten().tolist() == [0, 1]
    assert found.p3.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.0])
def test_constant_maps(value: float) -> None:
    inputs = made("several")
    inputs["activations"] = value * inputs["labels"][:, :, None, None].expand(-1, -1, 8, 10)
    inputs["activations"] = inputs["activations"].double()
    found = MutualRefinement(renormalise=True)(**inputs)
    for label in (found.p2, found.p3, found.label):
        assert label.eq(0).all()  # stretched to [0, 1], they have nothing that stands out
    first = torch.tensor([1, 2]).view(2, 1, 1).expand(2, 8, 10)  # of those of an image
    assert torch.equal(found.p1, first if value == 1 else torch.zeros_like(first))
    kept = MutualRefinement()(**inputs)
    in_between = 255 if value == 0.5 else 0
    wanted = first if value == 1 else torch.full_like(first, in_between)
    assert torch.equal(kept.p3, wanted)
    assert torch.equal(kept.label, wanted)


def test_constant_images() -> None:
    """PAR then averages its neighbours alike."""
    inputs = made("fewer_than_another")
    inputs["images"] = torch.full_like(inputs["images"], 0.5)
    check(inputs)


def test_one_growth_is_taken_out() -> None:
    """A map that is 1 everywhere is 1 after PAR, whose weights sum to more."""
    refined = MutualRefinement().refined(torch.ones(1, 2, 8, 6), torch.rand(1, 3, 8, 6))
    torch.testing.assert_close(refined, torch.ones(1, 2, 8, 6))


def test_images_of_another_size() -> None:
    inputs = made("several")
    settings = OPTIONS | {"par_scale": 1.0}
    large = F.interpolate(inputs["images"], size=(16, 30))  # nearest
    same = inputs | {"images": F.interpolate(large, size=(8, 10), mode="bilinear")}
    found = MutualRefinement(**settings)(**(inputs | {"images": large}))
    for one, other in zip(found, MutualRefinement(**settings)(**same), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["several", "none_in_one", "one_pixel"])
def test_bf16_activations(case: str) -> None:
    """As float32 of the same numbers; only the resizing for PAR rounds to bf16."""
    inputs = made(case)
    low = inputs | {"activations": inputs["activations"].bfloat16()}
    found = MutualRefinement(**OPTIONS)(**low)
    expected = oracle.mutual(**low, valid=None, **OPTIONS)
    assert torch.equal(found.p1, expected.p1)
    assert torch.equal(found.p3, expected.p3)
    sure = ~near_a_cut(expected.maps[1], OPTIONS["high"], OPTIONS["low"], 4e-3)
    assert sure.float().mean() > 0.9
    assert torch.equal(found.p2[sure], expected.p2[sure])
    assert torch.equal(found.label[sure], expected.label[sure])


def test_bf16_does_not_round_the_threshold() -> None:
    maps = torch.full((1, 1, 1, 1), 0.3, dtype=torch.bfloat16)  # 0.30078
    found = MutualRefinement(high=0.3).reweighted(maps)
    assert torch.equal(found, maps)


def test_float32_and_a_gradient_that_ends_here() -> None:
    inputs = made("several")
    expected = MutualRefinement(**OPTIONS)(**inputs)
    single = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    single["activations"].requires_grad_()
    single["affinity"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = MutualRefinement(**OPTIONS)(**single)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_images_do_not_see_each_other() -> None:
    inputs = made("fewer_than_another")
    together = MutualRefinement(**OPTIONS)(**inputs)
    for b in range(2):
        alone = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        for whole, single in zip(together, MutualRefinement(**OPTIONS)(**alone), strict=True):
            assert torch.equal(whole[b : b + 1], single)


class TestParAlone:
    @pytest.mark.parametrize(
        ("padded", "par_scale", "renormalise"),
        [(True, 0.5, False), (False, 1.0, False), (True, 0.5, True)],
        ids=["half_padded", "full", "renormalised"],
    )
    @pytest.mark.parametrize("case", CASES)
    def test_against_the_oracle(
        self, case: str, padded: bool, par_scale: float, renormalise: bool
    ) -> None:
        inputs = made(case, seed=2)
        valid = padding(case) if padded else None
        about = (inputs["activations"], inputs["images"], inputs["labels"], valid)
        expected, maps = oracle.par_label(*about, 0.7, 0.25, par_scale, renormalise)
        assert not near_a_cut(maps, 0.7, 0.25, 1e-6).any(), "choose another seed"
        found = MutualRefinement(renormalise=renormalise, par_scale=par_scale).label(*about)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)

    def test_is_of_all_activations(self) -> None:
        """Also of those that P2 leaves out, which are undecided."""
        inputs = made("several")
        inputs["activations"] = inputs["activations"] * 0.6
        refinement = MutualRefinement()
        found = refinement.label(inputs["activations"], inputs["images"], inputs["labels"])
        assert found.eq(255).any()
        assert not found.eq(1).any()
        assert refinement(**inputs).p2.eq(0).all()


class TestPresentChannels:
    LABELS = torch.tensor([[0.0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])

    def test_take(self) -> None:
        cam = torch.rand(3, 4, 2, 3) * self.LABELS[:, :, None, None]
        few = PresentChannels(self.LABELS).take(cam)
        assert few.shape == (3, 2, 2, 3)
        assert torch.equal(few[0], cam[0, [1, 3]])
        assert torch.equal(few[1, 0], cam[1, 2])
        assert not few[1, 1].any()  # an absent class fills up
        assert not few[2].any()

    def test_names(self) -> None:
        label = torch.tensor([[[0, 1, 2, 255]], [[1, 0, 255, 1]], [[0, 255, 0, 0]]])
        valid = torch.ones(3, 1, 4, dtype=torch.bool)
        present = PresentChannels(self.LABELS)
        named = [[[0, 2, 4, 255]], [[3, 0, 255, 3]], [[0, 255, 0, 0]]]
        assert present.names(label).tolist() == named
        valid[0, 0, 1] = valid[1, 0, 1] = False
        named[0][0][1] = named[1][0][1] = 255
        assert present.names(label, valid).tolist() == named
        assert label[0, 0].tolist() == [0, 1, 2, 255]  # as it was

    @pytest.mark.parametrize("labels", [[[0, 0, 0]], [[1, 1, 1]], [[1, 0, 1], [0, 1, 0]]])
    def test_there_and_back(self, labels: list[list[int]]) -> None:
        known = torch.tensor(labels)
        present = PresentChannels(known)
        cam = torch.rand(len(known), 3, 4, 5) * known[:, :, None, None]
        few = present.take(cam)
        assert few.shape[1] == max(1, int(known.sum(1).max()))
        found = present.names(few.max(1).indices + 1)
        strong = cam.max(1).values > 0
        assert torch.equal(found[strong], (cam.max(1).indices + 1)[strong])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.8}, r"low=0\.8, high=0\.7"),
        ({"low": -0.1}, r"low=-0\.1"),
        ({"high": 1.1}, r"high=1\.1"),
        ({"par_scale": 0.0}, r"par_scale=0\.0"),
        ({"par_scale": 1.5}, r"par_scale=1\.5"),
        ({"walk_power": 0.0}, r"walk_power=0\.0"),
        ({"walk_steps": -1}, "walk_steps=-1"),
    ],
)
def test_what_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MutualRefinement(**options)


def test_a_grid_that_is_not_the_affinitys() -> None:
    with pytest.raises(ValueError, match=r"\(B, N, N\) with N = h \* w"):
        MutualRefinement()(**(made("several") | {"grid": (3, 4)}))


def test_defaults() -> None:
    refinement = MutualRefinement()
    for name, value in (OPTIONS | {"renormalise": False}).items():
        assert getattr(refinement, name) == value, name
