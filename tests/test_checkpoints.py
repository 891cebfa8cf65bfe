"""What a checkpoint may be, and what it may not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import TINY, compose
from wsss.build import build_method, build_network, plain_config, restore_method
from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_config
from wsss.errors import UserError
from wsss.inference import Inference, find_device
from wsss.methods.base import CHECKPOINT_FORMAT

CLASSES = ("cat", "dog", "hen")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained method's checkpoint, as training writes it."""
    config = compose("train", [*TINY, "data.root=nowhere"])
    torch.manual_seed(0)
    method = build_method(config, build_network(config, len(CLASSES)), CLASSES)
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save(content, path)
    return path


def _changed(path: Path, tmp_path: Path, **about: Any) -> Path:
    content = torch.load(path, weights_only=True)
    content["wsss"] |= about
    torch.save(content, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def test_a_folder_stands_for_its_best_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent, run / "checkpoints")
    assert find_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    shutil.copy(checkpoint, run / "checkpoints" / "best.ckpt")
    assert find_checkpoint(run) == run / "checkpoints" / "best.ckpt"
    assert find_checkpoint(run / "checkpoints") == run / "checkpoints" / "best.ckpt"
    assert find_checkpoint(str(checkpoint)) == checkpoint


def test_a_missing_file_names_its_neighbours(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file\. There are: last\.ckpt"):
        find_checkpoint(checkpoint.with_name("beste.ckpt"))
    with pytest.raises(UserError, match="folder without checkpoints"):
        find_checkpoint(tmp_path)


def test_half_written(checkpoint: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.ckpt"
    half.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    with pytest.raises(UserError, match="cut off"):
        read_checkpoint(half)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("evil").touch, ()


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not Path("evil").exists()


def test_a_newer_format(checkpoint: Path, tmp_path: Path) -> None:
    newer = _changed(checkpoint, tmp_path, format=CHECKPOINT_FORMAT + 1, version="9.1")
    with pytest.raises(UserError, match=r"wsss 9\.1 in format 2; this version reads up to 1"):
        read_checkpoint(newer)


def test_no_configuration(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    content = read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds no configuration"):
        saved_config(content, "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_another_backbone(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    config = saved_config(content, checkpoint)
    config.backbone.options.embed_dim = 48
    with pytest.raises(UserError, match="does not fit the configuration"):
        restore_method(content, config, checkpoint)


def test_restored_weights(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    method = restore_method(content, saved_config(content, checkpoint), checkpoint)
    assert method.classes == CLASSES
    assert not method.training
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value, content["state_dict"][name], equal_nan=True)


def test_inference(checkpoint: Path) -> None:
    inference = Inference.load(checkpoint, device="cpu")
    assert (inference.network_name, inference.size) == ("an", 64)
    images = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8)
    out = inference(images)
    assert out.seg_logits is not None
    assert out.seg_logits.shape == (2, 4, 32, 40)
    assert out.cam.shape == (2, 3, 32, 40)
    torch.testing.assert_close(inference(images / 255).cam, out.cam)
    assert inference(images, segmentation=False).seg_logits is None
    without = inference(images, cam=False)
    assert without.cam.shape[1] == 0
    torch.testing.assert_close(without.seg_logits, out.seg_logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "of"}, "network='of': this method has an, on"),
        ({"precision": "8"}, "precision='8': choose one of"),
        ({"device": "abacus"}, "device='abacus' is not on this machine"),
        ({"device": "cuda:77"}, "device='cuda:77' is not on this machine"),
    ],
)
def test_inference_options(checkpoint: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Inference.load(checkpoint, **{"device": "cpu", **options})


def test_the_device_of_auto() -> None:
    assert find_device("auto").type in ("cpu", "cuda", "mps", "xpu")


def _with_encoder_of(run: Path | str, *more: str, classes: int = 2) -> Any:
    config = compose("train", [*TINY, "data.root=nowhere", f"backbone.weights={run}", *more])
    return build_network(config, classes)


def test_encoder_of_a_run(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the network to deploy; other classes, another method: the heads are new."""
    content = torch.load(checkpoint, weights_only=True)
    state = content["state_dict"]
    for name in state:
        if name.startswith("assignment.encoder."):
            state[name] = state[name] + 1
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(content, run / "checkpoints" / "last.ckpt")
    with caplog.at_level("INFO"):
        networks = [
            _with_encoder_of(run),
            _with_encoder_of(run / "checkpoints" / "last.ckpt", "neck=uncertainty"),
        ]
    assert f"{run / 'checkpoints' / 'last.ckpt'} (an)" in caplog.text
    for network in networks:
        assert network.classifier.weight.shape == (2, 24)
        for name, value in network.encoder.state_dict().items():
            torch.testing.assert_close(value, state[f"assignment.encoder.{name}"])
    mctformer = _with_encoder_of(run, "method._target_=wsss.methods.MCTformer")
    expected = state["assignment.encoder.vit.cls_token"].expand(1, 2, 24)  # a class token each
    torch.testing.assert_close(mctformer.encoder.vit.cls_token.data, expected)


def test_encoder_of_a_run_at_another_size(checkpoint: Path) -> None:
    whole = _with_encoder_of(checkpoint).encoder
    network = _with_encoder_of(checkpoint, "backbone.options.img_size=96")
    positions = network.encoder.vit.pos_embed
    assert positions.shape[1] > whole.vit.pos_embed.shape[1]
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():  # both resample to the image's grid, with the same filter
        torch.testing.assert_close(
            network.encoder.eval()(images)[0], whole.eval()(images)[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["backbone.name=vit_tiny_patch16_384"], r"backbone\.name=.*; here it is vit_tiny"),
        (["backbone.options.depth=3"], r"options\.depth=2; here it is 3"),
        # What no shape of a tensor shows.
        (["backbone.options.num_heads=4"], r"options\.num_heads=2; here it is 4"),
        (["~backbone.options.num_heads"], r"options\.num_heads=2; here it is not set"),
        (["+backbone.options.qk_norm=true"], r"options\.qk_norm=not set; here it is True"),
    ],
)
def test_encoder_of_another_network(checkpoint: Path, more: list[str], says: str) -> None:
    with pytest.raises(UserError, match=rf"backbone\.weights='{checkpoint}' .*{says}"):
        _with_encoder_of(checkpoint, *more)


def test_weights_that_are_no_run(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.weights='.*' is a folder without checkpoints"):
        _with_encoder_of(tmp_path)
    with pytest.raises(UserError, match=r"backbone\.weights='.*'.*no such file.* There is.*: last"):
        _with_encoder_of(checkpoint.with_name("lust.ckpt"))
    for missing in (tmp_path / "no" / "run", "''"):
        with pytest.raises(UserError, match=r"backbone\.weights='.*': no such file, nor a run"):
            _with_encoder_of(missing)
    # A checkpoint of another program is a weights file, if its tensors are the backbone's.
    vit = _with_encoder_of(checkpoint).encoder.vit
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "other.ckpt")
    other = _with_encoder_of(tmp_path / "other.ckpt").encoder.vit
    torch.testing.assert_close(other.state_dict(), vit.state_dict())
    folder = tmp_path / "theirs"
    folder.mkdir()
    (tmp_path / "other.ckpt").rename(folder / "best.ckpt")
    other = _with_encoder_of(folder).encoder.vit
    torch.testing.assert_close(other.state_dict(), vit.state_dict())


def test_weights_in_the_users_home(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    vit = _with_encoder_of(checkpoint).encoder.vit
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    shutil.copy(checkpoint, tmp_path / "run.ckpt")
    for name in ("vit.pth", "run.ckpt"):
        found = _with_encoder_of(f"'~/{name}'").encoder.vit
        torch.testing.assert_close(found.state_dict(), vit.state_dict())


def test_where_the_weights_were_is_kept(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    config = compose("train", [*TINY, "data.root=nowhere", "backbone.weights=last.ckpt"])
    assert plain_config(config)["backbone"]["weights"] == str(checkpoint)


@pytest.mark.parametrize("classes", [1, 3])
def test_encoder_of_mctformer(classes: int, tmp_path: Path) -> None:
    """Its class tokens, which began as one, are one again; any method can start from it."""
    target = "method._target_=wsss.methods.MCTformer"
    start = compose("train", [*TINY, "data.root=nowhere"])
    config = compose("train", ["experiment=mctformer_shapes", "data.root=nowhere"])
    config.backbone = start.backbone
    names = CLASSES[:classes]
    method = build_method(config, build_network(config, classes), names)
    vit: Any = method.network.encoder.vit
    vit.cls_token.data += torch.rand_like(vit.cls_token)
    vit.pos_embed.data += torch.rand_like(vit.pos_embed)
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")

    plain = _with_encoder_of(tmp_path / "last.ckpt").encoder.vit
    torch.testing.assert_close(plain.cls_token[0, 0], vit.cls_token[0].mean(0))
    torch.testing.assert_close(plain.pos_embed[0, 0], vit.pos_embed[0, :classes].mean(0))
    torch.testing.assert_close(plain.pos_embed[0, 1:], vit.pos_embed[0, classes:])
    torch.testing.assert_close(plain.blocks.state_dict(), vit.blocks.state_dict())
    again = _with_encoder_of(tmp_path / "last.ckpt", target, classes=classes).encoder.vit
    torch.testing.assert_close(again.cls_token[0, 0], vit.cls_token[0].mean(0))
