"""IoU, precision, recall, confusion ratio and Dice from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from wsss.metrics.checks import check_range, check_same_shape, warn_left_out


class SegmentationScores(Metric):
    """Scores over a whole set of masks, from one accumulated confusion matrix.

    torchmetrics keeps and reduces the state; its own ``segmentation.MeanIoU`` averages over
    images, which is not what this field reports.

    Args:
        num_classes: classes of the maps, background included (C + 1).
        ignore_index: target value of pixels that are left out.
        class_names: for the warning about absent classes.
        coexistence: numbers (0..C) of the classes that are often seen together with their
            surroundings (train and rails); ``compute`` then gives their mean IoU, ``cmiou``. None
            or empty: no such score.

    Raises:
        ValueError: ``coexistence`` holds a number outside 0..num_classes-1, or one twice.
    """

    full_state_update = False
    matrix: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        class_names: tuple[str, ...] | None = None,
        coexistence: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_names = class_names
        self.coexistence = list(coexistence or ())
        if sorted(set(range(num_classes)) & set(self.coexistence)) != sorted(self.coexistence):
            raise ValueError(
                f"coexistence {self.coexistence}: give each class once, by its number "
                f"0..{num_classes - 1} in the masks."
            )
        self.add_state(
            "matrix",
            torch.zeros(num_classes, num_classes, dtype=torch.int64),
            dist_reduce_fx="sum",
        )

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one or more masks.

        Args:
            prediction: integer map, any shape, values 0..num_classes-1.
            target: same shape; 0..num_classes-1 or ``ignore_index``.

        Raises:
            ValueError: shapes differ, or a value is neither a class nor (targets) ignored.
        """
        check_same_shape(prediction, target)
        self.matrix += self.count(prediction, target)

    def count(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Confusion matrix (targets in rows) of some masks, not added to the state."""
        keep = target != self.ignore_index
        target, prediction = target[keep].long(), prediction[keep].long()
        if target.numel() == 0:
            return torch.zeros_like(self.matrix)
        for name, values in (("target", target), ("prediction", prediction)):
            check_range(name, values, self.num_classes, self.ignore_index)
        index = target * self.num_classes + prediction
        counts = torch.bincount(index, minlength=self.num_classes**2)
        return counts.view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Per-class tensors (num_classes,) and their means.

        ``iou``, ``precision``, ``recall``, ``confusion_ratio`` (FP / TP) and ``dice``, with
        ``miou`` and ``mean_*``. A class that neither targets nor predictions hold is NaN and
        left out of the means; a warning names it. A class that is never right has no finite
        confusion ratio and is left out of that mean alone. With ``coexistence`` also ``cmiou``,
        the mean IoU of those of its classes that are not absent (NaN: none is left).
        ``confusion`` (C + 1, C + 1) counts the pixels, targets in rows.
        """
        matrix = self.matrix.double()
        true_positive = matrix.diagonal()
        false_positive = matrix.sum(0) - true_positive
        false_negative = matrix.sum(1) - true_positive
        union = true_positive + false_positive + false_negative
        absent = union == 0
        names = self.class_names or [str(i) for i in range(self.num_classes)]
        warn_left_out(absent, names, "a pixel in targets and predictions")

        def ratio(above: Tensor, below: Tensor) -> Tensor:
            return torch.where(absent, torch.nan, above / below)

        scores = {
            "iou": ratio(true_positive, union),
            "precision": ratio(true_positive, (true_positive + false_positive).clamp(min=1)),
            "recall": ratio(true_positive, (true_positive + false_negative).clamp(min=1)),
            # A class that is predicted but never right has no finite ratio.
            "confusion_ratio": ratio(false_positive, true_positive),
            "dice": ratio(2 * true_positive, union + true_positive),
        }
        means = {
            ("miou" if name == "iou" else f"mean_{name}"): value[torch.isfinite(value)].mean()
            for name, value in scores.items()
        }
        if self.coexistence:
            means["cmiou"] = scores["iou"][self.coexistence].nanmean()
        return scores | means | {"confusion": self.matrix.clone()}


class GroupDice(Metric):
    """Dice of each class within each group of masks: per patient, not over all pixels at once.

    Args:
        num_classes: classes of the maps, background included (C + 1).
        num_groups: number of groups G.
    """

    full_state_update = False
    matrices: Tensor

    def __init__(self, num_classes: int, num_groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "matrices",
            torch.zeros(num_groups, num_classes, num_classes, dtype=torch.int64),
            dist_reduce_fx="sum",
        )

    def update(self, matrix: Tensor, group: int) -> None:
        """Add a confusion matrix (C + 1, C + 1) to a group 0..G-1."""
        self.matrices[group] += matrix

    def compute(self) -> Tensor:
        """(G, C + 1) Dice; NaN where neither targets nor predictions of a group hold a class."""
        matrices = self.matrices.double()
        twice = 2 * matrices.diagonal(dim1=1, dim2=2)
        both = matrices.sum(1) + matrices.sum(2)
        return torch.where(both == 0, torch.nan, twice / both)
