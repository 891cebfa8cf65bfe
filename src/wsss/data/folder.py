"""Any folder of images with a file of image labels: what most users have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from wsss.data.images import DatasetError, count
from wsss.data.labels import (
    SUFFIXES,
    LabelFile,
    image_key,
    read_classes,
    read_label_file,
    read_lines,
)
from wsss.data.layout import Layout, Listing
from wsss.data.manifest import Item, relative

_LABEL_FILES = ("labels.csv", "labels.tsv", "labels.json", "labels.npy")
_LISTS = ("train", "val")
#: share of images without a mask up to which their masks were rather forgotten
_FEW = 0.1


class Folder(Layout):
    """Images with labels, and masks for those that have some.

    ::

        root/images/ANY/NAME.jpg     any names, folders and formats; EXIF orientation is applied
        root/labels.csv              or .tsv, .json, .npy; see read_label_file
        root/masks/ANY/NAME.png      optional: 0 background, 1..C, 255 ignored
        root/classes.txt             optional: class names in mask order, one a line
        root/train.txt, val.txt      optional lists of names, one a line

    An image's name is its path below ``images`` without the suffix; the label file and the lists
    may give the suffix, and ``images/`` before it. Hidden files and folders are left alone.

    Without ``classes.txt`` the classes are those of the label file, in alphabetical order (in the
    order of the columns, if it has one for each class). Images that the label file does not name
    get their labels from the mask, for scores that know the labels and for full supervision; they
    cannot be trained on weakly. Without a label file all labels are those of the masks.

    What is ``train`` and what ``val`` is decided by the first of these that is there: the label
    file's ``split`` column (images without an entry are ``train``); ``train.txt`` and ``val.txt``
    (other lists can be chosen by name); masks, if some images have one and others not (``val`` has
    them: masks serve evaluation alone; refused where less than a tenth would be left to train on);
    else a digest of an image's name, which puts a share of about ``val_fraction`` into ``val``.
    Images that are added leave the others where they are.

    Args:
        root: folder that holds ``images``.
        labels_file: the label file, also as a path in root; None looks for ``labels.*`` in root.
        val_fraction: see above; between 0 and 1.

    Raises:
        DatasetError: ``val_fraction`` is out of range.
    """

    kind: ClassVar[str] = "folder"
    exif: ClassVar[bool] = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        labels_file: str | os.PathLike[str] | None = None,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__(root)
        if not 0 < val_fraction < 1:
            raise DatasetError(
                f"data.dataset.val_fraction={val_fraction}: expected a number between 0 and 1"
            )
        self._labels_file = Path(labels_file).expanduser() if labels_file else None
        if self._labels_file is not None and not self._labels_file.is_file():
            self._labels_file = self.root / self._labels_file  # which keeps an absolute path
        self._val_fraction = val_fraction

    @staticmethod
    def root_hint() -> str:
        return "the folder that holds images/ and labels.csv"

    def options(self) -> dict[str, Any]:
        return {
            "labels_file": relative(self._labels_file, self.root) if self._labels_file else None,
            "val_fraction": self._val_fraction,
        }

    def masks_may_label(self) -> bool:
        return self._label_path is None

    # ------------------------------------------------------------------ what is there

    @cached_property
    def _label_path(self) -> Path | None:
        if self._labels_file is not None:
            return self._labels_file
        there = [self.root / name for name in _LABEL_FILES if (self.root / name).is_file()]
        if len(there) > 1:
            raise DatasetError(
                f"{self.root}: {' and '.join(p.name for p in there)}; keep one, or name it with "
                "data.dataset.labels_file=..."
            )
        return there[0] if there else None

    @cached_property
    def _labels(self) -> LabelFile:
        """The label file, its names as those of the images."""
        self._check_root()
        path = self.root / "classes.txt"
        classes = read_classes(path) if path.is_file() else None
        if self._label_path is not None:
            read = read_label_file(self._label_path, classes)
            merged = LabelFile(classes=read.classes)
            for key, names in read.labels.items():
                known = merged.labels.setdefault(self._name(key), [])
                known += [n for n in names if n not in known]
            merged.splits = {self._name(key): split for key, split in read.splits.items()}
            return merged
        if classes is None or not (self.root / "masks").is_dir():
            others = sorted(
                p.name
                for p in self.root.iterdir()
                if p.suffix.lower() in (".csv", ".tsv", ".json", ".npy")
                and not p.name.startswith(".")
            )
            hint = f"; or is it {others[0]}? data.dataset.labels_file={others[0]}" if others else ""
            raise DatasetError(
                f"{self.root}: no label file ({', '.join(_LABEL_FILES)}). Write one, for example "
                f"labels.csv with the lines 'image,labels' and 'photo.jpg,cat;dog'{hint}"
            )
        return LabelFile(classes=classes)

    def _check_root(self) -> None:
        folder = self.root / "images"
        if folder.is_dir():
            return
        below = sorted(path.parent for path in self.root.glob("*/images"))
        if self.root.absolute().name == "images":
            below = [self.root.absolute().parent]
        hint = f"\nDid you mean data.root={below[0]} ?" if below else ""
        raise DatasetError(f"{folder}: no such folder; put the images there{hint}")

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return self._labels.classes

    @cached_property
    def _images(self) -> _Tree:
        return _find(self.root / "images", SUFFIXES)

    @cached_property
    def _masks(self) -> _Tree:
        folder = self.root / "masks"
        return _find(folder, (".png",)) if folder.is_dir() else _Tree()

    def _name(self, key: str) -> str:
        """Name of the image that a label file or a list calls ``key``."""
        for start in ("images/", f"{(self.root / 'images').absolute().as_posix()}/"):
            if key.startswith(start) and key not in self._images.files:
                return key.removeprefix(start)
        return key

    # ------------------------------------------------------------------ listing

    def splits(self) -> list[str]:
        splits = self._labels.splits
        if splits:
            return sorted({self._split_of(name) for name in {*self._images.files, *splits}})
        lists = [*_LISTS, "test"]
        return lists if all((self.root / f"{s}.txt").is_file() for s in lists) else [*_LISTS]

    def _split_of(self, name: str) -> str:
        return self._labels.splits.get(name, "train")

    def list_split(self, split: str) -> Listing:
        self._check_root()
        images, masks, labels = self._images, self._masks, self._labels.labels
        if not images.files:
            raise DatasetError(
                f"{self.root / 'images'}: holds no image ({', '.join(SUFFIXES)})"
                + (f"; found {images.others[0]}" if images.others else "")
            )
        names, notes = self._members(split)
        index = {name: i for i, name in enumerate(self.classes)}
        by_file = {name.rsplit("/", 1)[-1].casefold(): name for name in images.files}
        items = []
        for name in names:
            item = Item(name)
            items.append(item)
            if name in images.twice:
                item.problem = (
                    f"{self.root / 'images'}: {' and '.join(images.twice[name])} have one name; "
                    "rename all but one (masks belong into masks/)"
                )
                continue
            if name not in images.files:
                close = by_file.get(name.rsplit("/", 1)[-1].casefold())
                hint = f"; did you mean '{close}'?" if close else ""
                item.problem = (
                    f"{self.root / 'images' / name}.*: named for {split}, but no such image{hint}"
                )
                continue
            if _printable(images.files[name]) != images.files[name]:
                item.problem = (
                    f"{self.root / 'images' / name}: the file's name is not UTF-8; rename it"
                )
                continue
            item.image = f"images/{images.files[name]}"
            if name in masks.files:
                item.mask = f"masks/{masks.files[name]}"
            if name in labels:
                item.labels = sorted(index[c] for c in labels[name])
        places = (*_LABEL_FILES, "classes.txt", "masks", *(f"{s}.txt" for s in (*_LISTS, split)))
        sources = [self.root / place for place in places]  # also those that may come
        sources += [*images.folders, *masks.folders]
        if self._labels_file is not None:
            sources.append(self._labels_file)
        return Listing(items, sources, [*notes, *self._notes()])

    def _notes(self) -> list[str]:
        """What was left alone, and what should not stay unnoticed."""
        notes = []
        images, masks = self._images, self._masks
        if self._label_path is not None and not (self.root / "classes.txt").is_file():
            order = f"classes: from {self._label_path.name}, as there is no classes.txt"
            values = "; check that the masks have the values that the table says"
            notes.append(order + (values if masks.files else ""))
        orphans = [file for name, file in masks.files.items() if name not in images.files]
        for folder, found, what in (
            ("images", images.others, "of a kind that is not read"),
            ("masks", masks.others, "not PNG, so not read"),
            ("masks", orphans, "without an image of that name"),
        ):
            if found:
                example = _printable(sorted(found)[0])
                notes.append(f"{folder}: {count(len(found), 'file')} {what}, such as {example}")
        return notes

    def no_labels(self, item: Item) -> str:
        where = self._label_path or self.root / "labels.csv"
        return (
            f"{self.root / item.image}: {where.name} does not name it; add a line for it (with "
            "empty labels if it holds no class)"
        )

    def no_mask(self, item: Item) -> str:
        path = self.root / "masks" / f"{item.name}.png"
        return f"{path}: no such mask; add it, or take the image out of the split"

    def _members(self, split: str) -> tuple[list[str], list[str]]:
        """Names of a split, and notes on the rule that decided."""
        everything = sorted({*self._images.files, *self._labels.labels})
        if self._labels.splits:
            if split not in self.splits():
                raise self._no_split(split)
            assert self._label_path is not None
            names = [n for n in everything if self._split_of(n) == split]
            return names, [f"splits: from the split column of {self._label_path.name}"]
        lists = [self.root / f"{s}.txt" for s in _LISTS]
        there = [path for path in lists if path.is_file()]
        if len(there) == 1:
            missing = next(path for path in lists if path not in there)
            raise DatasetError(
                f"{missing}: no such list, but there is {there[0].name}; write both or neither"
            )
        if there:
            return self._read_list(split)
        if split not in _LISTS:
            raise self._no_split(split)
        there_are = len(self._images.files)
        with_mask = {n for n in self._images.files if n in self._masks.files}
        if 0 < len(with_mask) < there_are:
            if there_are - len(with_mask) < _FEW * there_are:
                without = sorted({*self._images.files} - with_mask)
                raise DatasetError(
                    f"{self.root}: {len(without)} of {there_are} images have no mask, such as "
                    f"{without[0]}; as the others would validate, next to none would train. Write "
                    "train.txt and val.txt, or add the masks"
                )
            names = [n for n in everything if (n in with_mask) == (split == "val")]
            return names, ["splits: the images with a mask are val, the others train"]
        if len(everything) < 2:
            raise DatasetError(
                f"{self.root / 'images'}: {count(len(everything), 'image')} cannot be split into "
                "train and val; add images, or name it in both train.txt and val.txt"
            )
        ranks = {n: _rank(n) for n in everything}
        ordered = sorted(everything, key=lambda n: ranks[n])
        # Of few images, one at least on each side.
        chosen = {n for n in ordered[:-1] if ranks[n] < self._val_fraction} | {ordered[0]}
        names = [n for n in everything if (n in chosen) == (split == "val")]
        return names, [
            f"splits: {len(chosen)} of {len(everything)} images are val, chosen by their names "
            f"(val_fraction={self._val_fraction}); write train.txt and val.txt to choose yourself"
        ]

    def _read_list(self, split: str) -> tuple[list[str], list[str]]:
        path = self.root / f"{split}.txt"
        if not path.is_file():
            raise self._no_split(split)
        members = {}
        for one in {*_LISTS, split}:
            lines = read_lines(self.root / f"{one}.txt")
            members[one] = list(dict.fromkeys(self._name(image_key(line)) for line in lines))
        if not members[split]:
            raise DatasetError(f"{path}: the image list is empty")
        notes = ["splits: from train.txt and val.txt"]
        both = sorted({*members["train"]} & {*members["val"]})
        if both:
            notes.append(f"splits: {count(len(both), 'image')} in both lists, such as {both[0]}")
        lost = sorted({*self._labels.labels} - {*self._images.files})
        if lost and self._label_path is not None:
            what = f"{count(len(lost), 'name')} without an image, such as {lost[0]}"
            notes.append(f"{self._label_path.name}: {what}")
        return members[split], notes

    def _no_split(self, split: str) -> DatasetError:
        return DatasetError(
            f"split '{split}' of {self.root}: there are {', '.join(self.splits())}; choose by "
            "data.train_split and data.val_split"
        )


@dataclass
class _Tree:
    """Files below a folder.

    Attributes:
        files: path below the folder by name.
        twice: paths of names that several files share.
        others: paths of files of another kind.
        folders: the folder and all below.
    """

    files: dict[str, str] = field(default_factory=dict)
    twice: dict[str, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def _find(folder: Path, suffixes: Iterable[str]) -> _Tree:
    """Look for files with one of ``suffixes``, hidden ones left out, links to folders followed."""

    def fail(error: OSError) -> None:
        raise error

    tree, seen = _Tree(), set()
    for where, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(where)
        if real in seen:  # links can lead in circles
            folders.clear()
            continue
        seen.add(real)
        tree.folders.append(Path(where))
        for file in sorted(files):
            if file.startswith("."):
                continue
            below = (Path(where) / file).relative_to(folder).as_posix()
            name = image_key(_printable(below))
            if Path(file).suffix.lower() not in suffixes:
                tree.others.append(below)
            elif name in tree.files:
                tree.twice.setdefault(name, [tree.files[name]]).append(below)
            else:
                tree.files[name] = below
    return tree


def _printable(path: str) -> str:
    """``path`` with a question mark for bytes that are not UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    digest = hashlib.sha1(name.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:6]) / 2**48
