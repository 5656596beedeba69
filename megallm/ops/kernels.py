"""Which implementation an operation takes: a kernel of csrc/cuda for tensors on a GPU, else torch.

`megallm._cuda` is a library that registers operations with torch (csrc/cuda/bindings.cpp), built by
setup.py where nvcc is; it is loaded when the first tensor on a GPU asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megallm.base.errors import UsageError

LIBRARY = Path(__file__).parents[1]  # where setup.py puts _cuda*.so
REASON = LIBRARY / "_cuda_not_built.txt"  # why there is none; `setup.py` writes it
NAMESPACE = "megallm_cuda"  # OPERATIONS of csrc/cuda/bindings.cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Mode = Literal["auto", "reference", "native"]


@dataclass
class Kernels:
    """Kernels by type of device. `mode`: "reference" takes none, "native" refuses to run on a GPU
    without them, "auto" takes them where they are.
    """

    mode: Mode = "auto"
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
            raise UsageError(f"Native operations were asked for, but {missing()}.")
        narrow = all(x is None or x.dtype in (first.dtype, torch.float32) for x in tensors)
        return found if narrow else None


KERNELS = Kernels()


def load_built() -> object | None:
    """Returns the operations that setup.py built, or None when it built none for this machine."""
    files = sorted(LIBRARY.glob("_cuda*.so"))
    return load(files[0], NAMESPACE) if files else None


def load(file: Path, namespace: str) -> object:
    """Returns the operations that a library registers as `namespace`. All of them write into
    tensors that the caller made, so that under torch.compile there is nothing to infer.
    """
    torch.ops.load_library(str(file))
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith(f"{namespace}::"):
            torch.library.register_fake(schema.name, _nothing)
    return getattr(torch.ops, namespace)


def _nothing(*arguments: object) -> None:
    """What a fake tensor sees of an operation that returns nothing."""


def missing() -> str:
    """Returns a clause that says why there are no kernels."""
    try:
        reason = " ".join(REASON.read_text(encoding="utf-8").split())
    except OSError:
        reason = "there was no nvcc, or no torch beside it"
    return (
        f"megallm._cuda was not built when megallm was installed ({reason}); with nvcc at hand: "
        "python setup.py build_ext --inplace, or pip install --no-build-isolation ."
    )
