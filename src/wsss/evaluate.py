"""Score a checkpoint: ``python -m wsss.evaluate checkpoint=.../best.ckpt``.

Every network of the method under every protocol in one pass over the images. Writes
``scores.json``, ``scores.csv``, ``scores.md``, ``images.csv`` and pictures. Of a split without
masks, such as VOC's test split, it writes the zip for the evaluation server instead; with
``masks=folder`` it scores mask files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from wsss.build import build_data, restore_method
from wsss.callbacks.pictures import PictureLogger
from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_config, with_data
from wsss.cli import hydra_command, nearest, quiet_libraries
from wsss.data.datamodule import WSSSDataModule
from wsss.errors import UserError
from wsss.files import check_writable
from wsss.inference import (
    Inference,
    accelerator_name,
    find_device,
    precision_after,
    precision_on,
)
from wsss.loggers import make_wandb_logger, wandb_run_ends
from wsss.mask_folder import score_masks
from wsss.methods.base import Method, check_classes
from wsss.methods.checks import check_scales, check_threshold
from wsss.metrics.protocols import (
    CAM_PROTOCOLS,
    CRF_PROTOCOLS,
    SEGMENTATION_PROTOCOLS,
    ProtocolScores,
)
from wsss.progress import TrainProgress
from wsss.pseudo import CRF_PRESETS, dense_crf
from wsss.report.tables import (
    class_rows,
    collect,
    print_scores,
    write_class_tables,
    write_image_scores,
    write_scores,
)
from wsss.submission import write_submission

PROTOCOLS = (*SEGMENTATION_PROTOCOLS, *CRF_PROTOCOLS, *CAM_PROTOCOLS)
#: settings of the protocols; neither a folder of masks nor an affinity network has any
OF_PROTOCOLS = ("protocols", "eval_scales", "cam_scales", "cpl_threshold", "crf", "coexistence")


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Score ``cfg.checkpoint``, or the masks in ``cfg.masks``.

    Args:
        cfg: ``conf/evaluate.yaml`` composed.

    Returns:
        Scores in [0, 1] by full name, for example ``an/seg/miou_ms_flip``; empty where a zip was
        written.

    Raises:
        UserError: no such checkpoint, one of other classes than the data, an unknown preset,
            protocol, network or class, or bad data.
    """
    quiet_libraries()
    check_choices(cfg)
    if cfg.masks is not None:
        return evaluate_masks(cfg)
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise UserError(
            "checkpoint is not set: give a run's folder or file, for example "
            "checkpoint=outputs/.../checkpoints/best.ckpt."
        )
    path = find_checkpoint(cfg.checkpoint)
    output_dir = Path(cfg.output_dir or default_folder(cfg, path)).expanduser()
    check_writable(output_dir)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    # Wrong names are told before the data set is looked at, which may take minutes.
    checkpoint = read_checkpoint(path)
    run = merge(saved_config(checkpoint, path), cfg)
    method = restore_method(checkpoint, run, path)
    choose_networks(method, as_names(cfg.networks))
    if not method.scores:
        refuse_idle(cfg, OF_PROTOCOLS, f"{path} is of method={method.short_name()}")
    coexistence = class_numbers(as_names(cfg.coexistence), method.classes)
    for scores in method.scores.values():
        set_up(cast(ProtocolScores, scores), cfg, coexistence)
    data = open_data(run, originals=cfg.crf is not None)
    check_classes(checkpoint, data.classes, str(path))
    if not data.has_masks:
        submit(method, data, output_dir, cfg, run.trainer.precision)
        return {}

    with wandb_run_ends():
        return _evaluate(cfg, run, method, data, output_dir, checkpoint.get("global_step", 0))


def _evaluate(
    cfg: DictConfig,
    run: DictConfig,
    method: Method,
    data: WSSSDataModule,
    output_dir: Path,
    step: int,
) -> dict[str, float]:
    wandb = make_wandb_logger(cfg, output_dir)
    trainer = make_trainer(cfg, run.trainer.precision, output_dir, wandb, step)
    trainer.validate(method, datamodule=data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        print_scores(method)  # first: what is on the terminal survives a full disk
        content = collect(method, step)
        try:
            write_scores(output_dir / "scores.json", method, step)
            write_image_scores(output_dir / "images.csv", method)
            write_class_tables(output_dir, content)
        except OSError as error:
            raise UserError(
                f"output_dir='{output_dir}' cannot be written ({error.strerror}). The files that "
                "are there are whole; choose another folder with output_dir=..."
            ) from error
        if wandb is not None:
            log_tables(wandb, found, content)
        print(f"Written to {output_dir}")
    return found


def default_folder(cfg: DictConfig, checkpoint: Path) -> Path:
    """``evaluation`` in the run's folder; of another checkpoint than the best, other data, another
    split or a CRF a folder of its own, so that one evaluation does not replace another."""
    folder = checkpoint.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    others = {"best.ckpt", checkpoint.name} <= {path.name for path in folder.glob("*.ckpt")}
    # A root that is not set is told where the data are opened.
    root = OmegaConf.select(cfg, "data.root") if "_target_" in cfg.data else None
    parts = [
        checkpoint.stem if others and checkpoint.name != "best.ckpt" else None,
        None if root is None else Path(root).name,
        None if cfg.split is None else Path(cfg.split).stem,  # which may be the path of a list
        cfg.crf,
    ]
    return run / "_".join(["evaluation", *filter(None, parts)])


def evaluate_masks(cfg: DictConfig) -> dict[str, float]:
    """Score the masks in ``cfg.masks``; see :func:`wsss.mask_folder.score_masks`.

    Raises:
        UserError: no such folder, no data set, a checkpoint too or settings of one, or what
            ``score_masks`` raises.
    """
    folder = Path(cfg.masks).expanduser()
    if not folder.is_dir():
        raise UserError(f"masks='{folder}': no such folder.")
    if not OmegaConf.is_missing(cfg, "checkpoint"):
        raise UserError("masks and checkpoint are both set: score one after the other.")
    refuse_idle(cfg, ("networks", *OF_PROTOCOLS), "masks=... is scored as it is")
    if "_target_" not in cfg.data:
        raise UserError(
            "masks=... needs the data set that the masks belong to: data=voc data.root=..."
        )
    if cfg.split is not None:
        cfg.data.val_split = cfg.split
    beside = folder.absolute().with_name(f"{folder.absolute().name}_scores")
    output_dir = Path(cfg.output_dir or beside).expanduser()
    check_writable(output_dir)
    return score_masks(folder, open_data(cfg, originals=False), output_dir, cfg.boundary)


def refuse_idle(cfg: DictConfig, keys: Iterable[str], why: str) -> None:
    """Refuse settings that would do nothing.

    Raises:
        UserError: one of ``keys`` is set.
    """
    for key in keys:
        if cfg[key] is not None and cfg[key] != []:
            raise UserError(f"{why}, and {key}={cfg[key]} would do nothing: leave it out.")


def as_names(value: Any) -> tuple[str, ...]:
    """A list of the configuration; null is empty, and a name alone a list of one."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def check_choices(cfg: DictConfig) -> None:
    """Refuse settings that cannot be before anything is read.

    Raises:
        UserError: an unknown CRF preset or protocol, with the nearest right one; a CRF without its
            package; scales or a threshold that are none.
    """
    if cfg.crf is not None and cfg.crf not in CRF_PRESETS:
        raise UserError(f"crf={cfg.crf}: no such preset. {nearest(str(cfg.crf), CRF_PRESETS)}")
    if cfg.crf is not None:  # is the extra installed?
        dense_crf(torch.zeros(1, 1, 3, dtype=torch.uint8), torch.ones(1, 1, 1), cfg.crf)
    for name in as_names(cfg.protocols):
        if name not in PROTOCOLS:
            raise UserError(f"protocols: no '{name}'. {nearest(name, PROTOCOLS)}")
        if name in CRF_PROTOCOLS and cfg.crf is None:
            raise UserError(f"protocols: '{name}' needs a preset, for example crf=cosa.")
    for key in ("eval_scales", "cam_scales"):
        if cfg[key] is not None:
            check_scales(key, cfg[key])
    if cfg.cpl_threshold is not None:
        check_threshold("cpl_threshold", cfg.cpl_threshold)


def class_numbers(names: Iterable[str], classes: Sequence[str]) -> tuple[int, ...]:
    """Mask values of class names.

    Raises:
        UserError: a name that is no class; names the nearest right one.
    """
    for name in names:
        if name not in classes:
            raise UserError(f"coexistence: no class '{name}'. {nearest(name, classes)}")
    return tuple(dict.fromkeys(classes.index(name) + 1 for name in names))


def choose_networks(method: Method, names: Sequence[str]) -> None:
    """Leave out the networks that ``names`` does not name; an empty list keeps all.

    Raises:
        UserError: the method has no such network.
    """
    known = list(method.networks())
    for name in names:
        if name not in known:
            raise UserError(f"networks: no '{name}'. {nearest(name, known)}")
    for name in set(known) - set(names or known):
        del method.scores[name]


def set_up(scores: ProtocolScores, cfg: DictConfig, coexistence: tuple[int, ...]) -> None:
    """What the command asks of one network's scores.

    Raises:
        UserError: the method lacks one of the protocols.
    """
    scores.crf = cfg.crf
    scores.boundary = cfg.boundary
    scores.coexistence = coexistence
    scores.chosen = None
    scores.reset()
    known, wanted = scores.protocols, as_names(cfg.protocols)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"protocols: this checkpoint's method does not train what '{name}' scores. It has: "
                f"{', '.join(known)}."
            )
    scores.chosen = wanted or None
    scores.reset()


def open_data(run: DictConfig, originals: bool) -> WSSSDataModule:
    """The data module with its evaluation split opened.

    Raises:
        UserError: the data set cannot be read.
    """
    if "_target_" in run.data:  # else build_data says what is wrong
        run.data.load_originals = originals
    data = build_data(run)
    try:
        data.setup("validate")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return data


def merge(saved: DictConfig, cfg: DictConfig) -> DictConfig:
    """The training run's configuration with what the command changes."""
    run = with_data(saved, cfg.data)
    if cfg.split is not None:
        run.data.val_split = cfg.split
    for key in ("eval_scales", "cam_scales", "cpl_threshold"):
        if cfg[key] is not None:
            run.method[key] = cfg[key]
    device = find_device("cpu" if cfg.accelerator == "cpu" else "auto")
    if cfg.precision is None:
        run.trainer.precision = precision_after(run.trainer.precision, device)
    else:
        run.trainer.precision = precision_on(device, cfg.precision)
    return run


def make_trainer(
    cfg: DictConfig, precision: str, output_dir: Path, wandb: WandbLogger | None, step: int
) -> L.Trainer:
    """The Lightning trainer that runs the validation.

    Raises:
        UserError: a device or precision that is not there.
    """
    callbacks: list[L.Callback] = [TrainProgress()]
    if cfg.pictures:
        callbacks.append(PictureLogger(output_dir / "pictures", cfg.pictures, step))
    try:
        return L.Trainer(
            accelerator=accelerator_name(cfg.accelerator, "accelerator"),
            devices=cfg.devices,
            precision=precision,  # type: ignore[arg-type]
            use_distributed_sampler=False,
            logger=wandb or False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
    except (ValueError, MisconfigurationException) as error:
        raise UserError(
            f"accelerator={cfg.accelerator}, devices={cfg.devices}, precision={precision}: "
            f"{str(error).strip()}"
        ) from error


def submit(
    method: Method, data: WSSSDataModule, output_dir: Path, cfg: DictConfig, precision: str
) -> None:
    """Write the evaluation server's zip of a split without masks.

    Raises:
        UserError: the data set is not VOC, two networks were asked for, or the method has no
            segmentation.
    """
    if not method.run_config["data"]["dataset"]["_target_"].endswith(".VOC"):
        raise UserError(
            f"split '{data.val_split}' of {data.root} has no masks: there is nothing to score. "
            "Choose another with split=..., or write masks of images with wsss predict."
        )
    if len(as_names(cfg.networks)) > 1:
        raise UserError("networks: the zip holds the masks of one network, for example [an].")
    device = "cpu" if cfg.accelerator == "cpu" else "auto"
    inference = Inference(method, next(iter(method.scores), None), device, precision)
    # The split may be the path of a list.
    parts = ["voc2012", Path(data.val_split).stem, *as_names(cfg.networks), cfg.crf]
    target = output_dir / f"{'_'.join(filter(None, parts))}.zip"
    write_submission(inference, data, target, cfg.crf)


def log_tables(logger: WandbLogger, scores: dict[str, float], content: dict[str, Any]) -> None:
    """The scores as the W&B run's summary, and a table of what classes make of them, in percent.

    The summary is in [0, 1], as a training run logs scores of the same names.
    """
    logger.experiment.summary.update(scores)
    columns, *rows = class_rows(content)
    logger.log_table("classes", columns=columns, data=rows)


def main() -> None:
    """Console entry point."""
    hydra_command("evaluate", evaluate)


if __name__ == "__main__":
    main()
