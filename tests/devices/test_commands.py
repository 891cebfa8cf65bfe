"""Commands that look at images give on the device what they give on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils import backend_registration

from tests.commands.conftest import command_environment
from tests.commands.test_predict import write_checkpoint
from tests.forks import run_module

COMMANDS = {
    "predict": ["input={images}", "precision=32-true"],
    "pseudo_label": ["split=val", "refine=par", "labels=both"],
    "analyse": [],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "best.ckpt"
    write_checkpoint(path, [f"data.root={shapes_root}"])
    return path


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no backends written in Python",
)
@pytest.mark.parametrize("command", COMMANDS)
def test_pictures_are_those_of_the_cpu(
    command: str, checkpoint: Path, shapes_root: Path, tmp_path: Path
) -> None:
    written = []
    for device in ("cpu", "pretend:0"):
        out = tmp_path / device[:3]
        settings = [s.format(images=shapes_root / "JPEGImages") for s in COMMANDS[command]]
        done = run_module(
            "tests.devices.command",
            [
                *(command, *settings),
                *(f"checkpoint={checkpoint}", f"device={device}", f"output_dir={out}"),
            ],
            folder=Path(__file__).parents[2],
            environment=command_environment() | {"WSSS_CACHE": str(tmp_path / "cache")},
            output=tmp_path / f"printed_{device[:3]}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        written.append(
            {str(p.relative_to(out)): np.asarray(Image.open(p)) for p in out.rglob("*.png")}
        )
    cpu, device = written
    assert cpu
    assert cpu.keys() == device.keys()
    for name, pixels in cpu.items():
        assert (pixels == device[name]).mean() > 0.99, name
