"""What is not as it was when a run was last started, as a table. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A setting that is another one than before, as `where` (checkpoint or run.yaml) has it."""

    key: str
    before: Any
    now: Any
    where: str
    refused: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.where} {self.before!r}, configuration {self.now!r}"


def is_allowed(change: Change, allowed: Sequence[str]) -> bool:
    """Returns whether `allowed`, keys or sections, names what changed."""
    name = change.key.partition(" ")[0]  # of the content of a source: without its prefix
    return any(name == key or name.startswith(f"{key}.") for key in allowed)


def table_of(changes: Sequence[Change], allowed: Sequence[str] | None = None) -> str:
    """Returns one line a change, those marked that are refused (with None nothing is)."""
    refused = [
        allowed is not None and change.refused and not is_allowed(change, allowed)
        for change in changes
    ]
    return "\n".join(
        f"{'*' if mark else ' '} {change}" for mark, change in zip(refused, changes, strict=True)
    )
