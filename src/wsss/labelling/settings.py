"""What the command ``pseudo_label`` can be asked for, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from wsss.cli import nearest
from wsss.errors import UserError
from wsss.inference import Inference
from wsss.labelling.affinity import AffinityRun
from wsss.labelling.folder import Settings
from wsss.labelling.recipe import REFINEMENTS, SOURCES, Recipe
from wsss.methods.base import Method
from wsss.pseudo import CRF_PRESETS, dense_crf

#: of affinity_logt: a million steps leave nothing but means
MAX_LOGT = 20
KINDS = {"cpl": ("cpl",), "spl": ("spl",), "both": ("cpl", "spl")}


def check_choices(cfg: DictConfig) -> None:
    """Refuse values that make no sense before anything is read.

    Raises:
        UserError: names the key.
    """
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise UserError(
            "checkpoint is not set: give a run's folder or file, for example "
            "checkpoint=outputs/.../checkpoints/best.ckpt."
        )
    for key, known in (("labels", KINDS), ("source", SOURCES), ("refine", REFINEMENTS)):
        if cfg[key] not in known:
            raise UserError(f"{key}={cfg[key]}: no such choice. Choose {', '.join(known)}.")
    for key in ("cam", "overwrite"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]}: give true or false.")
    if cfg.crf is not None and cfg.refine != "crf":
        raise UserError(f"crf={cfg.crf} says how refine=crf works, but refine={cfg.refine}.")
    if cfg.crf is not None and cfg.crf not in CRF_PRESETS:
        raise UserError(f"crf={cfg.crf}: no such preset. {nearest(str(cfg.crf), CRF_PRESETS)}")
    if cfg.refine == "crf":  # is the extra installed?
        dense_crf(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1, 1), np.float32))
    _check_affinity(cfg)
    band = cfg.low is not None or cfg.high is not None
    if band and (cfg.low is None or cfg.high is None or cfg.threshold is not None):
        raise UserError(
            f"low={cfg.low}, high={cfg.high}, threshold={cfg.threshold}: give both low and high, "
            "or threshold alone."
        )
    if cfg.alpha is not None and (band or cfg.threshold is not None):
        raise UserError(
            f"alpha={cfg.alpha} takes the place of thresholds: leave out low, high and threshold."
        )
    alphas(cfg.alpha)
    for key in ("low", "high", "threshold"):
        value = cfg[key]
        if value is None or (key == "threshold" and value == "dynamic"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            also = ", or dynamic" if key == "threshold" else ""
            raise UserError(f"{key}={value}: give a number between 0 and 1{also}.")
    if band and cfg.low > cfg.high:
        raise UserError(f"low={cfg.low} is above high={cfg.high}: exchange them.")
    part_of(cfg.shard)


def _check_affinity(cfg: DictConfig) -> None:
    """Refuse settings of ``refine=affinity`` that make no sense.

    Raises:
        UserError: names the key.
    """
    if (cfg.refine == "affinity") != (cfg.affinity is not None):
        raise UserError(
            f"refine={cfg.refine}, affinity={cfg.affinity}: give both refine=affinity and "
            "affinity=..., the run of method=affinity_net to refine with, or neither."
        )
    if cfg.refine == "affinity" and cfg.labels != "cpl":
        raise UserError(
            f"labels={cfg.labels}: refine=affinity is of the CPL alone; use labels=cpl."
        )
    if not _is_number(cfg.affinity_beta) or not cfg.affinity_beta > 0:
        raise UserError(f"affinity_beta={cfg.affinity_beta}: give a positive number.")
    logt = cfg.affinity_logt
    if isinstance(logt, bool) or not isinstance(logt, int) or not 0 <= logt <= MAX_LOGT:
        raise UserError(
            f"affinity_logt={logt}: give a whole number from 0 to {MAX_LOGT}, the logarithm to "
            "base 2 of the number of steps."
        )


def alphas(value: Any) -> tuple[float, ...]:
    """The powers of ``alpha``: none, one, or two with the smaller first.

    Raises:
        UserError: others.
    """
    if value is None:
        return ()
    powers = list(value) if OmegaConf.is_list(value) or isinstance(value, list) else [value]
    fine = all(_is_number(power) and 0 < power < math.inf for power in powers)
    if not fine or len(powers) not in (1, 2) or sorted(set(powers)) != powers:
        raise UserError(
            f"alpha={value}: give one positive number, or two with the smaller first, for example "
            "[4,24]."
        )
    return tuple(float(power) for power in powers)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def part_of(shard: str | None) -> slice:
    """The images of shard ``i/n``, counted from 1: every n-th.

    Raises:
        UserError: it is none.
    """
    if shard is None:
        return slice(None)
    match = re.fullmatch(r"(\d+)/(\d+)", str(shard))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"shard={shard}: give i/n with i from 1 to n, for example shard=1/4.")
    return slice(int(match[1]) - 1, None, int(match[2]))


def choose_kinds(cfg: DictConfig, inference: Inference) -> list[str]:
    """Kinds of files to write.

    Raises:
        UserError: the method does not train what they are made of.
    """
    name = inference.method.short_name()
    if not inference.has_cam and not inference.has_segmentation:
        raise UserError(
            f"checkpoint={cfg.checkpoint}: its method, {name}, trains neither CAMs nor a "
            "segmentation. A run of affinity_net refines the CAMs of another one: checkpoint=RUN "
            "refine=affinity affinity=AFFINITY_RUN."
        )
    kinds = [*KINDS[cfg.labels], *(["cam"] if cfg.cam else [])]
    if not inference.has_cam and kinds != ["spl"]:
        raise UserError(
            f"labels={cfg.labels}, cam={cfg.cam}: this checkpoint's method, {name}, trains no "
            "CAMs: use labels=spl cam=false."
        )
    if not inference.has_early_cam and cfg.source != "cam":
        raise UserError(
            f"source={cfg.source}: this checkpoint's method, {name}, trains no early CAM: use "
            "source=cam."
        )
    if not inference.has_segmentation and "spl" in kinds:
        raise UserError(
            f"labels={cfg.labels}: this checkpoint's method, {name}, trains no segmentation: use "
            "labels=cpl."
        )
    return kinds


def choose_recipe(cfg: DictConfig, method: Method, affinity: AffinityRun | None = None) -> Recipe:
    """How the labels are made, thresholds as numbers.

    Args:
        cfg: ``conf/pseudo_label.yaml`` composed.
        method: whose CAMs are cut.
        affinity: of ``refine=affinity``.

    Raises:
        UserError: ``threshold=dynamic``, and the method learned none.
    """
    low, high = cfg.low, cfg.high
    if cfg.threshold == "dynamic":
        low, high = learned_thresholds(method, cfg.source)
    elif low is None:
        low = high = cfg.threshold or method.run_config["method"]["cpl_threshold"]
    presets = {"cpl_crf": cfg.crf, "spl_crf": cfg.crf} if cfg.crf else {}
    return Recipe(
        cfg.source,
        float(low),
        float(high),
        cfg.refine,
        alpha=alphas(cfg.alpha),
        affinity=affinity,
        **presets,
    )


def learned_thresholds(method: Method, source: str) -> tuple[float, float]:
    """Low and high threshold as training left them; equal where the method has one.

    Those of the ensemble are the means of both CAMs'.

    Raises:
        UserError: there is none.
    """
    names = {"cam": ["threshold"], "early_cam": ["early_threshold"]}
    pairs = []
    for name in names.get(source, ["threshold", "early_threshold"]):
        found = getattr(method, name, None)
        fitted = getattr(found, "fitted", None)  # thresholds that are fixed have none
        if found is None or fitted is None:
            raise UserError(
                "threshold=dynamic: this checkpoint's method learns no threshold. Give a number, "
                "for example threshold=0.5."
            )
        if not fitted:
            raise UserError(
                "threshold=dynamic: this checkpoint was written before the first threshold was "
                "fitted. Give a number, or take a later checkpoint."
            )
        values = found.value.flatten().tolist()
        pairs.append((values[0], values[-1]))
    low, high = (sum(values) / len(values) for values in zip(*pairs, strict=True))
    return low, high


def describe(inference: Inference, recipe: Recipe, kinds: Sequence[str]) -> Settings:
    """What decides the content of each kind of files, besides checkpoint and data."""
    cam = {"source": recipe.source, "cam_scales": inference.cam_scales}
    refine = {"refine": recipe.refine}
    crf = recipe.refine == "crf"
    cut = {"alpha": recipe.alpha} if recipe.alpha else {"low": recipe.low, "high": recipe.high}
    spread = {} if recipe.affinity is None else recipe.affinity.settings()
    settings: dict[str, dict[str, Any]] = {
        "cpl": cam | cut | refine | spread | ({"crf": recipe.cpl_crf} if crf else {}),
        "spl": {"eval_scales": inference.scales}
        | refine
        | ({"crf": recipe.spl_crf} if crf else {}),
        "cam": cam,
    }
    return {kind: settings[kind] for kind in kinds}
