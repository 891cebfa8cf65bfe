"""Every method with every add-on, through training and a checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.commands.conftest import TINY, compose
from wsss.build import build_method, build_network, restore_method
from wsss.checkpoints import read_checkpoint, saved_config
from wsss.cli import config_dir
from wsss.errors import UserError
from wsss.train import train

#: what a short run of each method needs beside the common settings
METHODS = {
    "cam": ["method=cam"],
    "cam with decoder": ["method=cam", "method.segment=true", "method.loss_warmup_steps=5"],
    "cosa": ["method=cosa", "method.loss_warmup_steps=5", "method.threshold_fill_steps=2"],
    "mctformer": ["method=mctformer"],
    "seam": ["method=seam", "backbone=cnn_shapes", "method.optimizer=sgd", "method.lr=0.01"],
    "spatial_bce": ["method=spatial_bce", "backbone=cnn_shapes"],
    "unia": ["method=unia", "method.loss_warmup_steps=2", "method.aux_steps=3"],
}
VIT = [o for o in TINY if o.startswith("backbone.")]
COMMON = [
    o for o in TINY if not o.startswith(("backbone.", "experiment=", "method.loss", "method.thr"))
]
CNN = ["backbone.options.channels=[8,16,16,24]"]


def overrides(name: str, root: Path, *more: str) -> list[str]:
    chosen = METHODS[name]
    network = CNN if "backbone=cnn_shapes" in chosen else VIT
    return ["experiment=shapes", *chosen, *COMMON, *network, f"data.root={root}", *more]


def short(name: str, addon: str, root: Path, *more: str) -> list[str]:
    """Twenty steps, most of them after the warm-up of methods that have one."""
    steps = ["trainer.max_steps=20", "trainer.log_every_n_steps=1", "evaluate=false"]
    return overrides(name, root, f"addon={addon}", *steps, *more)


def logged(folder: Path, term: str) -> list[float]:
    """Values of a term that a run has written."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[f"loss/{term}"]) for row in rows if row.get(f"loss/{term}")]


def restored_addons(folder: Path) -> set[str]:
    """Names of the add-ons of the method that the last checkpoint brings back."""
    path = folder / "checkpoints/last.ckpt"
    content = read_checkpoint(path)
    return set(restore_method(content, saved_config(content, path), path).addons)


def test_every_method_is_here() -> None:
    files = {p.stem for p in (config_dir() / "method").glob("*.yaml")}
    chosen = {o.split("=")[1] for options in METHODS.values() for o in options[:1]}
    # Full supervision and AffinityNet classify nothing; the release recipe is CoSA, set otherwise.
    assert files - {"base", "supervised", "affinity_net", "cosa_release"} == chosen


@pytest.mark.parametrize("name", METHODS)
def test_trains_with_both_regularisations(name: str, shapes_root: Path, tmp_path: Path) -> None:
    more = ["addon=isl_fsl", "trainer.max_steps=20", "trainer.log_every_n_steps=1"]
    more += ["neck=none"] if name == "unia" else []
    scores = train(compose("train", overrides(name, shapes_root, *more)), tmp_path)
    assert "on/cpl/miou_ms_flip" in scores
    for term in ("isl", "fsl"):
        assert len(set(logged(tmp_path, term))) > 10  # (nearly) every step, and not a constant
    assert restored_addons(tmp_path) == {"isl", "fsl"}


NECK = "neck=uncertainty"
#: methods whose test configuration has a ViT
WITH_VIT = [name for name, chosen in METHODS.items() if "backbone=cnn_shapes" not in chosen]
SHORT = [
    *((name, addon, []) for name in METHODS for addon in ("isl", "fsl")),
    *((name, "distribution", [NECK, "addon.distribution.start_step=0"]) for name in METHODS),
    *((name, "affinity", []) for name in WITH_VIT),
]


@pytest.mark.parametrize(
    ("name", "addon", "more"), SHORT, ids=[f"{name}-{addon}" for name, addon, _ in SHORT]
)
def test_trains_with(
    name: str, addon: str, more: list[str], shapes_root: Path, tmp_path: Path
) -> None:
    train(compose("train", short(name, addon, shapes_root, *more)), tmp_path)
    values = logged(tmp_path, addon)
    assert len(values) >= 15  # of 20 steps: UniA's start after the warm-up
    assert len(set(values)) > 10 or addon == "affinity"  # no pairs yet where little is decided
    assert restored_addons(tmp_path) == {addon}
    path = tmp_path / "checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    has_neck = any(key.startswith("network.neck.") for key in state)
    assert has_neck == (NECK in more or name == "unia")


def test_cosa_with_the_neck_alone(shapes_root: Path, tmp_path: Path) -> None:
    train(compose("train", short("cosa", "none", shapes_root, NECK)), tmp_path)
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    necks = [key for key in state if ".neck." in key]
    # The assignment network has one, too, which follows.
    assert {key.split(".")[0] for key in necks} == {"network", "assignment"}
    moved = [key for key in necks if not torch.equal(state[key], state[other(key)])]
    assert moved


def other(key: str) -> str:
    """The same parameter of the other network of CoSA."""
    first, rest = key.split(".", 1)
    return ("assignment." if first == "network" else "network.") + rest


@pytest.mark.parametrize("experiment", ["voc", "coco", "acdc", "voc_mini", "acdc_mini", "shapes"])
def test_parts_of_an_experiment_may_be_left_out(experiment: str) -> None:
    """No setting of a part stays behind without it."""
    base = [f"experiment=unia_{experiment}", "data.root=nowhere", "backbone.pretrained=false"]
    base += ["backbone.early_block=-2", *(f"++{option}" for option in VIT)]
    with_all = compose("train", base)
    start = 16000 if experiment == "coco" else with_all.method.loss_warmup_steps
    assert with_all.method.refine_start_step == start
    assert {addon.start_step for addon in with_all.addon.values()} == {start}
    for chosen, names in (("none", set()), ("isl", {"isl"}), ("affinity", {"affinity"})):
        cfg = compose("train", [*base, "neck=none", f"addon={chosen}", "method.refine=par"])
        method = build_method(cfg, build_network(cfg, 2), ("a", "b"))
        assert set(method.addons) == names
        assert method.network.neck is None


@pytest.mark.parametrize(("chosen", "start"), [("cosa", 6000), ("cam", 0), ("seam", 0)])
def test_unias_addons_start_with_the_labels(chosen: str, start: int) -> None:
    cfg = compose("train", [f"method={chosen}", "neck=uncertainty", "addon=unia", "data.root=x"])
    assert {addon.start_step for addon in cfg.addon.values()} == {start}


@pytest.mark.parametrize("addon", ["unia", "[unia,isl_fsl]"])
def test_cosa_with_all_of_unia(addon: str, shapes_root: Path, tmp_path: Path) -> None:
    """Neck and both losses, and those of IS-CAM beside them."""
    train(compose("train", short("cosa", addon, shapes_root, NECK)), tmp_path)
    names = {"distribution", "affinity"} | ({"isl", "fsl"} if "fsl" in addon else set())
    for name in names:
        assert len(logged(tmp_path, name)) >= 15, name
    assert restored_addons(tmp_path) == names


def test_both_cams(shapes_root: Path, tmp_path: Path) -> None:
    more = ["addon=isl_fsl", "addon.isl.cams=[cam,early_cam]", "addon.fsl.cams=[early_cam]"]
    more += ["trainer.max_steps=2", "trainer.log_every_n_steps=1", "evaluate=false"]
    train(compose("train", overrides("cam", shapes_root, *more)), tmp_path)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss/isl", "loss/isl_early", "loss/fsl_early"} <= set(header)
    assert "loss/fsl" not in header


@pytest.mark.parametrize("name", ["cam", "cosa"])
def test_without_weight_nothing_changes(name: str, shapes_root: Path, tmp_path: Path) -> None:
    """Add-ons of weight 0 are computed, logged, and leave every weight as it is without them."""
    states = []
    for i, more in enumerate(([], ["addon=isl_fsl", "addon.isl.weight=0", "addon.fsl.scale=0"])):
        settings = overrides(name, shapes_root, "trainer.max_steps=8", "evaluate=false", *more)
        train(compose("train", settings), tmp_path / str(i))
        last = torch.load(tmp_path / str(i) / "checkpoints/last.ckpt", weights_only=True)
        states.append(last["state_dict"])
    for key, value in states[0].items():
        assert torch.equal(value.nan_to_num(), states[1][key].nan_to_num()), key


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("seam", ["addon=isl", "addon.isl.cams=[early_cam]"], "seam trains no early CAM"),
        ("cam", ["method=supervised", "addon=fsl"], "supervised trains no CAM"),
        ("cam", ["addon=fsl", "addon.fsl.gate=max"], r"addon\.fsl\.gate='max'"),
        ("cam", ["addon=distribution"], r"addon\.distribution needs.*neck=uncertainty"),
        ("unia", ["neck=none"], r"addon\.distribution needs.*neck=uncertainty"),
        ("seam", ["addon=affinity"], r"backbone\.name='resnet.*plain ViT"),
        ("unia", ["method.refine=walk"], r"method\.refine='walk'"),
        ("unia", ["method.blocks=[0]", "addon.affinity.blocks=[1]"], "one value"),
        ("unia", ["method.low=0.9"], r"low=0\.9, high=0\.7"),
    ],
)
def test_mistakes(name: str, more: list[str], message: str, shapes_root: Path) -> None:
    cfg = compose("train", overrides(name, shapes_root, *more))
    with pytest.raises(UserError, match=message):
        build_method(cfg, build_network(cfg, 2), ("a", "b"))


def test_two_of_one_kind(shapes_root: Path, tmp_path: Path) -> None:
    second = "{_target_: wsss.addons.FeatureSimilarity, sigma: 2.0}"
    more = ["addon=fsl", f"+addon.near={second}", "trainer.max_steps=2", "evaluate=false"]
    settings = overrides("cam", shapes_root, *more, "trainer.log_every_n_steps=1")
    train(compose("train", settings), tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["loss/fsl"]) != float(row["loss/near"])


def test_a_variant_leaves_an_addon_out(shapes_root: Path) -> None:
    cfg = compose("train", overrides("cam", shapes_root, "addon=isl_fsl"))
    cfg.addon.isl = None
    method = build_method(cfg, build_network(cfg, 2), ("a", "b"))
    assert list(method.addons) == ["fsl"]
