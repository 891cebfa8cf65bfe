"""``wsss pseudo_label``: the same labels as evaluation scores, going on, sharing, refusing."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import TINY, Run, compose
from wsss import pseudo_label as module
from wsss.build import build_method, build_network, restore_method
from wsss.checkpoints import read_checkpoint, saved_config
from wsss.data.images import DatasetError, encode_mask, read_mask, voc_palette
from wsss.data.layout import Split
from wsss.errors import UserError
from wsss.evaluate import evaluate
from wsss.inference import Inference
from wsss.pseudo_label import Labelled, pseudo_label

CLASSES = ("cat", "dog", "hen")
#: name, (H, W), labels
IMAGES = [
    ("a", (40, 61), "cat"),
    ("b", (55, 30), "dog;hen"),
    ("sub/c", (48, 48), "cat;dog;hen"),
    ("d", (33, 70), ""),
    ("e", (64, 44), "hen"),
    ("sub/f", (41, 43), "cat;hen"),
    ("g", (30, 30), "dog"),
]
NAMES = [name for name, _, _ in sorted(IMAGES)]


def _image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Soft colours: of pure noise every CAM would be the same."""
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of seven images of different sizes, all with masks and one without a class."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, size, labels in IMAGES:
        values = [0, 255, *(CLASSES.index(c) + 1 for c in labels.split(";") if c)]
        blocks = rng.choice(values, (size[0] // 10 + 1, size[1] // 10 + 1)).astype(np.uint8)
        mask = blocks.repeat(10, 0).repeat(10, 1)[: size[0], : size[1]]
        for path in (root / f"images/{name}.png", root / f"masks/{name}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
        _image(rng, size).save(root / f"images/{name}.png")
        (root / f"masks/{name}.png").write_bytes(encode_mask(mask))
    lines = ["image,labels", *(f"{name},{labels}" for name, _, labels in IMAGES)]
    (root / "labels.csv").write_text("\n".join(lines))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("\n".join(NAMES))
    return root


def _save(path: Path, overrides: list[str], fitted: bool = True) -> Path:
    """A checkpoint, as training writes it, of networks whose heads are noise."""
    config = compose("train", overrides)
    torch.manual_seed(0)
    method = build_method(config, build_network(config, len(CLASSES)), CLASSES)
    for network in method.networks().values():
        heads = (network.decoder, network.classifier, network.early_classifier)
        for weight in (weight for head in heads for weight in head.parameters()):
            weight.data.normal_()  # untrained, the decoder says background everywhere
    if fitted:
        for module_, centre in ((method.threshold, 0.3), (method.early_threshold, 0.5)):
            values = torch.cat([torch.rand(99) * 0.1, torch.rand(99) * 0.1 + 2 * centre - 0.1])
            module_.update(values)  # type: ignore[operator]
    content: dict[str, Any] = {"state_dict": method.state_dict(), "global_step": 7}
    method.on_save_checkpoint(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def tiny_folder(data: Path) -> list[str]:
    return [*(o for o in TINY if o != "~data.generate"), "data=folder", f"data.root={data}"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_folder: list[str]) -> Path:
    overrides = [*tiny_folder, "data.eval_size=48", "data.eval_batch_size=3"]
    return _save(tmp_path_factory.mktemp("run") / "checkpoints/best.ckpt", overrides)


@pytest.fixture
def label(checkpoint: Path, tmp_path: Path) -> Any:
    """Runs the command in this process, into tmp_path/out unless told otherwise."""

    def call(*overrides: str, **options: Any) -> Labelled:
        out = options.get("out", tmp_path / "out")
        basic = [f"checkpoint={checkpoint}", f"output_dir={out}", "device=cpu"]
        return pseudo_label(compose("pseudo_label", [*basic, *overrides]))

    return call


def _mask(root: Path, kind: str, name: str) -> np.ndarray:
    with Image.open(root / kind / f"{name}.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[:21] == voc_palette(7).ravel().tolist()
        return np.array(image)


def _files(root: Path) -> dict[str, bytes]:
    paths = sorted(p for p in root.rglob("*") if p.suffix in (".png", ".npz"))
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}


def _record(root: Path) -> dict[str, Any]:
    return json.loads((root / "pseudo_labels.json").read_text())


# --- what is written -----------------------------------------------------------------------


@pytest.mark.parametrize("network", ["an", "on"])
def test_the_files_score_what_evaluation_scores(
    label: Any, checkpoint: Path, tmp_path: Path, network: str
) -> None:
    """CPL of all three sources at 0.5 and SPL, read back from the PNGs."""
    overrides = [f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'ev'}", "accelerator=cpu"]
    evaluate(compose("evaluate", [*overrides, "pictures=0"]))
    expected = json.loads((tmp_path / "ev/scores.json").read_text())
    seen = set()
    for source, prefix in (
        ("cam", "cpl"),
        ("early_cam", "cpl_early"),
        ("ensemble", "cpl_ensemble"),
    ):
        done = label(f"source={source}", "labels=both", f"network={network}", out=tmp_path / source)
        for kind, protocol in (("cpl", prefix), ("spl", "seg_given_tags")):
            name = f"{network}/{protocol}/miou_ms_flip"
            check = done.results[kind]["check"]
            assert check["images"] == len(IMAGES)
            assert check["scores"] == {name: expected["scores"][name]}
            assert check["per_class"] == expected["per_class"][name]
            seen.add(check["scores"][name])
    assert len(seen) == 4


def test_masks(label: Any, tmp_path: Path) -> None:
    done = label("labels=both", "low=0.3", "high=0.6")
    assert (done.written, done.kept, done.problems, done.complete) == (7, 0, [], True)
    undecided = 0
    for name, size, labels in IMAGES:
        present = {CLASSES.index(c) + 1 for c in labels.split(";") if c}
        cpl, spl = (_mask(tmp_path / "out", kind, name) for kind in ("cpl", "spl"))
        assert cpl.shape == spl.shape == size
        assert set(np.unique(cpl)) <= {0, 255} | present
        assert set(np.unique(spl)) <= {0} | present
        if not labels:
            assert not cpl.any()
            assert not spl.any()
        undecided += (cpl == 255).sum()
    assert undecided > 0
    assert done.results["cpl"]["undecided"] > 0
    names = ["an/cpl/miou_ms_flip", "an/cpl/miou_ms_flip_decided"]
    assert list(done.results["cpl"]["check"]["scores"]) == names


def test_the_label_is_that_of_the_network_and_the_image(
    label: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """One image by hand: the right image, labels, scales and threshold."""
    label("threshold=0.35", "cam_scales=[1.0,0.75]", "cam=true")
    content = read_checkpoint(checkpoint)
    method = restore_method(content, saved_config(content, checkpoint), checkpoint)
    inference = Inference(method, device="cpu", cam_scales=(1.0, 0.75))
    pixels = Image.open(data / "images/sub/f.png").convert("RGB")
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    small = torch.nn.functional.interpolate(image[None].float(), size=(48, 48), mode="bilinear")
    cam = inference(small.round().to(torch.uint8)).cam[0, [0, 2]]
    stored = np.load(tmp_path / "out/cam/sub/f.npz")
    assert np.abs(stored["cam"] - cam.numpy()).max() < 0.05  # resized a little differently
    native = torch.nn.functional.interpolate(cam[None], size=(41, 43), mode="bilinear")[0]
    expected = np.where(native.amax(0) >= 0.35, np.array([1, 3])[native.argmax(0)], 0)
    assert (_mask(tmp_path / "out", "cpl", "sub/f") == expected).mean() > 0.95


def test_cams(label: Any, tmp_path: Path) -> None:
    label("source=ensemble", "cam=true")
    label("cam=true", out=tmp_path / "final")
    label("cam=true", "source=early_cam", out=tmp_path / "early")
    for name, size, labels in IMAGES:
        stored = np.load(tmp_path / f"out/cam/{name}.npz")  # without pickle
        present = [CLASSES.index(c) for c in labels.split(";") if c]
        assert stored["classes"].tolist() == present
        assert stored["names"].tolist() == [CLASSES[i] for i in present]
        cam = stored["cam"]
        assert (cam.shape, cam.dtype) == ((len(present), 48, 48), np.float16)
        parts = [np.load(tmp_path / f"{s}/cam/{name}.npz")["cam"] for s in ("final", "early")]
        np.testing.assert_allclose(cam, (parts[0].astype(float) + parts[1]) / 2, atol=1e-3)
        if present:
            assert cam.min() >= 0
            assert cam.max() <= 1
            # The mask is the stored CAM, resized and cut.
            native = torch.nn.functional.interpolate(
                torch.from_numpy(cam.astype(np.float32))[None], size=size, mode="bilinear"
            )[0]
            label_ = np.where(native.amax(0) >= 0.5, np.array(present)[native.argmax(0)] + 1, 0)
            assert (_mask(tmp_path / "out", "cpl", name) == label_).mean() > 0.99


def test_the_record(label: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    done = label("labels=both", "refine=par", "source=ensemble", "low=0.2", "high=0.4")
    record = _record(tmp_path / "out")
    assert (record["checkpoint"], record["step"]) == (str(checkpoint), 7)
    assert record["data"] == str(data)
    settings = record["settings"]
    assert set(settings) == {"all", "cpl", "spl"}
    assert settings["all"] | {"checkpoint_sha256": ""} == {
        "checkpoint_sha256": "",
        "network": "an",
        "split": "train",
        "classes": list(CLASSES),
        "size": 48,
        "precision": "32-true",
    }
    assert settings["cpl"] == {
        "source": "ensemble",
        "cam_scales": [1.0, 0.5],
        "low": 0.2,
        "high": 0.4,
        "refine": "par",
    }
    assert settings["spl"] == {"eval_scales": [1.0, 0.5], "refine": "par"}
    assert record["labels"]["b"] == "dog;hen"
    assert record["labels"]["d"] == ""
    assert set(record["labels"]) == set(NAMES)
    results = record["results"]
    assert results["cpl"] == done.results["cpl"] | {"without_class": 1, "left_out": 0}
    names = ["an/cpl_ensemble/miou_ms_flip_par", "an/cpl_ensemble/miou_ms_flip_par_decided"]
    assert list(results["cpl"]["check"]["scores"]) == names
    assert list(results["spl"]["check"]["scores"]) == ["an/seg_given_tags/miou_ms_flip_par"]


def test_refinement_sees_the_image(label: Any, tmp_path: Path) -> None:
    label("labels=both")
    label("labels=both", "refine=par", out=tmp_path / "par")
    plain, par = _files(tmp_path / "out"), _files(tmp_path / "par")
    assert plain.keys() == par.keys()
    for kind in ("cpl", "spl"):
        assert sum(plain[k] != par[k] for k in plain if k.startswith(kind)) >= 4
    assert plain["cpl/d.png"] == par["cpl/d.png"]  # no class, nothing to refine


def test_the_preset_reaches_the_crf(
    label: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def dense_crf(image: Any, probabilities: Any, preset: str = "") -> Any:
        calls.append((tuple(image.shape), preset))
        return probabilities

    monkeypatch.setattr("wsss.labelling.recipe.dense_crf", dense_crf)
    monkeypatch.setattr("wsss.labelling.settings.dense_crf", lambda *_: None)
    label()
    done = label("refine=crf", out=tmp_path / "crf")
    assert {preset for _, preset in calls} == {"toco_cam"}
    assert {shape for shape, _ in calls} == {(*size, 3) for _, size, labels in IMAGES if labels}
    assert list(done.results["cpl"]["check"]["scores"]) == ["an/cpl/miou_ms_flip_crf"]
    assert _record(tmp_path / "crf")["settings"]["cpl"]["crf"] == "toco_cam"
    assert _files(tmp_path / "crf") == _files(tmp_path / "out")
    calls.clear()
    label("refine=crf", "crf=afa", "labels=both", out=tmp_path / "afa")
    assert {preset for _, preset in calls} == {"afa"}


# --- thresholds ----------------------------------------------------------------------------


def _thresholds(root: Path) -> tuple[float, float]:
    cpl = _record(root)["settings"]["cpl"]
    return cpl["low"], cpl["high"]


def test_thresholds(label: Any, checkpoint: Path, tmp_path: Path, tiny_folder: list[str]) -> None:
    content = read_checkpoint(checkpoint)["state_dict"]
    cam, early = (float(content[f"{n}.value"]) for n in ("threshold", "early_threshold"))
    assert abs(cam - early) > 0.05
    cases: list[tuple[list[str], float]] = [
        ([], 0.5),
        (["threshold=0.3"], 0.3),
        (["threshold=dynamic"], cam),
        (["threshold=dynamic", "source=early_cam"], early),
        (["threshold=dynamic", "source=ensemble"], (cam + early) / 2),
    ]
    for i, (overrides, expected) in enumerate(cases):
        label(*overrides, "shard=1/7", out=tmp_path / f"{i}")
        assert _thresholds(tmp_path / f"{i}") == (pytest.approx(expected, abs=1e-9),) * 2
    run = _save(tmp_path / "other.ckpt", [*tiny_folder, "method.cpl_threshold=0.45"], fitted=False)
    label(f"checkpoint={run}", "shard=1/7", out=tmp_path / "other")
    assert _thresholds(tmp_path / "other") == (0.45, 0.45)
    with pytest.raises(UserError, match="before the first threshold was fitted"):
        label(f"checkpoint={run}", "threshold=dynamic", out=tmp_path / "another")


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("cosa", ["method.threshold=0.4", "threshold=dynamic"], "learns no threshold"),
        ("cam", ["threshold=dynamic"], "learns no threshold"),
        ("cam", ["labels=both"], "labels=both: .* cam, trains no segmentation: use labels=cpl"),
        ("supervised", [], "supervised, trains no CAMs: use labels=spl cam=false"),
        ("supervised", ["labels=spl", "cam=true"], "trains no CAMs"),
        ("mctformer", ["source=early_cam"], "mctformer, trains no early CAM: use source=cam"),
        ("mctformer", ["source=ensemble"], "trains no early CAM"),
    ],
)
def test_what_a_method_does_not_have(
    label: Any,
    tiny_folder: list[str],
    tmp_path: Path,
    method: str,
    overrides: list[str],
    message: str,
) -> None:
    own = [o for o in overrides if o.startswith("method.")]
    base = [
        o
        for o in tiny_folder
        if method == "cosa" or not o.startswith(("method.loss", "method.threshold", "experiment"))
    ]
    extra = [] if method == "cosa" else ["experiment=shapes", f"method={method}"]
    run = _save(tmp_path / "run.ckpt", [*extra, *base, *own], fitted=False)
    with pytest.raises(UserError, match=message):
        label(f"checkpoint={run}", *(o for o in overrides if o not in own))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["labels=cam"], "labels=cam: no such choice. Choose cpl, spl, both"),
        (["source=late"], "source=late: no such choice"),
        (["refine=pra"], "refine=pra: no such choice"),
        (["threshold=1"], "threshold=1: give a number between 0 and 1, or dynamic"),
        (["threshold=0"], "threshold=0: give"),
        (["threshold=otsu"], "threshold=otsu: give"),
        (["threshold=true"], "threshold=True: give"),
        (["low=0.3"], "give both low and high"),
        (["high=0.3"], "give both low and high"),
        (["low=0.3", "high=0.5", "threshold=0.4"], "or threshold alone"),
        (["low=0.5", "high=0.4"], "low=0.5 is above high=0.4"),
        (["low=0.3", "high=dynamic"], "high=dynamic: give a number between 0 and 1."),
        (["shard=0/3"], "shard=0/3: give i/n"),
        (["shard=4/3"], "shard=4/3: give i/n"),
        (["shard=3"], "shard=3: give i/n"),
        (["shard=0/0"], "shard=0/0: give i/n"),
        (["crf=cosa"], "says how refine=crf works, but refine=none"),
        (["crf=coca", "refine=crf"], "crf=coca: no such preset. Did you mean 'cosa'"),
        (["cam=1"], "cam=1: give true or false"),
        (["overwrite=yes_please"], "overwrite=yes_please: give true or false"),
        (["network=of"], "network='of'"),
        (["split=test"], "split 'test'"),
        (["data.on_error=ignore"], "data.on_error='ignore': expected raise or skip"),
    ],
)
def test_wrong_settings(label: Any, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        label(*overrides)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_checkpoint() -> None:
    with pytest.raises(UserError, match="checkpoint is not set"):
        pseudo_label(compose("pseudo_label", []))


# --- going on ------------------------------------------------------------------------------


def test_the_same_command_goes_on(label: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = label("cam=true")
    before = _files(out)
    assert len(before) == 14
    for lost in ("cpl/a.png", "cam/sub/c.npz"):
        (out / lost).unlink()
    kept = (out / "cpl/b.png").stat().st_mtime_ns
    again = label("cam=true")
    assert (again.written, again.kept) == (2, 5)
    assert _files(out).keys() == before.keys()
    assert (out / "cpl/b.png").stat().st_mtime_ns == kept
    assert again.results == first.results
    assert label("cam=true").written == 0
    with pytest.raises(UserError, match=r"low of cpl: 0\.5 there, 0\.4 now"):
        label("threshold=0.4")
    assert label("threshold=0.4", "overwrite=true").written == 7
    assert _files(out)["cpl/a.png"] != before["cpl/a.png"]


def test_batches_and_workers_change_nothing(label: Any, tmp_path: Path) -> None:
    label("labels=both")
    label("labels=both", "data.num_workers=2", "data.eval_batch_size=1", out=tmp_path / "two")
    one, two = _files(tmp_path / "out"), _files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert sum(one[key] == two[key] for key in one) >= len(one) - 1  # a last bit may differ


def test_shards_share_the_work(label: Any, tmp_path: Path, capsys: Any) -> None:
    label("data.eval_batch_size=1", out=tmp_path / "whole")
    for i, (written, complete) in enumerate([(3, False), (2, False), (2, True)], start=1):
        done = label(f"shard={i}/3", "data.eval_batch_size=1")
        assert (done.written, done.complete) == (written, complete)
        printed = capsys.readouterr().out
        assert f"{written} images of split 'train' (shard {i}/3 of 7)" in printed
        assert ("of 7 images of the split have no files yet" in printed) == (not complete)
        assert bool(_record(tmp_path / "out")["results"]) == complete
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert {p.stem for p in (tmp_path / "out/cpl").iterdir()} == {"a", "b", "d", "e", "g", "sub"}
    assert _record(tmp_path / "out")["results"] == _record(tmp_path / "whole")["results"]


def test_a_full_disk(label: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module.write_atomically, []

    def write(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(module, "write_atomically", write)
    with pytest.raises(UserError) as error:
        label("data.eval_batch_size=1")
    for part in ("No space left on device", "3 images of this run are written", str(calls[-1])):
        assert part in str(error.value)
    assert len(_files(tmp_path / "out")) == 3
    assert label("data.eval_batch_size=1").written == 4


def test_the_keyboard(label: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    real, calls = module.write_atomically, []

    def write(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(module, "write_atomically", write)
    with pytest.raises(SystemExit) as end:
        label("data.eval_batch_size=1")
    assert end.value.code == 130
    assert "Stopped: 2 of 7 are written to" in capsys.readouterr().out


# --- data ----------------------------------------------------------------------------------


@pytest.fixture
def broken(data: Path, tmp_path: Path) -> Path:
    """The data with an image that is empty."""
    root = tmp_path / "broken"
    shutil.copytree(data, root, ignore=shutil.ignore_patterns("wsss"))
    (root / "images/e.png").write_bytes(b"")
    return root


def _without_b(real: Callable[[Split, int], Any]) -> Callable[[Split, int], Any]:
    """Image b is damaged in a way that only decoding finds."""

    def load_image(self: Split, index: int) -> Any:
        if self.names[index] == "b":
            raise DatasetError("b.png: cannot decode the image")
        return real(self, index)

    return load_image


def test_images_that_cannot_be_read(
    label: Any, broken: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"1 problem in split 'train'(.|\n)*e\.png: empty file"):
        label(f"data.root={broken}")
    assert not (tmp_path / "out").exists()
    real = Split.load_image
    monkeypatch.setattr(Split, "load_image", _without_b(real))
    done = label(f"data.root={broken}", "data.on_error=skip")
    assert (done.written, len(done.problems), done.complete) == (5, 2, True)
    printed = capsys.readouterr().out
    assert "5 written, 0 there already, 2 left out." in printed
    assert "b.png: cannot decode" in printed
    assert "Without any class, so all background: 1." in printed
    results = _record(tmp_path / "out")["results"]["cpl"]
    assert (results["images"], results["left_out"]) == (5, 2)
    assert results["check"]["images"] == 5
    # Mended, they are added.
    _image(np.random.default_rng(1), (64, 44)).save(broken / "images/e.png")
    monkeypatch.setattr(Split, "load_image", real)
    done = label(f"data.root={broken}")
    assert (done.written, done.kept, done.problems) == (2, 5, [])


def test_an_image_that_only_decoding_finds_broken(
    label: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Split, "load_image", _without_b(Split.load_image))
    with pytest.raises(UserError, match=r"b\.png: cannot decode(.|\n)*data.on_error=skip"):
        label()
    done = label("data.on_error=skip", "data.eval_batch_size=1")  # a batch of nothing else
    assert (done.written, len(done.problems), done.complete) == (6, 1, True)


def test_masks_are_not_needed_but_labels_are(label: Any, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(data, root, ignore=shutil.ignore_patterns("wsss"))
    for name in ("a", "b"):
        (root / f"masks/{name}.png").unlink()
    (root / "masks/g.png").write_bytes(encode_mask(np.zeros((2, 2), np.uint8)))  # another's
    done = label(f"data.root={root}")
    assert (done.written, done.results["cpl"]["check"]["images"]) == (7, 4)
    shutil.rmtree(root / "masks")
    done = label(f"data.root={root}", out=tmp_path / "none")
    assert done.written == 7
    assert "check" not in done.results["cpl"]
    lines = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text("\n".join(line for line in lines if line != "a,cat"))
    with pytest.raises(UserError, match=r"a\.png: labels\.csv does not name it"):
        label(f"data.root={root}", out=tmp_path / "third")


def test_changed_labels_are_labelled_again(label: Any, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(data, root, ignore=shutil.ignore_patterns("wsss"))
    label(f"data.root={root}")
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("a,cat", "a,dog"))
    done = label(f"data.root={root}")
    assert (done.written, done.kept) == (1, 6)
    assert set(np.unique(_mask(tmp_path / "out", "cpl", "a"))) <= {0, 2}


@pytest.mark.parametrize("where", ["masks", "masks/deeper", "images/sub", "link"])
def test_the_data_sets_own_folders(label: Any, data: Path, tmp_path: Path, where: str) -> None:
    before = _files(data)
    out = data / where
    if where == "link":
        out = tmp_path / "out"
        out.mkdir()
        (out / "cpl").symlink_to(data / "masks")
    with pytest.raises(UserError, match="holds the data set's own images or masks"):
        label("overwrite=true", out=out)
    assert _files(data) == before


def test_a_folder_beside_them(label: Any, data: Path) -> None:
    assert label(out=data / "pseudo").written == 7
    shutil.rmtree(data / "pseudo")


def test_a_strangers_files(label: Any, tmp_path: Path) -> None:
    (tmp_path / "out/cpl").mkdir(parents=True)
    (tmp_path / "out/cpl/a.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="says nothing of"):
        label()
    assert (tmp_path / "out/cpl/a.png").read_bytes() == b"mine"


def test_other_classes(label: Any, shapes_root: Path) -> None:
    with pytest.raises(UserError, match="was trained with"):
        label("data=voc", f"data.root={shapes_root}")


# --- the command ---------------------------------------------------------------------------


def test_the_default_folder_and_split(checkpoint: Path, data: Path) -> None:
    overrides = [f"checkpoint={checkpoint.parents[1]}", "device=cpu", "split=val"]
    done = pseudo_label(compose("pseudo_label", overrides))
    out = checkpoint.parents[1] / "pseudo_labels/val"
    assert done.folder.root == out
    assert read_mask(out / "cpl/a.png", 3, (40, 61)).any()
    assert _record(out)["settings"]["all"]["split"] == "val"
    assert module.default_folder(Path("/r/checkpoints/a.ckpt"), "/l/mine.txt") == Path(
        "/r/pseudo_labels/mine"
    )
    assert module.default_folder(Path("/r/a.ckpt"), "x.y") == Path("/r/pseudo_labels/x.y")


def test_the_command_line(run: Run, checkpoint: Path, broken: Path, tmp_path: Path) -> None:
    common = [f"checkpoint={checkpoint}", f"data.root={broken}", "device=cpu", "output_dir=out"]
    printed = run("pseudo_label", *common, "data.on_error=skip", code=1)
    assert "an/cpl/miou_ms_flip" in printed.stdout
    assert "Traceback" not in printed.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]  # nothing of Hydra's
