"""SBD, the Semantic Boundaries Dataset: masks of VOC images, stored as MATLAB files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsss.data.images import DatasetError, encode_mask
from wsss.data.layout import in_threads
from wsss.data.manifest import Item, files_by_stem, relative
from wsss.files import write_atomically


class SBD:
    """The ``dataset`` folder of SBD's ``benchmark_RELEASE``.

    ::

        root/cls/NAME.mat     GTcls.Segmentation (H, W): 0 background, 1..20 VOC's classes
        root/train.txt        8 498 names
        root/val.txt          2 857 names

    Its images are VOC 2012's own, so ``img`` is not needed.

    Args:
        root: that folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def find(cls, voc_root: Path, root: str | os.PathLike[str] | None = None) -> SBD | None:
        """SBD in ``root``, or where it usually lies around a VOC tree; None if it is not there.

        Raises:
            DatasetError: ``root`` is given and is not SBD.
        """
        if root is not None:
            named = Path(root).expanduser()
            for folder in (named, named / "dataset", named / "benchmark_RELEASE/dataset"):
                if _is_sbd(folder):
                    return cls(folder)
            raise DatasetError(
                f"sbd_root='{root}': holds no cls folder with train.txt and val.txt; give the "
                "folder 'dataset' of SBD's benchmark_RELEASE"
            )
        voc_root = voc_root.absolute()  # "." has no parents
        for above in (voc_root, voc_root.parent, voc_root.parent.parent):
            for name in ("SBD", "sbd", "benchmark_RELEASE/dataset"):
                if _is_sbd(above / name):
                    return cls(above / name)
        return None

    def names(self) -> set[str]:
        """Names in ``train.txt`` and ``val.txt``."""
        found: set[str] = set()
        for path in self.lists:
            found.update(path.read_text(encoding="utf-8-sig").split())
        return found

    @property
    def lists(self) -> list[Path]:
        """``train.txt`` and ``val.txt``."""
        return [self.root / "train.txt", self.root / "val.txt"]

    def mask(self, name: str) -> Path:
        """Where the mask of this name lies."""
        return self.root / "cls" / f"{name}.mat"

    def masks(self) -> set[str]:
        """Names of the masks that are there."""
        return set(files_by_stem(self.root / "cls", (".mat",)))

    def build_masks(self, items: list[Item], root: Path, folder: Path) -> str:
        """Write the masks of ``items`` as PNGs into ``folder``, those that are not there yet.

        A PNG bears the time of its ``.mat``: another time says that it is of another file.
        Sets ``item.mask``, or ``item.mask_problem`` where the ``.mat`` cannot be read.

        Args:
            root: what the manifest's paths are relative to.

        Returns:
            a note on what was done.
        """
        folder.mkdir(parents=True, exist_ok=True)
        there = files_by_stem(folder, (".png",))

        def build(item: Item) -> None:
            path, source = folder / f"{item.name}.png", self.mask(item.name)
            item.mask = relative(path, root)
            time = source.stat().st_mtime_ns
            if item.name in there and path.stat().st_mtime_ns == time:
                return
            try:
                write_atomically(path, encode_mask(read_sbd_mask(source)))
            except DatasetError as error:
                item.mask_problem = str(error)
            else:
                os.utime(path, ns=(time, time))

        for _ in in_threads(build, items, "Building masks from SBD"):
            pass
        return f"{len(items)} masks from SBD in {folder}"


def read_sbd_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) uint8 class mask of a ``cls/NAME.mat``.

    Raises:
        DatasetError: not readable, or without ``GTcls.Segmentation`` of class numbers.
    """
    from scipy.io import loadmat  # takes a moment, and few need it

    try:
        mask = np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0])
        if mask.ndim != 2 or not mask.size:
            raise ValueError(f"Segmentation of shape {mask.shape}, expected (H, W)")
        classes = mask.astype(np.uint8)
        if (classes != mask).any():
            raise ValueError(f"Segmentation holds {mask.min()}..{mask.max()}, no class numbers")
    except Exception as error:  # scipy raises what a damaged file leads to
        raise DatasetError(f"{path}: not readable as an SBD mask ({error}); replace it") from error
    return classes


def _is_sbd(folder: Path) -> bool:
    return (folder / "cls").is_dir() and all(
        (folder / f"{split}.txt").is_file() for split in ("train", "val")
    )
