"""The authors' file into ours, as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import compose
from tests.nn.test_network import release_state
from wsss.checkpoints import read_checkpoint, saved_config
from wsss.data.voc import VOC_CLASSES
from wsss.errors import UserError
from wsss.import_checkpoint import import_checkpoint
from wsss.inference import Inference
from wsss.nn import WSSSNetwork
from wsss.nn.encoder import COLOURS

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2}
OPTIONS = [
    "backbone.name=vit_tiny_patch16_224",
    *(f"+backbone.options.{name}={value}" for name, value in SMALL.items()),
]


def authors_file(path: Path, classes: int = 20, size: int = 64, wrap: str = "", **more: Any) -> Any:
    """A file as their code writes one, with random weights."""
    torch.manual_seed(0)
    network = WSSSNetwork("vit_tiny_patch16_224", classes, img_size=size, **SMALL)
    state = release_state(network)
    for name, value in state.items():
        if not name.startswith("encoder.head"):
            state[name] = torch.randn_like(value) * 0.05
    torch.save({wrap: state, **more} if wrap else state, path)
    return state


def run(path: Path, *overrides: str) -> Path:
    return import_checkpoint(compose("import_checkpoint", [f"file={path}", *OPTIONS, *overrides]))


@pytest.mark.parametrize("size", [64, 224])
def test_weights_arrive_in_both_networks(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = authors_file(tmp_path / "cosa.pth", size=size)
    target = run(tmp_path / "cosa.pth")
    assert target == tmp_path / "cosa.ckpt"
    for name in ("an", "on"):
        inference = Inference.load(target, name, device="cpu", precision="32-true")
        assert inference.classes == VOC_CLASSES
        own = inference.network.state_dict()
        assert torch.equal(own["encoder.vit.pos_embed"], state["encoder.pos_embed"])
        assert torch.equal(own["decoder.conv2.weight"], state["decoder.conv7.weight"])
        assert torch.equal(
            own["early_classifier.weight"], state["aux_classifier.weight"][..., 0, 0]
        )
    out = inference(torch.rand(1, 3, 64, 64))
    assert out.seg_logits is not None
    assert out.seg_logits.shape == (1, 21, 64, 64)
    said = capsys.readouterr().out
    assert "an/seg_given_tags/miou_ms_flip" in said
    assert "76.2" in said


def test_the_configuration_is_the_release_recipe_and_knows_no_data_folder(tmp_path: Path) -> None:
    authors_file(tmp_path / "cosa.pth")
    target = run(tmp_path / "cosa.pth")
    config = saved_config(read_checkpoint(target), target)
    assert config.method.fuse == "sum"
    assert list(config.method.threshold) == [0.2, 0.7]
    assert config.name == "cosa_voc_release"
    assert "root" not in config.data or str(config.data._get_node("root")) == "???"


def test_a_state_dict_inside(tmp_path: Path) -> None:
    state = authors_file(tmp_path / "a.pth", wrap="model", step=7)
    found = Inference.load(run(tmp_path / "a.pth"), device="cpu").network.classifier.weight
    assert torch.equal(found, state["classifier.weight"][..., 0, 0])


def test_several_state_dicts(tmp_path: Path) -> None:
    other = {"encoder.x": torch.zeros(1)}
    authors_file(tmp_path / "a.pth", wrap="teacher", student=other)
    with pytest.raises(
        UserError, match=r"several state dicts: choose one with key=teacher, key=st"
    ):
        run(tmp_path / "a.pth")
    with pytest.raises(UserError, match="no state dict 'master'"):
        run(tmp_path / "a.pth", "key=master")
    run(tmp_path / "a.pth", "key=teacher")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("evil").touch, ()


def test_code_is_refused_with_an_explanation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Evil()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"pickled code are refused.*save the state dict alone"):
        run(tmp_path / "a.pth")
    assert not (tmp_path / "evil").exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    authors_file(tmp_path / "a.pth")
    (tmp_path / "a.ckpt").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        run(tmp_path / "a.pth")
    assert (tmp_path / "a.ckpt").read_text() == "mine"
    run(tmp_path / "a.pth", "overwrite=true")
    read_checkpoint(tmp_path / "a.ckpt")


def test_class_names(tmp_path: Path) -> None:
    authors_file(tmp_path / "a.pth", classes=3)
    with pytest.raises(UserError, match=r"3 classes: name them"):
        run(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"3 classes, but 2 are named"):
        run(tmp_path / "a.pth", "classes=[cat,dog]")
    target = run(tmp_path / "a.pth", "classes=[cat,dog,hen]")
    assert Inference.load(target, device="cpu").classes == ("cat", "dog", "hen")


def test_strict(tmp_path: Path) -> None:
    state = authors_file(tmp_path / "a.pth")
    del state["decoder.conv7.weight"]
    state["decoder.conv9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"missing: decoder\.conv2\.weight.*decoder\.conv9\.weight"):
        run(tmp_path / "a.pth")
    assert not (tmp_path / "a.ckpt").exists()
    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="aux_classifier"):
        run(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source=cosa_realease"], "Did you mean 'cosa_release'"),
        (["file=nowhere.pth"], "No weights file at 'nowhere.pth'"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_checkpoint(compose("import_checkpoint", ["file=a.pth", *overrides]))


def test_images_have_the_colours_that_the_authors_trained_with(tmp_path: Path) -> None:
    cfg = compose("import_checkpoint", ["file=x"])
    released = compose("train", ["experiment=cosa_voc_release", "data.root=x"])
    assert cfg.backbone.name == released.backbone.name == next(iter(COLOURS))


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    authors_file(tmp_path / "cosa.pth")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output='.*file/x' cannot be written"):
        run(tmp_path / "cosa.pth", f"output={tmp_path}/file/x/a.ckpt")
