"""Masks of images without labels, through the command."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

import wsss.predict
from tests.commands.conftest import TINY, Run, compose
from wsss import __version__
from wsss.build import build_data, build_method, build_network
from wsss.data.batch import to_unit_range
from wsss.data.views import resize_image
from wsss.errors import UserError
from wsss.inference import Inference
from wsss.metrics import SegmentationScores
from wsss.metrics.protocols import ProtocolScores
from wsss.predict import Predictions, as_text, check_settings, predict
from wsss.prediction import outputs, segmenter
from wsss.prediction.inputs import Reader
from wsss.prediction.native import label_map, windows

Call = Callable[..., Predictions]


def write_checkpoint(path: Path, overrides: list[str]) -> tuple[Any, Any]:
    """An untrained method whose predictions vary; with its data."""
    config = compose("train", [*TINY, "data.eval_size=48", "data.eval_batch_size=1", *overrides])
    data = build_data(config)
    data.setup("validate")
    torch.manual_seed(0)
    method = build_method(config, build_network(config, data.num_classes), data.classes)
    for network in method.networks().values():
        last = [p for p in network.decoder.parameters() if p.dim() > 1][-1]
        torch.nn.init.normal_(last, std=2.0)
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    return method.eval(), data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> tuple[Path, Any, Any]:
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "best.ckpt"
    return (path, *write_checkpoint(path, [f"data.root={shapes_root}"]))


@pytest.fixture
def checkpoint(trained: tuple[Path, Any, Any]) -> Path:
    return trained[0]


@pytest.fixture
def photos(tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four images of different sizes in two folders; the test runs beside them."""
    monkeypatch.chdir(tmp_path)
    images = sorted((shapes_root / "JPEGImages").iterdir())
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for image, name, size in zip(
        images, ("a.png", "b.png", "sub/a.png", "sub/c.png"), (64, 80, 40, 48), strict=False
    ):
        Image.open(image).resize((size, 56)).save(folder / name)
    return folder


@pytest.fixture
def call(checkpoint: Path, photos: Path) -> Call:
    def call(*overrides: str) -> Predictions:
        defaults = {"input": photos, "checkpoint": checkpoint, "device": "cpu", "workers": 1}
        given = {o.split("=")[0] for o in overrides}
        settings = [f"{k}={v}" for k, v in defaults.items() if k not in given]
        return predict(compose("predict", [*settings, *overrides]))

    return call


def read(path: Path | str) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


def masks(folder: str | Path = "predictions") -> dict[str, NDArray[np.uint8]]:
    paths = sorted(Path(folder).rglob("*.png"))
    return {str(path.relative_to(folder)): read(path) for path in paths}


def about(name: str, folder: str = "predictions") -> dict[str, Any]:
    return dict(json.loads((Path(folder) / f"{name}.json").read_text()))


# --- what is predicted -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:classes without a pixel")
def test_what_evaluation_scores(
    trained: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, method, data = trained
    name = method.network_names[0]
    network = method.networks()[name]
    folder = tmp_path / "val"
    folder.mkdir()
    scores = ProtocolScores(method.classes, method.eval_scales, method.cam_scales, cam=False)
    labels = len(method.classes) + 1
    own = SegmentationScores(labels)
    expected = {}
    for batch in data.val_dataloader():
        batch.images = to_unit_range(batch.images)
        scores.update(network, batch)
        shutil.copy(Path(data.root) / "JPEGImages" / f"{batch.names[0]}.jpg", folder)
        logits = wsss.inference.multi_scale(network, batch.images, method.eval_scales).seg_logits
        assert logits is not None
        resized = F.interpolate(logits, batch.masks[0].shape, mode="bilinear", align_corners=False)
        expected[batch.names[0]] = (resized.argmax(1)[0].numpy(), batch.masks[0])
    predict(compose("predict", [f"input={folder}", f"checkpoint={path}", "device=cpu"]))
    found = masks()
    assert len(found) == len(expected) == 6
    for name, (mask, truth) in expected.items():
        assert np.array_equal(found[f"{name}.png"], mask)
        own.update(torch.from_numpy(mask).long()[None], truth[None])
    assert len(np.unique(np.stack(list(found.values())))) > 3  # else it says little
    torch.testing.assert_close(
        own.compute()["iou"], scores.compute()["seg/miou_ms_flip"]["iou"], equal_nan=True
    )


def test_the_files(call: Call, photos: Path, checkpoint: Path) -> None:
    done = call()
    assert (done.predicted, done.kept, done.others, done.problems) == (4, 0, [], [])
    assert done.complete
    found = masks()
    shapes = {name: mask.shape for name, mask in found.items()}
    assert shapes == {
        "a.png": (56, 64),
        "b.png": (56, 80),
        "sub/a.png": (56, 40),
        "sub/c.png": (56, 48),
    }
    inference = Inference.load(checkpoint)
    shares: dict[str, list[float]] = {}
    for name, mask in found.items():
        content = about(name[:-4])
        assert content["file"] == str(photos / name)
        assert (content["height"], content["width"]) == mask.shape
        assert content["wsss"] == __version__
        assert content["checkpoint"] == str(checkpoint)
        settings = content["settings"]
        assert len(settings.pop("checkpoint_sha256")) == 64
        assert settings == {
            "network": "an",
            "precision": "32-true",
            "scales": [1.0, 0.5],
            "size": 48,
            "window": None,
            "window_overlap": None,
            "crf": None,
            "exif": True,
        }
        assert [c["index"] for c in content["classes"]] == np.unique(mask).tolist()
        for entry in content["classes"]:
            expected = ("background", *inference.classes)[entry["index"]]
            assert entry["name"] == expected
            assert entry["area"] == (mask == entry["index"]).sum()
            assert entry["share"] == pytest.approx(entry["area"] / mask.size, abs=1e-6)
            assert 1 / len(inference.classes) / 2 < entry["confidence"] <= 1
            if entry["index"]:
                shares.setdefault(expected, []).append(entry["share"])
        assert read(f"predictions/{name[:-4]}_overlay.jpg").shape[1] == 240
    assert done.shares == shares
    assert len([p for p in Path("predictions").rglob("*") if p.is_file()]) == 12


def test_batches_and_threads_change_nothing(call: Call) -> None:
    call("output_dir=one")
    call("output_dir=many", "batch_size=3", "workers=3")
    for one, many in zip(masks("one").values(), masks("many").values(), strict=True):
        assert (one != many).mean() < 1e-3  # batched products may round otherwise
    assert masks("one").keys() == masks("many").keys()
    for name in ("a", "sub/c"):
        assert about(name, "one")["file"] == about(name, "many")["file"]


def test_options_reach_the_network(call: Call) -> None:
    call()
    options = {
        "scales=1.0": [1.0],
        "scales=[0.5]": [0.5],
        "size=64": 64,
        "network=on": "on",
        "precision=bf16-mixed": "bf16-mixed",
    }
    for i, (option, value) in enumerate(options.items()):
        assert call(option, f"output_dir=out{i}").predicted == 4
        assert about("a", f"out{i}")["settings"][option.split("=")[0]] == value
        different = [not np.array_equal(x, masks()[k]) for k, x in masks(f"out{i}").items()]
        assert any(different), option


def test_exif(call: Call, photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(photos / "b.png")
    image.save("turned.png", exif=exif)
    call("input=turned.png")
    call("input=turned.png", "exif=false", "output_dir=stored")
    assert masks()["turned.png"].shape == (80, 56)
    call(f"input={photos}/b.png", "output_dir=plain")
    assert np.array_equal(masks("stored")["turned.png"], masks("plain")["b.png"])


def test_overlays_are_small(call: Call) -> None:
    Image.effect_noise((900, 300), 50).save("large.png")
    call("input=large.png", "overlay_size=300")
    assert read("predictions/large_overlay.jpg").shape[1] == 300
    assert 100 < read("predictions/large_overlay.jpg").shape[0] < 250
    assert masks()["large.png"].shape == (300, 900)


# --- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows(call: Call, photos: Path, checkpoint: Path, batch_size: int) -> None:
    call("window=32", "window_overlap=0.5", f"batch_size={batch_size}")
    inference = Inference.load(checkpoint)
    for name, mask in masks().items():
        image = read(photos / name)
        rows = windows(*image.shape[:2], 32, 0.5)
        assert len(rows) * len(rows[0]) > 3
        values = []
        for row in rows:
            squares = [
                resize_image(image[w.top : w.top + w.height, w.left : w.left + w.width], 48, 48)
                for w in row
            ]
            batches = [torch.from_numpy(s).permute(2, 0, 1)[None].contiguous() for s in squares]
            logits = [inference(batch, cam=False).seg_logits for batch in batches]
            values.append([x[0] for x in logits if x is not None])
        expected = label_map(*image.shape[:2], rows, values).mask
        assert (mask != expected).mean() < (1e-3 if batch_size > 1 else 1e-9)
    settings = about("a")["settings"]
    assert (settings["window"], settings["window_overlap"]) == (32, 0.5)


def test_a_window_as_large_as_the_image(call: Call) -> None:
    call("output_dir=whole")
    call("window=80", "output_dir=window")
    for whole, window in zip(masks("whole").values(), masks("window").values(), strict=True):
        assert np.array_equal(whole, window)


# --- CRF ---------------------------------------------------------------------------------------


@pytest.fixture
def crf(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of the CRF: the next label takes over. Collects what it was given."""
    calls: list[Any] = []

    def rolled(image: Any, probabilities: Any, preset: Any) -> Any:
        calls.append((image, probabilities, preset))
        if isinstance(probabilities, torch.Tensor):
            return probabilities.roll(1, 0)
        return probabilities

    monkeypatch.setattr("wsss.pseudo.dense_crf", rolled)
    return calls


def test_crf(call: Call, photos: Path, crf: list[Any]) -> None:
    call("output_dir=plain")
    assert not crf
    call("crf=toco_seg")
    calls = crf[1:]  # the first finds out whether there is one
    assert len(calls) == 4
    num_labels = calls[0][1].shape[0]
    for (name, mask), (image, probabilities, preset) in zip(masks().items(), calls, strict=True):
        assert preset == "toco_seg"
        assert np.array_equal(image, read(photos / name))
        assert probabilities.shape == (num_labels, *image.shape[:2])
        torch.testing.assert_close(probabilities.sum(0), torch.ones(image.shape[:2]))
        plain = masks("plain")[name]
        assert np.array_equal(probabilities.argmax(0).numpy(), plain)
        assert np.array_equal(mask, (plain.astype(int) + 1) % num_labels)
    content = about("a")
    assert content["settings"]["crf"] == "toco_seg"
    assert about("a", "plain")["classes"][0]["confidence"] in [
        c["confidence"] for c in content["classes"]
    ]


def test_crf_of_large_images(call: Call, crf: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsss.predict, "CRF_MAX_PIXELS", 56 * 64)
    done = call("crf=cosa")
    assert done.predicted == 3
    (problem,) = done.problems
    assert "b.png: 80x56 are 4480 pixels, and a CRF takes up to 3584: use crf=null" in problem
    (problem,) = call("crf=cosa", "max_pixels=3000", "output_dir=less").problems[:1]
    assert "more than max_pixels=3000" in problem


def test_crf_that_cannot_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"crf=coza: no such preset\. Did you mean 'cosa'"):
        call("crf=coza")
    with pytest.raises(UserError, match="crf and window do not go together"):
        call("crf=cosa", "window=32")

    def missing(*_: Any) -> None:
        raise UserError("pydensecrf2 is not installed")

    monkeypatch.setattr("wsss.pseudo.dense_crf", missing)
    with pytest.raises(UserError, match="not installed"):
        call("crf=cosa")
    assert not Path("predictions").exists()


# --- going on ----------------------------------------------------------------------------------


def test_the_same_command_again(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    first = call()
    before = {p: p.stat().st_mtime_ns for p in Path("predictions").rglob("*.*")}
    capsys.readouterr()
    again = call()
    assert (again.predicted, again.kept, again.complete) == (0, 4, True)
    assert again.shares == first.shares
    assert "4 kept from an earlier run" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in Path("predictions").rglob("*.*")}
    for i, lost in enumerate(["a.png", "sub/a.png", "sub/c_overlay.jpg"]):
        Path("predictions", lost).unlink()
        assert call().predicted == 1
        assert Path("predictions", lost).is_file(), i
    assert call("overwrite=true").predicted == 4


def test_results_made_otherwise_are_left_and_said(
    call: Call, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call()
    before = masks()
    capsys.readouterr()
    done = call("scales=[1.0]")
    assert (done.predicted, done.kept, done.complete) == (0, 0, False)
    assert done.others == [f"predictions/{n}" for n in before]
    assert done.shares == {}
    printed = capsys.readouterr().out
    assert "4 images not predicted: where the results belong there are files of" in printed
    assert "overwrite=true" in printed
    assert all(np.array_equal(before[k], v) for k, v in masks().items())
    shutil.copytree(photos, "elsewhere")
    assert len(call("input=elsewhere").others) == 4
    done = call("scales=[1.0]", "overwrite=true")
    assert (done.predicted, done.complete) == (4, True)
    assert about("a")["settings"]["scales"] == [1.0]
    (photos / "new.png").write_bytes((photos / "a.png").read_bytes())
    done = call()
    assert (done.predicted, len(done.others), done.complete) == (1, 4, False)


def test_files_that_it_did_not_write_are_left_as_found(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"a.png": b"drawn by hand", "b.json": b'{"shapes": []}', "sub/c_overlay.jpg": b"mine"}
    for name, content in own.items():
        path = Path("predictions", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    done = call()
    assert (done.predicted, done.kept, done.complete) == (1, 0, False)
    assert done.others == [f"predictions/{name}" for name in own]
    assert {name: Path("predictions", name).read_bytes() for name in own} == own
    files = [p for p in Path("predictions").rglob("*") if p.is_file()]
    assert len(files) == len(own) + 3  # nothing beside them either
    printed = capsys.readouterr().out
    assert "3 images not predicted" in printed
    assert "choose another output_dir, or replace them with overwrite=true" in printed
    assert "  - predictions/b.json" in printed
    assert call("output_dir=other").complete
    assert call("overwrite=true").predicted == 4
    assert call().kept == 4
    # Without its JSON nothing says what a mask is.
    Path("predictions/a.json").unlink()
    assert call().others == ["predictions/a.png"]


def test_another_setting_is_not_mixed_with_what_is_left_of_the_first(call: Call) -> None:
    call()
    Path("predictions/a_overlay.jpg").unlink()
    before = read("predictions/a.png")
    assert "predictions/a.png" in call("scales=[1.0]").others
    assert np.array_equal(read("predictions/a.png"), before)


def test_images_that_were_being_written_are_predicted_again(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the files of an image: of a first run, and of one that replaces another's."""

    def killed(after: int, *options: str) -> None:
        with monkeypatch.context() as patch:
            failing(patch, errno.ENOSPC, after)
            with pytest.raises(UserError):
                call(*options)

    killed(4)  # of b the mask
    done = call()
    assert (done.kept, done.predicted, done.complete) == (1, 3, True)
    expected = masks()
    killed(1, "scales=[0.5]", "overwrite=true")  # of a the mask, beside the JSON of the first run
    assert Path("predictions/.a.part").exists()
    done = call()
    # And b, whose mark was set while the first error was on its way.
    assert (done.kept, done.predicted, done.complete) == (2, 2, True)
    assert all(np.array_equal(expected[name], mask) for name, mask in masks().items())
    assert not list(Path("predictions").rglob("*.part"))


def test_another_checkpoint_of_the_same_name(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "last.ckpt"
    shutil.copy(checkpoint, copy)
    call(f"checkpoint={copy}")
    assert call().kept == 4  # the same weights, whatever they are called
    content = torch.load(copy, weights_only=True)
    torch.save(content | {"global_step": 8}, copy)
    assert len(call(f"checkpoint={copy}").others) == 4


def test_interrupted(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = segmenter.Segmenter.__call__
    count = 0

    def interrupted(self: Any, *args: Any) -> Iterator[Any]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        yield from whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(segmenter.Segmenter, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call()
    printed = capsys.readouterr().out
    assert "Stopped: 2 of 4 are written to predictions" in printed
    assert len(list(Path("predictions").rglob("*.json"))) == 2
    assert not list(Path("predictions").rglob("*.part"))
    done = call(f"output_dir={Path('predictions').absolute()}")
    assert (done.kept, done.predicted, done.complete) == (2, 2, True)


# --- what goes wrong ---------------------------------------------------------------------------


def test_broken_files_are_named_and_skipped(
    call: Call, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "0_empty.jpg").write_bytes(b"")
    (photos / "b_cut.png").write_bytes((photos / "b.png").read_bytes()[:300])
    (photos / "sub/z [x].jpg").write_text("no image")
    (photos / "notes.txt").write_text("x")
    done = call("batch_size=2")
    assert (done.predicted, done.complete) == (4, False)
    assert len(done.problems) == 3
    printed = capsys.readouterr().out
    for name in ("0_empty.jpg", "b_cut.png", "sub/z [x].jpg"):
        assert f"{photos / name}: cannot decode" in printed
    assert "3 images not predicted" in printed
    assert "Passed over: 1 other file (.txt)" in printed
    assert "Results: predictions" in printed
    assert len(masks()) == 4
    for path in (photos / "a.png", photos / "b.png", photos / "sub"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"none of 2 images could be predicted:\n  - .*0_empty"):
        call("output_dir=other")


def test_too_large(call: Call) -> None:
    done = call("max_pixels=3584")
    assert done.predicted == 3
    assert "b.png: 80x56 are 4480 pixels, more than max_pixels=3584: raise" in done.problems[0]
    assert call("max_pixels=4480").predicted == 1


def test_pils_limit_does_not_count(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert call().complete
    assert Image.MAX_IMAGE_PIXELS == 10


def failing(monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    """From the ``after``-th file on writing fails."""
    count = 0
    write = outputs.write_atomically

    def fail(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(code, "the reason", str(path))
        write(path, content)

    monkeypatch.setattr(outputs, "write_atomically", fail)


def test_a_full_disk_stops(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errno.ENOSPC, after=4)
    with pytest.raises(UserError, match=r"output_dir='predictions': the reason after 1 images"):
        call()
    assert len(list(Path("predictions").rglob("*.json"))) == 1


def test_a_file_that_cannot_be_written(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errno.ENAMETOOLONG, after=9)
    done = call()
    assert done.predicted == 3
    assert "c.png: cannot write its results" in done.problems[0]
    assert not done.complete


def test_an_output_folder_that_cannot_be_written(call: Call) -> None:
    Path("file").touch()
    with pytest.raises(UserError, match="output_dir='file/sub' cannot be written"):
        call("output_dir=file/sub")


def test_no_memory_for_an_image(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Reader.__call__

    def fail(self: Reader, path: Path) -> Any:
        if path.name == "b.png":
            raise MemoryError
        return whole(self, path)

    monkeypatch.setattr(Reader, "__call__", fail)
    done = call()
    assert done.predicted == 3
    assert "b.png: not enough memory" in done.problems[0]


def test_no_memory_on_the_device(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Inference, "__call__", fail)
    with pytest.raises(UserError, match="not enough memory for batch_size=2 at size=48"):
        call("batch_size=2")


def test_a_broken_network(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for name, value in content["state_dict"].items():
        if "decoder" in name:
            value.fill_(float("nan"))
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match=r"not finite.*precision=32-true"):
        call("checkpoint=nan.ckpt")


def test_a_method_without_segmentation(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "cam" / "best.ckpt"
    # TINY has keys of CoSA.
    kept = [o for o in TINY if "experiment" not in o and "loss_w" not in o and "threshold" not in o]
    config = compose("train", ["experiment=shapes", "method=cam", *kept, "data.root=x"])
    method = build_method(config, build_network(config, 2), ("cat", "dog"))
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    path.parent.mkdir()
    torch.save(content, path)
    with pytest.raises(UserError, match=r"method=cam trains no segmentation.*pseudo_label"):
        call(f"checkpoint={path}")
    assert not Path("predictions").exists()


def test_too_many_classes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Inference.load

    def loaded(*args: Any) -> Inference:
        inference = load(*args)
        inference.classes = tuple(map(str, range(256)))
        return inference

    monkeypatch.setattr(Inference, "load", loaded)
    with pytest.raises(UserError, match="knows 256 classes; a palette mask holds 255"):
        call()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("input=null", "input is not set"),
        ("checkpoint=null", "checkpoint is not set"),
        ("size=8", "size=8: give a whole number from 16"),
        ("size=big", "size=big: give a whole number"),
        ("window=0", "window=0: give a whole number"),
        ("window=100.5", "window=100.5: give a whole number"),
        ("batch_size=0", "batch_size=0: give a whole number from 1"),
        ("batch_size=true", "batch_size=True: give a whole number from 1"),
        ("batch_size=null", "batch_size=None: give a whole number"),
        ("workers=0", "workers=0: give"),
        ("threads=0", "threads=0: give"),
        ("overlay_size=3", "overlay_size=3: give"),
        ("max_pixels=0", "max_pixels=0: give"),
        ("overwrite=no", "overwrite=no: give true or false"),
        ("exif=1", "exif=1: give true or false"),
        ("window_overlap=1", "window_overlap=1: give a number from 0 to 0.9"),
        ("window_overlap=-0.1", "window_overlap=-0.1: give a number"),
        ("window_overlap=x", "window_overlap=x: give a number"),
        ("scales=[]", "scales=\\[\\]: give at least one"),
        ("scales=[1,0]", "scales=\\[1, 0\\]: give factors"),
        ("scales=[a]", "scales=\\['a'\\]: give factors"),
        ("scales=0", "scales=0: give factors"),
        ("scales=all", "scales=all: give factors"),
    ],
)
def test_settings(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(compose("predict", ["input=a", "checkpoint=b", override]))


def test_settings_that_are_fine() -> None:
    check_settings(
        compose("predict", ["input=a", "checkpoint=b", "size=16", "window=16", "scales=[0.1,10]"])
    )
    with pytest.raises(UserError, match="input is not set"):
        check_settings(compose("predict", []))


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("input=photo (1).jpg", "photo (1).jpg"),
        ("input=a,b={c}.jpg", "a,b={c}.jpg"),
        ("input=[2024] trip/**/*.jpg", "[2024] trip/**/*.jpg"),
        ('input=the "best" one', 'the "best" one'),
        ("input=C:\\new\\", "C:\\new\\"),
        ("input='quoted already'", "quoted already"),
        ("input=007", "007"),
        ("checkpoint=a (1)/x.ckpt", "a (1)/x.ckpt"),
        ("output_dir=1e5", "1e5"),
        ("device=cpu", "cpu"),
    ],
)
def test_paths_need_no_quotes(argument: str, value: str) -> None:
    cfg = compose("predict", [as_text(argument)])
    assert cfg[argument.split("=")[0]] == value


def test_other_arguments_are_left_alone() -> None:
    for argument in ("--help", "scales=[1.0]", "size=64", "--cfg", "job", "input="):
        assert as_text(argument) == argument


def test_images_are_read_ahead_but_not_all() -> None:
    submitted = []

    class Pool(ThreadPoolExecutor):
        def submit(self, function: Any, job: Any) -> Any:  # type: ignore[override]
            submitted.append(job)
            return super().submit(function, job)

    class Named:
        def __init__(self, image: int) -> None:
            self.image = image

    jobs = [Named(i) for i in range(9)]
    with Pool(2) as pool:
        coming = wsss.predict._read_ahead(pool, lambda path: path, jobs, 3)  # type: ignore[arg-type]
        for i, (job, future) in enumerate(coming):
            assert job is jobs[i]
            assert future.result() == i  # type: ignore[comparison-overlap]
            assert len(submitted) == min(i + 4, 9)
    assert len(submitted) == 9


@pytest.mark.parametrize("options", [[], ["window=32"], ["batch_size=3"]])
def test_the_bar_counts_images(
    call: Call, photos: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    (photos / "broken.jpg").touch()
    total = []
    advanced = []
    progress = wsss.predict.Progress
    add, advance = progress.add_task, progress.advance
    monkeypatch.setattr(
        progress,
        "add_task",
        lambda s, n, total_=None, **k: total.append(k["total"]) or add(s, n, **k),
    )
    monkeypatch.setattr(progress, "advance", lambda s, t, n: advanced.append(n) or advance(s, t, n))
    call(*options)
    assert total == [5]
    assert sum(advanced) == pytest.approx(5)


def test_the_command(run: Run, checkpoint: Path, photos: Path) -> None:
    (photos / "b.png").rename(photos / "b (1).png")
    done = run("predict", "input=photos/b (1).png", f"checkpoint={checkpoint.parents[1]}")
    assert "1 image predicted." in done.stdout
    assert "Predicting" not in done.stdout  # no bar where nobody watches
    assert Path("predictions/b (1).png").is_file()
    assert "Traceback" not in done.stderr
    assert not done.stderr
    assert sorted(p.name for p in Path().iterdir()) == ["photos", "predictions"]


def test_exit_codes(
    call: Call, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose("predict", [f"input={photos}", f"checkpoint={checkpoint}", "device=cpu"])
    wsss.predict._command(cfg)
    (photos / "broken.jpg").touch()
    with pytest.raises(SystemExit) as stop:
        wsss.predict._command(cfg)
    assert stop.value.code == 1

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wsss.predict, "predict", interrupted)
    with pytest.raises(SystemExit) as stop:
        wsss.predict._command(cfg)
    assert stop.value.code == 130


def test_a_mistake_ends_with_code_2(run: Run) -> None:
    done = run("predict", "input=nowhere", "checkpoint=none.ckpt", code=2)
    assert done.stderr == "error: input='nowhere': no such file or folder. Check the path.\n"
