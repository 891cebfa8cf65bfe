"""Before a run starts in a folder: whether one is there already, and what it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from torch import Tensor

from wsss.build import flat_settings, method_class, plain_config
from wsss.checkpoints import read_checkpoint, saved_config
from wsss.errors import UserError
from wsss.inference import PRECISION_ALIASES
from wsss.methods.base import CHECKPOINT_KEY, Method

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
    "wandb_run.txt",
)

#: settings that decide what a run computes; of ``trainer`` these alone
COMPARED = ("method", "view", "backbone", "neck", "decoder", "addon", "data", "trainer", "seed")
TRAINER = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")
#: what the state of a run is of: the optimizer's moments, the count of micro-batches; and the seed,
#: by which its results are known
FIXED = ("method.optimizer", "trainer.accumulate_grad_batches", "seed")
#: where things lie and how fast they are read; what the checkpoint takes the place of; copies
IGNORED = (
    "backbone.pretrained",
    "backbone.weights",
    "data.dataset.labels_file",
    "data.dataset.sbd_root",
    "data.eval_batch_size",
    "data.masks",
    "data.num_workers",
    "data.root",
    "data.seed",
    "data.view.",
)


@dataclass
class Resumed:
    """The checkpoint that a run goes on from.

    Attributes:
        path: its file.
        content: its tensors, its step and what it says of its run.
        changed: settings of this run that are not the checkpoint's: key, value there, value here.
    """

    path: Path
    content: dict[str, Any]
    changed: list[tuple[str, Any, Any]]

    @property
    def step(self) -> int:
        """Optimizer steps it has behind it."""
        return int(self.content["global_step"])

    def about_changes(self) -> str:
        """The changed settings in one line."""
        return ", ".join(f"{key}={now} (was {then})" for key, then, now in self.changed)


def check_free(
    output_dir: Path, ckpt: str | None, overwrite: bool, weights: str | None = None
) -> None:
    """Refuse to train anew where a run already is: its checkpoints would be replaced unasked.

    Args:
        output_dir: the run's folder.
        ckpt: as :func:`find_checkpoint` takes it.
        overwrite: the run that is there may go.
        weights: ``backbone.weights``.

    Raises:
        UserError: a run is there, and neither ``ckpt`` nor ``overwrite`` says what becomes of it;
            or both do, and ``ckpt`` is a part of that run, as ``weights`` must not be either.
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
    if overwrite and ckpt is None and weights and _is_inside(Path(weights), output_dir):
        raise UserError(
            f"overwrite=true would remove backbone.weights={weights}: choose another output_dir."
        )


def start_anew(output_dir: Path) -> None:
    """Remove what an earlier run left in its folder, so that nothing of it is taken for the new
    one's."""
    for pattern in WRITTEN:
        for path in output_dir.glob(pattern):
            path.unlink()


def find_checkpoint(ckpt: str | None, output_dir: Path) -> Path | None:
    """The file that ``ckpt=`` means.

    Args:
        ckpt: a file, a run's folder (its last checkpoint), or ``last``: that of ``output_dir``, if
            it exists.
        output_dir: the run's folder.

    Raises:
        UserError: no such file.
    """
    if ckpt is None:
        return None
    if ckpt == "last":
        path = output_dir / "checkpoints" / "last.ckpt"
        return path if path.exists() else None
    path = Path(ckpt).expanduser()
    if path.is_dir():
        last = path / "checkpoints" / "last.ckpt"
        if not last.is_file():
            raise UserError(
                f"ckpt='{ckpt}' is a folder without checkpoints/last.ckpt: give a run's folder or "
                "a .ckpt file."
            )
        return last
    if not path.is_file():
        near = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" There are: {', '.join(p.name for p in near)}." if near else ""
        raise UserError(f"ckpt='{ckpt}': no such file.{hint}")
    return path


def read_resumed(path: Path, cfg: DictConfig) -> Resumed:
    """A checkpoint that training goes on from.

    Args:
        path: its file.
        cfg: of the run that is to go on.

    Raises:
        UserError: it cannot be read, holds weights alone, or is of another method, or one of
            :data:`FIXED` is another.
    """
    content = read_checkpoint(path)
    saved = saved_config(content, path)
    if "optimizer_states" not in content:
        raise UserError(
            f"ckpt='{path}' holds weights alone, of no step that a training could go on from: give "
            "a run's last.ckpt."
        )
    then, now = _method_name(saved), _method_name(cfg)
    if then != now:
        raise UserError(
            f"ckpt='{path}' was trained with method={then}, this run is method={now}: choose "
            f"method={then}, or another ckpt."
        )
    # Without the optimizer's state, twice as large as the networks, which Lightning reads itself.
    content = {key: content[key] for key in (CHECKPOINT_KEY, "state_dict", "global_step")}
    resumed = Resumed(path, content, changed_settings(plain_config(saved), plain_config(cfg)))
    for key, old, new in resumed.changed:
        if key in FIXED:
            raise UserError(
                f"ckpt='{path}' was trained with {key}={old}, this run has {key}={new}, which "
                f"cannot go on from its state: set {key}={old}, or choose another ckpt."
            )
    return resumed


def check_fits(resumed: Resumed, method: Method) -> None:
    """Load a checkpoint's tensors, as Lightning will again, to see that they are the method's.

    Raises:
        UserError: they are not; names the first that differs and the setting likely at fault.
    """
    state: dict[str, Tensor] = resumed.content["state_dict"]
    try:
        method.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        name, how = _first_difference(state, method.state_dict())
        raise UserError(
            f"ckpt='{resumed.path}' does not fit this run: '{name}' {how}. "
            f"{_likely_fault(name, resumed.changed)}"
        ) from error


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings in which two runs differ, of those that decide what is computed.

    A setting that one of them does not know belongs to another version of wsss, or to a part of
    the configuration (``_target_``) that the other does not have; the part alone is listed then.

    Returns:
        Key, value then, value now, in the order of :data:`COMPARED`; None of a part that is not
        there.
    """
    found = []
    for group in COMPARED:
        # None: no add-on, say.
        parts = [{group: it} for it in (then.get(group), now.get(group))]
        old, new = ({} if part[group] is None else flat_settings(part) for part in parts)
        for key in dict.fromkeys([*old, *new]):
            part, _, last = key.rpartition(".")
            if key.startswith(IGNORED) or (group == "trainer" and last not in TRAINER):
                continue
            if key in old and key in new:
                alias = PRECISION_ALIASES if key == "trainer.precision" else {}
                if alias.get(str(old[key]), old[key]) != new[key]:
                    found.append((key, old[key], new[key]))
            elif last == "_target_":
                found.append((part, old.get(key), new.get(key)))
    return found


def _method_name(cfg: DictConfig) -> str:
    try:
        return method_class(cfg).short_name()
    except (ImportError, AttributeError, ValueError, HydraException):
        # A class of somebody else's, or of another version.
        return str(cfg.method._target_)


def _first_difference(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> tuple[str, str]:
    for name, own in here.items():
        if name not in there:
            return name, "is not in the checkpoint"
        if there[name].shape != own.shape:
            return name, f"has the shape {tuple(there[name].shape)} there, {tuple(own.shape)} here"
    extra = next((name for name in there if name not in here), "state_dict")
    return extra, "is in the checkpoint alone"


def _likely_fault(name: str, changed: list[tuple[str, Any, Any]]) -> str:
    """What to change so that the tensor ``name`` fits: a setting of its part of the network."""
    of = {"addons": "addon", "neck": "neck", "decoder": "decoder", "encoder": "backbone"}
    group = next((of[part] for part in name.split(".") if part in of), "method")
    settings = {key: (then, now) for key, then, now in changed}
    own = [key for key in settings if key == group or key.startswith(f"{group}.")]
    # A part that is there for a setting of another group: MCTformer's tokens, say.
    others = [key for key in settings if key.startswith(("backbone.", "method.", "view."))]
    named = [key for key in own if key.rpartition(".")[2] in ("name", *name.split("."))]
    key = next(iter([*named, *own, *others]), None)
    if key is None:
        return "It may be of another version of wsss: use that one, or another ckpt."
    then, now = settings[key]
    return (
        f"It was trained with {key}={then}, this run has {key}={now}: set it so, or choose another "
        "ckpt."
    )


def _at_step(checkpoint: Path) -> str:
    try:
        return f" at step {int(read_checkpoint(checkpoint)['global_step'])}"
    except (UserError, KeyError):  # cut off or foreign: still not ours to replace
        return ""


def _is_inside(path: Path, folder: Path) -> bool:
    return path.expanduser().resolve().is_relative_to(folder.expanduser().resolve())
