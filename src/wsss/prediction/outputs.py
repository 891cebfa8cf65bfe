"""What is written of each image: names that never collide, files that are whole or not there."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsss.data.images import encode_mask
from wsss.errors import UserError
from wsss.files import write_atomically
from wsss.prediction.inputs import Found, Photo
from wsss.prediction.native import LabelMap
from wsss.report.legend import Entry, draw_prediction

_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Outputs:
    """The three files of one image, and the mark that they are being written."""

    mask: Path
    overlay: Path
    about: Path
    mark: Path

    @classmethod
    def named(cls, stem: Path) -> Outputs:
        """``stem.png``, ``stem_overlay.jpg``, ``stem.json``: no stem's file is another stem's."""
        mask, overlay, about = (
            stem.with_name(f"{stem.name}{end}") for end in (".png", "_overlay.jpg", ".json")
        )
        return cls(mask, overlay, about, stem.with_name(f".{stem.name}.part"))

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.mask, self.overlay, self.about

    def found(self) -> list[Path]:
        """Those of the three that are there, whatever they are."""
        return [path for path in self.files if path.exists() or path.is_symlink()]


@dataclass(frozen=True)
class Job:
    """An image and where its results go."""

    image: Path
    outputs: Outputs


def name_jobs(found: Found, output_dir: Path) -> list[Job]:
    """The images with their results: in the folder structure of the input, named as the image.

    Images that differ in their suffix alone keep it: ``a.jpg`` and ``a.png`` give ``a.jpg.png``
    and ``a.png.png``.

    Raises:
        UserError: a result would replace one of the images.
    """
    relative = [p.relative_to(found.base) for p in found.files]
    stems = [p.with_suffix("") for p in relative]
    while True:  # a full name may be another's stem: a.jpg, a.png, a.jpg.tif
        often = Counter(stems)
        full = [
            name if often[stem] > 1 else stem for name, stem in zip(relative, stems, strict=True)
        ]
        if full == stems:
            break
        stems = full
    outputs = [Outputs.named(output_dir / stem) for stem in stems]
    images = {p.resolve() for p in found.files}
    for output in outputs:
        for path in output.files:
            if path.resolve() in images:
                raise UserError(
                    f"output_dir='{output_dir}': the result '{path}' would replace an image of the "
                    "same name. Choose another folder with output_dir=..."
                )
    return [Job(image, output) for image, output in zip(found.files, outputs, strict=True)]


def write_results(
    job: Job, photo: Photo, labels: LabelMap, classes: Sequence[str], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Write the three files of an image; each appears whole, the JSON last.

    The mark lies beside them from before the first until after the last: files left by an
    interruption are known as such, and old files that stand beside new ones too.

    Returns:
        ``classes`` of the JSON: the labels that the image holds, background included.
    """
    share = labels.share
    found = [
        {
            "name": classes[i],
            "index": i,
            "area": int(labels.area[i]),
            "share": round(float(share[i]), 6),
            "confidence": round(float(labels.confidence[i]), 4),
        }
        for i in np.flatnonzero(labels.area).tolist()
    ]
    entries = [Entry(classes[i], i, share[i]) for i in np.argsort(-share) if i and share[i]]
    buffer = io.BytesIO()
    overlay = draw_prediction(photo.thumbnail, labels.mask, entries, len(classes))
    Image.fromarray(overlay).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    content = {
        "file": absolute(job.image),
        "width": photo.width,
        "height": photo.height,
        "classes": found,
        **about,
    }
    job.outputs.mark.parent.mkdir(parents=True, exist_ok=True)
    job.outputs.mark.touch()
    write_atomically(job.outputs.mask, encode_mask(labels.mask))
    write_atomically(job.outputs.overlay, buffer.getvalue())
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(job.outputs.about, f"{text}\n".encode())
    job.outputs.mark.unlink()
    return found


def kept_classes(job: Job, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
    """``classes`` of results that are there, or None: no JSON says that they were made of this
    file in this way.
    """
    try:
        content = json.loads(job.outputs.about.read_bytes())
        if content["settings"] == settings and content["file"] == absolute(job.image):
            return list(content["classes"])
    except (OSError, ValueError, KeyError, TypeError):  # not written by us, or damaged
        pass
    return None


def absolute(path: Path) -> str:
    """A path that is the same wherever the command is started, links kept."""
    return os.path.abspath(path)  # noqa: PTH100  Path.absolute keeps `..`
