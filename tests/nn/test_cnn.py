"""CNN encoders: exact grids, timm's own features, weights of whole models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from wsss.cli import config_dir
from wsss.errors import UserError
from wsss.nn.cnn import CNNEncoder

RESNET: dict[str, Any] = {"channels": (8, 16, 24, 32)}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# Layers that round up, that round down, that need multiples of the stride, that cannot be dilated,
# that timm wraps in each of its ways.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet10t": (8, RESNET),
    "convnext_atto": (16, CONVNEXT),
    "resnetv2_50": (16, {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
    "densenet121": (32, {"block_config": (1, 1, 1, 1), "growth_rate": 4}),
    "dla34": (32, {"channels": (8, 8, 8, 16, 16, 32), "levels": (1, 1, 1, 1, 1, 1)}),
    "mobilenetv3_small_050": (16, {}),
    # Not convolutional: windows, channels last, sizes rounded up to whole patches.
    "swin_tiny_patch4_window7_224": (
        32,
        {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    ),
    "xcit_nano_12_p16_224": (16, {"depth": 3, "embed_dim": 16, "num_heads": 2}),
}
SIZES = [(97, 65), (64, 96), (33, 127), (128, 31)]


def make(name: str = "resnet10t", **kwargs: Any) -> CNNEncoder:
    torch.manual_seed(0)
    stride, options = MODELS[name]
    encoder = CNNEncoder(name, **({"output_stride": stride} | options | kwargs))
    # Statistics and scales of their own, so that none can be mixed up with another.
    for key, value in encoder.features.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape) + (0.5 if "var" in key else 0.1))
    return encoder.eval()


def cells(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


@pytest.mark.parametrize("name", MODELS)
def test_sizes(name: str) -> None:
    """ceil(H / stride) cells, whatever the layers make of odd sizes."""
    encoder = make(name)
    stride = MODELS[name][0]
    assert encoder.patch_size == (stride, stride) == (encoder.stage_strides[-1],) * 2
    for size in SIZES:
        with torch.no_grad():
            x = torch.rand(1, 3, *size)
            final, early = encoder(x)
            stages = encoder.pyramid(x)
        assert encoder.grid(*size) == cells(size, stride)
        assert final.shape == (1, encoder.dim, *cells(size, stride))
        assert early.shape == (1, encoder.early_dim, *cells(size, stride))
        sizes = [(1, d, *cells(size, s)) for d, s in _stages(encoder)]
        assert [tuple(stage.shape) for stage in stages] == sizes


def _stages(encoder: CNNEncoder) -> list[tuple[int, int]]:
    return list(zip(encoder.stage_dims, encoder.stage_strides, strict=True))


def test_stages_of_a_resnet() -> None:
    encoder = make()
    assert encoder.stage_dims == (64, 8, 16, 24, 32)
    assert encoder.stage_strides == (2, 4, 8, 8, 8)
    assert (encoder.dim, encoder.early_dim) == (32, 24)
    assert make(early_block=1).early_dim == 8
    assert make(output_stride=16).stage_strides == (2, 4, 8, 16, 16)
    assert CNNEncoder("resnet10t", **RESNET).patch_size == (16, 16)
    assert make(out_indices=(1, 3), output_stride=8).stage_dims == (8, 24)
    encoder.freeze_position()


@pytest.mark.parametrize("name", MODELS)
def test_features_are_timms_own(name: str) -> None:
    encoder = make(name)
    config = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = encoder.features((x - mean) / std)
        stages = encoder.pyramid(x)
        final, early = encoder(x)
    if name.startswith("swin"):  # channels last
        expected = [stage.permute(0, 3, 1, 2) for stage in expected]
    assert len(stages) == len(expected)
    for stage, theirs in zip(stages, expected, strict=True):
        assert torch.equal(stage, theirs)
    assert torch.equal(final, expected[-1])
    if encoder.stage_strides[-2] == encoder.stage_strides[-1]:
        assert torch.equal(early, expected[-2])


def test_windows_of_swins_last_stage_exchange_information() -> None:
    """With the options of ``backbone=swin_base``, at sizes that no window divides."""
    config = OmegaConf.load(config_dir() / "backbone" / "swin_base.yaml")
    own = dict(OmegaConf.to_container(config.options)) | {"drop_path_rate": 0.0}
    small = {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 1, 1)}
    name = "swin_tiny_patch4_window7_224"
    swin, plain = (
        CNNEncoder(name, **(own | small | {"always_partition": on})).eval()
        for on in (own["always_partition"], False)
    )
    shapes = [{k: v.shape for k, v in e.features.state_dict().items()} for e in (swin, plain)]
    assert shapes[0] == shapes[1]  # weights of ImageNet, and checkpoints, fit both
    for size in (224, 256, 512):
        with torch.no_grad():
            assert swin(torch.rand(1, 3, size, size))[0].shape[2:] == (size // 32, size // 32)
    for encoder, reached in ((swin, True), (plain, False)):
        blocks = encoder.features.layers_3.blocks.double()
        cells = torch.rand(1, 16, 16, blocks[0].dim).double()
        changed = cells.clone()
        changed[:, 6, 6] = torch.rand(blocks[0].dim)  # the last cell of the first window
        with torch.no_grad():
            moved = [(block(changed) != block(cells)).any(-1)[0] for block in blocks]
        for moves in moved[: 1 if reached else 2]:
            assert moves[:7, :7].all()
            assert not moves[7:].any()
            assert not moves[:, 7:].any()
        assert bool(moved[1][7, 7]) == reached


def test_early_stage() -> None:
    x = torch.rand(1, 3, 97, 65)
    stages = make().pyramid(x)
    assert torch.equal(make(early_block=2)(x)[1], stages[2])
    assert torch.equal(make(early_block=-1)(x)[1], stages[-1])
    finer = make(early_block=1)(x)[1]
    assert stages[1].shape[2:] == (25, 17)
    torch.testing.assert_close(finer[..., 3, 2], stages[1][..., 6:8, 4:6].mean((2, 3)))
    torch.testing.assert_close(finer[..., 12, 8], stages[1][..., 24, 16])
    with pytest.raises(UserError, match="early_block=-6 is outside the 5 stages of 'resnet10t'"):
        make(early_block=-6)


@pytest.mark.parametrize(
    ("name", "pads"),
    [("resnet10t", False), ("convnext_atto", True), ("densenet121", True), ("dla34", True)],
)
def test_padding(name: str, pads: bool) -> None:
    """Only where layers round down; right and below, with the mean colour."""
    encoder = make(name)
    assert encoder.pads == pads
    stride = encoder.patch_size[0]
    x = torch.rand(1, 3, 97, 65)
    padded = encoder.mean.expand(1, 3, 128, 96).clone()
    padded = padded[..., : -(-97 // stride) * stride, : -(-65 // stride) * stride]
    padded[..., :97, :65] = x
    with torch.no_grad():
        stages, expected = encoder.pyramid(x), encoder.pyramid(padded)
    same = [
        torch.allclose(stage, theirs[..., : stage.shape[2], : stage.shape[3]], atol=1e-5)
        for stage, theirs in zip(stages, expected, strict=True)
    ]
    assert all(same) == pads


class TestFrozenNorms:
    """``freeze_bn``."""

    @pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
    @pytest.mark.parametrize("freeze", [True, False])
    def test_statistics_and_scales(self, name: str, freeze: bool) -> None:
        stride, options = MODELS[name]
        encoder = CNNEncoder(name, output_stride=stride, freeze_bn=freeze, **options)
        norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        affine = {id(p) for norm in norms for p in norm.parameters()}
        for parameter in encoder.parameters():
            assert parameter.requires_grad == (not freeze or id(parameter) not in affine)
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        copied = copy.deepcopy(encoder)
        assert encoder.training
        holder = nn.ModuleList([copied, encoder]).eval().train()
        for module in holder:
            module(torch.rand(2, 3, 64, 64))
        same = all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
        assert same == freeze
        assert encoder.features.training
        assert all(norm.training != freeze for norm in norms)
        encoder.eval()
        assert not any(norm.training for norm in norms)

    def test_before_the_first_call_of_train(self) -> None:
        encoder = CNNEncoder("resnet10t", freeze_bn=True, **RESNET)
        assert encoder.training
        assert not encoder.features.bn1.training

    def test_off_by_default(self) -> None:
        assert CNNEncoder("resnet10t", **RESNET).features.bn1.training


def test_gradients_reach_all_layers() -> None:
    encoder = make(out_indices=(1, 2, 3, 4))
    final, early = encoder.train()(torch.rand(2, 3, 64, 64))
    (final.sum() + early.sum()).backward()
    assert all(p.grad is not None for p in encoder.parameters())


class TestWeights:
    """A local file of the same whole model, strictly."""

    @staticmethod
    def whole(name: str, **kwargs: Any) -> nn.Module:
        torch.manual_seed(1)
        model: nn.Module = timm.create_model(name, **(MODELS[name][1] | kwargs))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape).abs() * 0.1 + ("var" in key))
        return model.eval()

    @pytest.mark.parametrize("name", MODELS)
    def test_every_tensor_arrives(self, name: str, tmp_path: Path) -> None:
        model = self.whole(name, num_classes=7)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        stride, options = MODELS[name]
        weights = tmp_path / "w.pth"
        encoder = CNNEncoder(name, output_stride=stride, weights=weights, **options).eval()
        values = sorted(float(v.double().sum()) for v in model.state_dict().values())
        own = [float(v.double().sum()) for v in encoder.features.state_dict().values()]
        assert set(own) <= set(values)
        if name in ("resnet10t", "convnext_atto"):  # whose own features are the last stage's
            x = torch.rand(1, 3, 64, 64)
            native: Any = CNNEncoder(name, output_stride=32, weights=weights, **options).eval()
            with torch.no_grad():
                normalised = (x - native.mean) / native.std
                theirs: Tensor = model.forward_features(normalised)  # type: ignore[operator]
                torch.testing.assert_close(native(x)[0], theirs)

    def test_safetensors_without_counters(self, tmp_path: Path) -> None:
        state = self.whole("resnet10t").state_dict()
        state = {k: v for k, v in state.items() if "num_batches" not in k and "fc" not in k}
        save_file(state, tmp_path / "w.safetensors")
        encoder = make(weights=tmp_path / "w.safetensors", freeze_bn=True)
        key = "layer4.0.conv1.weight"
        assert torch.equal(encoder.features.state_dict()[key], state[key])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stages.1.blocks.0.norm.weight": None}, r"missing: stages_1\.blocks\.0\.norm"),
            ({"stages.1.blocks.9.norm.weight": 1}, r"not expected: stages\.1\.blocks\.9"),
            ({"stem_0.weight": 1}, r"shape: stem_0\.weight \(1,\) instead of \(8, 3, 4, 4\)"),
            ({"other": 1}, "not expected: other"),
        ],
    )
    def test_strict(self, tmp_path: Path, change: dict[str, int | None], message: str) -> None:
        state = self.whole("convnext_atto").state_dict()
        for key, value in change.items():
            if value is None:
                del state[key]
            else:
                state[key] = torch.ones(value)
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(UserError, match=rf"w\.pth' is not a 'convnext_atto': {message}"):
            make("convnext_atto", weights=tmp_path / "w.pth")

    def test_code_is_refused(self, tmp_path: Path) -> None:
        torch.save(self.whole("resnet10t"), tmp_path / "model.pth")
        with pytest.raises(UserError, match="pickled code are refused"):
            make(weights=tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5o", {}, "is not a timm model. Nearest: resnet50"),
        ("densenet121", {}, r"output_stride=16 is not possible with 'densenet121'.*own stride"),
        ("densenet121", {}, "is 32: choose output_stride=32, or a network .* such as resnet50"),
        ("resnet10t", {"output_stride": 5}, r"output_stride=5 .* choose output_stride=32"),
        ("resnet10t", {"depth": 3}, r"options \['depth'\] cannot give .*unexpected.*choose a CNN"),
        ("inception_v3", {"output_stride": 32}, "one feature for every 32 x 32 .* resnet50"),
        ("vit_tiny_patch16_224", {"img_size": 64}, "one feature for every 16 x 16"),
    ],
)
def test_unfit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CNNEncoder(name, **options)
