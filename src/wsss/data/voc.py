"""PASCAL VOC 2012 tree: image lists, images, image labels and masks.

Nothing is decoded twice and nothing is discovered late: the constructor walks over the list once,
looks at every file the run will need (headers only, unless labels come from masks), gathers all
problems, and raises one :class:`DatasetError` that names them.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from wsss.data.images import (
    IMAGE_SUFFIXES,
    VOID,
    DatasetError,
    count,
    inspect_image,
    nearest,
    read_mask,
    read_rgb,
    size_problem,
    summary,
)

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 foreground classes of PASCAL VOC in mask order: class i has mask value i + 1."""

_PROGRESS_FROM = 2000


# ----------------------------------------------------------------------------------- lists


def _list_entry(line: str) -> str:
    """Image name of one list line; also takes ``/JPEGImages/x.jpg /SegmentationClass/x.png``."""
    columns = line.split()
    paths = [c for c in columns if "/" in c or c.endswith(IMAGE_SUFFIXES)]
    entry = columns[0] if len(columns) == 2 == len(paths) else line.strip()
    name = entry.rsplit("/", 1)[-1]
    suffix = next((s for s in IMAGE_SUFFIXES if name.endswith(s)), "")
    return name.removesuffix(suffix)


def _read_names(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [_list_entry(line) for line in lines if line.strip()]


@dataclass
class _Record:
    """What one pass over the files of an image found."""

    name: str
    image: Path | None = None
    mask: Path | None = None
    size: tuple[int, int] = (0, 0)
    present: set[int] = field(default_factory=set)  # class indices 0..C-1
    bad_image: str | None = None
    problems: list[str] = field(default_factory=list)


class VOC:
    """Images, image labels and masks of one split of a VOC 2012 tree.

    ::

        root/JPEGImages/NAME.jpg                 (.jpeg and .png are taken too)
        root/ImageSets/Segmentation/SPLIT.txt    one name a line
        root/Annotations/NAME.xml                image labels
        root/SegmentationClassAug/NAME.png       masks; what it lacks is sought in
        root/SegmentationClass/NAME.png
        root/classes.txt                         foreground names; optional, default VOC's 20

    Image labels: every object of an XML counts, ``difficult`` ones too (then XML and mask agree
    on VOC). EXIF orientation is never applied, because masks follow the stored pixels.

    Args:
        root: the folder that holds ``JPEGImages``.
        split: list in ``ImageSets/Segmentation``, for example ``train_aug`` or ``val``.
        names: image names, or the path of a list file, to use instead of the split's list.
        image_labels: ``xml``, ``mask``, or ``auto``: the XML where there is one, else the mask.
        load_masks: whether the run needs masks; they are then checked for existence and size.
        skip_unlabelled: leave out images without a foreground class, with a warning that
            counts them. Training does (such an image teaches a classifier only absence);
            evaluation keeps them.
        on_bad_image: ``skip`` leaves out image files that are missing, empty, truncated or
            unreadable, with a warning that names them; ``error`` stops.

    Attributes:
        classes: foreground class names; class i has mask value i + 1.
        names: N image names, in list order.
        labels: (N, C) float32, 1 where the image holds the class.
        sizes: N image sizes (H, W).

    Raises:
        DatasetError: anything wrong with the tree, all problems of the list at once.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        names: Sequence[str] | str | os.PathLike[str] | None = None,
        image_labels: Literal["auto", "xml", "mask"] = "auto",
        load_masks: bool = False,
        skip_unlabelled: bool = False,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        if image_labels not in ("auto", "xml", "mask"):
            raise DatasetError(f"image_labels='{image_labels}': expected auto, xml or mask")
        if on_bad_image not in ("error", "skip"):
            raise DatasetError(f"on_bad_image='{on_bad_image}': expected error or skip")
        self.root = Path(root).expanduser()
        self.split = split.removesuffix(".txt")
        self._image_labels = image_labels
        self._check_tree(load_masks, needs_list=names is None)
        self.classes = self._read_classes()
        self._class_index = {name: index for index, name in enumerate(self.classes)}
        self._mask_folders = [folder for folder in self._mask_candidates() if folder.is_dir()]

        listed = self._listed_names(names)
        watched = track(
            listed,
            description=f"Reading {self.split}",
            transient=True,
            disable=len(listed) <= _PROGRESS_FROM or getattr(rank_zero_only, "rank", 0) != 0,
        )
        records = [self._inspect(name, load_masks) for name in watched]
        records = self._report(records, on_bad_image, skip_unlabelled)

        self.names = [record.name for record in records]
        self.sizes = [record.size for record in records]
        self.labels = np.zeros((len(records), len(self.classes)), np.float32)
        for row, record in zip(self.labels, records, strict=True):
            row[list(record.present)] = 1.0
        self._images = [record.image for record in records]
        self._masks = [record.mask for record in records]

    def __len__(self) -> int:
        return len(self.names)

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of image ``index``. See :func:`read_rgb` for what it raises."""
        path = self._images[index]
        assert path is not None  # records without an image never reach here
        return read_rgb(path)

    def load_mask(self, index: int) -> NDArray[np.uint8]:
        """(H, W) uint8 with 0..C and 255. See :func:`read_mask` for what it raises."""
        path = self._masks[index] or self._find_mask(self.names[index])
        if path is None:
            raise DatasetError(self._mask_missing(self.names[index]))
        return read_mask(path, len(self.classes), self.sizes[index])

    # ------------------------------------------------------------------ reading the tree

    def _mask_candidates(self) -> list[Path]:
        return [self.root / "SegmentationClassAug", self.root / "SegmentationClass"]

    def _check_tree(self, load_masks: bool, needs_list: bool) -> None:
        root = self.root
        if not root.is_dir():
            raise DatasetError(
                f"data root '{root}' is not a folder; set data.root to the VOC2012 folder, "
                "the one that holds JPEGImages"
            )
        missing = []
        if not (root / "JPEGImages").is_dir():
            missing.append(f"{root / 'JPEGImages'}: the images, NAME.jpg")
        if needs_list and not (root / "ImageSets/Segmentation").is_dir():
            missing.append(f"{root / 'ImageSets/Segmentation'}: the image lists, SPLIT.txt")
        has_xml = (root / "Annotations").is_dir()
        has_masks = any(folder.is_dir() for folder in self._mask_candidates())
        masks = f"{root / 'SegmentationClassAug'} (or SegmentationClass): the masks, NAME.png"
        if (load_masks or self._image_labels == "mask") and not has_masks:
            missing.append(masks)
        if self._image_labels == "xml" and not has_xml:
            missing.append(f"{root / 'Annotations'}: the image labels, NAME.xml")
        if self._image_labels == "auto" and not (has_xml or has_masks):
            missing.append(f"{root / 'Annotations'}: the image labels, NAME.xml (or masks)")
        if missing:
            below = sorted(path.parent for path in root.glob("*/JPEGImages"))
            below += sorted(path.parent for path in root.glob("*/*/JPEGImages"))
            hint = f"\nDid you mean data.root={below[0]} ?" if below else ""
            raise DatasetError(
                f"'{root}' is not a whole VOC tree; missing:\n{summary(missing)}{hint}"
            )

    def _read_classes(self) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        if not path.is_file():
            return VOC_CLASSES
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        classes = tuple(line.strip() for line in lines if line.strip())
        if not classes or len(set(classes)) != len(classes):
            raise DatasetError(f"{path}: needs one foreground class name a line, each once")
        if "background" in classes:
            raise DatasetError(f"{path}: remove 'background'; it is always value 0, unlisted")
        if len(classes) >= VOID:
            raise DatasetError(
                f"{path}: {len(classes)} classes, at most {VOID - 1} fit an 8-bit mask"
            )
        return classes

    def _listed_names(self, names: Sequence[str] | str | os.PathLike[str] | None) -> list[str]:
        if names is None:
            folder = self.root / "ImageSets/Segmentation"
            path = folder / f"{self.split}.txt"
            if not path.is_file():
                there = sorted(file.stem for file in folder.glob("*.txt"))
                close = nearest(self.split, there) if there else "the folder holds no list"
                hint = ""
                if self.split == "train_aug":
                    hint = (
                        ". train_aug comes with SegmentationClassAug, not with the VOC download; "
                        "data.train_split=train uses VOC's own 1464 images"
                    )
                raise DatasetError(
                    f"{path}: no such image list; there are: {', '.join(there) or 'none'} "
                    f"({close}){hint}"
                )
            source, listed = str(path), _read_names(path)
        elif isinstance(names, (str, os.PathLike)):
            path = Path(names).expanduser()
            if not path.is_file():
                raise DatasetError(f"{path}: no such image list")
            source, listed = str(path), _read_names(path)
        else:
            source, listed = "names", list(names)
        if not listed:
            raise DatasetError(f"{source}: the image list is empty")
        if len(set(listed)) != len(listed):
            seen: set[str] = set()
            twice = [name for name in listed if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
            raise DatasetError(
                f"{source}: images listed more than once; remove the repeated lines:\n"
                + summary(twice)
            )
        return listed

    def _find_mask(self, name: str) -> Path | None:
        paths = (folder / f"{name}.png" for folder in self._mask_folders)
        return next((path for path in paths if path.is_file()), None)

    def _mask_missing(self, name: str) -> str:
        folder = (self._mask_folders or self._mask_candidates())[0]
        return f"{folder / (name + '.png')}: no such mask; add it or take '{name}' off the list"

    def _inspect(self, name: str, load_masks: bool) -> _Record:
        record = _Record(name)
        folder = self.root / "JPEGImages"
        paths = (folder / (name + suffix) for suffix in IMAGE_SUFFIXES)
        record.image = next((path for path in paths if path.is_file()), None)
        if record.image is None:
            record.bad_image = (
                f"{folder / (name + '.jpg')}: listed in {self.split}, but no such image (.jpg, "
                ".jpeg or .png)"
            )
            return record
        size, record.bad_image = inspect_image(record.image)
        if size is None:
            return record
        record.size = size

        xml = self.root / "Annotations" / f"{name}.xml"
        from_xml = self._image_labels == "xml" or (self._image_labels == "auto" and xml.is_file())
        if load_masks or not from_xml:
            record.mask = self._find_mask(name)
        if from_xml:
            self._labels_from_xml(record, xml)
        elif record.mask is None and self._image_labels == "auto":
            record.problems.append(
                f"{xml}: no such file, and no mask '{name}.png' either: the image has no labels"
            )
        elif record.mask is None:
            record.problems.append(self._mask_missing(name))
        else:
            self._labels_from_mask(record, record.mask)
        if load_masks and from_xml:
            self._check_mask(record)
        return record

    def _labels_from_xml(self, record: _Record, path: Path) -> None:
        try:
            tree = ET.parse(path)
        except FileNotFoundError:
            record.problems.append(f"{path}: no such file; image_labels=auto would use the mask")
            return
        except (ET.ParseError, OSError, UnicodeError) as error:
            record.problems.append(f"{path}: not readable as XML ({error}); replace the file")
            return
        # Only the object's own name: <part> elements (head, hand) carry names of their own.
        for element in tree.getroot().iterfind("object"):
            name = (element.findtext("name") or "").strip()
            if name in self._class_index:
                record.present.add(self._class_index[name])
            else:
                record.problems.append(
                    f"{path}: unknown class '{name}', {nearest(name, self.classes)}"
                )

    def _labels_from_mask(self, record: _Record, path: Path) -> None:
        try:
            mask = read_mask(path, len(self.classes), record.size)
        except DatasetError as error:
            record.problems.append(str(error))
            return
        counts = np.bincount(mask.ravel(), minlength=len(self.classes) + 1)
        record.present.update(int(i) for i in np.flatnonzero(counts[1 : len(self.classes) + 1]))

    def _check_mask(self, record: _Record) -> None:
        """Existence and size from the header; values are checked when the mask is loaded."""
        if record.mask is None:
            record.problems.append(self._mask_missing(record.name))
            return
        try:
            with Image.open(record.mask) as image:
                found = (image.height, image.width)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            record.problems.append(f"{record.mask}: not a readable mask ({error}); replace it")
            return
        if found != record.size:
            record.problems.append(size_problem(record.mask, found, record.size))

    def _report(
        self, records: list[_Record], on_bad_image: str, skip_unlabelled: bool
    ) -> list[_Record]:
        """Raise on problems, warn about what is left out, and return what is left."""
        problems = [problem for record in records for problem in record.problems]
        bad = [record.bad_image for record in records if record.bad_image is not None]
        if on_bad_image == "error":
            problems = bad + problems
        if problems:
            hint = "\ndata.on_bad_image=skip leaves unusable images out." if bad else ""
            raise DatasetError(
                f"{count(len(problems), 'problem')} in split '{self.split}' of {self.root}:\n"
                f"{summary(problems)}{hint}"
            )
        if bad:
            rank_zero_warn(
                f"split '{self.split}': left out {len(bad)} of {count(len(records), 'image')}:\n"
                + summary(bad)
            )
        kept = [record for record in records if record.bad_image is None]
        unlabelled = [record.name for record in kept if not record.present]
        if skip_unlabelled and unlabelled:
            rank_zero_warn(
                f"split '{self.split}': left out {count(len(unlabelled), 'image')} without any "
                f"labelled class:\n{summary(unlabelled)}"
            )
            kept = [record for record in kept if record.present]
        if not kept:
            raise DatasetError(f"split '{self.split}' of {self.root}: no usable image is left")
        return kept
