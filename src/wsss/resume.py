"""Before a run starts in a folder: whether one is there already, and what it goes on from."""

from __future__ import annotations

from pathlib import Path

from wsss.checkpoints import read_checkpoint
from wsss.errors import UserError

#: what a training writes into its folder; what other commands put there stays
WRITTEN = (
    "checkpoints/last.ckpt",
    "checkpoints/best.ckpt",
    "checkpoints/step_*.ckpt",
    "metrics.csv",
    "metrics.*.csv",
    "scores.json",
    "images.csv",
    "config.yaml",
    "environment.json",
    "pictures/step_*.png",
)


def check_free(output_dir: Path, ckpt: str | None, overwrite: bool) -> None:
    """Refuse to train anew where a run already is: its checkpoints would be replaced unasked.

    Args:
        output_dir: the run's folder.
        ckpt: as :func:`find_checkpoint` takes it.
        overwrite: the run that is there may go.

    Raises:
        UserError: a run is there, and neither ``ckpt`` nor ``overwrite`` says what becomes of it;
            or both do, and ``ckpt`` is a part of that run.
    """
    last = output_dir / "checkpoints" / "last.ckpt"
    if ckpt is None:
        if last.is_file() and not overwrite:
            raise UserError(
                f"output_dir={output_dir} holds a run{_at_step(last)}: ckpt=last goes on with it; "
                "another output_dir, or overwrite=true, starts anew."
            )
    elif overwrite and (ckpt == "last" or _is_inside(Path(ckpt), output_dir)):
        raise UserError(
            f"overwrite=true would remove what ckpt={ckpt} goes on from: leave out one of them."
        )


def start_anew(output_dir: Path) -> None:
    """Remove what an earlier run left in its folder, so that nothing of it is taken for the new
    one's."""
    for pattern in WRITTEN:
        for path in output_dir.glob(pattern):
            path.unlink()


def find_checkpoint(ckpt: str | None, output_dir: Path) -> Path | None:
    """The file that ``ckpt=`` means; ``last`` is the run folder's own, if it exists.

    Raises:
        UserError: no such file.
    """
    if ckpt is None:
        return None
    if ckpt == "last":
        path = output_dir / "checkpoints" / "last.ckpt"
        return path if path.exists() else None
    path = Path(ckpt)
    if not path.is_file():
        near = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" There are: {', '.join(p.name for p in near)}." if near else ""
        raise UserError(f"ckpt='{ckpt}': no such file.{hint}")
    return path


def _at_step(checkpoint: Path) -> str:
    try:
        return f" at step {int(read_checkpoint(checkpoint)['global_step'])}"
    except (UserError, KeyError):  # cut off or foreign: still not ours to replace
        return ""


def _is_inside(path: Path, folder: Path) -> bool:
    return path.expanduser().resolve().is_relative_to(folder.expanduser().resolve())
