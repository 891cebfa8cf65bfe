"""A device that is none: tensors that say they are on a GPU, computed by the CPU.

It finds what a CPU forgives and a GPU does not: an operation on tensors of two devices, a tensor
made on the CPU by default, NumPy on a tensor of the device; and it counts where the host waits.
``torch.cuda`` and its kernels are not touched.

The device takes the place of PyTorch's out-of-tree backend for the whole process, so that it
belongs into a process of its own.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import wsss

NAME = "pretend"
ATEN = torch.ops.aten
#: these take tensors of two devices on a GPU, too
COPIES = {ATEN.copy_.default, ATEN._to_copy.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}
#: these have a result that the host needs
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default}


def register() -> None:
    """Make PyTorch know the device."""

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())


class OnDevice(Tensor):
    """A tensor of the device; ``host`` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # that of Tensor is no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    # Python's conversions, which subclasses do not get from the operations.
    def tolist(self) -> Any:
        WAITED[place()] += 1
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"numpy() of a tensor on {NAME}: .cpu() first")
        return self.host.numpy()

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]  # without its options
        return torch.tensor(data, dtype=self.dtype, device=self.device)


#: lines of the package at which the host waited, and how often
WAITED: Counter[str] = Counter()


PACKAGE = f"{Path(wsss.__file__).parent}{os.sep}"


def places(stack: traceback.StackSummary) -> list[str]:
    """Its lines of the package, the innermost last, as ``pseudo/labels.py:52``."""
    return [
        f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno}"
        for frame in stack
        if frame.filename.startswith(PACKAGE)
    ]


def place() -> str:
    """The line of the package that is running."""
    return (places(traceback.extract_stack()) or ["?"])[-1]


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation by the CPU, with the device that its result would be on."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_device = any(isinstance(x, OnDevice) for x in tensors)
    alone = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim > 0]
    if func in INDEXED:  # indices may be on the CPU
        alone = [x for x in alone if x is args[0] or (len(args) > 2 and x is args[2])]
    if on_device and alone and func not in COPIES:
        raise RuntimeError(f"{func}: {tuple(alone[0].shape)} is on the CPU, others on {NAME}")
    if on_device and func in WAITS:
        WAITED[place()] += 1

    wanted = kwargs.get("device")
    if wanted is not None:
        on_device = torch.device(wanted).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    owner: dict[int, OnDevice] = {}

    def unwrap(x: Any) -> Any:
        if not isinstance(x, OnDevice):
            return x
        owner[id(x.host)] = x
        return x.host

    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if func is ATEN.copy_.default:
        return args[0]

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        own = owner.get(id(x))  # of an operation in place
        return own if own is not None else (OnDevice(x) if on_device else x)

    return tree_map(wrap, result)


class _Factories(TorchDispatchMode):
    """Operations without a tensor of the device among their arguments."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})


@contextmanager
def running() -> Iterator[None]:
    """Where tensors of the device are made and computed with."""
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = plain(data, **kwargs)  # with a device, it goes past all modes
        return made if device is None else made.to(device)

    with mock.patch.object(torch, "tensor", tensor), _Factories():
        yield


def move(module: nn.Module) -> None:
    """All parameters and buffers to the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
        for name in getattr(part, "_defaults", ()):  # states of torchmetrics
            if isinstance(state := getattr(part, name), Tensor):
                setattr(part, name, OnDevice(state))
        if isinstance(getattr(part, "_device", None), torch.device):  # Lightning's, torchmetrics'
            part._device = torch.device(NAME, 0)  # type: ignore[assignment]
