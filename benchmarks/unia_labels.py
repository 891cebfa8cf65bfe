"""How good the labels are that UniA's decoder learns from: the tables of docs/unia.md.

    python benchmarks/unia_labels.py outputs/unia_voc_mini/<time> --images 160
    python benchmarks/unia_labels.py <run>/checkpoints/step_000450.ckpt --cam early
    python benchmarks/unia_labels.py <run> --affinity

Labels are made of the CAMs of a checkpoint (of any method on a plain ViT), without augmentation,
for validation images with masks: the CAM itself with its two thresholds, after PAR, and UniA's P1,
P2, P3 and P, as printed and (with a star) renormalised. Blocks, thresholds and random walk are the
run's, where it has any, else the published ones; the title names them. The table has precision and
recall of the foreground, as a mean over the classes that occur and over all pixels, and those of
the background. A tag without a pixel is a class that an image holds and that its label does not
have: it needs no mask to be seen.

``--affinity`` shows instead what the random walk relies on: how large the affinity (eq. 11) is
between positions of equal and of unequal truth, for each block apart and for all. A uniform one is
1; without a position's affinity to itself.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from wsss.build import build_data, restore_method
from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_config
from wsss.data.batch import EvalBatch, to_unit_range
from wsss.data.datamodule import WSSSDataModule
from wsss.inference import Inference
from wsss.methods import UniA
from wsss.methods.base import Method
from wsss.nn.attention import Blocks, choose_blocks
from wsss.pseudo import MutualRefinement, two_threshold_label
from wsss.pseudo.labels import IGNORE_INDEX
from wsss.report.unia import affinity_of, refinement_of
from wsss.resize import cell_centres, nearest


@dataclass
class Counts:
    """Pixels of one kind of label by truth and label; the last column is undecided."""

    classes: int
    pixels: Tensor = field(init=False)
    missing: int = 0

    def __post_init__(self) -> None:
        self.pixels = torch.zeros(self.classes + 1, self.classes + 2, dtype=torch.int64)

    def update(self, label: Tensor, truth: Tensor, tags: Tensor) -> None:
        """One image: label and truth (H, W), tags (C,)."""
        present = (tags.nonzero().flatten() + 1).tolist()
        self.missing += sum(not bool((label == c).any()) for c in present)
        known = truth != IGNORE_INDEX
        named = label.where(label != IGNORE_INDEX, self.classes + 1)
        pairs = truth[known] * (self.classes + 2) + named[known]
        self.pixels += pairs.bincount(minlength=self.pixels.numel()).view_as(self.pixels)

    def row(self) -> list[str]:
        """Cells of the table."""
        of = self.pixels.double()
        right, named = of[1:, 1:-1].diagonal(), of[:, 1:-1].sum(0)
        true = of[1:].sum(1)
        occurs = true > 0

        def cell(precision: Tensor, recall: Tensor) -> str:
            return f"{100 * float(precision):.1f}, {100 * float(recall):.1f}"

        return [
            cell(
                (right / named.clamp(min=1))[occurs].mean(),
                (right / true.clamp(min=1))[occurs].mean(),
            ),
            cell(right.sum() / named.sum().clamp(min=1), right.sum() / true.sum().clamp(min=1)),
            cell(of[0, 0] / of[:, 0].sum().clamp(min=1), of[0, 0] / of[0].sum().clamp(min=1)),
            f"{100 * float(of[:, -1].sum() / of.sum().clamp(min=1)):.1f}",
            str(self.missing),
        ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run's folder or a checkpoint in it")
    parser.add_argument("--cam", choices=("final", "early"), default="final")
    parser.add_argument("--affinity", action="store_true", help="whose positions attend to whom")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--data-root", help="where the data is, if not where the run had it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = find_checkpoint(arguments.checkpoint)
    content = read_checkpoint(path)
    config = saved_config(content, path)
    if arguments.data_root:
        config.data.root = arguments.data_root
    inference = Inference(restore_method(content, config, path), device=arguments.device)
    data = build_data(config)
    data.setup("validate")
    if arguments.affinity:
        print_affinities(affinities(inference, data, arguments.images))
        return
    counts = count(inference, data, arguments.cam == "early", arguments.images)
    table = Table(
        title=f"step {content['global_step']}, {inference.network_name}, {arguments.cam} CAM; "
        + settings_text(inference.method),
        title_justify="left",
    )
    table.add_column("label")
    for name in ("classes", "pixels", "background", "undecided", "tags without"):
        table.add_column(name, justify="right")
    for name, made in counts.items():
        table.add_row(name, *made.row())
    Console().print(table)


def blocks_of(method: Method) -> Blocks:
    """Whose attention is the run's affinity; all where it has none."""
    return method.network.kept_blocks or "all"


def refinement(method: Method, renormalise: bool) -> MutualRefinement:
    """With the run's thresholds and random walk, or the published ones where it has none."""
    # UniA has them even where it refines by PAR alone.
    own = method.refinement if isinstance(method, UniA) else refinement_of(method)
    if own is None:
        return MutualRefinement(renormalise=renormalise)
    return MutualRefinement(
        own.high, own.low, own.walk_power, own.walk_steps, renormalise, own.par_scale
    )


def settings_text(method: Method) -> str:
    """What the labels are made with."""
    made, blocks = refinement(method, False), blocks_of(method)
    named = blocks if isinstance(blocks, str) else ", ".join(str(b) for b in blocks)
    return (
        f"blocks {named}, thresholds {made.low} and {made.high}, walk of power {made.walk_power} "
        f"and {made.walk_steps} steps, PAR at scale {made.par_scale}"
    )


def count(
    inference: Inference, data: WSSSDataModule, early: bool, images: int
) -> dict[str, Counts]:
    """All labels of the first validation images."""
    counts: dict[str, Counts] = defaultdict(lambda: Counts(len(inference.classes)))
    method = inference.method
    printed, stretched = refinement(method, False), refinement(method, True)
    for batch, kept in batches(data, images, "labels"):
        pixels = to_unit_range(batch.images.to(inference.device))
        tags = batch.labels.to(inference.device)
        made = inference(pixels, segmentation=False, labels=tags)
        cam = made.early_cam if early else made.cam
        affinity, grid = affinity_of(inference.network, pixels, blocks_of(method))
        labels = {"CAM": two_threshold_label(cam, printed.low, printed.high)}
        for refine, name in ((printed, ""), (stretched, "*")):
            labels[f"PAR{name}"] = refine.label(cam, pixels, tags)
            mutual = refine(cam, affinity, grid, pixels, tags)
            for part, label in zip(("P1", "P2", "P3", "P"), mutual, strict=True):
                labels[f"{part}{name}"] = label
        labels.pop("P1*")  # nothing is averaged there
        for i, mask in enumerate(batch.masks[:kept]):
            for name, label in labels.items():
                own = nearest(label[i][None].cpu(), *mask.shape)[0]
                counts[name].update(own, mask, batch.labels[i])
    return dict(counts)


def batches(data: WSSSDataModule, images: int, title: str) -> Iterator[tuple[EvalBatch, int]]:
    """The first validation images, with how many of each batch's are among them."""
    total, seen = -(-images // data.eval_batch_size), 0
    shown = Console(stderr=True)
    for batch in track(data.val_dataloader(), title, total=total, console=shown, transient=True):
        yield batch, images - seen
        seen += len(batch.masks)
        if seen >= images:
            return


#: columns of the table of affinities: whose, and to whom
PAIRS = (
    "object to its class",
    "object to others",
    "background to background",
    "background to objects",
)


@torch.inference_mode()
def affinities(inference: Inference, data: WSSSDataModule, images: int) -> dict[str, list[float]]:
    """Mean affinity of the pairs above in units of a uniform one, by block and for all."""
    network = inference.network
    single = choose_blocks(network.encoder, "all")
    chosen: dict[str, Blocks] = {**{str(b): [b] for b in single}, "all": "all"}
    sums = {name: torch.zeros(len(PAIRS), dtype=torch.float64) for name in chosen}
    counts = torch.zeros(len(PAIRS), dtype=torch.float64)
    for batch, kept in batches(data, images, "affinity"):
        pixels = to_unit_range(batch.images.to(inference.device))
        made = {name: affinity_of(network, pixels, blocks) for name, blocks in chosen.items()}
        for i, mask in enumerate(batch.masks[:kept]):
            truth = cell_centres(mask, made["all"][1]).flatten()
            pairs = kinds_of_pairs(truth)
            counts += pairs.sum((1, 2))
            for name, (affinity, _) in made.items():
                relative = affinity[i].double().cpu() * len(truth)
                sums[name] += (relative * pairs).sum((1, 2))
    return {name: (total / counts).tolist() for name, total in sums.items()}


def kinds_of_pairs(truth: Tensor) -> Tensor:
    """Which pairs are of which kind: classes of positions (N,) to bool (4, N, N), in PAIRS' order.

    None of a position with itself, and none of one without a known class.
    """
    known, background = truth != IGNORE_INDEX, truth == 0
    equal = truth[:, None] == truth[None]
    some = known[:, None] & known[None] & ~torch.eye(len(truth), dtype=torch.bool)
    of_object, of_background = some & ~background[:, None], some & background[:, None]
    return torch.stack(
        (of_object & equal, of_object & ~equal, of_background & equal, of_background & ~equal)
    )


def print_affinities(made: dict[str, list[float]]) -> None:
    """As a table."""
    table = Table(title="affinity, 1 where uniform", title_justify="left")
    table.add_column("block")
    for name in PAIRS:
        table.add_column(name, justify="right")
    for name, values in made.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
