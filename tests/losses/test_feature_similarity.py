"""``feature_similarity_loss`` against its oracle; what it leaves out; its memory."""

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

from tests.oracle import isl_fsl as oracle
from tests.oracle.compare import assert_matches_oracle, value_and_gradient
from wsss.losses import feature_similarity as module
from wsss.losses import feature_similarity_loss

GATES = ["max_norm", "binomial", "multinomial", "none"]


@dataclass
class Case:
    scores: Tensor
    images: Tensor
    labels: Tensor | None = None
    valid: Tensor | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"sigma": 2.0})

    def loss(self, scores: Tensor | None = None, **options: Any) -> Tensor:
        s = self.scores if scores is None else scores
        return feature_similarity_loss(
            s, self.images, self.labels, valid=self.valid, **{**self.options, **options}
        )

    def oracle(self, scores: Tensor) -> Tensor:
        return oracle.feature_similarity(
            scores, self.images, self.labels, valid=self.valid, **self.options
        )

    def image(self, n: int) -> Case:
        one = slice(n, n + 1)
        return replace(
            self,
            scores=self.scores[one],
            images=self.images[one],
            labels=None if self.labels is None else self.labels[one],
            valid=None if self.valid is None else self.valid[one],
        )


def _random(size: tuple[int, int], number: int = 2, classes: int = 3, **options: Any) -> Case:
    """Pairs of like and of unlike colours; scores of both signs; a class present or not."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(number, classes, *size, generator=generator).double() * 2
    images = torch.rand(number, 3, 1, 1, generator=generator).double().expand(-1, -1, *size)
    images = images + torch.randn(number, 3, *size, generator=generator).double() * 0.08
    labels = (torch.rand(number, classes, generator=generator) < 0.5).double()
    labels[:, 0] = torch.arange(number) % 2
    labels[:, -1] = 1
    return Case(scores, images, labels, None, {"sigma": 2.0, **options})


def _case(name: str) -> Case:
    case = _random((4, 5))
    padding = torch.ones(2, 4, 5, dtype=torch.bool)
    padding[0, -1] = padding[0, :, :2] = False
    if name in SIZES:
        case = _random(SIZES[name])
    elif name == "one_image":
        case = case.image(1)
    elif name == "one_class":
        case = _random((4, 5), classes=1)
    elif name == "no_labels":
        case.labels = None
    elif name == "no_class":
        case.labels = torch.zeros(2, 3)
    elif name == "one_image_without_class":
        case.labels = torch.tensor([[0, 0, 0], [0, 1, 1]])
    elif name == "all_classes":
        case.labels = torch.ones(2, 3)
    elif name == "constant_maps":
        case.scores = torch.full_like(case.scores, 0.7)
    elif name == "negative_maps":
        case.scores = -case.scores.abs() - 0.1
    elif name == "positive_maps":  # with a minimum above 0
        case.scores = case.scores.abs() + 0.2
    elif name == "constant_image":
        case.images = torch.full_like(case.images, 0.4)
    elif name == "contrast":  # distances of 0 and of 1
        case.images = (case.images > 0.5).double()
    elif name == "out_of_range":
        case.images = case.images * 3 - 1
    elif name == "padding":
        case.valid = padding
    elif name == "padding_holds_the_extremes":
        case.valid = padding
        case.scores = case.scores.abs() + 0.2
        case.scores[0, :, -1, 0], case.scores[0, :, -1, 1] = 9, 0.1
    elif name == "one_image_not_valid":
        padding[1] = False
        case.valid = padding
    elif name == "none_valid":
        case.valid = torch.zeros_like(padding)
    elif name == "one_valid_pixel":
        padding[:] = False
        padding[:, 1, 2] = True
        case.valid = padding
    elif name == "mu":
        case.options["mu"] = 0.6
    elif name == "wide":
        case.options["sigma"] = 5.0
    elif name == "narrow":
        case.options["sigma"] = 0.4
    return case


SIZES = {"one_pixel": (1, 1), "row": (1, 7), "column": (7, 1), "tall": (8, 3)}
CASES = [
    "mixed",
    *SIZES,
    *("one_image", "one_class", "no_labels", "no_class", "one_image_without_class", "all_classes"),
    *("constant_maps", "negative_maps", "positive_maps", "constant_image", "contrast"),
    *("out_of_range", "padding", "padding_holds_the_extremes", "one_image_not_valid"),
    *("none_valid", "one_valid_pixel", "mu", "wide", "narrow"),
]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    case = _case(name)
    assert_matches_oracle(case.loss, case.oracle, case.scores)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["mixed", "padding", "no_labels", "no_class"])
def test_gates(name: str, gate: str, background: bool) -> None:
    case = _case(name)
    case.options.update(gate=gate, background=background)
    assert_matches_oracle(case.loss, case.oracle, case.scores)


@pytest.mark.parametrize("tile", [1, 2000, 2**20])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("name", ["tall", "padding"])
def test_windows_and_tiles(
    name: str, window: int | None, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_TILE", tile)
    case = _case(name)
    case.options["window"] = window
    assert_matches_oracle(case.loss, case.oracle, case.scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "padding", "constant_maps", "no_class", "none_valid"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    case = _case(name)
    assert_matches_oracle(case.loss, case.oracle, case.scores, dtype)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str, background: bool) -> None:
    case = _case("padding")
    case.options.update(gate=gate, background=background, window=2)
    assert torch.autograd.gradcheck(case.loss, (case.scores.requires_grad_(),))


def test_a_second_derivative_is_refused() -> None:
    case = _case("mixed")
    scores = case.scores.requires_grad_()
    (gradient,) = torch.autograd.grad(case.loss(gate="none"), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.square().sum().backward()


def test_defaults_are_the_papers() -> None:
    parameters = inspect.signature(feature_similarity_loss).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults == {
        "labels": None,
        "mu": 2.5,
        "sigma": 5.0,
        "gate": "max_norm",
        "window": None,
        "background": False,
        "valid": None,
    }


def test_two_pixels_by_hand() -> None:
    # distance 1 across a step of 0.3 in one channel: d = 0.1
    images = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    images[0, 1, 0, 1] = 0.3
    r = torch.tensor([0.2, 0.8], dtype=torch.float64).view(1, 1, 1, 2)

    def loss(x: Tensor) -> Tensor:
        return feature_similarity_loss(x, images, mu=2.0, sigma=3.0, gate="none")

    w = math.exp(-1 / 18) / (18 * math.pi)
    f = math.tanh(2 + math.log((0.1 + 1e-5) / (0.9 + 1e-5)))
    value, gradient = value_and_gradient(loss, r)
    # two ordered pairs over two pixels
    assert value.item() == pytest.approx(-w * f * 0.6**2 / 2)
    assert gradient.flatten().tolist() == pytest.approx([w * f * 0.6, -w * f * 0.6])


@pytest.mark.parametrize("mu", [-300.0, -20.0, 20.0, 300.0])
def test_offsets_of_any_size(mu: float) -> None:
    case = _case("contrast")
    case.scores = case.scores.float()
    value = case.loss(mu=mu)
    alike = case.oracle(case.scores.double()) * 0 + _mass(case, mu)
    torch.testing.assert_close(value.double(), alike, rtol=1e-5, atol=1e-8)


def _mass(case: Case, mu: float) -> Tensor:
    return replace(case, options={**case.options, "mu": mu}).oracle(case.scores.double())


def test_mean_over_the_images() -> None:
    case = _case("padding")
    single = torch.stack([case.image(n).loss() for n in range(2)])
    torch.testing.assert_close(case.loss(), single.mean())


def test_padding_an_image_changes_nothing() -> None:
    case = _random((4, 5))
    bare, gradient = value_and_gradient(case.loss, case.scores)
    padding = (2, 1, 0, 3)
    padded = replace(
        case,
        scores=F.pad(case.scores, padding, value=50),
        images=F.pad(case.images, padding, value=1),
        valid=F.pad(torch.ones(2, 4, 5, dtype=torch.bool), padding, value=False),
    )
    value, padded_gradient = value_and_gradient(padded.loss, padded.scores)
    torch.testing.assert_close(value, bare)
    torch.testing.assert_close(padded_gradient, F.pad(gradient, padding))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e4])
def test_padding_has_no_say(content: float, gate: str) -> None:
    case = _case("one_image_not_valid")
    case.options.update(gate=gate, background=True)
    assert case.valid is not None
    outside = ~case.valid[:, None]
    other = replace(
        case,
        scores=case.scores.masked_fill(outside, content),
        images=case.images.masked_fill(outside, content),
    )
    expected = value_and_gradient(case.loss, case.scores)
    found = value_and_gradient(other.loss, other.scores)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not found[1].masked_select(outside).any()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("gate", ["max_norm", "binomial", "none"])
@pytest.mark.parametrize("name", ["no_class", "none_valid", "one_pixel", "one_valid_pixel"])
def test_nothing_to_compare_is_zero_with_a_zero_gradient(
    name: str, gate: str, background: bool
) -> None:
    case = _case(name)
    value, gradient = value_and_gradient(
        lambda s: case.loss(s, gate=gate, background=background), case.scores
    )
    assert value.item() == 0
    assert not gradient.any()


def test_absent_classes_get_no_gradient() -> None:
    case = _case("mixed")
    assert case.labels is not None
    gradient = value_and_gradient(lambda s: case.loss(s, gate="binomial"), case.scores)[1]
    present = case.labels.bool()
    assert not gradient[~present].any()
    assert gradient[present].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("gate", GATES)
def test_without_absent_classes_as_a_batch_without_labels(gate: str) -> None:
    case = _case("all_classes")
    expected = value_and_gradient(
        lambda s: replace(case, labels=None).loss(s, gate=gate), case.scores
    )
    torch.testing.assert_close(
        value_and_gradient(lambda s: case.loss(s, gate=gate), case.scores), expected
    )


def test_devices_other_than_a_cpu_do_not_wait_for_the_labels() -> None:
    # a meta tensor has no numbers to wait for
    case = _case("mixed")
    assert case.labels is not None
    inputs = (case.scores.to("meta"), case.labels.to("meta"))
    valid = torch.ones(2, 4, 5, dtype=torch.bool, device="meta")
    for gate in GATES:
        r = module._predictions(*inputs, gate, True, valid)
        assert r.shape == (2, 4, 4, 5)


def test_labels_of_any_kind() -> None:
    case = _case("mixed")
    assert case.labels is not None
    expected = case.loss()
    for labels in (case.labels.bool(), case.labels.long(), case.labels.float()):
        assert torch.equal(replace(case, labels=labels).loss(), expected)


def test_nearly_constant_predictions_keep_their_digits() -> None:
    # differences of 1e-3 around 100 in float32
    case = _random((6, 6), gate="none")
    case.scores = 100 + (case.scores * 1e-3 * 2**13).round() / 2**13
    expected, expected_gradient = value_and_gradient(case.oracle, case.scores)
    value, gradient = value_and_gradient(case.loss, case.scores.float())
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=0)
    scale = expected_gradient.abs().max()
    torch.testing.assert_close(
        gradient.double() / scale, expected_gradient / scale, rtol=0, atol=1e-3
    )


def test_autocast_changes_nothing() -> None:
    case = _case("mixed")
    case.scores = case.scores.float()
    expected = value_and_gradient(case.loss, case.scores)

    def loss(s: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(s)

    found = value_and_gradient(loss, case.scores)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_products_are_taken_in_full_precision() -> None:
    case = _random((6, 8))
    case.scores = case.scores.float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with Watch() as watch:
            case.loss()
    finally:
        torch.set_float32_matmul_precision(before)
    assert watch.precision == {"ieee"}


def _left_out(r: Tensor, sigma: float, window: int) -> Tensor:
    """(B, N, N) of ``w g`` of the pairs outside the window."""
    height, width = r.shape[2:]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    apart = (place[:, None] - place).abs()
    w = (-apart.square().sum(2) / (2 * sigma**2)).exp() / (2 * math.pi * sigma**2)
    flat = r.flatten(2).transpose(1, 2)
    g = torch.cdist(flat, flat).square() / 2
    return (apart.amax(2) > window) * w * g


def test_error_of_the_window() -> None:
    sigma, window = 5.0, 15
    case = _random((40, 44), gate="none", sigma=sigma)
    r = torch.rand(2, 3, 40, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    case.labels = None
    exact, exact_gradient = value_and_gradient(case.loss, r)
    value, gradient = value_and_gradient(lambda s: case.loss(s, window=window), r)
    error, bound = (value - exact).abs(), _left_out(r, sigma, window).sum() / (2 * 40 * 44)
    assert 0 < error <= bound
    # no more than 0.4 % of the weights, and g at most C / 2
    assert bound < 0.004 * 3 / 2
    # the gradient of a pixel: 2 / (B H W) sum of w over what is left out, differences at most 1
    largest = (gradient - exact_gradient).abs().max()
    assert 0 < largest <= 0.004 * 2 / (2 * 40 * 44)


def test_share_of_the_weights_in_three_sigmas() -> None:
    for sigma, most in ((1.0, 0.006), (5.0, 0.004), (20.0, 0.006)):
        distance = torch.arange(-200, 201)
        one = (-(distance / sigma).square() / 2).exp()
        share = one[distance.abs() <= math.ceil(3 * sigma)].sum() / one.sum()
        assert 1 - share**2 < most


def test_edges_attract_and_flat_regions_even_out() -> None:
    # The image has an edge at column 8, the map one at 6; the map goes to the image's.
    images = torch.zeros(1, 3, 12, 16, dtype=torch.float64)
    images[..., 8:] = 0.6
    slope = torch.sigmoid((torch.arange(16, dtype=torch.float64) - 5.5) / 2) * 2 - 1
    scores = slope.expand(1, 1, 12, 16).clone()
    truth = (torch.arange(16) >= 8).expand(1, 1, 12, 16)
    assert ((scores > 0) != truth).sum() == 2 * 12
    for _ in range(100):
        gradient = value_and_gradient(
            lambda s: feature_similarity_loss(s, images, gate="binomial"), scores
        )[1]
        scores -= gradient / gradient.abs().max() * 0.2
    assert ((scores > 0) == truth).all()


class Watch(TorchDispatchMode):
    """The largest result in bytes, and the precision of products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.precision: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
            if "mm" in str(function):
                self.precision.add(torch.backends.cuda.matmul.fp32_precision)
                self.precision.add(torch.backends.mkldnn.matmul.fp32_precision)
        return result


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("number", [1, 3])
def test_memory_stays_bounded(
    number: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_TILE", 2**18)
    case = _random((40, 44), number=number)  # all pairs of an image would take 12 MB
    with Watch() as watch:
        value_and_gradient(lambda s: case.loss(s, window=window), case.scores.float())
    assert watch.largest <= module.CPU_TILE


@pytest.mark.parametrize("radius", [1, 15, 500])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 40, 44), (8, 2, 56, 56), (64, 1, 9, 300)])
def test_tiles_are_as_large_as_allowed(shape: tuple[int, ...], radius: int) -> None:
    x = torch.zeros(shape)
    rows, columns = module._tile(x, radius)
    number, _, height, width = shape
    sides = (min(height, rows + radius), min(width, columns + 2 * radius))
    size = 4 * number * rows * columns * sides[0] * sides[1]
    assert size <= module.CPU_TILE
    assert size > module.CPU_TILE / 6 or rows == height
    assert columns <= 2 * radius  # a wider block would hold more pairs outside the window


@pytest.mark.parametrize(
    "change",
    [
        {"scores": torch.randn(2, 3, 20)},
        {"images": torch.rand(2, 3, 8, 10)},
        {"images": torch.rand(2, 1, 4, 5)},
        {"images": torch.rand(1, 3, 4, 5)},
        {"images": torch.randint(0, 255, (2, 3, 4, 5), dtype=torch.uint8)},
        {"labels": torch.ones(2, 4)},
        {"labels": torch.ones(3)},
        {"valid": torch.ones(2, 1, 4, 5).bool()},
        {"valid": torch.ones(2, 5, 4).bool()},
        {"options": {"gate": "softmax"}},
        {"options": {"sigma": 0.0}},
        {"options": {"sigma": float("nan")}},
        {"options": {"window": 0}},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|need|above 0"):
        replace(_case("mixed"), **change).loss()
