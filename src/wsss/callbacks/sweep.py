"""One table at the end of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from wsss.errors import UserError


class SweepTable(Callback):
    """Hydra callback: when a multirun ends, ``wsss report`` of its runs, without pictures.

    Runs that differ in their seed alone become a mean and a standard deviation.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from wsss.report.__main__ import report  # not for every training that Hydra starts

        folder = Path(config.hydra.sweep.dir)
        settings = {
            "run": None,
            "runs": [f"{folder}/*"],
            "output_dir": str(folder / "report"),
            "pictures": 0,
            "titles": None,
            "data_root": None,
        }
        try:
            report(OmegaConf.create(settings))
        except UserError as error:  # all runs are there: a table can still be made by hand
            print(f"No table of this sweep: {error}")
