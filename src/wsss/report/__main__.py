"""Report on finished runs: ``python -m wsss.report run=outputs/cosa``.

``runs=[outputs/cosa,outputs/cam]`` compares several. Writes into ``output_dir``: ``report.html``,
one page without anything beside it; ``table.md`` and ``table.csv`` with the scores of every run;
and ``pictures.png``, where every run's last weights are seen on the same validation images.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, ListConfig
from rich.console import Console

from wsss.cli import hydra_command, quiet_libraries
from wsss.errors import UserError
from wsss.files import check_writable, write_atomically
from wsss.report.comparison import (
    comparisons,
    csv_text,
    main_scores,
    markdown,
    rich_table,
    score_names,
    table_rows,
)
from wsss.report.drawing import draw_runs
from wsss.report.page import render
from wsss.report.pictures import grid, save_png
from wsss.report.runs import read_runs, run_titles

#: of several runs, which have no folder of their own
_SHARED = Path("outputs/report")


def report(cfg: DictConfig) -> list[Path]:
    """Write the report of ``conf/report.yaml``.

    What an older report has left in the folder and this one does not write is removed.

    Returns:
        The files written.

    Raises:
        UserError: no run, a run without scores or checkpoint, runs on different classes, a file
            of a run folder that cannot be read, or a folder that cannot be written.
    """
    quiet_libraries()
    runs, unfinished = read_runs(asked_for(cfg))
    titles = run_titles(runs, cfg.titles)
    if cfg.output_dir is not None:
        output = Path(str(cfg.output_dir)).expanduser()
    else:
        output = runs[0].folder / "report" if len(runs) + len(unfinished) == 1 else _SHARED
    if cfg.pictures:
        # Before any table: what is missing should be known at once.
        for run in runs:
            if not run.checkpoint.is_file():
                raise UserError(
                    f"run '{run.folder}' has no checkpoints/last.ckpt to draw pictures with. "
                    "Copy the file there, or set pictures=0."
                )

    check_writable(output)
    page, picture = output / "report.html", output / "pictures.png"

    console = Console()
    names = score_names(runs)
    header, rows = table_rows(runs, main_scores(names))
    console.print(rich_table(runs, console))
    lines = comparisons(runs)
    if unfinished:
        lines.append(
            f"{len(unfinished)} of {len(unfinished) + len(runs)} runs not finished (no "
            f"scores.json), left out: {', '.join(map(str, unfinished))}"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    written = [output / "table.md", output / "table.csv"]
    write_atomically(written[0], markdown(header, rows, lines).encode())
    write_atomically(written[1], csv_text(*table_rows(runs, names)).encode())
    drawing = None
    if cfg.pictures:
        drawing = draw_runs(runs, titles, int(cfg.pictures), cfg.data_root)
        written.append(picture)
        rows_of_panels = [picture.panels for picture in drawing.shared]
        save_png(grid(rows_of_panels, legend=drawing.classes), picture)
    elif page.is_file():  # else the picture is somebody's own
        picture.unlink(missing_ok=True)
    written.append(page)
    write_atomically(page, render(runs, titles, unfinished, drawing).encode())
    for path in written:
        print(path)
    return written


def asked_for(cfg: DictConfig) -> list[str]:
    """Names and globs of ``run`` or ``runs``.

    Raises:
        UserError: neither or both are set.
    """
    example = "give a run folder, run=outputs/a, or several, runs=[outputs/a,outputs/b]."
    if cfg.run is not None and cfg.runs is not None:
        raise UserError(f"run and runs are both set: {example}")
    chosen = cfg.runs if cfg.run is None else cfg.run
    if chosen is None:
        raise UserError(f"runs is not set: {example}")
    return [str(name) for name in (chosen if isinstance(chosen, ListConfig) else [chosen])]


def main() -> None:
    """Console entry point."""
    hydra_command("report", report)


if __name__ == "__main__":
    main()
