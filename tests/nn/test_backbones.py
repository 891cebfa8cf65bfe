"""ViTs of DINOv2, DINOv3, CLIP, SigLIP and EVA, as encoders and in every method."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.methods.made import batch
from tests.methods.test_unia import SOON
from tests.oracle.vit_attention import attention as attention_by_hand
from wsss.addons import Affinity
from wsss.errors import UserError
from wsss.methods import CAM, CoSA, MCTformer, Supervised, UniA
from wsss.nn import UncertaintyNeck, WSSSNetwork
from wsss.nn.attention import attention_layers, keep_attention
from wsss.nn.encoder import ViTEncoder
from wsss.nn.encoders import make_encoder
from wsss.nn.mctformer import MCTformerNetwork

TINY: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 64}
CLASSES = ("cat", "dog", "cow")
RMS: dict[str, Any] = {"norm_layer": "rmsnorm", "qk_norm": True, "patch_size": 14}
#: name, options, tokens before the patches
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", {}, 1),
    "dinov2_reg": ("vit_base_patch14_reg4_dinov2.lvd142m", {}, 5),
    "dinov3": ("vit_base_patch16_dinov3.lvd1689m", {"init_values": 0.5}, 5),
    "dinov3_plus": ("vit_small_plus_patch16_dinov3.lvd1689m", {"init_values": 0.5}, 5),
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", {}, 1),
    "siglip": ("vit_base_patch16_siglip_224.webli", {}, 0),
    "eva": ("eva_giant_patch14_224.clip_ft_in1k", {"mlp_ratio": 2}, 1),
    "eva02_tiny": ("eva02_tiny_patch14_224.mim_in22k", {}, 1),
    "eva02": ("eva02_base_patch14_224.mim_in22k", {}, 1),
    "eva02_clip": ("eva02_base_patch16_clip_224.merged2b", {}, 1),
    "rope": ("vit_small_patch16_rope_224.naver_in1k", {"init_values": 0.5}, 1),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224.naver_in1k", {"init_values": 0.5}, 1),
    "rms": ("vit_tiny_patch16_224", RMS, 1),
}
#: whose only norm is that of the pooled tokens
AFTER_POOLING = {"eva", "eva02_tiny", "eva02"}
#: with rotary embedding
ROTARY = {"dinov3", "dinov3_plus", "eva02_tiny", "eva02", "eva02_clip", "rope", "rope_mixed"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def options_of(family: str, **more: Any) -> dict[str, Any]:
    return TINY | FAMILIES[family][1] | more


def stir(module: Any) -> Any:
    """Random values for all parameters, so that none is without effect, nor attention even."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            offset = float(parameter.dim() == 1 and "norm" in name and name.endswith("weight"))
            parts = ("qkv", "q_proj", "k_proj", "cls", "reg", "pos", "freqs")
            large = any(part in name for part in parts)
            parameter.copy_(offset + (0.4 if large else 0.1) * torch.randn_like(parameter))
    return module


def make(family: str, **more: Any) -> Any:
    return stir(ViTEncoder(FAMILIES[family][0], **options_of(family, **more))).eval()


def images_of(height: int = 64, width: int = 80) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def normalised(encoder: ViTEncoder, images: Tensor) -> Tensor:
    """With mean and deviation of the name's own configuration, as large as whole patches."""
    config = timm.get_pretrained_cfg(encoder.name)
    mean, std = (torch.tensor(getattr(config, k)).view(1, 3, 1, 1) for k in ("mean", "std"))
    sides = zip(images.shape[2:], encoder.patch_size, strict=True)
    size = [patch * -(-side // patch) for side, patch in sides]
    return torch.nn.functional.interpolate((images - mean) / std, size, mode="bilinear")


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


@every_family
class TestFeatures:
    @pytest.mark.parametrize("size", [(56, 56), (45, 70), (112, 96)])
    def test_are_timms_own(self, family: str, size: tuple[int, int]) -> None:
        """Final: patch tokens after the last norm; early: a block's, without it; no others."""
        encoder = make(family, early_block=-2)
        prefix, patch = FAMILIES[family][2], encoder.patch_size[0]
        assert encoder.num_prefix_tokens == prefix
        grid = (-(-size[0] // patch), -(-size[1] // patch))
        assert encoder.grid(*size) == grid
        seen = {}
        encoder.vit.blocks[1].register_forward_hook(lambda m, i, o: seen.update(early=o))
        encoder.vit.blocks[2].register_forward_hook(lambda m, i, o: seen.update(last=o))
        images = images_of(*size)
        with torch.no_grad():
            final, early = encoder(images)
            whole = encoder.vit.forward_features(normalised(encoder, images))
            normed = encoder.vit.norm(seen["last"])
        assert whole.shape[1] == prefix + grid[0] * grid[1]
        torch.testing.assert_close(final, to_map(whole[:, prefix:], grid))
        torch.testing.assert_close(final, to_map(normed[:, prefix:], grid))
        assert not torch.allclose(normed, seen["last"], atol=0.1)  # there is a norm
        torch.testing.assert_close(early, to_map(seen["early"][:, prefix:], grid))
        encoder.early_norm = True
        with torch.no_grad():
            expected = to_map(encoder.vit.norm(seen["early"])[:, prefix:], grid)
            torch.testing.assert_close(encoder(images)[1], expected)

    def test_batch_determinism_and_precision(self, family: str) -> None:
        encoder, images = make(family), images_of()
        with torch.no_grad():
            both = encoder(images)
            again = encoder(images)
            one = encoder(images[1:])
            with torch.autocast("cpu", torch.bfloat16):
                low = encoder(images)
        for full, same, single, coarse in zip(both, again, one, low, strict=True):
            assert torch.equal(full, same)
            torch.testing.assert_close(full[1:], single, rtol=1e-4, atol=1e-4)
            error = (coarse.float() - full).pow(2).mean().sqrt() / full.std()
            assert error < 0.1

    def test_everything_is_trained_and_position_can_be_frozen(self, family: str) -> None:
        """No parameter of the pooling is left, which DDP would wait for."""
        encoder = make(family).train()
        final, _ = encoder(images_of())
        (final * torch.randn_like(final)).sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        encoder.freeze_position()
        frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
        learned = {
            n for n, _ in encoder.named_parameters() if n in ("vit.pos_embed", "vit.rope.freqs")
        }
        assert frozen == learned
        assert bool(frozen) == (family not in ("dinov3", "dinov3_plus", "rope"))

    def test_position_follows_the_grid(self, family: str) -> None:
        """A token's place counts: the same patch everywhere does not give the same tokens."""
        encoder = make(family)
        patch = encoder.patch_size[0]
        cell = images_of(patch, patch)[:1]
        maps = {}
        with torch.no_grad():
            for rows, columns in ((3, 4), (4, 3), (6, 8)):
                maps[rows, columns] = encoder(cell.repeat(1, 1, rows, columns))[0][0]
        small, tall, large = maps.values()
        assert small.flatten(1).std(1).max() > 2e-3
        assert not torch.allclose(small, tall.transpose(1, 2), atol=1e-3)
        assert not torch.allclose(small, large[:, :3, :4], atol=1e-3)

    def test_attention_is_the_layers_own(self, family: str) -> None:
        """What timm's plain products give, and what loops over heads give."""
        encoder = make(family)
        prefix = FAMILIES[family][2]
        images = images_of(48, 40)
        seen: list[Tensor] = []
        given: list[tuple[Tensor, Tensor | None]] = []
        for layer in attention_layers(encoder):
            layer.register_forward_pre_hook(
                lambda m, i, o: given.append((i[0], o.get("rope"))), with_kwargs=True
            )
        with torch.no_grad(), keep_attention(encoder, (0, 1, 2)) as kept:
            final = encoder(images)[0]
        assert all((rope is not None) == (family in ROTARY) for _, rope in given)
        for layer in attention_layers(encoder):
            layer.fused_attn = False
            layer.attn_drop.register_forward_hook(lambda m, i, o: seen.append(i[0]))
        with torch.no_grad():
            plain = encoder.vit.forward_features(normalised(encoder, images))
        torch.testing.assert_close(to_map(plain[:, prefix:], final.shape[2:]), final)
        assert len(kept) == len(seen) == 3
        for found, own in zip(kept, seen, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, own.mean(1), rtol=1e-4, atol=1e-5)
            assert found.std() > 0.01
        x, rope = given[1]
        with torch.no_grad():
            expected = attention_by_hand(attention_layers(encoder)[1], x[:1], rope, prefix)
        torch.testing.assert_close(kept[1][:1], expected, rtol=1e-4, atol=1e-5)


class TestWeights:
    """A full model's file, its head and its own image size, into a network of another size."""

    @every_family
    def test_of_the_whole_model(self, family: str, tmp_path: Path) -> None:
        name, path = FAMILIES[family][0], tmp_path / "whole.pth"
        patch = 14 if "14" in name or family == "rms" else 16
        options = options_of(family, img_size=6 * patch, dynamic_img_size=True)
        whole = stir(timm.create_model(name, num_classes=7, **options)).eval()
        torch.save(whole.state_dict(), path)
        encoder = ViTEncoder(name, weights=path, **options_of(family, img_size=4 * patch)).eval()
        images = images_of(4 * patch, 4 * patch)
        with torch.no_grad():
            tokens = whole.forward_features(normalised(encoder, images))
            if family in AFTER_POOLING:
                tokens = whole.fc_norm(tokens)
            final = encoder(images)[0]
        expected = to_map(tokens[:, encoder.num_prefix_tokens :], (4, 4))
        torch.testing.assert_close(final, expected, rtol=1e-4, atol=1e-4)

    @every_family
    def test_strictly(self, family: str, tmp_path: Path) -> None:
        name, path = FAMILIES[family][0], tmp_path / "part.pth"
        state = timm.create_model(name, num_classes=7, **options_of(family)).state_dict()
        for change, message in (
            ({"blocks.1.extra": torch.zeros(2)}, r"not expected: blocks\.1\.extra;"),
            ({"header.weight": torch.zeros(2)}, r"not expected: header\.weight;"),
            ({"blocks.1.norm1.weight": None}, r"missing: blocks\.1\.norm1\.weight;"),
            ({"norm.weight": None, "fc_norm.weight": None}, r"missing: norm\.weight"),
            ({"blocks.0.norm2.weight": torch.zeros(5)}, r"shape: blocks\.0\.norm2\.weight \(5,\)"),
        ):
            torch.save({k: v for k, v in (state | change).items() if v is not None}, path)
            with pytest.raises(UserError, match=message):
                ViTEncoder(name, weights=path, **options_of(family))

    @pytest.mark.parametrize("family", ["dinov2", "eva02", "clip"])
    def test_of_another_patch_size(self, family: str, tmp_path: Path) -> None:
        name, path = FAMILIES[family][0], tmp_path / "whole.pth"
        whole = stir(timm.create_model(name, **options_of(family)))
        torch.save(whole.state_dict(), path)
        encoder = ViTEncoder(name, weights=path, **options_of(family, patch_size=8, img_size=48))
        assert encoder.vit.patch_embed.proj.weight.shape[2:] == (8, 8)
        assert encoder.vit.pos_embed.shape[1] == 37
        assert torch.equal(encoder.vit.pos_embed[:, :1], whole.pos_embed[:, :1])

    def test_norm_of_an_unpooled_file(self, tmp_path: Path) -> None:
        """Masked pretraining's own file has its norm over tokens, and what it predicts with."""
        name, path = FAMILIES["eva02"][0], tmp_path / "mim.pth"
        whole = stir(timm.create_model(name, num_classes=0, **options_of("eva02")))
        state = {k.replace("fc_norm", "norm"): v for k, v in whole.state_dict().items()}
        state |= {"mask_token": torch.zeros(1, 1, 24), "lm_head.weight": torch.zeros(9, 24)}
        torch.save(state, path)
        encoder = ViTEncoder(name, weights=path, **options_of("eva02"))
        assert torch.equal(encoder.vit.norm.weight, whole.fc_norm.weight)

    def test_of_dinov3s_makers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        name, path = FAMILIES["dinov3"][0], tmp_path / "dinov3.pth"
        whole = stir(timm.create_model(name, num_classes=0, **options_of("dinov3")))
        state = {}
        for key, value in whole.state_dict().items():
            key = key.replace("reg_token", "storage_tokens")
            state[key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = value
        for block in range(3):
            state[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(72)
            state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.zeros(72)
        state |= {"mask_token": torch.zeros(1, 24), "rope_embed.periods": torch.zeros(3)}
        torch.save(state, path)
        encoder = ViTEncoder(name, weights=path, **options_of("dinov3"))
        for key, value in whole.state_dict().items():
            assert torch.equal(encoder.vit.state_dict()[key], value)
        assert capsys.readouterr().out == ""

    def test_of_another_model(self, tmp_path: Path) -> None:
        """What timm itself cannot convert is an error of the user's too."""
        path = tmp_path / "other.pth"
        torch.save(
            {"pos_embed": torch.zeros(1, 8, 24), "patch_embed.proj.weight": torch.zeros(3)}, path
        )
        for family in ("dinov2", "eva02"):
            with pytest.raises(UserError, match=r"backbone\.weights='.*other\.pth' is not a '"):
                ViTEncoder(FAMILIES[family][0], weights=path, **options_of(family))


def network_of(family: str, network_class: Any = WSSSNetwork, **more: Any) -> Any:
    name = FAMILIES[family][0]
    network = network_class(name, len(CLASSES), **options_of(family), **more)
    stir(network.encoder)
    torch.nn.init.normal_(network.decoder.classifier.weight)
    return network


def step(method: Any) -> dict[str, Tensor]:
    """Terms of a training step with its add-ons, after their gradients; all are finite."""
    method._trainer = SimpleNamespace(global_step=10, max_steps=100)
    method.log = lambda *a, **k: None
    b = batch()
    b.mask = torch.randint(0, 4, b.valid.shape)
    terms, weights = method.train().with_addons(method.step(b))
    torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    for name, parameter in method.network.encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    blocks = method.network.encoder.vit.blocks
    assert all(block.attn.proj.weight.grad.any() for block in blocks)
    return dict(terms)


SCALES = {"cam_scales": (1.0, 0.5)}


class TestMethods:
    @every_family
    def test_cosa(self, family: str) -> None:
        network = network_of(family, early_norm=True)
        method = CoSA(network=network, classes=CLASSES, loss_warmup_steps=6, **SCALES)
        assert set(step(method)) == {"cls", "cls_early", "c2s", "c2s_early", "s2c", "csc"}

    @every_family
    def test_unia(self, family: str) -> None:
        network = network_of(family, neck=UncertaintyNeck)
        addons = {"affinity": Affinity()}
        method = UniA(network=network, classes=CLASSES, addons=addons, **SCALES, **SOON)
        assert network.train().wanted_attention == (0, 1, 2)
        terms = step(method)
        assert set(terms) == {"cls", "cls_early", "token", "seg", "energy", "affinity"}
        output = network(images_of())
        count = output.cam.shape[2:].numel()
        assert output.attention.shape == (2, count, count)
        assert output.attention.requires_grad

    @pytest.mark.parametrize("family", ["dinov2_reg", "dinov3", "siglip", "eva02"])
    @pytest.mark.parametrize("method", [CAM, Supervised])
    def test_others(self, family: str, method: Any) -> None:
        assert step(method(network=network_of(family), classes=CLASSES, **SCALES))

    @pytest.mark.parametrize("family", [f for f in FAMILIES if f != "siglip"])
    def test_mctformer(self, family: str) -> None:
        """As many class tokens as classes; the rest is timm's own, without the final norm."""
        network = network_of(family, MCTformerNetwork)
        prefix = FAMILIES[family][2] + len(CLASSES) - 1
        assert set(step(MCTformer(network=network, classes=CLASSES, **SCALES))) == {
            "cls",
            "cls_token",
        }
        encoder, images = stir(network.encoder.eval()), images_of()
        network.eval().set_attention(2)
        seen: list[Tensor] = []
        tokens: list[Tensor] = []
        for layer in attention_layers(encoder):
            layer.fused_attn = False
            layer.attn_drop.register_forward_hook(lambda m, i, o: seen.append(i[0].mean(1)))
        encoder.vit.norm.register_forward_hook(lambda m, i, o: tokens.append(i[0]))
        with torch.no_grad():
            encoder.vit.forward_features(normalised(encoder, images))
            own = list(seen)
            output, logits = network.forward_with_tokens(images)
        grid = encoder.grid(64, 80)
        count = grid[0] * grid[1]
        assert tokens[0].shape[1] == prefix + count
        torch.testing.assert_close(output.features, to_map(tokens[0][:, prefix:], grid))
        torch.testing.assert_close(logits, tokens[0][:, :3].mean(-1))
        to_classes = torch.stack([a[:, :3, prefix:] for a in own[1:]]).mean(0) * count
        maps = to_classes * output.cam.relu().flatten(2)
        spread = torch.stack([a[:, prefix:, prefix:] for a in own]).mean(0)
        expected = torch.einsum("bij,bcj->bci", spread, maps).reshape(output.cam.shape)
        torch.testing.assert_close(output.refined_cam, expected, rtol=1e-3, atol=1e-5)
        # Class tokens are not turned by a rotary embedding: copies stay copies.
        with torch.no_grad():
            encoder.vit.cls_token.copy_(
                encoder.vit.cls_token[:, :1].expand_as(encoder.vit.cls_token)
            )
            if encoder.vit.pos_embed is not None and not encoder.vit.no_embed_class:
                encoder.vit.pos_embed[:, :3] = encoder.vit.pos_embed[:, :1].clone()
            logits = network.forward_with_tokens(images)[1]
        torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (FAMILIES["siglip"][0], "has no class token: .* such as deit_small_patch16_224"),
            ("vit_small_patch16_18x2_224", "is no plain ViT: method=mctformer needs a plain ViT"),
        ],
    )
    def test_unfit_for_mctformer(self, name: str, message: str) -> None:
        with pytest.raises(UserError, match=rf"backbone\.name='{name}' {message}"):
            MCTformerNetwork(name, 3, early_block=-1, **TINY)


class TestConfigFiles:
    @pytest.mark.parametrize(
        ("file", "patch", "prefix", "millions", "mean"),
        [
            ("dinov2_base", 14, 5, 86.6, 0.485),
            ("dinov3_base", 16, 5, 85.6, 0.485),
            ("clip_base", 16, 1, 85.8, 0.481),
            ("eva02_base", 14, 1, 85.8, 0.481),
        ],
    )
    def test_each_makes_its_encoder(
        self, file: str, patch: int, prefix: int, millions: float, mean: float
    ) -> None:
        config = OmegaConf.load(Path(__file__).parents[2] / f"conf/backbone/{file}.yaml")
        options: Any = OmegaConf.to_container(config)
        assert options.pop("defaults") == ["vit_base", "_self_"]
        assert timm.is_model_pretrained(options["name"])  # a tag that timm has weights of
        assert isinstance(options["early_norm"], bool)
        with torch.device("meta"):
            encoder: Any = make_encoder(**options)
        assert encoder.patch_size == (patch, patch)
        assert encoder.num_prefix_tokens == prefix
        assert (encoder.dim, len(encoder.vit.blocks), encoder.early_index) == (768, 12, 9)
        assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(
            millions, abs=0.1
        )
        expected = timm.get_pretrained_cfg(options["name"]).mean
        assert expected is not None
        assert expected[0] == pytest.approx(mean, abs=1e-3)
        # The crops of 448, and the scales CAMs and scores are taken at, need no padding.
        assert all(int(448 * scale) % patch == 0 for scale in (0.5, 0.75, 1.0, 1.25, 1.5))
