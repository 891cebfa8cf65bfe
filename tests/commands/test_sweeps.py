"""Sweeps: every variant of every one fits, and a multirun ends in one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tests.commands.conftest import TINY, Run, compose
from wsss.build import build_method, build_network
from wsss.cli import config_dir
from wsss.errors import UserError
from wsss.methods import CoSA, UniA
from wsss.methods.base import Method
from wsss.nn import UncertaintyNeck
from wsss.train import apply_variant

SWEEPS = sorted(f.stem for f in (config_dir() / "sweep").glob("*.yaml") if f.stem != "base")
CLASSES = ("cat", "dog")


def settings(sweep: str, *overrides: str) -> DictConfig:
    usual = TINY
    if sweep.startswith("unia"):  # the other settings are CoSA's
        usual = [o for o in TINY if not o.startswith(("method.", "experiment="))]
        usual = ["experiment=unia_shapes", *usual]
    return compose("train", [*usual, "data.root=nowhere", f"sweep={sweep}", *overrides])


def method_of(config: DictConfig) -> Method:
    return build_method(config, build_network(config, len(CLASSES)), CLASSES)


def listed(sweep: str) -> list[str]:
    """Variants that ``-m`` goes through."""
    params = OmegaConf.load(config_dir() / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    return [name.strip() for name in str(params.variant).split(",")]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_variant_is_swept_once_and_fits(sweep: str) -> None:
    config = settings(sweep)
    assert sorted(listed(sweep)) == sorted(config.variants)
    for name in config.variants:
        config.variant = name
        method_of(apply_variant(config))


def test_parts_of_the_ablation() -> None:
    def parts(name: str) -> set[str]:
        method = method_of(apply_variant(settings("cosa_ablation", f"variant={name}")))
        assert isinstance(method, CoSA)
        return {
            part
            for part, on in {
                "gc": method.guidance == "spl",
                "sa": method.momentum > 0,
                "raw": method.raw,
                "csc": method.csc_weight > 0,
                "dt": bool(list(method.threshold.children())) or hasattr(method.threshold, "ring"),
            }.items()
            if on
        }

    everything = {"gc", "sa", "raw", "csc", "dt"}
    assert parts("full") == everything
    for name in ("gc", "sa", "raw", "csc", "dt"):
        assert parts(f"no_{name}") == everything - {name}
    assert parts("base") == set()
    assert parts("gc") == {"gc"}
    assert parts("gc_sa") == {"gc", "sa"}
    assert parts("gc_sa_raw") == {"gc", "sa", "raw"}


def test_parts_of_unias_ablation() -> None:
    def parts(name: str) -> set[str]:
        method = method_of(apply_variant(settings("unia_ablation", f"variant={name}")))
        assert isinstance(method, UniA)
        neck = method.network.neck
        found = {"network": neck, "mutual": method.refine == "mutual"}
        if isinstance(neck, UncertaintyNeck):
            found |= {"channel": neck.channel_mu, "spatial": neck.spatial_mu}
        return {part for part, on in found.items() if on} | set(method.addons)

    network = {"network", "channel", "spatial"}
    everything = network | {"mutual", "distribution", "affinity"}
    assert parts("base") == set()
    assert parts("network") == network
    assert parts("distribution") == network | {"distribution"}
    assert parts("mutual") == everything - {"affinity"}
    assert parts("full") == parts("mu_only") == everything
    assert parts("channel") == everything - {"spatial"}
    assert parts("spatial") == everything - {"channel"}


def test_no_variant_changes_nothing() -> None:
    config = settings("cosa_ablation")
    assert apply_variant(config) is config


def test_the_run_keeps_its_variant_and_not_the_others() -> None:
    config = apply_variant(settings("cosa_ablation", "variant=no_raw"))
    assert config.variant == "no_raw"
    assert config.method.raw is False
    assert config.variants == {}


def test_mistakes() -> None:
    with pytest.raises(UserError, match="Did you mean 'no_csc'"):
        apply_variant(settings("cosa_ablation", "variant=no_scs"))
    with pytest.raises(UserError, match="set sweep="):
        apply_variant(compose("train", [*TINY, "data.root=nowhere", "variant=full"]))
    config = settings("cosa_ablation", "variant=full")
    config.variants.full = {"method": {"raww": False}}
    with pytest.raises(UserError, match="raww"):
        apply_variant(config)


def test_multirun_ends_in_one_table(run: Run, tiny: list[str], tmp_path: Path) -> None:
    done = run(
        "train",
        "-m",
        *tiny,
        "sweep=cosa_ablation",
        "variant=full,no_csc",
        "seed=0",
        "trainer.max_steps=3",
        "hydra.sweep.dir=sweep",
    )
    found = sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert found == ["full-seed0", "no_csc-seed0", "report"]
    table = (tmp_path / "sweep/report/table.md").read_text()
    assert "no_csc" in table
    assert "full" in table
    assert "table.md" in done.stdout


def test_a_run_that_fails_does_not_keep_the_others_from_running(
    run: Run, tiny: list[str], tmp_path: Path
) -> None:
    settings = [*tiny, "trainer.max_steps=2", "sweep=cosa_ablation", "hydra.sweep.dir=sweep"]
    done = run("train", "-m", *settings, "variant=no_scs,full", "seed=0", code=2)
    assert "error: 1 of the sweep's runs failed:\n  0 (variant=no_scs: no such one." in done.stderr
    assert "Traceback" not in done.stderr
    assert len([*tmp_path.rglob("scores.json")]) == 1
    assert (tmp_path / "sweep/report/table.md").is_file()


def test_a_sweep_over_two_processes(run: Run, tiny: list[str], tmp_path: Path) -> None:
    """Through ``wsss``: each job starts its own second process, for that job alone."""
    more = ["trainer.max_steps=1", "evaluate=false", "trainer.devices=2", "trainer.strategy=ddp"]
    run("__main__", "train", "-m", *tiny, *more, "seed=0,1", "output_dir=runs")
    for seed in (0, 1):
        folder = tmp_path / "runs" / str(seed)
        content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        assert content["wsss"]["config"]["seed"] == seed
        about = json.loads((folder / "environment.json").read_text())
        assert about["world_size"] == 2
        assert about["command"][0] == "wsss train"
        assert f"seed={seed}" in about["command"]
        assert (folder / "train_ddp_process_1.log").is_file()  # that one's folder is this, too
