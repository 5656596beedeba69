"""A translation of Megatron-LM's flags: the configuration so far, and what did not fit. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megallm.base.paths import is_placeholder
from megallm.convert.megatron.shell import unresolved

Values = dict[str, list[str]]  # flag -> its values; a switch has none


@dataclass
class Translation:
    """Dotted key -> value, and sentences about what did not fit."""

    config: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    given: Values = field(default_factory=dict)

    def number(self, flag: str, default: float | None = None) -> float | None:
        """Returns the value of a flag as a number; a problem is noted when it is none."""
        if flag not in self.given:
            return default
        text = (self.given[flag] or [""])[0]
        if unfilled_word(text):
            return default  # said when the flag was read
        try:
            value = float(text.replace("_", ""))
        except ValueError:
            self.problems.append(
                f"{flag} {text}: this is not a number that can be read here; its default is used."
            )
            return default
        return int(value) if value == int(value) and "e-" not in text else value

    def text(self, flag: str, default: str = "") -> str:
        return (self.given.get(flag) or [default])[0]


def unfilled_word(word: str) -> bool:
    """Returns whether a word is known only when the script runs, or is to be filled in by a person.
    """
    return unresolved(word) or is_placeholder(word)


def shown_values(values: list[str]) -> str:
    """Returns the values of a flag as they stand behind it."""
    return "".join(f" {value}" for value in values)
