"""PASCAL VOC 2012 in its own tree, with or without SBD's additional masks."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from wsss.data.download import fetch_and_unpack
from wsss.data.images import DatasetError, nearest, summary
from wsss.data.labels import LabelFile, image_key, read_classes, read_label_file
from wsss.data.layout import Layout, Listing
from wsss.data.manifest import Item, files_by_stem, relative
from wsss.data.sbd import SBD

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


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LISTS = Path("ImageSets/Segmentation")
_TREE = Path("VOCdevkit/VOC2012")  # in VOC's archive
_TRAIN_AUG = "train_aug"


def _list_entry(line: str) -> str:
    """Image name of one list line; also takes ``/JPEGImages/x.jpg /SegmentationClass/x.png``."""
    columns = line.split()
    paths = [c for c in columns if "/" in c or c.lower().endswith(IMAGE_SUFFIXES)]
    entry = columns[0] if len(columns) == 2 == len(paths) else line.strip()
    name = entry.rsplit("/", 1)[-1]
    suffix = next((s for s in IMAGE_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)] if suffix else name


def read_list(path: Path) -> list[str]:
    """Image names of a list file, one a line.

    Raises:
        DatasetError: not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 ({error}); save the list as UTF-8") from error
    return [_list_entry(line) for line in lines if line.strip()]


class VOC(Layout):
    """A VOC 2012 tree.

    ::

        root/JPEGImages/NAME.jpg                 (.jpeg and .png are taken too)
        root/ImageSets/Segmentation/SPLIT.txt    one name a line
        root/Annotations/NAME.xml                image labels
        root/SegmentationClassAug/NAME.png       masks; what it lacks is sought in
        root/SegmentationClass/NAME.png          and then in SBD
        root/classes.txt                         foreground names; optional, default VOC's 20

    Image labels: every object of an XML counts, ``difficult`` ones too (then XML and mask agree
    on VOC). EXIF orientation is never applied, because masks follow the stored pixels.

    ``train_aug`` (10 582 images) is VOC's ``train`` and SBD's ``train`` and ``val`` without VOC's
    ``val``, sorted by name; without a list of that name it is derived from SBD's lists, and masks
    that no folder holds are built from SBD's ``cls/NAME.mat`` into ``wsss/SegmentationClassAug``.

    Args:
        root: the folder that holds ``JPEGImages``.
        image_labels: ``xml``, ``mask`` or ``file``; ``auto`` takes ``labels_file`` where it is
            given and names the image, else the XML, else the mask.
        labels_file: csv, json or npy file of image labels, see :func:`read_label_file`.
        sbd_root: the folder of SBD that holds ``cls`` and ``train.txt``; None looks in
            ``root/SBD``, ``root/benchmark_RELEASE/dataset`` and two folders up.

    Raises:
        DatasetError: an argument that cannot be.
    """

    kind: ClassVar[str] = "voc"

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_labels: Literal["auto", "xml", "mask", "file"] = "auto",
        labels_file: str | os.PathLike[str] | None = None,
        sbd_root: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(root)
        if image_labels not in ("auto", "xml", "mask", "file"):
            raise DatasetError(f"image_labels='{image_labels}': expected auto, xml, mask or file")
        if image_labels == "file" and labels_file is None:
            raise DatasetError("image_labels=file: name it with data.dataset.labels_file=...")
        self._image_labels = image_labels
        self._labels_file = Path(labels_file).expanduser() if labels_file else None
        self._sbd = SBD.find(self.root, sbd_root)

    @classmethod
    def download(cls, root: str | os.PathLike[str], **options: Any) -> Path:
        """Fetch VOC 2012 (2 GB) and SBD (1.4 GB) into ``root/VOCdevkit/VOC2012`` and ``root``.

        A ``root`` that ends in ``VOCdevkit/VOC2012`` is taken for the tree itself. So is one that
        holds ``JPEGImages``: it is VOC under another name, and only SBD is fetched into it.
        """
        base = Path(root).expanduser()
        names = ["voc2012"]
        if base.absolute().parts[-2:] == _TREE.parts:
            base = base.absolute().parents[1]
            tree = base / _TREE
        elif (base / "JPEGImages").is_dir():
            tree, names = base, []
        else:
            tree = base / _TREE
        # The archive has no train_aug: who has its list and masks needs nothing of SBD.
        has_aug = (tree / _LISTS / f"{_TRAIN_AUG}.txt").is_file()
        has_aug = has_aug and (tree / "SegmentationClassAug").is_dir()
        if not has_aug and SBD.find(tree, options.get("sbd_root")) is None:
            names.append("sbd")
        for name in names:
            fetch_and_unpack(name, base)
        return tree

    # ------------------------------------------------------------------ what is there

    @cached_property
    def classes(self) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        return read_classes(path) if path.is_file() else VOC_CLASSES

    @cached_property
    def _class_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    @staticmethod
    def root_hint() -> str:
        return "the VOC2012 folder, the one that holds JPEGImages"

    def options(self) -> dict[str, Any]:
        return {
            "image_labels": self._image_labels,
            "labels_file": str(self._labels_file.absolute()) if self._labels_file else None,
            "sbd_root": str(self._sbd.root.absolute()) if self._sbd else None,
        }

    def splits(self) -> list[str]:
        folder = self.root / _LISTS
        found = sorted(path.stem for path in folder.glob("*.txt")) if folder.is_dir() else []
        if self._sbd and _TRAIN_AUG not in found and {"train", "val"} <= set(found):
            found.append(_TRAIN_AUG)
        return found

    def list_split(self, split: str) -> Listing:
        self._check_tree()
        names, source, notes = self._names(split)
        images = files_by_stem(self.root / "JPEGImages", IMAGE_SUFFIXES)
        masks = self._mask_folders()
        sbd_masks = self._sbd.masks() if self._sbd is not None else set()
        labels = self._read_labels_file()
        items, seen, from_sbd = [], set(), []
        for name in names:
            item = Item(name)
            items.append(item)
            if name in seen:
                item.problem = f"{source}: '{name}' is listed more than once; remove the repeats"
                continue
            seen.add(name)
            if name not in images:
                item.problem = (
                    f"{self.root / 'JPEGImages' / (name + '.jpg')}: listed in {split}, but no "
                    "such image (.jpg, .jpeg or .png)"
                )
                continue
            item.image = f"JPEGImages/{images[name]}"
            folder = next((f for f, found in masks.items() if name in found), None)
            if folder is not None:
                item.mask = f"{folder}/{name}.png"
            elif name in sbd_masks:
                from_sbd.append(item)
            self._choose_label_source(item, labels)
        if from_sbd and self._sbd is not None:
            note = self._sbd.build_masks(from_sbd, self.root, self.work / "SegmentationClassAug")
            notes.append(note)
        sources = [self.root / f for f in ("JPEGImages", "Annotations", *self._candidates())]
        sources += [source, self.root / "classes.txt"]
        if self._sbd is not None:
            # A list that comes later is preferred to the one derived from all of these.
            own = [self.root / _LISTS / f"{name}.txt" for name in ("train", "val", _TRAIN_AUG)]
            sources += [*own, *self._sbd.lists, self._sbd.root / "cls"]
            sources += [self._sbd.mask(item.name) for item in from_sbd]
        if self._labels_file is not None:
            sources.append(self._labels_file)
        return Listing(items, sources, notes)

    # ------------------------------------------------------------------ lists and folders

    @staticmethod
    def _candidates() -> list[str]:
        return ["SegmentationClassAug", "SegmentationClass"]

    def _mask_folders(self) -> dict[str, dict[str, str]]:
        """The mask folders that exist, with their files by name, in order of preference."""
        present = [f for f in self._candidates() if (self.root / f).is_dir()]
        return {folder: files_by_stem(self.root / folder, (".png",)) for folder in present}

    def _check_tree(self) -> None:
        root = self.root
        missing = []
        if not (root / "JPEGImages").is_dir():
            missing.append(f"{root / 'JPEGImages'}: the images, NAME.jpg")
        if not (root / _LISTS).is_dir():
            missing.append(f"{root / _LISTS}: the image lists, SPLIT.txt")
        has_xml = (root / "Annotations").is_dir()
        has_masks = any((root / folder).is_dir() for folder in self._candidates())
        has_masks = has_masks or self._sbd is not None
        masks = f"{root / 'SegmentationClassAug'} (or SegmentationClass): the masks, NAME.png"
        if self._image_labels == "mask" and not has_masks:
            missing.append(masks)
        if self._image_labels == "xml" and not has_xml:
            missing.append(f"{root / 'Annotations'}: the image labels, NAME.xml")
        if self._image_labels == "auto" and not (has_xml or has_masks or self._labels_file):
            missing.append(f"{root / 'Annotations'}: the image labels, NAME.xml (or masks)")
        if missing:
            below = sorted(path.parent for path in root.glob("*/JPEGImages"))
            below += sorted(path.parent for path in root.glob("*/*/JPEGImages"))
            hint = f"\nDid you mean data.root={below[0]} ?" if below else ""
            raise DatasetError(
                f"'{root}' is not a whole VOC tree; missing:\n{summary(missing)}{hint}"
            )

    def _names(self, split: str) -> tuple[list[str], Path, list[str]]:
        """Names of a split, the list they came from, and notes."""
        folder = self.root / _LISTS
        path = Path(split).expanduser() if "/" in split else folder / f"{split}.txt"
        if "/" not in split and split.endswith(".txt"):
            path = folder / split
        if not path.is_file() and split == _TRAIN_AUG and self._sbd is not None:
            return self._derive_train_aug()
        if not path.is_file():
            there = self.splits() if "/" not in split else []
            close = nearest(split, there) if there else "the folder holds no list"
            hint = ""
            if split == _TRAIN_AUG:
                hint = (
                    ". train_aug comes with SegmentationClassAug, not with the VOC download; it is "
                    f"derived if SBD lies in {self.root / 'SBD'} (cls, train.txt, val.txt), or "
                    "data.train_split=train uses VOC's own 1464 images"
                )
            raise DatasetError(
                f"{path}: no such image list; there are: {', '.join(there) or 'none'} "
                f"({close}){hint}"
            )
        names = read_list(path)
        if not names:
            raise DatasetError(f"{path}: the image list is empty")
        return names, path, []

    def _derive_train_aug(self) -> tuple[list[str], Path, list[str]]:
        assert self._sbd is not None
        own = {}
        for split in ("train", "val"):
            path = self.root / _LISTS / f"{split}.txt"
            if not path.is_file():
                raise DatasetError(f"{path}: no such image list; train_aug is derived from it")
            own[split] = set(read_list(path))
        names = sorted((own["train"] | self._sbd.names()) - own["val"])
        note = (
            f"train_aug: {len(names)} images, derived from VOC train and SBD train and val without "
            "VOC val"
        )
        return names, self._sbd.root / "train.txt", [note]

    # ------------------------------------------------------------------ image labels

    def _read_labels_file(self) -> LabelFile | None:
        if self._labels_file is None:
            return None
        return read_label_file(self._labels_file, self.classes)

    def _choose_label_source(self, item: Item, labels: LabelFile | None) -> None:
        xml = self.root / "Annotations" / f"{item.name}.xml"
        how, index = self._image_labels, self._class_index
        if how in ("auto", "file") and labels is not None:
            names = labels.labels.get(image_key(item.name))
            if names is not None:
                item.labels = sorted(index[n] for n in names)
                return
        if how == "xml" or (how == "auto" and xml.is_file()):
            item.source = relative(xml, self.root)

    def labels_from_mask(self, item: Item) -> bool:
        return self._image_labels in ("auto", "mask")

    def no_labels(self, item: Item) -> str:
        if self._image_labels == "mask":
            return self.no_mask(item)
        if self._image_labels == "file":
            return f"{self._labels_file}: does not name '{item.name}'; add its labels"
        xml = self.root / "Annotations" / f"{item.name}.xml"
        return f"{xml}: no such file, and no mask '{item.name}.png' either: the image has no labels"

    def no_mask(self, item: Item) -> str:
        there = [f for f in self._candidates() if (self.root / f).is_dir()]
        folder = self.root / (there or self._candidates())[0]
        name = item.name
        return f"{folder / (name + '.png')}: no such mask; add it or take '{name}' off the list"

    def labels_from_source(self, item: Item) -> None:
        assert item.source is not None
        path = self.root / item.source
        try:
            tree = ET.parse(path)
        except FileNotFoundError:
            item.problem = f"{path}: no such file; image_labels=auto would use the mask"
            return
        # ValueError, LookupError: encodings that the parser does not know.
        except (ET.ParseError, OSError, ValueError, LookupError) as error:
            item.problem = f"{path}: not readable as XML ({error}); replace the file"
            return
        labels: set[int] = set()
        # Only the object's own name: <part> elements (head, hand) carry names of their own.
        for element in tree.getroot().iterfind("object"):
            name = (element.findtext("name") or "").strip()
            if name in self._class_index:
                labels.add(self._class_index[name])
            else:
                item.problem = f"{path}: unknown class '{name}', {nearest(name, self.classes)}"
        item.labels = sorted(labels)
