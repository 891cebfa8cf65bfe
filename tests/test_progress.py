"""The progress bar."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar

from wsss.progress import TrainProgress


def test_scores_that_do_not_exist_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    items = {"v_num": 0, "loss/cls": 0.5, "an/seg/miou_ms_flip": float("nan")}
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda *_: dict(items))
    shown = TrainProgress().get_metrics(L.Trainer(logger=False), L.LightningModule())
    assert shown == {"cls": 0.5}
