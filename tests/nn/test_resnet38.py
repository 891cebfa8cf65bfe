"""ResNet-38d against a plain list of its layers, and files of its weights."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.nn.test_mxnet_params import write_params
from wsss.errors import UserError
from wsss.nn.resnet38 import ResNet38Encoder

# The network as the papers' code lists it, under the names of its converted files. Each unit: input
# channels, then kernel, output channels, stride and dilation of its convolutions; shortcut or not.
U = tuple[str, int, list[tuple[int, int, int, int]], bool]
UNITS: list[U] = [
    ("b2", 64, [(3, 128, 2, 1), (3, 128, 1, 1)], True),
    ("b2_1", 128, [(3, 128, 1, 1), (3, 128, 1, 1)], False),
    ("b2_2", 128, [(3, 128, 1, 1), (3, 128, 1, 1)], False),
    ("b3", 128, [(3, 256, 2, 1), (3, 256, 1, 1)], True),
    ("b3_1", 256, [(3, 256, 1, 1), (3, 256, 1, 1)], False),
    ("b3_2", 256, [(3, 256, 1, 1), (3, 256, 1, 1)], False),
    ("b4", 256, [(3, 512, 2, 1), (3, 512, 1, 1)], True),
    ("b4_1", 512, [(3, 512, 1, 1), (3, 512, 1, 1)], False),
    ("b4_2", 512, [(3, 512, 1, 1), (3, 512, 1, 1)], False),
    ("b4_3", 512, [(3, 512, 1, 1), (3, 512, 1, 1)], False),
    ("b4_4", 512, [(3, 512, 1, 1), (3, 512, 1, 1)], False),
    ("b4_5", 512, [(3, 512, 1, 1), (3, 512, 1, 1)], False),
    ("b5", 512, [(3, 512, 1, 1), (3, 1024, 1, 2)], True),
    ("b5_1", 1024, [(3, 512, 1, 2), (3, 1024, 1, 2)], False),
    ("b5_2", 1024, [(3, 512, 1, 2), (3, 1024, 1, 2)], False),
    ("b6", 1024, [(1, 512, 1, 1), (3, 1024, 1, 4), (1, 2048, 1, 1)], True),
    ("b7", 2048, [(1, 1024, 1, 1), (3, 2048, 1, 4), (1, 4096, 1, 1)], True),
]
BRANCHES = ("branch2a", "branch2b1", "branch2b2")


def shapes(width: float) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and running statistics, by their names in converted files."""

    def scaled(channels: int) -> int:
        return round(channels * width)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = (scaled(channels),)

    found: dict[str, tuple[int, ...]] = {"conv1a.weight": (scaled(64), 3, 3, 3)}
    for unit, channels, convs, shortcut in UNITS:
        last = convs[-1][1]
        if shortcut:
            found[f"{unit}.conv_branch1.weight"] = (scaled(last), scaled(channels), 1, 1)
        for branch, (kernel, out, _, _) in zip(BRANCHES, convs, strict=False):
            norm(f"{unit}.bn_{branch}", channels)
            key = f"{unit}.conv_{branch}.weight"
            found[key] = (scaled(out), scaled(channels), kernel, kernel)
            channels = out
    norm("bn7", 4096)
    return found


def draw(width: float = 1 / 16) -> dict[str, Tensor]:
    """A converted file's content, drawn at random with activations of ordinary size."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in shapes(width).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            value = value / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            value = value.abs() + 0.5
        state[name] = value
    return state


def layer_by_layer(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The network in evaluation mode, one line a layer; conv2 ... conv6 as SEAM names them."""

    def activate(name: str, x: Tensor) -> Tensor:
        statistics = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.batch_norm(x, *statistics, state[f"{name}.weight"], state[f"{name}.bias"]).relu()

    taps = {"b3": "conv2", "b4": "conv3", "b5": "conv4", "b6": "conv5"}
    found = {}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]
    x = F.conv2d(x, state["conv1a.weight"], padding=1)
    for unit, _, convs, shortcut in UNITS:
        inside = activate(f"{unit}.bn_branch2a", x)
        if unit in taps:
            found[taps[unit]] = inside
        if shortcut:
            x = F.conv2d(inside, state[f"{unit}.conv_branch1.weight"], stride=convs[0][2])
        for i, (kernel, _, stride, dilation) in enumerate(convs):
            if i:
                inside = activate(f"{unit}.bn_{BRANCHES[i]}", inside)
            weight = state[f"{unit}.conv_{BRANCHES[i]}.weight"]
            padding = dilation * (kernel // 2)
            inside = F.conv2d(inside, weight, None, stride, padding, dilation)
        x = x + inside
    return found | {"conv6": activate("bn7", x)}


def make(**kwargs: object) -> ResNet38Encoder:
    torch.manual_seed(0)
    return ResNet38Encoder(**({"width": 1 / 16} | kwargs)).eval()  # type: ignore[arg-type]


def save(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def test_parameter_count() -> None:
    """Every layer of the list, and nothing else: 105 M without a classifier."""
    listed = {k: math.prod(s) for k, s in shapes(1).items() if "running" not in k}
    with torch.device("meta"):
        encoder = ResNet38Encoder()
    assert sum(p.numel() for p in encoder.parameters()) == sum(listed.values()) == 105_070_912
    # 38 layers with weights on the longest path: 37 convolutions here, and the classifier.
    assert 1 + sum(len(convs) for _, _, convs, _ in UNITS) == 37


@pytest.mark.parametrize("size", [(97, 65), (64, 64), (8, 9), (1, 1), (40, 57)])
def test_sizes(size: tuple[int, int]) -> None:
    encoder = make()
    stages = encoder.pyramid(torch.rand(2, 3, *size))
    assert [s.shape[1] for s in stages] == [8, 16, 32, 64, 256] == list(encoder.stage_dims)
    assert encoder.stage_strides == (2, 4, 8, 8, 8)
    for stage, stride in zip(stages, (2, 4, 8, 8, 8), strict=True):
        assert stage.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
    assert stages[-1].shape[2:] == encoder.grid(*size)


def test_interface() -> None:
    with torch.device("meta"):
        encoder = ResNet38Encoder()
        assert (encoder.dim, encoder.early_dim, encoder.patch_size) == (4096, 1024, (8, 8))
        assert ResNet38Encoder(early_block=-3).early_dim == 512
    encoder.freeze_position()
    assert not {"mean", "std"} & set(encoder.state_dict())


def test_layer_by_layer(tmp_path: Path) -> None:
    state = draw()
    encoder = make(weights=save(state, tmp_path / "w.pth"))
    x = torch.rand(2, 3, 97, 65)
    expected = layer_by_layer(state, x)
    with torch.no_grad():
        stages = encoder.pyramid(x)
        final, early = encoder(x)
    assert len(stages) == 5
    for name, stage in zip(("conv2", "conv3", "conv4", "conv5", "conv6"), stages, strict=True):
        assert 0.05 < expected[name].mean() < 50
        torch.testing.assert_close(stage, expected[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(final, stages[-1])
    assert torch.equal(early, stages[-2])
    assert torch.equal(make(weights=tmp_path / "w.pth", early_block=-3)(x)[1], stages[-3])


def test_earlier_stage_is_averaged_to_the_final_grid() -> None:
    encoder = make(early_block=-4)
    x = torch.rand(1, 3, 97, 65)
    early, stage = encoder(x)[1], encoder.pyramid(x)[1]
    assert stage.shape[2:] == (25, 17)
    assert early.shape[2:] == (13, 9)
    torch.testing.assert_close(early[..., 2, 3], stage[..., 4:6, 6:8].mean((2, 3)))
    torch.testing.assert_close(early[..., 12, 8], stage[..., 24, 16])


def test_receptive_field() -> None:
    """557 pixels, 1 + the sum of (kernel - 1) x dilation x stride so far over the longest path."""
    encoder = make(width=1 / 64, early_block=-1).double()
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 4:
            torch.nn.init.constant_(parameter, 1 / parameter[0].numel())
        elif name.endswith("bias"):
            torch.nn.init.constant_(parameter, 1.0)  # nothing that a ReLU would cut off
    x = torch.full((1, 3, 3, 1001), 0.9, dtype=torch.float64, requires_grad=True)
    final = encoder(x)[0]
    assert (final > 0).all()
    final[..., 62].sum().backward()
    assert x.grad is not None
    reached = x.grad[0, 0, 1].nonzero()
    # Centred on the pixel that the cell's own position falls on.
    assert (reached.min(), reached.max()) == (62 * 8 - 278, 62 * 8 + 278)


@pytest.mark.parametrize("unit", ["b6", "b7"])
def test_dropout(unit: str) -> None:
    """Whole channels, twice in each of the last two units, and only in training."""
    encoder = make(freeze_bn=True)
    module = encoder.units[unit]
    dims = {"b6": 64, "b7": 128}
    x = torch.rand(1, dims[unit], 6, 6) + 1
    assert torch.equal(module(x)[1], module(x)[1])
    encoder.train()
    seen: list[Tensor] = []
    for conv in module.convs:
        conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for norm in module.norms:
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.ones_(norm.bias)  # no zero but those of the dropout
    for _ in range(200):
        module(x)
    rate = {"b6": 0.3, "b7": 0.5}[unit]
    for i in range(3):
        inputs = torch.cat(seen[i::3])
        gone = (inputs == 0).flatten(2)
        assert torch.equal(gone.all(2), gone.any(2))
        assert gone.float().mean().item() == pytest.approx(0 if i == 0 else rate, abs=0.03)
    assert all(u.dropout.p == 0 for n, u in encoder.units.items() if n not in ("b6", "b7"))


def trained(encoder: ResNet38Encoder) -> set[str]:
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


def test_what_is_frozen() -> None:
    encoder = make()
    names = {n for n, _ in encoder.named_parameters()}
    norms = {n for n in names if "norm" in n}
    stem = {n for n in names if re.match(r"stem|units\.b2(_\d)?\.", n)}
    assert len(norms) == 2 * (15 * 2 + 2 * 3 + 1)
    assert len([n for n in stem - norms if n in names]) == 1 + 6 + 1
    assert trained(encoder) == names - norms - stem
    assert trained(make(freeze_bn=False)) == names - stem
    assert trained(make(freeze_stem=False)) == names - norms
    assert trained(make(freeze_bn=False, freeze_stem=False)) == names


@pytest.mark.parametrize("freeze", [True, False])
def test_running_statistics(freeze: bool) -> None:
    encoder = ResNet38Encoder(width=1 / 64, freeze_bn=freeze)
    assert encoder.training
    assert encoder.units["b3"].norms[0].training != freeze
    copy.deepcopy(encoder)(torch.rand(2, 3, 32, 32))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    assert encoder.eval().train() is encoder
    encoder(torch.rand(2, 3, 32, 32))
    same = all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert same == freeze


class TestWeights:
    """Files of other makers."""

    def check(self, encoder: ResNet38Encoder, state: dict[str, Tensor]) -> None:
        x = torch.rand(1, 3, 24, 33)
        torch.testing.assert_close(
            encoder(x)[0], layer_by_layer(state, x)["conv6"], rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_converted_file(self, tmp_path: Path, prefix: str, suffix: str) -> None:
        from safetensors.torch import save_file

        state = draw()
        heads = {k: torch.ones(2) for k in ("fc8.weight", "fc_proj.bias", "f8_3.weight", "f9.w")}
        content = {prefix + k: v for k, v in (state | heads).items()}
        path = tmp_path / f"w.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(content, path)  # type: ignore[operator]
        self.check(make(weights=str(path)), state)

    def test_own_names(self, tmp_path: Path) -> None:
        first = make(weights=save(draw(), tmp_path / "w.pth"))
        again = make(weights=save(first.state_dict(), tmp_path / "own.pth"))
        assert all(torch.equal(v, first.state_dict()[k]) for k, v in again.state_dict().items())

    def test_mxnet_file(self, tmp_path: Path) -> None:
        """``b4_1.conv_branch2a`` was ``res4b1_branch2a``, ``b4.bn_branch2a`` ``bn4a_branch2a``."""
        state = draw()
        what = {"weight": "gamma", "bias": "beta"}
        theirs = {}
        for key, value in state.items():
            parts = key.split(".")
            last = what.get(parts[-1], "moving_" + parts[-1].removeprefix("running_"))
            kind = "aux" if "running" in parts[-1] else "arg"
            if parts[0] == "conv1a":
                name = "conv1a_weight"
            elif parts[0] == "bn7":
                name = f"bn7_{last}"
            else:
                level, _, unit = parts[0][1:].partition("_")
                unit = f"{level}b{unit}" if unit else f"{level}a"
                layer, branch = parts[1].split("_")
                name = f"bn{unit}_{branch}_{last}"
                if layer == "conv":
                    name = f"res{unit}_{branch}_weight"
            theirs[f"{kind}:{name}"] = value.numpy()
        theirs["arg:linear1000_weight"] = torch.ones(1000, 256).numpy()
        theirs["arg:linear1000_bias"] = torch.ones(1000).numpy()
        assert "aux:bn4b1_branch2b1_moving_var" in theirs
        assert "arg:res6a_branch2b2_weight" in theirs
        path = write_params(tmp_path / "ilsvrc.params", theirs)
        self.check(make(weights=path), state)
        del theirs["arg:res3b1_branch2a_weight"]
        theirs["arg:res9b1_branch2a_weight"] = theirs["arg:other"] = torch.ones(1).numpy()
        write_params(path, theirs)
        message = (
            r"missing: units\.b3_1\.convs\.0\.weight; not expected: arg:other, units\.b9_1\.conv"
        )
        with pytest.raises(UserError, match=message):
            make(weights=path)

    def test_half_precision(self, tmp_path: Path) -> None:
        state = {k: v.half() for k, v in draw().items()}
        encoder = make(weights=save(state, tmp_path / "w.pth"))
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}

    def test_other_width(self, tmp_path: Path) -> None:
        path = save(draw(1 / 32), tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"w\.pth' is not a 'resnet38d': shape: stem\.weight"):
            make(weights=path)


def test_errors() -> None:
    with pytest.raises(UserError, match=r"pretrained=true.*Set it to false, and backbone\.weights"):
        ResNet38Encoder(pretrained=True)
    with pytest.raises(UserError, match="width=0"):
        ResNet38Encoder(width=0.001)
    with pytest.raises(UserError, match="early_block=5 is outside the 5 stages of 'resnet38d'"):
        make(early_block=5)
    assert make(early_block=4).early_index == 4
    assert make(early_block=-5).early_index == 0
