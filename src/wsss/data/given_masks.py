"""Training masks from a folder in place of the data set's own: exported pseudo-labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from wsss.data.images import (
    VOID,
    DatasetError,
    count,
    inspect_mask,
    read_mask,
    summary,
)
from wsss.data.layout import Split, in_threads
from wsss.data.order import evenly

#: written beside its folders by ``wsss pseudo_label``
RECORD = "pseudo_labels.json"
_COMPARED = 64
#: masks that agree with the truth on this part of the objects are copies of it: pseudo-labels are
#: far from it, and a pixel here or there, or wider borders, make no pseudo-labels of the truth
_SAME = 0.995


@dataclass
class Likeness:
    """How far masks are the truth, of the pixels that both decide and either gives a class.

    Pixels that are background to both say little: most of an image may be that.
    """

    masks: int = 0
    pixels: int = 0
    agreeing: int = 0

    def add(self, mask: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Compare two masks (H, W) of one image."""
        compared = (mask != VOID) & (truth != VOID) & ((mask != 0) | (truth != 0))
        self.masks += 1
        self.pixels += int(compared.sum())
        self.agreeing += int((mask == truth)[compared].sum())

    @property
    def is_truth(self) -> bool:
        return self.pixels > 0 and self.agreeing >= _SAME * self.pixels

    def __str__(self) -> str:
        part = 100 * self.agreeing / max(self.pixels, 1)
        return f"the same on {part:.1f} % of the objects' pixels of {count(self.masks, 'mask')}"


class GivenMasks:
    """A split whose masks are ``folder``/NAME.png; everything else is the split's own.

    Masks that ``wsss pseudo_label`` wrote have their headers looked at, and up to 64 of them every
    pixel; of others every pixel of every mask. Up to 64 are compared with the data set's own, where
    there are any.

    Args:
        images: an open split; its own masks are only compared with, and may be missing or broken.
        folder: palette or grey PNGs of class numbers, each of its image's size; 255 is left out of
            the loss.
        on_error: ``skip`` leaves out images whose mask is missing or broken, counted and named in a
            warning.
        allow_truth: take masks that are the data set's own.

    Attributes:
        about: what they are and where they come from, in a sentence.
        notes: the split's.

    Raises:
        DatasetError: no such folder, masks that are missing or broken, another class list, or masks
            that are the data set's own but for a few pixels: what is trained on them is fully
            supervised.
    """

    def __init__(
        self,
        images: Split,
        folder: Path,
        on_error: Literal["raise", "skip"] = "raise",
        allow_truth: bool = False,
    ) -> None:
        self._images = images
        self.notes = images.notes
        self.folder = folder
        record = _read_record(folder, images.classes)
        names = images.names
        if not folder.is_dir():
            raise DatasetError(f"data.masks='{folder}': no such folder")
        with_truth = [i for i in range(len(names)) if images.has_mask(i)]
        compared = [with_truth[i] for i in evenly(len(with_truth), _COMPARED)]
        some = {*evenly(len(names), _COMPARED), *compared}
        looked_into = some if record else set(range(len(names)))

        def look(index: int) -> str | None:
            path = self._path(index)
            if index not in looked_into:
                return inspect_mask(path, len(images.classes), images.sizes[index])
            try:
                read_mask(path, len(images.classes), images.sizes[index])
            except DatasetError as error:
                return str(error)
            return None

        found = list(in_threads(look, list(range(len(names))), "Checking masks"))
        problems = [problem for problem in found if problem is not None]
        if len(problems) == len(names) or (problems and on_error == "raise"):
            below = [kind for kind in ("cpl", "spl") if (folder / kind).is_dir()]
            hint = f" Did you mean data.masks={folder / below[0]} ?" if below else ""
            raise DatasetError(
                f"data.masks='{folder}': {len(problems)} of {count(len(names), 'image')} of split "
                f"'{images.split}' have no mask that can be used:\n{summary(problems)}\n"
                f"Make them with wsss pseudo_label, or leave these images out with "
                f"data.on_error=skip.{hint}"
            )
        if problems:
            rank_zero_warn(
                f"data.masks='{folder}': left out {len(problems)} of {count(len(names), 'image')}:"
                f"\n{summary(problems)}"
            )
        self._kept = [i for i, problem in enumerate(found) if problem is None]
        self.about = f"{count(len(self._kept), 'pseudo-label')} of {folder}{_origin(record)}"
        likeness = self._compare([i for i in compared if found[i] is None])
        if likeness.is_truth:
            if not allow_truth:
                raise DatasetError(
                    f"data.masks='{folder}' are the data set's own masks ({likeness} that were "
                    "compared): a network trained on them is fully supervised. For that leave "
                    "data.masks out; if it is what you want, set data.masks_may_be_truth=true."
                )
            self.about = f"ground truth, under the name of pseudo-labels, of {folder}"
        self.split = images.split
        self.classes = images.classes
        self.names = [names[i] for i in self._kept]
        self.groups = [images.groups[i] for i in self._kept]
        self.labels = images.labels[self._kept]
        self.has_masks = True

    def __len__(self) -> int:
        return len(self._kept)

    def load_image(self, index: int, longest: int | None = None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB. See :meth:`wsss.data.layout.Split.load_image`."""
        return self._images.load_image(self._kept[index], longest)

    def load_mask(self, index: int) -> NDArray[np.uint8]:
        """(H, W) uint8 with 0..C and 255. See :func:`read_mask` for what it raises."""
        i = self._kept[index]
        return read_mask(self._path(i), len(self.classes), self._images.sizes[i])

    def _path(self, index: int) -> Path:
        return self.folder / f"{self._images.names[index]}.png"

    def _compare(self, indices: list[int]) -> Likeness:
        likeness = Likeness()
        for i in indices:
            try:
                truth = self._images.load_mask(i)
            except DatasetError:  # nothing is trained on it
                continue
            mask = read_mask(self._path(i), len(self._images.classes), self._images.sizes[i])
            likeness.add(mask, truth)
        return likeness


def _read_record(folder: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    """What ``wsss pseudo_label`` wrote of the masks; empty where there is nothing.

    Raises:
        DatasetError: it names other classes.
    """
    path = folder.parent / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = record["settings"]
        own, described = list(settings["all"]["classes"]), folder.name in settings
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # another program's masks, or a record that says nothing of this folder
    if own != list(classes):
        raise DatasetError(
            f"data.masks='{folder}' were made for other classes ({len(own)}: {', '.join(own[:5])} "
            f"...) than the data set's ({len(classes)}: {', '.join(classes[:5])} ...); see {path}. "
            "Make them anew for this data set."
        )
    return record if described else {}


def _origin(record: dict[str, Any]) -> str:
    return f", made by {record['checkpoint']}" if record.get("checkpoint") else ""
