"""Pixel correlation module and network of SEAM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import seam as oracle
from wsss.errors import UserError
from wsss.nn import NeckOutput, UncertaintyNeck, WSSSNetwork
from wsss.nn.seam import PixelCorrelation, SEAMNetwork, correlate, suppressed

GRIDS = [(3, 4), (4, 2), (1, 1)]


def make(**kwargs: Any) -> SEAMNetwork:
    torch.manual_seed(0)
    options: dict[str, Any] = {"output_stride": 8, "channels": [8, 8, 16, 16]}
    return SEAMNetwork("resnet10t", 3, early_block=-2, **options, **kwargs)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_suppressed(grid: tuple[int, int]) -> None:
    cam = _randn(2, 3, *grid)
    torch.testing.assert_close(suppressed(cam), oracle.suppressed(cam))
    assert suppressed(cam.bfloat16()).dtype == torch.float32


def test_nothing_active_is_background() -> None:
    maps = suppressed(torch.full((1, 3, 2, 2), -1.0))
    assert maps[:, 0].eq(1).all()
    assert not maps[:, 1:].any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_correlate(grid: tuple[int, int]) -> None:
    maps, embedding = _randn(2, 4, *grid).relu(), _randn(2, 5, *grid, seed=1)
    torch.testing.assert_close(correlate(maps, embedding), oracle.correlate(maps, embedding))


def test_correlate_under_autocast() -> None:
    maps, embedding = _randn(1, 2, 3, 4).relu().float(), _randn(1, 5, 3, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = correlate(maps, embedding.bfloat16())
    assert found.dtype == torch.float32
    expected = oracle.correlate(maps.double(), embedding.bfloat16().double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_pixels_that_look_alike_share_their_maps() -> None:
    embedding = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0]]).view(1, 2, 1, 4)
    maps = torch.tensor([1.0, 0.0, 0.0, 0.5]).view(1, 1, 1, 4)
    torch.testing.assert_close(
        correlate(maps, embedding).flatten(),
        torch.tensor([0.5, 0.5, 0.25, 0.25]),
        rtol=0,
        atol=1e-4,
    )


def test_module_from_its_parts() -> None:
    torch.manual_seed(0)
    module = PixelCorrelation((2, 3), (4, 5), 6).double()
    maps = _randn(2, 4, 3, 4).relu()
    stages = [_randn(2, 2, 3, 4, seed=1), _randn(2, 3, 3, 4, seed=2)]
    images = _randn(2, 3, 3, 4, seed=3)
    first, second = (
        torch.einsum("oi,bihw->bohw", layer.weight[:, :, 0, 0], stage).clamp(min=0)
        for layer, stage in zip(module.stages, stages, strict=True)
    )
    joined = torch.cat([images, first, second], 1)
    embedding = torch.einsum("oi,bihw->bohw", module.common.weight[:, :, 0, 0], joined)
    expected = oracle.correlate(maps, embedding)
    module.float()
    found = module(maps.float(), [s.float() for s in stages], images.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_module_takes_other_sizes_and_gives_features_no_gradient() -> None:
    module = PixelCorrelation((2, 3))
    stages = [torch.rand(1, 2, 6, 8, requires_grad=True), torch.rand(1, 3, 3, 4)]
    out = module(torch.rand(1, 4, 3, 4), stages, torch.rand(1, 3, 24, 32))
    assert out.shape == (1, 4, 3, 4)
    out.square().sum().backward()
    assert stages[0].grad is None
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("size", [(32, 48), (33, 20), (8, 8)], ids=str)
def test_output(size: tuple[int, int]) -> None:
    network = make().eval()
    images = torch.rand(2, 3, *size)
    output, refined = network.refine(images)
    grid = (-(-size[0] // 8), -(-size[1] // 8))
    assert output.cam.shape == (2, 3, *grid)
    assert refined.shape == (2, 4, *grid)
    assert output.seg_logits is None
    assert refined.min() >= 0
    assert refined.max() <= 1 + 1e-5
    again = network(images, decode=True)
    assert again.refined_cam is not None
    torch.testing.assert_close(again.refined_cam, refined[:, 1:])
    assert again.seg_logits is not None
    assert again.seg_logits.shape == (2, 4, *grid)


def test_refined_cam_is_that_of_the_last_stages_and_the_colours() -> None:
    network = make().eval()
    images = torch.rand(2, 3, 16, 24)
    stages = network.encoder.pyramid(images)
    features, cam = stages[-1], network.classifier.cam(stages[-1])
    normalised = (images - network.encoder.mean) / network.encoder.std
    expected = network.correlation(suppressed(cam), stages[-3:-1], normalised)
    output, refined = network.refine(images)
    torch.testing.assert_close(refined, expected)
    torch.testing.assert_close(output.cam, cam)
    torch.testing.assert_close(output.features, features)


def test_refined_maps_train_the_correlation_alone() -> None:
    network = make()
    network.refine(torch.rand(2, 3, 16, 24))[1].square().sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {f"correlation.{n}" for n, _ in network.correlation.named_parameters()}


def test_dropout_is_before_the_classifier_and_in_training_alone() -> None:
    network = make()
    images = torch.rand(2, 3, 16, 24)
    network.eval()
    torch.testing.assert_close(network(images).cam, network(images).cam)
    network.dropout.train()
    assert network.dropout.p == 0.5
    assert not torch.equal(network(images).cam, network(images).cam)
    torch.testing.assert_close(network(images).features, network(images).features)


def test_the_correlation_learns_at_the_rate_of_heads() -> None:
    network = make()
    heads = {id(p) for p in network.head_parameters()}
    assert all(id(p) in heads for p in network.correlation.parameters())
    assert all(id(p) in heads for p in WSSSNetwork.head_parameters(network))
    assert not any(id(p) in heads for p in network.encoder.parameters())


def test_a_vit_is_refused() -> None:
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224.*resnet38d"):
        SEAMNetwork("vit_tiny_patch16_224", 3, depth=3, embed_dim=24, num_heads=2)


def test_neck_is_between_the_last_stage_and_the_heads() -> None:
    torch.manual_seed(1)
    network = make(neck=UncertaintyNeck).eval()
    nn.init.ones_(network.decoder.classifier.weight)  # type: ignore[union-attr,arg-type]
    images = torch.rand(2, 3, 16, 24)
    stages = network.encoder.pyramid(images)
    expected = network.neck(stages[-1])  # type: ignore[misc]
    output, refined = network.refine(images, decode=True)
    assert torch.equal(output.tokens, stages[-1])
    assert torch.equal(output.features, expected.features)
    assert output.neck is not None
    assert torch.equal(output.neck.mu, expected.mu)
    assert not torch.allclose(output.features, stages[-1])
    torch.testing.assert_close(output.cam, network.classifier.cam(expected.features))
    torch.testing.assert_close(output.seg_logits, network.decoder(expected.features))
    # The correlation compares pixels by the stages, which have not passed the neck.
    normalised = (images - network.encoder.mean) / network.encoder.std
    wanted = network.correlation(suppressed(output.cam), stages[-3:-1], normalised)
    torch.testing.assert_close(refined, wanted)
    heads = {id(p) for p in network.head_parameters()}
    assert all(id(p) in heads for p in network.neck.parameters())  # type: ignore[union-attr]
    assert all(id(p) in heads for p in network.correlation.parameters())


def test_without_a_neck() -> None:
    output = make().eval()(torch.rand(1, 3, 16, 16))
    assert output.tokens is output.features
    assert output.neck == NeckOutput(output.features)
    assert output.attention is None
