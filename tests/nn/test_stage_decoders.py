"""Decoders of several stages: any size, aligned with the image, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn import DeepLabV3Plus, LargeFOV, NeckOutput, UPerNet, WSSSNetwork
from wsss.nn.decoder import largefov
from wsss.nn.stage_decoders import StageDecoder

RESNET: dict[str, Any] = {"channels": [8, 16, 24, 32]}
SWIN: dict[str, Any] = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
CHOICES = {
    "deeplab 16": ("resnet10t", DeepLabV3Plus, RESNET | {"output_stride": 16}),
    "deeplab 8": ("resnet10t", DeepLabV3Plus, RESNET | {"output_stride": 8}),
    "upernet resnet": ("resnet10t", UPerNet, RESNET | {"output_stride": 32}),
    "upernet swin": ("swin_tiny_patch4_window7_224", UPerNet, SWIN | {"output_stride": 32}),
}


def make(choice: str, **kwargs: Any) -> WSSSNetwork:
    name, decoder, options = CHOICES[choice]
    torch.manual_seed(0)
    network = WSSSNetwork(name, 3, decoder=lambda e, n: decoder(e, n, width=16), **options | kwargs)
    # The last layer starts at zero, which would hide everything before it.
    nn.init.normal_(network.decoder.classifier.weight)  # type: ignore[union-attr, arg-type]
    return network.eval()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("size", [(64, 96), (97, 130), (33, 47), (4, 4)])
def test_logits_of_stride_four(choice: str, size: tuple[int, int]) -> None:
    network = make(choice)
    out = network(torch.rand(2, 3, *size))
    assert out.seg_logits is not None
    assert out.seg_logits.shape == (2, 4, -(-size[0] // 4), -(-size[1] // 4))
    assert out.cam.shape[2:] == network.encoder.grid(*size)
    assert out.seg_logits.isfinite().all()
    assert network(torch.rand(2, 3, *size), decode=False).seg_logits is None


@pytest.mark.parametrize("choice", CHOICES)
def test_everything_learns(choice: str) -> None:
    network = make(choice).train()
    out = network(torch.rand(2, 3, 64, 64))
    out.seg_logits.square().mean().backward()
    lost = [n for n, p in network.named_parameters() if p.grad is None]
    assert all(n.startswith(("classifier", "early_classifier", "encoder")) for n in lost), lost
    assert not [n for n in lost if n.startswith("encoder") and "norm.bias" not in n], lost
    zero = [n for n, p in network.decoder.named_parameters() if not p.grad.any()]  # type: ignore[union-attr]
    assert not zero


@pytest.mark.parametrize("choice", CHOICES)
def test_mixed_precision(choice: str) -> None:
    network = make(choice)
    images = torch.rand(2, 3, 50, 70)
    exact = network(images).seg_logits
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images).seg_logits
    assert (found.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("choice", CHOICES)
def test_what_it_gives_does_not_depend_on_the_rest_of_the_batch(choice: str) -> None:
    network = make(choice)
    images = torch.rand(2, 3, 40, 56)
    together = network(images).seg_logits
    torch.testing.assert_close(network(images[1:]).seg_logits, together[1:], atol=1e-4, rtol=1e-4)


class Recorder(nn.Module):
    """Keeps what the library's decoder is given and returns the finest stage."""

    def forward(self, features: list[Tensor]) -> Tensor:
        self.seen = features
        return features[2]


@pytest.mark.parametrize("choice", ["deeplab 16", "upernet resnet"])
def test_stages_nest_and_end_at_the_border(choice: str) -> None:
    """Of 50 x 70 pixels: every cell of a stage lies under whole cells of the finer ones."""
    network = make(choice)
    decoder = network.decoder
    assert isinstance(decoder, StageDecoder)
    stages = {i: torch.rand(1, d, -(-50 // s), -(-70 // s)) for i, (d, s) in _stages(network)}
    recorder = decoder.decoder = Recorder()
    decoder.classifier = nn.Identity()  # type: ignore[assignment]
    torch.testing.assert_close(decoder(stages), stages[decoder.read[0]])
    last = stages[decoder.read[-1]]
    assert len(recorder.seen) == len(decoder.read) + 2
    for i, stride, given in zip(decoder.read, decoder.strides, recorder.seen[2:], strict=True):
        factor = decoder.strides[-1] // stride
        assert given.shape[2:] == (last.shape[2] * factor, last.shape[3] * factor)
        height, width = stages[i].shape[2:]
        torch.testing.assert_close(given[..., :height, :width], stages[i])
        # What was added repeats the border.
        border = stages[i][..., -1:, :].expand(-1, -1, given.shape[2] - height, -1)
        torch.testing.assert_close(given[..., height:, :width], border)
        column = given[..., width - 1 : width].expand(-1, -1, -1, given.shape[3] - width)
        torch.testing.assert_close(given[..., width:], column)


def _stages(network: WSSSNetwork) -> list[tuple[int, tuple[int, int]]]:
    encoder: Any = network.encoder
    return list(enumerate(zip(encoder.stage_dims, encoder.stage_strides, strict=True)))


def test_which_stages_are_read() -> None:
    """Of strides 2, 4, 8, 16, 16: DeepLabV3+ takes stride 4 and the last, UPerNet all from 4 on."""
    assert make("deeplab 16").decoder.read == (1, 4)  # type: ignore[union-attr]
    assert make("upernet resnet").decoder.read == (1, 2, 3, 4)  # type: ignore[union-attr]
    assert make("upernet swin").decoder.read == (0, 1, 2, 3)  # type: ignore[union-attr]


def test_the_neck_changes_what_the_decoder_reads_last() -> None:
    class Double(nn.Module):
        def forward(self, tokens: Tensor) -> NeckOutput:
            return NeckOutput(tokens * 2)

    plain, doubled = make("deeplab 16"), make("deeplab 16", neck=Double())
    doubled.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 64, 64)
    seen: list[Mapping[int, Tensor]] = []
    for network in (plain, doubled):
        network.decoder.register_forward_pre_hook(lambda m, args: seen.append(dict(args[0])))
        network(images)
    last = max(seen[0])
    torch.testing.assert_close(seen[1][last], 2 * seen[0][last])
    torch.testing.assert_close(seen[1][1], seen[0][1])


def test_equal_logits_at_the_start_and_after_a_reset() -> None:
    network = make("deeplab 16")
    before = network.decoder.decoder.aspp[0].convs[0][0].weight.clone()  # type: ignore[union-attr]
    network.reset_heads()
    after = network.decoder.decoder.aspp[0].convs[0][0].weight  # type: ignore[union-attr]
    assert not torch.equal(before, after)
    assert not network(torch.rand(2, 3, 32, 32)).seg_logits.any()


def test_one_image_in_training_is_refused() -> None:
    network = make("upernet swin").train()
    with pytest.raises(UserError, match=r"data\.batch_size"):
        network(torch.rand(1, 3, 32, 32))
    network.eval()(torch.rand(1, 3, 32, 32))


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224.*decoder=largefov"):
        WSSSNetwork("vit_tiny_patch16_224", 3, decoder=DeepLabV3Plus, depth=3)
    with pytest.raises(UserError, match="output_stride=16"):
        make("deeplab 16", output_stride=32)
    with pytest.raises(UserError, match="rates"):
        WSSSNetwork("resnet10t", 3, decoder=lambda e, n: DeepLabV3Plus(e, n, rates=[6]), **RESNET)


def test_largefov_by_function() -> None:
    network = WSSSNetwork(
        "resnet10t", 3, decoder=lambda e, n: largefov(e, n, width=8, dilation=3), **RESNET
    )
    decoder = network.decoder
    assert isinstance(decoder, LargeFOV)
    assert decoder.conv1.weight.shape == (8, 32, 3, 3)
    assert decoder.conv1.dilation == decoder.conv2.padding == (3, 3)
    assert decoder.classifier.weight.shape == (4, 8, 1, 1)


def test_one_image_a_rank_is_enough_where_ranks_normalise_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = make("deeplab 16").train()
    stages = {i: torch.rand(1, d, 8, 8) for i, d in enumerate((8, 8, 16, 24, 32))}
    decoder = network.decoder
    assert isinstance(decoder, StageDecoder)
    assert not decoder._spans_ranks()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="got 1 image"):
        decoder(stages)  # each rank alone
    assert nn.SyncBatchNorm.convert_sync_batchnorm(decoder)._spans_ranks()
