"""Speed of evaluation, against the plain loop over single images.

    python benchmarks/evaluate.py --threads 2                 # ViT-Tiny at 224, five scales, flips
    python benchmarks/evaluate.py --device cuda --backbone vit_base_patch16_224 --size 448 --batch 8

Both sides make the same scores of the same images in one process, alternating: every
``--chunk`` images first one, then the other, ``--repeats`` times; of each side's chunks the fastest
counts. Images and masks lie in memory, the weights are random: only the network and what follows it
are timed.

The plain loop is how published code evaluates: one image, one scale and one flip at a time, in
float32, each result resized to the mask's size, softmax and argmax there, the confusion matrix with
numpy. Ours is :class:`wsss.metrics.protocols.ProtocolScores`, as `wsss evaluate` runs it: a batch
and its flips in one pass, logits added at the size of the network's input. The table says what
share of pixels both label alike (float32: all but rounding).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wsss.data.batch import EvalBatch
from wsss.data.views import resize_image
from wsss.metrics.protocols import ProtocolScores
from wsss.nn import WSSSNetwork

SCALES = (1.0, 0.5, 1.5, 0.75, 1.25)


def make_data(
    count: int, size: int, native: tuple[int, int], classes: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Smooth random images (N, 3, S, S) uint8, labels (N, C) and masks of the native size."""
    rng = np.random.default_rng(0)
    images = [
        resize_image(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), size, size)
        for _ in range(count)
    ]
    small = torch.from_numpy(rng.integers(0, classes + 1, (count, 1, 4, 5))).float()
    masks = F.interpolate(small, size=native, mode="nearest")[:, 0].long()
    labels = torch.zeros(count, classes + 1)
    for i, mask in enumerate(masks):
        labels[i, mask.unique()] = 1
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return batch, labels[:, 1:], list(masks)


class Plain:
    """One image, one scale, one flip at a time."""

    def __init__(self, network: WSSSNetwork, classes: int) -> None:
        self.network = network
        self.matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
        self.num_labels = classes + 1

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, masks: list[Tensor]) -> None:
        for image, mask in zip(images, masks, strict=True):
            picture = image[None].float() / 255
            total = torch.zeros(self.num_labels, *mask.shape, device=image.device)
            for scale in SCALES:
                side = round(picture.shape[-1] * scale)
                scaled = F.interpolate(picture, size=(side, side), mode="bilinear")
                for flipped in (False, True):
                    logits = self.network(scaled.flip(-1) if flipped else scaled).seg_logits
                    assert logits is not None
                    logits = logits.flip(-1) if flipped else logits
                    total += F.interpolate(logits, size=mask.shape, mode="bilinear")[0]
            label = (total / (2 * len(SCALES))).softmax(0).argmax(0).cpu().numpy()
            truth = mask.cpu().numpy()
            index = truth * self.num_labels + label
            self.matrix += np.bincount(index.ravel(), minlength=self.num_labels**2).reshape(
                self.matrix.shape
            )


class Ours:
    """``ProtocolScores`` with the protocols named, or with all."""

    def __init__(
        self,
        network: WSSSNetwork,
        classes: int,
        batch: int,
        chosen: tuple[str, ...] | None,
        half: bool,
    ) -> None:
        self.network, self.batch, self.half = network, batch, half
        self.scores = ProtocolScores([str(i) for i in range(classes)], SCALES)
        self.scores.chosen = chosen
        self.scores.to(next(network.parameters()).device).reset()

    def __call__(self, images: Tensor, labels: Tensor, masks: list[Tensor]) -> None:
        device = images.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.half):
            for i in range(0, len(images), self.batch):
                part = slice(i, i + self.batch)
                names = [str(n) for n in range(len(images))[part]]
                batch = EvalBatch(images[part].float() / 255, labels[part], masks[part], names)
                self.scores.update(self.network, batch)

    @property
    def matrix(self) -> np.ndarray:
        return self.scores.scores[0].matrix.cpu().numpy()


def seconds(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on the CPU")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--native", type=int, nargs=2, default=(188, 250), help="of the masks")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=8, help="images of one measurement")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)

    network = WSSSNetwork(arguments.backbone, arguments.classes).to(device).eval()
    for parameter in network.decoder.parameters():  # the last layer starts at 0: all background
        torch.nn.init.normal_(parameter, std=0.02)
    images, labels, masks = make_data(
        arguments.chunk, arguments.size, tuple(arguments.native), arguments.classes
    )
    images, labels = images.to(device), labels.to(device)
    masks = [mask.to(device) for mask in masks]
    one = ("seg/miou_ms_flip",)
    sides: dict[str, Plain | Ours] = {
        "plain loop, seg/miou_ms_flip": Plain(network, arguments.classes),
        "ours, float32, the same": Ours(network, arguments.classes, arguments.batch, one, False),
        "ours, bf16, the same": Ours(network, arguments.classes, arguments.batch, one, True),
        "ours, bf16, all protocols": Ours(network, arguments.classes, arguments.batch, None, True),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(arguments.repeats + 1):
        for name, side in sides.items():
            took = seconds(lambda side=side: side(images, labels, masks), device)  # type: ignore[misc]
            best[name] = min(best[name], took)

    table = Table(
        title=f"{arguments.backbone}, {arguments.size}x{arguments.size}, {len(SCALES)} scales and "
        f"flips, {arguments.classes} classes, {device}, {arguments.threads} threads"
    )
    for heading in ("", "images/s", "ratio", "same counts (%)"):
        table.add_column(heading, justify="right" if heading else "left")
    plain = next(iter(sides))
    reference = sides[plain].matrix
    for name, side in sides.items():
        agreement = 100 * (1 - np.abs(side.matrix - reference).sum() / (2 * reference.sum()))
        shown = "-" if name.endswith("protocols") else f"{agreement:.2f}"
        rate = arguments.chunk / best[name]
        table.add_row(name, f"{rate:.2f}", f"{best[plain] / best[name]:.2f}", shown)
    Console().print(table)


if __name__ == "__main__":
    main()
