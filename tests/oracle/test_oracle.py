"""The oracles against well-known implementations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.filters import threshold_otsu
from sklearn.mixture import GaussianMixture

from tests.oracle import labels, losses, metrics, resize, thresholds
from tests.oracle.compare import value_and_gradient


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [(3, 5), (6, 10), (12, 7), (1, 1)])
def test_bilinear_is_torchs(size: tuple[int, int]) -> None:
    image = torch.rand(2, 6, 10, dtype=torch.float64)
    expected = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(resize.bilinear(image, *size), expected)


def test_classification_is_torchs() -> None:
    logits, target = torch.randn(3, 4, dtype=torch.float64) * 5, torch.randint(0, 2, (3, 4))
    found = value_and_gradient(lambda x: losses.classification(x, target), logits)
    expected = value_and_gradient(
        lambda x: F.binary_cross_entropy_with_logits(x, target.double()), logits
    )
    torch.testing.assert_close(found, expected)


def test_cam2seg_without_weights_is_cross_entropy() -> None:
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 3, 5))
    target[0, 0] = 255
    found = value_and_gradient(lambda x: losses.cam2seg(x, target), logits)
    expected = value_and_gradient(lambda x: F.cross_entropy(x, target, ignore_index=255), logits)
    torch.testing.assert_close(found, expected)


def test_seg2cam_is_binary_cross_entropy() -> None:
    cam = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    spl = torch.softmax(torch.randn(2, 4, 4, 5, dtype=torch.float64), dim=1)
    found = value_and_gradient(lambda x: losses.seg2cam(x, spl), cam)
    expected = value_and_gradient(lambda x: F.binary_cross_entropy_with_logits(x, spl[:, 1:]), cam)
    torch.testing.assert_close(found, expected)


def test_contrastive_separation_of_three_positions_by_hand() -> None:
    # two equal vectors with the same label and an orthogonal one with another
    cam = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).view(1, 2, 1, 3)
    label, low = torch.tensor([[[1, 1, 0]]]), torch.zeros(1, 1, 3)
    pair = -math.log(math.exp(2) / (math.exp(2) + 1))
    found = losses.contrastive_separation(cam, label, low, temperature=0.5)
    assert found.item() == pytest.approx(2 * pair / 3)


def test_otsu_is_scikit_images() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.3, 0.1, 300), rng.normal(0.6, 0.12, 200)])
    values = np.clip(np.floor(values * 64), 0, 63) / 64
    low, high = thresholds.otsu(values.tolist())
    # scikit-image names the centre of the histogram bin that holds the last background value
    assert low == pytest.approx(threshold_otsu(values, nbins=4096), abs=1 / 4096)
    assert low < high


def test_gaussian_mixture_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0.25, 0.05, 200), rng.normal(0.75, 0.09, 100)])
    for tied in (True, False):
        fit = GaussianMixture(2, covariance_type="tied" if tied else "full", tol=1e-9, reg_covar=0)
        fit.fit(values[:, None])
        order = np.argsort(fit.means_[:, 0])
        weights, means, _ = thresholds.gaussian_mixture(values.tolist(), tied)
        assert weights == pytest.approx(fit.weights_[order], abs=1e-4)
        assert means == pytest.approx(fit.means_[order, 0], abs=1e-4)


def test_min_error_of_equal_gaussians_is_the_middle() -> None:
    rng = np.random.default_rng(2)
    half = np.clip(rng.normal(0.3, 0.06, 400), 0.01, 0.49)
    values = np.concatenate([half, 1 - half])
    low, high = thresholds.min_error(np.round(values, 2).tolist())
    assert low == pytest.approx(0.5, abs=0.05)
    assert high == pytest.approx(0.5, abs=0.05)


def test_perplexity_and_weights_by_hand() -> None:
    assert labels.perplexity(1.0, 0.4) == pytest.approx(-math.log(0.8))
    assert labels.perplexity(0.0, 0.4) == pytest.approx(-math.log(0.8))
    assert labels.perplexity(0.7, 0.4) == pytest.approx(-math.log(0.4))
    assert labels.perplexity(0.4, 0.4) == math.inf
    assert labels.reliability_weight([1.0, 3.0]) == pytest.approx([1.5, 0.5])


def test_scores_by_hand() -> None:
    prediction, target = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 255])
    scores = metrics.segmentation_scores([(prediction, target)], num_classes=3)
    assert scores["iou"][:2] == pytest.approx([1 / 2, 2 / 3])
    assert scores["precision"][:2] == pytest.approx([1, 2 / 3])
    assert scores["recall"][:2] == pytest.approx([1 / 2, 1])
    assert scores["confusion_ratio"][:2] == pytest.approx([0, 1 / 2])
    assert scores["dice"][:2] == pytest.approx([2 / 3, 4 / 5])
    assert math.isnan(scores["iou"][2])
    assert metrics.mean(scores["iou"]) == pytest.approx(7 / 12)
