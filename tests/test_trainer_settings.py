"""Mistakes in ``trainer``: one line, before any data are looked for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.commands.conftest import TINY, compose
from wsss import evaluate, inference, pseudo_label, trainer_settings
from wsss.errors import UserError
from wsss.inference import (
    PRECISIONS,
    accelerator_name,
    find_device,
    has_bf16,
    precision_after,
    precision_name,
    precision_on,
)
from wsss.train import train
from wsss.trainer_settings import check_trainer


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_steps=abc", r"trainer\.max_steps=abc: give a whole number above 0\."),
        ("max_steps=0", r"trainer\.max_steps=0: give a whole number above 0\."),
        ("max_steps=null", r"trainer\.max_steps=None"),
        ("max_steps=true", r"trainer\.max_steps=True"),
        ("max_steps=inf", r"trainer\.max_steps=inf"),
        ("val_every_n_steps=-1", r"val_every_n_steps=-1: give a whole number above 0, or null\."),
        ("save_every_n_steps=2.5", r"save_every_n_steps=2\.5"),
        ("accumulate_grad_batches=0", r"accumulate_grad_batches=0"),
        ("gradient_clip_val=much", r"gradient_clip_val=much: give the largest norm"),
        ("progress=maybe", r"trainer\.progress=maybe: choose true or false"),
        ("precision=fp16", r"trainer\.precision='fp16': choose one of auto, 32-true, bf16-"),
        ("precision=bf16-true", r"trainer\.precision='bf16-true'"),
        ("precision=64", r"trainer\.precision='64'"),
        ("devices=abc", r"trainer\.devices=abc .*does not work on this machine"),
        ("devices=0", r"trainer\.devices=0 "),
        ("accelerator=gpuu", r"trainer\.accelerator=gpuu "),
        ("strategy=dpp", r"trainer\.strategy=dpp "),
    ],
)
def test_mistakes_are_told_before_the_data_are_looked_for(
    override: str, said: str, tmp_path: Path
) -> None:
    cfg = compose("train", [*TINY, "data.root=nowhere", f"trainer.{override}"])
    with pytest.raises(UserError, match=said) as error:
        train(cfg, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_values_get_their_usual_form() -> None:
    values = ["max_steps=1e3", "precision=bf16", "val_every_n_steps=0", "threads=2"]
    cfg = compose("train", [*TINY, "data.root=x", *(f"trainer.{value}" for value in values)])
    check_trainer(cfg)
    t = cfg.trainer
    assert (t.max_steps, t.precision, t.threads) == (1000, "bf16-mixed", 2)
    assert isinstance(t.max_steps, int)
    assert t.val_every_n_steps is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    gpus = ["trainer.accelerator=gpu", "trainer.devices=2"]
    with pytest.raises(UserError, match=r"accelerator=gpu trainer\.devices=2 .* not work on"):
        check_trainer(compose("train", [*TINY, "data.root=x", *gpus]))


def test_names_of_precisions() -> None:
    aliases = {32: "32-true", "32": "32-true", 16: "16-mixed", "16": "16-mixed"}
    names = aliases | {"bf16": "bf16-mixed"} | {name: name for name in PRECISIONS}
    for value, name in names.items():
        assert precision_name(value) == name


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "found"),
    [
        ({"avx2": True}, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, False),  # ARM
    ],
)
def test_processors_that_compute_in_bf16(
    capabilities: dict[str, bool], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bf16(CPU) is found
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch that does not know
    assert not has_bf16(CPU)


def test_gpus_that_compute_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for major in (7, 8):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        about = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, about=about: about)
        assert has_bf16(torch.device("cuda")) is (major == 8)


@pytest.mark.parametrize("has", [True, False])
def test_precision_fits_the_device(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "has_bf16", lambda _: has)
    best = "bf16-mixed" if has else "32-true"
    assert precision_on(CPU, "auto") == best
    for named in ("bf16-mixed", "32-true", "16-mixed"):
        assert precision_on(CPU, named) == named  # who names one gets it
    assert precision_after("bf16-mixed", CPU) == best  # trained elsewhere, used here
    assert precision_after("bf16", CPU) == best
    assert precision_after("auto", CPU) == best
    assert precision_after("32-true", CPU) == "32-true"


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("command", [evaluate, pseudo_label])
def test_commands_after_training_do_not_emulate_bf16(
    command: ModuleType, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "has_bf16", lambda _: has)
    saved = compose("train", [*TINY, "data.root=x", "trainer.precision=bf16-mixed"])
    for given, meant in (("null", "bf16-mixed" if has else "32-true"), ("bf16", "bf16-mixed")):
        name = command.__name__.rpartition(".")[2]
        cfg = compose(name, ["checkpoint=x", f"precision={given}"])
        found = command.merge(saved, cfg).trainer.precision
        assert precision_name(found) == meant


@pytest.mark.parametrize("has", [True, False])
def test_a_run_knows_what_auto_meant(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (inference, trainer_settings):
        monkeypatch.setattr(module, "has_bf16", lambda _: has)
    plain = [it for it in TINY if "precision" not in it]
    cfg = compose("train", [*plain, "data.root=x"])
    assert cfg.trainer.precision == "auto"
    check_trainer(cfg)
    assert cfg.trainer.precision == ("bf16-mixed" if has else "32-true")


def test_emulated_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_settings, "has_bf16", lambda _: False)
    cfg = compose("train", [*TINY, "data.root=x", "trainer.precision=bf16"])
    with pytest.warns(UserWarning, match=r"emulates bfloat16.*trainer\.precision=32-true"):
        check_trainer(cfg)


def test_apples_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no float64, in which thresholds and scores are summed."""
    assert accelerator_name("auto", "trainer.accelerator") in ("auto", "cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert accelerator_name("auto", "trainer.accelerator") == "cpu"
    assert accelerator_name("cpu", "trainer.accelerator") == "cpu"
    with pytest.raises(UserError, match=r"trainer\.accelerator=mps: Apple's GPU has no float64"):
        accelerator_name("mps", "trainer.accelerator")
    with pytest.raises(UserError, match="device=mps:0: Apple's GPU"):
        find_device("mps:0")
