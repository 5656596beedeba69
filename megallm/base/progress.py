"""How work that takes long says how far it is: a function that it calls, whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how much of it is done, of how much (None: not known),
    counted in `unit`.
    """

    def __call__(self, phase: str, done: int, total: int | None, unit: str = "") -> None: ...


def quiet(phase: str, done: int, total: int | None, unit: str = "") -> None:
    """Shows nothing: nobody is looking."""
