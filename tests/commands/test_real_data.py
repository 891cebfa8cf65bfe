"""The VOC path on real images and real pretrained weights; skips where they are not."""

from __future__ import annotations

from pathlib import Path

from tests.commands.conftest import compose
from wsss.train import train


def test_cosa_on_real_images(shared_dir: Path, tmp_path: Path) -> None:
    overrides = [
        "experiment=cosa_voc_mini",
        f"data.root={shared_dir / 'data/voc_mini/VOC2012'}",
        f"backbone.weights={shared_dir / 'data/weights/vit_tiny_patch16_224.safetensors'}",
        "data.num_workers=0",
        "data.max_val_images=2",
        "view.crop_size=96",
        "data.eval_size=96",
        "method.eval_scales=[1.0]",
        "method.cam_scales=[1.0]",
        "method.loss_warmup_steps=2",
        "trainer.max_steps=4",
        "trainer.threads=1",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "pictures=1",
    ]
    scores = train(compose("train", overrides), tmp_path)
    assert 0 <= scores["an/seg/miou_ms_flip"] <= 1
    assert (tmp_path / "pictures" / "step_000004.png").is_file()


def test_cosa_voc_runs_on_the_mini_tree(shared_dir: Path, tmp_path: Path) -> None:
    """The paper's experiment, its network replaced by a small one and its steps by three."""
    overrides = [
        "experiment=cosa_voc",
        f"data.root={shared_dir / 'data/voc_mini/VOC2012'}",
        "backbone=vit_tiny",
        "backbone.pretrained=false",
        "+backbone.options.depth=3",
        "data.num_workers=0",
        "view.crop_size=64",
        "method.loss_warmup_steps=1",
        "trainer.max_steps=3",
        "trainer.threads=1",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "logger=csv",
        "evaluate=false",
        "pictures=0",
    ]
    train(compose("train", overrides), tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
