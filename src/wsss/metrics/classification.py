"""Average precision of image labels, over the set and within each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from wsss.metrics.checks import warn_left_out


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the precision-recall steps of some rankings.

        AP = sum over thresholds k of (R_k - R_(k-1)) P_k

    Each distinct score is a threshold, so the order within equal scores does not matter; nothing
    is interpolated (as ``sklearn.metrics.average_precision_score``).

    Args:
        scores: (..., N), higher for more likely. Only their order counts.
        labels: (..., N), 1 or True where the item is positive, else 0.

    Returns:
        (...) float64; NaN without a positive.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1, 0, 1])).item()
        0.83...
    """
    scores, order = scores.sort(dim=-1, descending=True)
    # Whole numbers: their running sums are exact, and deterministic on CUDA.
    hits = labels.long().gather(-1, order).cumsum(-1)
    taken = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    # A threshold takes all equal scores at once: only the last of them ends a step.
    last = torch.ones_like(scores, dtype=torch.bool)
    last[..., :-1] = scores[..., 1:] != scores[..., :-1]
    reached = torch.where(last, hits, 0).cummax(-1).values
    gain = reached.diff(dim=-1, prepend=torch.zeros_like(reached[..., :1]))
    return (gain * hits.double() / taken).sum(-1) / labels.double().sum(-1)


class ClassificationScores(Metric):
    """Mean average precision of image labels, two ways.

    ``map`` (to be logged as ``cls/map``) ranks all images of the set by each class: the mean over
    classes. ``image_ap`` (``cls/image_ap``) ranks all classes within each image: the mean over
    images, which the authors of CoSA print as the accuracy of classification.

    torchmetrics keeps and gathers the scores. Its own ``MultilabelAveragePrecision`` passes
    logits through a sigmoid in their own precision, which makes ties of what was ordered, and
    scores classes without a positive; its ``MultilabelRankingAveragePrecision`` gives images
    without a label 1.

    Args:
        num_classes: foreground classes C; the background is no image label.
        class_names: C names, for the warning about classes without a positive.

    Raises:
        ValueError: the names are not C.
    """

    full_state_update = False
    scores: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(
        self, num_classes: int, class_names: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"{len(class_names)} class names for {num_classes} classes: leave the background "
                "out"
            )
        self.num_classes = num_classes
        self.class_names = class_names or [str(i) for i in range(num_classes)]
        # For a rank without an image torchmetrics sends an empty vector of the metric's type.
        # Both states are vectors of this type, or the ranks would wait for each other.
        self.set_dtype(torch.float32)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Keep the scores of some images, as float32.

        Args:
            scores: (B, C) logits or probabilities.
            labels: (B, C), 1 or True where the image holds the class, else 0.

        Raises:
            ValueError: shapes differ or are not (B, C), a score is NaN, or a label neither 0
                nor 1.
        """
        if scores.shape != labels.shape or scores.dim() != 2 or scores.shape[1] != self.num_classes:
            raise ValueError(
                f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)}: expected both "
                f"(images, {self.num_classes}), one column for each foreground class."
            )
        if bool(scores.isnan().any()):
            raise ValueError("a score is NaN and has no rank: the network has diverged.")
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError("labels must be 0 or 1 for each image and class.")
        assert isinstance(self.scores, list)
        assert isinstance(self.labels, list)
        self.scores.append(scores.detach().float().flatten())
        self.labels.append(labels.float().flatten())

    def compute(self) -> dict[str, Tensor]:
        """``ap`` per class (C,), ``map`` and ``image_ap``, float64.

        A class that no image holds has no AP: NaN, left out of ``map``, and a warning names it.
        An image without any label is left out of ``image_ap`` (in ``ap`` it is a negative of
        every class). NaN where nothing is left. torchmetrics squeezes ``ap`` of one class to a
        scalar.
        """
        scores, labels = self._rows(self.scores), self._rows(self.labels)
        ap = average_precision(scores.t(), labels.t())
        warn_left_out(ap.isnan(), self.class_names, "a positive image")
        image_ap = average_precision(scores, labels)
        return {"ap": ap, "map": ap.nanmean(), "image_ap": image_ap.nanmean()}

    def _rows(self, state: list[Tensor] | Tensor) -> Tensor:
        """(N, C) of all images; ``state`` is one vector once torchmetrics has gathered it."""
        parts = state if isinstance(state, list) else [state]
        flat = torch.cat(parts) if parts else torch.zeros(0, device=self.device)
        return flat.view(-1, self.num_classes)
