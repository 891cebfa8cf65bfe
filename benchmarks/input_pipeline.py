"""Cost of making both training views of an image, against PIL and torchvision.

    python benchmarks/input_pipeline.py --root data/VOCdevkit/VOC2012
    python benchmarks/input_pipeline.py --images 200 --repeats 9   # on generated JPEGs
    python benchmarks/input_pipeline.py --size 4000x3000 --max-side 512   # as data=folder shrinks

Both sides read the same JPEGs and make the same views (weak: rescale, flip, crop, blur; strong: one
appearance transform on top) from the same random draws, alternating, in one process and one
thread. Ours is ``wsss.data``. The other is the plain way: the image is decoded, rescaled,
mirrored, padded, cropped and blurred by torchvision's functions for PIL images, and ``to_tensor``
and ``normalize`` make its tensors. Files come from the page cache.

Ours ends with uint8 tensors: in training they become floats and are normalised on the device. The
table has what that costs on the CPU as a line of its own, and the ratio with and without it. Times
are CPU time of the process, so that other processes matter little; of each image's repeats the
fastest counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from wsss.data import views
from wsss.data.batch import to_unit_range
from wsss.data.datamodule import collate_train
from wsss.data.images import IMAGE_SUFFIXES, read_rgb
from wsss.data.order import sample_rng
from wsss.data.views import BLUR_SIGMA, ENHANCE_RANGE, POSTERIZE_BITS, TwoViews

PARTS = ("decode", "geometry", "blur", "appearance", "to tensor", "normalise")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GENERATED = 16

Times = dict[str, float]


class Clock:
    """CPU seconds of this process, by part."""

    def __init__(self) -> None:
        self.times: Times = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        self.times[part] += time.process_time() - start
        return result


class Ours:
    """``wsss.data``: from the file to the batch that goes to the device."""

    def __init__(self, view: TwoViews, max_side: int | None) -> None:
        self.view = view
        self.max_side = max_side
        # What the data module asks for: enough for the largest scale.
        self.longest = None if max_side is None else math.ceil(max_side * view.scale[1])
        self.clock = Clock()
        # The parts inside TwoViews are timed where it calls them.
        for name, part in (
            ("gaussian_blur", "blur"),
            ("apply_appearance", "appearance"),
            ("on_black", "to tensor"),
        ):
            setattr(views, name, self._watched(getattr(views, name), part))
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))

    def _watched(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        return lambda *arguments: self.clock.timed(part, lambda: function(*arguments))

    def __call__(self, path: Path, number: int) -> tuple[Tensor, Tensor]:
        self.clock = clock = Clock()
        image = clock.timed("decode", lambda: read_rgb(path, longest=self.longest))
        start = time.process_time()
        pair = self.view(image, sample_rng(0, number), max_side=self.max_side)
        inside = sum(clock.times[part] for part in ("blur", "appearance", "to tensor"))
        clock.times["geometry"] = time.process_time() - start - inside
        sample: Any = SimpleNamespace(
            views=pair, labels=np.zeros(20, np.float32), name=path.stem, number=number
        )
        batch = clock.timed("to tensor", lambda: collate_train([sample]))

        def normalise() -> list[Tensor]:  # as the data module and the encoder do on the device
            return [(to_unit_range(x) - self.mean) / self.std for x in (batch.weak, batch.strong)]

        weak, strong = clock.timed("normalise", normalise)
        return weak[0], strong[0]


class PlainWay:
    """PIL and torchvision, step by step as the views are described."""

    def __init__(self, view: TwoViews, max_side: int | None) -> None:
        self.view = view
        self.max_side = max_side
        self.clock = Clock()

    def __call__(self, path: Path, number: int) -> tuple[Tensor, Tensor]:
        self.clock = clock = Clock()
        u = [float(x) for x in sample_rng(0, number).random(8)]
        image = clock.timed("decode", lambda: Image.open(path).convert("RGB"))
        weak = clock.timed("geometry", lambda: self.place(image, u))
        if u[4] < self.view.blur:
            sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[5]
            side = round(6 * sigma + 1) | 1  # the kernel OpenCV chooses
            weak = clock.timed("blur", lambda: F.gaussian_blur(weak, [side, side], [sigma, sigma]))
        strong = clock.timed("appearance", lambda: self.change(weak, u[6], u[7]))
        pair = clock.timed("to tensor", lambda: [F.to_tensor(weak), F.to_tensor(strong)])
        weak, strong = clock.timed(
            "normalise", lambda: [F.normalize(x, list(MEAN), list(STD)) for x in pair]
        )
        return weak, strong

    def place(self, image: Image.Image, u: list[float]) -> Image.Image:
        (low, high), crop = self.view.scale, self.view.crop_size
        ratio = low + (high - low) * u[0]
        if self.max_side is not None:
            ratio *= min(1.0, self.max_side / max(image.size))
        size = [max(1, round(side * ratio)) for side in (image.height, image.width)]
        image = F.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
        if u[1] < self.view.flip:
            image = F.hflip(image)
        offsets = [int(v * (abs(s - c) + 1)) for s, c, v in zip(size, crop, u[2:4], strict=True)]
        # Before (left, top) and behind (right, bottom) lies black where the crop is larger.
        before = [o if s < c else 0 for s, c, o in zip(size, crop, offsets, strict=True)]
        behind = [max(0, c - s - b) for s, c, b in zip(size, crop, before, strict=True)]
        if any(before + behind):
            image = F.pad(image, [before[1], before[0], behind[1], behind[0]])
        top, left = (o if s >= c else 0 for s, c, o in zip(size, crop, offsets, strict=True))
        return F.crop(image, top, left, *crop)

    def change(self, image: Image.Image, which: float, u: float) -> Image.Image:
        name = self.view.appearance[int(which * len(self.view.appearance))]
        factor = ENHANCE_RANGE[0] + (ENHANCE_RANGE[1] - ENHANCE_RANGE[0]) * u
        bits = POSTERIZE_BITS[0] + int(u * (POSTERIZE_BITS[1] - POSTERIZE_BITS[0] + 1))
        changes: dict[str, Callable[[], Image.Image]] = {
            "identity": lambda: image,
            "autocontrast": lambda: F.autocontrast(image),
            "equalize": lambda: F.equalize(image),
            "solarize": lambda: F.solarize(image, int(256 * u)),
            "color": lambda: F.adjust_saturation(image, factor),
            "contrast": lambda: F.adjust_contrast(image, factor),
            "brightness": lambda: F.adjust_brightness(image, factor),
            "sharpness": lambda: F.adjust_sharpness(image, factor),
            "posterize": lambda: F.posterize(image, bits),
        }
        return changes[name]()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        help="folder of JPEGs, or a VOC tree with JPEGImages; default: random textures of 500x375",
    )
    parser.add_argument("--images", type=int, default=64, help="views to draw (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--crop", type=int, default=448, help="side of the views (default: 448)")
    parser.add_argument(
        "--size", default="500x375", help="of the generated images (default: 500x375)"
    )
    parser.add_argument("--max-side", type=int, help="as data.max_side (default: none)")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.repeats, arguments.crop, arguments.max_side or 1) < 1:
        parser.error("--images, --repeats, --crop and --max-side are numbers from 1")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.root:
            paths = list_images(arguments.root)
        else:
            width, height = map(int, arguments.size.split("x"))
            paths = generate(Path(folder), width, height)
        if not paths:
            parser.error(f"--root {arguments.root}: no images in that folder")
        # Spread over the list; a short list is gone through again with other draws.
        step = max(1, len(paths) // arguments.images)
        chosen = [paths[n * step % len(paths)] for n in range(arguments.images)]
        view = TwoViews(arguments.crop)
        times, difference = measure(view, chosen, arguments.repeats, arguments.max_side)
        sizes = [Image.open(path).size for path in chosen]
    report(times, difference, sizes, arguments)


def list_images(root: Path) -> list[Path]:
    folder = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root
    return sorted(path for path in folder.glob("*") if path.suffix in IMAGE_SUFFIXES)


def generate(folder: Path, width: int, height: int) -> list[Path]:
    """Smooth random colours with grain; of VOC's size, files are about as large as VOC's."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{n:02}.jpg" for n in range(GENERATED)]
    for path in paths:
        smooth = cv2.resize(
            rng.random((12, 16, 3)) * 255, (width, height), interpolation=cv2.INTER_CUBIC
        )
        texture = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(texture).save(path, quality=92)
    return paths


def measure(
    view: TwoViews, paths: list[Path], repeats: int, max_side: int | None
) -> tuple[dict[str, list[Times]], float]:
    """Each side's times of each image (its fastest repeat), and how far the weak views differ."""
    sides: dict[str, Ours | PlainWay] = {
        "ours": Ours(view, max_side),
        "plain": PlainWay(view, max_side),
    }
    times: dict[str, list[Times]] = {side: [] for side in sides}
    differences = []
    for number, path in enumerate(paths):
        runs: dict[str, list[Times]] = {side: [] for side in sides}
        for repeat in range(repeats):
            weak = {}
            for side in sorted(sides, reverse=repeat % 2 == 1):
                weak[side] = sides[side](path, number)[0]
                runs[side].append(sides[side].clock.times)
        for side in sides:
            times[side].append(min(runs[side], key=lambda run: sum(run.values())))
        grey_levels = torch.tensor(STD).view(3, 1, 1) * 255
        differences.append(float(((weak["ours"] - weak["plain"]) * grey_levels).abs().mean()))
    return times, statistics.mean(differences)


def report(
    times: dict[str, list[Times]],
    difference: float,
    sizes: list[tuple[int, int]],
    arguments: argparse.Namespace,
) -> None:
    """Print the table: milliseconds an image, and images per second and core."""
    means = {
        side: {part: statistics.mean(run[part] for run in runs) * 1000 for part in PARTS}
        for side, runs in times.items()
    }
    full = {side: sum(parts.values()) for side, parts in means.items()}
    sent = {"ours": full["ours"] - means["ours"]["normalise"], "plain": full["plain"]}
    unblurred = {side: full[side] - means[side]["blur"] for side in means}
    table = Table(title="CPU milliseconds an image", title_justify="left")
    table.add_column("part")
    for column in ("ours", "PIL + torchvision", "ratio"):
        table.add_column(column, justify="right")
    for part in PARTS:
        add_row(table, part, {side: means[side][part] for side in means})
    table.add_section()
    add_row(table, "all, normalised on both sides", full)
    add_row(table, "  the same without blur", unblurred)
    add_row(table, "all, as sent to the device", sent)
    table.add_section()
    for name, total in (("normalised", full), ("as sent", sent)):
        rates = [1000 / total[side] for side in ("ours", "plain")]
        table.add_row(
            f"images/s and core, {name}",
            *(f"{rate:.0f}" for rate in rates),
            f"{rates[0] / rates[1]:.2f}",
        )
    width, height = (round(statistics.mean(axis)) for axis in zip(*sizes, strict=True))
    console = Console()
    console.print(
        f"Weak and strong view of {arguments.crop} pixels from {len(sizes)} images of {width}x"
        f"{height} on average,\none thread, fastest of {arguments.repeats} repeats"
    )
    console.print(table)
    console.print(
        "to tensor: ours uint8, theirs float. normalise: ours with the step to float, and\n"
        "in training on the device: ours is sent without this line, theirs with it.\n"
        f"The weak views differ by {difference:.2f} of 255 grey levels on average."
    )


def add_row(table: Table, name: str, milliseconds: dict[str, float]) -> None:
    ours, plain = milliseconds["ours"], milliseconds["plain"]
    table.add_row(name, f"{ours:.2f}", f"{plain:.2f}", f"{plain / ours:.2f}" if ours else "")


if __name__ == "__main__":
    main()
