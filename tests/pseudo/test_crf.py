"""Dense CRF: presets and errors always; inference against the exact mean field.

The exact mean field also stands in for the package, so that all that happens around it is checked
to the last digit wherever the tests run. The package itself approximates the Gaussian sums.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracle import crf as oracle
from wsss.errors import UserError
from wsss.pseudo import CRF_PRESETS, CRFPreset, dense_crf

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason="pydensecrf2 is not installed (pip install 'wsss[crf]')",
)
#: Kernels that reach across a picture of a few pixels, without drowning it.
MILD = CRFPreset(3, 1.5, 2, 4, 30, 3)


class ExactCRF:
    """What ``pydensecrf.densecrf.DenseCRF2D`` promises, slowly."""

    def __init__(self, width: int, height: int, classes: int) -> None:
        self.shape = (classes, height, width)
        self.terms: list[tuple[float, oracle.Kernel]] = []

    def setUnaryEnergy(self, unary: np.ndarray) -> None:
        assert unary.shape == (self.shape[0], self.shape[1] * self.shape[2])
        assert unary.dtype == np.float32
        assert unary.flags.c_contiguous
        self.unary = unary.reshape(self.shape).astype(float).tolist()

    def addPairwiseGaussian(self, sxy: float, compat: float) -> None:
        self.terms.append((compat, oracle.gaussian(sxy)))

    def addPairwiseBilateral(
        self, sxy: float, srgb: float, rgbim: np.ndarray, compat: float
    ) -> None:
        assert rgbim.shape == (*self.shape[1:], 3)
        assert rgbim.dtype == np.uint8
        assert rgbim.flags.c_contiguous
        assert rgbim.flags.writeable
        self.terms.append((compat, oracle.bilateral(sxy, srgb, rgbim.tolist())))

    def inference(self, iterations: int) -> np.ndarray:
        result = np.array(oracle.mean_field(self.unary, self.terms, iterations), dtype=np.float32)
        return np.asfortranarray(result.reshape(self.shape[0], -1))  # the order of the package


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(DenseCRF2D=ExactCRF)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", fake)


def _inputs(
    height: int = 5, width: int = 7, classes: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of different colour with some noise, and probabilities near 0 and 1."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), (200, 60, 30))
    image[:, width // 2 :] = (40, 90, 220)
    image += rng.integers(0, 20, image.shape)
    probabilities = rng.dirichlet(np.full(classes, 0.5), (height, width)).transpose(2, 0, 1)
    return image.astype(np.uint8), probabilities.astype(np.float32)


def _expected(image: np.ndarray, probabilities: np.ndarray, preset: CRFPreset) -> np.ndarray:
    unary = -np.log(np.clip(probabilities.astype(np.float64), 1e-5, 1))
    terms = [
        (preset.gaussian_compat, oracle.gaussian(preset.gaussian_sxy)),
        (
            preset.bilateral_compat,
            oracle.bilateral(preset.bilateral_sxy, preset.bilateral_srgb, image.tolist()),
        ),
    ]
    return np.array(oracle.mean_field(unary.tolist(), terms, preset.iterations))


# --- presets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # iterations; Gaussian sxy, compat; bilateral sxy, srgb, compat
        ("cosa", (1, 1, 1, 121, 5, 4)),
        ("toco_seg", (10, 1, 1, 121, 5, 4)),
        ("toco_cam", (10, 3, 3, 36, 3, 4)),
        ("afa", (10, 3, 3, 64, 5, 4)),
        ("isl_fsl", (1, 3, 3, 32, 13, 10)),
        ("isl_fsl_cam", (10, 3, 3, 80, 13, 10)),
    ],
)
def test_presets(name: str, values: tuple[int, ...]) -> None:
    names = ("iterations", "gaussian_sxy", "gaussian_compat", "bilateral_sxy", "bilateral_srgb")
    expected = dict(zip((*names, "bilateral_compat"), values, strict=True))
    assert dataclasses.asdict(CRF_PRESETS[name]) == expected


def test_there_are_no_other_presets_and_they_cannot_be_changed() -> None:
    assert len(CRF_PRESETS) == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        CRF_PRESETS["cosa"].iterations = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("iterations", -1), ("gaussian_sxy", 0), ("bilateral_sxy", 0), ("bilateral_srgb", -5)],
)
def test_impossible_settings(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        dataclasses.replace(MILD, **{setting: value})


# --- around the package --------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("preset", [*CRF_PRESETS, MILD], ids=str)
def test_every_setting_reaches_its_place(preset: str | CRFPreset) -> None:
    image, probabilities = _inputs()
    settings = CRF_PRESETS[preset] if isinstance(preset, str) else preset
    found = dense_crf(image, probabilities, preset)
    np.testing.assert_allclose(found, _expected(image, probabilities, settings), atol=1e-4)


@pytest.mark.usefixtures("exact")
def test_cosa_is_the_default() -> None:
    image, probabilities = _inputs()
    found = dense_crf(image, probabilities)
    assert np.array_equal(found, dense_crf(image, probabilities, "cosa"))
    assert not np.allclose(found, dense_crf(image, probabilities, "isl_fsl"))


@pytest.mark.usefixtures("exact")
def test_zeros_are_clipped_and_rounding_is_forgiven() -> None:
    image, _ = _inputs(1, 2, 2)
    still = CRFPreset(0, 1, 1, 1, 1, 1)
    found = dense_crf(image, np.array([[[0.0, 1.0005]], [[1.0, -1e-4]]]), still)
    expected = np.array([[[1e-5, 1.0]], [[1.0, 1e-5]]]) / (1 + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_gives_a_tensor(dtype: torch.dtype) -> None:
    image, probabilities = _inputs()
    tensor = torch.from_numpy(probabilities).to(dtype).requires_grad_()
    found = dense_crf(image, tensor, MILD)
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    expected = _expected(image, tensor.detach().double().numpy(), MILD)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert torch.equal(dense_crf(torch.from_numpy(image), tensor, MILD), found)


@pytest.mark.usefixtures("exact")
def test_an_array_gives_an_array() -> None:
    image, probabilities = _inputs()
    found = dense_crf(torch.from_numpy(image), probabilities.astype(np.float64), MILD)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, _expected(image, probabilities, MILD), atol=1e-4)


@pytest.mark.usefixtures("exact")
def test_views_and_read_only_images() -> None:
    image, probabilities = _inputs()
    expected = dense_crf(image, probabilities, MILD)
    frozen = np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)  # as PIL gives them
    assert np.array_equal(dense_crf(frozen, probabilities, MILD), expected)
    image_view = np.ascontiguousarray(image.transpose(2, 1, 0)).transpose(2, 1, 0)
    view = np.ascontiguousarray(probabilities.transpose(2, 1, 0)).transpose(2, 1, 0)
    assert np.array_equal(dense_crf(image_view, view, MILD), expected)


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"), [("cosaa", "cosa"), ("ToCo_CAM", "toco_cam"), ("isl-fsl", "isl_fsl")]
)
def test_a_preset_misspelt(name: str, nearest: str) -> None:
    image, probabilities = _inputs()
    with pytest.raises(ValueError, match=f"preset='{name}': .*Did you mean '{nearest}'"):
        dense_crf(image, probabilities, name)


def test_a_preset_unlike_all_others() -> None:
    image, probabilities = _inputs()
    with pytest.raises(ValueError, match=r"preset='x': choose one of cosa, .*isl_fsl_cam\.$"):
        dense_crf(image, probabilities, "x")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("image", "probabilities", "match"),
    [
        (np.zeros((5, 7), np.uint8), np.full((2, 5, 7), 0.5), r"expected \(H, W, 3\), uint8"),
        (np.zeros((3, 5, 7), np.uint8), np.full((2, 5, 7), 0.5), r"shape \(3, 5, 7\)"),
        (np.zeros((5, 7, 3)), np.full((2, 5, 7), 0.5), "type float64"),
        (np.zeros((5, 7, 3), np.uint8), np.full((2, 7, 5), 0.5), r"shape \(2, 7, 5\)"),
        (np.zeros((5, 7, 3), np.uint8), np.full((5, 7), 0.5), r"expected \(C, H, W\)"),
        (np.zeros((5, 7, 3), np.uint8), np.zeros((0, 5, 7)), "nothing in it"),
        (np.zeros((0, 7, 3), np.uint8), np.zeros((2, 0, 7)), "nothing in it"),
        (np.zeros((5, 7, 3), np.uint8), np.full((2, 5, 7), 3.5), r"\[3.5, 3.5\].*softmax"),
        (np.zeros((5, 7, 3), np.uint8), np.full((2, 5, 7), -0.5), r"\[-0.5, -0.5\]"),
        (np.zeros((5, 7, 3), np.uint8), np.full((2, 5, 7), np.nan), "nan"),
    ],
)
def test_wrong_inputs(image: np.ndarray, probabilities: np.ndarray, match: str) -> None:
    for convert in (lambda x: x, torch.from_numpy):
        with pytest.raises(ValueError, match=match):
            dense_crf(convert(image), convert(probabilities))


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf", raising=False)
    with pytest.raises(UserError, match=r"pip install 'wsss\[crf\]'.*C\+\+ compiler"):
        dense_crf(*_inputs())


def test_other_mistakes_are_told_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf", raising=False)
    image, probabilities = _inputs()
    with pytest.raises(ValueError, match="preset"):
        dense_crf(image, probabilities, "x")
    with pytest.raises(ValueError, match="image has shape"):
        dense_crf(probabilities, image)


# --- the package itself --------------------------------------------------------------------


@needs_package
@pytest.mark.parametrize(
    "settings",
    [
        CRF_PRESETS["cosa"],
        CRF_PRESETS["isl_fsl"],
        CRFPreset(1, 1, 3, 1, 1, 0),
        CRFPreset(1, 3, 3, 1, 1, 0),
        CRFPreset(1, 1, 0, 4, 20, 3),
        CRFPreset(10, 1, 0, 4, 20, 3),
    ],
    ids=lambda s: "-".join(str(value) for value in dataclasses.astuple(s)),
)
@pytest.mark.parametrize("size", [(7, 10), (12, 9)])
def test_package_is_near_the_exact_mean_field(size: tuple[int, int], settings: Any) -> None:
    image, probabilities = _inputs(*size)
    expected = _expected(image, probabilities, settings)
    error = np.abs(dense_crf(image, probabilities, settings) - expected)
    change = np.abs(probabilities - expected)
    assert error.max() < 0.1
    assert error.mean() < 0.25 * change.mean()


@needs_package
@pytest.mark.parametrize("preset", CRF_PRESETS)
def test_package_is_exact_on_one_pixel(preset: str) -> None:
    # a pixel sends messages to itself, with weight 1 after the normalisation
    image, probabilities = _inputs(1, 1)
    expected = _expected(image, probabilities, CRF_PRESETS[preset])
    np.testing.assert_allclose(dense_crf(image, probabilities, preset), expected, atol=1e-4)


@needs_package
def test_package_returns_probabilities_and_keeps_its_inputs() -> None:
    image, probabilities = _inputs(40, 31)
    before = image.copy(), probabilities.copy()
    found = dense_crf(image, probabilities, "toco_seg")
    assert found.shape == (3, 40, 31)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    assert np.array_equal(found, dense_crf(image, probabilities, "toco_seg"))
    assert np.array_equal(image, before[0])
    assert np.array_equal(probabilities, before[1])
    tensor = dense_crf(torch.from_numpy(image), torch.from_numpy(probabilities), "toco_seg")
    assert np.array_equal(tensor.numpy(), found)


@needs_package
def test_package_follows_the_edge_of_the_image() -> None:
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, 14:] = 200
    foreground = np.full((24, 32), 0.35, np.float32)
    foreground[:, 16:] = 0.65  # two columns short of the edge
    truth = np.arange(32) >= 14
    for preset in CRF_PRESETS:
        found = dense_crf(image, np.stack([1 - foreground, foreground]), preset)
        assert np.array_equal(found.argmax(0), np.broadcast_to(truth, (24, 32))), preset


@needs_package
def test_package_takes_read_only_images() -> None:
    image, probabilities = _inputs()
    frozen = np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)
    assert np.array_equal(dense_crf(frozen, probabilities), dense_crf(image, probabilities))
