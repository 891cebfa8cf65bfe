"""Cost of one CoSA step, part by part.

    python benchmarks/step.py     # ViT-Tiny at 224 on a CPU, ViT-B at 448 on a GPU
    python benchmarks/step.py --device cpu --precision fp32 --threads 2
    python benchmarks/step.py --experiment cosa_shapes --workers 0
    python benchmarks/step.py --addon isl_fsl

Real code on generated JPEGs: data, AN passes, ON forward, labels and thresholds, losses, backward,
optimizer, EMA. Each part is the median over the steps; the device is synchronised between parts.
"data" is what the step waits for: both views are made by the experiment's loader processes, in
parallel, as in training; with --workers 0 it is what making them costs.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import torch
from rich.console import Console
from rich.table import Table

from wsss.addons import Step
from wsss.build import build_data, build_method, build_network
from wsss.cli import config_dir
from wsss.data.batch import Batch
from wsss.data.shapes import generate
from wsss.inference import has_bf16
from wsss.methods import CoSA

PARTS = (
    "data",
    "AN passes",
    "thresholds",
    "labels",
    "ON forward",
    "losses",
    "add-ons",
    "backward",
    "optimizer",
    "EMA",
)
PASSES = ("AN passes", "ON forward", "backward")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="default: bf16 where the device computes in it",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--experiment", help="default: cosa_voc on a GPU, else cosa_voc_mini")
    parser.add_argument("--addon", default="none", help="isl, fsl, isl_fsl")
    parser.add_argument("--workers", type=int, help="loader processes; default: the experiment's")
    parser.add_argument("--batch", type=int, help="default: the experiment's")
    parser.add_argument("--image-size", type=int, default=320, help="side of the source JPEGs")
    arguments = parser.parse_args()
    if arguments.precision is None:
        arguments.precision = "bf16" if has_bf16(torch.device(arguments.device)) else "fp32"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.experiment is None:
        arguments.experiment = "cosa_voc" if arguments.device == "cuda" else "cosa_voc_mini"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        generate(root, train=64, val=4, image_size=arguments.image_size, seed=0)
        method, batches = prepare(root, arguments)
        times = measure(method, batches, arguments)
    report(times, method, arguments)


def prepare(root: Path, arguments: argparse.Namespace) -> tuple[CoSA, Any]:
    """The method past its warm-up, and an endless loader of batches."""
    overrides = [
        f"experiment={arguments.experiment}",
        f"addon={arguments.addon}",
        f"data.root={root}",
        "data.train_split=train",
        "data.val_split=val",
        "backbone.pretrained=false",
    ]
    for key, value in (("num_workers", arguments.workers), ("batch_size", arguments.batch)):
        if value is not None:
            overrides.append(f"data.{key}={value}")
    if arguments.experiment.endswith("shapes"):
        overrides.append("~data.generate")
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=overrides)
    data = build_data(cfg)
    data.setup("fit")
    method = build_method(cfg, build_network(cfg, data.num_classes), data.classes)
    assert isinstance(method, CoSA)
    trainer: Any = SimpleNamespace(
        global_step=0,
        max_steps=10_000,
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
    )
    data.trainer = trainer
    loader = iter(data.train_dataloader())
    trainer.global_step = method.loss_warmup_steps
    method._trainer = trainer
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    method.to(arguments.device).train()

    def batches() -> Any:
        for batch in loader:
            for key in ("weak", "strong", "labels", "valid"):
                setattr(batch, key, getattr(batch, key).to(arguments.device))
            yield data.on_after_batch_transfer(batch, 0)

    return method, batches()


def measure(method: CoSA, batches: Any, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Times of each part over the steps, in seconds."""
    device = arguments.device
    optimizer = torch.optim.AdamW(method.network.parameters(), lr=1e-5, fused=True)
    times: dict[str, list[float]] = {part: [] for part in PARTS}

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16, enabled=arguments.precision == "bf16")

    def timed(part: str, work: Callable[[], Any]) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with autocast():
            result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        times[part].append(time.perf_counter() - start)
        return result

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(arguments.steps + 3):
        batch: Batch = timed("data", lambda: next(batches))
        assigned = timed("AN passes", lambda b=batch: method.assign(b))
        confidences = timed(
            "thresholds", lambda b=batch, a=assigned: method.update_thresholds(a, b.valid)
        )
        pseudo = timed("labels", lambda b=batch, a=assigned, c=confidences: method.label(a, c, b))
        output = timed("ON forward", lambda b=batch: method.network(b.strong))
        terms = timed("losses", lambda o=output, p=pseudo, b=batch: method.co_training(o, p, b))
        made = Step(terms, method.views(output, batch))
        terms, weights = timed("add-ons", lambda s=made: method.with_addons(s))
        total = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        timed("backward", total.backward)
        timed("optimizer", lambda: (optimizer.step(), optimizer.zero_grad()))
        timed(
            "EMA",
            lambda: torch._foreach_lerp_(
                list(method.assignment.parameters()),
                [p.detach() for p in method.network.parameters()],
                1 - method.momentum,
            ),
        )
        if step == 2:  # the first steps allocate and choose kernels
            for values in times.values():
                values.clear()
    return times


def report(times: dict[str, list[float]], method: CoSA, arguments: argparse.Namespace) -> None:
    """Print medians, shares and peak memory."""
    medians = {part: statistics.median(values) for part, values in times.items()}
    total = sum(medians.values())
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    table = Table(
        title=f"{arguments.experiment}, addon={arguments.addon}: {method.network.encoder.name}, "
        f"{arguments.precision}, {where}, {torch.get_num_threads()} threads",
        title_justify="left",
    )
    for column in ("part", "seconds", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, value in medians.items():
        table.add_row(part, f"{value:.4f}", f"{100 * value / total:.1f} %")
    rest = total - sum(medians[part] for part in PASSES)
    table.add_section()
    table.add_row("step", f"{total:.4f}", "100 %")
    table.add_row("besides the networks' passes", f"{rest:.4f}", f"{100 * rest / total:.1f} %")
    console = Console()
    console.print(table)
    if arguments.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        console.print(f"peak GPU memory {peak:.2f} GiB")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        console.print(f"peak resident memory of the process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
