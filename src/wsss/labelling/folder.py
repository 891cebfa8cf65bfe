"""A folder of pseudo-labels and the record of how they were made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from wsss.data.given_masks import RECORD
from wsss.data.images import count
from wsss.errors import UserError
from wsss.files import write_atomically

#: settings that hold for all kinds of files
COMMON = "all"
SUFFIXES = {"cpl": ".png", "spl": ".png", "cam": ".npz"}

Settings = Mapping[str, Mapping[str, Any]]


class LabelFolder:
    """Pseudo-labels on disk.

    ::

        root/cpl/NAME.png          and spl/NAME.png, cam/NAME.npz: a subfolder a kind
        root/pseudo_labels.json    settings, results, and the image labels they were made with

    A kind of files can be added later; files of one kind always have one setting.

    Args:
        root: the folder; :meth:`claim` makes it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = FileLock(root / f".{RECORD}.lock")

    def path(self, kind: str, name: str) -> Path:
        """The file of an image."""
        return self.root / kind / f"{name}{SUFFIXES[kind]}"

    def has(self, kinds: Iterable[str], name: str) -> bool:
        """Whether an image has all of these kinds."""
        return all(self.path(kind, name).is_file() for kind in kinds)

    def claim(
        self,
        settings: Settings,
        labels: Mapping[str, str],
        about: Mapping[str, Any],
        mine: Sequence[str],
        overwrite: bool = False,
    ) -> list[str]:
        """Record what is going to be written and say what is missing.

        Several processes may do so at the same time. Files of images whose labels are others than
        recorded are removed.

        Args:
            settings: by kind, and those of all kinds under ``all``; plain JSON values.
            labels: image labels by image name, of the whole split.
            about: what else is recorded, for readers.
            mine: names of the images that this process is to write.
            overwrite: remove files of other settings, and those of ``mine``.

        Returns:
            Those of ``mine`` that lack a file, in order.

        Raises:
            UserError: there are files of other settings, or files that nothing is recorded of.
        """
        kinds = [kind for kind in settings if kind != COMMON]
        # As it will be read: lists, no tuples.
        asked: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))
        with self._lock:
            record = self._read()
            recorded: dict[str, dict[str, Any]] = record.get("settings", {})
            written: dict[str, str] = record.get("labels", {})
            differences = _differences(recorded, asked)
            unknown = [
                path
                for kind in kinds
                for path in (
                    self.path(kind, n) for n in labels if kind not in recorded or n not in written
                )
                if path.is_file()
            ]
            if not overwrite:
                self._refuse(differences, unknown, record)
            stale = [k for k in recorded if k != COMMON and {COMMON, k} & set(differences)]
            changed = [n for n, text in labels.items() if written.get(n, text) != text]
            self._remove(stale, written)
            self._remove([k for k in recorded if k != COMMON], changed)
            for path in unknown:
                path.unlink(missing_ok=True)
            if overwrite:
                self._remove(kinds, mine)
            todo = [name for name in mine if not self.has(kinds, name)]
            done_with = {*stale, *(kinds if todo else [])}
            self._write(
                dict(about)
                | {
                    "settings": {k: v for k, v in recorded.items() if k not in stale} | asked,
                    "results": {
                        k: v for k, v in record.get("results", {}).items() if k not in done_with
                    },
                    "labels": ({} if COMMON in differences else written) | dict(labels),
                }
            )
        return todo

    def record_results(self, results: Mapping[str, Any]) -> None:
        """Add results by kind to the record."""
        with self._lock:
            record = self._read()
            record["results"] = record.get("results", {}) | dict(results)
            self._write(record)

    def _refuse(
        self, differences: Mapping[str, Sequence[str]], unknown: Sequence[Path], record: Any
    ) -> None:
        remedy = "Choose another folder with output_dir=..., or replace them with overwrite=true."
        if differences:
            found = "\n".join(f"  - {text}" for texts in differences.values() for text in texts)
            raise UserError(
                f"output_dir='{self.root}' holds pseudo-labels of other settings (checkpoint "
                f"{record.get('checkpoint')}, step {record.get('step')}):\n{found}\n{remedy}"
            )
        if unknown:
            raise UserError(
                f"output_dir='{self.root}' holds {count(len(unknown), 'file')} that {RECORD} says "
                f"nothing of, such as {unknown[0]}: they may be yours. {remedy}"
            )

    def _remove(self, kinds: Iterable[str], names: Iterable[str]) -> None:
        names = list(names)
        for kind in kinds:
            for name in names:
                self.path(kind, name).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        """The record; empty where there is none.

        Raises:
            UserError: there is one that cannot be read.
        """
        path = self.root / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): it says how the files beside it were made. "
                "Restore it, or remove the folder and begin again."
            ) from error
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        # Labels last: they are a line an image.
        ordered = {k: record[k] for k in sorted(record, key=lambda key: key == "labels")}
        text = json.dumps(ordered, indent=2, ensure_ascii=False)
        try:
            write_atomically(self.root / RECORD, f"{text}\n".encode())
        except OSError as error:
            raise UserError(
                f"{self.root / RECORD}: cannot be written ({error.strerror}). Make room, and the "
                "same command goes on here."
            ) from error


def _differences(recorded: Settings, settings: Settings) -> dict[str, list[str]]:
    """What differs, as sentences, by kind; kinds that one side alone knows do not."""
    found: dict[str, list[str]] = {}
    for kind in set(recorded) & set(settings):
        was, now = recorded[kind], settings[kind]
        texts = [
            f"{key if kind == COMMON else f'{key} of {kind}'}: {was.get(key)} there, "
            f"{now.get(key)} now"
            for key in dict.fromkeys([*was, *now])
            if was.get(key) != now.get(key)
        ]
        if texts:
            found[kind] = texts
    return found
