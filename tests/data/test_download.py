"""Fetching and unpacking archives, against a server on loopback that misbehaves on request."""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from wsss.data import download
from wsss.data.download import ACDC_SOURCE, ARCHIVES, Archive, fetch, unpack
from wsss.data.images import DatasetError

MARKER = "tree/masks/a.png"
MEMBERS = {
    "tree/images/a.jpg": b"image a",
    "tree/images/b.jpg": b"image b",
    MARKER: b"mask a",
    "tree/xml/a.xml": b"labels a",  # sorts after the marker's folder
}
BLOB = np.random.default_rng(0).bytes(300_000)


def zip_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes], mode: str = "w", link: str = "") -> bytes:
    """A tar of ``members``, after a symbolic link NAME->TARGET if ``link`` gives one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:  # type: ignore[call-overload]
        if link:
            info = tarfile.TarInfo(link.split("->")[0])
            info.type, info.linkname = tarfile.SYMTYPE, link.split("->")[1]
            file.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves ``content`` at /file; knows ranges unless told otherwise."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = BLOB
        self.ranges = True
        self.shift = 0  # bytes by which the first byte of a range answer is off
        self.announce = True
        self.statuses: list[int] = []  # of the next requests; 200 or 206 when empty
        self.cuts: list[int] = []  # bytes sent in the next answers before the connection is cut
        self.reset = False  # cut with a TCP reset instead of an orderly end
        self.requests: list[str | None] = []  # Range headers, None without
        self.sent = 0  # bytes of bodies

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file"

    def archive(self, filename: str = "file.tar", md5: str | None = None) -> Archive:
        if not filename.endswith(".zip"):
            md5 = md5 or hashlib.md5(self.content).hexdigest()
        return Archive(self.url, filename, md5, MARKER)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        server.requests.append(asked)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        whole, start = server.content, 0
        if asked and server.ranges:
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            assert match
            start = int(match[1]) + server.shift
            if start >= len(whole):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(whole)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        else:
            self.send_response(200)
        body = whole[start:]
        if server.announce:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        server.sent += len(body[:cut])  # before: the client may look as soon as it has all
        self.wfile.write(body[:cut])
        if cut and server.reset:  # closing without lingering sends RST
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_WAITS", (0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder`` with its content."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# -------------------------------------------------------------------------------------- fetch


def test_whole_download(server: Server, tmp_path: Path) -> None:
    path = fetch(server.archive(), tmp_path / "new/folder", progress=False)
    assert path == tmp_path / "new/folder/file.tar"
    assert tree(tmp_path) == {"new/folder/file.tar": BLOB}  # and no .part
    assert server.requests == [None]


def test_length_not_announced(server: Server, tmp_path: Path) -> None:
    server.announce = False
    assert fetch(server.archive(), tmp_path, progress=False).read_bytes() == BLOB


def test_progress_only_when_asked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server.archive("quiet.tar"), tmp_path, progress=False)
    assert capsys.readouterr().out == ""
    (tmp_path / "loud.tar.part").write_bytes(BLOB[:1000])  # counts as done
    fetch(server.archive("loud.tar"), tmp_path, progress=True)
    assert re.search(r"loud\.tar .*300\.0/300\.0 kB", capsys.readouterr().out)


def test_part_is_resumed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.part").write_bytes(BLOB[:100_001])
    fetch(server.archive(), tmp_path, progress=False)
    assert tree(tmp_path) == {"file.tar": BLOB}
    assert server.requests == ["bytes=100001-"]
    assert server.sent == len(BLOB) - 100_001


def test_complete_part_is_not_sent_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.part").write_bytes(BLOB)  # killed just before the renaming
    fetch(server.archive(), tmp_path, progress=False)
    assert tree(tmp_path) == {"file.tar": BLOB}
    assert server.requests == [f"bytes={len(BLOB)}-"]  # answered 416
    assert server.sent == 0


def test_too_long_part_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.part").write_bytes(BLOB + b"more")
    fetch(server.archive(), tmp_path, progress=False)
    assert tree(tmp_path) == {"file.tar": BLOB}
    assert server.requests == [f"bytes={len(BLOB) + 4}-", None]


def test_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.tar.part").write_bytes(b"x" * 1000)
    fetch(server.archive(), tmp_path, progress=False)
    assert tree(tmp_path) == {"file.tar": BLOB}
    assert server.requests == ["bytes=1000-"]


def test_server_with_wrong_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.shift = 5
    (tmp_path / "file.tar.part").write_bytes(BLOB[:1000])
    fetch(server.archive(), tmp_path, progress=False)
    assert tree(tmp_path) == {"file.tar": BLOB}
    assert server.requests == ["bytes=1000-", None]


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connections_are_taken_up(server: Server, tmp_path: Path, reset: bool) -> None:
    server.reset = reset
    server.cuts = [50_000] * 5  # more than the fruitless connections allowed
    fetch(server.archive(), tmp_path, progress=False)
    assert tree(tmp_path) == {"file.tar": BLOB}
    assert len(server.requests) == 6
    if not reset:  # a reset may discard bytes that were on their way
        assert server.requests == [None] + [f"bytes={n * 50_000}-" for n in range(1, 6)]


def test_passing_server_error_is_waited_out(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch(server.archive(), tmp_path, progress=False)
    assert server.requests == [None] * 3


def test_giving_up_keeps_the_part(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [70_000] * 9  # always the same bytes: no progress after the first
    target = tmp_path / "file.tar"
    with pytest.raises(DatasetError, match="broke after 70000 of 300000 bytes") as error:
        fetch(server.archive(), tmp_path, progress=False)
    assert server.url in str(error.value)
    assert f"by hand, put it at {target} and run again" in str(error.value)
    assert tree(tmp_path) == {"file.tar.part": BLOB[:70_000]}
    assert len(server.requests) == 3


def test_no_connection(server: Server, tmp_path: Path) -> None:
    archive = server.archive()
    server.server_close()  # the port refuses from here on
    with pytest.raises(DatasetError, match=f"{server.url}.*refused.*by hand, put it at"):
        fetch(archive, tmp_path, progress=False)


def test_404_is_final(server: Server, tmp_path: Path) -> None:
    server.statuses = [404] * 9
    with pytest.raises(DatasetError, match=f"{server.url}.* 404 .*by hand, put it at"):
        fetch(server.archive(), tmp_path, progress=False)
    assert len(server.requests) == 1
    assert tree(tmp_path) == {}


def test_wrong_md5(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"mine")
    expected, found = "0" * 32, hashlib.md5(BLOB).hexdigest()
    with pytest.raises(DatasetError, match=f"{server.url}.*{found}.*{expected}.*run again"):
        fetch(server.archive(md5=expected), tmp_path, progress=False)
    assert tree(tmp_path) == {"mine.txt": b"mine"}


def test_spoilt_part_does_not_stick(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.part").write_bytes(b"x" * 1000)
    with pytest.raises(DatasetError, match="md5"):
        fetch(server.archive(), tmp_path, progress=False)
    assert fetch(server.archive(), tmp_path, progress=False).read_bytes() == BLOB


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage"])
def test_corrupt_zip(server: Server, tmp_path: Path, damage: str) -> None:
    whole = zip_bytes(MEMBERS)
    server.content = {
        "flip": whole.replace(b"image b", b"image c"),
        "cut": whole[:-30],
        "garbage": b"<html>please log in</html>",
    }[damage]
    names = {"flip": "CRC in its member tree/images/b.jpg"}
    with pytest.raises(DatasetError, match=names.get(damage, "no whole zip archive")):
        fetch(server.archive("file.zip"), tmp_path, progress=False)
    assert tree(tmp_path) == {}
    server.content = whole
    assert fetch(server.archive("file.zip"), tmp_path, progress=False).read_bytes() == whole


def test_no_damage_to_a_zip_escapes(tmp_path: Path) -> None:
    whole, rng = zip_bytes(MEMBERS), np.random.default_rng(0)
    path = tmp_path / "file.zip"
    for _ in range(60):  # whatever zipfile raises becomes a text
        path.write_bytes(whole)
        with path.open("r+b") as file:
            file.seek(int(rng.integers(len(whole))))
            file.write(rng.bytes(1))
        problem = download._problem(path, None, None)
        assert problem is None or "zip archive" in problem


def test_length_decides_before_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    path.write_bytes(zip_bytes(MEMBERS))
    size = path.stat().st_size
    assert download._problem(path, None, size) is None
    assert download._problem(path, None, size + 1) == f"{size} bytes, expected {size + 1}"


@pytest.mark.parametrize("name", ["file.tar", "file.zip"])
def test_already_there(server: Server, tmp_path: Path, name: str) -> None:
    server.content = zip_bytes(MEMBERS)
    (tmp_path / name).write_bytes(server.content)
    assert fetch(server.archive(name), tmp_path, progress=False) == tmp_path / name
    assert server.requests == []


@pytest.mark.parametrize("name", ["file.tar", "file.zip"])
def test_wrong_file_there_is_kept(server: Server, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something of the user")
    with pytest.raises(DatasetError, match=f"{name}: .*expected|no whole zip.*move it away"):
        fetch(server.archive(name), tmp_path, progress=False)
    assert tree(tmp_path) == {name: b"something of the user"}
    assert server.requests == []


@pytest.mark.parametrize(("free", "fits"), [(199_999, False), (200_000, True)])
@pytest.mark.parametrize("ranges", [True, False])
def test_disk_space(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    fits: bool,
    ranges: bool,
) -> None:
    server.ranges = ranges  # without them the part is overwritten, which frees its place
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    (tmp_path / "file.tar.part").write_bytes(BLOB[:100_000])
    if fits:
        assert fetch(server.archive(), tmp_path, progress=False).read_bytes() == BLOB
        return
    with pytest.raises(DatasetError, match=r"200\.0 kB free.*needs 200\.0 kB.*another folder"):
        fetch(server.archive(), tmp_path, progress=False)
    assert tree(tmp_path) == {"file.tar.part": BLOB[:100_000]}


def test_folder_is_a_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(DatasetError, match=f"{tmp_path}/data.*another folder"):
        fetch(server.archive(), tmp_path / "data", progress=False)


def test_full_disk_is_no_network_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.Progress, "advance", write)  # called beside the writing
    with pytest.raises(DatasetError, match=r"No space left.*choose another folder"):
        fetch(server.archive(), tmp_path, progress=False)
    assert len(server.requests) == 1  # not repeated


# ------------------------------------------------------------------------------------- unpack


def archive_of(tmp_path: Path, kind: str, members: dict[str, bytes] = MEMBERS) -> Path:
    path = tmp_path / f"archive.{kind}"
    if kind == "zip":
        path.write_bytes(zip_bytes(members))
    else:
        path.write_bytes(tar_bytes(members, {"tar": "w", "tgz": "w:gz"}[kind]))
    return path


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_unpack(tmp_path: Path, kind: str) -> None:
    unpack(archive_of(tmp_path, kind), tmp_path / "out", MARKER)
    assert tree(tmp_path / "out") == MEMBERS
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tree"]  # nothing left over


def test_unpacked_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / MARKER).parent.mkdir(parents=True)
    (tmp_path / MARKER).write_bytes(b"")
    unpack(tmp_path / "absent.tar", tmp_path, MARKER)  # would raise if it were opened
    assert tree(tmp_path) == {MARKER: b""}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_user_files_are_kept(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    mine = {
        "tree/images/a.jpg": b"my image a",  # the archive has another
        "tree/images/b.jpg/mine.txt": b"my folder in the place of an image",
        "tree/masks_aug/a.png": b"my mask",
        "notes.txt": b"mine",
    }
    for name, content in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    unpack(archive_of(tmp_path, kind), out, MARKER)
    assert tree(out) == {k: v for k, v in MEMBERS.items() if k != "tree/images/b.jpg"} | mine


def test_user_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "tree").write_bytes(b"mine")
    with pytest.raises(DatasetError, match=f"{tmp_path}/{MARKER}.*in the place.*move it away"):
        unpack(archive_of(tmp_path, "zip"), tmp_path, MARKER)
    assert (tmp_path / "tree").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", ["../evil.txt", "tree/../../evil.txt"])
def test_path_traversal_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = archive_of(tmp_path, kind, MEMBERS | {name: b"evil"})
    with pytest.raises(DatasetError, match=r"refused, .*evil\.txt.*official archive"):
        unpack(path, tmp_path / "out", MARKER)
    assert tree(tmp_path) == {path.name: path.read_bytes()}


def test_absolute_names_stay_inside(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    inside = str(outside).lstrip("/")
    with pytest.raises(DatasetError, match=r"refused, .*outside\.txt"):
        unpack(archive_of(tmp_path, "zip", {str(outside): b"x"}), tmp_path / "zip", inside)
    unpack(archive_of(tmp_path, "tar", {str(outside): b"x"}), tmp_path / "tar", inside)
    assert not outside.exists()
    assert tree(tmp_path / "tar") == {inside: b"x"}  # tar's own convention


@pytest.mark.parametrize("target", ["..", "/"])
def test_links_to_the_outside_are_refused(tmp_path: Path, target: str) -> None:
    path = tmp_path / "archive.tar"
    path.write_bytes(tar_bytes({"link/evil.txt": b"evil"}, link=f"link->{target}"))
    with pytest.raises(DatasetError, match="refused"):
        unpack(path, tmp_path / "out", "link/evil.txt")
    assert tree(tmp_path) == {"archive.tar": path.read_bytes()}


@pytest.mark.parametrize(("kind", "size"), [("tar", 600), ("tgz", 100), ("zip", 200)])
def test_broken_archive_leaves_nothing(tmp_path: Path, kind: str, size: int) -> None:
    path = archive_of(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DatasetError, match=f"{path.name}: broken archive .*fetch it again"):
        unpack(path, tmp_path / "out", MARKER)
    assert list((tmp_path / "out").iterdir()) == []


def test_archive_without_the_marker(tmp_path: Path) -> None:
    path = archive_of(tmp_path, "zip", {"other/file.txt": b"other"})
    with pytest.raises(DatasetError, match=f"{path.name}: holds no {MARKER}"):
        unpack(path, tmp_path / "out", MARKER)
    assert tree(tmp_path / "out") == {}


def test_archive_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent\.tar: cannot be unpacked"):
        unpack(tmp_path / "absent.tar", tmp_path, MARKER)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_leftovers_of_a_killed_run_go(tmp_path: Path, kind: str) -> None:
    path = archive_of(tmp_path, kind)
    leftover = tmp_path / f"out/.{path.name}.unpacking/tree/images/half.jpg"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"hal")
    unpack(path, tmp_path / "out", MARKER)
    assert tree(tmp_path / "out") == MEMBERS


@pytest.mark.parametrize("before", range(4))
def test_interrupted_anywhere_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """Stopped before the n-th renaming, the marker is absent and a second call completes."""
    path, out = archive_of(tmp_path, "tar"), tmp_path / "out"
    for name in ("images", "masks"):  # to be filled up: images/a, images/b, xml, masks/a
        (out / "tree" / name).mkdir(parents=True)
    rename, calls = Path.rename, iter(range(9))

    def interrupted(self: Path, target: Path) -> Path:
        if next(calls) == before:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack(path, out, MARKER)
    moved = tree(out)
    assert len(moved) == before
    assert MARKER not in moved
    assert [entry.name for entry in out.iterdir()] == ["tree"]
    unpack(path, out, MARKER)
    assert tree(out) == MEMBERS


# ------------------------------------------------------------------------------------- tables


def test_tables() -> None:
    archives = [archive for group in ARCHIVES.values() for archive in group]
    assert len({archive.url for archive in archives}) == len(archives) == 8
    for archive in archives:
        assert os.path.basename(archive.url) == archive.filename  # noqa: PTH119
        assert not PurePosixPath(archive.extracts_to).is_absolute()
        # without a checksum only the CRCs of a zip can be checked
        assert archive.filename.endswith(".zip") if archive.md5 is None else len(archive.md5) == 32
    assert ARCHIVES["voc2012"][0].extracts_to.startswith("VOCdevkit/VOC2012/")
    assert "creatis.insa-lyon.fr" in ACDC_SOURCE
