"""What is kept in a run's log file."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from wsss.cli import fail, keep_warnings
from wsss.log import tell


def test_lines_warnings_and_errors_are_kept_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logging.FileHandler(tmp_path / "train.log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        tell("Stopped at step 3.")
        with pytest.warns(UserWarning, match="no such class"), keep_warnings():
            warnings.warn("no such class", stacklevel=1)
        with pytest.raises(SystemExit):
            fail("that is wrong")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("Stopped at step 3.\n", "error: that is wrong\n")
    assert (tmp_path / "train.log").read_text().splitlines() == [
        "INFO Stopped at step 3.",
        "WARNING UserWarning: no such class",
        "ERROR that is wrong",
    ]
    tell("without a file")
    assert capsys.readouterr().out == "without a file\n"
