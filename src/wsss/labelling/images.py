"""The images to label: every one whose labels are known, with a mask of its own or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wsss.data.images import DatasetError, count
from wsss.data.layout import Layout, Split
from wsss.data.views import resize_image
from wsss.errors import UserError


@dataclass
class OpenedSplit:
    """A split ready to be labelled.

    Attributes:
        images: with their labels; also those without any class.
        truth: those of them that have a mask, looked at or not; None if none has.
        problems: why others cannot be used, a text an image.
        own_folders: folders of the data set that hold its images or masks.
    """

    images: Split
    truth: Split | None
    problems: list[str]
    own_folders: list[Path]


def open_split(layout: Layout, split: str, on_error: str, min_side: int) -> OpenedSplit:
    """Open a split for labelling: masks are not needed, image labels are.

    Unlike for training, images without any class stay.

    Raises:
        UserError: ``on_error`` is ``raise`` and there are problems (all are named), or no image
            can be used.
    """
    if on_error not in ("raise", "skip"):
        raise DatasetError(f"data.on_error='{on_error}': expected raise or skip")
    manifest = layout.prepare(split)
    problems, kept = [], []
    for item in manifest.items:
        found = layout.find_problems(item, need_mask=False, need_labels=True, min_side=min_side)
        if found:
            problems.append("; ".join(found))
        else:
            kept.append(item)
    where = f"split '{split}' of {layout.root}"
    if problems and on_error == "raise":
        raise DatasetError(
            f"{count(len(problems), 'problem')} in {where}:\n{layout.listed(split, problems)}\n"
            "data.on_error=skip leaves these images out."
        )
    if not kept:
        listed = layout.listed(split, problems)
        raise DatasetError(f"{where}: no image can be used:\n{listed}")
    masked = [item for item in kept if item.mask is not None]
    files = [path for item in manifest.items for path in (item.image, item.mask) if path]
    return OpenedSplit(
        images=Split(layout.root, manifest, kept),
        truth=Split(layout.root, manifest, masked) if masked else None,
        problems=problems,
        own_folders=sorted({_top_folder(path, layout.root) for path in files}),
    )


def _top_folder(path: str, root: Path) -> Path:
    """Of a file in ``root`` the folder in ``root`` that it lies in or below, else its own."""
    file = Path(path)
    if file.is_absolute() or len(file.parts) == 1:
        return (root / file).parent.resolve()
    return (root / file.parts[0]).resolve()


def refuse_own_folders(output_dir: Path, subfolders: Sequence[str], opened: OpenedSplit) -> None:
    """Keep out of the data set's own folders: its masks would be lost, or ours taken for them.

    Raises:
        UserError: the output would lie in one.
    """
    targets = [(output_dir / name).resolve() for name in subfolders]
    for folder in opened.own_folders:
        if any(target.is_relative_to(folder) for target in targets):
            raise UserError(
                f"output_dir='{output_dir}' lies in {folder}, which holds the data set's own "
                "images or masks. Choose another folder."
            )


class Batch(NamedTuple):
    """Some images.

    Attributes:
        indices: B numbers in the split.
        images: (B, 3, S, S) uint8 RGB.
        labels: (B, C) float32.
        originals: B images (H, W, 3) uint8 at their own size; empty where not asked for.
        sizes: B sizes (H, W).
        problems: of images that could not be read and are not here.
    """

    indices: list[int]
    images: Tensor
    labels: Tensor
    originals: list[Tensor]
    sizes: list[tuple[int, int]]
    problems: list[str]


class _Sample(NamedTuple):
    number: int
    image: NDArray[np.uint8]
    labels: NDArray[np.float32]
    original: NDArray[np.uint8] | None
    size: tuple[int, int]


class _Samples(Dataset["_Sample | str"]):
    """Images by their number in the split; what is wrong with one that cannot be read."""

    def __init__(self, images: Split, size: int, originals: bool) -> None:
        self.images = images
        self.size = size
        self.originals = originals

    def __getitem__(self, index: int) -> _Sample | str:
        try:
            native = self.images.load_image(index)
        except DatasetError as error:
            return str(error)
        image = resize_image(native, self.size, self.size)
        size = (native.shape[0], native.shape[1])
        labels = self.images.labels[index]
        return _Sample(index, image, labels, native if self.originals else None, size)


def _collate(found: Sequence[_Sample | str]) -> Batch:
    samples = [sample for sample in found if not isinstance(sample, str)]
    stacked = np.stack([s.image for s in samples]) if samples else np.zeros((0, 1, 1, 3), np.uint8)
    return Batch(
        indices=[sample.number for sample in samples],
        images=torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(np.array([sample.labels for sample in samples])),
        originals=[torch.from_numpy(s.original) for s in samples if s.original is not None],
        sizes=[sample.size for sample in samples],
        problems=[problem for problem in found if isinstance(problem, str)],
    )


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def load(
    images: Split,
    indices: Sequence[int],
    size: int,
    originals: bool,
    batch_size: int,
    num_workers: int,
) -> DataLoader[Batch]:
    """Batches of some images of a split, in the order of ``indices``.

    Args:
        images: the split.
        indices: numbers of its images.
        size: side S of the square that images are resized to.
        originals: also give them at their own size.
        batch_size: images of one batch.
        num_workers: loader processes.
    """
    return DataLoader(
        _Samples(images, size, originals),  # type: ignore[arg-type]
        sampler=indices,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_single_thread,
    )
