"""Boundary F: how well the contours of a set of masks fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from wsss.metrics.checks import check_range, check_same_shape, warn_left_out


class BoundaryScores(Metric):
    """DAVIS contour F over a whole set of masks, as the ISL and FSL paper takes it.

    Of each foreground class, prediction and target are binary masks. A pixel is on a mask's
    boundary if its right, lower or lower-right neighbour is on the other side; the image's border
    is no boundary. It is matched if the other boundary has a pixel at a distance of at most
    ``ceil(bound x diagonal of the image)`` pixels. With counts summed over all images,

        P = matched predicted / predicted,  R = matched true / true,  F = 2 P R / (P + R).

    The mean of mIoU and the mean F is the paper's J&F.

    Void (``ignore_index`` in the target) becomes background of the target before boundaries are
    taken, as published: a prediction is then measured against the inner rim of the void around
    an object, and whatever it says in the void counts. With ``void_as_background=False`` nothing
    in or near the void counts, whatever is predicted there: as at the image's border, a pixel has
    no neighbour in the void, and boundary pixels within the tolerance of void are not counted
    (they still match others), because their own match may lie in the void. That is for masks with
    whole regions unknown (crowds of COCO). VOC draws void along every object: almost no true
    boundary would be left.

    Args:
        num_classes: classes of the maps, background included (C + 1).
        ignore_index: target value of void pixels.
        bound: tolerance as a share of the diagonal, in [0, 1).
        published: a class without a boundary in targets and predictions counts 1, as in the
            published code, and is not left out.
        void_as_background: what becomes of void, see above.
        class_names: C + 1 names, background first, for the warning about absent classes.

    Raises:
        ValueError: ``bound`` is no share, or the names are not C + 1.

    Source: ISL and FSL (WACV 2024), section 5, after Perazzi et al. (CVPR 2016).
    """

    full_state_update = False
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        bound: float = 0.008,
        published: bool = False,
        void_as_background: bool = True,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= bound < 1:
            raise ValueError(f"bound {bound}: give a share of the image's diagonal, 0 <= bound < 1")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"{len(class_names)} class names for {num_classes} classes: name the background"
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.bound = bound
        self.published = published
        self.void_as_background = void_as_background
        self.class_names = class_names or [str(i) for i in range(num_classes)]
        # Foreground class; predicted or true boundary; matched or all of its pixels.
        self.add_state(
            "counts",
            torch.zeros(num_classes - 1, 2, 2, dtype=torch.int64),
            dist_reduce_fx="sum",
        )

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one mask, or several of one size; the next call may bring another size.

        Args:
            prediction: integers (H, W) or (N, H, W), values 0..C.
            target: same shape; 0..C or ``ignore_index``.

        Raises:
            ValueError: shapes differ or are no masks, the prediction is no integer map, or a
                value is neither a class nor (targets) ignored.
        """
        check_same_shape(prediction, target)
        if prediction.dim() not in (2, 3):
            raise ValueError(f"masks {tuple(prediction.shape)}: expected (H, W) or (N, H, W)")
        if prediction.is_floating_point() or target.is_floating_point():
            raise ValueError(
                f"prediction {prediction.dtype} and target {target.dtype}: expected integers; take "
                "the argmax of logits first"
            )
        if prediction.numel() == 0:
            return
        if prediction.dim() == 2:
            prediction, target = prediction[None], target[None]
        target = target.long()
        void = target == self.ignore_index
        target = target.masked_fill(void, 0)
        for name, values in (("target", target), ("prediction", prediction)):
            check_range(name, values, self.num_classes, self.ignore_index)
        for p, t, v in zip(prediction, target, void, strict=True):
            self._count(p, t, None if self.void_as_background else v)

    def _count(self, prediction: Tensor, target: Tensor, void: Tensor | None) -> None:
        """Add one image (H, W). ``void`` None: there is none, or it is background."""
        pair = torch.stack([prediction, target])
        # Most classes are in neither map and have nothing to count.
        present = torch.bincount(pair.flatten(), minlength=self.num_classes)[1:].nonzero()
        radius = math.ceil(self.bound * math.hypot(*target.shape))
        judged = None if void is None else ~_dilate(void, radius)
        # One class at a time: its maps stay in the cache, those of many classes do not.
        for i in present.flatten().tolist():
            boundaries = _boundaries(pair == i + 1, void)
            matched = boundaries & _dilate(boundaries, radius).flip(0)
            if judged is not None:
                boundaries, matched = boundaries & judged, matched & judged
            self.counts[i] += torch.stack([matched.sum((1, 2)), boundaries.sum((1, 2))], -1)

    def compute(self) -> dict[str, Tensor]:
        """``f``, ``precision`` and ``recall`` per foreground class (C,), and ``mean``, of F.

        Precision is 0 where nothing is predicted, recall where nothing is to be found, and F with
        either. For a class without any boundary all three are NaN; it is left out of the mean,
        and a warning names it (``published``: they are 1). torchmetrics squeezes a vector of one
        class to a scalar.
        """
        matched, total = self.counts.double().unbind(-1)
        precision, recall = (matched / total.clamp(min=1)).unbind(-1)
        both = precision + recall
        f = torch.where(both > 0, 2 * precision * recall / both, 0.0)
        absent = (total == 0).all(-1)
        if not self.published:
            warn_left_out(absent, self.class_names[1:], "a boundary in targets and predictions")
        scores = {"f": f, "precision": precision, "recall": recall}
        empty = 1.0 if self.published else torch.nan
        scores = {name: value.masked_fill(absent, empty) for name, value in scores.items()}
        return scores | {"mean": scores["f"].nanmean()}


def boundary_f(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    bound: float = 0.008,
    published: bool = False,
    void_as_background: bool = True,
) -> dict[str, Tensor]:
    """Boundary F over a set of masks of one size; see :class:`BoundaryScores`.

    Args:
        prediction: integers (N, H, W) or (H, W), values 0..C.
        target: same shape; 0..C or ``ignore_index``.
        num_classes: classes of the maps, background included (C + 1).
        ignore_index: target value of void pixels.
        bound: tolerance as a share of the image's diagonal.
        published: a class that is absent everywhere counts 1.
        void_as_background: False: nothing in or near void counts.

    Returns:
        ``f``, ``precision`` and ``recall`` (C,) of the foreground classes; ``mean`` of F.

    Raises:
        ValueError: as :class:`BoundaryScores` and its ``update``.

    Example:
        >>> target = torch.zeros(1, 60, 80, dtype=torch.int64)
        >>> target[:, 20:40, 20:60] = 1
        >>> boundary_f(target.roll(1, dims=2), target, num_classes=2)["mean"].item()
        1.0
        >>> boundary_f(target.roll(9, dims=2), target, num_classes=2)["mean"].item()
        0.5...
    """
    scores = BoundaryScores(num_classes, ignore_index, bound, published, void_as_background)
    scores.to(prediction.device)
    scores.update(prediction, target)
    found = scores.compute()
    # torchmetrics makes a scalar of one foreground class.
    return {name: value if name == "mean" else value.view(-1) for name, value in found.items()}


def _boundaries(masks: Tensor, void: Tensor | None) -> Tensor:
    """Boundary pixels of binary masks (..., H, W); a pair with a ``void`` (H, W) pixel is none."""
    height, width = masks.shape[-2:]
    found = torch.zeros_like(masks)
    for down, right in ((0, 1), (1, 0), (1, 1)):
        here = (..., slice(0, height - down), slice(0, width - right))
        there = (..., slice(down, None), slice(right, None))
        differs = masks[here] ^ masks[there]
        if void is not None:
            differs &= ~(void[here] | void[there])
        found[here] |= differs
    return found


def _dilate(maps: Tensor, radius: int) -> Tensor:
    """Dilation of bool maps (..., H, W) with the disk dy^2 + dx^2 <= radius^2.

    A disk is a stack of rows, wider towards the middle. One map of runs grows with them and is
    shifted up and down: about 4 x radius passes over the map, and no distances.
    """
    dilated, runs, width = torch.zeros_like(maps), maps.clone(), 0
    for dy in range(radius, -1, -1):
        wider = math.isqrt(radius**2 - dy**2)
        for dx in range(width + 1, wider + 1):
            runs[..., dx:] |= maps[..., :-dx]
            runs[..., :-dx] |= maps[..., dx:]
        width = wider
        rows = max(maps.shape[-2] - dy, 0)
        dilated[..., dy:, :] |= runs[..., :rows, :]
        dilated[..., :rows, :] |= runs[..., dy:, :]
    return dilated
