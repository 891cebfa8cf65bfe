"""``shapes`` as a tree of ACDC, the cardiac MRI challenge: patients with two volumes each.

::

    training/patient001/Info.cfg
    training/patient001/patient001_frame01.nii.gz      int16 (X, Y, Z): end-diastole
    training/patient001/patient001_frame01_gt.nii.gz   uint8 (X, Y, Z), 1..C and 0
    training/patient001/patient001_frame12.nii.gz      end-systole, and its _gt
    classes.txt                                        C names, in place of ACDC's three
    slices.json                                        patient001_frame01_slice_0: shapes_000001

A slice is the luma of one image, ``volume[:, :, z].T`` being (H, W). A volume is multiplied by 1,
2 or 3, because the intensities of MRI have no unit: a reader must normalise each volume by itself.
No image is constant, so neither is a volume. ACDC has no void: the void pixels (255) of the other
layouts are background (0) here, and a score on the outlines counts them. The time series of the
challenge, ``patient001_4d.nii.gz``, is left out.

ACDC has labels for its training patients only; every fourth of them, in the order of their numbers,
is for validation. The images of the two splits are dealt evenly, in order, to as few patients as
hold them.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss.data.images import VOID
from wsss.data.shapes.files import Draw, Numbers, image_name, jpeg, write_classes

FRAMES = {"ED": 1, "ES": 12}
MAX_SLICES = 10  # of a volume
VAL_EVERY = 4  # patients 4, 8, 12 ... are for validation
FACTORS = (1, 2, 3)
SPACING = (1.5, 1.5, 10.0)  # mm

_INFO = f"""\
ED: {FRAMES["ED"]}
ES: {FRAMES["ES"]}
Group: NOR
Height: 170.0
NbFrame: 30
Weight: 70.0
"""


def files(numbers: Numbers) -> Iterator[str]:
    """Paths under the root of all files that :func:`write` writes.

    Raises:
        ValueError: if the counts of the splits do not fit patients in the ratio of 3 to 1.
    """
    for patient, volumes in _patients(numbers).items():
        yield f"training/{patient}/Info.cfg"
        for volume in volumes:
            yield f"training/{patient}/{volume}.nii.gz"
            yield f"training/{patient}/{volume}_gt.nii.gz"
    yield "slices.json"
    yield "classes.txt"


def write(root: Path, numbers: Numbers, draw: Draw) -> None:
    """Write the tree into the empty folder ``root``; raises as :func:`files` does."""
    slices: dict[str, str] = {}
    written = 0
    for patient, volumes in _patients(numbers).items():
        folder = root / "training" / patient
        folder.mkdir(parents=True)
        (folder / "Info.cfg").write_text(_INFO, encoding="utf-8")
        for volume, members in volumes.items():
            samples = list(draw(members))
            luma = np.stack([_luma(sample.image).T for sample in samples], axis=-1)
            masks = np.stack([sample.mask.T for sample in samples], axis=-1)
            factor = FACTORS[written % len(FACTORS)]
            _save(folder / f"{volume}.nii.gz", luma.astype(np.int16) * np.int16(factor))
            _save(folder / f"{volume}_gt.nii.gz", np.where(masks == VOID, np.uint8(0), masks))
            for z, number in enumerate(members):
                slices[f"{volume}_slice_{z}"] = image_name(number)
            written += 1
    (root / "slices.json").write_text(json.dumps(slices, indent=2) + "\n", encoding="utf-8")
    write_classes(root)


def _patients(numbers: Numbers) -> dict[str, dict[str, list[int]]]:
    """The image numbers of each volume of each patient."""
    patients = _count_patients(len(numbers["train"]), len(numbers["val"]))
    shares = {"train": patients - patients // VAL_EVERY, "val": patients // VAL_EVERY}
    stacks = {
        split: iter(np.array_split(members, len(FRAMES) * shares[split]))
        for split, members in numbers.items()
    }
    result = {}
    for index in range(patients):
        patient = f"patient{index + 1:03d}"
        split = "val" if index % VAL_EVERY == VAL_EVERY - 1 else "train"
        result[patient] = {
            f"{patient}_frame{frame:02d}": next(stacks[split]).tolist() for frame in FRAMES.values()
        }
    return result


def _count_patients(train: int, val: int) -> int:
    """The fewest patients whose volumes hold both splits, with no volume empty."""
    most, least = len(FRAMES) * MAX_SLICES, len(FRAMES)  # images of a patient
    patients = VAL_EVERY
    while (patients - patients // VAL_EVERY) * most < train or patients // VAL_EVERY * most < val:
        patients += 1
    for_val = patients // VAL_EVERY
    for_train = patients - for_val
    if train < for_train * least or val < for_val * least:
        raise ValueError(
            f"shapes: train={train} and val={val} do not fit layout='acdc', where every "
            f"{VAL_EVERY}th patient is for validation and has {least} volumes of 1 to "
            f"{MAX_SLICES} slices: that takes {for_train} training and {for_val} validation "
            f"patients or more; give train at least {for_train * least} and val at least "
            f"{for_val * least}, or another layout"
        )
    return patients


def _luma(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) luma of the image as the JPEG file of the other layouts holds it."""
    with Image.open(io.BytesIO(jpeg(image))) as decoded:
        return np.asarray(decoded.convert("L"))


def _save(path: Path, volume: NDArray[np.int16] | NDArray[np.uint8]) -> None:
    import nibabel  # here, because only this layout needs it and it is slow to import

    image = nibabel.Nifti1Image(volume, np.diag([*SPACING, 1.0]))
    image.header.set_xyzt_units("mm")
    # Without the time, so that the same seed gives the same bytes.
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
