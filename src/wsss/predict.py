"""Masks for a user's own images: ``python -m wsss.predict input=photos checkpoint=...``.

An image is resized to the square of the run's evaluation and its multi-scale, flipped logits back
to its own size, as ``seg/miou_ms_flip`` is scored; nothing is known of the image. Writes for each
image a palette mask, an overlay and a JSON file.
"""

from __future__ import annotations

import errno
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from wsss import __version__
from wsss.checkpoints import find_checkpoint
from wsss.cli import as_string, hydra_command, nearest, quiet_libraries
from wsss.data.images import DatasetError, count, summary
from wsss.errors import UserError
from wsss.files import check_writable, sha256_of
from wsss.inference import Inference
from wsss.prediction.inputs import Photo, Reader, describe_others, find_images, own_pixel_limit
from wsss.prediction.outputs import Job, absolute, kept_classes, name_jobs, write_results
from wsss.prediction.segmenter import Segmenter
from wsss.report.legend import percent

#: a CRF needs all probabilities at the image's own size, and about 50 bytes for each: 4 GiB here
CRF_MAX_PIXELS = 4_000_000
#: with these no image could be written any more
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Predictions:
    """What a run of the command did.

    Attributes:
        output_dir: where the files are.
        predicted: images predicted now.
        kept: images whose results were there, made from the same file in the same way.
        others: files that have the name of a result, but are of another image, made in another
            way, or nobody knows whose; they were left as they are. One for each image.
        problems: images that could not be predicted, and why.
        shares: parts of the images that hold it, by class name; of predicted and kept images.
    """

    output_dir: Path
    predicted: int = 0
    kept: int = 0
    others: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every image has the results that were asked for."""
        return not self.others and not self.problems

    def add(self, classes: Sequence[dict[str, Any]]) -> None:
        """Count an image's ``classes``."""
        for entry in classes:
            if entry["index"]:
                self.shares.setdefault(entry["name"], []).append(entry["share"])


def predict(cfg: DictConfig) -> Predictions:
    """Predict the images of ``cfg.input``.

    Args:
        cfg: ``conf/predict.yaml`` composed.

    Raises:
        UserError: a wrong setting, no image, a checkpoint that cannot be used, a full disk, or
            no image that could be predicted.
    """
    quiet_libraries()
    warnings.filterwarnings("ignore", module="PIL")  # of metadata; broken images are named below
    check_settings(cfg)
    output_dir = Path(str(cfg.output_dir)).expanduser()
    found = find_images(str(cfg.input), output_dir)
    jobs = name_jobs(found, output_dir)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    checkpoint = find_checkpoint(str(cfg.checkpoint))
    inference = _load(cfg, checkpoint)
    segmenter = Segmenter(
        inference,
        cfg.size or inference.size,
        cfg.window,
        cfg.window_overlap,
        cfg.batch_size,
        cfg.crf,
    )
    check_writable(output_dir)
    settings = {
        "checkpoint_sha256": sha256_of(checkpoint),
        "network": inference.network_name,
        "precision": inference.precision,
        "scales": list(inference.scales),
        "size": segmenter.size,
        "window": cfg.window,
        "window_overlap": cfg.window_overlap if cfg.window else None,
        "crf": cfg.crf,
        "exif": cfg.exif,
    }
    about = {"settings": settings, "checkpoint": absolute(checkpoint), "wsss": __version__}

    console = Console(soft_wrap=True)
    done = Predictions(output_dir)
    todo = jobs if cfg.overwrite else list(_without_results(jobs, settings, done))
    console.print(
        f"{count(len(jobs), 'image')}, network '{inference.network_name}' of "
        f"{escape(_plain(str(checkpoint)))} on {inference.device}",
        highlight=False,
    )
    too_large = f"more than max_pixels={cfg.max_pixels}: raise it if there is memory for them"
    if cfg.crf and cfg.max_pixels > CRF_MAX_PIXELS:
        too_large = f"and a CRF takes up to {CRF_MAX_PIXELS}: use crf=null"
    reader = Reader(
        segmenter.size,
        cfg.exif,
        min(cfg.max_pixels, CRF_MAX_PIXELS) if cfg.crf else cfg.max_pixels,
        too_large,
        cfg.overlay_size,
        keep_native=bool(cfg.window or cfg.crf),
    )
    try:
        with (
            own_pixel_limit(),
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task("Predicting", total=len(todo))

            def step(part: float) -> None:
                progress.advance(task, part)

            _run(todo, reader, segmenter, about, cfg.workers, done, step)
    except KeyboardInterrupt:
        console.print(
            f"Stopped: {done.predicted} of {len(todo)} are written to "
            f"{escape(_plain(str(output_dir)))}; with overwrite=false the command goes on there.",
            highlight=False,
        )
        raise
    if not (done.predicted or done.kept or done.others):
        raise UserError(
            f"input='{cfg.input}': none of {count(len(jobs), 'image')} could be predicted:\n"
            f"{_plain(summary(done.problems))}"
        )
    _tell(console, done, found.passed_over)
    return done


def _load(cfg: DictConfig, checkpoint: Path) -> Inference:
    scales = [cfg.scales] if isinstance(cfg.scales, int | float) else cfg.scales
    inference = Inference.load(checkpoint, cfg.network, cfg.device, cfg.precision, scales)
    if not inference.has_segmentation:
        raise UserError(
            f"checkpoint='{checkpoint}': method={inference.method.short_name()} trains no "
            "segmentation. Its CAMs need to know which classes an image holds. Take a checkpoint "
            "of cosa, supervised or cam with method.segment=true, or make masks of labelled images "
            "with wsss pseudo_label."
        )
    if len(inference.classes) > 255:
        raise UserError(
            f"checkpoint='{checkpoint}' knows {len(inference.classes)} classes; a palette mask "
            "holds 255."
        )
    return inference


def check_settings(cfg: DictConfig) -> None:
    """Refuse values that make no sense before anything is read.

    Raises:
        UserError: names the key.
    """
    for key, example in (("input", "input=photos"), ("checkpoint", "checkpoint=outputs/...")):
        if OmegaConf.is_missing(cfg, key) or cfg[key] is None:
            raise UserError(f"{key} is not set: give one, for example {example}")
    for key, least in (
        ("size", 16),
        ("window", 16),
        ("max_pixels", 1),
        ("overlay_size", 16),
        ("batch_size", 1),
        ("workers", 1),
        ("threads", 1),
    ):
        value = cfg[key]
        if value is None and key in ("size", "window", "threads"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{key}={value}: give a whole number from {least}")
    for key in ("overwrite", "exif"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]}: give true or false")
    overlap = cfg.window_overlap
    if not isinstance(overlap, int | float) or not 0 <= overlap <= 0.9:
        raise UserError(f"window_overlap={overlap}: give a number from 0 to 0.9")
    scales = [cfg.scales] if isinstance(cfg.scales, int | float) else cfg.scales
    if scales is not None and not scales:
        raise UserError("scales=[]: give at least one, such as [1.0]")
    for scale in scales or []:
        if not isinstance(scale, int | float) or not 0.1 <= scale <= 10:
            raise UserError(f"scales={cfg.scales}: give factors from 0.1 to 10, such as [1.0,0.5]")
    if cfg.crf is not None:
        _check_crf(str(cfg.crf), cfg.window)


def _check_crf(preset: str, window: int | None) -> None:
    from wsss.pseudo import CRF_PRESETS, dense_crf

    if preset not in CRF_PRESETS:
        raise UserError(f"crf={preset}: no such preset. {nearest(preset, CRF_PRESETS)}")
    if window is not None:
        raise UserError("crf and window do not go together: a CRF needs all logits at once")
    # Says what is missing before any image is read.
    dense_crf(np.zeros((8, 8, 3), np.uint8), np.full((2, 8, 8), 0.5, np.float32), preset)


def _run(
    jobs: Iterable[Job],
    reader: Reader,
    segmenter: Segmenter,
    about: dict[str, Any],
    workers: int,
    done: Predictions,
    step: Callable[[float], None],
) -> None:
    """Read, predict and write; reading and writing go on in threads while the network works."""
    readers, writers = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
    writing: deque[tuple[Job, Future[list[dict[str, Any]]]]] = deque()

    def finish(most: int) -> None:
        while len(writing) > most:
            job, future = writing.popleft()
            try:
                done.add(future.result())
                done.predicted += 1
            except OSError as error:
                if error.errno in _FULL:
                    raise UserError(
                        f"output_dir='{done.output_dir}': {error.strerror} after {done.predicted} "
                        "images, which are whole. Make room; with overwrite=false the same command "
                        "goes on there."
                    ) from error
                done.problems.append(f"{job.image}: cannot write its results ({error})")

    def segment(batch: list[tuple[Job, Photo]]) -> None:
        maps = segmenter([photo for _, photo in batch], step)
        for (job, photo), labels in zip(batch, maps, strict=True):
            writing.append(
                (job, writers.submit(write_results, job, photo, labels, segmenter.classes, about))
            )
            finish(most=workers)

    try:
        batch: list[tuple[Job, Photo]] = []
        # Large images are held at their own size: one is read while another is predicted.
        ahead = 1 if segmenter.window else segmenter.batch_size + workers
        for job, reading in _read_ahead(readers, reader, jobs, ahead):
            try:
                batch.append((job, reading.result()))
            except (DatasetError, MemoryError) as error:
                done.problems.append(str(error) or f"{job.image}: not enough memory to decode it")
                step(1)
            if len(batch) == segmenter.photos_at_once:
                segment(batch)
                batch = []
        if batch:
            segment(batch)
        finish(most=0)
    finally:
        # After an interruption or an error, what is predicted is still written.
        readers.shutdown(cancel_futures=True)
        writers.shutdown()
        done.predicted += sum(future.exception() is None for _, future in writing)


def _read_ahead(
    pool: ThreadPoolExecutor, reader: Reader, jobs: Iterable[Job], ahead: int
) -> Iterator[tuple[Job, Future[Photo]]]:
    """Jobs in order with their images, of which ``ahead`` more are being read."""
    waiting: deque[tuple[Job, Future[Photo]]] = deque()
    for job in jobs:
        waiting.append((job, pool.submit(reader, job.image)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _without_results(
    jobs: Iterable[Job], settings: dict[str, Any], done: Predictions
) -> Iterator[Job]:
    """The jobs that have no results; the results of the others are counted.

    A file is replaced only if we wrote it for this image: the JSON beside it says so, or the mark
    of an interrupted run. A mask drawn by hand has neither.
    """
    for job in jobs:
        found = job.outputs.found()
        if not found or job.outputs.mark.exists():
            yield job
            continue
        classes = kept_classes(job, settings)
        if classes is None:
            done.others.append(str(found[0]))
        elif len(found) < len(job.outputs.files):
            yield job
        else:
            done.kept += 1
            done.add(classes)


def _tell(console: Console, done: Predictions, passed_over: tuple[Path, ...]) -> None:
    """Print what was found, and what was not predicted."""

    def say(text: str, style: str = "") -> None:
        console.print(escape(_plain(text)), highlight=False, style=style)

    if done.shares:
        table = Table(title="Classes found", title_justify="left")
        table.add_column("class", no_wrap=True)
        table.add_column("images", justify="right")
        table.add_column("mean share of these", justify="right")
        for name, shares in sorted(done.shares.items(), key=lambda item: -len(item[1])):
            table.add_row(escape(name), str(len(shares)), percent(sum(shares) / len(shares)))
        console.print(table)
    elif done.predicted or done.kept:
        say("No class was found: background alone.")
    say(f"{count(done.predicted, 'image')} predicted.")
    if done.kept:
        say(f"{done.kept} kept from an earlier run.")
    if passed_over:
        say(f"Passed over: {describe_others(passed_over)}.")
    if done.others:
        say(
            f"{count(len(done.others), 'image')} not predicted: where the results belong there are "
            "files of another image, checkpoint or setting, or of your own. They are left as "
            "found; choose another output_dir, or replace them with overwrite=true:\n"
            f"{summary(done.others)}",
            "yellow",
        )
    if done.problems:
        lines = "\n".join(f"  - {problem}" for problem in done.problems)  # all: each needs mending
        say(f"{count(len(done.problems), 'image')} not predicted:\n{lines}", "red")
    say(f"Results: {done.output_dir}")


def _plain(text: str) -> str:
    """Text that can be printed: file names may hold bytes that are no characters."""
    return text.encode("utf-8", "replace").decode()


def as_text(argument: str) -> str:
    """``key=path`` with the path quoted: all of it is a name here, a comma or bracket too."""
    key, _, value = argument.partition("=")
    if key not in ("input", "checkpoint", "output_dir") or not value:
        return argument
    return f"{key}={as_string(value)}"


def _command(cfg: DictConfig) -> None:
    try:
        complete = predict(cfg).complete
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if not complete:
        raise SystemExit(1)


def main() -> None:
    """Console entry point."""
    sys.argv[1:] = map(as_text, sys.argv[1:])
    hydra_command("predict", _command)


if __name__ == "__main__":
    main()
