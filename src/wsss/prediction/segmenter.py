"""From decoded images to label maps at their own size: as a whole, in windows, with a CRF."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from wsss.data.views import resize_image
from wsss.errors import UserError
from wsss.inference import Inference
from wsss.prediction.inputs import Photo
from wsss.prediction.native import (
    LabelMap,
    label_map,
    label_map_of,
    resize_rows,
    windows,
)
from wsss.report.pictures import RGB


class Segmenter:
    """Label maps of images at their own size.

    Args:
        inference: the network.
        size: side of the square that images, or windows, are resized to.
        window: side of the windows in pixels of the image; None takes the image as a whole.
        overlap: see :func:`~wsss.native.windows`.
        batch_size: squares of one forward pass.
        crf: preset of :func:`~wsss.pseudo.dense_crf`.
    """

    def __init__(
        self,
        inference: Inference,
        size: int,
        window: int | None = None,
        overlap: float = 0.25,
        batch_size: int = 1,
        crf: str | None = None,
    ) -> None:
        self.inference = inference
        self.size = size
        self.window = window
        self.overlap = overlap
        self.batch_size = batch_size
        self.crf = crf
        self.classes = ("background", *inference.classes)

    @property
    def photos_at_once(self) -> int:
        """Images to hand over in one call: of large ones, the windows fill the batch."""
        return 1 if self.window else self.batch_size

    def __call__(
        self, photos: Sequence[Photo], step: Callable[[float], None] = lambda part: None
    ) -> Iterator[LabelMap]:
        """Label maps of images, one after the other.

        Args:
            photos: with ``native`` where there are windows or a CRF.
            step: told the part of an image that is done.

        Raises:
            UserError: the network gives NaN, or the device's memory is too small.
        """
        if self.window:
            for photo in photos:
                yield self._slide(photo, step)
            return
        all_logits = self._logits([photo.square for photo in photos])
        for photo, logits in zip(photos, all_logits, strict=True):
            height, width = photo.height, photo.width
            if self.crf is None:
                yield label_map(height, width, windows(height, width, None), [[logits]])
            else:
                from wsss.pseudo import dense_crf

                assert photo.native is not None
                whole = resize_rows(logits, height, width, 0, height).softmax(0)
                yield label_map_of(dense_crf(photo.native, whole, self.crf))
            step(1)

    def _slide(self, photo: Photo, step: Callable[[float], None]) -> LabelMap:
        assert photo.native is not None
        image = photo.native
        rows = windows(photo.height, photo.width, self.window, self.overlap)

        def logits() -> Iterator[list[Tensor]]:
            for row in rows:
                result: list[Tensor] = []
                for i in range(0, len(row), self.batch_size):
                    parts = [
                        image[w.top : w.top + w.height, w.left : w.left + w.width]
                        for w in row[i : i + self.batch_size]
                    ]
                    result += self._logits([resize_image(p, self.size, self.size) for p in parts])
                    step(len(parts) / (len(row) * len(rows)))
                yield result

        return label_map(photo.height, photo.width, rows, logits())

    def _logits(self, squares: Sequence[RGB]) -> list[Tensor]:
        batch = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
        try:
            logits = self.inference(batch, cam=False).seg_logits
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.inference.device} has not enough memory for batch_size={self.batch_size} "
                f"at size={self.size}: lower one of them, or use device=cpu"
            ) from error
        assert logits is not None
        if not bool(logits.isfinite().all()):
            raise UserError(
                "the network gives numbers that are not finite: the checkpoint is broken, or "
                f"precision={self.inference.precision} overflows; try precision=32-true"
            )
        return list(logits)
