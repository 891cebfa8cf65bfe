"""Several runs side by side: tables, means over seeds, bounds."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from rich.console import Console

from tests.report.made import run
from wsss.report.comparison import (
    comparisons,
    csv_text,
    group_rows,
    in_order,
    main_scores,
    markdown,
    mean_and_deviation,
    rich_table,
    score_names,
    table_rows,
)


def test_rows_end_with_mean_and_deviation_over_seeds() -> None:
    runs = [run("cosa"), run("cosa", 1, 2.0), run("cam")]
    names = score_names(runs)
    assert names == [
        "an/seg/miou_ms_flip",
        "an/cpl/miou_ms_flip",
        "on/seg/miou_ms_flip",
        "on/cpl/miou_ms_flip",
        "on/cpl_early/miou_ms_flip",
    ]
    header, rows = table_rows(runs, names)
    assert header == ["run", "method", "seed", "steps", *names]
    assert rows[0] == ["cosa", "cosa", "0", "9", "45.00", "52.50", "41.00", "-", "-"]
    assert rows[2] == ["cam", "cam", "0", "9", "-", "-", "-", "30.25", "-"]
    assert rows[3][:5] == ["cosa (n=2)", "cosa", "mean", "9", "46.00 +- 1.41"]
    assert len(rows) == 4


def sweep() -> list[Any]:
    settings = [(raw, seed) for raw in (False, True) for seed in (0, 1)]
    return [run("cosa", seed, 2 * seed + raw, method={"raw": raw}) for raw, seed in settings]


def test_settings_have_columns_of_their_own() -> None:
    name = "an/seg/miou_ms_flip"
    header, rows = table_rows([*sweep(), run("cam")], [name])
    assert header == ["run", "method", "method.raw", "seed", "steps", name]
    assert rows[1] == ["cosa", "cosa", "false", "1", "9", "47.00"]
    assert rows[4] == ["cam", "cam", "-", "0", "9", "-"]
    assert rows[5] == ["cosa (n=2)", "cosa", "false", "mean", "9", "46.00 +- 1.41"]
    assert rows[6] == ["cosa (n=2)", "cosa", "true", "mean", "9", "47.00 +- 1.41"]
    assert len(rows) == 7


def test_one_row_an_experiment_with_the_number_of_its_seeds() -> None:
    name = "an/seg/miou_ms_flip"
    header, rows = group_rows([*sweep()[:3], run("cam")], [name])
    assert header == ["run", "method", "method.raw", "seeds", "steps", name]
    assert rows == [
        ["cosa", "cosa", "false", "2", "9", "46.00 +- 1.41"],
        ["cosa", "cosa", "true", "1", "9", "46.00"],
        ["cam", "cam", "-", "1", "9", "-"],
    ]


def test_order_of_names_and_those_of_the_printed_table() -> None:
    names = ["on/seg/miou_ss", "an/seg/new", "an/cpl/miou_ms_flip", "on/seg/miou_ms_flip", "an/a/b"]
    assert in_order(names) == [
        "an/cpl/miou_ms_flip",
        "an/a/b",
        "an/seg/new",
        "on/seg/miou_ms_flip",
        "on/seg/miou_ss",
    ]
    assert main_scores(names) == ["an/cpl/miou_ms_flip", "on/seg/miou_ms_flip"]


def test_mean_and_deviation_of_what_exists() -> None:
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.00 +- 1.00"
    assert mean_and_deviation([1.0, 2.0, None, 3.0]) == "2.00 +- 1.00 (n=3)"
    assert mean_and_deviation([1.0, None]) == "1.00 (n=1)"
    assert mean_and_deviation([None]) == "-"


def test_terminal_has_the_settings_in_one_column() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    runs = [*sweep(), run("cam", method={"lr": 1})]
    runs[0].content["name"] = runs[1].content["name"] = "[bold]cosa"
    for made in (runs[0], runs[2]):
        made.config["method"]["csc_weight"] = 0.1
    console.print(rich_table(runs, console))
    text = console.export_text()
    assert "settings" in text
    assert "csc_weight=0.1" in text
    assert "method.csc_weight" not in text
    assert "[bold]cosa" in text
    assert "=-" not in text
    console.print(rich_table([run("cam")], console))
    assert "settings" not in console.export_text()


def test_terminal_names_a_sweep_s_variants_alone() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    runs = [
        run("cosa", seed, 2 * seed, variant=v, method={"raw": v == "full"})
        for v in ("full", "no_raw")
        for seed in (0, 1)
    ]
    console.print(rich_table(runs, console))
    text = console.export_text()
    assert "+- 1.41" in text
    assert "variant=full" in text
    assert "raw=" not in text
    assert table_rows(runs, [])[0] == ["run", "method", "variant", "method.raw", "seed", "steps"]


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_leaves_contours_out_rather_than_break_words(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    runs = [run("cosa"), run("cam")]
    for made in runs:
        made.content["name"] = f"{made.method}_by_name"
        for network in ("an", "on"):
            for score in ("seg/miou", "cpl/miou", "cpl/boundary_f", "cpl/jf"):
                made.content["scores"][f"{network}/{score}_ms_flip"] = 50.0
    console.print(rich_table(runs, console))
    text = console.export_text()
    assert "cosa_by_name" in text
    assert "an/seg/" in text
    assert "on/cpl/" in text
    assert ("boundary_f" in text) == ("table.md" not in text) == (width == 140)


def test_markdown_and_csv() -> None:
    header, rows = ["run", "method", "x"], [["a", "cam", "1.00 +- 0.10"], ["b, c", "cosa", "-"]]
    assert markdown(header, rows, ["one", "two"]).splitlines() == [
        "Scores (%)",
        "",
        "| run | method | x |",
        "| --- | --- | ---: |",
        "| a | cam | 1.00 +- 0.10 |",
        "| b, c | cosa | - |",
        "",
        "- one",
        "- two",
    ]
    assert list(csv.reader(io.StringIO(csv_text(header, rows)))) == [
        header,
        rows[0],
        ["b, c", "cosa", ""],
    ]


def test_cosa_is_compared_with_its_bounds() -> None:
    runs = [run("cosa"), run("cosa", 1, 2.0), run("cam"), run("supervised")]
    ratio, gain = comparisons(runs)
    assert "46.00 is 92.0 % of supervised" in ratio
    assert "(mean of 2)" in ratio
    assert "53.50 is +23.25 points from cam" in gain
    assert comparisons([run("cam"), run("supervised")]) == []
    second = run("supervised", data={"seed": 0, "root": "there", "masks": "/labels/cpl"})
    assert comparisons([run("cosa"), second]) == []
    assert len(comparisons([run("cosa"), run("supervised", data={"root": "there"})])) == 1


def test_comparisons_name_the_settings() -> None:
    one, two = comparisons([*sweep(), run("cam")])
    assert one.startswith("cosa raw=false (mean of 2) an/cpl/miou_ms_flip 53.50 is +23.25 points")
    assert two.startswith("cosa raw=true (mean of 2) an/cpl/miou_ms_flip 54.50 is +24.25 points")


def test_scores_on_other_images_are_not_compared() -> None:
    for key, value in (("root", "elsewhere"), ("val_split", "v"), ("max_val_images", 3)):
        other = run("cam")
        other.config["data"][key] = value
        assert comparisons([run("cosa"), other]) == [], key
