"""What all data set layouts share: scanning a split, keeping the result, and opening it.

A subclass of :class:`Layout` lists the items of a split; here their files are looked at, once, by
several threads, and the result is kept as a :class:`~wsss.data.manifest.Manifest`.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from numpy.typing import NDArray
from rich.progress import track

from wsss.data.images import (
    SHOWN,
    VOID,
    DatasetError,
    count,
    inspect_image,
    inspect_mask,
    read_mask,
    read_rgb,
    summary,
)
from wsss.data.manifest import Item, Manifest, relative, work_folder, work_folders
from wsss.data.order import evenly
from wsss.files import write_atomically

_PROGRESS_FROM = 500
#: masks that are compared with image labels
_LOOKED_AT = 64
_THREADS = min(8, os.cpu_count() or 1)

Purpose = Literal["train", "train_masks", "evaluate"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Listing:
    """The items of a split before their files are looked at.

    ``sources`` are files and folders besides the items' own that the listing depends on, and
    ``notes`` what a user should know.
    """

    items: list[Item]
    sources: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Layout(ABC):
    """A data set on disk.

    Attributes:
        kind: name of the layout.
        exif: whether images are turned as their EXIF orientation says. Data sets with masks of
            their own do not: their masks follow the stored pixels.
        root: folder of the data set.
        classes: C foreground class names; class i has mask value i + 1.
    """

    kind: ClassVar[str]
    exif: ClassVar[bool] = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()

    @cached_property
    def work(self) -> Path:
        """Folder of manifests and built files, see :func:`work_folder`."""
        return work_folder(self.root)

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]: ...

    @abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits that are there or can be built."""

    @abstractmethod
    def list_split(self, split: str) -> Listing:
        """Items of a split, derived files built if they are not there yet.

        Raises:
            DatasetError: the data set cannot be used at all; problems of single items go there.
        """

    @classmethod
    def download(cls, root: str | os.PathLike[str], **options: Any) -> Path:
        """Fetch and unpack the official archives that are not there yet.

        Args:
            root: ``data.root``.
            options: the constructor's other arguments.

        Returns:
            The root of the data set, which may lie deeper than ``root``.

        Raises:
            DatasetError: no archives can be fetched for this data set, or fetching fails.
        """
        raise DatasetError(f"download=true: data={cls.kind} has no archives that can be fetched")

    def options(self) -> dict[str, Any]:
        """Settings that decide the content of a manifest, as JSON values."""
        return {}

    def labels_from_source(self, item: Item) -> None:
        """Set ``item.labels`` from ``item.source``, or ``item.problem``."""
        raise NotImplementedError

    def labels_from_mask(self, item: Item) -> bool:
        """Whether the mask says which classes an item holds when nothing else does."""
        return True

    def masks_may_label(self) -> bool:
        """Whether image labels to train on may be read off masks."""
        return True

    # ------------------------------------------------------------------ scanning

    def prepare(self, split: str, decode: bool = False) -> Manifest:
        """The manifest of a split: the one on disk if nothing changed, else a new one.

        Args:
            split: name of the split.
            decode: look at every pixel of images and masks, not at the headers alone.

        Raises:
            DatasetError: the data set cannot be used at all.
        """
        try:
            return self._kept(split, decode) or self._made(split, decode)
        except OSError as error:  # folders that cannot be read, a disk that is full
            raise DatasetError(f"{self.root}: {error}") from error

    def _kept(self, split: str, decode: bool) -> Manifest | None:
        """The manifest on disk, if nothing changed since it was written."""
        if not self.root.is_dir():
            raise DatasetError(
                f"data root '{self.root}' is not a folder; set data.root to {self.root_hint()}"
            )
        classes, options = self.classes, self.options()
        # What somebody else prepared beside the data is read where it cannot be written.
        for folder in work_folders(self.root):
            kept = Manifest.load(folder / self._file_name(split))
            if kept is None or (decode and not kept.decoded):
                continue
            if kept.is_fresh(self.root, options, classes):
                return kept
        return None

    def _made(self, split: str, decode: bool) -> Manifest:
        path = self.work / self._file_name(split)
        with FileLock(path.with_suffix(".lock")):  # of the ranks of a run, one does the work
            manifest = self._kept(split, decode)
            if manifest is None:
                self._forget()
                manifest = self._scan(split, decode, self.options())
                manifest.save(path)
        return manifest

    def _forget(self) -> None:
        """Drop what was read before: a manifest of today must not be made of it."""
        for name in [*self.__dict__]:
            if isinstance(getattr(type(self), name, None), cached_property):
                del self.__dict__[name]

    @staticmethod
    def root_hint() -> str:
        """What ``data.root`` should be, for error messages."""
        return "the data set's folder"

    def no_labels(self, item: Item) -> str:
        """What to say of an item that nothing gives labels to."""
        return f"{self.root / item.image}: no image labels; add them or take it off the list"

    def no_mask(self, item: Item) -> str:
        """What to say of an item without a mask where masks are needed."""
        return f"{self.root / item.image}: no mask; add one or take it off the list"

    def _file_name(self, split: str) -> str:
        """One file for each split and each choice of options, so that two runs do not fight."""
        key = hashlib.sha1(f"{split} {self.options()}".encode(), usedforsecurity=False)
        plain = re.sub(r"[^\w.-]+", "_", Path(split).stem if "/" in split else split)
        return f"{self.kind}-{plain}-{key.hexdigest()[:6]}.json"

    def _scan(self, split: str, decode: bool, options: dict[str, Any]) -> Manifest:
        listing = self.list_split(split)
        # Taken before the scan: what changes during it makes the manifest out of date.
        manifest = Manifest(
            kind=self.kind,
            split=split,
            classes=self.classes,
            items=listing.items,
            options=options,
            decoded=decode,
            exif=self.exif,
            sources=sorted({relative(source, self.root) for source in listing.sources}),
            notes=listing.notes,
        )
        before = manifest.fingerprint(self.root)
        for _ in in_threads(
            lambda item: self._look(item, decode), manifest.items, f"Checking {split}"
        ):
            pass
        manifest.stamp = before
        return manifest

    def _look(self, item: Item, decode: bool) -> None:
        """Look at the files of one item: fills size and labels, or says what is wrong."""
        if item.problem is not None:
            return
        image = self.root / item.image
        size, item.problem = inspect_image(image, decode=decode, exif=self.exif)
        if size is None:
            return
        item.size = size
        if item.source is not None:
            self.labels_from_source(item)
        wanted = item.labels is None and item.source is None and self.labels_from_mask(item)
        if item.mask is None:
            return
        if item.mask_problem is not None:  # it could not be built
            if wanted:
                item.problem = item.mask_problem
            return
        mask = self.root / item.mask
        if not (decode or wanted):
            item.mask_problem = inspect_mask(mask, len(self.classes), size)
            return
        try:
            values = read_mask(mask, len(self.classes), size)
        except DatasetError as error:
            item.mask_problem = str(error)
            if wanted:
                item.problem = str(error)
            return
        counts = np.bincount(values.ravel(), minlength=VOID + 1)
        item.mask_classes = [int(i) for i in np.flatnonzero(counts[1 : len(self.classes) + 1])]
        if wanted:
            item.labels, item.labels_of_mask = item.mask_classes, True

    # ------------------------------------------------------------------ opening

    def open(
        self,
        split: str,
        purpose: Purpose = "evaluate",
        on_error: Literal["raise", "skip"] = "raise",
        min_side: int = 1,
    ) -> Split:
        """Open a split of a data set, its files checked.

        Args:
            split: name of the split.
            purpose: ``train`` needs image labels, and leaves out images without any class, with a
                warning that counts them (such an image teaches a classifier only absence);
                ``train_masks`` needs masks as well; ``evaluate`` keeps every image, and needs masks
                unless the split has none at all.
            on_error: ``skip`` leaves out images that cannot be used, with a warning that counts and
                names them; ``raise`` stops.
            min_side: images with a shorter side than this many pixels cannot be used.

        Raises:
            DatasetError: what is wrong, all problems of the split at once.
        """
        if on_error not in ("raise", "skip"):
            raise DatasetError(f"data.on_error='{on_error}': expected raise or skip")
        manifest = self.prepare(split)
        need_masks = purpose == "train_masks" or (
            purpose == "evaluate" and any(item.mask for item in manifest.items)
        )
        problems, kept = [], []
        for item in manifest.items:
            # Scores that know the image's labels would be wrong without them.
            need_labels = purpose != "evaluate" or item.mask is not None
            found = self.find_problems(
                item, need_masks, need_labels, min_side, weakly=purpose == "train"
            )
            problems += found
            if not found:
                kept.append(item)
        where = f"split '{manifest.split}' of {self.root}"
        if problems and on_error == "raise":
            raise DatasetError(
                f"{count(len(problems), 'problem')} in {where}:\n{self.listed(split, problems)}\n"
                "data.on_error=skip leaves these images out."
            )
        if problems:
            rank_zero_warn(
                f"{where}: left out {len(manifest.items) - len(kept)} of "
                f"{count(len(manifest.items), 'image')}:\n{self.listed(split, problems)}"
            )
        unlabelled = [item.name for item in kept if not item.labels]
        if purpose != "evaluate" and unlabelled:
            rank_zero_warn(
                f"{where}: left out {count(len(unlabelled), 'image')} without any labelled class:\n"
                + summary(unlabelled)
            )
            kept = [item for item in kept if item.labels]
        if not kept:
            raise DatasetError(f"{where}: no usable image is left")
        return Split(self.root, manifest, kept)

    def find_problems(
        self,
        item: Item,
        need_mask: bool,
        need_labels: bool,
        min_side: int = 1,
        weakly: bool = False,
    ) -> list[str]:
        """Why an item cannot be used, as sentences that name the file and the remedy.

        ``weakly``: for training on image labels, which should not come from the truth unasked.
        """
        if item.problem is not None:
            return [item.problem]
        problems = []
        if min(item.size) < min_side:
            problems.append(
                f"{self.root / item.image}: {item.size[1]}x{item.size[0]} pixels, the shorter side "
                f"must have data.min_side={min_side}; enlarge it or take it off the list"
            )
        leaked = weakly and item.labels_of_mask and not self.masks_may_label()
        if need_labels and (item.labels is None or leaked):
            problems.append(self.no_labels(item))
        if need_mask and item.mask is None:
            problems.append(self.no_mask(item))
        elif need_mask and item.mask_problem is not None:
            problems.append(item.mask_problem)
        return problems

    def listed(self, split: str, problems: Sequence[str]) -> str:
        """The first few problems; where there are more, all are in a file that is named.

        It lies beside the manifest, and goes once there are few.
        """
        path = self.work / self._file_name(split).replace(".json", "-problems.txt")
        if len(problems) <= SHOWN:
            path.unlink(missing_ok=True)
            return summary(problems)
        # Folder names need not be UTF-8.
        content = "".join(f"{text}\n" for text in problems).encode(errors="surrogateescape")
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
        return f"{summary(problems)}\n  all of them: {path}"


def in_threads(function: Callable[[T], R], items: Sequence[T], description: str) -> Iterator[R]:
    """``map`` over threads, in order, with a progress bar for long lists."""
    hidden = len(items) <= _PROGRESS_FROM or getattr(rank_zero_only, "rank", 0) != 0
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from track(
            pool.map(function, items),
            total=len(items),
            description=description,
            transient=True,
            disable=hidden,
        )


class Split:
    """Images, image labels and masks of one split; what a manifest says, ready to load.

    Attributes:
        classes: C foreground class names; class i has mask value i + 1.
        names: N image names, in list order.
        labels: (N, C) float32, 1 where the image holds the class.
        sizes: N image sizes (H, W).
        groups: N group names (patients), "" for none.
        has_masks: whether every image has a mask.
        left_out: number of listed images that are not here.
        notes: what a user should know: what was built, left out or assumed.
    """

    def __init__(self, root: Path, manifest: Manifest, items: list[Item]) -> None:
        self.root = root
        self.split = manifest.split
        self.classes = manifest.classes
        self.names = [item.name for item in items]
        self.sizes = [item.size for item in items]
        self.groups = [item.group for item in items]
        self.labels = np.zeros((len(items), len(self.classes)), np.float32)
        for row, item in zip(self.labels, items, strict=True):
            row[item.labels or []] = 1.0
        self.has_masks = all(item.mask is not None for item in items)
        self.left_out = len(manifest.items) - len(items)
        self.notes = tuple(manifest.notes)
        self._exif = manifest.exif
        self._images = [item.image for item in items]
        self._masks = [item.mask for item in items]

    def __len__(self) -> int:
        return len(self.names)

    def load_image(self, index: int, longest: int | None = None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of image ``index``, of lower resolution if ``longest`` allows it.

        See :func:`read_rgb` for that and for what it raises.
        """
        return read_rgb(self.root / self._images[index], self._exif, longest)

    def doubt(self) -> str | None:
        """Whether masks and image labels hardly mean the same classes, in a sentence.

        Of at most 64 masks, more than a quarter must hold classes that the labels do not.
        """
        masked = [i for i in range(len(self)) if self.has_mask(i)]
        looked = [masked[i] for i in evenly(len(masked), _LOOKED_AT)]
        others, example = 0, ""
        for index in looked:
            try:
                values = np.unique(self.load_mask(index))
            except DatasetError:
                continue  # said where it is needed
            held = {self.classes[v - 1] for v in values.tolist() if v not in (0, VOID)}
            named = {c for c, v in zip(self.classes, self.labels[index], strict=True) if v}
            if held - named:
                others += 1
                lists = [", ".join(sorted(x)) or "none" for x in (named, held)]
                example = f"{self.names[index]}: labels {lists[0]}, mask {lists[1]}"
        if others <= len(looked) / 4:
            return None
        return (
            f"split '{self.split}': {others} of {count(len(looked), 'mask')} hold classes that the "
            f"image's labels do not, such as {example}. Are the classes in the order of the mask "
            "values?"
        )

    def has_mask(self, index: int) -> bool:
        """Whether image ``index`` has a mask; nothing says that it can be read."""
        return self._masks[index] is not None

    def load_mask(self, index: int) -> NDArray[np.uint8]:
        """(H, W) uint8 with 0..C and 255. See :func:`read_mask` for what it raises."""
        path = self._masks[index]
        if path is None:
            raise DatasetError(f"image '{self.names[index]}' of {self.root} has no mask")
        return read_mask(self.root / path, len(self.classes), self.sizes[index])
