"""Pseudo-labels of labelled images as masks: ``python -m wsss.pseudo_label checkpoint=...``.

For a second stage that is trained on them. The image labels are known: CPL are the CAMs of the
image's classes cut at a threshold, SPL the largest segmentation logit among background and those
classes, both at the image's own size.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from wsss import __version__
from wsss.build import build_layout, restore_method
from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_config, with_data
from wsss.cli import hydra_command, quiet_libraries
from wsss.data.images import DatasetError, count, encode_mask, summary
from wsss.data.layout import Split
from wsss.errors import UserError
from wsss.files import check_writable, sha256_of, write_atomically
from wsss.inference import Inference, find_device, precision_after
from wsss.labelling.affinity import AffinityRun
from wsss.labelling.folder import COMMON, LabelFolder
from wsss.labelling.images import OpenedSplit, load, open_split, refuse_own_folders
from wsss.labelling.recipe import SOURCES, Recipe
from wsss.labelling.settings import (
    check_choices,
    choose_kinds,
    choose_recipe,
    describe,
    part_of,
)
from wsss.labelling.summary import print_summary, summarise
from wsss.methods.base import check_classes


@dataclass
class Labelled:
    """What a run of the command did.

    Attributes:
        folder: where the files are.
        written: images written now.
        kept: images that had their files.
        problems: images that could not be used, and why.
        results: by kind, see :func:`~wsss.labelling.summary.summarise`; of the images of the split
            that have their files.
        complete: whether all have, but for those that cannot be read.
    """

    folder: LabelFolder
    written: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    complete: bool = False


def pseudo_label(cfg: DictConfig) -> Labelled:
    """Write pseudo-labels of ``cfg.split``.

    Args:
        cfg: ``conf/pseudo_label.yaml`` composed.

    Raises:
        UserError: a wrong setting, a checkpoint or data that cannot be used, a folder that holds
            files of other settings or belongs to the data set, or a disk that is full.
    """
    quiet_libraries()
    check_choices(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    path = find_checkpoint(str(cfg.checkpoint))
    checkpoint = read_checkpoint(path)
    run = merge(saved_config(checkpoint, path), cfg)
    layout = build_layout(run)
    check_classes(checkpoint, layout.classes, str(path))
    method = restore_method(checkpoint, run, path)
    inference = Inference(
        method, cfg.network, cfg.device, run.trainer.precision, cfg.eval_scales, cfg.cam_scales
    )
    kinds = choose_kinds(cfg, inference)
    affinity = None
    if cfg.refine == "affinity":
        affinity = AffinityRun(
            str(cfg.affinity),
            layout.classes,
            inference.device,
            float(cfg.affinity_beta),
            cfg.affinity_logt,
        )
    recipe = choose_recipe(cfg, method, affinity)
    split = str(cfg.split or run.data.train_split)
    opened = open_split(layout, split, run.data.on_error, run.data.min_side)
    images = opened.images

    output_dir = Path(cfg.output_dir or default_folder(path, split)).expanduser()
    refuse_own_folders(output_dir, kinds, opened)
    check_writable(output_dir)
    folder = LabelFolder(output_dir)
    labels = {
        name: ";".join(np.asarray(images.classes)[row > 0])
        for name, row in zip(images.names, images.labels, strict=True)
    }
    settings = {
        COMMON: {
            "checkpoint_sha256": sha256_of(path),
            "network": inference.network_name,
            "split": split,
            "classes": images.classes,
            "size": inference.size,
            "precision": inference.precision,
        },
        **describe(inference, recipe, kinds),
    }
    about = {
        "wsss": __version__,
        "checkpoint": str(path.resolve()),
        "step": checkpoint.get("global_step"),
        "data": str(layout.root.resolve()),
        **({} if affinity is None else {"affinity": str(affinity.path.resolve())}),
    }
    mine = images.names[part_of(cfg.shard)]
    todo = folder.claim(settings, labels, about, mine, cfg.overwrite)
    done = Labelled(folder, kept=len(mine) - len(todo), problems=[*opened.problems])

    console = Console(soft_wrap=True)
    cut = recipe.alpha or dict.fromkeys((recipe.low, recipe.high))
    at = ("alpha " if recipe.alpha else "threshold ") + " and ".join(f"{x:.4g}" for x in cut)
    console.print(
        f"{count(len(mine), 'image')} of split '{escape(split)}'"
        + (f" (shard {cfg.shard} of {len(images)})" if cfg.shard else "")
        + f", network '{inference.network_name}' of {escape(str(path))} on {inference.device}"
        + (f", {at}" if "cpl" in kinds else ""),
        highlight=False,
    )
    try:
        write(done, todo, images, run.data, inference, recipe, kinds, console)
    except KeyboardInterrupt:
        console.print(
            f"Stopped: {done.written} of {len(todo)} are written to {escape(str(output_dir))}; "
            "the same command goes on there."
            + (" Leave out overwrite=true." if cfg.overwrite else ""),
            highlight=False,
        )
        raise SystemExit(130) from None
    finish(done, opened, kinds, inference.network_name, recipe, console)
    return done


def merge(saved: DictConfig, cfg: DictConfig) -> DictConfig:
    """The training run's configuration with what the command changes."""
    run = with_data(saved, cfg.data)
    run.data.on_error = run.data.get("on_error") or "raise"
    run.data.min_side = run.data.get("min_side") or 1
    device = find_device(cfg.device)
    run.trainer.precision = cfg.precision or precision_after(run.trainer.precision, device)
    return run


def default_folder(checkpoint: Path, split: str) -> Path:
    """``pseudo_labels/SPLIT`` in the run's folder; of a list's path, its stem."""
    run = checkpoint.parent
    run = run.parent if run.name == "checkpoints" else run
    return run / "pseudo_labels" / (Path(split).stem if "/" in split else split)


def write(
    done: Labelled,
    todo: Sequence[str],
    images: Split,
    data: DictConfig,
    inference: Inference,
    recipe: Recipe,
    kinds: Sequence[str],
    console: Console,
) -> None:
    """Label images and write their files; ``done`` follows image by image.

    Raises:
        UserError: an image cannot be read and ``data.on_error`` is ``raise``, or a file cannot be
            written.
    """
    position = {name: i for i, name in enumerate(images.names)}
    loader = load(
        images,
        [position[name] for name in todo],
        inference.size,
        recipe.refine != "none",
        data.eval_batch_size,
        data.num_workers,
    )
    start = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Labelling", total=len(todo))
        for batch in loader:
            if batch.problems and data.on_error == "raise":
                raise DatasetError(
                    f"{summary(batch.problems)}\ndata.on_error=skip leaves such images out."
                )
            done.problems += batch.problems
            progress.advance(task, len(batch.problems))
            if not batch.indices:
                continue
            output = inference(
                batch.images,
                segmentation="spl" in kinds,
                cam=kinds != ["spl"],
                labels=batch.labels,
            )
            for i, index in enumerate(batch.indices):
                classes = batch.labels[i].nonzero().flatten().to(inference.device)
                original = batch.originals[i] if batch.originals else None
                files: dict[str, bytes] = {}
                if kinds != ["spl"]:
                    cam = recipe.cam(output, i, classes)
                if "cpl" in kinds:
                    files["cpl"] = encode_mask(recipe.cpl(cam, classes, batch.sizes[i], original))
                if "spl" in kinds:
                    assert output.seg_logits is not None
                    logits = output.seg_logits[i]
                    files["spl"] = encode_mask(
                        recipe.spl(logits, classes, batch.sizes[i], original)
                    )
                if "cam" in kinds:
                    files["cam"] = encode_cam(cam, classes, images.classes)
                for kind, content in files.items():
                    save(done, kind, images.names[index], content)
                done.written += 1
                progress.advance(task)
    if done.written:
        seconds = time.perf_counter() - start
        console.print(
            f"{count(done.written, 'image')} in {seconds:.0f} s, {done.written / seconds:.2f} a "
            "second.",
            highlight=False,
        )


def encode_cam(cam: Tensor, classes: Tensor, names: Sequence[str]) -> bytes:
    """CAMs of one image as a compressed npz file.

    Args:
        cam: (K, S, S) in [0, 1], stored as float16.
        classes: (K,) indices 0..C-1, stored as int64.
        names: C class names; those of ``classes`` are stored.
    """
    buffer = io.BytesIO()
    indices = classes.cpu().numpy()
    np.savez_compressed(
        buffer,
        cam=cam.cpu().numpy().astype(np.float16),
        classes=indices,
        names=np.array([names[i] for i in indices], dtype=np.str_),
    )
    return buffer.getvalue()


def save(done: Labelled, kind: str, name: str, content: bytes) -> None:
    """Write one file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    path = done.folder.path(kind, name)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). {count(done.written, 'image')} of this "
            "run are written and whole: make room, and the same command goes on there (without "
            "overwrite=true)."
        ) from error


def finish(
    done: Labelled,
    opened: OpenedSplit,
    kinds: Sequence[str],
    network: str,
    recipe: Recipe,
    console: Console,
) -> None:
    """Sum up what the files hold and print it; record it once every image has its files."""
    images = opened.images
    without = int((images.labels.sum(1) == 0).sum())
    there = [i for i, name in enumerate(images.names) if done.folder.has(kinds, name)]
    lacking = len(images) - len(there)
    console.print(
        f"{done.written} written, {done.kept} there already, {len(done.problems)} left out.",
        highlight=False,
    )
    if without:
        console.print(f"Without any class, so all background: {without}.", highlight=False)
    suffix = "" if recipe.refine == "none" else f"_{recipe.refine}"
    for kind, prefix in (("cpl", SOURCES[recipe.source]), ("spl", "seg_given_tags")):
        if kind in kinds and there:
            score = f"{network}/{prefix}/miou_ms_flip{suffix}"
            done.results[kind] = summarise(done.folder, kind, images, there, opened.truth, score)
    if done.results:
        print_summary(done.results, images, there, console)
    done.complete = lacking <= len(done.problems) - len(opened.problems)
    if done.complete:
        more = {"without_class": without, "left_out": len(done.problems)}
        done.folder.record_results({kind: found | more for kind, found in done.results.items()})
    else:
        console.print(
            f"{lacking} of {len(images)} images of the split have no files yet, and are not in "
            "these figures.",
            highlight=False,
        )
    if done.problems:
        console.print(
            f"[red]{count(len(done.problems), 'image')} left out:[/]\n"
            f"{escape(summary(done.problems))}",
            highlight=False,
        )
    console.print(f"Written to {escape(str(done.folder.root))}", highlight=False)


def _command(cfg: DictConfig) -> None:
    if pseudo_label(cfg).problems:
        raise SystemExit(1)


def main() -> None:
    """Console entry point."""
    hydra_command("pseudo_label", _command)


if __name__ == "__main__":
    main()
