"""Pictures of finished runs: the same images through every run, and each run's worst and best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from omegaconf import DictConfig

from wsss.build import build_data, plain_config, restore_method
from wsss.checkpoints import read_checkpoint, saved_config
from wsss.data.batch import EvalBatch
from wsss.data.datamodule import WSSSDataModule
from wsss.data.images import VOID
from wsss.data.views import resize_image
from wsss.errors import UserError
from wsss.methods.base import Method, check_classes
from wsss.report.comparison import in_order
from wsss.report.pictures import PanelSet, draw_panels, scored_threshold, spread_over_classes
from wsss.report.records import read_image_scores, worst_and_best
from wsss.report.runs import Run

#: settings of ``data`` that decide which validation images there are
_DATA_KEYS = ("dataset", "root", "val_split", "max_val_images", "on_error", "min_side")


@dataclass(frozen=True)
class Picture:
    """One image as one or more runs see it.

    Attributes:
        panels: its pictures, square as the network sees them.
        size: (H, W) of the image in the data set.
        rank: "worst" or "best" of a run's images, "" for one of those spread over the set.
        score: that says so, in percent.
    """

    panels: PanelSet
    size: tuple[int, int]
    rank: str = ""
    score: float | None = None


@dataclass
class Drawing:
    """What :func:`draw_runs` drew.

    Attributes:
        classes: foreground names.
        shared: the same images through every run.
        own: for each run, the images that it is worst and best at.
        protocols: for each run, the score that says so; None where no score by image was kept, so
            that ``own`` has the shared images.
    """

    classes: tuple[str, ...] = ()
    shared: list[Picture] = field(default_factory=list)
    own: list[list[Picture]] = field(default_factory=list)
    protocols: list[str | None] = field(default_factory=list)


def draw_runs(
    runs: Sequence[Run], titles: Sequence[str], count: int, data_root: str | None = None
) -> Drawing:
    """Draw validation images with the last weights of every run.

    ``shared`` has image and truth, then every run's prediction and, if it has CAMs, its CPL: a CoSA
    run gets both columns, a supervised one the prediction, a CAM one the CPL. Its images are spread
    over the first run's validation images and their classes; each run sees them at its own size.
    ``own`` has all panels of one run, on the images that its ``images.csv`` puts last and first.

    Args:
        runs: with checkpoints.
        titles: names of the runs, all different.
        count: images to draw of ``shared``, and of each run.
        data_root: where the data set lies; None: where the runs found it.

    Raises:
        UserError: a checkpoint that cannot be read or is of other classes, no data set, or one
            without an image of ``images.csv``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened: dict[str, WSSSDataModule] = {}
    first: WSSSDataModule | None = None
    drawing = Drawing()
    for run, title in zip(runs, titles, strict=True):
        checkpoint = read_checkpoint(run.checkpoint)
        cfg = saved_config(checkpoint, run.checkpoint)
        if first is None:
            first = _open_once(cfg, data_root, opened)
            drawing.classes = first.classes
        check_classes(checkpoint, first.classes, str(run.checkpoint))
        if checkpoint.get("global_step") != run.content.get("step"):
            title = f"{title} at step {checkpoint.get('global_step')}"  # not what was scored
        method = restore_method(checkpoint, cfg, run.checkpoint).to(device)
        size = int(cfg.data.eval_size)

        indices = first.val_indices()
        assert first.val_images is not None
        positions = spread_over_classes([first.val_images.labels[i] for i in indices], count)
        pictures = [draw_image(method, first, indices[i], size) for i in positions]
        _add_columns(drawing.shared, pictures, title)

        scores = read_image_scores(run.folder, in_order(run.content["scores"]))
        if scores is not None:
            data = _open_once(cfg, data_root, opened)
            check_classes(checkpoint, data.classes, str(run.checkpoint))
            drawn = dict(zip(positions, pictures, strict=True)) if data is first else {}
            pictures = _draw_chosen(run, method, data, size, scores[1], count, drawn)
        drawing.own.append(pictures)
        drawing.protocols.append(None if scores is None else scores[0])
    return drawing


def _add_columns(shared: list[Picture], pictures: Sequence[Picture], title: str) -> None:
    for i, picture in enumerate(pictures):
        panels = picture.panels.panels
        if i == len(shared):
            same = {key: panels[key] for key in ("image", "truth")}
            shared.append(replace(picture, panels=replace(picture.panels, panels=same)))
        for key in ("prediction", "CPL"):
            if key in panels:
                shared[i].panels.panels[f"{title} {key}"] = panels[key]


def _draw_chosen(
    run: Run,
    method: Method,
    data: WSSSDataModule,
    size: int,
    scores: dict[str, float],
    count: int,
    drawn: dict[int, Picture],
) -> list[Picture]:
    """The images with the lowest and highest scores; ``drawn`` are ready, by position."""
    assert data.val_images is not None
    indices = data.val_indices()
    position = {data.val_images.names[index]: i for i, index in enumerate(indices)}
    pictures = []
    for rank, names in zip(("worst", "best"), worst_and_best(scores, count), strict=True):
        for name in names:
            if name not in position:
                raise UserError(
                    f"'{run.folder / 'images.csv'}' has scores of '{name}', which is not among the "
                    f"validation images of {data.root}. Say where the run's data set is with "
                    "data_root=..., or leave the pictures out with pictures=0."
                )
            i = position[name]
            picture = drawn.get(i) or draw_image(method, data, indices[i], size)
            pictures.append(replace(picture, rank=rank, score=scores[name]))
    return pictures


def draw_image(method: Method, data: WSSSDataModule, index: int, size: int) -> Picture:
    """All panels of one validation image.

    Args:
        method: in eval mode.
        data: set up.
        index: into ``data.val_images``.
        size: inference size of the run.
    """
    batch = eval_batch(data, index, size, method.device)
    height, width = batch.masks[0].shape
    # At the threshold of the scores, so that table and picture speak of the same labels.
    threshold = scored_threshold(method) if method.evaluates_cam else None
    return Picture(draw_panels(method, batch, threshold)[0], (height, width))


def _open_once(
    cfg: DictConfig, root: str | None, opened: dict[str, WSSSDataModule]
) -> WSSSDataModule:
    """:func:`open_data`, but runs on the same images share them."""
    if root is not None:
        cfg.data.root = root
    settings = plain_config(cfg)["data"]
    key = json.dumps([settings.get(name) for name in _DATA_KEYS])
    if key not in opened:
        opened[key] = open_data(cfg)
    return opened[key]


def open_data(cfg: DictConfig) -> WSSSDataModule:
    """The validation images of a run.

    Raises:
        UserError: they are not there.
    """
    try:
        data = build_data(cfg)
        data.setup("validate")
    except (UserError, ValueError, OSError) as error:
        raise UserError(
            f"the runs' data set cannot be read: {error}. If it has moved, say where it is with "
            "data_root=..., or leave the pictures out with pictures=0."
        ) from error
    return data


def eval_batch(data: WSSSDataModule, index: int, size: int, device: torch.device) -> EvalBatch:
    """One validation image as evaluation sees it, at the inference size of a run.

    The mask of an image without one is void.
    """
    images = data.val_images
    assert images is not None
    native = images.load_image(index)
    image = resize_image(native, size, size)
    mask = np.full(native.shape[:2], VOID) if not images.has_masks else images.load_mask(index)
    return EvalBatch(
        images=torch.from_numpy(image).permute(2, 0, 1)[None].to(device),
        labels=torch.from_numpy(images.labels[index])[None].to(device),
        masks=[torch.from_numpy(mask.astype(np.int64)).to(device)],
        names=[images.names[index]],
    )
