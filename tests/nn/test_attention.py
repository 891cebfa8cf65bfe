"""Attention: which kernel the encoder takes, and what is kept of chosen blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import Tensor

from tests.oracle.vit_attention import attention as attention_by_hand
from wsss.errors import UserError
from wsss.nn import WSSSNetwork
from wsss.nn import attention as attention_module
from wsss.nn import encoder as module
from wsss.nn.attention import keep_attention, mean_attention, observe_attention
from wsss.nn.mctformer import MCTformerNetwork

TINY: dict[str, Any] = {"embed_dim": 24, "num_heads": 2}


def make(name: str = "vit_tiny_patch16_224", depth: int = 3) -> WSSSNetwork:
    """With queries large enough that attention is not all alike."""
    torch.manual_seed(0)
    network = WSSSNetwork(name, 3, early_block=-1, depth=depth, **TINY)
    for block in network.encoder.vit.blocks:  # type: ignore[union-attr]
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
        torch.nn.init.normal_(block.attn.qkv.bias, std=0.4)
    return network


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch16_dinov3", {**TINY, "init_values": 0.5}),
        ("eva02_base_patch14_224", TINY),
        ("vit_small_patch16_rope_224", {**TINY, "init_values": 0.5}),
    ],
)
def test_attention_kernels_agree(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU in bf16 plain products stand in for the fused kernel, on small grids alone."""
    torch.manual_seed(0)
    encoder = module.ViTEncoder(name, depth=3, img_size=64, **options).eval()
    images = torch.rand(2, 3, 64, 96)
    results = {}
    for limit in (0, 1024):
        monkeypatch.setattr(module, "_UNFUSED_TOKENS", limit)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results[limit] = encoder(images)[0].float()
        assert all(block.attn.fused_attn is (limit == 0) for block in encoder.vit.blocks)
    torch.testing.assert_close(results[0], results[1024], rtol=3e-2, atol=3e-2)
    encoder(images)
    assert encoder.vit.blocks[0].attn.fused_attn is True  # fp32 keeps the fused kernel


class TestKeptAttention:
    """Attention of chosen blocks, as a pass goes by."""

    @staticmethod
    def by_hand(block: Any, x: Tensor) -> Tensor:
        """Softmax attention of a pre-norm block of its input (B, T, D), mean over heads."""
        attn = block.attn
        heads, weight, bias = attn.num_heads, attn.qkv.weight, attn.qkv.bias
        y = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
        dim = x.shape[-1]
        query = y @ weight[:dim].T + bias[:dim]
        key = y @ weight[dim : 2 * dim].T + bias[dim : 2 * dim]
        width, total = dim // heads, torch.zeros(())
        for h in range(heads):
            q, k = (z[..., h * width : (h + 1) * width] for z in (query, key))
            logits = torch.einsum("btd,bsd->bts", q, k) / width**0.5
            total = total + logits.exp() / logits.exp().sum(-1, keepdim=True)
        return total / heads

    @pytest.mark.parametrize("blocks", [(2,), (0, 1)])
    def test_is_that_of_the_blocks(self, blocks: tuple[int, ...]) -> None:
        encoder = make(depth=3).encoder
        inputs: dict[int, Tensor] = {}
        for n, block in enumerate(encoder.vit.blocks):
            block.register_forward_pre_hook(lambda m, i, n=n: inputs.__setitem__(n, i[0]))
        images = torch.rand(2, 3, 32, 48)
        plain = encoder(images)
        with keep_attention(encoder, blocks) as kept:
            passed = encoder(images)
        for one, other in zip(plain, passed, strict=True):
            assert torch.equal(one, other)  # what it computes stays
        assert len(kept) == len(blocks)
        for attention, n in zip(kept, blocks, strict=True):
            assert attention.shape == (2, 7, 7)
            expected = self.by_hand(encoder.vit.blocks[n], inputs[n])
            torch.testing.assert_close(attention, expected)
            assert attention.std() > 0.01  # not all alike

    def test_gradient_reaches_queries_and_keys_alone(self) -> None:
        encoder = make(depth=2).encoder
        with keep_attention(encoder, (1,)) as kept:
            encoder(torch.rand(1, 3, 32, 48))
        kept[0].square().sum().backward()
        gradient = encoder.vit.blocks[1].attn.qkv.weight.grad
        query, key, value = gradient.chunk(3)
        assert query.any()
        assert key.any()
        assert not value.any()
        assert encoder.vit.blocks[0].attn.qkv.weight.grad.chunk(3)[2].any()  # through the tokens
        assert encoder.vit.blocks[1].mlp.fc1.weight.grad is None

    def test_hooks_are_gone_afterwards(self) -> None:
        encoder = make(depth=2).encoder
        with keep_attention(encoder, (0, 1)) as kept:
            encoder(torch.rand(1, 3, 16, 16))
        encoder(torch.rand(1, 3, 16, 16))
        assert len(kept) == 2
        with (
            pytest.raises(RuntimeError, match="stop"),
            keep_attention(encoder, (0, 1)),
        ):
            raise RuntimeError("stop")
        assert not any(module._forward_hooks for module in encoder.modules())

    def test_no_blocks_need_no_vit(self) -> None:
        with keep_attention(torch.nn.Identity(), ()) as kept:
            pass
        assert kept == []

    @pytest.mark.parametrize("blocks", [[-1], [0, 2], [2, 0, -1]])
    def test_output_has_the_mean_over_blocks_of_the_patches(self, blocks: list[int]) -> None:
        network = make(depth=3).train()
        images = torch.rand(2, 3, 32, 48)
        assert network(images).attention is None  # nobody wants it
        network.want_attention(blocks)
        numbers = sorted({b % 3 for b in blocks})
        assert network.wanted_attention == tuple(numbers)
        with keep_attention(network.encoder, numbers) as kept:
            network.encoder(images)
        output = network(images, decode=False)
        assert output.attention is not None
        assert output.attention.shape == (2, 6, 6)
        expected = sum(a[:, 1:, 1:] for a in kept) / len(numbers)
        torch.testing.assert_close(output.attention, expected)
        assert output.attention.requires_grad

    def test_register_and_distillation_tokens_are_left_out(self) -> None:
        """Of all tokens the patches come last."""
        network = make("deit_tiny_distilled_patch16_224", depth=2).train()
        network.want_attention([1])
        images = torch.rand(1, 3, 32, 48)
        with keep_attention(network.encoder, (1,)) as kept:
            network.encoder(images)
        assert kept[0].shape == (1, 8, 8)
        torch.testing.assert_close(network(images).attention, kept[0][:, 2:, 2:])

    def test_nothing_is_kept_in_evaluation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = make(depth=2)
        network.want_attention([-1])

        def refuse(*arguments: Any) -> Tensor:
            raise AssertionError("computed")

        monkeypatch.setattr(attention_module, "mean_attention", refuse)
        assert network.eval()(torch.rand(1, 3, 16, 32)).attention is None
        assert network.wanted_attention == ()
        with pytest.raises(AssertionError, match="computed"):
            network.train()(torch.rand(1, 3, 16, 32))

    def test_in_float32_under_autocast(self) -> None:
        network = make(depth=2).train()
        network.want_attention([-1])
        images = torch.rand(1, 3, 32, 48)
        expected = network(images).attention
        with torch.autocast("cpu", torch.bfloat16):
            found = network(images).attention
        assert found is not None
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
        assert (found.sum(-1) < 1).all()  # the class token has the rest

    def test_a_copy_wants_the_same(self) -> None:
        network = make(depth=2).train()
        network.want_attention([0])
        assert copy.deepcopy(network).wanted_attention == (0,)

    def test_mctformers_network_leaves_its_class_tokens_out(self) -> None:
        torch.manual_seed(0)
        network = MCTformerNetwork("vit_tiny_patch16_224", 4, early_block=-1, depth=2, **TINY)
        network.train()
        network.want_attention([-1])
        images = torch.rand(1, 3, 32, 48)
        with keep_attention(network.encoder, (1,)) as kept:
            network.encoder(images)
        assert kept[0].shape == (1, 10, 10)
        torch.testing.assert_close(network(images).attention, kept[0][:, 4:, 4:])
        assert network.eval()(images).attention is None


class TestLayers:
    """Queries and keys of single layers of each kind, by loops."""

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (Attention, {"qkv_bias": True, "qk_norm": True}),
            (EvaAttention, {}),
            (EvaAttention, {"qkv_bias": False, "rotate_half": True}),
            (EvaAttention, {"qkv_bias_separate": True}),
            (EvaAttention, {"qkv_fused": False, "qk_norm": True}),
            (EvaAttention, {"attn_head_dim": 4, "num_prefix_tokens": 2}),
            (AttentionRope, {"qk_norm": True, "num_prefix_tokens": 0}),
            (AttentionRope, {"qkv_fused": False, "rotate_half": True}),
            (AttentionRope, {"qkv_fused": False, "num_kv_heads": 2}),
        ],
    )
    @pytest.mark.parametrize("turned", ["not", "alike", "by head"])
    def test_are_the_layers_own(self, kind: Any, options: dict[str, Any], turned: str) -> None:
        if turned != "not" and kind is Attention:
            pytest.skip("has no rotary embedding")
        if turned == "by head" and "num_kv_heads" in options:
            pytest.skip("keys that heads share cannot be turned by head")
        torch.manual_seed(0)
        options = {"norm_layer": torch.nn.LayerNorm, "scale_norm": False, **options}
        try:
            layer = kind(16, num_heads=4, **options)
        except (TypeError, AttributeError):
            pytest.skip("an older timm without this option")
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
        x, prefix = torch.randn(2, 6, 16), getattr(layer, "num_prefix_tokens", 0)
        angles = torch.rand(*((4,) if turned == "by head" else ()), 6 - prefix, 4)
        rope = torch.cat([angles.sin(), angles.cos()], dim=-1)
        given = {} if turned == "not" else {"rope": rope}
        seen: list[Tensor] = []
        handles = observe_attention(layer, lambda *args: seen.append(mean_attention(*args)))
        before = layer(x, **given)
        expected = attention_by_hand(layer, x, given.get("rope"), prefix)
        torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
        (seen[0].square().sum() + before.square().sum()).backward()
        for handle in handles:
            handle.remove()
        assert torch.equal(layer(x, **given), before)
        assert len(seen) == 1


class TestWishes:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("resnet10t", {"channels": [8, 8, 16, 16], "early_block": -2}),
            ("vit_small_patch16_18x2_224", {**TINY, "depth": 2, "early_block": -1}),
        ],
    )
    def test_no_plain_vit(self, name: str, options: dict[str, Any]) -> None:
        network = WSSSNetwork(name, 3, **options)
        for blocks in ([-1], None):
            with pytest.raises(UserError, match=rf"backbone\.name='{name}'.*plain ViT"):
                network.want_attention(blocks)
        assert network.train().wanted_attention == ()

    @pytest.mark.parametrize("blocks", [[3], [-4], [0, 7], [], "last"])
    def test_blocks_that_are_not_there(self, blocks: Any) -> None:
        with pytest.raises(UserError, match=r"from -3 to 2 in a list, or 'all'"):
            make(depth=3).want_attention(blocks)

    def test_all(self) -> None:
        network = make(depth=3).train()
        network.want_attention("all")
        network.want_attention([2, 1, 0])
        assert network.wanted_attention == (0, 1, 2)
        with pytest.raises(UserError, match=r"\[0, 1, 2\] and of \[1\]"):
            network.want_attention([1])

    def test_any_goes_with_all(self) -> None:
        """All blocks unless somebody names some, before or after."""
        network = make(depth=3).train()
        network.want_attention()
        assert network.wanted_attention == (0, 1, 2)
        network.want_attention([0, 1])
        network.want_attention()
        assert network.wanted_attention == (0, 1)
        with pytest.raises(UserError, match=r"\[0, 1\] and of \[2\]"):
            network.want_attention([-1])

    def test_two_of_a_kind_and_two_different(self) -> None:
        network = make(depth=3).train()
        network.want_attention([-1])
        network.want_attention([2])  # the same
        with pytest.raises(UserError, match=r"\[2\] and of \[1\].*addon\.affinity\.blocks"):
            network.want_attention([1])
        assert network.wanted_attention == (2,)
