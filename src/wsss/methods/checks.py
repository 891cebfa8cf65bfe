"""Settings that cannot be, told when a run is put together and not when they are first used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from wsss.errors import UserError


def check_scales(key: str, scales: Any) -> None:
    """Refuse scales of images that are none.

    Args:
        key: the setting's name, for the message.
        scales: its value.

    Raises:
        UserError: not a list of positive factors, each once.
    """
    is_list = OmegaConf.is_list(scales) or (
        isinstance(scales, Sequence) and not isinstance(scales, str)
    )
    listed = list(scales) if is_list else []
    positive = all(isinstance(s, int | float) and s > 0 for s in listed)
    if not listed or not positive or len(set(listed)) < len(listed):
        raise UserError(
            f"{key}={scales}: give positive factors, each once, for example [1.0,0.5,1.5]."
        )


def check_threshold(key: str, value: float) -> None:
    """Refuse a threshold of CAMs that none of their values, all from 0 to 1, could straddle.

    Raises:
        UserError: it is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise UserError(f"{key}={value}: CAMs lie between 0 and 1, and so does their threshold.")
