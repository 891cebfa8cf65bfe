"""Time and memory of UniA's parts: the neck, and the distribution loss for numbers of samples.

    python benchmarks/unia.py --device cpu --threads 1
    python benchmarks/unia.py --batch 8 --grid 28 --dim 384

The neck is ``wsss.nn.UncertaintyNeck`` with both branches. "direct" is
``wsss.losses.distribution_loss``, which draws the mean of the samples; "textbook" draws all K
samples and holds them for backward. Forward and backward, the fastest repeat counts. Each cell runs
in a process of its own; memory is its peak above inputs and weights, in MiB: on a GPU as the
allocator counts it, on a CPU by the largest resident size of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from memory import free_memory, held_memory, peak_memory, synchronize
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wsss.inference import has_bf16
from wsss.losses import distribution
from wsss.nn import UncertaintyNeck

CELLS = ("neck", "direct", "textbook")
#: Tensors of all samples that the textbook's way holds at its peak.
TEXTBOOK_TENSORS = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, nargs="+", default=[10, 30, 50, 70])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--grid", type=int, default=28, help="side of the token grid")
    parser.add_argument("--dim", type=int, default=768, help="channels")
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the neck; default: bf16 where the device computes in it",
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", choices=CELLS, help="one cell, printed as JSON")
    arguments = parser.parse_args()
    if arguments.precision is None:
        arguments.precision = "bf16" if has_bf16(torch.device(arguments.device)) else "fp32"
    numbers = (arguments.batch, arguments.grid, arguments.dim, arguments.repeats)
    if min(*arguments.samples, *numbers) < 1:
        parser.error("--samples, --batch, --grid, --dim and --repeats are numbers from 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.cell:
        print(json.dumps(measure(arguments)))
        return
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    table = Table(
        title=f"Forward and backward of {arguments.batch} x {arguments.dim} x {arguments.grid} x "
        f"{arguments.grid}, {where}, {torch.get_num_threads()} threads, fastest of "
        f"{arguments.repeats}: ms / MiB",
        title_justify="left",
    )
    for column in ("part", "samples", "ours", "textbook", "faster", "smaller"):
        table.add_column(column, justify="left" if column == "part" else "right")
    neck = run_cell("neck", arguments.samples[0], arguments)
    table.add_row(f"neck ({arguments.precision})", "", text(neck), "", "", "")
    for samples in arguments.samples:
        direct = run_cell("direct", samples, arguments)
        textbook = run_cell("textbook", samples, arguments)
        ratios = ["", ""]
        if direct and textbook:
            ratios[0] = f"{textbook['ms'] / direct['ms']:.1f}"
            ratios[1] = f"{textbook['mib'] / max(direct['mib'], 1):.1f}"
        table.add_row("distribution loss", str(samples), text(direct), text(textbook), *ratios)
    console = Console()
    console.print(table)
    console.print("Empty: the samples would not fit into memory.")


def text(cell: dict[str, float] | None) -> str:
    return f"{cell['ms']:.1f} / {cell['mib']:.0f}" if cell else ""


def run_cell(cell: str, samples: int, arguments: argparse.Namespace) -> dict[str, float] | None:
    """What a process of its own measures; None where the cell would not fit into memory."""
    if cell == "textbook":
        elements = samples * arguments.batch * arguments.dim * arguments.grid**2
        if TEXTBOOK_TENSORS * 4 * elements > 0.9 * free_memory(arguments.device):
            return None
    command = [sys.executable, __file__, "--cell", cell, "--samples", str(samples)]
    for name in ("device", "batch", "grid", "dim", "precision", "repeats"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds and MiB."""
    batch, dim, grid, device = arguments.batch, arguments.dim, arguments.grid, arguments.device
    make = make_neck if arguments.cell == "neck" else make_loss
    run(make(1, dim, 4, arguments), device)  # what the first call sets up for good
    work = make(batch, dim, grid, arguments)
    before = held_memory(device)
    run(work, device)
    peak = peak_memory(device) - before
    seconds = min(run(work, device) for _ in range(arguments.repeats))
    return {"ms": seconds * 1000, "mib": peak / 2**20}


def make_neck(batch: int, dim: int, grid: int, arguments: argparse.Namespace) -> Callable[[], None]:
    """Neck forward and backward, all of its outputs used."""
    device = arguments.device
    neck = UncertaintyNeck(dim).to(device)
    features = torch.randn(batch, dim, grid, grid, device=device, requires_grad=True)
    low = torch.autocast(device, torch.bfloat16)

    def work() -> None:
        with low if arguments.precision == "bf16" else contextlib.nullcontext():
            output = neck(features)
        assert output.mu is not None
        assert output.sigma is not None
        (output.features.float().mean() + output.mu.mean() + output.sigma.mean()).backward()

    return work


def make_loss(batch: int, dim: int, grid: int, arguments: argparse.Namespace) -> Callable[[], None]:
    """Distribution loss, forward and backward."""
    device = arguments.device
    mu = torch.randn(batch, dim, grid, grid, device=device, requires_grad=True)
    sigma = torch.rand(batch, dim, grid, grid, device=device, requires_grad=True)
    cam = torch.rand(batch, 20, grid, grid, device=device)
    loss = distribution.distribution_loss if arguments.cell == "direct" else textbook_loss

    def work() -> None:
        loss(mu, sigma, cam, num_samples=arguments.samples[0]).backward()

    return work


def textbook_loss(mu: Tensor, sigma: Tensor, cam: Tensor, num_samples: int) -> Tensor:
    """The equations as they stand, from K drawn samples."""
    noise = torch.randn(num_samples, *mu.shape, device=mu.device)
    predicted = (mu + noise * sigma).mean((0, 2)).sigmoid()
    mask = (cam.amax(1) > 0.7).float().clamp(0.01, 0.99)
    kl = (
        predicted * (predicted / mask).log()
        + (1 - predicted) * ((1 - predicted) / (1 - mask)).log()
    )
    prior = (mu.square() + sigma.square() - 1) / 2 - sigma.log()
    return kl.mean() + prior.mean()


def run(work: Callable[[], None], device: str) -> float:
    """Seconds."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
