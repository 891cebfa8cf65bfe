"""ACDC: cine MRI of the heart, as the challenge's patient folders or as HDF5 slices."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wsss.data.download import ACDC_SOURCE
from wsss.data.images import VOID, DatasetError, count, encode_grey, encode_mask
from wsss.data.labels import read_classes
from wsss.data.layout import Layout, Listing, in_threads
from wsss.data.manifest import Item, relative
from wsss.files import write_atomically

ACDC_CLASSES = ("right ventricle", "myocardium", "left ventricle")
_PATIENT = re.compile(r"patient\d+")
_SLICE = re.compile(r"(patient\d+)_frame(\d+)_slice_?(\d+)\.h5")
_FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(\.gz)?")
_RULE = 1
"""Raise when the same volumes would give other pictures."""

Floats = NDArray[np.float32]
Slices = tuple[list[Floats], list[NDArray[np.uint8]] | None]
"""Z images (H, W) of a volume and as many masks, or None."""


@dataclass
class _Volume:
    """Slices that were taken together.

    ``read`` needs the number of classes, ``files`` are what it reads, and ``folders`` are those
    where a new file would change the list of volumes. The names of the slices are known without
    reading only where each has a file.
    """

    name: str
    patient: str
    files: list[Path]
    read: Callable[[int], Slices]
    folders: list[Path]
    slices: list[str] = field(default_factory=list)


class ACDC(Layout):
    """ACDC, one item a slice.

    Either the challenge's folders, or slices in HDF5::

        root/training/patient001/Info.cfg                   ED and ES: numbers of the two frames
        root/training/patient001/patient001_frame01.nii.gz  and ..._frame01_gt.nii.gz
        root/testing/patient101/...                         optional, split "test"

        root/patient001_frame01_slice_3.h5                  datasets image and label
        (or root/slices/...)

    The patients, in order of their numbers, are split so that every fourth is in ``val`` and the
    others in ``train``: 75 and 25 of the challenge's 100, with each of its five groups of
    diseases, which lie in blocks of 20, in both.

    Slices are written once as 8-bit grey PNGs into ``wsss/acdc``: the intensities of a **volume**
    (one frame of a patient) are mapped together, ``percentiles`` to black and white, clipped
    beyond. The encoder sees the grey value in its three channels. Image labels come from the
    slice's mask; slices without any class are left out of training.

    Args:
        root: folder that holds ``training``, patient folders or ``.h5`` slices.
        percentiles: two of a volume's intensities, 0 <= low < high <= 100.

    Raises:
        DatasetError: percentiles out of range.
    """

    kind: ClassVar[str] = "acdc"

    def __init__(
        self, root: str | os.PathLike[str], percentiles: Sequence[float] = (0.5, 99.5)
    ) -> None:
        super().__init__(root)
        if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
            raise DatasetError(
                f"data.dataset.percentiles={list(percentiles)}: expected [low, high] with "
                "0 <= low < high <= 100"
            )
        self._percentiles = (float(percentiles[0]), float(percentiles[1]))

    @classmethod
    def download(cls, root: str | os.PathLike[str], **options: Any) -> Path:
        raise DatasetError(f"download=true: {ACDC_SOURCE}")

    @staticmethod
    def root_hint() -> str:
        return "the ACDC folder, the one that holds training/ or the .h5 slices"

    def options(self) -> dict[str, Any]:
        return {"percentiles": list(self._percentiles), "rule": _RULE}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        return read_classes(path) if path.is_file() else ACDC_CLASSES

    def splits(self) -> list[str]:
        return [split for split, volumes in self._volumes().items() if volumes]

    # ------------------------------------------------------------------ what is there

    def _volumes(self) -> dict[str, list[_Volume]]:
        """Volumes of each split."""
        folders = [f for f in ("training", "database/training", ".") if (self.root / f).is_dir()]
        volumes: list[_Volume] = []
        for folder in folders:
            volumes = _patient_folders(self.root / folder)
            if volumes:
                break
        else:
            for folder in (".", "slices", "data/slices"):
                if (self.root / folder).is_dir():
                    volumes = volumes or _hdf5_slices(self.root / folder)
        if not volumes:
            below = sorted(path.parent for path in self.root.glob("*/training"))
            hint = f"\nDid you mean data.root={below[0]} ?" if below else ""
            raise DatasetError(
                f"{self.root}: neither patient folders (training/patient001/Info.cfg) nor slices "
                f"(patient001_frame01_slice_0.h5). {ACDC_SOURCE}{hint}"
            )
        patients = sorted({v.patient for v in volumes}, key=_number)
        held_out = set(patients[3::4])
        if not held_out:
            raise DatasetError(
                f"{self.root}: {len(patients)} patients; with every fourth in val, 4 are needed"
            )
        testing = next(
            (f for f in ("testing", "database/testing") if (self.root / f).is_dir()), None
        )
        return {
            "train": [v for v in volumes if v.patient not in held_out],
            "val": [v for v in volumes if v.patient in held_out],
            "test": _patient_folders(self.root / testing) if testing else [],
        }

    def list_split(self, split: str) -> Listing:
        there = {name: volumes for name, volumes in self._volumes().items() if volumes}
        if split not in there:
            raise DatasetError(f"split '{split}' of {self.root}: there are {', '.join(there)}")
        volumes = there[split]
        low, high = self._percentiles
        # Other settings, other pictures; and the test patients' numbers may be those of others.
        folder = (
            self.work / "acdc" / f"p{low}-{high}-r{_RULE}" / ("test" if split == "test" else "")
        )

        items = [
            item
            for found in in_threads(
                lambda volume: self._write(volume, folder), volumes, f"Cutting slices of {split}"
            )
            for item in found
        ]
        patients = len({v.patient for v in volumes})
        what = f"{count(patients, 'patient')}, {count(len(volumes), 'volume')}"
        notes = [f"{split}: {what}, pictures in {folder}"]
        sources = [path for volume in volumes for path in (*volume.files, *volume.folders)]
        return Listing(items, [*sources, self.root / "classes.txt"], notes)

    def _write(self, volume: _Volume, folder: Path) -> list[Item]:
        """The slices of a volume, written unless they are there already."""
        record = folder / "volumes" / f"{volume.name}.json"
        source = {"classes": len(self.classes), "files": [_stat(path) for path in volume.files]}
        items = self._written(record, source, volume.patient)
        if items is not None:
            return items
        try:
            images, masks = volume.read(len(self.classes))
        except DatasetError as error:
            return [Item(volume.name, group=volume.patient, problem=str(error))]
        names = volume.slices or [f"{volume.name}_slice_{z}" for z in range(len(images))]
        low, high = np.percentile(np.concatenate([i.ravel() for i in images]), self._percentiles)
        items = []
        for z, name in enumerate(names):
            item = Item(name, group=volume.patient)
            items.append(item)
            picture = folder / "images" / f"{name}.png"
            item.image = relative(picture, self.root)
            # A volume of one value is black. In 64 bits, where the quotient cannot overflow.
            scaled = (images[z] - np.float64(low)) / max(high - low, np.finfo(np.float32).tiny)
            grey = np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
            write_atomically(picture, encode_grey(grey))
            if masks is None:
                continue
            mask = folder / "masks" / f"{name}.png"
            item.mask = relative(mask, self.root)
            write_atomically(mask, encode_mask(masks[z]))
        # Last, so that it vouches for whole volumes.
        slices = [[item.name, item.image, item.mask] for item in items]
        write_atomically(record, json.dumps({"source": source, "slices": slices}).encode())
        return items

    def _written(self, record: Path, source: dict[str, Any], patient: str) -> list[Item] | None:
        """The slices of a volume if all were written from these very files."""
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            if content["source"] != source:
                return None
            items = [
                Item(n, image, mask=mask, group=patient) for n, image, mask in content["slices"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        paths = [path for item in items for path in (item.image, item.mask) if path is not None]
        return items if all((self.root / path).is_file() for path in paths) else None

    def no_labels(self, item: Item) -> str:
        return self.no_mask(item)

    def no_mask(self, item: Item) -> str:
        return (
            f"{self.root}: slice '{item.name}' has no mask; add the file ..._gt.nii.gz beside its "
            "volume, or 'label' to its .h5, or remove it"
        )


def _stat(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError:
        return [path.name]
    return [path.name, found.st_size, found.st_mtime_ns]


def _number(patient: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", patient)
    return int(digits or 0), patient


# ---------------------------------------------------------------------------- patient folders


def _patient_folders(folder: Path) -> list[_Volume]:
    volumes: list[_Volume] = []
    without: list[_Volume] = []
    for patient in sorted(folder.iterdir()):
        if not (patient.is_dir() and _PATIENT.fullmatch(patient.name)):
            continue
        frames: dict[int, Path] = {}
        masks: dict[int, Path] = {}
        for path in sorted(patient.iterdir()):
            match = _FRAME.fullmatch(path.name)
            if match:
                (masks if match[3] else frames)[int(match[2])] = path
        info = patient / "Info.cfg"
        folders = [folder, patient, info]
        numbers = _frames_of(info) or sorted(frames)
        for number in numbers:
            name = f"{patient.name}_frame{number:02d}"
            image, mask = frames.get(number, patient / f"{name}.nii.gz"), masks.get(number)
            files = [image] if mask is None else [image, mask]
            read = partial(_read_nifti, image, mask)
            volumes.append(_Volume(name, patient.name, files, read, folders))
        if not numbers:
            read = partial(_no_frame, patient)
            without.append(_Volume(patient.name, patient.name, [], read, folders))
    # If all are without, these are no patients of ACDC.
    return [*volumes, *without] if volumes else []


def _no_frame(patient: Path, num_classes: int) -> Slices:
    raise DatasetError(
        f"{patient}: holds no frame ({patient.name}_frame01.nii.gz); unpack it again or remove it"
    )


def _frames_of(path: Path) -> list[int]:
    """Numbers of the end-diastolic and end-systolic frame in an ``Info.cfg``; [] without one."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return []
    return sorted({int(n) for n in re.findall(r"^\s*E[DS]\s*:\s*(\d+)", text, re.MULTILINE)})


def _read_nifti(image_path: Path, mask_path: Path | None, num_classes: int) -> Slices:
    image = _as_intensities(_load_nifti(image_path), image_path)
    if mask_path is None:
        return _slices(image), None
    mask = _load_nifti(mask_path)
    if mask.shape != image.shape:
        raise DatasetError(
            f"{mask_path}: mask of {mask.shape} voxels, its image has {image.shape}; replace it"
        )
    return _slices(image), _slices(_as_classes(mask, mask_path, num_classes))


def _load_nifti(path: Path) -> NDArray[Any]:
    import nibabel  # takes a moment, and few need it

    if not path.is_file():
        raise DatasetError(f"{path}: no such file; Info.cfg names this frame")
    try:
        volume = np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    except Exception as error:  # nibabel raises what a damaged file leads to
        raise DatasetError(f"{path}: not readable as NIfTI ({error}); replace it") from error
    if volume.ndim != 3 or not volume.size:
        raise DatasetError(f"{path}: array of {volume.shape}, expected a volume (X, Y, Z)")
    return volume


def _slices(volume: NDArray[Any]) -> list[NDArray[Any]]:
    """(X, Y, Z) to Z slices (H, W) = (Y, X), the heart upright as viewers show it."""
    return [np.ascontiguousarray(volume[:, :, z].T) for z in range(volume.shape[2])]


def _as_intensities(image: NDArray[Any], path: Path) -> Floats:
    if image.dtype.kind not in "biuf":
        raise DatasetError(f"{path}: {image.dtype} intensities, expected numbers; replace it")
    with np.errstate(over="ignore"):
        result = image.astype(np.float32)
    if not np.isfinite(result).all():
        raise DatasetError(f"{path}: some intensities are no finite numbers; replace it")
    return result


def _as_classes(mask: NDArray[Any], path: Path, num_classes: int) -> NDArray[np.uint8]:
    allowed = [*range(num_classes + 1), VOID]
    wrong = np.unique(mask[~np.isin(mask, allowed)])
    if wrong.size:
        shown = ", ".join(f"{value:g}" for value in wrong[:5])
        raise DatasetError(
            f"{path}: mask holds the values {shown}{', ...' if wrong.size > 5 else ''}, allowed "
            f"are 0..{num_classes} and {VOID}; map them to classes, or list the missing classes "
            "in classes.txt"
        )
    return mask.astype(np.uint8)


# ------------------------------------------------------------------------------- HDF5 slices


def _hdf5_slices(folder: Path) -> list[_Volume]:
    found: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        match = _SLICE.fullmatch(path.name)
        if match:
            found[match[1], int(match[2])][int(match[3])] = path
    volumes = []
    for (patient, frame), slices in sorted(found.items()):
        paths = [slices[z] for z in sorted(slices)]
        volumes.append(
            _Volume(
                f"{patient}_frame{frame:02d}",
                patient,
                paths,
                partial(_read_hdf5, paths),
                [folder],
                [path.stem for path in paths],
            )
        )
    return volumes


def _read_hdf5(paths: list[Path], num_classes: int) -> Slices:
    import h5py

    images, masks = [], []
    for path in paths:
        try:
            with h5py.File(path) as file:
                image = np.asarray(file["image"])
                mask = np.asarray(file["label"]) if "label" in file else None
        except Exception as error:  # h5py raises what a damaged file leads to
            raise DatasetError(
                f"{path}: not readable as a slice with 'image' and 'label' ({error}); replace it"
            ) from error
        wrong_mask = mask is not None and mask.shape != image.shape
        if image.ndim != 2 or not image.size or wrong_mask:
            shape = None if mask is None else mask.shape
            raise DatasetError(
                f"{path}: image {image.shape} and label {shape}, expected two (H, W) of one size"
            )
        images.append(_as_intensities(image, path))
        if mask is not None:
            masks.append(_as_classes(mask, path, num_classes))
    if masks and len(masks) != len(images):
        raise DatasetError(f"{paths[0]}: some slices of this volume have a 'label', others not")
    return images, masks or None
