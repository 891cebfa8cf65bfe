"""MCTformer: what a step computes, what is trained, and that it comes back from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.commands.conftest import compose
from tests.methods.made import batch
from wsss.addons.importance_sampling import ImportanceSampling
from wsss.build import build_method, build_network, restore_method
from wsss.checkpoints import read_checkpoint, saved_config
from wsss.errors import UserError
from wsss.methods import MCTformer
from wsss.nn.mctformer import MCTformerNetwork

CLASSES = ("cat", "dog", "cow")
TINY = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 48}


def make(classes: tuple[str, ...] = CLASSES, backbone: Any = None, **kwargs: Any) -> MCTformer:
    torch.manual_seed(0)
    network = MCTformerNetwork("vit_tiny_patch16_224", len(classes), **(backbone or TINY))
    method = MCTformer(network=network, classes=classes, **kwargs)
    method._trainer = SimpleNamespace(global_step=0, max_steps=100)  # type: ignore[assignment]
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return method.train()


def test_terms() -> None:
    """Multi-label soft margin of patch tokens and of class tokens, both with weight 1."""
    method, b = make(), batch()
    terms = method.step(b).terms
    assert set(terms) == {"cls", "cls_token"}
    assert method.loss_weights() == {}
    output, tokens = method.network.forward_with_tokens(b.strong)
    expected = F.multilabel_soft_margin_loss(output.cam.mean((2, 3)), b.labels)
    torch.testing.assert_close(terms["cls"], expected)
    torch.testing.assert_close(terms["cls_token"], F.multilabel_soft_margin_loss(tokens, b.labels))
    assert not torch.allclose(terms["cls"], terms["cls_token"])


def test_addons_see_the_patch_token_cam() -> None:
    method, b = make(), batch()
    (view,) = method.step(b).views
    assert (view.cam, view.term) == ("cam", "cls")
    torch.testing.assert_close(view.scores, method.network(b.strong).cam)
    assert view.scores.requires_grad
    assert view.images is b.weak
    with pytest.raises(UserError, match=r"method=mctformer trains no early CAM"):
        make(addons={"isl": ImportanceSampling(cams=("early_cam",))})


def test_everything_that_is_trained_gets_a_gradient() -> None:
    method = make()
    sum(method.step(batch()).terms.values()).backward()  # type: ignore[union-attr]
    frozen = set()
    for name, parameter in method.network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        else:
            frozen.add(name.rsplit(".", 1)[0])
    assert {name.split(".")[0] for name in frozen} == {"decoder", "early_classifier", "encoder"}
    assert {name for name in frozen if name.startswith("encoder")} == {"encoder.vit.norm"}


@pytest.mark.parametrize(
    "labels",
    [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]],
    ids=["none", "all", "one image without"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_label_edge_cases_are_finite(labels: list[list[int]], precision: str) -> None:
    method = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = torch.stack(list(method.step(batch(labels=labels)).terms.values())).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.network.parameters())


def test_one_class() -> None:
    terms = make(("cat",)).step(batch(labels=[[1], [0]])).terms
    assert all(term.isfinite() for term in terms.values())


def test_options_reach_the_network() -> None:
    method = make(attention_blocks=2, refine=False)
    assert (method.network.attention_blocks, method.network.refine) == (2, False)
    assert method.network.classifier.pooling == "gap"
    assert make().network.attention_blocks == 3
    assert make().network.refine is True
    assert make(pooling="gmp").network.classifier.pooling == "gmp"
    with pytest.raises(UserError, match=r"method\.attention_blocks=0"):
        make(attention_blocks=0)


def test_it_learns_two_colours() -> None:
    """Both losses fall where one glance is enough."""
    method = make(("red", "green"))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    images = torch.full((4, 3, 32, 48), 0.5)
    images[:, :2, :, :16] = labels[:, :, None, None].float()
    b = replace(batch(), weak=images, strong=images, labels=labels.float())
    first = method.step(b).terms
    for _ in range(40):
        optimizer.zero_grad()
        terms = method.step(b).terms
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert all(terms[name] < 0.2 * first[name] for name in terms)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    config = compose(
        "train",
        [
            "experiment=mctformer_shapes",
            "data.root=nowhere",
            "~data.generate",
            "backbone.options.depth=3",
            "backbone.options.embed_dim=24",
            "backbone.options.num_heads=2",
            "method.attention_blocks=2",
            "method.refine=true",
        ],
    )
    torch.manual_seed(0)
    method = build_method(config, build_network(config, len(CLASSES)), CLASSES).eval()
    assert isinstance(method, MCTformer)
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    loaded = read_checkpoint(path)
    restored = restore_method(loaded, saved_config(loaded, path), path)
    images = torch.rand(1, 3, 48, 64)
    before, after = method.network(images), restored.network(images)
    assert restored.network.attention_blocks == 2
    torch.testing.assert_close(after.cam, before.cam)
    torch.testing.assert_close(after.refined_cam, before.refined_cam)


@pytest.mark.parametrize("data", ["voc", "coco"])
@pytest.mark.parametrize("addon", ["", "isl_fsl_"])
def test_published_settings(data: str, addon: str) -> None:
    config = compose("train", [f"experiment=mctformer_{addon}{data}", "data.root=nowhere"])
    epoch = {"voc": 10582, "coco": 82783}[data] // 64
    assert config.name == f"mctformer_{addon}{data}"
    assert config.data.batch_size == 64
    assert config.trainer.max_steps == 60 * epoch
    assert config.method.warmup_steps == 5 * epoch
    assert config.method.lr == pytest.approx(5e-4 * 64 / 512)
    assert config.method.lr * config.method.warmup_ratio == pytest.approx(1e-6)
    assert config.method.pooling == "gap"
    assert config.backbone.name.startswith("deit_small_patch16_224")
    assert sorted(config.addon or {}) == (["fsl", "isl"] if addon else [])
