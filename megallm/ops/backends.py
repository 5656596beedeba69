"""The one table of optional libraries: what each replaces, which key asks for it, and how to have
it.

Nothing else in the package imports them. No torch: `version` reads what is installed, `require`
imports.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType

from megallm.base.errors import UsageError


@dataclass(frozen=True)
class Backend:
    """A library: its distribution, the module that `require` imports, what it replaces, and how to
    have it.
    """

    distribution: str
    module: str
    replaces: str
    key: str  # the configuration key that asks for it; "" when nothing does yet
    install: str


BACKENDS: dict[str, Backend] = {
    "transformer_engine": Backend(
        "transformer-engine",
        "transformer_engine.pytorch",
        "FP8 products of linears",
        "train.fp8.backend",
        "pip install --no-build-isolation 'transformer-engine[pytorch]', or the build argument of "
        "the Dockerfile",
    ),
    "flash_attn": Backend(
        "flash-attn",
        "flash_attn",
        "attention on GPUs (torch's own kernels are used)",
        "",
        "pip install --no-build-isolation flash-attn, or the build argument of the Dockerfile",
    ),
    "apex": Backend(
        "apex",
        "apex",
        "fused optimizers and norms (torch's own and ours are used)",
        "",
        "the build argument of the Dockerfile",
    ),
}


def version(name: str) -> str | None:
    """The installed version of a library of the table, None when it is not there."""
    try:
        return importlib.metadata.version(BACKENDS[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(name: str) -> str:
    """A clause about a library that is not installed."""
    backend = BACKENDS[name]
    return f"but {backend.distribution} is not installed ({backend.install})"


def require(name: str, module: str | None = None) -> ModuleType:
    """The library's module, or another `module` of it; raises UsageError when it is missing or
    cannot be imported.
    """
    backend = BACKENDS[name]
    if version(name) is None:
        raise UsageError(f"{backend.key or name} asks for {backend.distribution}, {missing(name)}.")
    try:
        return importlib.import_module(module or backend.module)
    except (ImportError, OSError) as error:
        found = f"{backend.distribution} {version(name)}"
        raise UsageError(f"{found} is installed but cannot be imported: {error}.") from error
