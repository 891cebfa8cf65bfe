"""Mistakes in ``trainer``: one line, before any data are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands.conftest import TINY, compose
from wsss.errors import UserError
from wsss.inference import PRECISIONS, accelerator_name, find_device, precision_name
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
        ("precision=fp16", r"trainer\.precision='fp16': choose one of 32-true, bf16-mixed, 16-"),
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
