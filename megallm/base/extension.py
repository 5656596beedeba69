"""Loads the C++ extensions `megallm._index`, `megallm._ops` and `megallm._collectives`, and says
why when it cannot.

Nothing depends on them: every function of the first one has a numpy twin with the same bits next to
its caller, those of the second one a twin in torch with the same results to rounding, and gloo does
what the third does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from megallm.base.errors import UsageError

MODULE = "megallm._index"
REASON = (
    Path(__file__).parents[1] / "_index_not_built.txt"
)  # why the build failed; `setup.py` writes it
VERSION = 3  # must equal VERSION in csrc/index/index.cpp, so that a stale build is never used
OPS, OPS_VERSION = "megallm._ops", 5  # the same of csrc/ops/decode.cpp
CUDA, CUDA_VERSION = "megallm._cuda", 1  # and of csrc/cuda/bindings.cpp
CUDA_REASON = Path(__file__).parents[1] / "_cuda_not_built.txt"
COLLECTIVES, COLLECTIVES_VERSION = "megallm._collectives", 1  # and of csrc/collectives/module.cpp


@dataclass(frozen=True)
class Status:
    """What `megallm doctor` shows: is the extension used, and from where or why not."""

    name: str
    loaded: bool
    detail: str


@cache
def _load() -> tuple[ModuleType | None, str]:
    return _found(MODULE, VERSION, "numpy")


def _found(name: str, version: int, twin: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return None, f"{_reason(error)}; the {twin} twin is used, same results, slower"
    if version != module.VERSION:
        return None, (
            f"{module.__file__} is a stale build (version {module.VERSION}, want {version}); "
            f"reinstall megallm to rebuild it; the {twin} twin is used"
        )
    return module, str(module.__file__)


@cache
def ops() -> ModuleType | None:
    """Returns the extension of operations on tensors, or None when the caller must use torch."""
    return _found(OPS, OPS_VERSION, "torch")[0]


@cache
def collectives() -> ModuleType | None:
    """Returns the extension of collectives over shared memory, or None: gloo is used then."""
    return _found(COLLECTIVES, COLLECTIVES_VERSION, "gloo")[0]


def cuda() -> Status:
    """Returns whether there are kernels for GPUs, with the library's path or why there is none; it
    is no Python module, but a library that torch loads (`ops.kernels`).
    """
    files = sorted(CUDA_REASON.parent.glob("_cuda*.so"))
    if files:
        return Status(CUDA, True, str(files[0]))
    try:
        reason = " ".join(CUDA_REASON.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        reason = "no build of it was tried"
    return Status(CUDA, False, f"not built when megallm was installed ({reason})")


def _reason(error: ImportError) -> str:
    """Returns why there is no extension: what the build said, else what the import said."""
    try:
        built = " ".join(REASON.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return f"not built or not loadable ({error})"
    return (
        f"not built when megallm was installed ({built}): install a C++ compiler, then install "
        "megallm again"
    )


def index(native: bool | None = None) -> ModuleType | None:
    """Returns the extension, or None when the caller must use its numpy twin.

    `native` None takes the extension when it is there, False never, True insists (`UsageError`).
    """
    if native is False:
        return None
    module, detail = _load()
    if native and module is None:
        raise UsageError(f"The extension {MODULE} was asked for but is {detail}.")
    return module


def status() -> Status:
    """Returns whether the extension is loaded, with its path or the reason it is not."""
    module, detail = _load()
    return Status(MODULE, module is not None, detail)
