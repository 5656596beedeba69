"""Which implementation an operation takes: a kernel of csrc/cuda for tensors on a GPU, else torch.

`megallm._cuda` is a library that registers operations with torch (csrc/cuda/bindings.cpp), built by
setup.py where nvcc is; it is loaded when the first tensor on a GPU asks for it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megallm.base import extension
from megallm.base.errors import UsageError

NAMESPACE = "megallm_cuda"  # OPERATIONS of csrc/cuda/bindings.cpp
BUILD = "with nvcc, python setup.py build_ext --inplace or pip install --no-build-isolation ."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Kernels:
    """Kernels by type of device. `mode`: "reference" takes none, "native" refuses to run on a GPU
    without them, "auto" takes them where they are.
    """

    mode: Literal["auto", "reference", "native"] = "auto"
    loaded: dict[str, object | None] = field(default_factory=dict)

    def of(self, *tensors: Tensor | None) -> object | None:
        """Returns the operations for tensors of one device, or None when torch's are to be used.

        The first one says what the kernel computes in: float64 is left to torch.
        """
        first = tensors[0]
        if first.device.type == "cuda" and "cuda" not in self.loaded:
            self.loaded["cuda"] = load_built()
        found = self.loaded.get(first.device.type)
        if self.mode == "reference" or first.dtype not in DTYPES:
            return None
        if found is None and self.mode == "native" and first.device.type == "cuda":
            raise UsageError(f"Native operations were asked for, but {unbuilt()}.")
        narrow = all(x is None or x.dtype in (first.dtype, torch.float32) for x in tensors)
        return found if narrow else None


KERNELS = Kernels()


def load_built() -> object | None:
    """Returns the operations that setup.py built, or None when it built none or those are stale."""
    found = extension.cuda()
    if not found.loaded or version_of(Path(found.detail)) != extension.CUDA_VERSION:
        return None
    return load(Path(found.detail), NAMESPACE)


def version_of(library: Path) -> int:
    """Returns the version that a library says it has, which loads it."""
    return ctypes.CDLL(str(library.resolve())).megallm_cuda_version()


def load(library: Path, namespace: str) -> object:
    """Returns the operations that a library registers as `namespace`. All of them write into
    tensors that the caller made, so that under torch.compile there is nothing to infer.
    """
    torch.ops.load_library(str(library))
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith(f"{namespace}::"):
            torch.library.register_fake(schema.name, _nothing)
    return getattr(torch.ops, namespace)


def _nothing(*arguments: object) -> None:
    """What a fake tensor sees of an operation that returns nothing."""


def unbuilt() -> str:
    """Returns a clause that says why there are no kernels."""
    found = extension.cuda()
    if found.loaded:
        return f"{found.detail} is a stale build (not of version {extension.CUDA_VERSION}): {BUILD}"
    return f"{found.name} was {found.detail}: {BUILD}"
