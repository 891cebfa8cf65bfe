"""MCTformer's network: class tokens, CAM, attention and its refinement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.oracle import mctformer as oracle
from wsss.errors import UserError
from wsss.nn import UncertaintyNeck, WSSSNetwork
from wsss.nn.attention import mean_attention
from wsss.nn.mctformer import (
    MCTformerNetwork,
    class_to_patch_attention,
    fuse_attention_and_cam,
    patch_affinity_refine,
)
from wsss.pseudo import multi_scale, normalise_cam

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 48}


def make(num_classes: int = 3, **kwargs: Any) -> MCTformerNetwork:
    """With tokens and queries large enough that attention is not all alike."""
    torch.manual_seed(0)
    network = MCTformerNetwork("vit_tiny_patch16_224", num_classes, **(TINY | kwargs))
    vit = network.encoder.vit
    torch.nn.init.normal_(vit.cls_token, std=0.5)
    torch.nn.init.normal_(vit.pos_embed, std=0.5)
    for block in vit.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
    return network.eval()


def blocks_of(network: MCTformerNetwork, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """timm's own attention of each block, mean over heads, and its tokens before the final norm."""
    vit = network.encoder.vit
    blocks: list[Tensor] = []
    tokens: list[Tensor] = []
    handles = [vit.norm.register_forward_hook(lambda m, i, o: tokens.append(i[0]))]
    for block in vit.blocks:
        block.attn.fused_attn = False
        handles.append(
            block.attn.attn_drop.register_forward_hook(
                lambda m, i, o: blocks.append(oracle.mean_over_heads(i[0]))
            )
        )
    vit.forward_features((images - 0.5) / 0.5)
    for handle in handles:
        handle.remove()
    return blocks, tokens[-1]


class TestFunctions:
    def test_mean_attention(self) -> None:
        torch.manual_seed(0)
        query, key = 3 * torch.randn(2, 2, 3, 5, 4)  # 2 images, 3 heads, 5 tokens
        expected = oracle.mean_over_heads(oracle.softmax_attention(query, key, 0.7))
        found = mean_attention(query, key, 0.7)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 5))

    def test_class_to_patch(self) -> None:
        torch.manual_seed(0)
        attention = torch.rand(2, 9, 9)  # 2 classes, 1 other token, 2 x 3 patches
        expected = oracle.class_to_patch([attention], 2, (2, 3), 1)
        found = class_to_patch_attention(attention, 2, 6)
        torch.testing.assert_close(found.reshape(2, 2, 2, 3).double(), expected)

    def test_even_attention_counts_alike_on_any_grid(self) -> None:
        for patches in (4, 25):
            even = torch.zeros(1, patches + 2, patches + 2)
            even[..., 2:] = 1 / patches
            assert class_to_patch_attention(even, 2, patches).allclose(torch.ones(()))

    def test_fuse(self) -> None:
        torch.manual_seed(0)
        cam, attention = torch.randn(2, 3, 2, 4), torch.rand(2, 3, 2, 4)
        found = fuse_attention_and_cam(attention.flatten(2), cam)
        torch.testing.assert_close(found.double(), oracle.fused(cam, attention))
        assert (found == 0).any()

    def test_refine(self) -> None:
        torch.manual_seed(0)
        maps, affinity = torch.rand(2, 3, 2, 4), torch.rand(2, 8, 8)
        found = patch_affinity_refine(maps, affinity)
        torch.testing.assert_close(
            found.double(), oracle.refined(maps, affinity), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(patch_affinity_refine(maps, torch.eye(8).expand(2, 8, 8)), maps)


class TestNetwork:
    @pytest.mark.parametrize("size", [(32, 32), (64, 32), (48, 100), (16, 16)])
    def test_any_grid(self, size: tuple[int, int]) -> None:
        network = make()
        out, tokens = network.forward_with_tokens(torch.rand(2, 3, *size))
        h, w = -(-size[0] // 16), -(-size[1] // 16)
        assert out.class_logits.shape == out.early_class_logits.shape == tokens.shape == (2, 3)
        assert out.cam.shape == out.early_cam.shape == (2, 3, h, w)
        assert out.refined_cam is not None
        assert out.refined_cam.shape == (2, 3, h, w)
        assert out.refined_cam.amin() >= 0
        assert out.features.shape == (2, 24, h, w)
        assert out.seg_logits is not None
        assert out.seg_logits.shape == (2, 4, h, w)

    def test_logits_and_cam(self) -> None:
        """Both from the last block's tokens, which no norm has touched."""
        network = make()
        images = torch.rand(2, 3, 32, 48)
        _, tokens = blocks_of(network, images)
        out, token_logits = network.forward_with_tokens(images)
        expected = oracle.class_token_logits(tokens[:, :3])
        torch.testing.assert_close(token_logits.double(), expected, rtol=1e-4, atol=1e-5)
        features = tokens[:, 3:].transpose(1, 2).reshape(2, 24, 2, 3)
        torch.testing.assert_close(out.features, features, rtol=1e-4, atol=1e-5)
        conv = network.classifier.conv
        cam = oracle.conv3x3(features, conv.weight, conv.bias)
        torch.testing.assert_close(out.cam.double(), cam, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.class_logits, out.cam.mean((2, 3)))
        network.set_pooling("gmp")
        torch.testing.assert_close(network(images).class_logits, out.cam.amax((2, 3)))

    @pytest.mark.parametrize("refine", [True, False])
    @pytest.mark.parametrize("last", [1, 2, 3])
    @pytest.mark.parametrize("size", [(32, 48), (16, 16)])
    def test_refined_cam(self, last: int, refine: bool, size: tuple[int, int]) -> None:
        network = make()
        network.set_attention(last, refine)
        images = torch.rand(2, 3, *size)
        grid = (size[0] // 16, size[1] // 16)
        blocks, _ = blocks_of(network, images)
        out = network(images)
        attention = oracle.class_to_patch(blocks, 3, grid, last)
        expected = oracle.fused(out.cam, attention)
        if refine:
            affinity = oracle.patch_to_patch(blocks, grid[0] * grid[1])
            expected = oracle.refined(expected, affinity)
        assert out.refined_cam is not None
        torch.testing.assert_close(out.refined_cam.double(), expected, rtol=1e-3, atol=1e-5)

    def test_defaults_are_the_published(self) -> None:
        assert (make().attention_blocks, make().refine) == (3, True)
        assert make().classifier.pooling == "gap"

    def test_only_in_evaluation(self) -> None:
        network = make()
        images = torch.rand(2, 3, 32, 48)
        evaluated = network(images)
        trained = network.train()(images)
        assert trained.refined_cam is None
        torch.testing.assert_close(trained.cam, evaluated.cam)
        assert trained.cam.requires_grad
        assert not evaluated.refined_cam.requires_grad
        # no hook stays, whether or not a pass succeeds
        with pytest.raises(RuntimeError):
            network.eval()(torch.rand(2, 4, 32, 48))
        vit = network.encoder.vit
        assert not any(module._forward_hooks for module in vit.modules())

    def test_normalised_refined_cam_is_what_inference_gives(self) -> None:
        network = make()
        images = torch.rand(1, 3, 32, 48)
        out = network(images)
        found = multi_scale(network, images, [1.0], flip=False, decode=False).cam
        assert out.refined_cam is not None
        up = torch.nn.functional.interpolate(out.refined_cam, (32, 48), mode="bilinear")
        torch.testing.assert_close(found, normalise_cam(up))

    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    def test_autocast(self, precision: torch.dtype) -> None:
        network = make()
        images = torch.rand(2, 3, 32, 48)
        exact = network(images).refined_cam
        with torch.autocast("cpu", precision):
            out = network(images)
        assert out.refined_cam is not None
        assert out.refined_cam.dtype == torch.float32
        assert (out.refined_cam - exact).abs().max() < 0.1 * exact.abs().max()

    def test_large_maps_in_fp16_do_not_overflow(self) -> None:
        network = make()
        with torch.no_grad():
            network.classifier.conv.weight.mul_(3e3)
            network.classifier.conv.bias.fill_(4e4)
        with torch.autocast("cpu", torch.float16):
            out = network(torch.rand(1, 3, 96, 96))
        assert out.refined_cam is not None
        assert out.refined_cam.isfinite().all()

    def test_one_class(self) -> None:
        out, tokens = make(1).forward_with_tokens(torch.rand(2, 3, 32, 32))
        assert out.refined_cam is not None
        assert out.refined_cam.shape == (2, 1, 2, 2)
        assert tokens.shape == (2, 1)

    def test_classes_learn_apart_from_equal_tokens(self) -> None:
        torch.manual_seed(0)
        network = MCTformerNetwork("vit_tiny_patch16_224", 2, **TINY)
        _, tokens = network.forward_with_tokens(torch.rand(1, 3, 32, 32))
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1])
        (tokens[:, 0] - tokens[:, 1]).sum().backward()
        grad = network.encoder.vit.cls_token.grad
        assert not torch.allclose(grad[0, 0], grad[0, 1], atol=1e-3)

    def test_its_classifier_is_a_head(self) -> None:
        network = make()
        heads = {id(p) for p in network.head_parameters()}
        assert {id(p) for p in network.classifier.parameters()} <= heads
        before = network.classifier.conv.weight.clone()
        network.reset_heads()
        assert not torch.equal(before, network.classifier.conv.weight)


class TestBackbones:
    def test_class_tokens_start_as_the_pretrained_one(self, tmp_path: Path) -> None:
        torch.manual_seed(3)
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
        torch.nn.init.normal_(vit.cls_token)
        path = tmp_path / "vit.pth"
        torch.save(vit.state_dict(), path)
        network = MCTformerNetwork("vit_tiny_patch16_224", 4, weights=path, **TINY)
        ours = network.encoder.vit
        assert ours.cls_token.shape == (1, 4, 24)
        assert ours.pos_embed.shape == (1, 4 + 9, 24)
        for c in range(4):
            torch.testing.assert_close(ours.cls_token[0, c], vit.cls_token[0, 0])
            torch.testing.assert_close(ours.pos_embed[0, c], vit.pos_embed[0, 0])
        torch.testing.assert_close(ours.pos_embed[0, 4:], vit.pos_embed[0, 1:])
        assert ours.cls_token.requires_grad
        assert ours.pos_embed.requires_grad

    def test_one_class_is_the_plain_vit(self) -> None:
        torch.manual_seed(0)
        plain = WSSSNetwork("vit_tiny_patch16_224", 1, **TINY).eval()
        torch.manual_seed(0)
        ours = MCTformerNetwork("vit_tiny_patch16_224", 1, **TINY).eval()
        images = torch.rand(1, 3, 32, 80)
        torch.testing.assert_close(
            ours.encoder.vit.norm(ours(images).features.flatten(2).mT).mT,
            plain(images).features.flatten(2),
        )

    @pytest.mark.parametrize(
        "name",
        [
            "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224",  # its class token has no position
            "vit_small_patch14_reg4_dinov2",  # registers between class tokens and patches
            "vit_base_patch16_clip_224",
        ],
    )
    def test_other_vits(self, name: str) -> None:
        network = MCTformerNetwork(
            name, 3, early_block=-1, depth=2, img_size=56, embed_dim=48, num_heads=2
        ).eval()
        patch = network.patch_size[0]
        out = network(torch.rand(1, 3, 60, 90))
        assert out.refined_cam is not None
        assert out.refined_cam.shape == (1, 3, -(-60 // patch), -(-90 // patch))
        assert out.refined_cam.any()

    def test_registers_are_neither_classes_nor_patches(self) -> None:
        network = MCTformerNetwork(
            "vit_small_patch14_reg4_dinov2",
            3,
            depth=2,
            img_size=56,
            early_block=-1,
            embed_dim=24,
            num_heads=2,
            init_values=1.0,
        ).eval()
        vit = network.encoder.vit
        tokens: list[Tensor] = []
        vit.norm.register_forward_hook(lambda m, i, o: tokens.append(i[0]))
        out, logits = network.forward_with_tokens(torch.rand(1, 3, 28, 42))
        assert tokens[0].shape[1] == 3 + 4 + 6
        torch.testing.assert_close(out.features.flatten(2).mT, tokens[0][:, 7:])
        torch.testing.assert_close(logits, tokens[0][:, :3].mean(-1))

    @pytest.mark.parametrize(
        "name",
        ["vit_small_patch16_18x2_224", "vit_base_patch16_siglip_224", "resnet18"],
        ids=["other attention", "no class token", "no ViT"],
    )
    def test_unfit(self, name: str) -> None:
        options = (
            {"depth": 2, "img_size": 56, "embed_dim": 48, "num_heads": 2}
            if name != "resnet18"
            else {}
        )
        with pytest.raises(UserError):
            MCTformerNetwork(name, 3, early_block=-1, **options)

    def test_attention_blocks(self) -> None:
        network = make()
        network.set_attention(12)
        assert network.attention_blocks == 3
        with pytest.raises(UserError, match=r"method\.attention_blocks=0"):
            network.set_attention(0)


class TestNeck:
    def test_heads_see_what_it_gives(self) -> None:
        torch.manual_seed(2)
        network, plain = make(neck=UncertaintyNeck), make()
        plain.load_state_dict(network.state_dict(), strict=False)
        torch.nn.init.ones_(network.decoder.classifier.weight)  # type: ignore[union-attr,arg-type]
        images = torch.rand(2, 3, 32, 48)
        output, class_logits = network.forward_with_tokens(images)
        without, plain_logits = plain.forward_with_tokens(images)
        assert torch.equal(output.tokens, without.features)
        expected = network.neck(output.tokens)  # type: ignore[misc]
        assert torch.equal(output.features, expected.features)
        assert not torch.allclose(output.features, output.tokens)
        torch.testing.assert_close(output.cam, network.classifier(expected.features)[1])
        torch.testing.assert_close(output.class_logits, network.classifier(expected.features)[0])
        torch.testing.assert_close(output.seg_logits, network.decoder(expected.features))
        assert output.neck is not None
        assert torch.equal(output.neck.sigma, expected.sigma)
        # Class tokens and their attention are the encoder's; the refined CAM is that of the neck.
        assert torch.equal(class_logits, plain_logits)
        assert output.refined_cam is not None
        assert not torch.allclose(output.refined_cam, without.refined_cam)

    def test_refined_cam_is_made_of_it(self) -> None:
        torch.manual_seed(2)
        network = make(neck=UncertaintyNeck)
        network.set_attention(blocks=1, refine=False)
        images = torch.rand(1, 3, 32, 48)
        output = network(images)
        blocks, _ = blocks_of(network, images)
        attention = class_to_patch_attention(blocks[-1].float(), 3, 6)
        torch.testing.assert_close(
            output.refined_cam, fuse_attention_and_cam(attention, output.cam)
        )

    def test_heads(self) -> None:
        network = make(neck=UncertaintyNeck)
        heads = {id(p) for p in network.head_parameters()}
        assert {id(p) for p in network.neck.parameters()} < heads  # type: ignore[union-attr]
        for parameter in network.neck.parameters():  # type: ignore[union-attr]
            torch.nn.init.constant_(parameter, 7.0)
        network.reset_heads()
        assert not any(p.eq(7.0).any() for p in network.neck.parameters())  # type: ignore[union-attr]

    def test_without_one(self) -> None:
        output = make()(torch.rand(1, 3, 32, 32))
        assert output.tokens is output.features
        assert output.attention is None
