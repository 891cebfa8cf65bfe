"""Time and memory of the dense energy loss, against the plain way.

    python benchmarks/dense_energy.py --device cpu
    python benchmarks/dense_energy.py --root data/VOCdevkit/VOC2012 --sizes 224 448 --batch 4

Ours is ``wsss.losses.dense_energy_loss``. The plain way makes the matrix of all pairs of pixels
and multiplies with it; it is left out where that matrix is larger than --limit. Both are run
forward and backward, alternating, and the fastest repeat counts. Memory is the peak of what a run
holds beside its inputs, in MiB: on a GPU as the allocator counts it, on a CPU the tensors that
PyTorch's operations returned. How many pairs ours can leave out depends on the image: photographs
(--root) are a better guide than the smooth random colours it takes by default.
"""

from __future__ import annotations

import argparse
import itertools
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wsss.data.images import IMAGE_SUFFIXES
from wsss.losses import dense_energy_loss

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
SIGMA_RGB, SIGMA_XY, SCALE = 15.0, 100.0, 0.5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 224], help="sides of images")
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 81])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of the plain way's matrix")
    parser.add_argument("--root", type=Path, help="folder of JPEGs, or a VOC tree with JPEGImages")
    arguments = parser.parse_args()
    if min(*arguments.sizes, *arguments.classes, arguments.batch, arguments.repeats) < 1:
        parser.error("--sizes, --classes, --batch and --repeats are numbers from 1")
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    table = Table(
        title=f"Forward and backward of {arguments.batch} images, {where}, "
        f"{torch.get_num_threads()} threads, fastest of {arguments.repeats}",
        title_justify="left",
    )
    for column in (
        *("side", "scaled", "classes", "ours ms", "MiB", "plain ms", "MiB", "ratio", "differ"),
    ):
        table.add_column(column, justify="right")
    for side, classes in itertools.product(arguments.sizes, arguments.classes):
        add_row(table, side, classes, arguments)
    console = Console()
    console.print(table)
    console.print(
        "differ by: largest difference of the gradients, relative to their largest entry."
    )


def add_row(table: Table, side: int, classes: int, arguments: argparse.Namespace) -> None:
    inputs = make_inputs(side, classes, arguments)
    small = max(1, int(side * SCALE))
    sides: dict[str, Callable[..., Tensor]] = {"ours": dense_energy_loss}
    if small**4 * 4 <= arguments.limit * 2**30:
        sides["plain"] = plain
    times = {name: float("inf") for name in sides}
    memory, gradients = {}, {}
    for name, loss in sides.items():
        memory[name], gradients[name] = peak_memory(loss, inputs)
    for repeat in range(arguments.repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            times[name] = min(times[name], seconds(sides[name], inputs))
    row = [str(side), str(small), str(classes)]
    for name in ("ours", "plain"):
        known = name in sides
        row += [f"{times[name] * 1000:.0f}", f"{memory[name]:.0f}"] if known else ["", ""]
    if "plain" in sides:
        largest = gradients["plain"].abs().max()
        difference = ((gradients["ours"] - gradients["plain"]).abs().max() / largest).item()
        row += [f"{times['plain'] / times['ours']:.1f}", f"{difference:.0e}"]
    table.add_row(*row)


def make_inputs(side: int, classes: int, arguments: argparse.Namespace) -> Inputs:
    """Probabilities from a token grid, images, half of the labels 255, no padding."""
    generator = torch.Generator().manual_seed(0)
    number = arguments.batch
    logits = torch.randn(number, classes, side // 16 + 1, side // 16 + 1, generator=generator) * 3
    logits = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)
    if arguments.root is None:
        colours = torch.rand(number, 3, 12, 12, generator=generator) * 255
        colours = F.interpolate(colours, size=(side, side), mode="bicubic")
        grain = torch.randn(colours.shape, generator=generator) * 6
        images = (colours + grain).clamp(0, 255).byte()
    else:
        images = torch.stack([photograph(path, side) for path in photographs(arguments)])
    label = torch.randint(0, 2, (number, side, side), generator=generator) * 255
    inputs = (logits.softmax(1), images, label, torch.ones_like(label, dtype=torch.bool))
    return tuple(x.to(arguments.device) for x in inputs)  # type: ignore[return-value]


def photographs(arguments: argparse.Namespace) -> list[Path]:
    root = arguments.root
    folder = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root
    paths = sorted(path for path in folder.glob("*") if path.suffix in IMAGE_SUFFIXES)
    if not paths:
        raise SystemExit(f"--root {root}: no images in that folder")
    return [paths[n * len(paths) // arguments.batch] for n in range(arguments.batch)]


def photograph(path: Path, side: int) -> Tensor:
    image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def plain(probabilities: Tensor, images: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """The same loss from the whole matrix."""
    height, width = (int(side * SCALE) for side in label.shape[-2:])
    s = F.interpolate(probabilities, (height, width), mode="bilinear", align_corners=False)
    rgb = F.interpolate(images.float(), (height, width)) / SIGMA_RGB
    inside = F.interpolate(valid[:, None].float(), (height, width))[:, 0]
    ignored = F.interpolate(label[:, None].float(), (height, width))[:, 0] == 255
    s = s * inside[:, None]
    gate = torch.where(ignored, 1.0, (inside - s.amax(1)).clamp(min=0)).detach()
    y, x = torch.meshgrid(
        torch.arange(height, device=s.device), torch.arange(width, device=s.device), indexing="ij"
    )
    total = s.new_zeros(())
    for n in range(len(s)):
        place = torch.stack([y, x]) / (SIGMA_XY * SCALE)
        f = torch.cat([place, rgb[n]]).flatten(1).T
        values = s[n].flatten(1).T
        kernel = (-0.5 * torch.cdist(f, f).square_()).exp_()
        pull = gate[n].view(-1, 1) * (kernel @ values.detach())
        energy = (values * pull).sum()
        total = total - (2 * energy - energy.detach())
    return 1e-7 * total / len(s)


def seconds(loss: Callable[..., Tensor], inputs: Inputs) -> float:
    """Of one run, forward and backward."""
    probabilities = inputs[0].detach().requires_grad_()
    synchronize(probabilities)
    start = time.perf_counter()
    loss(probabilities, *inputs[1:]).backward()
    synchronize(probabilities)
    return time.perf_counter() - start


def peak_memory(loss: Callable[..., Tensor], inputs: Inputs) -> tuple[float, Tensor]:
    """MiB of one run beside its inputs, and the gradient."""
    probabilities = inputs[0].detach().requires_grad_()
    if probabilities.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(probabilities, *inputs[1:]).backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveTensors(inputs) as live:
            loss(probabilities, *inputs[1:]).backward()
        peak = live.peak
    assert probabilities.grad is not None
    return peak / 2**20, probabilities.grad


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations returned and nobody has dropped, at their most."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in inputs}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


if __name__ == "__main__":
    main()
