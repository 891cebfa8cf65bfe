"""What all commands share: configuration folder, early checks of overrides, exit codes."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from wsss.errors import UserError
from wsss.files import check_writable
from wsss.log import keep

#: keys whose values are paths, and may hold what Hydra's grammar takes for its own
PATHS = frozenset(
    {
        "backbone.weights",
        "checkpoint",
        "ckpt",
        "data.dataset.labels_file",
        "data.dataset.sbd_root",
        "data.masks",
        "data.root",
        "data_root",
        "affinity",
        "file",
        "input",
        "masks",
        "output",
        "output_dir",
        "run",
        "runs",
    }
)


def config_dir() -> Path:
    """The ``conf`` folder: inside an installed wheel, or at the root of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def hydra_command(config_name: str, main: Callable[[DictConfig], Any]) -> None:
    """Run ``main`` as a Hydra application, with mistakes told in one line.

    Overrides are checked before Hydra starts: an unknown key or choice ends the command at once
    and names the nearest right one. A :class:`UserError` ends it with exit code 2, without a
    traceback. A run of a sweep that fails does not keep the others from running; the sweep then
    ends with exit code 2.
    """
    failed: list[str] = []

    def guarded(cfg: DictConfig) -> Any:
        from wsss.launch import one_job  # imports torch: not for help

        try:
            with keep_warnings(), one_job():
                return main(cfg)
        except UserError as error:
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            if not _sweeps_here():
                fail(str(error))
            keep(str(error), logging.ERROR)
            failed.append(f"{HydraConfig.get().job.num} ({error})")
        except Exception as error:
            if not _sweeps_here():
                raise
            keep(traceback.format_exc(), logging.ERROR)
            traceback.print_exc()
            failed.append(f"{HydraConfig.get().job.num} ({type(error).__name__}: {error})")
        print(f"error: run {failed[-1]}", file=sys.stderr)

    sys.argv[1:] = map(quoted_path, sys.argv[1:])
    cfg = check_overrides(config_name, sys.argv[1:])
    if cfg is not None:
        prepare_folder(cfg, sys.argv)
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(
        guarded
    )()
    if failed:
        runs = "".join(f"\n  {run}" for run in failed)
        fail(f"{len(failed)} of the sweep's runs failed:{runs}")


def _sweeps_here() -> bool:
    """Whether this is a run of a sweep whose others follow in this process."""
    config: Any = HydraConfig.get()
    launcher = str(config.launcher.get("_target_"))
    return bool(config.mode == RunMode.MULTIRUN and launcher.endswith(".BasicLauncher"))


def quoted_path(argument: str) -> str:
    """``key=path`` as Hydra can read it, which would else parse ``photo (1).jpg`` or ``größe/a``.

    A leading ``~`` is the user's home: a shell leaves it as it is behind a dotted key.
    """
    key, _, value = argument.partition("=")
    if key not in PATHS or not value:
        return argument
    if key == "runs" and value.startswith("[") and value.endswith("]"):
        parts = [_readable(part.strip()) for part in value[1:-1].split(",")]
        return f"{key}=[{','.join(parts)}]"
    return f"{key}={_readable(value)}"


def as_string(value: str) -> str:
    """A value in quotes, as Hydra reads them; one that has quotes already as it is."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value
    # Backslashes count as such except before a quote.
    inner = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value)
    return f'"{inner}"'


def _readable(value: str) -> str:
    if value == "~" or value.startswith("~/"):
        value = str(Path(value).expanduser())
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return as_string(value)
    return value


def quiet_libraries() -> None:
    """Silence hints that do not concern users of this library."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory.*")  # kept, see loggers
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    # The order of images is a function of seed and step: a resumed run goes on exactly.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # Scores are reduced over ranks before they are logged.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")


def fail(message: str) -> NoReturn:
    """Print an error, keep it in the log file, and end with exit code 2."""
    keep(message, logging.ERROR)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def prepare_folder(cfg: DictConfig, argv: list[str]) -> None:
    """See that the folder can be written that Hydra makes before the command starts.

    A sweep goes where ``output_dir=`` says, as a single run does, if the command's runs do.

    Args:
        cfg: as :func:`check_overrides` gives it.
        argv: changed in place: ``hydra.sweep.dir`` is added.
    """
    typed = {key.lstrip("+"): value for key, _, value in (a.partition("=") for a in argv[1:])}
    given = {"output_dir", "hydra.run.dir", "hydra.sweep.dir"} & set(typed)
    sweeps = any(flag in argv for flag in ("-m", "--multirun"))
    folder = cfg.hydra.sweep.dir if sweeps else cfg.hydra.run.dir
    runs_in = OmegaConf.to_container(cfg.hydra.run, resolve=False)
    if sweeps and runs_in == {"dir": "${output_dir}"} and given == {"output_dir"}:
        if _first_value(f"output_dir={typed['output_dir']}") != f"output_dir={typed['output_dir']}":
            fail(
                f"output_dir={typed['output_dir']}: the runs of a sweep lie side by side in one "
                "folder; give one."
            )
        argv.append(f"hydra.sweep.dir={typed['output_dir']}")
        folder = cfg.output_dir
    if folder == "." or any(a.startswith(("--cfg", "-c", "--info", "-i")) for a in argv):
        return  # nothing is made, or it is there
    try:
        # One whose name holds the time is not made here: Hydra's may be a second later.
        check_writable(Path(folder) if given else Path(folder).parent)
    except UserError as error:
        fail(str(error))


@contextmanager
def keep_warnings() -> Iterator[None]:
    """Warnings go to the log file too."""
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        shown(message, category, *where, **more)
        keep(f"{category.__name__}: {message}", logging.WARNING)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def check_overrides(config_name: str, arguments: list[str]) -> DictConfig | None:
    """Compose the configuration once, so that a mistyped override fails with a hint.

    Sweeps are checked at the first value of each swept key. Hydra's own flags pass through.

    Returns:
        The configuration with Hydra's own; None where a flag asks for something else.
    """
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    if any(a in ("--help", "-h", "--hydra-help", "--info", "--version") for a in arguments):
        return None
    extra = _flag_value(arguments, "--config-dir", "-cd")
    if _flag_value(arguments, "--config-name", "-cn") or _flag_value(arguments, "--config-path"):
        return None
    try:
        singles = [_first_value(o) for o in overrides]
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            if extra:
                singles.append(f"hydra.searchpath=[{Path(extra).absolute().as_uri()}]")
            return hydra.compose(config_name, overrides=singles, return_hydra_config=True)
    except (HydraException, ConfigCompositionException) as error:
        fail(_with_hint(config_name, overrides, error))
    finally:
        GlobalHydra.instance().clear()


def _flag_value(arguments: list[str], *flags: str) -> str | None:
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in flags:
            return value or (arguments[i + 1] if i + 1 < len(arguments) else None)
    return None


def _first_value(override: str) -> str:
    """``key=a,b`` and ``key=choice(a,b)`` as ``key=a``; others unchanged."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    first = next(iter(parsed.sweep_string_iterator()))
    return f"{override.split('=', 1)[0]}={first}"


def _with_hint(config_name: str, overrides: list[str], error: Exception) -> str:
    message = str(error).split("\nSet the environment")[0].strip()
    groups = _groups()
    keys = _known_keys(config_name)
    for override in overrides:
        raw, _, value = override.partition("=")
        key = raw.lstrip("+~").split("@")[0]
        if key in groups:
            choices = re.findall(r"[^\s,'\"\[\]]+", value)  # of a sweep, or of a list
            wrong = [v for v in choices if v not in groups[key] and v != "null"]
            if wrong:
                return (
                    f"{key}={wrong[0]}: no such choice. {_near(wrong[0], groups[key])}"
                    f"Available: {', '.join(groups[key])}."
                )
        elif raw.startswith(("+", "~", "hydra.")):
            continue
        elif key not in keys:
            return f"{key}: no such key. {_near(key, [*keys, *groups])}".strip()
    return message


def nearest(word: str, known: Iterable[str]) -> str:
    """``Did you mean '...'?`` for a mistyped word, else all that is known."""
    known = list(known)
    found = _near(word, known)
    return found.strip() or f"Known: {', '.join(known)}."


def _near(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    # A right last part in the wrong section first: `lr` is `method.lr`, not `logger`.
    same = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(word, same, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'? " if near else ""


def _groups() -> dict[str, list[str]]:
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml") if f.stem != "base")
        for folder in config_dir().iterdir()
        if folder.is_dir()
    }


def _known_keys(config_name: str) -> set[str]:
    """Dotted keys of the default configuration and of every choice of every group."""
    keys: set[str] = set()

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("defaults", "hydra"):
                    continue
                path = f"{prefix}{key}"
                keys.add(path)
                walk(value, f"{path}.")

    def read(file: Path) -> Any:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)

    walk(read(config_dir() / f"{config_name}.yaml"), "")
    for folder in config_dir().iterdir():
        if folder.is_dir() and folder.name != "experiment":
            for file in folder.glob("*.yaml"):
                walk(read(file), f"{folder.name}.")
    return keys
