"""Score a folder of masks: pseudo-labels on disk, or another program's predictions."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from wsss.data.datamodule import WSSSDataModule
from wsss.data.given_masks import Likeness
from wsss.data.images import VOID, DatasetError, read_mask, summary
from wsss.errors import UserError
from wsss.files import write_atomically
from wsss.metrics import BoundaryScores, SegmentationScores
from wsss.report.tables import number


@dataclass
class _Found:
    """What was read: masks scored, those equal to the truth, pixels undecided and in all."""

    scored: int = 0
    identical: int = 0
    likeness: Likeness = field(default_factory=Likeness)
    undecided: int = 0
    pixels: int = 0
    problems: list[str] = field(default_factory=list)


def score_masks(
    folder: Path, data: WSSSDataModule, output_dir: Path, boundary: bool = True
) -> dict[str, float]:
    """Compare ``folder``/NAME.png with the true masks of a split; writes ``scores.json``.

    A pixel that a mask leaves undecided (255) counts as background: nothing is left out of the
    score but what is void in the truth. The share of undecided pixels is printed and written.
    Masks that are the truth but for a few pixels bring a warning: what is trained on them is fully
    supervised.

    Args:
        folder: palette or grey PNGs of class numbers, each of its image's size.
        data: its evaluation split is compared with; its ``on_error`` says whether masks that are
            missing or broken are left out.
        output_dir: an existing folder.
        boundary: take the boundary F too.

    Returns:
        ``masks/miou`` and, with ``boundary``, ``masks/boundary_f`` and ``masks/jf``, in [0, 1].

    Raises:
        UserError: the split has no masks, the folder has none of it, or masks are missing or
            broken.
    """
    if not data.has_masks:
        raise UserError(f"split '{data.val_split}' of {data.root} has no masks to compare with.")
    images = data.val_images
    assert images is not None
    indices = data.val_indices()
    paths = {i: folder / f"{images.names[i]}.png" for i in indices}
    missing = [path for path in paths.values() if not path.is_file()]
    if len(missing) == len(paths):
        raise UserError(
            f"masks='{folder}' holds no mask of split '{data.val_split}', such as "
            f"{missing[0].name}: is it another split's (split=...)?"
        )
    found = _Found(problems=[f"{path}: no such mask" for path in missing])
    if missing and data.on_error == "raise":
        raise _unusable(folder, found.problems, len(paths))

    names = ("background", *data.classes)
    scores = SegmentationScores(len(names), class_names=names)
    contours = BoundaryScores(len(names), class_names=names) if boundary else None
    left_out = set(missing)
    for i, path in track(paths.items(), "Scoring", transient=True):
        if path in left_out:
            continue
        truth = images.load_mask(i)
        try:
            mask = read_mask(path, data.num_classes, (truth.shape[0], truth.shape[1]))
        except DatasetError as error:
            found.problems.append(str(error))
            continue
        found.scored += 1
        # Where the truth is void no score looks, and copies of it differ in what stands there.
        found.identical += bool((mask == truth)[truth != VOID].all())
        found.likeness.add(mask, truth)
        found.undecided += int((mask == VOID).sum())
        found.pixels += mask.size
        prediction = torch.from_numpy(mask).long()
        prediction[prediction == VOID] = 0
        target = torch.from_numpy(truth).long()
        scores.update(prediction, target)
        if contours is not None:
            contours.update(prediction, target)
    if found.problems and (data.on_error == "raise" or not found.scored):
        raise _unusable(folder, found.problems, len(paths))
    result = _tell(folder, data.val_split, output_dir, scores, contours, found)
    if found.likeness.is_truth:  # the last that is said, so that nobody misses it
        warnings.warn(
            f"THESE MASKS ARE THE GROUND TRUTH: masks='{folder}' and the data set's own are "
            f"{found.likeness}. A network trained on them is fully supervised; this score says "
            "nothing.",
            stacklevel=2,
        )
    return result


def _unusable(folder: Path, problems: list[str], total: int) -> UserError:
    return UserError(
        f"masks='{folder}': {len(problems)} of {total} cannot be scored:\n{summary(problems)}\n"
        "Mend them, or leave them out with data.on_error=skip."
    )


def _tell(
    folder: Path,
    split: str,
    output_dir: Path,
    scores: SegmentationScores,
    contours: BoundaryScores | None,
    found: _Found,
) -> dict[str, float]:
    """Print, write and return the scores."""
    found_by_class = scores.compute()
    result = {"masks/miou": float(found_by_class["miou"])}
    if contours is not None:
        result["masks/boundary_f"] = float(contours.compute()["mean"])
        result["masks/jf"] = (result["masks/miou"] + result["masks/boundary_f"]) / 2
    table = Table(title="Masks on disk (%)", title_justify="left")
    table.add_column("class", no_wrap=True)
    table.add_column("IoU", justify="right")
    assert scores.class_names is not None
    percent = [float(100 * iou) for iou in found_by_class["iou"]]
    per_class = dict(zip(scores.class_names, percent, strict=True))
    for name, iou in per_class.items():
        table.add_row(escape(name), number(iou))
    table.add_section()
    for name, value in result.items():
        table.add_row(name, number(100 * value))
    Console().print(table)
    share = found.undecided / found.pixels
    print(f"{found.scored} masks, {100 * share:.2f} % of their pixels undecided ({VOID}).")
    if found.problems:
        print(f"Left out: {len(found.problems)}\n{summary(found.problems)}")
    content = {
        "masks": str(folder),
        "split": split,
        "images": found.scored,
        "left_out": len(found.problems),
        "undecided": round(share, 4),
        "identical_to_truth": found.identical,
        "scores": {k: _rounded(100 * v) for k, v in result.items()},
        "per_class": {k: _rounded(v) for k, v in per_class.items()},
    }
    write_atomically(output_dir / "scores.json", f"{json.dumps(content, indent=2)}\n".encode())
    print(f"Written to {output_dir}")
    return result


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 2)
