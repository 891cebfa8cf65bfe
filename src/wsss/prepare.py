"""Check a data set and write down what it holds: ``python -m wsss.prepare data=voc data.root=...``.

Finds what is there, says what is missing and where it belongs, builds what can be built (masks from
SBD and COCO's annotations, slices of ACDC), decodes every image and mask once, writes a manifest of
each split that training reads, and prints counts. A second call finds everything in order and
changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsss.build import build_layout
from wsss.cli import hydra_command
from wsss.data.images import VOID, count
from wsss.data.layout import Layout
from wsss.data.manifest import Item, Manifest
from wsss.errors import UserError


def prepare(cfg: DictConfig) -> dict[str, Manifest]:
    """Prepare every split of a data set.

    Args:
        cfg: ``conf/prepare.yaml`` composed with a data set.

    Returns:
        Manifests by split, those that could be made.

    Raises:
        UserError: the training or validation split cannot be used, or holds problems and
            ``data.on_error`` is ``raise``.
    """
    console = Console(soft_wrap=True)
    layout = build_layout(cfg, download=cfg.download)
    if cfg.data.on_error not in ("raise", "skip"):
        raise UserError(f"data.on_error='{cfg.data.on_error}': expected raise or skip")
    wanted = list(dict.fromkeys([cfg.data.train_split, cfg.data.val_split]))
    manifests: dict[str, Manifest] = {}
    missing: dict[str, str] = {}
    for split in dict.fromkeys([*wanted, *_splits(layout)]):
        try:
            manifests[split] = layout.prepare(split, decode=True)
        except UserError as error:
            missing[split] = str(error)
    if not manifests:  # mostly one cause for all
        raise UserError("\n".join(dict.fromkeys(missing.values())))

    console.print(f"[bold]{layout.kind}[/] data set in {escape(str(layout.root))}")
    for note in dict.fromkeys(note for m in manifests.values() for note in m.notes):
        console.print(f"  {escape(note)}", highlight=False)
    problems = {
        split: _problems(layout, manifest, split == cfg.data.train_split, cfg.data.min_side)
        for split, manifest in manifests.items()
    }
    console.print(_split_table(manifests, problems))
    console.print(_class_table(layout.classes, manifests))
    for folder in dict.fromkeys(str(m.path.parent) for m in manifests.values() if m.path):
        console.print(f"What was found is kept in {escape(folder)}", highlight=False)
    for text in _doubts(layout.classes, manifests, cfg.data.train_split):
        console.print(f"[yellow]{escape(text)}[/]", highlight=False)
    for split, manifest in manifests.items():
        found = [text for texts in problems[split].values() for text in texts]
        listed = layout.listed(split, found)
        if found:
            heading = f"split '{split}': {count(len(found), 'problem')}"
            said = set(found)
            unlabelled = sum(
                layout.no_labels(item) in said
                for item in manifest.items
                if item.labels is None or item.labels_of_mask
            )
            if unlabelled:  # mostly a wrong file of labels, not many wrong images
                heading += f"; images without labels: {unlabelled}"
            console.print(f"[red]{escape(heading)}[/]", highlight=False)
            console.print(escape(listed), highlight=False)
    for split in missing:
        if split not in wanted:
            text = f"split '{split}' cannot be used: {missing[split]}"
            console.print(f"[red]{escape(text)}[/]", highlight=False)

    bad = [missing[split] for split in wanted if split in missing]
    if bad:
        raise UserError("\n".join(dict.fromkeys(bad)))
    broken = [f"{count(len(problems[s]), 'image')} of split '{s}'" for s in wanted if problems[s]]
    if broken and cfg.data.on_error == "raise":
        raise UserError(
            f"{layout.root}: {' and '.join(broken)} cannot be used, see above. Mend them, or leave "
            "them out with data.on_error=skip"
        )
    for split in wanted:
        training = split == cfg.data.train_split
        usable = [i for i in manifests[split].items if i.name not in problems[split]]
        if not any(item.labels or not training for item in usable):
            raise UserError(f"{layout.root}: split '{split}' has no image that can be used")
    return manifests


def _splits(layout: Layout) -> list[str]:
    try:
        return layout.splits()
    except (UserError, OSError):  # said again, and better, by the splits that are asked for
        return []


def _problems(
    layout: Layout, manifest: Manifest, training: bool, min_side: int
) -> dict[str, list[str]]:
    """Problems of a split by item name."""
    has_masks = any(item.mask for item in manifest.items)
    found: dict[str, list[str]] = {}
    for item in manifest.items:
        # A mask is needed where others have one, unless the image serves training alone.
        need_mask = item.mask is not None if training else has_masks
        need_labels = training or item.mask is not None
        texts = layout.find_problems(item, need_mask, need_labels, min_side, weakly=training)
        if texts:
            found.setdefault(item.name, []).extend(texts)
    return found


def _split_table(
    manifests: dict[str, Manifest], problems: dict[str, dict[str, list[str]]]
) -> Table:
    columns: dict[str, Callable[[Manifest], int]] = {
        "images": lambda m: len(m.items),
        "labelled": lambda m: sum(bool(item.labels) for item in m.items),
        "no class": lambda m: sum(item.labels == [] for item in m.items),
        "no labels": lambda m: sum(i.labels is None and not i.problem for i in m.items),
        "masks": lambda m: sum(item.mask is not None for item in m.items),
        "unusable": lambda m: len(problems[m.split]),
        "groups": lambda m: len({item.group for item in m.items if item.group}),
    }
    if not any(item.group for m in manifests.values() for item in m.items):
        del columns["groups"]
    table = Table(title="Splits")
    table.add_column("split", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for split, manifest in manifests.items():
        table.add_row(escape(split), *(str(number(manifest)) for number in columns.values()))
    return table


def _class_table(classes: tuple[str, ...], manifests: dict[str, Manifest]) -> Table:
    table = Table(title="Images of each class")
    table.add_column("mask value", justify="right", no_wrap=True)
    table.add_column("class")
    for split in manifests:
        table.add_column(escape(split), justify="right")
    counts = {split: _class_counts(m.items) for split, m in manifests.items()}
    for index, name in enumerate(classes):
        row = [str(counts[split][index]) for split in manifests]
        table.add_row(str(index + 1), escape(name), *row)
    return table


def _doubts(
    classes: tuple[str, ...], manifests: dict[str, Manifest], train_split: str
) -> list[str]:
    """What hinders nothing, but is hardly meant."""

    def names(indices: Iterable[int]) -> str:
        return ", ".join(classes[i] for i in indices) or "none"

    doubts = []
    for split, manifest in manifests.items():
        masked = [i for i in manifest.items if i.mask_classes is not None and i.labels is not None]
        other = [i for i in masked if set(i.mask_classes or []) - set(i.labels or [])]
        if other:
            doubts.append(
                f"split '{split}': {len(other)} of {count(len(masked), 'mask')} hold classes that "
                f"the image's labels do not, such as {other[0].name}: labels "
                f"{names(other[0].labels or [])}, mask {names(other[0].mask_classes or [])}. Are "
                "the classes in the order of the mask values?"
            )
        empty = [i for i in masked if i.labels and not i.mask_classes]
        if empty:
            doubts.append(
                f"split '{split}': {len(empty)} of {count(len(masked), 'mask')} hold no class, but "
                f"the image's labels do, such as {empty[0].name}: {names(empty[0].labels or [])}. "
                f"The first class is value 1; {VOID} is ignored"
            )
    if train_split in manifests:
        counts = _class_counts(manifests[train_split].items)
        never = [index for index in range(len(classes)) if not counts[index]]
        if never:
            doubts.append(f"split '{train_split}': no image is labelled {names(never)}")
    return doubts


def _class_counts(items: list[Item]) -> Counter[int]:
    return Counter(label for item in items for label in item.labels or [])


def main() -> None:
    """Console entry point."""
    hydra_command("prepare", prepare)


if __name__ == "__main__":
    main()
