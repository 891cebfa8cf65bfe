"""What several scores check and say in the same words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor


def check_same_shape(prediction: Tensor, target: Tensor) -> None:
    """Refuse two maps of different shapes.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ: "
            "resize the logits to the mask's size before the argmax."
        )


def check_range(name: str, values: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse values that are no class.

    Args:
        name: "target" or "prediction".
        values: integers, at least one, the ignored ones taken out.
        num_classes: classes of the maps, background included (C + 1).
        ignore_index: what targets may hold besides; only the message names it.

    Raises:
        ValueError: a value is outside 0..num_classes-1.
    """
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the {name} holds values from {low} to {high}; expected "
            f"0..{num_classes - 1} (targets also {ignore_index}): check the class list."
        )


def warn_left_out(absent: Tensor, class_names: Sequence[str], what: str) -> None:
    """Name the classes that the means leave out, if there are any.

    Args:
        absent: (K,) bool.
        class_names: K names.
        what: what an absent class lacks.
    """
    if bool(absent.any()):
        names = [class_names[i] for i in absent.nonzero().flatten().tolist()]
        warnings.warn(
            f"classes without {what}, left out of the means: {', '.join(names)}.", stacklevel=3
        )
