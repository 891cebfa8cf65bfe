"""The runs of a report: found, read, put in order and told apart."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import ListConfig, OmegaConf

from wsss.data.given_masks import RECORD
from wsss.errors import UserError
from wsss.resume import TRAINER

#: what may differ between runs that count as seeds of one experiment
SEED_KEYS = ("seed", "name", "output_dir", "overwrite", "ckpt", "logger", "pictures", "evaluate")
#: what a run's machine decides, besides its trainer, and the copy of a seed
MACHINE_KEYS = ("data.seed", "data.num_workers", "data.eval_batch_size")
#: settings that may be a path into another run
FROM_RUNS = ("data.masks", "backbone.weights")


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: as the user named it.
        config: ``config.yaml`` as plain containers.
        content: ``scores.json``, see :func:`wsss.report.tables.collect`.
    """

    folder: Path
    config: dict[str, Any]
    content: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.content.get("name") or self.folder.name)

    @property
    def method(self) -> str:
        return str(self.content["method"])

    @property
    def seed(self) -> str:
        return str(self.content.get("seed"))

    @property
    def steps(self) -> str:
        return str(self.content.get("step", "-"))

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def score(self, name: str) -> float | None:
        """A score in percent by full name; None where the run has none."""
        value = self.content["scores"].get(name)
        return None if value is None else float(value)


# --- finding and reading -------------------------------------------------------------------


def read_runs(patterns: str | Iterable[str]) -> tuple[list[Run], list[Path]]:
    """The finished runs that names and globs stand for, and the folders of unfinished ones.

    A sweep that is still going can so be looked at through a glob; a folder that is named by
    itself must be finished.

    Raises:
        UserError: a name that matches nothing, a named run that is not finished, none that is.
    """
    names = [patterns] if isinstance(patterns, str) else [str(p) for p in patterns]
    named = {Path(name).resolve() for name in names if Path(name).is_dir()}
    runs: list[Run] = []
    unfinished: list[Path] = []
    for folder in find_runs(names):
        if folder.resolve() in named or (folder / "scores.json").is_file():
            runs.append(read_run(folder))
        else:
            unfinished.append(folder)
    if not runs:
        read_run(unfinished[0])  # says what is missing
    return sort_runs(runs), unfinished


def find_runs(patterns: str | Iterable[str]) -> list[Path]:
    """Folders that names and globs stand for, each once, in order (job 2 before job 10).

    Raises:
        UserError: a name that matches nothing.
    """
    names = [patterns] if isinstance(patterns, str) else [str(p) for p in patterns]
    if not names:
        raise UserError("runs is empty: give run folders, for example runs=[outputs/a,outputs/b].")
    found: dict[Path, Path] = {}
    for name in names:
        # A folder may be called like a pattern: the literal name goes first.
        if Path(name).is_dir():
            folders = [Path(name)]
        else:
            matches = sorted(glob.glob(name), key=_natural)  # noqa: PTH207 (Path.glob: relative patterns alone)
            folders = [Path(match) for match in matches if _is_run(Path(match))]
        if not folders:
            raise UserError(f"runs: '{name}' is no folder, and no run folder matches it.")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which numbers inside a text count as numbers."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
    ]


def _is_run(folder: Path) -> bool:
    """Globs also meet folders that are something else; those are passed over."""
    return (folder / "config.yaml").is_file() or (folder / "scores.json").is_file()


def read_run(folder: Path) -> Run:
    """Configuration and scores of a run folder.

    Raises:
        UserError: one of the files is missing or not what ``wsss.train`` writes.
    """
    for name, remedy in (
        ("config.yaml", "Give the folder that wsss.train wrote, its output_dir."),
        (
            "scores.json",
            "It is written when training ends: let the run finish (ckpt=last resumes it), with "
            "evaluate=true.",
        ),
    ):
        if not (folder / name).is_file():
            raise UserError(f"run '{folder}' has no {name}. {remedy}")
    try:
        content = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        if not {"scores", "classes", "method"} <= set(content) or not isinstance(config, dict):
            raise ValueError("keys are missing")
    except Exception as error:  # JSON, YAML and OmegaConf each raise their own
        raise UserError(
            f"run '{folder}': scores.json or config.yaml is not as wsss.train writes it "
            f"({str(error).splitlines()[0]}). Train or evaluate again."
        ) from error
    return Run(folder, cast(dict[str, Any], config), content)


# --- telling apart -------------------------------------------------------------------------


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together, in the order of their first ones."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.method, run.content.get("step"), _settings(run)], default=str)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Dotted keys of the settings in which runs of one name and method differ.

    Seeds and outputs do not count. Names and methods tell other runs apart, whose settings differ
    in too much to be listed. Settings that some of the runs lack (another version wrote them) are
    named only as far as nothing else tells the runs apart.
    """
    families: dict[tuple[str, str], list[list[Run]]] = {}
    for group in seed_groups(runs):
        families.setdefault((group[0].name, group[0].method), []).append(group)
    differing: set[str] = set()
    for groups in families.values():
        # The runs of a group have the same settings.
        differing |= _telling_apart([_settings(group[0]) for group in groups])
    # What a config takes over from another place (data.view from view) says nothing new.
    kept: dict[tuple[str, ...], str] = {}
    for key in sorted(differing, key=lambda key: (key.count("."), key)):
        kept.setdefault((key.rsplit(".", 1)[-1], *(setting(run, key) for run in runs)), key)
    return sorted(kept.values(), key=lambda key: (key != "variant", key))


def _telling_apart(family: Sequence[dict[str, Any]]) -> set[str]:
    """All keys that every member has and that differ, and of the others as few as it takes."""

    def parts(keys: Iterable[str]) -> int:
        keys = list(keys)
        return len({tuple(_typed(member.get(key, "-")) for key in keys) for member in family})

    keys = {key for member in family for key in member if parts([key]) > 1}
    telling = {key for key in keys if all(key in member for member in family)}
    for key in sorted(keys - telling):
        if parts({*telling, key}) > parts(telling):
            telling.add(key)
    return telling


def naming_settings(runs: Sequence[Run]) -> list[str]:
    """Those of :func:`differing_settings` that names need: a sweep's variant if it will do."""
    keys = differing_settings(runs)

    def parts(chosen: Sequence[str]) -> int:
        return len({(run.name, run.method, *(setting(run, k) for k in chosen)) for run in runs})

    return ["variant"] if "variant" in keys and parts(["variant"]) == parts(keys) else keys


def setting(run: Run, key: str) -> str:
    """A setting as one would type it; a dash where the run has none of that name."""
    return _typed(_settings(run).get(key, "-"))


def setting_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or the key where that part stands for several."""
    keys = list(keys)
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {k: name if last.count(name) == 1 else k for k, name in zip(keys, last, strict=True)}


def sort_runs(runs: Sequence[Run]) -> list[Run]:
    """Runs as given, but those that settings tell apart by these, then by seed."""
    keys = differing_settings(runs)
    if not keys:
        return list(runs)
    families = list(dict.fromkeys((run.name, run.method) for run in runs))

    def place(run: Run) -> tuple[Any, ...]:
        settings = _settings(run)
        values = [_rank(settings[key]) if key in settings else (0, 0, "") for key in keys]
        return families.index((run.name, run.method)), values, _rank(run.content.get("seed"))

    return sorted(runs, key=place)


def run_titles(runs: Sequence[Run], titles: ListConfig | Sequence[str] | None = None) -> list[str]:
    """A name for each run that no other has: with its method, settings, seed or folder if need be.

    Raises:
        UserError: not as many titles as runs, or one twice.
    """
    if titles is not None:
        given = [str(title) for title in titles]
        if len(given) != len(runs):
            raise UserError(f"titles has {len(given)} names, runs stands for {len(runs)} runs.")
        if len(set(given)) < len(given):
            raise UserError(f"titles={given}: give each run a name of its own.")
        return given
    keys = naming_settings(runs)
    result = []
    for run in runs:
        alike = [other for other in runs if other.name == run.name]
        if len(alike) == 1:
            result.append(run.name)
        elif [other.method for other in alike].count(run.method) == 1:
            result.append(f"{run.name} {run.method}")
        else:
            label = " ".join(filter(None, (run.name, settings_text(run, keys))))
            alike = [o for o in alike if all(setting(o, k) == setting(run, k) for k in keys)]
            alike = [other for other in alike if other.method == run.method]
            if len(alike) > 1:
                label += f" seed {run.seed}"
            if [other.seed for other in alike].count(run.seed) > 1:
                label += f" ({run.folder})"
            result.append(label)
    return result


def settings_text(run: Run, keys: Iterable[str]) -> str:
    """``raw=false csc_weight=0.1``: what the run has of some settings."""
    names = setting_names(keys)
    values = {key: setting(run, key) for key in names}
    return " ".join(f"{names[key]}={value}" for key, value in values.items() if value != "-")


def _settings(run: Run) -> dict[str, Any]:
    """Settings by dotted key, sorted, without those that seeds of one experiment differ in."""
    config = {key: value for key, value in run.config.items() if key not in SEED_KEYS}
    leaves = dict(sorted(_leaves(config, ""), key=lambda leaf: leaf[0]))
    for key in list(leaves):
        group, _, last = key.rpartition(".")
        of_trainer = group == "trainer" and last not in (*TRAINER, "sync_batchnorm")
        if key in MACHINE_KEYS or of_trainer:
            del leaves[key]
    for key in FROM_RUNS:
        if isinstance(leaves.get(key), str):
            leaves[key] = _without_seed(leaves[key])
    # One setting that every run has, before those of each add-on that some runs lack.
    addons = config.get("addon") or {}
    leaves["addon"] = "+".join(name for name, chosen in addons.items() if chosen) or "-"
    return leaves


@lru_cache
def _without_seed(path: str) -> str:
    """A path into another run's folder, by that run's experiment in place of its seed.

    So the second stages of several seeds, each on the labels of a first stage of its own, are one
    experiment: ``cosa_shapes#3f2a91c0/cpl``, with a hash of the settings of the first stage and of
    the labels. A path into no run that can be read stays as it is.
    """
    place, labels = Path(path), None
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads((place.parent / RECORD).read_text(encoding="utf-8"))
        of_all, of_these = record["settings"]["all"], record["settings"][place.name]
        checkpoint = Path(record["checkpoint"])
        labels = {**of_all, **of_these, "checkpoint_sha256": None}
        place = checkpoint
    folder = next((f for f in (place, *place.parents) if (f / "config.yaml").is_file()), None)
    if folder is None:
        return path
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        if not {"seed", "data"} <= set(config):  # another program's
            return path
        settings = json.dumps([_settings(Run(folder, config, {})), labels], default=str)
    except Exception:  # not even that; YAML and OmegaConf each raise their own
        return path
    name = config.get("name") or folder.name
    inside = Path(path).name if labels else place.relative_to(folder).as_posix()
    return f"{name}#{hashlib.sha256(settings.encode()).hexdigest()[:8]}/{inside}"


def _leaves(node: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _typed(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"  # YAML's own
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _rank(value: Any) -> tuple[int, float, str]:
    """Sort key over settings of mixed types: null, switches, numbers, then words."""
    if value is None:
        return (1, 0, "")
    if isinstance(value, bool):
        return (2, value, "")
    if isinstance(value, int | float):
        return (3, value, "")
    return (4, 0, _typed(value))
