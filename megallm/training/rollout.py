"""Rollouts: prompts of a stream, and the answers that the policy gives to them.

An answer is a pure function of the weights, the seed and the id of its request; ids count the
prompts that were drawn since the run began, whatever the layout and the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megallm.data.chat.rows import PromptRow
from megallm.data.text.tokenizer import Tokenizer
from megallm.engine.engine import Engine
from megallm.inference.answer import Answer
from megallm.inference.answer import Ending
from megallm.inference.samples import Request, Sample
from megallm.inference.sampling import Sampling
from megallm.training.responses import Response
from megallm.training.rl_config import SamplingConfig
from megallm.training.rl_metrics import Phases
from megallm.training.scoring import Scorer


class Prompts(Protocol):
    """Draws of prompts, numbered from 1, each of as many as a step has (`data.chat.reader`)."""

    def examples(self, step: int) -> list[tuple[int, Any]]: ...

    def state_after(self, step: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Codec:
    """How answers begin and end in text: the tokenizer, the ids and the texts that end them."""

    words: Tokenizer
    ends: frozenset[int]
    stops: tuple[str, ...] = ()

    @staticmethod
    def of(words: Tokenizer, stops: Sequence[str]) -> Codec:
        """Ends at the tokenizer's end of text, and at `stops`: by their id where they have one."""
        ids = {text: words.token_id(text) for text in stops}
        known = {number for number in ids.values() if number is not None}
        texts = tuple(text for text, number in ids.items() if number is None)
        return Codec(words, frozenset({words.eod, *known}), texts)

    def request(self, id: int, prompt: Sequence[int], limit: int) -> Request:
        """An answer to be given."""
        ending = Ending(limit, self.ends, self.stops)
        decoder = self.words if self.stops else None
        return Request(id, list(prompt), Answer(ending, decoder, list(prompt)))

    def text(self, tokens: Sequence[int], reason: str) -> str:
        """What an answer says, without what ended it."""
        text = self.words.decode(tokens[:-1] if reason == "end" else tokens)
        if reason == "stop":
            text = text[: min((at for at in map(text.find, self.stops) if at >= 0), default=None)]
        return text


@dataclass
class Experience:
    """Answers of a step with what they earned: `table` `[n, k]` by function, NaN for none, and what
    they were given to, each `[n]`.
    """

    answers: list[Response] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    columns: list[Mapping[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def select(self, kept: Sequence[int]) -> Experience:
        """Those of these numbers."""
        return Experience(
            [self.answers[i] for i in kept], self.table[list(kept)],
            [self.columns[i] for i in kept], [self.texts[i] for i in kept],
        )  # fmt: skip

    def join(self, other: Experience) -> Experience:
        """Both, one after the other."""
        if not self.answers:
            return other
        return Experience(
            self.answers + other.answers, np.concatenate([self.table, other.table]),
            self.columns + other.columns, self.texts + other.texts,
        )  # fmt: skip


class Rollouts:
    """Draws prompts, lets the engine answer each `group` times, and has the answers scored.

    All calls are collective over the world.
    """

    def __init__(
        self, engine: Engine, config: SamplingConfig, codec: Codec, scorer: Scorer, seed: int
    ) -> None:
        self.engine, self.config, self.codec, self.scorer = engine, config, codec, scorer
        self.sampling = Sampling(config.max_new_tokens, config.temperature, seed=seed)
        self.greedy = Sampling(config.max_new_tokens, 0.0)

    @property
    def names(self) -> list[str]:
        """Of the reward functions."""
        return self.scorer.names

    @property
    def weights(self) -> list[float]:
        """Of the reward functions."""
        return self.scorer.weights

    def sample(
        self, rows: Sequence[PromptRow], first: int, group: int, greedy: bool = False
    ) -> list[Sample]:
        """Returns `group` answers to each prompt, on every rank; the ids count from `first` on.

        Each data rank gives its share of them.
        """
        limit = self.config.max_new_tokens
        asked = [
            self.codec.request(first + i, rows[i // group].ids.tolist(), limit)
            for i in range(len(rows) * group)
        ]
        with self.engine.generator(self.config.batch) as generator:
            made = generator.generate(
                self.engine.mine(asked), self.greedy if greedy else self.sampling
            )
        return [Sample(**each) for each in self.engine.all([vars(each) for each in made])]

    def draw(self, step: int, number: int, prompts: Prompts, phases: Phases) -> Experience:
        """Returns the scored answers to the draw `number` of prompts, counted from 1."""
        rows = [row for _, row in prompts.examples(number)]
        group = self.config.group
        with phases("rollout"):
            samples = self.sample(rows, (number - 1) * len(rows) * group, group)
        with phases("reward"):
            return self.scored(step, samples, rows, group)

    def scored(
        self, step: int, samples: Sequence[Sample], rows: Sequence[PromptRow], group: int
    ) -> Experience:
        """Returns samples with what they earned."""
        texts = [self.codec.text(each.tokens, each.reason) for each in samples]
        columns = [rows[i // group].columns for i in range(len(samples))]
        told = [
            {"id": each.id, "prompt_ids": each.prompt, "completion_ids": each.tokens,
             "completion": text, "reason": each.reason}
            for each, text in zip(samples, texts, strict=True)
        ]  # fmt: skip
        table = self.scorer.score(self.engine.mesh, told, columns)
        answers = [
            Response(each.id, each.id // group, step, each.prompt, each.tokens, each.log_probs,
                   each.reason, each.version)
            for each in samples
        ]  # fmt: skip
        return Experience(answers, table, columns, texts)
