"""Names of results, their content, and recognising them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.data.images import voc_palette
from wsss.errors import UserError
from wsss.prediction import outputs
from wsss.prediction.inputs import Found, Photo
from wsss.prediction.native import LabelMap
from wsss.prediction.outputs import Job, Outputs, kept_classes, name_jobs, write_results

OUT = Path("out")


def names(*files: str) -> list[str]:
    """Mask of each file of ``in``, below the output folder."""
    found = Found(Path("in"), tuple(Path("in") / f for f in files))
    jobs = name_jobs(found, OUT)
    assert [job.image for job in jobs] == list(found.files)
    return [str(job.outputs.mask.relative_to(OUT)) for job in jobs]


def test_names_keep_the_folders() -> None:
    assert names("a.jpg", "sub/a.jpg", "sub/deep/b.c.png") == [
        "a.png",
        "sub/a.png",
        "sub/deep/b.c.png",
    ]
    job = name_jobs(Found(Path("in"), (Path("in/sub/a.jpg"),)), OUT)[0]
    assert job.outputs == Outputs(
        OUT / "sub/a.png", OUT / "sub/a_overlay.jpg", OUT / "sub/a.json", OUT / "sub/.a.part"
    )


@pytest.mark.parametrize(
    ("files", "masks"),
    [
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg.png", "a.png.png", "b.png"]),
        (["a.jpg", "a.JPG"], ["a.jpg.png", "a.JPG.png"]),
        (["a.jpg", "a.png", "a.jpg.tif"], ["a.jpg.png", "a.png.png", "a.jpg.tif.png"]),
        (["a.jpg", "sub/a.png"], ["a.png", "sub/a.png"]),
        ([".a.jpg", "a"], [".a.png", "a.png"]),
        (["a.b.jpg", "a.b"], ["a.b.png", "a.png"]),
        (["a.b.jpg", "a.b", "a.x"], ["a.b.jpg.png", "a.b.png", "a.x.png"]),
    ],
)
def test_no_image_replaces_anothers_results(files: list[str], masks: list[str]) -> None:
    assert names(*files) == masks


def test_results_of_an_image_called_overlay() -> None:
    found = Found(Path("in"), (Path("in/a.jpg"), Path("in/a_overlay.jpg"), Path("in/a_overlay.x")))
    files = [
        path
        for job in name_jobs(found, OUT)
        for path in (job.outputs.mask, job.outputs.overlay, job.outputs.about)
    ]
    assert len(set(files)) == 9


@pytest.mark.parametrize("name", ["a.png", "b_overlay.jpg", "c.json"])
def test_results_do_not_replace_images(name: str, tmp_path: Path) -> None:
    other = {"a.png": "a.png", "b_overlay.jpg": "b.jpg", "c.json": "c.json"}[name]
    files = tuple(tmp_path / n for n in dict.fromkeys([name, other]))
    with pytest.raises(UserError, match=f"{name}' would replace an image"):
        name_jobs(Found(tmp_path, files), tmp_path / "sub/..")


def test_what_is_there(tmp_path: Path) -> None:
    result = Outputs.named(tmp_path / "a")
    assert result.found() == []
    result.about.touch()
    assert result.found() == [result.about]
    result.mask.symlink_to("gone")  # a link that leads nowhere is somebody's too
    result.overlay.mkdir()
    assert result.found() == list(result.files)


# --- content -----------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {"settings": {"size": 8, "scales": [1.0]}, "wsss": "1"}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    return Job(Path("in/../a.jpg"), Outputs.named(Path("out/sub/a")))


def write(job: Job) -> list[dict[str, Any]]:
    mask = np.zeros((10, 20), np.uint8)
    mask[:5, :4] = 3
    mask[9, 19] = 1
    area = np.array([179, 1, 0, 20])
    labels = LabelMap(mask, area, np.array([0.91234567, 0.5, 0.0, 0.75]))
    photo = Photo(10, 20, np.zeros((8, 8, 3), np.uint8), np.zeros((10, 20, 3), np.uint8), None)
    return write_results(job, photo, labels, ("background", "cat", "dog", "hen"), ABOUT)


def test_the_three_files(job: Job, tmp_path: Path) -> None:
    classes = write(job)
    with Image.open(job.outputs.mask) as image:
        assert image.mode == "P"
        mask = np.asarray(image)
        assert image.getpalette() == voc_palette().ravel().tolist()
    assert mask.shape == (10, 20)
    assert (mask[:5, :4] == 3).all()
    assert mask[9, 19] == 1
    assert (mask != 0).sum() == 21
    content = json.loads(job.outputs.about.read_text())
    assert classes == content.pop("classes")
    assert classes == [
        {"name": "background", "index": 0, "area": 179, "share": 0.895, "confidence": 0.9123},
        {"name": "cat", "index": 1, "area": 1, "share": 0.005, "confidence": 0.5},
        {"name": "hen", "index": 3, "area": 20, "share": 0.1, "confidence": 0.75},
    ]
    assert content == {"file": str(tmp_path / "a.jpg"), "width": 20, "height": 10, **ABOUT}
    with Image.open(job.outputs.overlay) as image:
        assert image.format == "JPEG"
        assert image.width >= 20
    assert sorted(p.name for p in job.outputs.mask.parent.iterdir()) == [
        "a.json",
        "a.png",
        "a_overlay.jpg",
    ]


def test_the_legend_lists_the_largest_first(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(image: Any, mask: Any, entries: Any, num_classes: int) -> Any:
        seen.extend([[tuple(e) for e in entries], num_classes])
        return image

    monkeypatch.setattr(outputs, "draw_prediction", spy)
    write(job)
    assert seen == [[("hen", 3, 0.1), ("cat", 1, 0.005)], 4]


def test_results_are_known_again(job: Job) -> None:
    classes = write(job)
    assert kept_classes(job, ABOUT["settings"]) == classes
    assert kept_classes(job, ABOUT["settings"] | {"size": 9}) is None
    assert kept_classes(Job(Path("b.jpg"), job.outputs), ABOUT["settings"]) is None
    assert kept_classes(Job(Path("a.jpg"), job.outputs), ABOUT["settings"]) == classes
    for damaged in ("", "[]", "{}", '{"settings": {}}', "\xff", "null"):
        job.outputs.about.write_text(damaged, encoding="latin-1")
        assert kept_classes(job, ABOUT["settings"]) is None


def test_the_json_comes_last_and_the_mark_stays_till_then(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def spy(path: Path, _: bytes) -> None:
        assert job.outputs.mark.is_file()
        order.append(path)
        if len(order) == 6:
            raise OSError

    monkeypatch.setattr(outputs, "write_atomically", spy)
    write(job)
    assert len(order) == 3
    assert order[-1] == job.outputs.about
    assert not job.outputs.mark.exists()
    with pytest.raises(OSError):  # noqa: PT011
        write(job)
    assert job.outputs.mark.is_file()
