"""Uncertainty inference network of UniA against loops, and what it promises beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import unia_uncertainty as oracle
from wsss.errors import UserError
from wsss.nn import NeckOutput, UncertaintyNeck
from wsss.nn.neck import ChannelAffine, min_max

DIM = 4
GRIDS = [(4, 4), (3, 5), (5, 2), (1, 1), (1, 3)]
BRANCHES = {
    "both": {},
    "channel_only": {"spatial": False},
    "spatial_only": {"channel": False},
}
#: weights of the sum that gradients are taken of
SHARES = (1.0, 0.7, -0.4, 1.3)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(**options: Any) -> UncertaintyNeck:
    """A neck whose parameters are all far from where they start."""
    neck = UncertaintyNeck(DIM, **{"window": 2, **options}).double()
    for n, parameter in enumerate(neck.parameters()):
        parameter.data = _randn(*parameter.shape, seed=100 + n)
    return neck


def outputs(neck: UncertaintyNeck, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = neck(features)
    assert isinstance(output, NeckOutput)
    assert output.mu is not None
    assert output.sigma is not None
    assert output.uncertainty is not None
    return output.features, output.mu, output.sigma, output.uncertainty


def objective(found: tuple[Tensor, ...]) -> Tensor:
    """A number in which every element of every output has a weight of its own."""
    terms = [s * (x * _randn(*x.shape, seed=9)).sum() for s, x in zip(SHARES, found, strict=True)]
    return torch.stack(terms).sum()


def assert_matches(neck: UncertaintyNeck, features: Tensor, scale: str = "image") -> None:
    """Values, and gradients by features and parameters."""
    features = features.requires_grad_()
    parameters = dict(neck.named_parameters())
    names, leaves = list(parameters), [features, *parameters.values()]
    channel, spatial = neck.channel_mu is not None, neck.spatial_mu is not None
    expected = oracle.neck(features, parameters, neck.window, channel, spatial, scale)
    if neck.residual:
        expected = (features + expected[0], *expected[1:])
    found = outputs(neck, features)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)
    gradients = [
        torch.autograd.grad(objective(x), leaves, allow_unused=True, materialize_grads=True)
        for x in (found, expected)
    ]
    for name, gradient, wanted in zip(["features", *names], *gradients, strict=True):
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_and_gradients(grid: tuple[int, int], branches: str) -> None:
    assert_matches(make(**BRANCHES[branches]), _randn(2, DIM, *grid))


@pytest.mark.parametrize("grid", [(3, 5), (1, 1)], ids=str)
def test_scale_of_each_channel(grid: tuple[int, int]) -> None:
    assert_matches(make(scale="channel"), _randn(2, DIM, *grid), "channel")


@pytest.mark.parametrize("grid", [(3, 5), (1, 1)], ids=str)
def test_residual(grid: tuple[int, int]) -> None:
    assert_matches(make(residual=True), _randn(2, DIM, *grid))


@pytest.mark.parametrize("window", [1, 3, 4, 50])
def test_windows(window: int) -> None:
    assert_matches(make(window=window), _randn(1, DIM, 5, 6))


def test_gradcheck() -> None:
    neck = make()
    features = _randn(1, DIM, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: outputs(neck, x), features)


def test_padding_of_a_window_never_wins() -> None:
    # all features negative: a padding of 0 would be the maximum
    neck = make()
    features = -1 - _randn(1, DIM, 3, 3).abs()
    assert_matches(neck, features)


def test_the_branches_are_those_asked_for() -> None:
    names = {
        key: {n.split(".")[0] for n, _ in make(**o).named_parameters()}
        for key, o in BRANCHES.items()
    }
    channel, spatial = {"channel_mu", "channel_sigma"}, {"spatial_mu", "spatial_sigma"}
    assert names["both"] == {*channel, *spatial, "masking"}
    assert names["channel_only"] == {*channel, "masking"}
    assert names["spatial_only"] == {*spatial, "masking"}


def test_channel_branch_is_a_depth_wise_convolution() -> None:
    layer = ChannelAffine(DIM).double()
    layer.weight.data, layer.bias.data = _randn(DIM), _randn(DIM, seed=1)
    features = _randn(2, DIM, 3, 5)
    expected = F.conv2d(features, layer.weight.view(DIM, 1, 1, 1), layer.bias, groups=DIM)
    torch.testing.assert_close(layer(features.movedim(1, -1)).movedim(-1, 1), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges(grid: tuple[int, int]) -> None:
    _, _, sigma, uncertainty = outputs(make(), _randn(2, DIM, *grid) * 5)
    assert sigma.min() > 0
    # over channels and positions together, for each image
    torch.testing.assert_close(uncertainty.amin((1, 2, 3)), torch.zeros(2).double())
    torch.testing.assert_close(uncertainty.amax((1, 2, 3)), torch.ones(2).double())


def test_images_do_not_see_each_other() -> None:
    neck, features = make(), _randn(3, DIM, 3, 5)
    features[1] *= 7
    together = outputs(neck, features)
    for b in range(3):
        for whole, single in zip(together, outputs(neck, features[b : b + 1]), strict=True):
            torch.testing.assert_close(whole[b : b + 1], single)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("scale", ["image", "channel"])
def test_constant_sigma_masks_nothing(scale: str, value: float) -> None:
    neck = make(scale=scale, spatial=False)
    assert neck.channel_sigma is not None
    neck.channel_sigma.weight.data.zero_()
    neck.channel_sigma.bias.data.fill_(value)
    features = _randn(2, DIM, 3, 4).requires_grad_()
    masked, _, sigma, uncertainty = outputs(neck, features)
    assert not uncertainty.any()
    torch.testing.assert_close(
        sigma, torch.full_like(sigma, F.softplus(torch.tensor(value + 0.541324854612918)).item())
    )
    expected = F.scaled_dot_product_attention(
        *(
            layer(features.flatten(2).mT)
            for layer in (neck.masking.query, neck.masking.key, neck.masking.value)
        )
    )
    torch.testing.assert_close(masked, expected.mT.unflatten(2, (3, 4)))
    masked.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in neck.parameters())
    assert not neck.channel_sigma.bias.grad.any()  # type: ignore[union-attr]


def test_constant_features() -> None:
    neck = UncertaintyNeck(DIM)
    features = torch.full((1, DIM, 5, 6), 0.5, requires_grad=True)
    found = outputs(neck, features)
    torch.stack([x.square().sum() for x in found]).sum().backward()
    assert all(x.isfinite().all() for x in found)
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("spread", [1e-7, 1.0])
def test_min_max(spread: float) -> None:
    x = 1 + spread * torch.rand(
        2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    x.requires_grad_()
    found = min_max(x, (1, 2))
    found.sum().backward()
    assert x.grad is not None
    if spread < 1e-5:
        assert not found.any()
        assert not x.grad.any()
    else:
        assert found.amin((1, 2)).tolist() == [0, 0]
        assert found.amax((1, 2)).tolist() == [1, 1]
        assert x.grad.abs().max() > 1e-3


def test_no_sampling_in_training_or_evaluation() -> None:
    neck, features = make(), _randn(2, DIM, 5, 3)
    trained = outputs(neck.train(), features)
    state = torch.get_rng_state()
    first, second = outputs(neck.eval(), features), outputs(neck.eval(), features)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two, three in zip(first, second, trained, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def _scene(dim: int = 192) -> tuple[Tensor, Tensor]:
    """Features as behind a ViT's final norm: four regions with a vector each, and noise."""
    generator = torch.Generator().manual_seed(0)
    regions = torch.randn(1, dim, 2, 2, generator=generator)
    regions = F.interpolate(regions, size=(10, 14), mode="nearest")
    features = regions + torch.randn(regions.shape, generator=generator) * 0.5
    return F.layer_norm(features.movedim(1, -1), (dim,)).movedim(-1, 1), regions


@pytest.mark.parametrize("branches", BRANCHES)
def test_features_are_useful_at_the_start(branches: str) -> None:
    features, regions = _scene()
    torch.manual_seed(0)
    neck = UncertaintyNeck(192, **BRANCHES[branches])
    masked, mu, sigma, uncertainty = outputs(neck, features)
    # a little of each channel is held back: the direction stays
    assert F.cosine_similarity(masked, features).mean() > 0.85
    assert F.cosine_similarity(masked, regions).mean() > 0.85
    # not an average of the image: regions stay as far apart as they were
    one, other = masked[..., 2, 2], masked[..., 8, 12]
    assert F.cosine_similarity(one, other).item() < 0.2
    assert 0.05 < uncertainty.std() < 0.5
    assert 0.5 < sigma.mean() < 1.5
    if branches == "channel_only":
        torch.testing.assert_close(mu, features)


@pytest.mark.parametrize("branches", BRANCHES)
def test_everything_learns_from_the_first_step_on(branches: str) -> None:
    features, _ = _scene(dim=32)
    neck = UncertaintyNeck(32, **BRANCHES[branches])
    masked, mu, *_ = outputs(neck, features)
    (masked.square().sum() + mu.square().sum()).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("branches", BRANCHES)
def test_masking_alone_trains_sigma_and_not_mu(branches: str) -> None:
    """Yet all have a gradient, where DDP wants one of every parameter; evaluation adds nothing."""
    features, _ = _scene(dim=32)
    neck = UncertaintyNeck(32, **BRANCHES[branches])
    neck(features).features.square().sum().backward()
    assert all(p.grad is not None for p in neck.parameters())
    without = {name.split(".")[0] for name, p in neck.named_parameters() if not p.grad.any()}  # type: ignore[union-attr]
    mu = {"both": {"channel_mu", "spatial_mu"}, "channel_only": {"channel_mu"}}
    assert without == mu.get(branches, {"spatial_mu"})
    trained = [p.grad.clone() for p in neck.parameters()]  # type: ignore[union-attr]

    neck.zero_grad()
    neck.eval()(features).features.square().sum().backward()
    for (name, p), gradient in zip(neck.named_parameters(), trained, strict=True):
        if name.split(".")[0] in without:
            assert p.grad is None, name
        else:
            assert torch.equal(p.grad, gradient), name  # type: ignore[arg-type]


def test_zero_path_of_mu_keeps_low_precision() -> None:
    neck = UncertaintyNeck(DIM).bfloat16().train()
    features = neck(_randn(1, DIM, 3, 3).bfloat16()).features
    assert features.dtype == torch.bfloat16


@pytest.mark.parametrize("branches", BRANCHES)
def test_reset_is_a_new_start(branches: str) -> None:
    torch.manual_seed(3)
    neck = UncertaintyNeck(16, **BRANCHES[branches])
    started = {name: value.clone() for name, value in neck.state_dict().items()}
    for parameter in neck.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(3)
    neck.reset_parameters()
    for name, value in neck.state_dict().items():
        assert value.ne(7).any(), name
        fixed = name.startswith("masking") or name.startswith("channel_mu") or "bias" in name
        assert torch.equal(value, started[name]) or not fixed, name
        assert fixed or 0.01 < value.std() < 0.03, name


@pytest.mark.parametrize("grid", [(7, 5), (1, 1)], ids=str)
def test_low_precision(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    neck = UncertaintyNeck(32)
    features = _randn(2, 32, *grid).float()
    expected = outputs(neck, features)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(neck, features.clone().requires_grad_())
        found_from_low = outputs(neck, features.bfloat16())
    assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
    assert [x.dtype for x in found_from_low] == [torch.bfloat16, *[torch.float32] * 3]
    for x in (found, found_from_low):
        for value, wanted in zip(x, expected, strict=True):
            torch.testing.assert_close(value.float(), wanted, rtol=0.02, atol=0.05)
    found[0].float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in neck.parameters())
    neck.bfloat16()
    assert neck(features.bfloat16()).features.dtype == torch.bfloat16


class Watch(TorchDispatchMode):
    """The largest result, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return result


def test_no_matrix_of_all_pairs_is_held() -> None:
    features = torch.randn(1, 8, 20, 24, requires_grad=True)
    neck = UncertaintyNeck(8)
    with Watch() as watch:
        neck(features).features.sum().backward()
    assert features.numel() <= watch.largest < 20 * 24 * (20 * 24 // 16)


@pytest.mark.parametrize("scale", ["image", "channel"])
def test_state_dict_round_trip(scale: str) -> None:
    neck, other = make(scale=scale), UncertaintyNeck(DIM, window=2, scale=scale).double()
    other.load_state_dict(neck.state_dict())
    features = _randn(1, DIM, 4, 3)
    assert torch.equal(neck(features).features, other(features).features)


def test_defaults_are_the_papers() -> None:
    neck = UncertaintyNeck(DIM)
    assert neck.window == 4
    assert neck.scale == "image"
    assert not neck.residual
    assert neck.channel_mu is not None
    assert neck.spatial_mu is not None
    assert NeckOutput(torch.zeros(1))[1:] == (None, None, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channel": False, "spatial": False}, "neck.channel=false"),
        ({"window": 0}, "neck.window=0"),
        ({"scale": "batch"}, "neck.scale='batch'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        UncertaintyNeck(DIM, **options)
