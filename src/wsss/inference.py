"""A trained network, ready to look at images: what the commands after training share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsss.build import restore_method
from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_config
from wsss.data.batch import to_unit_range
from wsss.errors import UserError
from wsss.methods.base import Method
from wsss.nn import WSSSNetwork
from wsss.pseudo import MultiScaleOutput, multi_scale

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
#: Lightning's other names of the same
PRECISION_ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def precision_name(value: object, key: str = "precision") -> str:
    """The one of :data:`PRECISIONS` that a value means; ``bf16``, ``16`` and ``32`` are aliases.

    Args:
        value: as typed; a number too.
        key: its name, for the message.

    Raises:
        UserError: none of them.
    """
    name = PRECISION_ALIASES.get(str(value), str(value))
    if name not in PRECISIONS:
        raise UserError(f"{key}='{value}': choose one of {', '.join(PRECISIONS)}.")
    return name


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16. One that emulates it takes up to ten times as long as
    in float32: processors without AMX or AVX-512 BF16, GPUs before Ampere.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Not in every torch. ARM's instructions are left out: untried, and float32 is fast there.
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return True


def precision_on(device: torch.device, value: object, key: str = "precision") -> str:
    """The precision that a value means on a device.

    Args:
        device: to compute on.
        value: as :func:`precision_name` takes it; ``auto`` is ``bf16-mixed`` where the device
            computes in bfloat16, else ``32-true``.
        key: its name, for the message.

    Raises:
        UserError: no such precision.
    """
    name = precision_name(value, key)
    if name == "auto":
        return "bf16-mixed" if has_bf16(device) else "32-true"
    return name


def precision_after(training: object, device: torch.device) -> str:
    """What a trained network is used in where nobody chose: the precision of its training, or
    ``32-true`` if that is bfloat16 and the device would have to emulate it.

    Raises:
        UserError: no such precision.
    """
    name = precision_on(device, training, "trainer.precision")
    return "32-true" if name == "bf16-mixed" and not has_bf16(device) else name


class Inference:
    """One network of a checkpoint at its multi-scale protocol.

    Args:
        method: with its weights.
        network: name of one of its networks (``an``, ``on``); None takes the one to deploy.
        device: ``cpu``, ``cuda``, ``cuda:1`` ... or ``auto``: the first GPU, else the CPU.
        precision: ``32-true``, ``bf16-mixed``, ``16-mixed`` or an alias of one, or ``auto``
            (:func:`precision_on`).
        scales: of the segmentation logits, with flips; None takes the method's.
        cam_scales: of the CAMs, with flips; None takes the method's.

    Attributes:
        classes: C foreground class names; class i has label i + 1.
        size: side of the square that the run's evaluation resizes images to.
        has_segmentation, has_cam, has_early_cam: what the method trains.

    Raises:
        UserError: no such network, device or precision.
    """

    def __init__(
        self,
        method: Method,
        network: str | None = None,
        device: str = "auto",
        precision: str = "32-true",
        scales: Sequence[float] | None = None,
        cam_scales: Sequence[float] | None = None,
    ) -> None:
        networks = method.networks()
        if network is not None and network not in networks:
            raise UserError(f"network='{network}': this method has {', '.join(networks)}.")
        self.device = find_device(device)
        self.precision = precision_on(self.device, precision)
        self.method = method
        self.network_name = network or next(iter(networks))
        self.network: WSSSNetwork = networks[self.network_name].to(self.device).eval()
        self.scales = tuple(scales or method.eval_scales)
        self.cam_scales = tuple(cam_scales or method.cam_scales)
        self.classes = method.classes
        self.has_segmentation = method.evaluates_segmentation
        self.has_cam = method.evaluates_cam
        self.has_early_cam = method.evaluates_early_cam
        self.size = int(method.run_config["data"]["eval_size"])

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        network: str | None = None,
        device: str = "auto",
        precision: str | None = None,
        scales: Sequence[float] | None = None,
        cam_scales: Sequence[float] | None = None,
    ) -> Inference:
        """From a checkpoint file or a run's folder; ``precision=None`` is :func:`precision_after`
        its training.

        Raises:
            UserError: what :func:`~wsss.checkpoints.read_checkpoint`,
                :func:`~wsss.build.restore_method` and the constructor find wrong.
        """
        path = find_checkpoint(checkpoint)
        content = read_checkpoint(path)
        config = saved_config(content, path)
        method = restore_method(content, config, path)
        precision = precision or precision_after(config.trainer.precision, find_device(device))
        return cls(method, network, device, precision, scales, cam_scales)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        segmentation: bool = True,
        cam: bool = True,
        labels: Tensor | None = None,
    ) -> MultiScaleOutput:
        """Multi-scale, flipped inference of images at the inference size.

        Args:
            images: (B, 3, H, W) RGB, uint8 or float in [0, 1], on any device.
            segmentation: compute the segmentation logits.
            cam: compute the CAMs.
            labels: (B, C) 0/1; see :func:`~wsss.pseudo.multi_scale`.

        Returns:
            On :attr:`device`, at the size of ``images``.
        """
        with self._autocast():
            return multi_scale(
                self.network,
                to_unit_range(images.to(self.device)),
                self.scales,
                cam_scales=self.cam_scales if cam else (),
                labels=None if labels is None else labels.to(self.device),
                decode=segmentation and self.has_segmentation,
            )

    def _autocast(self) -> AbstractContextManager[None]:
        if self.precision == "32-true":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)


def accelerator_name(name: str, key: str) -> str:
    """Lightning's name of an accelerator; ``auto`` leaves out Apple's GPU, which has no float64:
    thresholds and scores are summed in it.

    Args:
        name: as the user typed it.
        key: whose value it is, for the error.

    Raises:
        UserError: Apple's GPU.
    """
    if name == "auto" and torch.backends.mps.is_available():
        return "cpu"
    if str(name).partition(":")[0] == "mps":
        raise UserError(f"{key}={name}: Apple's GPU has no float64, which is needed: choose cpu.")
    return name


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, else the CPU.

    Raises:
        UserError: unknown, or not on this machine.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        found = accelerator or torch.device("cpu")
        return torch.device("cpu") if found.type == "mps" else found
    accelerator_name(name, "device")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device='{name}' is not on this machine ({str(error).splitlines()[0]}): choose cpu, "
            "cuda or auto."
        ) from error
    return device
