"""Which attention kernel the encoder takes, and that it does not change what it computes."""

from __future__ import annotations

import pytest
import torch

from wsss.nn import encoder as module


def test_attention_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU in bf16 plain products stand in for the fused kernel, on small grids alone."""
    torch.manual_seed(0)
    encoder = module.ViTEncoder("vit_tiny_patch16_224", depth=3, img_size=64).eval()
    images = torch.rand(2, 3, 64, 96)
    results = {}
    for limit in (0, 1024):
        monkeypatch.setattr(module, "_UNFUSED_TOKENS", limit)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results[limit] = encoder(images)[0].float()
        assert encoder.vit.blocks[0].attn.fused_attn is (limit == 0)
    torch.testing.assert_close(results[0], results[1024], rtol=3e-2, atol=3e-2)
    encoder(images)
    assert encoder.vit.blocks[0].attn.fused_attn is True  # fp32 keeps the fused kernel
