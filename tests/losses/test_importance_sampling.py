"""``importance_sampling_loss`` against its oracle, and the statistics of what it draws."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import isl_fsl as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.losses import importance_sampling as module
from wsss.losses import importance_sampling_loss

POSTERIORS = ["binomial", "multinomial"]


@dataclass
class Case:
    scores: Tensor
    labels: Tensor
    valid: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self, scores: Tensor | None = None, seed: int = 0, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        s = self.scores if scores is None else scores
        options = {"generator": generator, "valid": self.valid, **self.options, **options}
        return importance_sampling_loss(s, self.labels, **options)


def _case(name: str = "mixed") -> Case:
    generator = torch.Generator().manual_seed(1)
    images, classes, height, width = {
        "non_square": (2, 3, 2, 7),
        "one_pixel": (2, 3, 1, 1),
        "one_class": (2, 1, 4, 5),
        "many_classes": (1, 20, 3, 3),
    }.get(name, (3, 3, 4, 5))
    scores = torch.randn(images, classes, height, width, generator=generator).double() * 2
    labels = (torch.rand(images, classes, generator=generator) < 0.5).double()
    valid = torch.rand(images, height, width, generator=generator) < 0.6
    case = Case(scores, labels)
    if name == "no_class":
        labels.zero_()
    elif name == "all_classes":
        labels.fill_(1)
    elif name == "constant":
        scores.fill_(0.3)
    elif name == "empty_map":
        scores.fill_(-200)  # a posterior of exactly 0 in float32
    elif name == "large":
        scores *= 30
    elif name == "padding":
        case.valid = valid
    elif name == "one_image_not_valid":
        valid[1] = False
        case.valid = valid
    elif name == "none_valid":
        case.valid = torch.zeros_like(valid)
    elif name == "integer_labels":
        case.labels = labels.long()
    return case


CASES = [
    *("mixed", "non_square", "one_pixel", "one_class", "many_classes", "no_class", "all_classes"),
    *("constant", "padding", "one_image_not_valid", "none_valid", "integer_labels"),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(weights, pixels) of every draw, as (images x classes, ...)."""
    draws = []
    draw = torch.multinomial

    def spy(weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pixels = draw(weights, *args, **kwargs)
        draws.append((weights, pixels))
        return pixels

    monkeypatch.setattr(module.torch, "multinomial", spy)
    return draws


def _pixels(case: Case, drawn: list[tuple[Tensor, Tensor]]) -> Tensor:
    return drawn[-1][1].view(*case.scores.shape[:2], -1)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, posterior: str, drawn: list[tuple[Tensor, Tensor]]) -> None:
    case = _case(name)
    case.options = {"posterior": posterior, "num_samples": 6}
    case.loss()
    pixels = _pixels(case, drawn)
    assert_matches_oracle(
        case.loss,
        lambda s: oracle.importance_sampling(s, case.labels, pixels, posterior, case.valid),
        case.scores,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_low_precision(
    posterior: str, dtype: torch.dtype, drawn: list[tuple[Tensor, Tensor]]
) -> None:
    case = _case("padding")
    case.scores = case.scores.to(dtype)
    case.options = {"posterior": posterior}
    case.loss()
    pixels = _pixels(case, drawn)
    assert_matches_oracle(
        case.loss,
        lambda s: oracle.importance_sampling(s, case.labels, pixels, posterior, case.valid),
        case.scores,
        dtype,
    )


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_gradcheck(posterior: str) -> None:
    case = _case("padding")
    case.options = {"posterior": posterior}
    # steps too small to change a draw
    assert torch.autograd.gradcheck(case.loss, (case.scores.requires_grad_(),), eps=1e-7)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("name", ["mixed", "padding", "many_classes", "empty_map"])
def test_weights_of_the_draw(name: str, posterior: str, drawn: list[tuple[Tensor, Tensor]]) -> None:
    case = _case(name)
    case.loss(posterior=posterior)
    weights = drawn[-1][0]
    images, classes = case.scores.shape[:2]
    expected = [
        oracle.sampling_distribution(case.scores, posterior, b, c, case.valid)
        for b in range(images)
        for c in range(classes)
    ]
    found = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert not weights.requires_grad


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_frequencies_of_the_draws(posterior: str, drawn: list[tuple[Tensor, Tensor]]) -> None:
    # chi-square of each image and class: mean 11 and deviation 4.7 with 12 pixels
    case = _case("mixed")
    case.scores = case.scores[:, :, :3, :4]
    number = 20_000
    case.loss(num_samples=number, posterior=posterior)
    for b, of_image in enumerate(_pixels(case, drawn)):
        for c, pixels in enumerate(of_image):
            expected = oracle.sampling_distribution(case.scores, posterior, b, c)
            expectation = torch.tensor(expected, dtype=torch.float64) * number
            counts = torch.bincount(pixels, minlength=12)
            assert ((counts - expectation) ** 2 / expectation).sum() < 11 + 4 * 4.7


def test_the_gradient_counts_the_draws() -> None:
    # The gradient of a pixel is (b - y) / (samples C B), as often as it was drawn.
    case = _case("padding")
    number = 20_000
    gradient = value_and_gradient(lambda s: case.loss(s, num_samples=number), case.scores)[1]
    images, classes = case.scores.shape[:2]
    step = (case.scores.sigmoid() - case.labels[:, :, None, None]) / (number * images * classes)
    counts = gradient / step
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-6)
    assert (counts.sum((2, 3)).round() == number).all()
    assert case.valid is not None
    assert not counts.masked_select(~case.valid[:, None]).any()
    for b in range(images):
        for c in range(classes):
            p = oracle.sampling_distribution(case.scores, "binomial", b, c, case.valid)
            expectation = torch.tensor(p, dtype=torch.float64) * number
            kept = expectation > 0
            found = counts[b, c].flatten()[kept]
            chi_square = ((found - expectation[kept]) ** 2 / expectation[kept]).sum()
            freedom = kept.sum() - 1
            assert chi_square < freedom + 4 * (2 * freedom).sqrt()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_images_and_classes_draw_on_their_own(
    posterior: str, drawn: list[tuple[Tensor, Tensor]]
) -> None:
    case = _case("constant")
    case.loss(posterior=posterior, num_samples=30)
    rows = {tuple(row.tolist()) for row in drawn[-1][1]}
    assert len(rows) == case.scores.shape[0] * case.scores.shape[1]


def test_draws_with_replacement() -> None:
    case = _case("one_pixel")
    expected = value_and_gradient(lambda s: case.loss(s, num_samples=1), case.scores)
    found = value_and_gradient(lambda s: case.loss(s, num_samples=50), case.scores)
    torch.testing.assert_close(found, expected)


def test_reproducible_with_a_generator() -> None:
    case = _case("mixed")
    assert torch.equal(case.loss(seed=3), case.loss(seed=3))
    assert not torch.equal(case.loss(seed=3), case.loss(seed=4))
    state = torch.get_rng_state()
    case.loss()
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_torchs_own_draws() -> None:
    case = _case("mixed")
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(case.loss(generator=None))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_defaults_are_the_papers() -> None:
    parameters = inspect.signature(importance_sampling_loss).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults == {
        "num_samples": 10,
        "generator": None,
        "posterior": "binomial",
        "valid": None,
    }


def test_number_of_samples(drawn: list[tuple[Tensor, Tensor]]) -> None:
    case = _case("mixed")
    case.loss()
    assert drawn[-1][1].shape == (9, 10)
    case.loss(num_samples=3)
    assert drawn[-1][1].shape == (9, 3)


def test_one_class_makes_the_posteriors_equal() -> None:
    case = _case("one_class")
    torch.testing.assert_close(case.loss(posterior="multinomial"), case.loss())


def test_constant_scores_by_hand() -> None:
    # all posteriors of two classes and the background 1/3
    case = Case(torch.zeros(1, 2, 2, 2), torch.tensor([[1.0, 0.0]]))
    assert case.loss().item() == pytest.approx(math.log(2))
    expected = (math.log(3) + math.log(3 / 2)) / 2
    assert case.loss(posterior="multinomial").item() == pytest.approx(expected)


def test_more_samples_vary_less() -> None:
    case = _case("mixed")
    one, many = (
        torch.stack([case.loss(seed=seed, num_samples=n) for seed in range(40)]) for n in (1, 50)
    )
    assert many.std() < one.std() / 3
    assert many.mean().item() == pytest.approx(one.mean().item(), abs=0.3)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("name", ["empty_map", "large"])
def test_extreme_scores_stay_finite(name: str, posterior: str) -> None:
    case = _case(name)
    case.scores = case.scores.float()
    case.labels.fill_(1)
    value, gradient = value_and_gradient(lambda s: case.loss(s, posterior=posterior), case.scores)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if name == "empty_map":
        assert (gradient.sum((2, 3)) < -1e-3).all()  # present classes are pulled up from there


def test_a_wrong_certainty_keeps_its_gradient() -> None:
    # posteriors that round to 1 in float32, of a class that is not there
    scores, labels = torch.full((1, 1, 2, 2), 60.0), torch.zeros(1, 1)
    case = Case(scores, labels)
    for posterior in POSTERIORS:
        value, gradient = value_and_gradient(
            lambda s, p=posterior: case.loss(s, posterior=p), scores
        )
        assert value.item() == pytest.approx(60)
        assert gradient.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_diverged_network_makes_a_loss_that_is_not_finite(posterior: str) -> None:
    """Not an error of the draw, which on a GPU would end the process without a word why."""
    case = _case()
    diverged = case.scores.masked_fill(torch.ones_like(case.scores, dtype=torch.bool), torch.nan)
    assert case.loss(diverged, posterior=posterior).isnan()
    partly = case.scores.clone()
    partly[0, 0, 0, 0] = torch.nan
    case.loss(partly, posterior=posterior)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e4])
def test_padding_has_no_say(content: float, posterior: str) -> None:
    case = _case("one_image_not_valid")
    assert case.valid is not None
    other = replace(case, scores=case.scores.masked_fill(~case.valid[:, None], content))
    case.options = other.options = {"posterior": posterior}
    expected = value_and_gradient(case.loss, case.scores)
    found = value_and_gradient(other.loss, other.scores)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not found[1].masked_select(~case.valid[:, None]).any()


def test_none_valid_is_zero_with_a_zero_gradient() -> None:
    case = _case("none_valid")
    value, gradient = value_and_gradient(case.loss, case.scores)
    assert value.item() == 0
    assert not gradient.any()


def test_inputs_stay_as_they_were() -> None:
    case = _case("padding")
    before = case.scores.clone()
    value_and_gradient(case.loss, case.scores)
    assert torch.equal(case.scores, before)


@pytest.mark.parametrize(
    "change",
    [
        {"scores": torch.randn(3, 3, 20)},
        {"labels": torch.ones(3, 4)},
        {"labels": torch.ones(3)},
        {"valid": torch.ones(3, 1, 4, 5).bool()},
        {"valid": torch.ones(3, 5, 4).bool()},
        {"options": {"num_samples": 0}},
        {"options": {"posterior": "softmax"}},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|need"):
        replace(_case("mixed"), **change).loss()
