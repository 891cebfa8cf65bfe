"""Time and memory of the feature similarity loss: windowed, exact, and the textbook's way.

    python benchmarks/feature_similarity.py --device cpu --threads 1
    python benchmarks/feature_similarity.py --sizes 56 --classes 20 80 --batch 8

Ours is ``wsss.losses.feature_similarity_loss``, windowed (3 sigma, as the add-ons have it) and
exact. The textbook's way, "dense", makes three matrices over all pairs of pixels: w, g and f. All
classes are in all images, the worst case. Forward and backward, the fastest repeat counts. Each
cell runs in a process of its own; memory is its peak above the inputs, in MiB: on a GPU as the
allocator counts it, on a CPU by the largest resident size of the process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from memory import free_memory, held_memory, peak_memory, synchronize
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wsss.losses import feature_similarity_loss

MU, SIGMA = 2.5, 5.0
WINDOW = math.ceil(3 * SIGMA)
#: Matrices of all pairs that the textbook's way holds at its peak, backward included.
DENSE_MATRICES = 6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[28, 56, 112], help="sides of CAMs")
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 80])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", choices=sorted(FORMS), help="one form, printed as JSON")
    arguments = parser.parse_args()
    if min(*arguments.sizes, *arguments.classes, arguments.batch, arguments.repeats) < 1:
        parser.error("--sizes, --classes, --batch and --repeats are numbers from 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.cell:
        print(json.dumps(measure(arguments)))
        return
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    table = Table(
        title=f"Forward and backward of {arguments.batch} images, {where}, "
        f"{torch.get_num_threads()} threads, fastest of {arguments.repeats}",
        title_justify="left",
    )
    for column in ("side", "classes", *FORMS, "faster", "smaller", "value", "gradient"):
        table.add_column(column, justify="right")
    skipped = []
    for side, classes in itertools.product(arguments.sizes, arguments.classes):
        cells = {form: run_cell(form, side, classes, arguments) for form in FORMS}
        if cells["dense"] is None:
            skipped.append(f"{side} x {side} with {classes} classes")
        table.add_row(*row(side, classes, cells))
    console = Console()
    console.print(table)
    console.print(
        "window, exact, dense: ms / MiB. faster, smaller: dense over window. value, gradient: how "
        "far window is off exact, relative to the value and to the norm of the gradient."
    )
    for case in skipped:
        console.print(f"dense left out at {case}: its matrices would not fit into memory.")


def row(side: int, classes: int, cells: dict[str, dict[str, float] | None]) -> list[str]:
    window, dense = cells["window"], cells["dense"]
    assert window is not None
    result = [str(side), str(classes)]
    for cell in cells.values():
        result.append(f"{cell['ms']:.0f} / {cell['mib']:.0f}" if cell else "")
    if dense is None:
        result += ["", ""]
    else:
        result.append(f"{dense['ms'] / window['ms']:.1f}")
        result.append(f"{dense['mib'] / max(window['mib'], 1):.0f}")
    return [*result, f"{window['value']:.2%}", f"{window['gradient']:.2%}"]


def run_cell(
    form: str, side: int, classes: int, arguments: argparse.Namespace
) -> dict[str, float] | None:
    """What a process of its own measures; None where the form would not fit into memory."""
    if form == "dense":
        need = DENSE_MATRICES * 4 * arguments.batch * side**4
        if need > 0.9 * free_memory(arguments.device):
            return None
    command = [sys.executable, __file__, "--cell", form, "--device", arguments.device]
    for name, value in (("sizes", side), ("classes", classes)):
        command += [f"--{name}", str(value)]
    for name in ("batch", "repeats"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    cell: dict[str, float] = json.loads(done.stdout)
    return cell


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds, MiB, and how far the windowed form is off."""
    loss = FORMS[arguments.cell]
    batch, classes, device = arguments.batch, arguments.classes[0], arguments.device
    run(loss, *make_inputs(1, classes, 8, device))  # what the first call sets up for good
    scores, images = make_inputs(batch, classes, arguments.sizes[0], device)
    before = held_memory(device)
    _, gradient, _ = run(loss, scores, images)
    peak = peak_memory(device) - before
    seconds = min(run(loss, scores, images)[2] for _ in range(arguments.repeats))
    result = {"ms": seconds * 1000, "mib": peak / 2**20}
    if arguments.cell == "window":
        exact, exact_gradient, _ = run(FORMS["exact"], scores, images)
        value, gradient, _ = run(loss, scores, images)
        result["value"] = abs(value / exact - 1)
        result["gradient"] = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
    return result


def run(
    loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, images: Tensor
) -> tuple[float, Tensor, float]:
    """Value, gradient and seconds, forward and backward."""
    scores = scores.detach().requires_grad_()
    synchronize(scores.device.type)
    start = time.perf_counter()
    value = loss(scores, images)
    value.backward()
    synchronize(scores.device.type)
    seconds = time.perf_counter() - start
    assert scores.grad is not None
    return value.item(), scores.grad, seconds


def make_inputs(batch: int, classes: int, side: int, device: str) -> tuple[Tensor, Tensor]:
    """Scores from a token grid, and smooth random colours with edges and grain."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, classes, 14, 14, generator=generator) * 2
    scores = F.interpolate(scores, size=(side, side), mode="bilinear", align_corners=False)
    images = torch.rand(batch, 3, 7, 7, generator=generator)
    images = F.interpolate(images, size=(side, side), mode="nearest")
    images = images + torch.randn(images.shape, generator=generator) * 0.03
    return scores.to(device), images.clamp(0, 1).to(device)


def window(scores: Tensor, images: Tensor) -> Tensor:
    return feature_similarity_loss(scores, images, mu=MU, sigma=SIGMA, window=WINDOW)


def exact(scores: Tensor, images: Tensor) -> Tensor:
    return feature_similarity_loss(scores, images, mu=MU, sigma=SIGMA)


def dense(scores: Tensor, images: Tensor) -> Tensor:
    """The equations as they stand, from whole matrices."""
    height, width = scores.shape[2:]
    positive = scores.relu()
    low, high = positive.amin((2, 3), keepdim=True), positive.amax((2, 3), keepdim=True)
    r = (positive - low - 1e-5).relu() / (high - low + 1e-5)
    with torch.no_grad():
        y, x = torch.arange(float(height)), torch.arange(float(width))
        place = torch.cartesian_prod(y, x).to(scores.device)
        w = (-0.5 * (torch.cdist(place, place) / SIGMA) ** 2).exp() / (2 * math.pi * SIGMA**2)
        colours = images.flatten(2).transpose(1, 2).contiguous()
        d = (torch.cdist(colours, colours, p=1) / 3).clamp(0, 1)
        f = torch.tanh(MU + torch.log((d + 1e-5) / (1 - d + 1e-5)))
        del d
    flat = r.flatten(2)
    half = flat.square().sum(1) / 2
    # cdist, as in the published code, would take several times as long backward
    g = torch.baddbmm(half[:, :, None] + half[:, None], flat.mT, flat, alpha=-1)
    return -(w * g * f).sum() / (len(scores) * height * width)


FORMS = {"window": window, "exact": exact, "dense": dense}


if __name__ == "__main__":
    main()
