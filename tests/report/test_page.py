"""The page of a report: well formed, alone in the world, and every section there."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.made import run, write
from tests.report.pages import Page
from wsss.errors import UserError
from wsss.report.drawing import Drawing, Picture
from wsss.report.page import CELL, data_uri, duration, facts, figure_of, legend, meaning, render
from wsss.report.pictures import PanelSet
from wsss.report.runs import Run, run_titles

SECTIONS = ["What was run", "Scores", "Curves", "IoU by class", "Confusions", "Images"]
MATRIX = [[90, 10, 0], [30, 60, 10], [1, 0, 0]]
ENVIRONMENT = {
    "wsss": "0.1",
    "python": "3.11.9",
    "torch": "2.11.0",
    "lightning": "2.6.4",
    "timm": "1.0",
    "numpy": "2.1",
    "platform": "Linux-made-up",
    "cpu": "a fast one",
    "threads": 3,
    "devices": ["GPU one", "GPU two"],
    "world_size": 2,
    "precision": "bf16-mixed",
    "command": ["wsss train", "name=two words", "seed=0"],
    "started": "2030-01-02T03:04:05+00:00",
    "finished": "2030-01-02T04:06:08+00:00",
    "seconds": 3723.4,
}
METRICS = (
    "an/seg/miou_ms_flip,epoch,loss/c2s,loss/total,lr,step,threshold/cam\n"
    ",0,1.5,2.5,0.1,9,0.4\n0.1,0,,,,10,\n,0,1.25,2.0,0.1,19,0.45\n0.3,1,,,,20,\n"
)


def full(folder: Path, name: str = "cosa", seed: int = 0) -> Run:
    """A run that has everything."""
    made = run("cosa", seed)
    per_class = {"background": 90.0, "cat": 50.0, "dog": 12.5}
    written = write(
        made,
        folder,
        name=name,
        scores={**made.content["scores"], "an/cls/map": 77.0},
        per_class={
            "an/seg/miou_ms_flip": per_class,
            "an/seg/miou_ss": dict.fromkeys(per_class, 1.0),
            "on/seg/miou_ms_flip": {**per_class, "dog": None},
        },
        confusion={"on/seg/miou_ms_flip": np.eye(3).tolist(), "an/seg/miou_ms_flip": MATRIX},
    )
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "metrics.csv").write_text(METRICS)
    return written


def picture(name: str = "img", rank: str = "", score: float | None = None) -> Picture:
    panel = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    return Picture(
        PanelSet(name, ("cat",), {"image": panel, "truth": panel}), (20, 40), rank, score
    )


def drawn(runs: list[Run]) -> Drawing:
    own = [picture("bad", "worst", 1.25), picture("good", "best", 99.5)]
    return Drawing(
        ("cat", "dog"), [picture("same")], [own] * len(runs), ["an/seg/miou_ss"] * len(runs)
    )


def page_of(runs: list[Run], drawing: Drawing | None = None, unfinished: Any = ()) -> Page:
    return Page(render(runs, run_titles(runs), unfinished, drawing))


# --- one run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    runs = [full(tmp_path_factory.mktemp("run"))]
    return page_of(runs, drawn(runs))


def test_sections_in_order_with_links_to_them(page: Page) -> None:
    assert [heading for heading in page.sections if heading in SECTIONS] == SECTIONS
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert [link["href"][1:] for link in page.all("a")] == [
        f"r1-{part}" for part in ("what", "scores", "curves", "classes", "confusions", "images")
    ]
    assert all(link["href"][1:] in ids for link in page.all("a"))
    for label in page.all("label"):
        assert label["for"] in ids


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "script", "iframe", "object"), tag
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")), (tag, value[:40])


def test_style_fetches_nothing(tmp_path: Path) -> None:
    source = render([full(tmp_path / "a")], ["a"])
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "@media print" in style
    assert "max-width: 30rem" in style


def test_language_title_width_and_words_for_pictures(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        f"{panel} of {name}" for name in ("bad", "good") for panel in ("image", "truth")
    ]
    assert len(page.all("svg")) == 6  # total, c2s, rate, mIoU, threshold, confusions
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 20


def test_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_table_scrolls_in_a_box(page: Page) -> None:
    tags = [(tag, attributes) for tag, attributes in page.elements]
    for i, (tag, _) in enumerate(tags):
        if tag == "table":
            assert "scroll" in tags[i - 1][1].get("class", "").split()
            assert tags[i - 1][1]["tabindex"] == "0"  # by keyboard too


def test_what_was_run(page: Page) -> None:
    words = page.words("What was run")
    for expected in (
        "seed 0 (data 0)",
        "there, scored on -",
        "wsss train 'name=two words' seed=0",
        "torch 2.11.0, lightning 2.6.4",
        "GPU one, GPU two, a fast one",
        "threads 3, world_size 2, precision bf16-mixed",
        "2030-01-02T03:04:05+00:00",
        "1 h 02 min 03 s",
        "root: there",  # config.yaml
    ):
        assert expected in words, expected
    assert "not recorded" not in words
    assert "Resumed" not in words


def test_scores_by_network_with_their_meaning(page: Page) -> None:
    words = page.words("Scores")
    assert "AN ON" in words
    assert (
        "seg/miou_ms_flip segmentation, nothing known of the image; several scales and flips "
        "45.00 41.00" in words
    )
    assert "mean average precision over classes; image labels 77.00 -" in words
    assert "AN is the assignment network" in words


def test_classes_worst_first_and_in_order(page: Page) -> None:
    words = page.words("IoU by class")
    assert "an/seg/iou_ms_flip on/seg/iou_ms_flip dog 12.50 - cat 50.00 50.00 background" in words
    assert "background 90.00 90.00 cat 50.00 50.00 dog 12.50 -" in words
    assert "miou_ss" not in words
    widths = [bar["style"] for bar in page.all("i") if "width" in bar.get("style", "")]
    assert widths[:3] == ["width:12.5%", "width:50.0%", "width:50.0%"]


def test_confusions_of_the_headline(page: Page) -> None:
    words = page.words("Confusions")
    assert "an/seg/miou_ms_flip: the largest" in words
    assert (
        "dog → background 100.00 1 cat → background 30.00 30 background → cat 10.00 10 "
        "cat → dog 10.00 10" in words
    )


def test_pictures_say_why_they_were_chosen(page: Page) -> None:
    words = page.words("Images")
    assert "lowest and the highest an/seg/miou_ss" in words
    assert "bad: cat (worst, 1.25 %)" in words
    assert "good: cat (best, 99.50 %)" in words
    assert "cat dog not scored" in words  # the legend


# --- less than everything ------------------------------------------------------------------


def test_older_run_says_what_was_not_recorded(tmp_path: Path) -> None:
    page = page_of([write(run("cam"), tmp_path)])
    assert [heading for heading in page.sections if heading in SECTIONS] == SECTIONS
    assert "command, versions, hardware, time not recorded" in page.words("What was run")
    assert "no metrics.csv" in page.words("Curves")
    assert "Nothing was scored" in page.words("IoU by class")
    assert "Confusions: not recorded" in page.words("Confusions")
    assert "Left out (pictures=0)" in page.words("Images")
    assert page.all("img") == page.all("svg") == []


def test_half_an_environment(tmp_path: Path) -> None:
    made = run("cam")
    found = dict(facts(made, {"torch": "2", "command": [], "cpu": None, "seconds": 0}))
    assert found["versions"] == "torch 2"
    assert found["command"] == found["hardware"] == found["finished"] == "not recorded"
    assert found["duration"] == "0 s"
    found = dict(facts(made, {"seconds": 5, "resumed_from_step": 40}))
    assert found["duration"] == "5 s from step 40 on"


def test_pictures_without_scores_by_image(tmp_path: Path) -> None:
    drawing = Drawing(("cat", "dog"), [], [[picture()]], [None])
    words = page_of([write(run("cam"), tmp_path)], drawing).words("Images")
    assert "spread over the validation set and its classes" in words
    assert "images.csv): not recorded" in words
    assert "img: cat" in words
    assert "(" not in words[words.index("img: cat") :]


def test_run_without_masks_has_nothing_scored(tmp_path: Path) -> None:
    scores = {"on/seg/miou_ss": None}
    per_class = {"on/seg/miou_ss": dict.fromkeys(("background", "cat", "dog"))}
    confusion = {"on/seg/miou_ss": np.zeros((3, 3)).tolist()}
    made = write(
        run("supervised"), tmp_path, scores=scores, per_class=per_class, confusion=confusion
    )
    page = page_of([made])
    assert "no masks" in page.words("Scores")
    assert "Nothing was scored" in page.words("IoU by class")
    assert "No pixel was given to another class" in page.words("Confusions")
    assert page.all("table") == page.all("svg") == []


def test_curves_say_what_is_missing_and_what_was_joined(tmp_path: Path) -> None:
    made = write(run("cam"), tmp_path)
    (tmp_path / "metrics.csv").write_text("loss/total,on/cpl/miou_ss,step\n1,,9\n,0.5,10\n")
    page = page_of([made])
    assert "Validated once or not at all" in page.words("Validation")
    assert "keeps no threshold" in page.words("Threshold")
    assert len(page.all("svg")) == 1
    assert "joined" not in page.text
    (tmp_path / "metrics.1.csv").write_text("loss/total,on/cpl/miou_ss,step\n,0.5,8\n")
    page = page_of([made])
    assert "2 parts joined by step" in page.words("Curves")
    assert "last of 2 parts" in page.words("What was run")
    assert len(page.all("svg")) == 2


@pytest.mark.parametrize(("classes", "drawn"), [(21, True), (22, False)])
def test_heat_map_up_to_21_classes(tmp_path: Path, classes: int, drawn: bool) -> None:
    names = ["background", *(f"c{i}" for i in range(1, classes))]
    matrix = np.ones((classes, classes), int).tolist()
    page = page_of([write(run("cam"), tmp_path, classes=names, confusion={"on/a/b": matrix})])
    assert len(page.all("svg")) == drawn
    assert (f"A heat map of {classes} classes" in page.words("Confusions")) != drawn
    assert page.words("Confusions").count("→") == 1 + 10


def test_dice_by_patient(tmp_path: Path) -> None:
    values = {"all images": {"cat": 50.0, "dog": None}, "patient <7>": {"cat": 40.0, "dog": 30.0}}
    name = "an/seg/miou_ms_flip"
    made = write(
        run("cosa"),
        tmp_path,
        dice={"on/seg/miou_ms_flip": {}, name: values},
        means={name: {"group_dice": 35.0}},
    )
    words = page_of([made]).words("Scores")
    assert f"Dice by patient (%), {name}; mean over patients and classes: 35.00" in words
    assert "patient cat dog all images 50.00 - patient <7> 40.00 30.00" in words


def test_scores_of_image_labels_and_boundaries_by_class(tmp_path: Path) -> None:
    name = "an/seg/miou_ms_flip"
    made = write(
        run("cosa"),
        tmp_path,
        per_class={name: {"background": 90.0, "cat": 50.0, "dog": 60.0}},
        average_precision={"an": {"cat": 11.0, "dog": 22.0}},
        boundary_f={name: {"cat": 33.0, "dog": 44.0}},
    )
    words = page_of([made]).words("IoU by class")
    assert "an/seg/iou_ms_flip an/cls/ap an/seg/boundary_f_ms_flip" in words
    assert "cat 50.00 11.00 33.00 dog 60.00 22.00 44.00 background 90.00 - -" in words


def test_classes_without_the_headline_and_without_a_score(tmp_path: Path) -> None:
    values = {"background": None, "cat": 60.0, "dog": 50.0}
    made = write(run("supervised"), tmp_path, per_class={"on/seg/miou_ss": values})
    words = page_of([made]).words("IoU by class")
    assert "class on/seg/iou_ss dog 50.00 cat 60.00 background - " in words


def test_broken_files_of_a_run_are_named(tmp_path: Path) -> None:
    made = write(run("cam"), tmp_path)
    (tmp_path / "metrics.csv").write_text("a,step\nx,1\n")
    with pytest.raises(UserError, match=r"metrics.csv', line 2"):
        page_of([made])


# --- several runs --------------------------------------------------------------------------


def test_several_runs_are_compared_first_then_folded_away(tmp_path: Path) -> None:
    runs = [full(tmp_path / str(i), "cosa", seed=i) for i in range(2)]
    runs.append(write(run("cam"), tmp_path / "cam"))
    page = page_of(runs, drawn(runs))
    headings = list(page.sections)
    assert headings[:3] == ["Comparison of 3 runs", "Comparison", "The same images"]
    assert "Every run" in headings
    words = page.words("Comparison")
    assert "cosa cosa 2 9 45.00 ± 0.00 52.50 ± 0.00 41.00 ± 0.00 -" in words
    assert "cosa cosa 1 9 45.00" in words
    assert "(n=2)" not in page.text  # means have a table of their own
    assert "+22.25 points from cam" in words
    assert "same: cat" in page.words("The same images")
    folded = [d for d in page.all("details") if d.get("class") == "run"]
    assert [d["id"] for d in folded] == ["r1", "r2", "r3"]
    assert all("open" not in d for d in folded)
    for title in ("cosa seed 0", "cosa seed 1", "cam"):
        assert title in page.sections["Every run"] or title in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(link["href"][1:] in ids for link in page.all("a"))


def test_means_are_left_out_where_no_run_has_a_second_seed(tmp_path: Path) -> None:
    runs = [write(run(m), tmp_path / m) for m in ("cosa", "cam")]
    page = page_of(runs)
    assert "deviation" not in page.text
    assert "±" not in page.text
    assert len([t for t in page.all("th") if t.get("scope") == "row"]) >= 2
    assert "The same images" not in page.sections


def test_settings_are_columns_of_words(tmp_path: Path) -> None:
    runs = [write(run("cosa", method={"raw": raw}), tmp_path / str(raw)) for raw in (False, True)]
    words = page_of(runs).words("Comparison")
    assert "run method method.raw seed steps" in words
    assert "cosa cosa false 0 9 45.00" in words
    source = render(runs, run_titles(runs))
    assert "<td>false</td>" in source
    assert '<td class="number">9</td>' in source


def test_unfinished_runs_are_counted_and_named(tmp_path: Path) -> None:
    runs = [write(run("cosa"), tmp_path / "a")]
    words = page_of(runs, None, [Path("sweep/3"), Path("sweep/<4>")]).words("Comparison")
    assert "2 of 3 runs not finished" in words
    assert "sweep/3 sweep/<4>" in words


# --- safety --------------------------------------------------------------------------------


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "</title><script>alert('x')</script><img src=http://evil/>\"'&"
    run_folder = full(tmp_path / "a", name=evil)
    run_folder.config["data"]["root"] = evil
    (run_folder.folder / "config.yaml").write_text(f"seed: 0\nname: {evil}\n")
    about = {**ENVIRONMENT, "cpu": evil, "command": [evil, evil]}
    (run_folder.folder / "environment.json").write_text(json.dumps(about))
    (run_folder.folder / "metrics.csv").write_text("loss/<script>,loss/total,step\n1,2,3\n")
    run_folder.content["classes"] = ["background", evil, "dog"]
    for table in run_folder.content["per_class"].values():
        table[evil] = table.pop("cat")
    panels = PanelSet(evil, (evil,), {evil: np.zeros((4, 4, 3), np.uint8)})
    strange = Picture(panels, (4, 4), "worst", 1.0)
    for runs in ([run_folder], [run_folder, run_folder]):
        drawing = Drawing((evil, "dog"), [strange], [[strange]] * len(runs), [evil] * len(runs))
        titles = [evil] * len(runs)
        page = Page(render(runs, titles, [Path(evil)] if len(runs) > 1 else [], drawing))
        assert page.all("script") == []
        assert all(image["src"].startswith("data:image/") for image in page.all("img"))
        assert page.text.count("alert('x')") > 10
        assert all(image["alt"] == f"{evil} of {evil}" for image in page.all("img"))


# --- parts ---------------------------------------------------------------------------------


def test_panels_get_the_image_s_proportions_back() -> None:
    figure = figure_of(picture("x", "worst", 1.0))
    assert [(cell.width, cell.height) for cell in figure["cells"]] == [(CELL, CELL // 2)] * 2
    assert figure["rank"] == "worst, 1.00 %"
    assert figure_of(picture("x"))["rank"] == ""
    flat = Picture(picture().panels, (1, 10_000))
    assert figure_of(flat)["cells"][0].height == 1


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [
        ((300, 300), (240, 120), (240, 120)),
        ((96, 96), (240, 120), (96, 96)),
        ((9, 300), (4, 5), (4, 5)),
    ],
)
def test_data_uri_shrinks_and_never_enlarges(
    size: tuple[int, int], shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    uri = data_uri(np.full((*size, 3), 77, np.uint8), shape)
    kind, _, content = uri.partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == expected
        assert f"data:image/{image.format}".lower() == kind
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - 77).max() <= 2


def test_data_uri_takes_the_smaller_coding() -> None:
    flat = np.zeros((100, 100, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3)).astype(np.uint8)
    assert data_uri(flat, (100, 100)).startswith("data:image/png;")
    assert data_uri(noise, (100, 100)).startswith("data:image/jpeg;")


def test_legend_has_voc_s_colours() -> None:
    assert legend(["background", "cat", "dog"]) == [
        ("#800000", "cat"),
        ("#008000", "dog"),
        ("#e0e0c0", "not scored"),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (3600, "1 h 00 min 00 s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("protocol", "text"),
    [
        ("seg/miou_ss", "segmentation, nothing known of the image; one scale"),
        (
            "seg_given_tags/boundary_f_ms_flip_crf",
            "F of the boundaries; segmentation among the classes that the image is known to hold; "
            "several scales and flips; refined by a dense CRF",
        ),
        ("cls/image_ap", "mean average precision over images; image labels"),
        ("new/thing", "-"),
    ],
)
def test_meaning(protocol: str, text: str) -> None:
    assert meaning(protocol) == text
