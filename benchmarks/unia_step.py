"""What UniA's parts add to a step of single-stage training.

    python benchmarks/unia_step.py                                  # ViT-B at 448, as published
    python benchmarks/unia_step.py --device cpu --threads 1 --batch 1 --steps 3
    python benchmarks/unia_step.py --device cpu --threads 1 --experiment unia_voc_mini

Whole steps but for data and optimizer, after the warm-up: CAMs of all scales, labels, forward,
losses, backward. The recipe without UniA's parts (``neck=none addon=none method.refine=par``), then
each part on top of the one before. The variants take turns, so that a busy machine is busy for all;
medians of the steps. Images are noise, labels two classes an image: no data set is needed, and all
variants see the same. Memory is the allocator's peak on a GPU, with the variant's own weights and
gradients and without those of the others, which wait there; on a CPU it is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import hydra
import torch
from memory import synchronize
from noise import noise
from rich.console import Console
from rich.table import Table

from wsss.build import build_method, build_network
from wsss.cli import config_dir
from wsss.data.batch import Batch
from wsss.inference import has_bf16
from wsss.methods import UniA
from wsss.methods.base import Method
from wsss.train import apply_variant

#: variants of sweep=unia_ablation, each with what it adds
VARIANTS = {
    "base": "single stage",
    "network": "+ uncertainty network",
    "distribution": "+ distribution loss",
    "mutual": "+ mutual refinement",
    "full": "+ affinity loss",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experiment", default="unia_voc")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="measured, after one that is not")
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="default: bf16 where the device computes in it",
    )
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.precision is None:
        arguments.precision = "bf16" if has_bf16(torch.device(arguments.device)) else "fp32"
    if min(arguments.batch, arguments.steps) < 1 or arguments.classes < 2:
        parser.error("--batch and --steps are numbers from 1, --classes from 2")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    methods = {name: build(name, arguments) for name in VARIANTS}
    crop_size = methods["base"].run_config["view"]["crop_size"]
    batch = noise(arguments.batch, crop_size, arguments.classes, arguments.device)
    times: dict[str, list[float]] = {name: [] for name in methods}
    peaks = dict.fromkeys(methods, 0.0)
    for step in range(arguments.steps + 1):
        for name, method in methods.items():
            if arguments.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = run(method, batch, arguments)
            if step:
                times[name].append(seconds)
            if arguments.device == "cuda":
                others = sum(held(other) for other in methods.values()) - held(method)
                peak = (torch.cuda.max_memory_allocated() - others) / 2**20
                peaks[name] = max(peaks[name], peak)
    report(times, peaks, arguments)


def build(variant: str, arguments: argparse.Namespace) -> UniA:
    """The method of one variant, random weights, past its warm-up."""
    overrides = [f"experiment={arguments.experiment}", "sweep=unia_ablation", f"variant={variant}"]
    overrides += ["backbone.pretrained=false", "data.root=none"]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = apply_variant(hydra.compose("train", overrides=overrides))
    torch.manual_seed(0)
    classes = tuple(f"class {i}" for i in range(arguments.classes))
    method = build_method(cfg, build_network(cfg, len(classes)), classes)
    assert isinstance(method, UniA)
    late = max(method.aux_steps, method.refine_start_step, method.loss_warmup_steps)
    trainer: Any = SimpleNamespace(global_step=late, max_steps=10 * late)
    method._trainer = trainer
    return method.to(arguments.device).train()


def run(method: UniA, batch: Batch, arguments: argparse.Namespace) -> float:
    """Seconds of one step, forward and backward; its gradients are gone afterwards."""
    synchronize(arguments.device)
    start = time.perf_counter()
    low = arguments.precision == "bf16"
    with torch.autocast(arguments.device, torch.bfloat16, enabled=low):
        terms, weights = method.with_addons(method.step(batch))
    torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum().backward()
    synchronize(arguments.device)
    seconds = time.perf_counter() - start
    method.zero_grad(set_to_none=True)  # or they count as the next variant's memory
    return seconds


def held(method: Method) -> int:
    """Bytes of a method between its steps: weights and buffers."""
    kept = {t.data_ptr(): t for t in (*method.parameters(), *method.buffers())}
    return sum(t.numel() * t.element_size() for t in kept.values())


def report(
    times: dict[str, list[float]], peaks: dict[str, float], arguments: argparse.Namespace
) -> None:
    """Print medians, and what each variant adds to the first."""
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    table = Table(
        title=f"{arguments.experiment}: {arguments.batch} images, {arguments.precision}, {where}, "
        f"{torch.get_num_threads()} threads, median of {arguments.steps} steps",
        title_justify="left",
    )
    for column in ("recipe", "seconds", "added", "peak MiB"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    base = statistics.median(times["base"])
    for name, text in VARIANTS.items():
        # Ratios within a round: both were as busy.
        ratio = statistics.median(a / b for a, b in zip(times[name], times["base"], strict=True))
        added = "" if name == "base" else f"{100 * (ratio - 1):+.1f} %"
        memory = f"{peaks[name]:.0f}" if peaks[name] else "-"
        table.add_row(text, f"{base * ratio:.3f}", added, memory)
    Console().print(table)


if __name__ == "__main__":
    main()
