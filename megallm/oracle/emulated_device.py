"""A device that is not the host, on a machine that has none: tensors are told apart by how they
were made.

A tensor made without a `device` lives on the host, as in torch; one that names a device, or comes
from tensors of the device, lives there. Operations across the two fail, and each wait of the host
for the device is noted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megallm.base import extension
from megallm.base.errors import InternalError
from megallm.ops import native

MARK = "on_host"
_FACTORIES = """
tensor zeros ones empty full arange rand randn randint randperm as_tensor linspace eye scalar_tensor
empty_strided tril_indices triu_indices
"""
# What may see tensors of both: copies, and an index, which torch brings over by itself.
_ACROSS = """
copy_ to __setitem__ __getitem__ __set__ _foreach_copy_ set_ backward register_hook type_as equal
__init__ apply stack
"""
_WAITS = """
item tolist __bool__ __int__ __float__ __index__ cpu numpy nonzero masked_select unique
unique_consecutive equal allclose is_nonzero argwhere __contains__ bincount
"""
FACTORIES, ACROSS, WAITS = (frozenset(words.split()) for words in (_FACTORIES, _ACROSS, _WAITS))


class WrongDevice(InternalError):
    """An operation was given tensors of the host and of the device."""


def is_on_host(x: Tensor) -> bool:
    """Returns whether a tensor lives on the host of an emulated device."""
    return MARK in vars(x)


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Yields the tensors in arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_of(value)
    elif isinstance(values, dict):
        yield from tensors_of(list(values.values()))


class EmulatedDevice(TorchFunctionMode):
    """Inside, tensors are of the host or of the device; `waits` are the places where the host
    waited: (operation, file and function of the package).
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.patches = ExitStack()
        self.kernels = "reference"

    def __enter__(self) -> EmulatedDevice:
        self.patches.enter_context(patch.object(torch, "frombuffer", marking(torch.frombuffer)))
        self.patches.enter_context(patch.object(torch, "from_numpy", marking(torch.from_numpy)))
        module = extension.ops()  # its kernels are for hosts, and make tensors that no mode sees
        self.kernels = "reference" if module is None else module.isa()
        native.use_kernels("reference")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patches.close()
        native.use_kernels(self.kernels)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        given = list(tensors_of(args)) + list(tensors_of(kwargs))
        host = [x for x in given if is_on_host(x)]
        device = [x for x in given if not is_on_host(x)]
        # Functions of torch.distributed have rules of their own.
        ours = not isinstance(func, FunctionType) or "distributed" not in func.__module__
        if host and device and ours and name not in ACROSS and any(x.dim() for x in host):
            shapes = [list(x.shape) for x in host], [list(x.shape) for x in device]
            raise WrongDevice(f"{name} of tensors {shapes[0]} of the host and {shapes[1]} not.")
        if device and waits(name, args, kwargs, device):
            self.waits.append((name, _place()))
        result = func(*args, **kwargs)
        if name == "__iter__":
            result = list(result)
        if name == "cpu" and device:
            result = result.clone()
            vars(result)[MARK] = True
            return result
        moved = names_device(name, args, kwargs)
        if moved and host and not device and isinstance(result, Tensor):
            return result.clone() if any(result is x for x in host) else result
        if not moved and (host and not device or not given and name in FACTORIES):
            for x in tensors_of(result):
                vars(x)[MARK] = True
        return iter(result) if name == "__iter__" else result


def marking(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a maker of tensors of the host that tells no mode of what it makes."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        vars(x)[MARK] = True
        return x

    return made


def names_device(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Returns whether a call says on which device its result is to be."""
    if name == "to":
        args = args[1:]
        return kwargs.get("device") is not None or any(
            isinstance(x, (torch.device, str)) or (isinstance(x, Tensor) and not is_on_host(x))
            for x in args
        )
    return kwargs.get("device") is not None


def waits(name: str, args: tuple, kwargs: dict[str, Any], device: list[Tensor]) -> bool:
    """Returns whether the host has to wait for the device to know the result, or its shape."""
    if name in ("__getitem__", "__setitem__"):
        where = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() for x in where)
    if name == "repeat_interleave":
        counts = args[1] if len(args) > 1 else kwargs.get("repeats")
        return isinstance(counts, Tensor) and kwargs.get("output_size") is None
    if name == "where":
        return len(args) == 1
    return name in WAITS


def _place() -> str:
    """Where in the package the operation was asked for."""
    frame = sys._getframe(2)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if "/megallm/" in file and not file.endswith("emulated_device.py"):
            return f"{file.rsplit('/megallm/')[-1]}:{function}"
        frame = frame.f_back
    return ""
