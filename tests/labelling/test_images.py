"""The folders that belong to a data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsss.labelling.images import _top_folder


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("images/deep/er/a.png", "data/images"),
        ("masks/a.png", "data/masks"),
        ("a.png", "data"),
        ("{elsewhere}/built/masks/a.png", "elsewhere/built/masks"),
    ],
)
def test_the_folder_of_a_file(tmp_path: Path, file: str, folder: str) -> None:
    path = file.format(elsewhere=tmp_path / "elsewhere")
    assert _top_folder(path, tmp_path / "data") == tmp_path / folder


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "masks").symlink_to(tmp_path / "disk")
    assert _top_folder("masks/a.png", tmp_path) == tmp_path / "disk"
