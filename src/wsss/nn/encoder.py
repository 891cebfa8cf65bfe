"""Encoders: any patch-based Vision Transformer of timm, on token grids of any shape.

Among them are DeiT, DINOv2, DINOv3, CLIP, SigLIP and EVA. The patches' tokens are read; class and
register tokens take part in the blocks and are then left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import eva
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from wsss.errors import UserError

_UNFUSED_TOKENS = 1024
_HEAD = ("head.", "head_dist.", "fc_norm.", "attn_pool.")


#: models that the published code feeds otherwise than they were pretrained: CoSA's and ToCo's, this
#: one with ImageNet's mean and deviation instead of 0.5
COLOURS = {
    "vit_base_patch16_224.orig_in21k_ft_in1k": {
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
}


class ViTEncoder(nn.Module):
    """A timm ViT that returns its final and an early feature map.

    What would pool the tokens is left out, with one exception: where the only norm after the last
    block comes after the pooling (``fc_norm``, as in EVA), it is the final norm of the tokens.

    Args:
        name: timm model name, e.g. ``vit_base_patch16_224``.
        early_block: block whose tokens are the early features, counted from the end
            (-3 is the 10th of 12) or from the start.
        early_norm: pass the early features through the final norm. The paper does not; but in
            many ViTs a few tokens of the later blocks carry one huge activation, which the norm
            alone takes out, and which otherwise fills the early CAM of the classes it favours.
        pretrained: load timm's own weights from the hub.
        weights: a local ``.safetensors`` or ``.pth`` file of the same timm model; tensors only,
            strict but for the unused head (classifier, norm and attention of the pooling).
        **kwargs: for ``timm.create_model`` (``depth``, ``patch_size``, ``drop_path_rate`` ...).

    Raises:
        UserError: unknown model, a model without patch tokens, ``early_block`` out of range,
            or weights that belong to another model or cannot be fetched.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        early_block: int = -3,
        early_norm: bool = False,
        pretrained: bool = False,
        weights: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.name = name
        self.vit = _create(name, pretrained, **kwargs)
        depth = len(self.vit.blocks)
        if not -depth <= early_block < depth:
            raise UserError(
                f"backbone.early_block={early_block} is outside the {depth} blocks of '{name}': "
                f"choose a value from {-depth} to {depth - 1}."
            )
        self.early_index = early_block % depth
        self.early_norm = early_norm
        self.dim: int = self.vit.embed_dim
        self.early_dim = self.dim
        self.patch_size: tuple[int, int] = tuple(self.vit.patch_embed.patch_size)
        ratio = tuple(self.vit.patch_embed.feat_ratio(as_scalar=False))
        if ratio != self.patch_size:
            raise UserError(
                f"backbone.name='{name}' puts other layers before its patches ({ratio[0]} pixels a "
                f"token, patches of {self.patch_size[0]}): choose a plain ViT."
            )
        self.num_prefix_tokens: int = getattr(self.vit, "num_prefix_tokens", 1)
        # Normalisation is the backbone's own: ViTs of timm differ (0.5/0.5, ImageNet, CLIP).
        colours = self.vit.pretrained_cfg | COLOURS.get(name, {})
        for key in ("mean", "std"):
            value = torch.tensor(colours[key], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(key, value, persistent=False)
        if weights is not None:
            load_backbone_weights(self.vit, name, Path(weights))

    def freeze_position(self) -> None:
        """Leave the position embedding as it is, absolute or rotary; most rotary ones are fixed."""
        if getattr(self.vit, "pos_embed", None) is not None:
            self.vit.pos_embed.requires_grad_(False)
        if getattr(self.vit, "rope", None) is not None:
            self.vit.rope.requires_grad_(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the token grid of an image of that size."""
        return -(-height // self.patch_size[0]), -(-width // self.patch_size[1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of RGB images in [0, 1].

        Args:
            images: (B, 3, H, W); those of a size that the patch does not divide are enlarged to
                the next one that it does (bilinear), so that the grid covers the image and nothing
                else: over padding, maps resized to the image would be out of place.

        Returns:
            Final features after the final norm, and the early block's features (without it,
            unless ``early_norm``); both (B, D, h, w) with h = ceil(H / patch), w = ceil(W / patch).
        """
        x = (images - self.mean) / self.std
        grid = self.grid(images.shape[-2], images.shape[-1])
        whole = grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]
        if x.shape[-2:] != whole:
            x = F.interpolate(x, size=whole, mode="bilinear", align_corners=False)
        self._choose_attention(images, grid[0] * grid[1])
        final, intermediates = self.vit.forward_intermediates(
            x, indices=[self.early_index], norm=False, output_fmt="NLC"
        )
        final = final[:, self.num_prefix_tokens :]
        early = self.vit.norm(intermediates[0]) if self.early_norm else intermediates[0]
        return _to_grid(final, grid), _to_grid(early, grid)

    def _choose_attention(self, images: Tensor, tokens: int) -> None:
        """On a CPU in bf16, torch's fused attention converts to fp32 and back: two plain bf16
        products take half its time. Not for large grids, whose attention matrix is large too."""
        fused = images.device.type != "cpu" or tokens > _UNFUSED_TOKENS
        fused = fused or not torch.is_autocast_enabled("cpu")
        for block in self.vit.blocks:
            if hasattr(getattr(block, "attn", None), "fused_attn"):
                block.attn.fused_attn = fused


def _to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


def require_timm_name(name: str, others: Sequence[str] = ()) -> None:
    """Check that timm knows a model.

    Args:
        name: of the model, with or without the tag of its weights.
        others: names beside timm's to be proposed.

    Raises:
        UserError: it does not; with the nearest names.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, [*others, *timm.list_models()], n=3)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise UserError(f"backbone.name='{name}' is not a timm model.{hint}")


def is_plain_vit(model: nn.Module) -> bool:
    """Whether a timm model has what :class:`ViTEncoder` needs."""
    return not _missing_parts(model)


def _missing_parts(model: nn.Module) -> list[str]:
    parts = ("blocks", "patch_embed", "forward_intermediates")
    return [part for part in parts if not hasattr(model, part)]


def create_timm(name: str, pretrained: bool, **options: Any) -> Any:
    """``timm.create_model``, whose weights come from a hub.

    Raises:
        UserError: they cannot be fetched.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:  # no network, a hub that refuses, a cache without the file
        if not pretrained:
            raise
        raise UserError(
            f"cannot fetch the weights of {name} ({type(error).__name__}): give "
            "backbone.weights=FILE, or backbone.pretrained=false to train from scratch."
        ) from error


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    require_timm_name(name)
    options = {"dynamic_img_size": True} | kwargs
    try:
        vit = create_timm(name, pretrained, num_classes=0, **options)
    except TypeError as error:
        raise UserError(
            f"backbone.name='{name}' does not take {sorted(options)} ({error}): "
            "choose a plain ViT (vit_*, deit_*, eva_*, eva02_*) and options that it has."
        ) from error
    missing = _missing_parts(vit)
    if missing:
        raise UserError(
            f"backbone.name='{name}' has no {', '.join(missing)}: CoSA needs a patch-based Vision "
            "Transformer such as vit_base_patch16_224."
        )
    _remove_head(vit)
    return vit


def _remove_head(vit: Any) -> None:
    """Leave out what pools the tokens: no loss would train it, which DDP takes for a mistake.

    EVA's and other average-pooled ViTs have no norm but the one of the pooled tokens. It is then
    the tokens' own: in EVA's pretraining it was, and what the last block leaves has no fixed scale.
    """
    if isinstance(getattr(vit, "norm", None), nn.Identity):
        vit.norm = getattr(vit, "fc_norm", vit.norm)
    vit.fc_norm = nn.Identity()
    vit.attn_pool = None


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or ``torch.save`` file, without running any pickled code.

    Args:
        path: the file.
        key: where a file holds several state dicts, the one to take; None takes the only one, or
            ``state_dict`` or ``model``.

    Raises:
        UserError: no such file, one that holds something else than plain tensors, or no or several
            state dicts.
    """
    if not path.is_file():
        raise UserError(f"No weights file at '{path}'. Check the path.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"'{path}' is not a readable safetensors file ({error}).") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here: pickle, zip, runtime
        raise UserError(
            f"'{path}' cannot be read as a file of plain tensors ({str(error).splitlines()[0]}). "
            "Files that need pickled code are refused, for such code may do anything. If you trust "
            "its author, save the state dict alone with the program that wrote it, and try again."
        ) from error
    found = _state_dicts(content)
    if key is None:
        usual = [name for name in ("", "state_dict", "model") if name in found]
        key = usual[0] if usual else next(iter(found)) if len(found) == 1 else None
    if key in found:
        return found[key]
    if not found:
        raise UserError(f"'{path}' does not hold a state dict (names to tensors).")
    wanted = "several state dicts" if key is None else f"no state dict '{key}'"
    raise UserError(f"'{path}' holds {wanted}: choose one with key={', key='.join(found)}.")


def _state_dicts(content: Any) -> dict[str, dict[str, Tensor]]:
    """State dicts by their key in a file's content; that of the content itself is empty."""
    if not isinstance(content, dict):
        return {}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {"": content}
    return {
        str(key): value
        for key, value in content.items()
        if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values())
    }


def load_backbone_weights(vit: nn.Module, name: str, path: Path) -> None:
    """Load a local weights file into a timm ViT, strictly.

    The file's head is dropped: the classifier, and the norm and attention of its pooling, but for
    a norm that is the only one after the last block (see :class:`ViTEncoder`). Position embeddings
    of another grid and patch embeddings of another patch size are resampled by timm's own filter,
    which also knows the names that the makers of DINOv2, DINOv3 and EVA give their tensors.

    Raises:
        UserError: the file's tensors are not those of model ``name``.
    """
    load_vit_tensors(vit, read_tensors(path), name, path)


def load_vit_tensors(vit: nn.Module, tensors: Mapping[str, Tensor], name: str, path: Path) -> None:
    """:func:`load_backbone_weights` of tensors that were read from ``path``."""
    convert = eva.checkpoint_filter_fn if isinstance(vit, eva.Eva) else checkpoint_filter_fn
    try:
        with redirect_stdout(StringIO()):  # timm prints of each bias of DINOv3 that is not needed
            state = dict(convert(dict(tensors), cast(Any, vit), interpolation="bicubic"))
    except Exception as error:  # a file of another model fails in many ways: reshape, key, index
        raise UserError(
            f"backbone.weights='{path}' is not a '{name}' ({type(error).__name__}: {error}). "
            "Choose the backbone that the file was made for, or another file."
        ) from error
    if "norm.weight" not in state:
        state = {
            k.removeprefix("fc_") if k.startswith("fc_norm.") else k: v for k, v in state.items()
        }
    state = {k: v for k, v in state.items() if not k.startswith(_HEAD)}
    load_strictly(vit, state, name, path)


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], name: str, path: str | Path
) -> None:
    """Load a state dict whose names and shapes must be the module's own.

    BatchNorm's ``num_batches_tracked`` may be missing, for older files have none.

    Args:
        module: where to.
        state: what to load; floating-point tensors arrive as fp32.
        name: of the model, for the message.
        path: of the file, for the message.

    Raises:
        UserError: a name is missing or too much, or a shape differs.
    """
    own = module.state_dict()
    missing = sorted(k for k in own if k not in state and not k.endswith(".num_batches_tracked"))
    extra = sorted(set(state) - set(own))
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or shapes:
        raise UserError(
            f"backbone.weights='{path}' is not a '{name}': "
            f"{_some('missing', missing)}{_some('not expected', extra)}{_some('shape', shapes)}"
            "Choose the backbone that the file was made for, or another file."
        )
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    module.load_state_dict(own | tensors)


def _some(what: str, names: list[str], shown: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{what}: {', '.join(names[:shown])}{more}; "
