"""``shapes`` read back in whichever layout it was written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from wsss.data.acdc import ACDC
from wsss.data.coco import COCO
from wsss.data.folder import Folder
from wsss.data.images import DatasetError
from wsss.data.layout import Layout
from wsss.data.voc import VOC

_READERS: dict[str, type[Layout]] = {"voc": VOC, "coco": COCO, "acdc": ACDC, "folder": Folder}


def open_tree(root: str | os.PathLike[str]) -> Layout:
    """The data set that :func:`wsss.data.shapes.generate` wrote to ``root``.

    Raises:
        DatasetError: ``root`` holds no generated data set.
    """
    record = Path(root) / "shapes.json"
    try:
        layout = json.loads(record.read_text(encoding="utf-8"))["layout"]
        return _READERS[layout](root)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{record}: not the record of a generated data set ({error}); generate it with "
            "wsss prepare data=shapes, or name the right data group"
        ) from error
