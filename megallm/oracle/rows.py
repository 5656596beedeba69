"""How the modules that hold parts of the oracle's table write a row down. No torch."""

from __future__ import annotations

from typing import Any

Written = tuple[
    str, str, str, dict[str, Any]
]  # name, layout as `--layout` takes it, model, further fields of `table.Row`


def row(name: str, layout: str = "", model: str = "llama", **rest: Any) -> Written:
    """Returns a row with everything said that is not the default."""
    return name, layout, model, rest
