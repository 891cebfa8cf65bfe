"""Other programs' checkpoints: ``python -m wsss.import_checkpoint source=cosa_release file=...``.

Writes a checkpoint of ours, which all commands take.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from wsss.build import build_layout, build_method, build_network
from wsss.cli import hydra_command, nearest, quiet_libraries
from wsss.data.voc import VOC_CLASSES
from wsss.errors import UserError
from wsss.files import check_writable, write_atomically
from wsss.methods import CoSA
from wsss.nn import WSSSNetwork
from wsss.nn.encoder import read_tensors

SOURCES = ("cosa_release",)

# Their key names on the left, ours on the right. The encoder is a timm ViT in both.
_COSA_RELEASE = {
    "decoder.conv6.weight": "decoder.conv1.weight",
    "decoder.conv7.weight": "decoder.conv2.weight",
    "decoder.conv8.weight": "decoder.classifier.weight",
    "classifier.weight": "classifier.weight",
    "aux_classifier.weight": "early_classifier.weight",
}
_ENCODER = "encoder."


def load_cosa_release(network: WSSSNetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict with the published code's key names, strictly.

    A prefix that all keys share (``module.`` of DDP) is dropped, and so is the encoder's unused
    ImageNet classifier. The classifiers' (C, D, 1, 1) weights become (C, D).

    Args:
        network: a ViT backbone with a :class:`~wsss.nn.LargeFOV` decoder.
        state_dict: their names to tensors, of one network (online or assignment).

    Raises:
        UserError: missing, unexpected or differently shaped tensors, each named.
    """
    own = network.state_dict()
    loaded: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in state_dict.items():
        theirs = name.removeprefix("module.")
        if theirs.startswith((f"{_ENCODER}head.", f"{_ENCODER}head_dist.")):
            continue
        if theirs.startswith(_ENCODER):
            ours = f"encoder.vit.{theirs.removeprefix(_ENCODER)}"
        else:
            ours = _COSA_RELEASE.get(theirs, "")
        if ours not in own:
            unexpected.append(name)
            continue
        if theirs.endswith("classifier.weight") and tensor.dim() == 4:
            tensor = tensor.flatten(1)
        loaded[ours] = tensor
    missing = sorted(set(own) - set(loaded))
    shapes = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in loaded.items()
        if v.shape != own[k].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if names
    ]
    if problems:
        raise UserError(
            f"Not the published CoSA weights of this network ({'; '.join(problems)}). Check the "
            "backbone and the number of classes."
        )
    network.load_state_dict(loaded)


def import_checkpoint(cfg: DictConfig) -> Path:
    """Write ``cfg.file`` as a checkpoint of ours.

    Args:
        cfg: ``conf/import_checkpoint.yaml`` composed.

    Returns:
        The file written.

    Raises:
        UserError: an unknown source, a file that cannot be read, holds pickled code or is not of
            this network, or unknown class names.
    """
    quiet_libraries()
    if cfg.source not in SOURCES:
        raise UserError(f"source={cfg.source}: no such source. {nearest(cfg.source, SOURCES)}")
    if OmegaConf.is_missing(cfg, "file"):
        raise UserError("file is not set: give the authors' file, for example file=cosa_voc.pth.")
    path = Path(cfg.file).expanduser()
    target = Path(cfg.output or path.with_suffix(".ckpt")).expanduser()
    if target.exists() and not cfg.overwrite:
        raise UserError(f"output='{target}' exists: choose another, or overwrite=true.")
    state = read_tensors(path, cfg.key)
    check_writable(target.parent, "output")
    classifier = next((v for k, v in state.items() if k.endswith("aux_classifier.weight")), None)
    if classifier is None:
        raise UserError(
            f"'{path}' holds no aux_classifier.weight: it is not a checkpoint of CoSA's code."
        )
    classes = class_names(cfg, len(classifier))
    grid_size(cfg, state)
    method = build_method(cfg, build_network(cfg, len(classes), load_weights=False), classes)
    assert isinstance(method, CoSA)
    # The file is one network's: both of ours start from it.
    load_cosa_release(method.network, state)
    method.assignment.load_state_dict(method.network.state_dict())
    content: dict[str, Any] = {
        "state_dict": method.state_dict(),
        "global_step": int(cfg.trainer.max_steps),
    }
    method.on_save_checkpoint(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(target, buffer.getvalue())
    print(
        f"{target}: {len(state)} tensors, {len(classes)} classes ({classes[0]} ... {classes[-1]})"
    )
    print(NOTE)
    return target


NOTE = """\
Which score is which (wsss evaluate checkpoint=...):
  an/seg_given_tags/miou_ms_flip  what the authors' code prints for val, with the classes that an
                                  image does not hold masked: 76.2 on VOC val (76.4 with CRF) and
                                  51.0 on COCO val in the paper
  an/seg/miou_ms_flip             plain segmentation, the only one to compare with other methods;
                                  its val score was not published (VOC test server, which cannot
                                  know an image's classes: 75.1)
  an/cpl/miou_ms_flip             CAM pseudo-labels with known classes: 78.5 VOC train, 76.4 val,
                                  of five scales, perhaps summed; here it is the
                                  maximum over three (cam_scales=[1.0,0.5,1.5,0.75,1.25])"""


def class_names(cfg: DictConfig, count: int) -> tuple[str, ...]:
    """Foreground class names: ``cfg.classes``, the data set's, or VOC's where there are 20.

    Raises:
        UserError: nobody knows them, or their number is another.
    """
    if cfg.classes is not None:
        names = tuple(str(name) for name in cfg.classes)
    elif not OmegaConf.is_missing(cfg.data, "root"):
        names = build_layout(cfg).classes
    elif count == len(VOC_CLASSES):
        names = VOC_CLASSES
    else:
        raise UserError(
            f"the file has {count} classes: name them with classes=[...], or give the data set: "
            "experiment=cosa_coco_release data.root=..."
        )
    if len(names) != count:
        raise UserError(
            f"the file has {count} classes, but {len(names)} are named: {', '.join(names)}."
        )
    return names


def grid_size(cfg: DictConfig, state: Mapping[str, Tensor]) -> None:
    """Set the image size that the file's position embedding is for, where it is a square's."""
    for name, tensor in state.items():
        if not name.endswith("encoder.pos_embed") or tensor.dim() != 3:
            continue
        side = math.isqrt(tensor.shape[1] - 1)
        patches = next((v for k, v in state.items() if k.endswith("patch_embed.proj.weight")), None)
        if side * side == tensor.shape[1] - 1 and patches is not None:
            options = {**cfg.backbone.options, "img_size": side * patches.shape[-1]}
            OmegaConf.update(cfg, "backbone.options", options, force_add=True)


def main() -> None:
    """Console entry point."""
    hydra_command("import_checkpoint", import_checkpoint)


if __name__ == "__main__":
    main()
