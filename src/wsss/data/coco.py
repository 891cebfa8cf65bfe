"""MS COCO: semantic masks and image labels from the official instance annotations."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from wsss.data.download import fetch_and_unpack
from wsss.data.images import VOID, DatasetError, count, encode_mask, summary
from wsss.data.layout import Layout, Listing, in_threads
from wsss.data.manifest import Item, files_by_stem, relative
from wsss.files import write_atomically

_SPLITS = ("train", "val")
_YEARS = (2014, 2017)
_RULE = 1
"""Raise when the same annotations would give other masks."""
_FAR = 1e5
"""Coordinates of polygons are smaller; further out, pycocotools takes minutes and gigabytes."""
_ENTRIES: tuple[tuple[str, str, type | UnionType], ...] = (
    ("images", "id", int | str),
    ("images", "file_name", str),
    ("annotations", "image_id", int | str),
    ("annotations", "category_id", int),
    ("categories", "id", int),
    ("categories", "name", str),
)


class COCO(Layout):
    """COCO 2014 or 2017.

    ::

        root/annotations/instances_train2017.json   (and val2017)
        root/train2017/NAME.jpg                     or root/images/train2017

    **Classes** are the 80 categories in the order of their ids, mask values 1 to 80.

    **Masks** are painted once, as PNGs in ``wsss/masks_SPLIT``: crowd regions first, as 255;
    then the instances from the largest to the smallest area, each over what lies there, so that
    a small object on a large one stays whole; of equal areas the later annotation is on top.

    **Image labels** are the categories of all annotations of an image, crowds too. Images without
    any annotation are not part of a split, as in the papers of the field (82 081 of 82 783 remain
    in train2014, 40 137 of 40 504 in val2014). Annotations without area (COCO has a few) paint
    nothing, those of an image that is not listed belong nowhere; both are counted.

    Args:
        root: folder that holds ``annotations``.
        year: 2014 or 2017; None takes the one that is there, 2014 if both are.

    Raises:
        DatasetError: another year.
    """

    kind: ClassVar[str] = "coco"

    def __init__(self, root: str | os.PathLike[str], year: int | None = None) -> None:
        super().__init__(root)
        if year is not None and year not in _YEARS:
            raise DatasetError(f"data.dataset.year={year}: COCO has 2014 and 2017")
        self._year = year
        self._contents: dict[str, _Annotations] = {}

    @classmethod
    def download(cls, root: str | os.PathLike[str], **options: Any) -> Path:
        """Fetch COCO (20 GB) into ``root``: ``year``, else the one that is there, else 2014."""
        layout = cls(root, **options)
        year = layout._year or layout._year_there() or _YEARS[0]
        fetch_and_unpack(f"coco{year}", layout.root, elsewhere=["images"])
        return layout.root

    @cached_property
    def year(self) -> int:
        """The year asked for, or the one that is there."""
        year = self._year or self._year_there()
        if year is None:
            raise self._no_annotations()
        return year

    def _year_there(self) -> int | None:
        found = (y for y in _YEARS if any(self._json(split, y).is_file() for split in _SPLITS))
        return next(found, None)

    def _no_annotations(self) -> DatasetError:
        years = " or ".join(str(year) for year in ([self._year] if self._year else _YEARS))
        below = sorted(self.root.glob("*/annotations")) + sorted(self.root.glob("*/*/annotations"))
        hint = f"\nDid you mean data.root={below[0].parent} ?" if below else ""
        return DatasetError(
            f"{self.root / 'annotations'}: no instances_train*.json or instances_val*.json of "
            f"{years}; unpack COCO's annotations there{hint}"
        )

    def _json(self, split: str, year: int | None = None) -> Path:
        return self.root / f"annotations/instances_{split}{year or self.year}.json"

    @staticmethod
    def root_hint() -> str:
        return "the COCO folder, the one that holds annotations"

    def options(self) -> dict[str, Any]:
        return {"year": self.year, "rule": _RULE}

    def splits(self) -> list[str]:
        return [split for split in _SPLITS if self._json(split).is_file()]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        # A small file: a run that finds its manifest in order never reads the large ones.
        kept = self.work / f"classes_{self.year}.json"
        stamp = {}
        for split in self.splits():
            found = self._json(split).stat()
            stamp[split] = [found.st_size, found.st_mtime_ns]
        try:
            content = json.loads(kept.read_text(encoding="utf-8"))
            if content["stamp"] == stamp:
                return tuple(content["classes"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if not stamp:
            raise self._no_annotations()
        names = {split: tuple(self._annotations(split).categories.values()) for split in stamp}
        if len(set(names.values())) != 1:
            raise DatasetError(
                f"{self.root / 'annotations'}: train and val list different categories; take both "
                "files of one release"
            )
        classes = next(iter(names.values()))
        content = {"classes": classes, "stamp": stamp}
        write_atomically(kept, json.dumps(content, ensure_ascii=False).encode())
        return classes

    def _annotations(self, split: str) -> _Annotations:
        if split not in self._contents:
            self._contents[split] = _Annotations(self._json(split))
        return self._contents[split]

    # ------------------------------------------------------------------ listing

    def _images(self, split: str) -> Path:
        name = f"{split}{self.year}"
        for folder in (self.root / name, self.root / "images" / name):
            if folder.is_dir():
                return folder
        raise DatasetError(
            f"{self.root / name}: no such folder (nor {self.root / 'images' / name}); unpack "
            f"COCO's {name}.zip there"
        )

    def list_split(self, split: str) -> Listing:
        if split not in self.splits():
            there = ", ".join(self.splits()) or "none"
            raise DatasetError(f"{self._json(split)}: no such file; splits there are: {there}")
        annotations, folder = self._annotations(split), self._images(split)
        index = {category: i for i, category in enumerate(annotations.categories)}
        files = set(os.listdir(folder))
        out = self.work / f"masks_{split}{self.year}"
        items, entries, empty = [], [], 0
        seen: set[str] = set()
        # An image that is listed twice is no doubt; two images with one id are.
        different = {(image["id"], image["file_name"]) for image in annotations.images}
        of_id = Counter(number for number, _ in different)
        for image in annotations.images:
            own = annotations.by_image.get(image["id"], [])
            if not own:
                empty += 1
                continue
            file = image["file_name"]
            item = Item(Path(file).stem)
            items.append(item)
            if item.name in seen:
                item.problem = f"{annotations.path}: two images are called '{item.name}'"
                continue
            seen.add(item.name)
            if of_id[image["id"]] > 1:
                item.problem = (
                    f"{annotations.path}: {of_id[image['id']]} images have the id "
                    f"{image['id']!r}, '{file}' is one; whose annotations are its is not known"
                )
                continue
            unknown = [a["category_id"] for a in own if a["category_id"] not in index]
            if unknown:
                item.problem = (
                    f"{annotations.path}: annotation of image {image['id']} ({file}) has the "
                    f"unknown category_id {unknown[0]}; add it to 'categories' or remove it"
                )
                continue
            if file not in files:
                item.problem = (
                    f"{folder / file}: listed in {annotations.path.name}, but no such image"
                )
                continue
            item.image = relative(folder / file, self.root)
            item.labels = sorted({index[a["category_id"]] for a in own})
            item.mask = relative(out / f"{item.name}.png", self.root)
            entries.append((item, image, own))
        notes = [f"{count(empty, 'image')} of {len(annotations.images)} without annotations: out"]
        astray = annotations.astray
        if astray:
            notes.append(
                f"{count(len(astray), 'annotation')} of images that are not listed, of image_id "
                f"{astray[0]!r} for one: out"
            )
        notes += self._build_masks(split, out, entries, index)
        self._contents.pop(split)  # gigabytes for the whole of COCO
        return Listing(items, [annotations.path, folder], notes)

    def _build_masks(
        self,
        split: str,
        out: Path,
        entries: list[tuple[Item, dict[str, Any], list[dict[str, Any]]]],
        index: dict[int, int],
    ) -> list[str]:
        """Paint the masks that are not there yet; returns notes."""
        found = self._json(split).stat()
        mark = {"rule": _RULE, "size": found.st_size, "mtime": found.st_mtime_ns}
        marker = out / "source.json"
        empty: set[str] = set()
        try:
            old = json.loads(marker.read_text(encoding="utf-8"))
            same = old["of"] == mark
            empty.update(old["without_area"] if same else ())
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:  # masks of other annotations must not be taken for these
            for file in out.glob("*.png") if out.is_dir() else ():
                file.unlink()
            write_atomically(marker, json.dumps({"of": mark, "without_area": []}).encode())
        there = set(files_by_stem(out, (".png",)))
        missing = [entry for entry in entries if entry[0].name not in there]

        def build(entry: tuple[Item, dict[str, Any], list[dict[str, Any]]]) -> None:
            item, image, own = entry
            try:
                mask, without_area = paint(image["height"], image["width"], own, index)
                content = encode_mask(mask)
            except Exception as error:  # a wrong entry raises what it leads to
                item.problem = (
                    f"{self._json(split)}: an annotation of image {image.get('id')} cannot be "
                    f"painted ({type(error).__name__}: {error}); mend or remove it"
                )
                return
            write_atomically(out / f"{item.name}.png", content)
            empty.update(f"annotation {i} of {item.name}" for i in without_area)

        try:
            for _ in in_threads(build, missing, f"Painting masks of {split}"):
                pass
        finally:  # stopped halfway, a later run paints only the others
            if missing:
                text = json.dumps({"of": mark, "without_area": sorted(empty)})
                write_atomically(marker, text.encode())
        notes = [f"{count(len(entries), 'mask')} in {out}"]
        if empty:
            notes.append(
                f"{count(len(empty), 'annotation')} without area, painted as nothing:\n"
                + summary(sorted(empty))
            )
        return notes


class _Annotations:
    """Images, categories and annotations of one ``instances_*.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_bytes())
            for part, key, kind in _ENTRIES:
                wrong = [e[key] for e in content[part] if not isinstance(e[key], kind)]
                if wrong:
                    raise ValueError(f"{key} {wrong[0]!r} in '{part}'")
            self.images: list[dict[str, Any]] = content["images"]
            self.categories: dict[int, str] = {
                c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])
            }
            for key in ("id", "name"):
                values = Counter(c[key] for c in content["categories"])
                twice = [value for value, times in values.items() if times > 1]
                if twice:
                    raise ValueError(f"two categories have the {key} {twice[0]!r}")
            self.by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for annotation in content["annotations"]:
                self.by_image[annotation["image_id"]].append(annotation)
            ids = {image["id"] for image in self.images}
            self.astray = [
                a["image_id"] for a in content["annotations"] if a["image_id"] not in ids
            ]
            if self.astray and len(self.astray) == len(content["annotations"]):
                raise ValueError(
                    f"no annotation is of an image in 'images': image_id {self.astray[0]!r}, and "
                    f"ids like {next(iter(ids), None)!r}"
                )
        except (OSError, UnicodeError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}: not readable as COCO instance annotations ({type(error).__name__}: "
                f"{error}); mend it or unpack it again"
            ) from error
        if not self.categories or len(self.categories) >= VOID:
            raise DatasetError(
                f"{path}: {len(self.categories)} categories, 1 to {VOID - 1} fit an 8-bit mask"
            )


def paint(
    height: int, width: int, annotations: list[dict[str, Any]], index: dict[int, int]
) -> tuple[NDArray[np.uint8], list[Any]]:
    """Semantic mask of one image; see :class:`COCO` for the rule of overlaps.

    Args:
        height, width: size of the image in pixels.
        annotations: COCO annotations of the image.
        index: class index 0..C-1 by category id.

    Returns:
        (H, W) uint8 mask, and the ids of annotations without area.

    Raises:
        Exception: a region of another size than the image, or one that is none.
    """
    mask = np.zeros((height, width), np.uint8)
    instances, without_area = [], []
    for order, annotation in enumerate(annotations):
        region = _region(annotation["segmentation"], height, width)
        if region is None or not region.any():
            without_area.append(annotation.get("id"))
        elif annotation.get("iscrowd"):
            mask[region] = VOID
        else:
            instances.append((-int(region.sum()), order, annotation["category_id"], region))
    for _, _, category, region in sorted(instances, key=lambda i: i[:2]):
        mask[region] = index[category] + 1
    return mask, without_area


def _region(segmentation: Any, height: int, width: int) -> NDArray[np.bool_] | None:
    """Pixels of a COCO segmentation: polygons, run lengths as a list or as packed text."""
    if isinstance(segmentation, list):
        # A polygon needs three points; pycocotools fails on fewer.
        polygons = [p for p in segmentation if len(p) >= 6]
        if not polygons:
            return None
        if not all((np.abs(np.asarray(p, np.float64)) < _FAR).all() for p in polygons):
            raise ValueError(f"coordinates of a polygon are no numbers below {_FAR:g}")
        packed = rle.merge(rle.frPyObjects(polygons, height, width))
        return np.asarray(rle.decode(packed)).astype(bool)
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"region of {segmentation['size']} in an image {[height, width]}")
    runs = segmentation["counts"]
    runs = np.asarray(_unpack_runs(runs) if isinstance(runs, str | bytes) else runs, np.int64)
    # pycocotools does not look: what runs leave out would be pixels of chance.
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"runs over {runs.sum()} pixels, the image has {height * width}")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T


def _unpack_runs(text: str | bytes) -> list[int]:
    """Lengths of the runs of COCO's packed text.

    Each is a number of 6-bit digits from ``chr(48)`` up, the lowest first: five bits of value and
    one that says whether another digit follows; the highest bit of the last one is the sign. From
    the fourth number on, what is stored is the difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        digit = code - 48
        if not 0 <= digit < 64:
            raise ValueError(f"'{chr(code)}' in packed run lengths")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs
