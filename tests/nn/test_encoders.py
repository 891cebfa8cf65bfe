"""Which encoder a name stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf

from wsss.errors import UserError
from wsss.nn.cnn import CNNEncoder
from wsss.nn.encoder import ViTEncoder
from wsss.nn.encoders import SavedEncoder, _is_vit, make_encoder
from wsss.nn.resnet38 import ResNet38Encoder

VIT: dict[str, Any] = {"depth": 4, "embed_dim": 24, "num_heads": 2}
CNN: dict[str, Any] = {"channels": (8, 16, 24, 32)}
CASES: list[tuple[str, dict[str, Any], type]] = [
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", VIT, ViTEncoder),
    ("deit_tiny_distilled_patch16_224", VIT, ViTEncoder),
    ("eva02_tiny_patch14_224", VIT | {"img_size": 56}, ViTEncoder),
    ("resnet10t.c3_in1k", CNN, CNNEncoder),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, CNNEncoder),
    # Has a ViT's parts, but not its token grids of any shape.
    ("xcit_nano_12_p16_224", {"depth": 3, "embed_dim": 16, "num_heads": 2}, CNNEncoder),
    ("resnet38d", {"width": 1 / 64}, ResNet38Encoder),
]


@pytest.mark.parametrize(("name", "options", "kind"), CASES)
def test_one_interface(name: str, options: dict[str, Any], kind: type) -> None:
    encoder = make_encoder(name, **options).eval()
    assert type(encoder) is kind
    assert encoder.name == name
    early = -3 if kind is ViTEncoder else -2
    steps = 4 if kind is ViTEncoder else len(encoder.stage_dims)  # type: ignore[arg-type]
    assert encoder.early_index == steps + early
    assert make_encoder(name, early_block=-1, **options).early_index == steps - 1
    assert make_encoder(name, early_block=0, **options).early_index == 0
    final, features = encoder(torch.rand(2, 3, 97, 65))
    assert final.shape == (2, encoder.dim, *encoder.grid(97, 65))
    assert features.shape == (2, encoder.early_dim, *encoder.grid(97, 65))
    assert encoder.grid(97, 65) == (
        -(-97 // encoder.patch_size[0]),
        -(-65 // encoder.patch_size[1]),
    )
    assert encoder.mean.shape == encoder.std.shape == (1, 3, 1, 1)
    encoder.freeze_position()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, options) for name, options, _ in CASES],
        ("vit_small_patch16_dinov3.lvd1689m", VIT),
        ("vit_base_patch14_reg4_dinov2.lvd142m", VIT | {"img_size": 56}),
        ("eva_giant_patch14_224.clip_ft_in1k", VIT | {"img_size": 56}),
    ],
)
def test_start_from_a_trained_one(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Every kind of encoder keeps what it has learned."""
    trained = make_encoder(name, **options).eval()
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    saved = SavedEncoder(name, trained.state_dict(), tmp_path / "last.ckpt")
    encoder = make_encoder(name, weights=saved, pretrained=True, **options).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), trained(images))
    with pytest.raises(UserError, match=rf"trained with backbone\.name=other, not {name}"):
        make_encoder(name, weights=SavedEncoder("other", {}, tmp_path / "a.ckpt"), **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch14_reg4_dinov2.lvd142m", True),
        ("vit_small_patch16_dinov3.lvd1689m", True),
        ("vit_base_patch16_clip_224.openai", True),
        ("eva02_base_patch14_224.mim_in22k", True),
        ("eva_giant_patch14_224.clip_ft_in1k", True),
        ("vit_base_patch16_siglip_224.webli", True),
        ("vit_base_patch16_rope_mixed_224.naver_in1k", True),
        ("beit_base_patch16_224", False),  # its position embedding has one grid
        ("swin_tiny_patch4_window7_224", False),
        ("resnet50", False),
    ],
)
def test_is_vit(name: str, expected: bool) -> None:
    assert _is_vit(name) == expected


def test_is_vit_makes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block on the meta device; all of them only where a ViT takes no other number."""
    asked: list[int | None] = []
    create = timm.create_model
    refuse = False

    def record(name: str, **kwargs: Any) -> Any:
        asked.append(kwargs.get("depth"))
        assert not (refuse and "depth" in kwargs)
        model = create(name, **kwargs)
        assert next(model.parameters()).is_meta
        return model

    monkeypatch.setattr(timm, "create_model", record)
    assert _is_vit("vit_tiny_patch16_224")
    assert not _is_vit("resnet10t")
    assert asked == [1, 1]
    refuse = True
    assert _is_vit("vit_tiny_patch16_224")
    assert asked[2:] == [1, None]


def test_options_arrive(tmp_path: Path) -> None:
    assert make_encoder("resnet10t", output_stride=8, **CNN).patch_size == (8, 8)
    vit = make_encoder("vit_tiny_patch16_224", early_norm=True, **VIT)
    assert isinstance(vit, ViTEncoder)
    assert vit.early_norm
    wide = make_encoder("resnet38d", width=1 / 32, freeze_bn=False)
    assert isinstance(wide, ResNet38Encoder)
    assert (wide.dim, wide.freeze_bn) == (128, False)
    for name, options in (("vit_tiny_patch16_224", VIT), ("resnet10t", CNN), ("resnet38d", {})):
        with pytest.raises(UserError, match="No weights file"):
            make_encoder(
                name,
                weights=tmp_path / "none.pth",
                **({"width": 0.02} | options) if name == "resnet38d" else options,
            )
    with pytest.raises(UserError, match="pretrained=true"):
        make_encoder("resnet38d", pretrained=True)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_pretrained_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def record(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        asked.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", record)
    make_encoder(name, **(VIT if name.startswith("vit") else CNN))
    assert not any(asked)
    asked.clear()
    make_encoder(name, pretrained=True, **(VIT if name.startswith("vit") else CNN))
    # Only the model that is kept fetches weights, and once.
    assert asked.count(True) == 1
    assert asked[-1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_24", {}, "not a timm model.*Nearest: vit_tiny_patch16_224"),
        ("resnet38", {}, "not a timm model.*Nearest: .*resnet38d"),
        (
            "resnet10t",
            {"early_norm": True},
            "early_norm=true: 'resnet10t' has no .*Set it to false",
        ),
        ("resnet38d", {"early_norm": True}, "early_norm=true: 'resnet38d'"),
        ("resnet38d", {"depth": 3, "img_size": 2}, "does not have depth, img_size; .* freeze_bn, "),
        ("resnet10t", {"img_size": 64}, r"\['img_size'\] cannot give"),
        ("vit_tiny_patch16_224", {"output_stride": 8}, "does not take"),
        ("mixer_s16_224", {}, "choose a CNN such as resnet50 or a plain ViT"),
        ("vit_tiny_r_s16_p8_224", {}, r"32 pixels a token, patches of 8\): choose a plain ViT"),
    ],
)
def test_unfit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_encoder(name, **options)


@pytest.mark.parametrize(
    ("file", "kind", "millions", "stride"),
    [
        ("resnet38d", ResNet38Encoder, 105.1, 8),
        ("resnet50", CNNEncoder, 23.5, 16),
        ("cnn_shapes", CNNEncoder, 1.3, 8),
    ],
)
def test_config_files(file: str, kind: type, millions: float, stride: int) -> None:
    config = OmegaConf.load(Path(__file__).parents[2] / f"conf/backbone/{file}.yaml")
    options: Any = OmegaConf.to_container(config)
    extra = options.pop("options")
    pretrained = options.pop("pretrained")
    assert pretrained == (file == "resnet50")
    with torch.device("meta"):
        encoder = make_encoder(**options, **extra)
    assert type(encoder) is kind
    assert encoder.patch_size == (stride, stride)
    assert encoder.early_dim == encoder.stage_dims[-2]
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_weights_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise LocalEntryNotFoundError("after five retries")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    wanted = rf"cannot fetch the weights of {name} .*: give backbone\.weights=FILE, or"
    with pytest.raises(UserError, match=wanted):
        make_encoder(name, pretrained=True)


def test_colours_are_those_that_the_weights_were_used_with() -> None:
    """CoSA and ToCo feed their ViT-B with ImageNet's; every other model gets its own."""

    def mean(name: str) -> list[float]:
        return ViTEncoder(name, early_block=-1, depth=1).mean.flatten().tolist()

    assert mean("vit_base_patch16_224.orig_in21k_ft_in1k") == pytest.approx([0.485, 0.456, 0.406])
    assert mean("vit_base_patch16_224.augreg_in21k_ft_in1k") == pytest.approx([0.5, 0.5, 0.5])
