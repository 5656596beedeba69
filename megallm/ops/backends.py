"""Libraries that replace an operation of ours: rows of the one table, `base.optional`.

No torch: `version` reads what is installed, `require` imports.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from megallm.base.errors import UsageError
from megallm.base.optional import LIBRARIES, Library, version

BACKENDS: dict[str, Library] = {name: row for name, row in LIBRARIES.items() if row.backend}


def missing(name: str) -> str:
    """Returns a clause about a library that is not installed."""
    backend = BACKENDS[name]
    return f"but {backend.distribution} is not installed ({backend.install})"


def require(name: str, module: str | None = None) -> ModuleType:
    """Returns the library's module, or another `module` of it.

    Raises UsageError when it is missing or cannot be imported.
    """
    backend = BACKENDS[name]
    if version(name) is None:
        raise UsageError(f"{backend.key or name} asks for {backend.distribution}, {missing(name)}.")
    try:
        return importlib.import_module(module or backend.module or name)
    except (ImportError, OSError) as error:
        found = f"{backend.distribution} {version(name)}"
        raise UsageError(f"{found} is installed but cannot be imported: {error}.") from error
