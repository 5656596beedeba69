"""What a reward function is told of one sampled answer. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GOLD = (
    "solution",
    "answer",
    "ground_truth",
    "target",
    "label",
)  # columns of the right answer, in this order


@dataclass(frozen=True)
class Completion:
    """A prompt, the answer that was sampled for it, and the other columns of the prompt's row.

    `prompt` is a text or a list of messages; `reason` is why sampling ended ("length": cut off). Of
    several turns `completion` is all that follows the prompt, `turns` the messages of it, and
    `earned` what the environment has given.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    completion: str
    prompt_ids: Sequence[int] = ()
    completion_ids: Sequence[int] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    reason: str = "end"
    turns: Sequence[Mapping[str, Any]] = ()
    earned: float | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The answer as a list of messages: one, or those of its turns."""
        if self.turns:
            return [dict(message) for message in self.turns]
        return [{"role": "assistant", "content": self.completion}]

    @property
    def prompt_text(self) -> str:
        """The prompt's text; of messages, their contents."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message.get("content") or "") for message in self.prompt)

    def column(self, *names: str) -> Any:
        """Returns the first of these columns that is there and not null, else None."""
        found = (self.columns[name] for name in names if self.columns.get(name) is not None)
        return next(found, None)

    def gold(self) -> Any:
        """Returns the right answer: one of GOLD, or verl's reward_model.ground_truth; else None."""
        found = self.column(*GOLD)
        if found is None:
            found = from_json_text(self.column("reward_model") or {}).get("ground_truth")
        return found


def from_json_text(value: Any) -> Any:
    """Returns a column's value, of a JSON text what it says: nested columns are often so."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
