"""Libraries that reading some kinds of files needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from megallm.base.errors import UsageError


def need(module: str, file: str) -> ModuleType:
    """The library. Errors: `UsageError` that says which file needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(
            f"Reading {file} needs the package {package}: pip install 'megallm[data]'."
        ) from error
