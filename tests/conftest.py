"""Fixtures that several test folders use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    # Small tensors: threads cost more than they give, and workers of pytest-xdist share the cores.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real mini data sets (WSSS_SHARED or ../shared); skips where it is absent."""
    folder = Path(os.environ.get("WSSS_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not at {folder} (set WSSS_SHARED to its folder)")
    return folder


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _leave_shared_data_alone(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests of the real data go into a temporary folder, those of all other beside it."""
    monkeypatch.delenv("WSSS_CACHE", raising=False)
    if "shared_dir" in request.fixturenames:
        monkeypatch.setenv("WSSS_CACHE", str(request.getfixturevalue("_cache")))


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny generated VOC tree: 24 training and 6 validation images of 64 pixels."""
    from wsss.data.shapes import generate

    root = tmp_path_factory.mktemp("data") / "shapes"
    generate(root, train=24, val=6, image_size=64, seed=0)
    return root
