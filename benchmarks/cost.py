"""What an experiment will cost on a GPU: work and memory, counted without GPU or data.

    python benchmarks/cost.py cosa_voc unia_voc
    python benchmarks/cost.py "cosa_voc method=supervised" --sustained 60

One step of the experiment (its network with random weights, its method past the warm-up, bf16,
noise for images) runs on the CPU for two small batches; its matrix products and convolutions and
the bytes of all tensors alive are counted. Both depend on shapes alone, so the products are noise
(``--exact`` computes them, which takes hours on a processor without bf16). Both grow linearly with
the batch, so that they are carried on to the experiment's. That is

- work: floating-point operations of a step after the warm-up, times the steps. The hours are this
  over ``--sustained``, what a GPU delivers in practice, not its peak. Time in which it waits for
  data, and what is no such operation, come on top.
- memory: parameters, optimizer, gradients and what backward keeps. Work space of the libraries,
  memory's fragments and CUDA itself (some 2 GiB together) come on top.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import hydra
import torch
from noise import noise
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import wsss.nn.encoder
from wsss.build import build_method, build_network
from wsss.cli import config_dir
from wsss.methods.base import Method


def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of fused attention on a CPU, which torch counts on GPUs only."""
    return sdpa_flop_count(query, key, value)


def attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    """Operations of its backward pass."""
    return sdpa_backward_flop_count(grad, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
#: the batches that are run; from two on, for some layers normalise over the batch
SMALL, LARGE = 2, 3


class NoArithmetic(TorchDispatchMode):
    """Noise in place of every product that is counted: operations and bytes follow from shapes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry and func._overloadpacket not in CPU_ATTENTION:
            return func(*args, **kwargs)
        shapes = func(*tree_map(as_meta, args), **tree_map(as_meta, kwargs))
        return tree_map(as_noise, shapes)


def as_meta(value: Any) -> Any:
    """A tensor's shape, strides and type."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def as_noise(value: Any) -> Any:
    """A tensor of that shape."""
    return (
        torch.empty_like(value, device="cpu").uniform_(-1, 1)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count the memory behind a tensor, until nobody holds it."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # the same for all Python objects of one storage
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experiments", nargs="+", help="names in conf/experiment, with settings after a space"
    )
    parser.add_argument("--classes", type=int, help="default: 80 for COCO, else 20")
    parser.add_argument(
        "--sustained",
        type=float,
        default=20,
        help="TFLOP/s that a GPU delivers (default %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--exact", action="store_true", help="compute every product")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # As on a GPU, whatever is faster on a CPU.
    wsss.nn.encoder._UNFUSED_TOKENS = 0
    table = Table(title=f"hours at {arguments.sustained:g} TFLOP/s", title_justify="left")
    for column in ("experiment", "batch", "steps", "TFLOP a step", "GPU hours", "GiB"):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    skip = not arguments.exact
    for name in track(arguments.experiments, "counting", console=Console(stderr=True)):
        classes = arguments.classes or (80 if "coco" in name else 20)
        cfg = settings(name)
        batch, steps = int(cfg.data.batch_size), int(cfg.trainer.max_steps)
        small, large = (measure(cfg, classes, n, skip) for n in (SMALL, LARGE))
        work = carry_on(small[0], large[0], batch) / 1e12
        memory = carry_on(small[1], large[1], batch) / 2**30
        hours = work * steps / arguments.sustained / 3600
        table.add_row(name, str(batch), str(steps), f"{work:.2f}", f"{hours:.1f}", f"{memory:.1f}")
    Console().print(table)


def carry_on(small: float, large: float, batch: int) -> float:
    """The value of a batch, on the line through those of SMALL and LARGE."""
    return small + (large - small) * (batch - SMALL) / (LARGE - SMALL)


def settings(experiment: str) -> DictConfig:
    """The experiment (and settings after a space), with random weights."""
    name, *more = experiment.split()
    overrides = [f"experiment={name}", "backbone.pretrained=false", "data.root=none", *more]
    overrides += ["+data.masks=none"] if "_ms_" in experiment else []
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=overrides)
    for key in ("freeze_bn", "freeze_stem"):  # refused with random weights
        if cfg.backbone.options.get(key):
            cfg.backbone.options[key] = False
    return cfg


def build(cfg: DictConfig, classes: int) -> Method:
    """The method past its warm-up, in training mode."""
    torch.manual_seed(0)
    names = tuple(f"class {i}" for i in range(classes))
    method = build_method(cfg, build_network(cfg, classes), names)
    steps = int(cfg.trainer.max_steps)
    trainer: Any = SimpleNamespace(
        global_step=steps - 1,
        max_steps=steps,
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
    )
    method._trainer = trainer
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return method.train()


def step(method: Method, cfg: DictConfig, classes: int, images: int) -> None:
    """Forward and backward."""
    batch = noise(images, int(cfg.view.crop_size), classes)
    with torch.autocast("cpu", torch.bfloat16):
        terms, weights = method.with_addons(method.step(batch))
    torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum().backward()


def measure(cfg: DictConfig, classes: int, images: int, skip: bool = True) -> tuple[float, float]:
    """Floating-point operations of a step, and bytes alive at their most.

    Of the second step, when the optimizer has its state. ``skip``: shapes alone, no arithmetic.
    """
    gc.collect()
    live = LiveBytes()
    with live:
        method = build(cfg, classes)
        for value in (*method.parameters(), *method.buffers()):
            live.add(value)
        optimizer = method.configure_optimizers()["optimizer"]
    # The innermost of the three, so that the others see what it makes.
    with NoArithmetic() if skip else nullcontext(), live:
        for _ in range(2):
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                step(method, cfg, classes, images)
            optimizer.step()
            optimizer.zero_grad()
    return float(counter.get_total_flops()), float(live.peak)


if __name__ == "__main__":
    main()
