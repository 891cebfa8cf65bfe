"""Environment, metrics and scores by image, as they lie in a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsss.errors import UserError
from wsss.report.records import (
    metrics_files,
    read_environment,
    read_image_scores,
    read_metrics,
    worst_and_best,
)

ORDER = ["an/seg/miou_ms_flip", "an/seg/miou_ss", "on/seg/miou_ms_flip"]


def test_environment(tmp_path: Path) -> None:
    assert read_environment(tmp_path) == {}
    (tmp_path / "environment.json").write_text('{"torch": "9.9"}')
    assert read_environment(tmp_path) == {"torch": "9.9"}
    (tmp_path / "environment.json").write_text("[1]")
    assert read_environment(tmp_path) == {}
    (tmp_path / "environment.json").write_text('{"torch": ')
    with pytest.raises(UserError, match=r"environment.json' is not JSON.*Delete"):
        read_environment(tmp_path)


# --- metrics -------------------------------------------------------------------------------


def test_columns_by_step_without_epoch_and_empty_cells(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "an/seg/miou_ss,epoch,loss/total,step\n,0,1.5,19\n,0,2.5,9\n0.25,1,,20\n"
    )
    assert read_metrics(tmp_path) == {
        "loss/total": [(9, 2.5), (19, 1.5)],
        "an/seg/miou_ss": [(20, 0.25)],
    }


def test_parts_of_a_resumed_run_are_joined_and_later_ones_win(tmp_path: Path) -> None:
    # Killed after step 39, resumed from a checkpoint of step 20, killed after 49, resumed from 40.
    (tmp_path / "metrics.1.csv").write_text("a,step\n1,9\n1,19\n1,29\n1,39\n")
    (tmp_path / "metrics.2.csv").write_text("a,b,step\n2,2,29\n2,,34\n,2,39\n2,2,49\n")
    (tmp_path / "metrics.csv").write_text("step,a\n49,3\n59,3\n")
    (tmp_path / "metrics.old.csv").write_text("a,step\n7,9\n")
    assert [p.name for p in metrics_files(tmp_path)] == [
        "metrics.1.csv",
        "metrics.2.csv",
        "metrics.csv",
    ]
    assert read_metrics(tmp_path) == {
        # At 39 the second part has b alone; that a was 1 there is of the part that it replaced.
        "a": [(9, 1.0), (19, 1.0), (29, 2.0), (34, 2.0), (49, 3.0), (59, 3.0)],
        "b": [(29, 2.0), (39, 2.0)],
    }


def test_parts_are_ordered_by_their_number(tmp_path: Path) -> None:
    for number in range(1, 12):
        (tmp_path / f"metrics.{number}.csv").write_text(f"a,step\n{number},9\n")
    assert read_metrics(tmp_path) == {"a": [(9, 11.0)]}


def test_run_started_anew_in_the_same_folder_drops_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.1.csv").write_text("a,old,step\n1,1,9\n1,1,19\n1,1,29\n")
    (tmp_path / "metrics.csv").write_text("a,step\n2,4\n2,9\n")
    assert read_metrics(tmp_path) == {"a": [(4, 2.0), (9, 2.0)]}


def test_not_finite_cut_off_and_missing(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {}
    path = tmp_path / "metrics.csv"
    path.write_text("a,b,step\nnan,1,9\ninf,2,19\n5,")
    assert read_metrics(tmp_path) == {"b": [(9, 1.0), (19, 2.0)]}
    path.write_text("")
    assert read_metrics(tmp_path) == {}


def test_metrics_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("a,step\n1,2\nx,3\n")
    with pytest.raises(UserError, match=r"metrics.csv', line 3.*'x'.*delete"):
        read_metrics(tmp_path)
    path.write_text("a,step\n1,\n")
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column step"):
        read_metrics(tmp_path)


# --- images --------------------------------------------------------------------------------


def test_first_protocol_that_has_scores(tmp_path: Path) -> None:
    assert read_image_scores(tmp_path, ORDER) is None
    path = tmp_path / "images.csv"
    path.write_text(
        "name,zz/new,on/seg/miou_ms_flip,an/seg/miou_ss,an/seg/miou_ms_flip\n"
        "one,1,2,3.5,\ntwo,5,6,,\n"
    )
    assert read_image_scores(tmp_path, ORDER) == ("an/seg/miou_ss", {"one": 3.5})
    assert read_image_scores(tmp_path, []) == ("zz/new", {"one": 1.0, "two": 5.0})
    path.write_text("name,on/seg/miou_ms_flip\none,\n")
    assert read_image_scores(tmp_path, ORDER) is None
    path.write_text("name\n")
    assert read_image_scores(tmp_path, ORDER) is None


@pytest.mark.parametrize("text", ["name,a\none,x\n", "image,a\none,1\n"])
def test_images_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(UserError, match=r"images.csv' is not as wsss\.train writes it.*Delete"):
        read_image_scores(tmp_path, [])


def test_worst_and_best() -> None:
    scores = {"a": 50.0, "d": 10.0, "c": 90.0, "b": 10.0, "e": 70.0}
    assert worst_and_best(scores, 4) == (["b", "d"], ["c", "e"])
    assert worst_and_best(scores, 3) == (["b", "d"], ["c"])
    assert worst_and_best(scores, 1) == (["b"], [])
    # No image twice, however few there are.
    assert worst_and_best(scores, 9) == (["b", "d", "a"], ["c", "e"])
    assert worst_and_best({}, 4) == ([], [])
