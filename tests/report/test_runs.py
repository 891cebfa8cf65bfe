"""Runs of a report: found, read, grouped by seed, told apart by their settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import run, write
from wsss.errors import UserError
from wsss.report.runs import (
    differing_settings,
    find_runs,
    naming_settings,
    read_run,
    read_runs,
    run_titles,
    seed_groups,
    setting,
    settings_text,
    sort_runs,
)


def write_run(folder: Path, finished: bool = True, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: {seed}\n")
    if finished:
        content = {"name": "made", "method": "cam", "seed": seed, "classes": [], "scores": {}}
        (folder / "scores.json").write_text(json.dumps(content))
    return folder


# --- finding and reading -------------------------------------------------------------------


def test_globs_find_run_folders_once_and_pass_over_others(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_run(tmp_path / name)
    (tmp_path / "d").mkdir()
    (tmp_path / "e.txt").touch()
    found = find_runs([str(tmp_path / "b"), str(tmp_path / "*")])
    assert [p.name for p in found] == ["b", "a", "c"]
    assert find_runs(str(tmp_path / "a")) == [tmp_path / "a"]


def test_jobs_of_a_sweep_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for job in (10, 9, 1, 0, 2):
        write_run(tmp_path / str(job))
    assert [p.name for p in find_runs(str(tmp_path / "*"))] == ["0", "1", "2", "9", "10"]


def test_folder_named_like_a_pattern_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "lr=[1]").mkdir()
    assert find_runs([str(tmp_path / "lr=[1]")]) == [tmp_path / "lr=[1]"]


@pytest.mark.parametrize(("names", "message"), [([], "runs is empty"), (["gone*"], "'gone\\*'")])
def test_no_run_found(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_runs(names)


def test_unfinished_run_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.yaml.*output_dir"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=rf"'{tmp_path}' has no scores.json.*ckpt=last"):
        read_run(tmp_path)
    (tmp_path / "scores.json").write_text('{"scores": ')
    with pytest.raises(UserError, match=r"not as wsss\.train writes it"):
        read_run(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="keys are missing"):
        read_run(tmp_path)


def test_unfinished_runs_of_a_glob_are_set_aside_but_not_named_ones(tmp_path: Path) -> None:
    done, going = write_run(tmp_path / "0"), write_run(tmp_path / "1", finished=False)
    pattern = str(tmp_path / "*")
    runs, unfinished = read_runs(pattern)
    assert [r.folder for r in runs] == [done]
    assert unfinished == [going]
    for names in ([pattern, str(going)], [str(going), pattern]):
        with pytest.raises(UserError, match=rf"'{going}' has no scores.json"):
            read_runs(names)
    (done / "scores.json").unlink()
    with pytest.raises(UserError, match=rf"'{done}' has no scores.json"):
        read_runs(pattern)
    (done / "scores.json").write_text("{")
    with pytest.raises(UserError, match="not as wsss"):  # broken is not unfinished
        read_runs(pattern)


def test_runs_are_read_in_the_order_of_their_settings(tmp_path: Path) -> None:
    for name, value in (("a", 2), ("b", 10), ("c", 1)):
        write_run(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(f"method: {{k: {value}}}\n")
    runs, unfinished = read_runs(str(tmp_path / "*"))
    assert [r.folder.name for r in runs] == ["c", "a", "b"]
    assert unfinished == []


# --- seeds and settings --------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_one_group() -> None:
    other_rate = run("cosa", seed=2, method_options={"lr": 1.0})
    shorter = run("cosa", seed=3, step=4)
    elsewhere = run("cosa", seed=4, output_dir="out", logger={"wandb": {"project": "a"}}, more={})
    groups = seed_groups(
        [run("cosa"), run("cam"), run("cosa", seed=1), other_rate, shorter, elsewhere]
    )
    assert [[r.seed for r in group] for group in groups] == [["0", "1", "4"], ["0"], ["2"], ["3"]]


def test_what_a_machine_decides_makes_no_other_experiment() -> None:
    def on(seed: int, workers: int, **trainer: object) -> Any:
        return run("cosa", seed, data={"num_workers": workers, "root": "a"}, trainer=trainer)

    runs = [on(0, 2, devices=1, max_steps=5), on(1, 8, devices=4, max_steps=5, progress=False)]
    assert len(seed_groups(runs)) == 1
    assert len(seed_groups([*runs, on(2, 2, devices=1, max_steps=9)])) == 2


def second_stage(seed: int, masks: Path | str, weights: Path | str | None = None) -> Any:
    backbone = {"weights": None if weights is None else str(weights)}
    return run("supervised", seed, data={"masks": str(masks)}, backbone=backbone)


def test_second_stages_on_the_labels_of_several_seeds_are_one_group(tmp_path: Path) -> None:
    for name, seed, rate in (("a", 0, 1.0), ("b", 1, 1.0), ("c", 1, 2.0)):
        first = run("cosa", seed, name="cosa_voc", method={"lr": rate}, output_dir=name)
        write(first, tmp_path / name)
        for refine in ("none", "crf"):
            (tmp_path / f"{name}_{refine}").mkdir()
            settings = {"all": {"checkpoint_sha256": name}, "cpl": {"refine": refine}}
            last = tmp_path / name / "checkpoints" / "last.ckpt"
            (tmp_path / f"{name}_{refine}" / "pseudo_labels.json").write_text(
                json.dumps({"checkpoint": str(last), "settings": settings})
            )

    def groups(places: list[str], weights: str | None = None) -> list[list[str]]:
        made = [
            second_stage(i, tmp_path / place, weights and tmp_path / place[0] / weights)
            for i, place in enumerate(places)
        ]
        return [[r.seed for r in group] for group in seed_groups(made)]

    inside = [f"{name}/labels/train/cpl" for name in "abc"]
    assert groups(inside) == [["0", "1"], ["2"]]
    assert groups(inside, weights=".") == [["0", "1"], ["2"]]
    assert groups(["a/labels/train/cpl", "b/labels/train/spl"]) == [["0"], ["1"]]
    # Exported labels say whose and which they are, wherever they lie.
    assert groups([f"{name}_none/cpl" for name in "abc"]) == [["0", "1"], ["2"]]
    assert groups(["a_none/cpl", "b_crf/cpl"]) == [["0"], ["1"]]
    assert groups(["elsewhere/a/cpl", "elsewhere/b/cpl"]) == [["0"], ["1"]]
    apart = [second_stage(0, tmp_path / "a_none/cpl"), second_stage(2, tmp_path / "c_none/cpl")]
    assert differing_settings(apart) == ["data.masks"]
    assert re.fullmatch("cosa_voc#[0-9a-f]{8}/cpl", setting(apart[0], "data.masks"))
    assert re.fullmatch(
        "cosa_voc#[0-9a-f]{8}/labels/train/cpl",
        setting(second_stage(0, tmp_path / inside[0]), "data.masks"),
    )


def test_labels_in_a_folder_beside_another_programs_config_keep_their_path(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[no mapping")
    made = second_stage(0, tmp_path / "cpl")
    assert setting(made, "data.masks") == str(tmp_path / "cpl")
    for i, text in enumerate(("- a list\n", "model: vit\n", "3\n", "")):
        (tmp_path / "config.yaml").write_text(text)
        made = second_stage(0, tmp_path / f"spl{i}")
        assert setting(made, "data.masks") == str(tmp_path / f"spl{i}")


def sweep() -> list[Any]:
    """csc_weight x raw x seed, not in order; early blocks differ with the weight."""
    return [
        run("cosa", seed, method={"raw": raw, "csc_weight": weight, "lr": 0.1}, pictures=seed)
        for seed in (1, 0)
        for weight in (0.1, None, 10, 2)
        for raw in (True, False)
    ]


def test_settings_that_differ_are_named_without_seeds_and_outputs() -> None:
    assert differing_settings(sweep()) == ["method.csc_weight", "method.raw"]
    assert differing_settings([run("cosa"), run("cosa", 1)]) == []
    assert differing_settings([]) == []


def test_addons_tell_runs_apart_by_name() -> None:
    isl, fsl = {"_target_": "a.Isl", "weight": 0.2}, {"_target_": "a.Fsl", "mu": 2.5}
    without, none = run("cosa"), run("cosa", addon={})  # a version without add-ons; addon=none
    one = run("cosa", addon={"isl": isl, "fsl": None})
    both = run("cosa", addon={"isl": isl, "fsl": fsl})
    runs = [without, none, one, both]
    assert differing_settings(runs) == ["addon"]
    assert [setting(r, "addon") for r in runs] == ["-", "-", "isl", "isl+fsl"]
    assert len(seed_groups(runs)) == 3
    stronger = run("cosa", addon={"isl": {**isl, "weight": 0.4}, "fsl": fsl})
    assert differing_settings([both, stronger]) == ["addon.isl.weight"]
    assert set(differing_settings([none, both, stronger])) == {"addon", "addon.isl.weight"}


def test_runs_of_other_names_or_methods_are_not_compared_setting_by_setting() -> None:
    cosa, cam = run("cosa", method={"lr": 1, "raw": True}), run("cam", method={"lr": 2})
    assert differing_settings([cosa, cam]) == []
    cam.content["name"] = "cosa"
    assert differing_settings([cosa, cam]) == []
    other = run("cosa", method={"lr": 3, "raw": True})
    assert differing_settings([cosa, cam, other]) == ["method.lr"]
    other.content["name"] = "renamed"
    assert differing_settings([cosa, cam, other]) == []


def test_lists_and_empty_sections_are_settings() -> None:
    runs = [run("cam", scales=scales, options=o) for scales, o in (([1], {}), ([1, 2], {"a": 1}))]
    assert differing_settings(runs) == ["scales"]
    assert [setting(r, "scales") for r in runs] == ["[1]", "[1, 2]"]


def test_settings_taken_over_from_another_section_are_named_once() -> None:
    def at(size: int, rate: float) -> Any:
        data = {"seed": 0, "view": {"crop_size": size}}
        return run("cam", data=data, view={"crop_size": size}, method={"lr": rate}, x={"lr": size})

    runs = [at(1, 0.5), at(2, 0.5)]
    assert differing_settings(runs) == ["view.crop_size", "x.lr"]
    # Two settings may end alike and say different things.
    assert differing_settings([*runs, at(2, 0.25)]) == ["method.lr", "view.crop_size", "x.lr"]


def test_settings_that_some_runs_lack_count_only_where_nothing_else_differs() -> None:
    old, new = run("cosa", method={"raw": True}), run("cosa", method={"raw": False, "a": 1, "b": 2})
    assert differing_settings([old, new]) == ["method.raw"]
    new.config["method"]["raw"] = True
    assert differing_settings([old, new]) == ["method.a"]
    assert [setting(r, "method.a") for r in (old, new)] == ["-", "1"]


def test_variant_of_a_sweep_comes_first_and_names_the_runs_where_it_will_do() -> None:
    settings = [("z", True, 1), ("a", False, 1), ("b", True, 2)]
    runs = [run("cosa", variant=v, method={"raw": r, "k": k}) for v, r, k in settings]
    assert differing_settings(runs) == ["variant", "method.k", "method.raw"]
    assert naming_settings(runs) == ["variant"]
    assert run_titles(runs) == ["cosa variant=z", "cosa variant=a", "cosa variant=b"]
    assert [setting(r, "variant") for r in sort_runs(runs)] == ["a", "b", "z"]
    runs.append(run("cosa", variant="b", method={"raw": False, "k": 2}))
    assert naming_settings(runs) == ["variant", "method.k", "method.raw"]


def test_settings_as_one_would_type_them() -> None:
    made = run("cosa", a={"lr": None}, b={"lr": "x"}, c=True, d=1e-7, e=float("inf"))
    keys = ["a.lr", "b.lr", "c", "d", "e", "gone"]
    assert [setting(made, k) for k in keys] == ["null", "x", "true", "1e-07", ".inf", "-"]
    assert settings_text(made, keys) == "a.lr=null b.lr=x c=true d=1e-07 e=.inf"


def test_sweeps_are_sorted_by_their_settings_then_seed() -> None:
    found = [
        (r.config["method"]["csc_weight"], r.config["method"]["raw"], r.seed)
        for r in sort_runs(sweep())
    ]
    weights = [None, 0.1, 2, 10]
    assert found == [(w, raw, s) for w in weights for raw in (False, True) for s in "01"]


def test_runs_without_such_settings_stay_as_they_were_given() -> None:
    runs = [run("supervised"), run("cosa", 2), run("cosa", 1), run("cam")]
    assert sort_runs(runs) == runs


def test_sorting_keeps_names_together_in_the_order_given() -> None:
    runs = [run("supervised"), *sweep()[:3], run("cam"), *sweep()[3:]]
    assert [r.method for r in sort_runs(runs)] == ["supervised", *["cosa"] * 16, "cam"]


def test_missing_null_switches_numbers_and_words_in_this_order() -> None:
    values: list[Any] = ["b", 3, None, True, [1], "a", 0.5, False]
    runs = [run("cosa", method={"x": value}) for value in values]
    order = [setting(r, "method.x") for r in sort_runs([*runs, run("cosa", method={"y": 0})])]
    assert order == ["-", "null", "false", "true", "0.5", "3", "[1]", "a", "b"]


# --- titles --------------------------------------------------------------------------------


def test_titles() -> None:
    runs = [run("cosa"), run("cosa", 1), run("cam")]
    assert run_titles(runs) == ["cosa seed 0", "cosa seed 1", "cam"]
    bounds = [run("cosa"), run("cam"), run("supervised")]
    for bound in bounds[1:]:
        bound.content["name"] = "shapes"
    assert run_titles(bounds) == ["cosa", "shapes cam", "shapes supervised"]
    assert run_titles(runs, ["a", "b", "c"]) == ["a", "b", "c"]
    with pytest.raises(UserError, match="titles has 1 names, runs stands for 3"):
        run_titles(runs, ["a"])
    with pytest.raises(UserError, match="a name of its own"):
        run_titles(runs, ["a", "b", "a"])


def test_titles_of_a_sweep_name_settings_and_seeds_where_these_differ() -> None:
    one, two, again = (run("cosa", s, method={"raw": raw}) for s, raw in ((0, 1), (0, 2), (1, 2)))
    assert run_titles([one, two]) == ["cosa raw=1", "cosa raw=2"]
    assert run_titles([one, two, again]) == [
        "cosa raw=1",
        "cosa raw=2 seed 0",
        "cosa raw=2 seed 1",
    ]


def test_titles_are_never_the_same() -> None:
    runs = [run("cosa"), run("cosa"), run("cosa", 1)]
    runs[1].folder = Path("elsewhere")
    assert run_titles(runs) == ["cosa seed 0 (cosa0)", "cosa seed 0 (elsewhere)", "cosa seed 1"]
