"""Every method trains and is scored on a device that is no CPU, and seldom waits for it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from tests.commands.conftest import command_environment
from tests.devices.steps import CASES

#: Times a step waits for the device, for two steps. Each costs what the host could have prepared.
WAITS = {
    "multi_scale.py": 2,  # which classes the images have
    "labels.py": 8,  # the same; a release label goes image by image
    "affinity.py": 2,  # whether Sinkhorn has converged
    "dense_energy.py": 16,  # which pixels are kept, by image
}


pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no backends written in Python",
)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.devices.steps"],
        cwd=Path(__file__).parents[2],
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_the_device_gives_what_the_cpu_gives(results: dict[str, dict[str, Any]], case: str) -> None:
    result = results[case]
    assert "error" not in result
    cpu, device = result["cpu"], result["device"]
    assert device["devices"] == ["pretend"]
    assert device["loss"] == pytest.approx(cpu["loss"], rel=1e-5)
    assert device["norm"] == pytest.approx(cpu["norm"], rel=1e-4)
    assert device["norm"] > 0
    assert device["scores"].keys() == cpu["scores"].keys()
    assert device["scores"]
    for name, score in cpu["scores"].items():
        assert math.isnan(score) or device["scores"][name] == pytest.approx(score, abs=1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing_but_what_it_must(
    results: dict[str, dict[str, Any]], case: str
) -> None:
    waited: dict[str, int] = {}
    for line, times in results[case]["device"]["waited"].items():
        name = line.split("/")[-1].split(":")[0]
        waited[name] = waited.get(name, 0) + times
    for name, times in waited.items():
        assert times <= WAITS.get(name, 0), (name, results[case]["device"]["waited"])


def test_the_device_tells_a_tensor_on_the_cpu_apart() -> None:
    """The pretence can fail: mixed devices, NumPy, and a factory without a device are errors."""
    script = """
import torch
from tests.devices import pretend
pretend.register()
x = pretend.OnDevice(torch.ones(2, 3))
refused = 0
with pretend.running():
    for wrong in (lambda: x + torch.ones(3), lambda: x.numpy(), lambda: torch.ones(3)[x[0] > 0]):
        try:
            wrong()
        except (RuntimeError, TypeError):
            refused += 1
    assert (x + torch.ones(())).device.type == "pretend"
    assert (x + torch.ones(3, device=x.device)).sum().item() == 12
    assert x.cpu().device.type == "cpu"
print(refused, sum(pretend.WAITED.values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=command_environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["3", "1"], done.stderr
