"""``wsss analyse gaussian_fsl``: scores over mu and sigma, and pictures of what the loss does."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from wsss.addons.feature_similarity import GATES
from wsss.analysis.drawing import BLUE, DPI, GREEN, ORANGE, STYLE
from wsss.analysis.gaussian_fsl import (
    Score,
    SingleObject,
    optimise,
    predictions,
    score,
    single_objects,
)
from wsss.build import build_layout
from wsss.cli import quiet_libraries
from wsss.errors import UserError
from wsss.files import check_writable, write_atomically
from wsss.report.pictures import PanelSet, grid, overlay, save_png


def gaussian_fsl(cfg: DictConfig) -> dict[tuple[float, float], Score]:
    """Optimise Gaussian CAMs for every mu and sigma of ``conf/gaussian_fsl.yaml``.

    Returns:
        Scores in percent by (mu, sigma).

    Raises:
        UserError: a setting that cannot be, data that is not there or has no masks, or no image
            with a single object.
    """
    quiet_libraries()
    check_settings(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    output_dir = Path(cfg.output_dir)
    check_writable(output_dir)
    name = cfg.split or cfg.data.val_split
    split = build_layout(cfg).open(name, on_error=cfg.data.on_error, min_side=cfg.data.min_side)
    if not split.has_masks:
        raise UserError(f"split '{name}' has no masks, which Gaussian CAMs are made of.")
    area = (float(cfg.area[0]), float(cfg.area[1]))
    items = single_objects(split, cfg.per_class, area, cfg.resolution, cfg.seed)
    if not items:
        raise UserError(
            f"split '{name}' has no image with one connected object of {area[0]:g} to {area[1]:g} "
            "of its area: change area=, or choose another split."
        )
    console = Console()
    classes = len({item.label for item in items})
    console.print(f"{len(items)} images of {classes} classes, {cfg.steps} steps each")

    mu_at, sigma_at = (float(value) for value in cfg.at)
    pairs = [(float(mu), sigma_at) for mu in cfg.mu] + [(mu_at, float(s)) for s in cfg.sigma]
    watched: dict[int, Tensor] = {}

    def keep(step: int, scores: Tensor) -> None:
        if step in (0, cfg.steps // 2, cfg.steps):
            watched[step] = scores.clone()

    wanted = list(dict.fromkeys([(mu_at, sigma_at), *pairs]))
    found: dict[tuple[float, float], Score] = {}
    with warnings.catch_warnings():
        # Of classes without an image, which no score counts.
        warnings.filterwarnings("ignore", message=".*left out of the means.*")
        for mu, sigma in track(
            wanted, "mu and sigma", console=console, disable=not console.is_terminal, transient=True
        ):
            watch = keep if (mu, sigma) == (mu_at, sigma_at) else None
            scores = optimise(items, mu, sigma, cfg.gate, cfg.steps, cfg.lr, watch)
            found[mu, sigma] = score(items, scores, len(split.classes))
        start = score(items, watched[0], len(split.classes))

    write_atomically(output_dir / "scores.csv", table_text(start, found).encode())
    write_atomically(
        output_dir / "curves.png", draw_curves(start, found, mu_at, sigma_at, cfg.mu, cfg.sigma)
    )
    if cfg.pictures:
        chosen = np.linspace(0, len(items) - 1, min(cfg.pictures, len(items))).round().astype(int)
        picture = strip(items, watched, [int(i) for i in chosen], split.classes)
        save_png(picture, output_dir / "strip.png")
    console.print(printed(start, found))
    best = max(found, key=lambda pair: found[pair].jf)
    print(f"Best J&F at mu {best[0]:g}, sigma {best[1]:g}. Written to {output_dir}")
    return found


def check_settings(cfg: DictConfig) -> None:
    """Refuse what cannot be before any image is read.

    Raises:
        UserError: the first such key.
    """
    if cfg.gate not in GATES:
        raise UserError(f"gate='{cfg.gate}': choose one of {', '.join(GATES)}.")
    for key in ("per_class", "steps"):
        if cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]}: give 1 or more.")
    for key in ("resolution", "lr"):
        if cfg[key] <= 0:
            raise UserError(f"{key}={cfg[key]}: give more than 0.")
    for key in ("at", "area"):
        if len(cfg[key]) != 2:
            raise UserError(f"{key}={list(cfg[key])}: give two numbers.")
    for value in (*cfg.sigma, cfg["at"][1]):
        if value <= 0:
            raise UserError(f"sigma={value}: give more than 0.")
    if not 0 <= cfg.area[0] < cfg.area[1] <= 1:
        raise UserError(f"area={list(cfg.area)}: give a least and a largest share, from 0 to 1.")


def table_text(start: Score, found: dict[tuple[float, float], Score]) -> str:
    """The scores as CSV; the first row is what the Gaussians score."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["mu", "sigma", "J", "F", "J&F"])
    writer.writerow(["", "", *(f"{value:.2f}" for value in start)])
    for (mu, sigma), value in sorted(found.items()):
        writer.writerow([f"{mu:g}", f"{sigma:g}", *(f"{v:.2f}" for v in value)])
    return buffer.getvalue()


def printed(start: Score, found: dict[tuple[float, float], Score]) -> Table:
    """The scores for the terminal."""
    table = Table(title="Feature similarity alone (%)", title_justify="left", box=SIMPLE_HEAVY)
    for title in ("mu", "sigma", "J", "F", "J&F"):
        table.add_column(title, justify="right")
    table.add_row("start", "", *(f"{value:.2f}" for value in start))
    for (mu, sigma), value in sorted(found.items()):
        table.add_row(f"{mu:g}", f"{sigma:g}", *(f"{v:.2f}" for v in value))
    return table


def draw_curves(
    start: Score,
    found: dict[tuple[float, float], Score],
    mu_at: float,
    sigma_at: float,
    mus: Sequence[float],
    sigmas: Sequence[float],
) -> bytes:
    """Figure 7 of the paper: J, F and J&F over mu and over sigma; dotted: the Gaussians."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, name, values, other in (
            (axes[0], r"$\mu$", sorted(mus), rf"$\sigma$ = {sigma_at:g}"),
            (axes[1], r"$\sigma$", sorted(sigmas), rf"$\mu$ = {mu_at:g}"),
        ):
            over_mu = axis is axes[0]
            rows = [found[(float(v), sigma_at) if over_mu else (mu_at, float(v))] for v in values]
            for i, (label, colour) in enumerate(zip("JF", (BLUE, ORANGE), strict=True)):
                axis.plot(values, [row[i] for row in rows], "o-", color=colour, label=label)
                axis.axhline(start[i], color=colour, linestyle=":", linewidth=1)
            axis.plot(values, [row.jf for row in rows], "s-", color=GREEN, label="J&F")
            axis.axhline(start.jf, color=GREEN, linestyle=":", linewidth=1)
            axis.set_xlabel(f"{name} ({other})")
        axes[0].set_ylabel("%")
        axes[1].legend(loc="best")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def strip(
    items: Sequence[SingleObject],
    watched: dict[int, Tensor],
    chosen: Sequence[int],
    classes: Sequence[str],
) -> np.ndarray:
    """Images with their truth and the predictions after some steps.

    Args:
        items: all images.
        watched: scores (B, 1, h, w) by number of steps.
        chosen: which images to draw.
        classes: foreground names.
    """
    drawn = {step: list(predictions(items, scores)) for step, scores in sorted(watched.items())}
    rows = []
    for i in chosen:
        item = items[i]
        height, width = item.mask.shape
        large = torch.nn.functional.interpolate(
            item.image[None], size=(height, width), mode="bilinear", align_corners=False
        )[0]
        image = (large.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        panels = {"image": image, "truth": overlay(image, item.mask, len(classes) + 1)}
        for step, maps in drawn.items():
            title = "Gaussian" if step == 0 else f"{step} steps"
            panels[title] = overlay(image, maps[i], len(classes) + 1)
        rows.append(PanelSet(item.name, (classes[item.label - 1],), panels))
    return grid(rows)
