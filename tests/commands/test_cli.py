"""Configuration: every experiment composes, and mistakes name the nearest right key."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.commands.conftest import Run, compose
from wsss.build import (
    build_data,
    build_method,
    build_network,
    kept_of_experiment,
    leave_out_foreign_settings,
    method_class,
    settings_of,
)
from wsss.cli import check_overrides, config_dir, prepare_folder, quoted_path
from wsss.errors import UserError

EXPERIMENTS = sorted(p.stem for p in (config_dir() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_instantiates(name: str) -> None:
    # The encoder is cut to one block: what counts is that keys and constructors agree.
    cfg = compose("train", [f"experiment={name}", "data.root=/data", "backbone.pretrained=false"])
    OmegaConf.set_struct(cfg, False)
    if cfg.backbone.name == "resnet38d":
        cfg.backbone.options = {"width": 0.05, "freeze_bn": False, "freeze_stem": False}
    elif "swin" in cfg.backbone.name:
        cfg.backbone.options.update({"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4})
    elif "resnet101" in cfg.backbone.name:
        cfg.backbone.options.update({"layers": [1] * 4, "channels": [8] * 4})
    elif "vit" in cfg.backbone.name or "deit" in cfg.backbone.name:
        cfg.backbone.options.depth = 1
        cfg.backbone.early_block = -1
    network = build_network(cfg, 3)
    method = build_method(cfg, network, ("a", "b", "c"))
    assert isinstance(method, method_class(cfg))
    assert method.monitor.split("/")[0] in method.network_names


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_masks_instead(name: str) -> None:
    """``method=supervised``, the upper bound of any experiment."""
    overrides = [f"experiment={name}", "method=supervised", "data.root=/data"]
    cfg = compose("train", overrides)
    left_out = leave_out_foreign_settings(cfg, overrides)
    assert set(cfg.method) - {"_target_"} <= settings_of(method_class(cfg))
    if name == "cosa_shapes":
        assert left_out == ["method.loss_warmup_steps", "method.momentum"]


def test_only_an_experiments_settings_are_left_out() -> None:
    overrides = ["experiment=cosa_shapes", "method=supervised", "++method.momentum=0.9"]
    cfg = compose("train", overrides)
    with pytest.raises(UserError, match=r"^method\.momentum is not a setting of method=supervised"):
        leave_out_foreign_settings(cfg, overrides)
    assert leave_out_foreign_settings(cfg, overrides[:1]) == []  # the experiment's own method


@pytest.mark.parametrize(
    ("name", "batch", "images", "momentum", "decay"),
    [  # epochs times images
        ("cosa_ms_r101_voc", 16, 80 * 10_582, 0.9, 1e-4),  # BECO: 8 on each of two GPUs
        ("cosa_ms_r101_coco", 16, None, 0.9, 1e-4),
        ("cosa_ms_wrn38_voc", 4, 30 * 10_582, 0.0, 0.0),  # MCTformer, as its code comes out
        ("cosa_ms_wrn38_coco", 4, None, 0.0, 0.0),
    ],
)
def test_schedules_of_second_stages(
    name: str, batch: int, images: int | None, momentum: float, decay: float
) -> None:
    cfg = compose("train", [f"experiment={name}", "data.root=/data"])
    assert cfg.data.batch_size == batch
    assert (cfg.method.sgd_momentum, cfg.method.weight_decay) == (momentum, decay)
    if images is not None:
        assert (
            abs(cfg.trainer.max_steps * batch - images) < 80 * batch
        )  # the rest of an epoch is left out


def test_small_experiments_evaluate_at_the_size_they_train_on() -> None:
    for name in ("voc_mini", "coco_mini", "acdc_mini"):
        cfg = compose("train", [f"experiment={name}", "data.root=/data", "method=cam"])
        assert cfg.data.eval_size == cfg.view.crop_size, name


@pytest.mark.parametrize(
    ("more", "left"),
    [
        ([], "freeze_bn, freeze_stem"),
        (["backbone.options.freeze_bn=false"], "freeze_stem"),
        (["backbone=resnet50", "backbone.pretrained=false"], "freeze_bn"),
    ],
)
def test_frozen_parts_want_weights(more: list[str], left: str) -> None:
    """Else days go by with a stem that was drawn at random."""
    cfg = compose("train", ["experiment=seam_voc", "data.root=/data", *more])
    with pytest.raises(UserError, match=rf"^backbone\.weights is not set.* \({left}\): give a"):
        build_network(cfg, 3)


def test_a_checkpoint_takes_the_place_of_a_weights_file() -> None:
    cfg = compose("train", ["experiment=seam_voc", "data.root=/data"])
    OmegaConf.set_struct(cfg, False)
    cfg.backbone.options.width = 0.02
    build_network(cfg, 3, load_weights=False)


def test_papers_settings() -> None:
    voc = compose("train", ["experiment=cosa_voc", "data.root=/data"])
    assert (voc.trainer.max_steps, voc.method.loss_warmup_steps, voc.data.batch_size) == (
        20000,
        6000,
        4,
    )
    assert (voc.method.lr, voc.method.weight_decay, voc.method.head_lr_factor) == (6e-5, 0.01, 10)
    assert (voc.method.warmup_steps, voc.method.warmup_ratio, voc.method.power) == (1500, 1e-6, 0.9)
    assert voc.method.momentum == 0.9994
    assert (voc.method.c2s_weight, voc.method.s2c_weight, voc.method.csc_weight) == (0.1, 0.05, 0.1)
    assert (voc.view.crop_size, list(voc.view.scale)) == (448, [0.5, 2.0])
    coco = compose("train", ["experiment=cosa_coco", "data.root=/data"])
    assert (coco.trainer.max_steps, coco.method.loss_warmup_steps, coco.data.batch_size) == (
        40000,
        10000,
        8,
    )


def test_views_of_full_supervision_are_the_usual_ones_unless_told() -> None:
    chosen = ["experiment=cosa_voc", "method=supervised", "data.root=/data"]
    bound = compose("train", chosen).view
    assert (list(bound.appearance), bound.blur, bound.crop_size) == (["identity"], 0, 448)
    assert [t.name for t in bound.extra] == ["ColorJitter"]
    cosa = compose("train", ["experiment=cosa_voc", "data.root=/data"]).view
    assert "solarize" in cosa.appearance
    assert compose("train", [*chosen, "view=cosa"]).view == cosa


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("method.momentm=0.9", "Did you mean 'method.momentum'"),
        ("momentum=0.9", "Did you mean 'method.momentum'"),
        ("lr=1", "Did you mean 'method.lr'"),
        ("max_steps=3", "Did you mean 'trainer.max_steps'"),
        ("method=coza", "Did you mean 'cosa'"),
        ("experiment=cosa_vok", "Did you mean 'cosa_voc'"),
        ("trainer.max_step=3", "Did you mean 'trainer.max_steps'"),
    ],
)
def test_typos_name_the_nearest_key(
    override: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        check_overrides("train", [override])
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_sweeps_and_right_overrides_pass() -> None:
    check_overrides("train", ["-m", "experiment=cosa_shapes", "method.momentum=0.99,0.995"])
    check_overrides("train", ["seed=range(0,3)", "data.root=/somewhere", "method=cosa,cam"])


def test_mistakes_end_with_code_2_and_no_traceback(run: Run, tmp_path: Path) -> None:
    done = run("train", "experiment=cosa_voc", code=2)
    assert "data.root is not set" in done.stderr
    assert "Traceback" not in done.stderr
    (log,) = tmp_path.rglob("train.log")
    assert "data.root is not set" in log.read_text()


@pytest.mark.parametrize(
    ("data", "hint"),
    [("folder", "holds images/ and labels.csv"), ("voc", "holds JPEGImages"), ("acdc", "ACDC")],
)
def test_a_missing_root_says_what_the_layout_wants(data: str, hint: str) -> None:
    cfg = compose("train", ["experiment=cosa_voc", f"data={data}"])
    with pytest.raises(UserError, match=rf"^data\.root is not set: give the .*{hint}"):
        build_data(cfg)


@pytest.mark.parametrize("more", [[], ["-m"]])
def test_folder_that_cannot_be_made(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra would make it before the command starts."""
    (tmp_path / "file").write_text("x")
    argv = ["train", *more, f"output_dir={tmp_path}/file/run"]
    cfg = check_overrides("train", argv[1:])
    assert cfg is not None
    with pytest.raises(SystemExit) as stop:
        prepare_folder(cfg, argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: output_dir='{tmp_path}/file/run' cannot be written (Not a dir")


def test_showing_the_settings_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (["train", "--cfg", "job", "output_dir=a"], ["train", "--info"], ["train", "-h"]):
        if (cfg := check_overrides("train", argv[1:])) is not None:
            prepare_folder(cfg, argv)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_goes_where_output_dir_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def prepared(*arguments: str) -> list[str]:
        argv = ["train", *arguments]
        cfg = check_overrides("train", argv[1:])
        assert cfg is not None
        prepare_folder(cfg, argv)
        return argv[1 + len(arguments) :]

    assert prepared("-m", "output_dir=runs/a", "seed=0,1") == ["hydra.sweep.dir=runs/a"]
    assert prepared("-m", "output_dir=runs/a", "hydra.sweep.dir=b") == []
    assert prepared("output_dir=runs/a") == prepared("-m", "seed=0,1") == []
    with pytest.raises(SystemExit):
        prepared("-m", "output_dir=a,b")
    assert "output_dir=a,b: the runs of a sweep lie" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["train", "--help"], 0),
        (["predict", "--help"], 0),
        (["train", "experiment=cosa_voc", "--cfg", "job"], 0),
        (["train", "experiment=cosa_vok"], 2),
        (["evaluate", "chekpoint=x"], 2),
    ],
)
def test_questions_and_typos_are_answered_without_torch(arguments: list[str], code: int) -> None:
    """Whose import takes seconds."""
    script = f"""
import sys
from wsss.__main__ import main
sys.argv = ["wsss", *{arguments}]
try:
    main()
except SystemExit as end:
    print("code", end.code, "torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout.endswith(f"code {code} False\n"), ended


def test_help_lists_the_commands(run: Run) -> None:
    assert "evaluate" in run("__main__", "--help").stdout
    assert "data.root" in run("train", "--help").stdout


@pytest.mark.parametrize("name", ["evaluate", "pseudo_label", "prepare"])
def test_help_lists_the_choices_of_the_command_alone(name: str) -> None:
    """By hand, as Hydra's own list has every experiment, method and sweep."""
    template = OmegaConf.load(config_dir() / f"{name}.yaml").hydra.help.template
    listed = template.split("Choices")[1].split("Settings")[0]
    (data,) = (line for line in listed.splitlines() if line.split()[:1] == ["data"])
    words = set(re.findall(r"\w+", data.split(";")[0]))
    there = {path.stem for path in (config_dir() / "data").glob("*.yaml")}
    assert there - words == {"base", "from_checkpoint"}
    assert "experiment" not in listed


def test_help_of_report(run: Run) -> None:
    text = run("report", "--help").stdout
    for part in ("wsss report run=", "runs=[outputs/a,outputs/b]", "report.html", "pictures: 6"):
        assert part in text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("data.root=~/VOC", str(Path("~/VOC").expanduser())),
        ("data.root=/d/größe (1)", "/d/größe (1)"),
        ("output_dir=runs/lr=1", "runs/lr=1"),
        ("data.masks=it's", "it's"),
        ("ckpt=null", None),
        ("ckpt='quoted =already'", "quoted =already"),
        ("data.root=${oc.env:HOME}/a", f"{Path.home()}/a"),
    ],
)
def test_paths_need_no_quotes(argument: str, value: str | None) -> None:
    cfg = compose("train", ["data=folder", quoted_path(argument)])
    assert OmegaConf.select(cfg, argument.split("=")[0]) == value


def test_paths_in_lists_and_other_arguments() -> None:
    home = Path.home()
    assert quoted_path("runs=[~/a, b/lr=1]") == f'runs=[{home}/a,"b/lr=1"]'
    assert quoted_path("data.masks=a,b") == "data.masks=a,b"  # a sweep
    for argument in ("--help", "method.lr=(", "-m", "data.root=", "seed=0,1"):
        assert quoted_path(argument) == argument


def test_a_list_of_addons_is_not_taken_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_overrides("train", ["experiment=cosa_shapes", "addon=[isl,fsl]", "method.momentun=1"])
    assert "method.momentun: no such key. Did you mean 'method.momentum'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check_overrides("train", ["experiment=cosa_shapes", "addon=[isl,fls]"])
    assert "addon=fls: no such choice. Did you mean 'fsl'" in capsys.readouterr().err


def test_what_another_method_takes_over_from_an_experiment_is_told() -> None:
    overrides = ["experiment=cosa_coco", "method=unia", "data.root=/d"]
    cfg = compose("train", overrides)
    leave_out_foreign_settings(cfg, overrides)
    kept = kept_of_experiment(cfg, overrides)
    assert "method.loss_warmup_steps=10000 (its own: 2000)" in kept
    assert not [k for k in kept if k.startswith("method.momentum")]
    typed = [*overrides, "method.loss_warmup_steps=5"]
    assert not kept_of_experiment(compose("train", typed), typed)
    for own in (["experiment=cosa_coco"], ["experiment=cosa_coco", "method=cosa"]):
        assert kept_of_experiment(compose("train", [*own, "data.root=/d"]), own) == []
    # Without a method of its own an experiment means its settings for all of them.
    shared = ["experiment=voc_mini", "method=cam", "data.root=/d"]
    assert kept_of_experiment(compose("train", shared), shared) == []
