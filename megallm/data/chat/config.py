"""What the trainers on conversations read: the section `data` of `megallm sft`, `reward`, `dpo` and
`kto`. Pure.

The comment beside a field is its documentation (`megallm config --schema` prints it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Literal

_PLACES = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class ChatDataConfig:
    """Conversations: where they lie, how they become tokens, and how these fill batches."""

    sources: dict[str, float | None] = field(default_factory=dict)  # file or pattern -> weight (null: by size)
    valid_sources: dict[str, float | None] = field(default_factory=dict)  # held-out files -> weight
    seq_len: int = 1024  # longest sequence in tokens; of a packed row its length (rows of pairs have twice as many)
    tokenizer: str | None = None  # tokenizer folder or 'bytes'; null: the model's
    template: str | None = None  # file of a Jinja chat template, or 'chatml'; null: the tokenizer's own, else ChatML
    template_options: dict[str, bool] = field(default_factory=dict)  # switches of it, such as enable_thinking
    template_date: str = "2024-07-26"  # what its strftime_now says: fixed, so that a resumed run reads the same
    train_on: Literal["assistant_only", "completion_only", "all"] = "assistant_only"  # sft: which tokens are predicted
    strings: Literal["plain", "messages"] = "plain"  # prompts and completions that are texts: as they stand, or said
    pairs: Literal["best_worst", "all"] = "best_worst"  # of several completions with scores
    condition: str = ""  # offline: text before a prompt with {reward}, or {bucket} of the reward, such as "<{bucket}> "
    return_edges: tuple[float, ...] = ()  # ascending: {bucket} is how many of them a reward reaches
    too_long: Literal["keep_start", "keep_end", "drop", "error"] = "drop"  # a sequence over seq_len: cut, or left out
    on_error: Literal["stop", "skip"] = "stop"  # a row that cannot be used: end with its line, or leave it out
    packing: bool = False  # several sequences a row, which do not see each other; else a row each, padded
    window: int = 256  # rows drawn, and packed, together
    seed: int | None = None  # of the order; null: run.seed
    log_samples: bool = False  # append what each rank consumed to RUN/samples.jsonl

    @property
    def files(self) -> list[str]:
        """Every source, training data first."""
        return list(dict.fromkeys([*self.sources, *self.valid_sources]))

    def faults(self) -> Iterator[str]:
        """Yields sentences about what is wrong with the section itself."""
        if not self.sources:
            yield (
                "data.sources is empty: name at least one file, such as "
                "data.sources={train.jsonl: 1}."
            )
        for name in ("sources", "valid_sources"):
            key, sources = f"data.{name}", vars(self)[name]
            weights = [weight for weight in sources.values() if weight is not None]
            if any(not 0 <= weight < inf for weight in weights):
                yield f"{key} has a weight that is no finite number >= 0."
            elif sources and len(weights) == len(sources) and not any(weights):
                yield f"{key} has no source with a weight above 0."
            elif 0 < len(weights) < len(sources):
                yield f"{key} has weights for some sources only: give each a weight, or none."
        if any(a >= b for a, b in pairwise(self.return_edges)):
            yield f"data.return_edges {list(self.return_edges)} do not ascend."
        if bool(self.return_edges) != ("{bucket}" in self.condition):
            yield "data.return_edges and {bucket} in data.condition go together."
        if self.condition and not {"{bucket}", "{reward}"} & set(_PLACES.findall(self.condition)):
            yield "data.condition has neither {bucket} nor {reward} in it."
        for key in ("seq_len", "window"):
            if vars(self)[key] < 1:
                yield f"data.{key} is {vars(self)[key]}; it must be at least 1."
