"""The zip that the PASCAL VOC evaluation server takes."""

from __future__ import annotations

import uuid
import zipfile
from pathlib import Path

import torch.nn.functional as F
from rich.progress import track

from wsss.data.batch import EvalBatch
from wsss.data.datamodule import WSSSDataModule
from wsss.data.images import encode_mask
from wsss.errors import UserError
from wsss.inference import Inference
from wsss.pseudo import dense_crf

#: competition 6: methods that use other data than VOC's, such as ImageNet weights
FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


def write_submission(
    inference: Inference, data: WSSSDataModule, path: Path, crf: str | None = None
) -> None:
    """Predict a split that has no masks and pack the masks as the server wants them.

    Palette PNGs of each image's own size, ``results/VOC2012/Segmentation/comp6_test_cls/NAME.png``.
    The zip appears when it is whole.

    Args:
        inference: the network, as ``seg/miou_ms_flip`` runs it.
        data: its evaluation split is written.
        path: of the zip.
        crf: preset of :func:`~wsss.pseudo.dense_crf`; needs the data module's originals.

    Raises:
        UserError: the method has no segmentation, or the zip cannot be written.
    """
    if not inference.has_segmentation:
        raise UserError(
            "this checkpoint's method trains no segmentation, so there are no masks to submit: "
            "choose a checkpoint of cosa or supervised."
        )
    loader = data.val_dataloader()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    count = 0
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:  # PNGs are packed already
            batch: EvalBatch
            for batch in track(loader, "Predicting", total=len(loader)):
                logits = inference(batch.images, cam=False).seg_logits
                assert logits is not None
                for i, (name, mask) in enumerate(zip(batch.names, batch.masks, strict=True)):
                    resized = F.interpolate(
                        logits[i : i + 1], size=mask.shape, mode="bilinear", align_corners=False
                    )[0]
                    if crf is not None:
                        assert batch.originals is not None
                        resized = dense_crf(batch.originals[i], resized.softmax(0), crf)
                    label = resized.argmax(0).byte().cpu().numpy()
                    archive.writestr(f"{FOLDER}/{name}.png", encode_mask(label))
                    count += 1
        part.replace(path)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written ({error.strerror or error}).") from error
    finally:
        part.unlink(missing_ok=True)
    print(f"{path}: {count} masks of split '{data.val_split}', {path.stat().st_size / 1e6:.1f} MB.")
