"""Official archives: fetched, verified and unpacked so that a broken run can be repeated.

torchvision's ``download_url`` starts again from the first byte after every break, which hurts at
13 GB, and its ``extract_archive`` passes no filter to ``tarfile``, which before Python 3.14 lets
a member leave the folder. Hence :func:`fetch` and :func:`unpack`; the addresses, checksums and
the remaining helpers are torchvision's. Both are for one process: a data module calls them in
``prepare_data``.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import calculate_md5, check_integrity, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT

from wsss.data.images import DatasetError


@dataclass(frozen=True)
class Archive:
    """One file on an official server.

    Attributes:
        url: where it is.
        filename: its name on disk; ``.tar``, ``.tgz`` or ``.zip``, what :func:`unpack` reads.
        md5: published checksum; None for a zip without one, whose own CRCs are checked instead.
        extracts_to: a file it holds, relative to the folder it is unpacked into, whose presence
            there proves that it is unpacked; the ``marker`` of :func:`unpack`.
    """

    url: str
    filename: str
    md5: str | None
    extracts_to: str


_VOC_2012 = DATASET_YEAR_DICT["2012"]


def _coco(path: str, extracts_to: str) -> Archive:
    # Plain http: the server's certificate is made out to s3.amazonaws.com, not to this name.
    url = f"http://images.cocodataset.org/{path}"
    return Archive(url, path.rsplit("/", 1)[-1], None, extracts_to)


ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "voc2012": (
        Archive(
            _VOC_2012["url"],
            _VOC_2012["filename"],
            _VOC_2012["md5"],
            f"{_VOC_2012['base_dir']}/SegmentationClass/2007_000032.png",
        ),
    ),
    "sbd": (
        Archive(
            SBDataset.url,
            SBDataset.filename,
            SBDataset.md5,
            "benchmark_RELEASE/dataset/val.txt",
        ),
    ),
    "coco2014": (
        _coco("zips/train2014.zip", "train2014/COCO_train2014_000000000009.jpg"),
        _coco("zips/val2014.zip", "val2014/COCO_val2014_000000000042.jpg"),
        _coco("annotations/annotations_trainval2014.zip", "annotations/instances_val2014.json"),
    ),
    "coco2017": (
        _coco("zips/train2017.zip", "train2017/000000000009.jpg"),
        _coco("zips/val2017.zip", "val2017/000000000139.jpg"),
        _coco("annotations/annotations_trainval2017.zip", "annotations/instances_val2017.json"),
    ),
}
"""Official archives of each data set that can be fetched without registration."""

ACDC_SOURCE = (
    "ACDC cannot be fetched automatically, its authors ask for registration. Register at "
    "https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html, download the archive from "
    "https://humanheart-project.creatis.insa-lyon.fr/database/#folder/637218e573e9f0047faa00fc "
    "and unpack it: the result holds the folders training/patient001 ... testing/patient150"
)
"""Where the ACDC challenge's images come from, for error messages and help texts."""

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30.0  # seconds without a byte
_WAITS = (1.0, 4.0, 10.0)  # seconds before each repetition that follows a fruitless connection


# ---------------------------------------------------------------------------------- download


class _Broken(Exception):
    """A connection that failed in a way that a repetition may mend."""


def fetch(archive: Archive, folder: str | os.PathLike[str], progress: bool = True) -> Path:
    """Download ``archive`` into ``folder`` unless it is there, and verify it either way.

    The bytes go to ``FILENAME.part``, which a later call continues; only a verified file gets its
    name. A connection that breaks is taken up again, and given up after a few in a row that
    brought nothing. Files that were there before are never removed or changed.

    Args:
        archive: what to fetch.
        folder: where to; made if absent.
        progress: show a bar with bytes, speed and remaining time.

    Returns:
        The path of the complete file, ``folder/FILENAME``.

    Raises:
        DatasetError: no connection, an HTTP error, not enough disk space, a folder that cannot be
            written, a file (new or found) with the wrong checksum, length or CRC.
    """
    target = Path(folder).expanduser() / archive.filename
    part = target.with_name(f"{target.name}.part")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    speed = (TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *speed, disable=not progress) as bar:
        task = bar.add_task(archive.filename, total=None)
        try:
            if target.exists():
                bar.update(task, description=f"{archive.filename} (verifying)")
                if problem := _problem(target, archive.md5, None):
                    raise DatasetError(
                        f"{target}: {problem}, so it is not {archive.url}; "
                        "move it away and run again"
                    )
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            length = _download(archive.url, part, target, bar, task)
            bar.update(task, description=f"{archive.filename} (verifying)")
            if problem := _problem(part, archive.md5, length):
                part.unlink()
                raise DatasetError(
                    f"{archive.url}: what came has {problem}; it is deleted, run again. If that "
                    f"does not help, {_by_hand(archive.url, target)}"
                )
            part.replace(target)
            bar.update(task, description=archive.filename)
        except OSError as error:  # of the disk: _download turns the network's into DatasetError
            raise DatasetError(
                f"{target}: cannot be written or read ({error}); mend that or choose another folder"
            ) from error
    return target


def _by_hand(url: str, target: Path) -> str:
    return f"fetch {url} by hand, put it at {target} and run again"


def _problem(path: Path, md5: str | None, length: int | None) -> str | None:
    """What is wrong with a complete file ("md5 x, expected y"), None if nothing."""
    found = path.stat().st_size
    if length is not None and found != length:
        return f"{found} bytes, expected {length}"
    if md5 is not None:
        if check_integrity(path, md5):
            return None
        return f"md5 {calculate_md5(path)}, expected {md5}"
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception as error:  # zipfile lets many kinds escape when it reads garbage
        return f"{found} bytes that are no whole zip archive ({error})"
    return f"a wrong CRC in its member {broken}, expected a whole zip archive" if broken else None


def _download(url: str, part: Path, target: Path, bar: Progress, task: TaskID) -> int | None:
    """Fill ``part`` over as many connections as needed; the announced length or None."""
    most = part.stat().st_size if part.exists() else 0
    failures = 0
    while True:
        try:
            return _transfer(url, part, bar, task)
        except HTTPError as error:
            raise DatasetError(
                f"{url}: the server answers {error.code} {error.reason}; the address may have "
                f"moved: {_by_hand(url, target)}"
            ) from error
        except _Broken as error:
            # Only growth beyond the longest part so far counts as progress: a server that knows
            # no ranges and always breaks at the same place must not be asked for ever.
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures > len(_WAITS):
                raise DatasetError(
                    f"{url}: cannot be fetched ({error}); {decimal(size)} are kept, so run again "
                    f"when the network is back, or {_by_hand(url, target)}"
                ) from error
            time.sleep(_WAITS[failures - 1])


def _transfer(url: str, part: Path, bar: Progress, task: TaskID) -> int | None:
    """Append to ``part`` what it lacks, over one connection.

    Returns:
        The length of the whole file in bytes as the server announces it, None if it does not.

    Raises:
        _Broken: the connection failed; ``part`` holds what came.
        HTTPError: an answer that a repetition will not change.
        DatasetError: the disk has no room for the rest; ``part`` is as it was.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "wsss"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing left: the part is complete, or too long
            _, length = _content_range(error.headers)
            if have == length:
                return length
            part.unlink()
            return _transfer(url, part, bar, task)
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"the server answers {error.code} {error.reason}") from error
        raise
    except (HTTPException, OSError) as error:  # URLError is an OSError
        raise _Broken(error) from error

    with response:
        if response.status == 206:
            start, length = _content_range(response.headers)
            if start != have:
                part.unlink(missing_ok=True)  # the next connection asks for the whole file
                raise _Broken(f"asked for bytes from {have}, the server sends from {start}")
        else:  # 200: the whole file, whatever was asked
            start, announced = 0, response.headers["Content-Length"]
            length = int(announced) if announced else None
        # In both cases the file will take length - have bytes more than it does now.
        free = shutil.disk_usage(part.parent).free
        if length is not None and length - have > free:
            raise DatasetError(
                f"{part.parent}: {decimal(free)} free, {url} needs {decimal(length - have)} "
                "(and about as much again to unpack); free space or choose another folder"
            )
        bar.reset(task, total=length, completed=start)
        with part.open("ab" if start else "wb") as file:
            for chunk in _chunks(response):
                file.write(chunk)
                bar.advance(task, len(chunk))
    size = part.stat().st_size
    if length is not None and size < length:
        raise _Broken(f"the connection broke after {size} of {length} bytes")
    return length


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    # A generator, so that errors of the network are told from those of the disk.
    try:
        while chunk := response.read1(_CHUNK):
            yield chunk
    except (HTTPException, OSError) as error:
        raise _Broken(error) from error


def _content_range(headers: Message) -> tuple[int, int | None]:
    """First byte and length of the whole file of ``Content-Range``; (0, None) if not told."""
    match = re.fullmatch(r"bytes (?:\*|(\d+)-\d+)/(?:\*|(\d+))", headers["Content-Range"] or "")
    start, length = match.groups() if match else (None, None)
    return int(start or 0), int(length) if length else None


# -------------------------------------------------------------------------------- extraction


def unpack(
    archive_path: str | os.PathLike[str], folder: str | os.PathLike[str], marker: str
) -> None:
    """Unpack a tar or zip archive into ``folder``; do nothing where ``marker`` is there already.

    Members go to a hidden folder inside ``folder`` first and are moved to their places when all
    of them are whole, ``marker`` last. Folders that exist are filled up; files that exist are
    kept as they are, even where the archive holds others.

    Args:
        archive_path: the archive as :func:`fetch` verified it (a tar that is cut between two
            members looks whole to ``tarfile``); its suffix says which kind it is.
        folder: where its top entries go; made if absent.
        marker: path of a member relative to ``folder``, see :attr:`Archive.extracts_to`.

    Raises:
        DatasetError: a broken archive, a member that would leave ``folder``, no ``marker`` in
            the archive, a file in the way of a folder, a full or read-only disk.
    """
    source, folder = Path(archive_path), Path(folder).expanduser()
    if (folder / marker).exists():
        return
    # Inside the folder, which may be a mount point, so that moving is renaming. The name is fixed:
    # what a killed run left is found and removed.
    partial = folder / f".{source.name}.unpacking"
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            _extract(source, partial)
            if not (partial / marker).exists():
                raise DatasetError(
                    f"{source}: holds no {marker}, so it is not the official archive; replace it"
                )
            _merge(partial, folder, PurePosixPath(marker).parts)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except tarfile.FilterError as error:
        raise DatasetError(
            f"{source}: refused, a member is unsafe ({error}); fetch the official archive again"
        ) from error
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DatasetError(f"{source}: broken archive ({error}); fetch it again") from error
    except OSError as error:
        raise DatasetError(
            f"{source}: cannot be unpacked into {folder} ({error}); mend that and run again"
        ) from error
    if not (folder / marker).exists():
        raise DatasetError(
            f"{folder / marker}: a file of yours is in the place of one of its folders; "
            "move it away and run again"
        )


def _extract(source: Path, folder: Path) -> None:
    if source.suffix != ".zip":
        with tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")
        return
    with zipfile.ZipFile(source) as file:
        for name in file.namelist():  # zipfile would drop the dots and put it somewhere inside
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise DatasetError(
                    f"{source}: refused, its member {name!r} is outside of the folder; "
                    "fetch the official archive again"
                )
    extract_archive(source, folder)


def _merge(source: Path, target: Path, last: tuple[str, ...]) -> None:
    """Move what ``target`` lacks from ``source`` to it, the path with the parts ``last`` last."""
    entries = sorted(source.iterdir(), key=lambda entry: (entry.name in last[:1], entry.name))
    for entry in entries:
        place = target / entry.name
        if not os.path.lexists(place):
            entry.rename(place)
        elif entry.is_dir() and place.is_dir():
            _merge(entry, place, last[1:] if entry.name in last[:1] else ())


def fetch_and_unpack(
    name: str, folder: str | os.PathLike[str], elsewhere: Sequence[str] = ()
) -> None:
    """Fetch and unpack those archives of ``ARCHIVES[name]`` that are not unpacked in ``folder``.

    The archives stay in ``folder/downloads``; they can be removed afterwards.

    Args:
        name: key of ``ARCHIVES``.
        folder: where to unpack; made if absent.
        elsewhere: folders inside ``folder`` where an archive may have been unpacked instead.

    Raises:
        DatasetError: see :func:`fetch` and :func:`unpack`.
    """
    folder = Path(folder).expanduser()
    for archive in ARCHIVES[name]:
        places = [folder, *(folder / place for place in elsewhere)]
        if not any((place / archive.extracts_to).exists() for place in places):
            unpack(fetch(archive, folder / "downloads"), folder, archive.extracts_to)
