"""From configuration to objects: the one place where config keys meet constructors."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_classes, saved_config
from wsss.cli import config_dir
from wsss.data.datamodule import WSSSDataModule
from wsss.data.layout import Layout
from wsss.errors import UserError
from wsss.methods.base import CHECKPOINT_KEY, Method
from wsss.nn import SavedEncoder, WSSSNetwork

log = logging.getLogger(__name__)

#: options of backbones under which the same weights still mean the same
FREE_OPTIONS = (
    "img_size",
    "dynamic_img_size",
    "output_stride",
    "freeze_bn",
    "freeze_stem",
    "drop_rate",
    "drop_path_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
)


def build_data(cfg: DictConfig, load_masks: bool = False) -> WSSSDataModule:
    """The data module of ``cfg.data``; a generated data set is written first when it is absent.

    Raises:
        UserError: what the constructor finds wrong.
    """
    data = _data_settings(cfg)
    with _readable():
        if load_masks:
            data["load_masks"] = True
        return cast(WSSSDataModule, hydra.utils.instantiate(data, _convert_="all"))


def build_layout(cfg: DictConfig, download: bool = False) -> Layout:
    """The data set of ``cfg.data`` as it lies on disk, fetched first if ``download`` says so.

    Raises:
        UserError: what the constructor finds wrong, or a download that fails or does not exist.
    """
    if download and "generate" in cfg.data:
        raise UserError("download=true: this data set is generated, not fetched.")
    data = _data_settings(cfg)
    with _readable():
        if download:
            options = {k: v for k, v in data["dataset"].items() if not k.startswith("_")}
            kind = cast(type[Layout], hydra.utils.get_class(data["dataset"]["_target_"]))
            data["root"] = kind.download(data["root"], **options)
        dataset = hydra.utils.instantiate(data["dataset"], _convert_="all")
        return cast(Layout, dataset(root=data["root"]))


def _data_settings(cfg: DictConfig) -> dict[str, Any]:
    """``cfg.data`` as plain containers, a generated data set written."""
    if "_target_" not in cfg.data:
        raise UserError(
            "data=from_checkpoint is for commands that read a checkpoint: choose voc, shapes ..."
        )
    if OmegaConf.is_missing(cfg.data.dataset, "_target_"):
        raise UserError("data=base is what all data sets share: choose voc, folder, shapes ...")
    if OmegaConf.is_missing(cfg.data, "root"):
        kind = hydra.utils.get_object(cfg.data.dataset._target_)
        hint = getattr(kind, "root_hint", Layout.root_hint)()
        raise UserError(f"data.root is not set: give {hint}, with data.root=FOLDER.")
    data = cast(dict[str, Any], OmegaConf.to_container(cfg.data, resolve=True))
    generate = data.pop("generate", None)
    with _readable():
        if generate is not None:
            hydra.utils.instantiate(generate)(root=data["root"])
    return data


def build_network(cfg: DictConfig, num_classes: int, load_weights: bool = True) -> WSSSNetwork:
    """The network of ``cfg.backbone``, of the kind that ``cfg.method`` needs.

    Args:
        cfg: with a ``backbone`` and a ``method`` section.
        num_classes: foreground classes.
        load_weights: False leaves pretrained weights out, for a network about to be loaded.

    Raises:
        UserError: parts that the options freeze would stay random, or what the constructor finds.
    """
    backbone = cfg.backbone
    weights = _find_weights(backbone) if load_weights else None
    options = cast(dict[str, Any], OmegaConf.to_container(backbone.options, resolve=True))
    frozen = [key for key in ("freeze_bn", "freeze_stem") if options.get(key)]
    if load_weights and weights is None and not backbone.pretrained and frozen:
        off = " ".join(f"backbone.options.{key}=false" for key in frozen)
        raise UserError(
            f"backbone.weights is not set, and '{backbone.name}' would keep parts of its random "
            f"start ({', '.join(frozen)}): give a weights file or a run, or train from "
            f"scratch with {off}."
        )
    neck = cfg.get("neck") or {}  # checkpoints of versions without necks have none
    decoder = cfg.get("decoder")  # nor a choice of decoders
    return method_class(cfg).network_class(
        backbone.name,
        num_classes,
        neck=hydra.utils.instantiate(neck, _convert_="all") if "_target_" in neck else None,
        decoder=hydra.utils.instantiate(decoder, _convert_="all") if decoder else None,
        early_block=backbone.early_block,
        early_norm=backbone.early_norm,
        pretrained=bool(backbone.pretrained) and weights is None and load_weights,
        weights=weights,
        **options,
    )


def _find_weights(backbone: DictConfig) -> str | SavedEncoder | None:
    """What ``backbone.weights`` means: a weights file, or the encoder of a run."""
    weights = backbone.weights
    if weights is None:
        return None
    file = Path(weights).expanduser()
    if not weights or not file.exists():
        near = f" in '{file.parent}'" if file.parent.is_dir() else ""
        names = difflib.get_close_matches(file.name, _names_beside(file))
        hint = f" There is{near}: {', '.join(names)}." if names else ""
        raise UserError(
            f"backbone.weights='{weights}': no such file, nor a run's folder.{hint} Leave it out "
            "for the weights of timm's hub."
        )
    if not file.is_dir() and file.suffix != ".ckpt":
        return str(file)
    path = find_checkpoint(file, "backbone.weights")
    content = read_checkpoint(path)
    if CHECKPOINT_KEY not in content:  # of another program
        return str(path)
    config = saved_config(content, path)
    _check_same_backbone(backbone, config.backbone, path)
    method = restore_method(content, config, path)
    name = method.network_names[0]
    log.info("Encoder: that of %s (%s)", path, name)
    return SavedEncoder(config.backbone.name, method.networks()[name].encoder_state(), path)


def _names_beside(file: Path) -> list[str]:
    return [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []


def _check_same_backbone(backbone: DictConfig, saved: DictConfig, path: Path) -> None:
    """Refuse options that change what weights mean, which not all show in their shapes.

    Raises:
        UserError: another name, or another value of such an option.
    """
    ours, theirs = (
        {"name": it.name, **{f"options.{k}": v for k, v in it.options.items()}}
        for it in (backbone, saved)
    )
    for key in sorted(ours.keys() | theirs.keys()):
        now, then = (it.get(key, "not set") for it in (ours, theirs))
        if now != then and key.removeprefix("options.") not in FREE_OPTIONS:
            raise UserError(
                f"backbone.weights='{path}' was trained with backbone.{key}={then}; here it is "
                f"{now}. Choose the same backbone, or other weights."
            )


def method_class(cfg: DictConfig) -> type[Method]:
    """The class that ``cfg.method`` names.

    Raises:
        UserError: it names none.
    """
    if cfg.method.get("_target_") is None:
        raise UserError("method=base is what all methods share: choose cosa, unia, cam ...")
    return cast(type[Method], hydra.utils.get_class(cfg.method._target_))


def settings_of(cls: type[Method]) -> set[str]:
    """Names of the keys that ``cfg.method`` may have for a class."""
    names: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(Method) + 1]:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names.update(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return names - {"self", "network", "classes", "addons"}


def leave_out_foreign_settings(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Take out of ``cfg.method`` what an experiment sets for another method than the chosen one.

    ``experiment=cosa_shapes method=supervised`` trains with that experiment's data, size and
    schedule; CoSA's own settings there have no meaning.

    Args:
        cfg: changed in place.
        overrides: the user's, as typed.

    Returns:
        The keys taken out; none unless ``overrides`` choose a method.

    Raises:
        UserError: one of the overrides is not a setting of the chosen method.
    """
    chosen = [o for o in overrides if o.startswith("method=")]
    if not chosen:
        return []
    known = settings_of(method_class(cfg))
    foreign = sorted(str(key) for key in cfg.method if key != "_target_" and key not in known)
    typed = {o.lstrip("+").partition("=")[0] for o in overrides}
    for key in foreign:
        if f"method.{key}" in typed:
            raise UserError(
                f"method.{key} is not a setting of {chosen[-1]}. Leave it out, or choose one of "
                f"{', '.join(sorted(known))}."
            )
    with open_dict(cfg):
        for key in foreign:
            del cfg.method[key]
    return [f"method.{key}" for key in foreign]


def kept_of_experiment(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """What an experiment sets for its own method and another one, chosen instead, takes over.

    ``experiment=cosa_coco method=unia`` trains UniA with the warm-up of CoSA on COCO: that may be
    meant, and has to be seen.

    Args:
        cfg: composed, without foreign settings.
        overrides: the user's, as typed.

    Returns:
        ``method.key=value (its own: default)``; none unless ``overrides`` choose an experiment and
        another method than that one's.
    """
    typed = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)
    experiment, method = typed.get("experiment"), typed.get("method")
    folder = config_dir()
    if method is None or not (folder / "experiment" / f"{experiment}.yaml").is_file():
        return []
    if _method_of(folder / "experiment" / f"{experiment}.yaml") in (None, method):
        return []
    own = _with_bases(folder / "method" / f"{method}.yaml")
    now = cast(dict[Any, Any], OmegaConf.to_container(cfg.method, resolve=False))
    return [
        f"method.{key}={now[key]} (its own: {default})"
        for key, default in own.items()
        if key != "_target_" and f"method.{key}" not in typed and key in now and now[key] != default
    ]


def _with_bases(file: Path) -> dict[Any, Any]:
    """The settings of a choice with those of the choices of its group that it builds on."""
    content = cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.load(file), resolve=False))
    bases = [b for b in content.pop("defaults", []) if isinstance(b, str) and b != "_self_"]
    merged: dict[Any, Any] = {}
    for base in bases:
        merged |= _with_bases(file.with_name(f"{base}.yaml"))
    return merged | content


def _method_of(file: Path) -> str | None:
    """The method that an experiment chooses, itself or through the one it builds on."""
    content = cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.load(file), resolve=False))
    chosen = None
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            chosen = entry.get("override /method", chosen)
        elif entry != "_self_":
            chosen = _method_of(file.with_name(f"{entry}.yaml")) or chosen
    return chosen


def build_method(cfg: DictConfig, network: WSSSNetwork, classes: tuple[str, ...]) -> Method:
    """The method of ``cfg.method`` around a network, with the add-ons of ``cfg.addon``."""
    with _readable():
        chosen = cfg.get("addon") or {}  # checkpoints of versions without add-ons have none
        method = cast(
            Method,
            hydra.utils.instantiate(
                cfg.method,
                network=network,
                classes=classes,
                addons={
                    name: hydra.utils.instantiate(spec, _convert_="all")
                    for name, spec in chosen.items()
                    if spec is not None  # left out by a variant of a sweep
                },
                _convert_="all",
                _recursive_=False,
            ),
        )
    method.run_config = plain_config(cfg)
    return method


def restore_method(checkpoint: dict[str, Any], config: DictConfig, path: str | Path) -> Method:
    """The method of a checkpoint with its weights, in eval mode, on the CPU.

    Args:
        checkpoint: from :func:`~wsss.checkpoints.read_checkpoint`.
        config: its :func:`~wsss.checkpoints.saved_config`, perhaps changed.
        path: for the error.

    Raises:
        UserError: the checkpoint's tensors do not fit the network its configuration describes.
    """
    classes = saved_classes(checkpoint, path)
    network = build_network(config, len(classes), load_weights=False)
    method = build_method(config, network, classes)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split("\n", 2)[:2]).strip()
        raise UserError(
            f"'{path}' does not fit the configuration in the same file ({reason[:300]}). It was "
            "changed, or written by another version of wsss: use that one."
        ) from error
    return method.eval()


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, with the paths of data and weights made absolute."""
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    weights = plain.get("backbone", {}).get("weights")
    if weights and Path(weights).expanduser().exists():
        plain["backbone"]["weights"] = str(Path(weights).expanduser().absolute())
    for key in ("root", "masks"):
        if plain.get("data", {}).get(key) not in (None, "???"):
            plain["data"][key] = str(Path(plain["data"][key]).expanduser().absolute())
    return plain


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their keys with dots."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


class _readable:
    """Turns what constructors raise, also through Hydra, into a UserError of one line."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InstantiationException) and error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, UserError):
            raise error
        if isinstance(error, ValueError | OSError | TypeError):
            raise UserError(str(error)) from error
