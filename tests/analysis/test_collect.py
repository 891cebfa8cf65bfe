"""From images to counts: resizing, image labels, Omega, thresholds, and the networks' scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.analysis.conftest import CLASSES
from tests.oracle import analysis as oracle
from tests.oracle.resize import bilinear
from wsss.analysis.collect import (
    DYNAMIC,
    FIXED,
    PAIR,
    SCORED,
    UNFITTED,
    CheckpointAnalysis,
    collect,
    peak,
    thresholds_of,
)
from wsss.analysis.counts import ConfidenceCounts
from wsss.analysis.curves import accuracy, confusion, mean_iou
from wsss.data.batch import EvalBatch, to_unit_range
from wsss.inference import Inference
from wsss.methods.base import Method
from wsss.pseudo import multi_scale

MakeMethod = Callable[..., Method]


def test_peak_is_of_the_classes_present_at_the_size_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    cam = torch.rand(4, 6, 5, generator=generator)
    labels = torch.tensor([1.0, 0, 1, 1])
    mask = torch.zeros(9, 13, dtype=torch.int64)
    confidence, strongest = peak(cam, labels, mask)
    full = bilinear(cam.double(), 9, 13)
    for y in range(9):
        for x in range(13):
            values = {c: full[c, y, x].item() for c in (0, 2, 3)}
            best = max(values, key=lambda c: values[c])
            assert confidence[y, x].item() == pytest.approx(values[best], abs=1e-6)
            assert strongest[y, x] == best


def test_an_image_without_classes_is_all_background() -> None:
    confidence, strongest = peak(torch.rand(3, 4, 4), torch.zeros(3), torch.zeros(5, 6).long())
    assert confidence.shape == strongest.shape == (5, 6)
    assert confidence.dtype == torch.float32
    assert not confidence.any()
    assert strongest.dtype == torch.int64


def pixels_of(cam: Tensor, labels: Tensor, mask: Tensor) -> list[oracle.Pixel]:
    """One image whose CAM has the size of its mask, pixel by pixel."""
    pixels = []
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            values = [cam[c, y, x].item() * labels[c].item() for c in range(cam.shape[0])]
            nu = max(values)
            pixels.append((nu, values.index(nu), int(mask[y, x])))
    return pixels


def test_one_image(make_method: MakeMethod) -> None:
    method = make_method()
    method.threshold.value.fill_(0.35)  # type: ignore[union-attr, operator]
    method.early_threshold.value.fill_(0.61)  # type: ignore[union-attr, operator]
    analysis = CheckpointAnalysis.empty(method, 7, 1.2, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    cam, early = torch.rand(2, 3, 20, 21, generator=generator)
    labels = torch.tensor([1.0, 0.0, 1.0])
    mask = torch.tensor([0, 1, 3, 255])[torch.randint(0, 4, (20, 21), generator=generator)]
    analysis.update(cam, early, labels, mask)

    pixels, early_pixels = pixels_of(cam, labels, mask), pixels_of(early, labels, mask)
    xi, early_xi = (float(torch.tensor(value)) for value in (0.35, 0.61))
    member = oracle.low_perplexity(early_pixels, early_xi, 1.2, 0.8, 1.0)
    omega = [p for p, inside in zip(pixels, member, strict=True) if inside]
    assert 20 < len(omega) < len(pixels)
    for counts, group, threshold in (
        (analysis.cam, pixels, xi),
        (analysis.early_cam, early_pixels, early_xi),
        (analysis.cam_in_omega, omega, xi),
    ):
        assert counts.threshold == threshold
        assert counts.counts.sum() == len(oracle.scored(group))
        matrix = confusion(counts, threshold)
        assert accuracy(matrix) == pytest.approx(oracle.accuracy(group, threshold))
        assert mean_iou(matrix) == pytest.approx(oracle.mean_iou(group, threshold, 3))


def test_perplexity_is_that_of_the_method(make_method: MakeMethod) -> None:
    method = make_method("method.raw_alpha=0.6", "method.raw_beta=2.0")
    analysis = CheckpointAnalysis.empty(method, 0, 0.9, torch.device("cpu"))
    for counts in (analysis.cam, analysis.early_cam, analysis.cam_in_omega):
        assert (counts.alpha, counts.beta, counts.max_perplexity) == (0.6, 2.0, 0.9)
    plain = CheckpointAnalysis.empty(make_method(name="cam"), 0, 1.0, torch.device("cpu"))
    assert (plain.cam.alpha, plain.cam.beta) == (0.8, 1.0)


def test_thresholds_of_methods(make_method: MakeMethod) -> None:
    method = make_method()
    assert thresholds_of(method) == (0.5, 0.5, UNFITTED)
    method.threshold.update(torch.tensor([0.1, 0.2, 0.8]))  # type: ignore[union-attr, operator]
    method.early_threshold.update(torch.tensor([0.1, 0.7, 0.8]))  # type: ignore[union-attr, operator]
    cam, early, kind = thresholds_of(method)
    assert kind == DYNAMIC
    assert 0.2 < cam != early < 0.7
    fixed = thresholds_of(make_method("method.threshold=0.3"))
    assert fixed == (pytest.approx(0.3), pytest.approx(0.3), FIXED)
    plain = make_method("method.cpl_threshold=0.42", name="cam")
    assert thresholds_of(plain) == (0.42, 0.42, SCORED)
    method.threshold.value = torch.tensor([0.25, 0.7])  # low and high
    assert thresholds_of(method) == (0.5, 0.5, PAIR)


@pytest.mark.parametrize("name", ["cosa", "cam"])
def test_counts_are_those_of_evaluation(
    make_method: MakeMethod, batches: list[EvalBatch], name: str
) -> None:
    """mIoU at the threshold of the scores, of both CAMs, is what validation says."""
    method = make_method("method.cpl_threshold=0.37", name=name)
    analysis = collect(Inference(method, device="cpu"), batches, 3, 1.0)
    method.on_validation_epoch_start()
    for i, batch in enumerate(batches):
        unit = EvalBatch(to_unit_range(batch.images), batch.labels, batch.masks, batch.names)
        method.validation_step(unit, i)
    scores = method.compute_scores()
    network = method.network_names[0]
    assert analysis.step == 3
    assert analysis.networks == []
    for counts, protocol in ((analysis.cam, "cpl"), (analysis.early_cam, "cpl_early")):
        expected = float(scores[f"{network}/{protocol}/miou_ms_flip"])
        assert 0 < expected < 1
        assert mean_iou(confusion(counts, 0.37)) == pytest.approx(expected, abs=1e-6)


def test_networks_are_scored_as_in_evaluation(
    make_method: MakeMethod, batches: list[EvalBatch]
) -> None:
    method = make_method()
    an, on = (Inference(method, name, device="cpu") for name in ("an", "on"))
    analysis = collect(an, batches, 9, 1.0, [on])
    alone = collect(an, batches, 9, 1.0)
    assert torch.equal(analysis.cam.counts, alone.cam.counts)
    assert torch.equal(analysis.cam_in_omega.counts, alone.cam_in_omega.counts)
    method.on_validation_epoch_start()
    for i, batch in enumerate(batches):
        unit = EvalBatch(to_unit_range(batch.images), batch.labels, batch.masks, batch.names)
        method.validation_step(unit, i)
    scores = method.compute_scores()
    assert [(row.step, row.network) for row in analysis.networks] == [(9, "an"), (9, "on")]
    for row in analysis.networks:
        seg = float(scores[f"{row.network}/seg/miou_ms_flip"])
        cpl = float(scores[f"{row.network}/cpl/miou_ms_flip"])
        assert (row.seg, row.cpl) == (pytest.approx(seg, abs=1e-6), pytest.approx(cpl, abs=1e-6))
    first, second = analysis.networks
    assert first.cpl != second.cpl


def test_the_cams_are_multi_scale(make_method: MakeMethod, batches: list[EvalBatch]) -> None:
    method = make_method()
    found = collect(Inference(method, device="cpu", cam_scales=[1.0]), batches, 0, 1.0)
    expected = ConfidenceCounts(len(CLASSES), 0.5)
    for batch in batches:
        out = multi_scale(method.networks()["an"], batch.images / 255, [1.0], decode=False)
        for cam, labels, mask in zip(out.cam, batch.labels, batch.masks, strict=True):
            expected.update(*peak(cam, labels, mask), mask)
    for a, b in zip(_by_truth(found.cam), _by_truth(expected), strict=True):
        assert abs(a - b) <= 2  # rounding at an edge
    whole = collect(Inference(method, device="cpu"), batches, 0, 1.0)
    assert not torch.equal(whole.cam.counts, found.cam.counts)


def _by_truth(counts: ConfidenceCounts) -> list[int]:
    """Confusion at 0.3, flat."""
    return [int(n) for n in confusion(counts, 0.3).flatten()]
