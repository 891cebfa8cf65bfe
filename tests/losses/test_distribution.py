"""Distribution loss of UniA against loops; its noise against K samples."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import unia_uncertainty as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.losses import distribution as module
from wsss.losses import distribution_loss
from wsss.losses.distribution import distribution_terms, mean_noise, sampled_logit

DIM, CLASSES, SAMPLES = 3, 2, 4


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


@dataclass
class Case:
    """Parameters hold mu and sigma side by side, (B, 2, D, h, w), so one gradient has both."""

    parameters: Tensor
    cam: Tensor
    noise: Tensor
    valid: Tensor | None = None
    threshold: float = 0.6
    epsilon: float = 0.02
    regulariser: float = 0.3
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self, parameters: Tensor) -> Tensor:
        mu, sigma = parameters.unbind(1)
        return distribution_loss(
            mu,
            sigma,
            self.cam,
            self.threshold,
            len(self.noise),
            epsilon=self.epsilon,
            regulariser=self.regulariser,
            valid=self.valid,
        )

    def oracle(self, parameters: Tensor) -> Tensor:
        mu, sigma = parameters.unbind(1)
        return oracle.distribution(
            mu,
            sigma,
            self.cam,
            self.noise,
            self.threshold,
            self.epsilon,
            self.regulariser,
            self.valid,
        )


def _case(name: str) -> Case:
    grid = {"one_position": (1, 1), "row": (1, 5), "tall": (5, 2)}.get(name, (3, 4))
    shape = (2, DIM, *grid)
    mu, sigma = _randn(*shape), F.softplus(_randn(*shape, seed=1))
    cam = torch.rand(2, CLASSES, *grid, generator=_generator(2), dtype=torch.float64)
    case = Case(torch.stack([mu, sigma], 1), cam, _randn(SAMPLES, *shape, seed=3))
    if name == "no_foreground":
        case.cam = cam * 0.5
    elif name == "all_foreground":
        case.cam = cam * 0.3 + 0.65
    elif name == "nothing_in_one_image":
        case.cam[0] = 0
    elif name == "at_the_threshold":
        case.cam = torch.full_like(cam, 0.6)
    elif name == "constant":
        case.parameters = torch.full_like(case.parameters, 0.8)
    elif name == "mu_only":
        case.noise = case.noise[:0]
    elif name == "one_sample":
        case.noise = case.noise[:1]
    elif name == "large":
        case.parameters = case.parameters * 6
    elif name == "padding":
        case.valid = torch.rand(2, *grid, generator=_generator(4)) < 0.5
    elif name == "one_image_not_valid":
        case.valid = torch.ones(2, *grid, dtype=torch.bool)
        case.valid[1] = False
    elif name == "none_valid":
        case.valid = torch.zeros(2, *grid, dtype=torch.bool)
    return case


CASES = [
    *("mixed", "one_position", "row", "tall", "no_foreground", "all_foreground"),
    *("nothing_in_one_image", "at_the_threshold", "constant", "mu_only", "one_sample", "large"),
    *("padding", "one_image_not_valid", "none_valid"),
]


@pytest.fixture
def given_noise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the loss take the mean of a case's samples for what it would have drawn."""

    def give(case: Case) -> Case:
        def mean_of_samples(like: Tensor, num_samples: int, generator: Any) -> Tensor:
            assert num_samples == len(case.noise)
            return case.noise.mean(0).to(like.dtype)

        monkeypatch.setattr(module, "mean_noise", mean_of_samples)
        return case

    return give


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_of_k_samples(name: str, given_noise: Any) -> None:
    case = given_noise(_case(name))
    assert_matches_oracle(case.loss, case.oracle, case.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "constant", "mu_only", "padding", "none_valid"])
def test_low_precision(name: str, dtype: torch.dtype, given_noise: Any) -> None:
    case = given_noise(_case(name))
    assert_matches_oracle(case.loss, case.oracle, case.parameters, dtype)


def test_gradcheck(given_noise: Any) -> None:
    case = given_noise(_case("padding"))
    assert torch.autograd.gradcheck(case.loss, case.parameters.requires_grad_())


def test_autocast_changes_nothing(given_noise: Any) -> None:
    case = given_noise(_case("mixed"))
    case.cam = case.cam.float()
    expected = value_and_gradient(case.loss, case.parameters.float())

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(x)

    found = value_and_gradient(loss, case.parameters.float())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def _chunked_noise(like: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """The mean of K samples drawn a few at a time: what a direct draw stands for."""
    total = torch.zeros_like(like)
    for start in range(0, num_samples, 7):
        chunk = min(7, num_samples - start)
        total += torch.randn(chunk, *like.shape, generator=generator, dtype=like.dtype).sum(0)
    return total / num_samples


def _logits(drawing: Any, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """4000 logits of one position, and of each the gradient by sigma of the first channel."""
    mu, sigma = torch.tensor([0.3, -0.1, 0.4]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    shape = (1, DIM, 1, 4000)
    mu = mu.view(1, DIM, 1, 1).expand(shape)
    sigma = sigma.view(1, DIM, 1, 1).expand(shape).clone().requires_grad_()
    logits = sampled_logit(mu, sigma, drawing(mu, num_samples, _generator(seed)))
    (gradient,) = torch.autograd.grad(logits.sum(), sigma)
    return logits.detach().flatten(), gradient[0, 0].flatten()


def _distance(one: Tensor, two: Tensor) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the cumulative distributions."""
    both = torch.cat([one, two]).sort().values
    shares = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (one, two)]
    return (shares[0] - shares[1]).abs().max().item()


@pytest.mark.parametrize("num_samples", [1, 10, 50])
def test_direct_draw_is_distributed_as_k_samples(num_samples: int) -> None:
    direct, chunked = (
        _logits(f, num_samples, s) for f, s in ((mean_noise, 0), (_chunked_noise, 1))
    )
    limit = 1.95 * math.sqrt(2 / 4000)  # exceeded once in a thousand pairs of equal distributions
    for one, two in zip(direct, chunked, strict=True):
        assert _distance(one, two) < limit
        assert _distance((one - one.mean()) * 1.5, two - two.mean()) > limit  # a wrong K is seen
    # mean_d mu_d, and sum_d sigma_d^2 / (D^2 K)
    logits, gradient = direct
    deviation = math.sqrt((0.25 + 1 + 4) / (DIM**2 * num_samples))
    assert logits.mean().item() == pytest.approx(0.2, abs=4 * deviation / 4000**0.5)
    assert logits.std().item() == pytest.approx(deviation, rel=0.05)
    # of the gradient: eps / D, eps of variance 1 / K
    assert gradient.std().item() == pytest.approx(1 / (DIM * num_samples**0.5), rel=0.05)
    # logit and gradient vary together as the first channel's share says
    expected = 0.5 / math.sqrt(0.25 + 1 + 4)
    assert torch.corrcoef(torch.stack([logits, gradient]))[0, 1].item() == pytest.approx(
        expected, abs=0.05
    )


def test_k_samples_one_by_one_have_the_same_value_and_gradient() -> None:
    case = _case("mixed")
    mu, sigma = case.parameters.unbind(1)
    mu, sigma = mu.clone().requires_grad_(), sigma.clone().requires_grad_()
    every = torch.stack([mu + noise * sigma for noise in case.noise]).mean((0, 2))
    once = sampled_logit(mu, sigma, case.noise.mean(0))
    torch.testing.assert_close(once, every)
    weights = _randn(*once.shape, seed=5)
    for leaf in (mu, sigma):
        one, two = (
            torch.autograd.grad((x * weights).sum(), leaf, retain_graph=True)[0]
            for x in (once, every)
        )
        torch.testing.assert_close(one, two)


def test_every_element_has_noise_of_its_own() -> None:
    noise = mean_noise(torch.zeros(2, 3, 4, 5), 9, _generator())
    assert len(noise.unique()) == noise.numel()


def test_generator_decides() -> None:
    case = _case("mixed")
    mu, sigma = case.parameters.unbind(1)

    def loss(seed: int | None) -> float:
        generator = None if seed is None else _generator(seed)
        return distribution_loss(mu, sigma, case.cam, generator=generator).item()

    assert loss(1) == loss(1) != loss(2)
    torch.manual_seed(7)
    first = loss(None)
    assert first != loss(None)
    torch.manual_seed(7)
    assert loss(None) == first


def test_mu_only_gives_sigma_no_gradient_and_draws_nothing() -> None:
    case = _case("mu_only")
    state = torch.get_rng_state()
    gradient = value_and_gradient(case.loss, case.parameters)[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert not gradient[:, 1].any()
    assert gradient[:, 0].all()


def test_terms_add_up() -> None:
    case = _case("mixed")
    mu, sigma = case.parameters.unbind(1)
    terms = distribution_terms(mu, sigma, case.cam, 0.6, 5, _generator(), 0.1)
    whole = distribution_loss(mu, sigma, case.cam, 0.6, 5, _generator(), 0.1, 0.3)
    torch.testing.assert_close(whole, terms.kl + 0.3 * terms.regulariser)
    alone = distribution_loss(mu, sigma, case.cam, 0.6, 5, _generator(), 0.1, 0.0)
    torch.testing.assert_close(alone, terms.kl)


def test_regulariser_is_that_of_torch() -> None:
    case = _case("mixed")
    mu, sigma = case.parameters.unbind(1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, sigma), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(distribution_terms(mu, sigma, case.cam).regulariser, expected)


def test_kl_is_that_of_torch() -> None:
    case = _case("mixed")
    mu, sigma = case.parameters.unbind(1)
    bernoulli = torch.distributions.Bernoulli
    mask = (case.cam.amax(1) > 0.6).double().clamp(0.05, 0.95)
    expected = torch.distributions.kl_divergence(bernoulli(logits=mu.mean(1)), bernoulli(mask))
    found = distribution_terms(mu, sigma, case.cam, 0.6, 0, epsilon=0.05).kl
    torch.testing.assert_close(found, expected.mean())


def test_no_loss_where_everything_fits() -> None:
    # the mask's own logit with a prior's distribution: nothing to say
    cam = torch.zeros(1, 1, 2, 2)
    cam[..., 0] = 1
    mask = cam[:, 0].clamp(0.01, 0.99)
    mu = mask.logit()[:, None].expand(1, 4, 2, 2)
    terms = distribution_terms(mu, torch.ones_like(mu), cam, num_samples=0)
    assert terms.kl.item() == pytest.approx(0, abs=1e-6)
    terms = distribution_terms(torch.zeros_like(mu), torch.ones_like(mu), cam)
    assert terms.regulariser.item() == pytest.approx(0, abs=1e-7)


def test_how_hard_it_pulls() -> None:
    for epsilon in (1e-2, 1e-5):
        mu = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        gradient = value_and_gradient(
            lambda m, e=epsilon: (
                distribution_terms(
                    m, torch.ones_like(m), torch.ones(1, 1, 1, 1), num_samples=0, epsilon=e
                ).kl
            ),
            mu,
        )[1]
        assert gradient.item() == pytest.approx(-math.log(1 / epsilon - 1) / 4)


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (12, 4), (2, 2)], ids=str)
def test_cam_of_another_size_is_resized_before_the_threshold(size: tuple[int, int]) -> None:
    case = _case("mu_only")
    case.cam = torch.rand(2, CLASSES, *size, generator=_generator(5), dtype=torch.float64)
    case.threshold = 0.5
    resized = F.interpolate(case.cam, size=(3, 4), mode="bilinear", align_corners=False)
    expected = replace(case, cam=resized)
    torch.testing.assert_close(case.loss(case.parameters), expected.oracle(case.parameters))


def test_cam_gets_no_gradient_and_is_compared_in_full_precision() -> None:
    # not 0, where both masks cost the same
    mu, sigma = torch.full((1, 2, 1, 1), 0.5, requires_grad=True), torch.ones(1, 2, 1, 1)
    cam = torch.full((1, 1, 1, 1), 0.7001, requires_grad=True)
    loss = distribution_loss(mu, sigma, cam, num_samples=0)
    loss.backward()
    assert cam.grad is None
    assert mu.grad is not None
    assert mu.grad.lt(0).all()  # foreground: up
    # the mean of two bfloat16 neighbours, 0.70508, would be rounded down to 0.70313
    cam = torch.tensor([180, 181]).div(256).bfloat16().view(1, 1, 1, 2)
    torch.testing.assert_close(distribution_loss(mu, sigma, cam, 0.704, num_samples=0), loss)


def test_validity_of_the_pixels_is_taken_to_the_grid() -> None:
    case = _case("mu_only")
    valid = torch.zeros(2, 12, 16, dtype=torch.bool)
    valid[:, :8, 4:] = True
    on_grid = torch.zeros(2, 3, 4, dtype=torch.bool)
    on_grid[:, :2, 1:] = True
    found = replace(case, valid=valid).loss(case.parameters)
    torch.testing.assert_close(found, replace(case, valid=on_grid).loss(case.parameters))


@pytest.mark.parametrize("extreme", [0.0, 1e-30, 1e4])
def test_extreme_deviations_stay_finite(extreme: float) -> None:
    case = _case("mixed")
    parameters = case.parameters.float()
    parameters[:, 1] = extreme
    value, gradient = value_and_gradient(case.loss, parameters)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_extreme_means_stay_finite(extreme: float) -> None:
    mu = torch.full((1, 2, 2, 2), extreme)
    for cam in (torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)):
        value, gradient = value_and_gradient(
            lambda m, c=cam: distribution_terms(m, torch.ones_like(m), c, num_samples=0).kl, mu
        )
        right = (extreme > 0) == bool(cam.all())
        assert value.item() == pytest.approx(-math.log(0.99 if right else 0.01), rel=1e-4)
        assert gradient.isfinite().all()


class Watch(TorchDispatchMode):
    """The largest result, in elements, and how many results are as large as mu."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.sizes.append(result.numel())
        return result


def test_work_does_not_depend_on_the_samples() -> None:
    case = _case("mixed")
    sizes = []
    for num_samples in (1, 70):
        mu, sigma = case.parameters.clone().requires_grad_().unbind(1)
        with Watch() as watch:
            distribution_loss(mu, sigma, case.cam, num_samples=num_samples).backward()
        sizes.append(watch.sizes)
    assert sizes[0] == sizes[1]
    assert max(sizes[0]) <= case.parameters.numel()


def test_defaults_are_the_papers() -> None:
    parameters = inspect.signature(distribution_loss).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults == {
        "threshold": 0.7,
        "num_samples": 50,
        "generator": None,
        "epsilon": 0.01,
        "regulariser": 0.01,
        "valid": None,
    }
    terms = inspect.signature(distribution_terms).parameters
    assert all(terms[n].default == v for n, v in defaults.items() if n != "regulariser")


@pytest.mark.parametrize(
    "change",
    [
        {"mu": torch.zeros(2, 3, 4)},
        {"sigma": torch.ones(2, 3, 4, 1)},
        {"cam": torch.zeros(2, 3, 4)},
        {"cam": torch.zeros(1, 2, 3, 4)},
        {"valid": torch.ones(1, 3, 4).bool()},
        {"valid": torch.ones(2, 1, 3, 4).bool()},
        {"num_samples": -1},
        {"epsilon": 0.0},
        {"epsilon": 0.5},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "mu": torch.zeros(2, 3, 3, 4),
        "sigma": torch.ones(2, 3, 3, 4),
        "cam": torch.zeros(2, 2, 3, 4),
    }
    distribution_loss(**arguments)
    with pytest.raises(ValueError, match=r"must be|needs|above 0"):
        distribution_loss(**{**arguments, **change})
