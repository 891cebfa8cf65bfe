"""Colours, panels of every method, the grid, and the callback that draws during training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from wsss.callbacks.pictures import PictureLogger
from wsss.data.batch import EvalBatch
from wsss.data.images import voc_palette
from wsss.methods import CAM, CoSA, Supervised
from wsss.methods.base import Method
from wsss.nn import WSSSNetwork
from wsss.pseudo import cam_pseudo_label, multi_scale, two_threshold_label
from wsss.report import pictures
from wsss.report.pictures import (
    PanelSet,
    colourise,
    current_threshold,
    draw_panels,
    grid,
    heatmap,
    overlay,
    save_png,
    scored_threshold,
    spread,
    spread_over_classes,
    strip,
)

CLASSES = ("cat", "dog", "eel")
METHODS: list[type[Method]] = [CoSA, CAM, Supervised]


def tiny(kind: type[Method], **kwargs: Any) -> Method:
    torch.manual_seed(0)
    network = WSSSNetwork(
        "vit_tiny_patch16_224",
        len(CLASSES),
        early_block=-2,
        patch_size=8,
        img_size=32,
        depth=2,
        embed_dim=16,
        num_heads=2,
    )
    scales: dict[str, Any] = {"eval_scales": (1.0, 0.5), "cam_scales": (1.0,)}
    return kind(network=network, classes=CLASSES, **scales, **kwargs).eval()


def eval_batch(first: int = 0, size: int = 2) -> EvalBatch:
    generator = torch.Generator().manual_seed(first)
    return EvalBatch(
        images=torch.rand(size, 3, 32, 32, generator=generator),
        labels=torch.tensor([[1.0, 0, 1]]).repeat(size, 1),
        masks=[
            torch.randint(0, len(CLASSES) + 1, (20 + i, 30), generator=generator)
            for i in range(size)
        ],
        names=[f"image_{first + i}" for i in range(size)],
    )


# --- colours -------------------------------------------------------------------------------


def test_palette_is_that_of_voc() -> None:
    palette = voc_palette(256)
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, colour in expected.items():
        assert tuple(palette[index]) == colour
    assert tuple(palette[255]) == pictures.VOID_COLOUR
    assert len({tuple(c) for c in palette}) == 256


def test_colourise_void_and_classes() -> None:
    label = torch.tensor([[0, 1, 255]])
    assert colourise(label, 4).tolist() == [[[0, 0, 0], [128, 0, 0], [224, 224, 192]]]
    assert np.array_equal(colourise(label.numpy(), 4), colourise(label, 4))


def test_overlay_shows_the_image_in_the_background_and_outlines_regions() -> None:
    image = np.full((6, 9, 3), 200, np.uint8)
    label = np.zeros((6, 9), np.int64)
    label[:, 5:] = 1
    picture = overlay(image, label, 2)
    assert picture.shape == (6, 9, 3)
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [80, 80, 80]
    assert picture[0, 5].tolist() == [255, 255, 255]
    assert picture[0, 7].tolist() == [142, 40, 40]


def test_heatmap_goes_from_blue_to_red_and_clips() -> None:
    colours = heatmap(torch.tensor([[0.0, 1.0, -1.0, 2.0]]))
    assert colours[0, 0].tolist() == [0, 0, 96] == colours[0, 2].tolist()
    assert colours[0, 1].tolist() == [224, 0, 0] == colours[0, 3].tolist()
    assert heatmap(np.zeros((2, 3)), np.full((2, 3, 3), 255, np.uint8)).shape == (2, 3, 3)


# --- panels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (CoSA, ["image", "truth", "CAM", "CPL", "SPL", "prediction"]),
        (CAM, ["image", "truth", "CAM", "CPL"]),
        (Supervised, ["image", "truth", "prediction"]),
    ],
)
def test_columns_of_each_method(kind: type[Method], columns: list[str]) -> None:
    rows = draw_panels(tiny(kind), eval_batch())
    assert [row.name for row in rows] == ["image_0", "image_1"]
    for row in rows:
        assert list(row.panels) == columns
        assert row.classes == ("cat", "eel")
        assert row.caption == f"{row.name}: cat, eel"
        for panel in row.panels.values():
            assert panel.shape == (32, 32, 3)
            assert panel.dtype == np.uint8


def test_labels_are_those_of_the_network_to_deploy() -> None:
    method = tiny(CoSA, threshold=0.3)
    assert isinstance(method, CoSA)
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.zero_()  # the online network must not matter
    batch = eval_batch()
    out = multi_scale(method.assignment, batch.images, (1.0, 0.5), cam_scales=(1.0,))
    assert out.seg_logits is not None
    cpl = cam_pseudo_label(out.cam * batch.labels[:, :, None, None], 0.3)
    present = torch.tensor([0, 1, 3])
    spl = present[out.seg_logits[:, present].argmax(1)]
    for i, row in enumerate(draw_panels(method, batch)):
        image = row.panels["image"]
        for title, label in (("CPL", cpl), ("SPL", spl), ("prediction", out.seg_logits.argmax(1))):
            assert np.array_equal(row.panels[title], overlay(image, label[i], 4)), title


def test_threshold_is_the_method_s_own_unless_given() -> None:
    cosa, cam = tiny(CoSA, threshold=0.3, cpl_threshold=0.6), tiny(CAM, cpl_threshold=0.6)
    assert current_threshold(cosa) == pytest.approx(0.3)
    assert current_threshold(cam) == scored_threshold(cam) == scored_threshold(cosa) == 0.6
    own = draw_panels(cosa, eval_batch())[0].panels["CPL"]
    given = draw_panels(cosa, eval_batch(), scored_threshold(cosa))[0].panels["CPL"]
    assert not np.array_equal(own, given)


def test_image_without_labels_has_an_empty_pseudo_label() -> None:
    batch = eval_batch(size=1)
    batch.labels.zero_()
    row = draw_panels(tiny(CAM), batch)[0]
    assert row.caption == "image_0"
    nothing = torch.zeros(32, 32, dtype=torch.int64)
    assert np.array_equal(row.panels["CPL"], overlay(row.panels["image"], nothing, 4))


# --- composition ---------------------------------------------------------------------------


def panel_set(name: str, height: int = 40, width: int = 80) -> PanelSet:
    blue = np.full((height, width, 3), (0, 0, 255), np.uint8)
    return PanelSet(name, ("cat",), {"image": blue, "truth": blue // 2})


def test_grid_holds_every_panel_at_its_aspect() -> None:
    picture = grid([panel_set("a"), panel_set("b", 80, 80)], legend=CLASSES, cell=100)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 2 * 104 + 4
    blue = (picture == (0, 0, 255)).all(2)
    assert blue.sum() == 100 * 50 + 100 * 100
    assert (picture == (0, 0, 127)).all(2).sum() == blue.sum()
    for colour in voc_palette(4)[1:]:
        assert (picture == colour).all(2).sum() > 50  # its square in the legend


def test_grid_takes_the_columns_asked_for_in_their_order() -> None:
    picture = grid([panel_set("a")], titles=["truth"], cell=100)
    assert picture.shape[1] == 108
    assert not (picture == (0, 0, 255)).all(2).any()
    assert strip(panel_set("a"), cell=100).shape[1] == 212


def test_long_texts_stay_inside() -> None:
    row = panel_set("name " * 50)
    row.panels = {"a-title-of-one-very-long-word " * 3: row.panels["image"]}
    assert grid([row], cell=60).shape[1] == 68


def test_grid_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        grid([])
    with pytest.raises(ValueError, match="'b' has no column 'truth'"):
        grid([panel_set("a"), PanelSet("b", (), {"image": panel_set("b").panels["image"]})])


def test_spread() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(5, 1) == [0]
    assert spread(0, 4) == spread(4, 0) == []


def test_spread_over_classes() -> None:
    labels = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 1, 2, 1, 0]]
    assert spread_over_classes(labels, 4) == [0, 2, 5, 6]  # the last stretch has nothing new
    assert spread_over_classes(labels, 2) == [0, 4]
    assert spread_over_classes(labels[:2], 4) == [0, 1]
    assert spread_over_classes(labels[:0], 4) == spread_over_classes(labels, 0) == []
    nothing = np.zeros((4, 3))  # images without any class
    assert spread_over_classes(nothing, 2) == [0, 2]


def test_save_png_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    for value in (0, 9):
        save_png(np.full((4, 5, 3), value, np.uint8), path)
    assert np.asarray(Image.open(path)).tolist() == np.full((4, 5, 3), 9).tolist()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


# --- during training -----------------------------------------------------------------------


class Validated(L.LightningDataModule):
    """Nine images in batches of two."""

    def val_dataloader(self) -> Any:
        samples = [eval_batch(i, 1) for i in range(9)]

        def collate(parts: list[EvalBatch]) -> EvalBatch:
            return EvalBatch(
                torch.cat([p.images for p in parts]),
                torch.cat([p.labels for p in parts]),
                [p.masks[0] for p in parts],
                [p.names[0] for p in parts],
            )

        return DataLoader(samples, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]


class RecordingWandb(WandbLogger):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.sent: dict[str, dict[str, Any]] = {}

    def log_image(
        self, key: str, images: list[Any], step: int | None = None, **kwargs: Any
    ) -> None:
        self.sent[key] = {"images": images, "step": step, **kwargs}

    def log_table(self, key: str, **kwargs: Any) -> None:  # type: ignore[override]
        self.sent[key] = kwargs

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...
    def log_graph(self, *args: Any, **kwargs: Any) -> None: ...
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...
    def save(self) -> None: ...
    def finalize(self, status: str) -> None: ...

    @property
    def save_dir(self) -> str | None:
        return None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer_with(callback: L.Callback, **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **kwargs,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_callback_draws_images_spread_over_the_set(
    tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[PanelSet] = []
    autocast: list[bool] = []

    def spy(method: Method, batch: EvalBatch, threshold: float | None) -> list[PanelSet]:
        autocast.append(torch.is_autocast_enabled("cpu"))
        drawn.extend(rows := draw_panels(method, batch, threshold))
        return rows

    monkeypatch.setattr("wsss.callbacks.pictures.draw_panels", spy)
    wandb = RecordingWandb()
    trainer = trainer_with(PictureLogger(tmp_path, 3), logger=wandb, precision=precision)
    with one_thread():
        trainer.validate(tiny(CoSA), Validated(), verbose=False)
        assert [row.name for row in drawn] == ["image_0", "image_4", "image_8"]
        assert set(autocast) == {precision == "bf16-mixed"}
        assert [p.name for p in tmp_path.iterdir()] == ["step_000000.png"]
        # The same step again: nothing new to see.
        trainer.validate(tiny(CoSA), Validated(), verbose=False)
    assert len(drawn) == 3

    sent = wandb.sent["pictures"]
    assert sent["caption"] == ["image_0", "image_4", "image_8"]
    assert sent["step"] == 0
    assert len(sent["images"]) == 3
    table = wandb.sent["iou_per_class"]
    assert table["columns"][0] == "class"
    assert "an/seg/miou_ms_flip" in table["columns"]
    assert [row[0] for row in table["data"]] == ["background", *CLASSES]
    assert {len(row) for row in table["data"]} == {len(table["columns"])}


@pytest.mark.filterwarnings("ignore")
def test_callback_keeps_to_the_images_that_are_evaluated(tmp_path: Path) -> None:
    callback = PictureLogger(tmp_path, 2)
    seen: list[str] = []
    original = callback.on_validation_end

    def spy(trainer: L.Trainer, module: L.LightningModule) -> None:
        seen.extend(row.name for row in callback._rows)
        original(trainer, module)

    callback.on_validation_end = spy  # type: ignore[method-assign, assignment]
    trainer = trainer_with(callback, logger=False, limit_val_batches=2)
    with one_thread():
        trainer.validate(tiny(CAM), Validated(), verbose=False)
    assert seen == ["image_0", "image_3"]


def test_two_thresholds_are_drawn_with_what_they_leave_undecided() -> None:
    method = tiny(CoSA, threshold=[0.3, 0.6], raw=False, csc_weight=0.0)
    found = current_threshold(method)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == pytest.approx([0.3, 0.6])
    batch = eval_batch()
    row = draw_panels(method, batch)[0]
    assert isinstance(method, CoSA)
    out = multi_scale(method.assignment, batch.images, (1.0,))
    cam = out.cam * batch.labels[:, :, None, None]
    label = two_threshold_label(cam, 0.3, 0.6)
    assert bool((label == 255).any())
    assert np.array_equal(row.panels["CPL"], overlay(row.panels["image"], label[0], 4))
