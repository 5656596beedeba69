"""Rollouts: prompts of a stream, and the answers that the policy gives to them.

An answer is a pure function of the weights, the seed and the id of its request; ids count the
prompts that were drawn since the run began, whatever the layout and the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from megallm.base.stopping import StepAbandoned
from megallm.data.chat.rows import PromptRow
from megallm.data.text.tokenizer import Tokenizer
from megallm.engine.engine import Engine
from megallm.inference.answer import Answer, Ending
from megallm.inference.samples import Request, Sample, pack_samples, unpack_samples
from megallm.inference.sampling import Sampling
from megallm.rewards.samples import Completion
from megallm.run.phases import PhaseLine
from megallm.training.episodes import EpisodeRunner
from megallm.training.replies import Episode, Replies, prompt_of
from megallm.training.responses import Response
from megallm.training.reward_calls import RewardCaller
from megallm.training.rl_config import SamplingConfig
from megallm.training.rl_metrics import Phases


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
        """Returns what a generator is asked for."""
        ending = Ending(limit, self.ends, self.stops)
        decoder = self.words if self.stops else None
        return Request(id, list(prompt), Answer(ending, decoder, list(prompt)))

    def text(self, tokens: Sequence[int], reason: str) -> str:
        """Returns what an answer says, without what ended it."""
        text = self.words.decode(tokens[:-1] if reason == "end" else tokens)
        if reason == "stop":
            text = text[: min((at for at in map(text.find, self.stops) if at >= 0), default=None)]
        return text


@dataclass
class Experience:
    """Answers of a step with what they earned: `table` `[n, k]` by function, NaN for none; and
    their texts, the rows of their prompts, and what functions say besides, each `[n]`.
    """

    answers: list[Response] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    columns: list[Mapping[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def select(self, kept: Sequence[int]) -> Experience:
        """Returns those of these numbers."""
        lists = {name: [values[i] for i in kept] for name, values in self._lists()}
        return replace(self, table=self.table[list(kept)], **lists)

    def join(self, other: Experience) -> Experience:
        """Returns both, one after the other; metrics that both have are means over the answers."""
        if not self.answers:
            return other
        mine, theirs = len(self.answers), len(other.answers)
        metrics = self.metrics | other.metrics
        for name in self.metrics.keys() & other.metrics.keys():
            told = self.metrics[name] * mine + other.metrics[name] * theirs
            metrics[name] = told / (mine + theirs)
        lists = {name: values + vars(other)[name] for name, values in self._lists()}
        table = np.concatenate([self.table, other.table])
        failures = self.failures + other.failures
        return replace(self, table=table, metrics=metrics, failures=failures, **lists)

    def _lists(self) -> list[tuple[str, list]]:
        return [(name, vars(self)[name]) for name in ("answers", "columns", "texts", "extras")]


class Rollouts:
    """Draws prompts, lets the engine answer each `group` times, and has the answers scored.

    All calls are collective over the world.
    """

    def __init__(
        self, engine: Engine, config: SamplingConfig, codec: Codec, scorer: RewardCaller, seed: int
    ) -> None:
        self.engine, self.config, self.codec, self.scorer = engine, config, codec, scorer
        self.sampling = Sampling(config.max_new_tokens, config.temperature, seed=seed)
        self.greedy = Sampling(config.max_new_tokens, 0.0)
        self.watch: PhaseLine | None = None
        self.listen: Callable[[Request], None] | None = None
        self.runner = EpisodeRunner(engine, codec.request, codec.text, config.max_new_tokens)
        self.may_stop = True  # a step that is given up leaves the state as it was

    @property
    def stopped(self) -> Callable[[], bool] | None:
        """Returns what tells a generator to end its answers; None while a stop has to wait."""
        return (lambda: self.engine.request() > 0) if self.may_stop else None

    def check_stopped(self) -> None:
        """Give up what is being made if the run is asked to stop; collective over the world. Raises
        StepAbandoned.
        """
        if self.may_stop and self.engine.mesh.largest(self.engine.request()):
            raise StepAbandoned

    def show(self, watch: PhaseLine) -> None:
        """Let `watch` be told of each token that this rank's replica samples; rank 0."""
        self.watch = self.runner.watch = watch
        self.listen = self.runner.listen = lambda asked: watch.token(asked.answer.done)

    def let_reply(self, replies: Replies | None, turn_tokens: int) -> None:
        """Let tools and an environment answer the policy's turns, of at most `turn_tokens` tokens
        where that is not 0; `replies` is rank 0's, None elsewhere.
        """
        self.runner.replies, self.runner.several = replies, True
        self.runner.turn_tokens = turn_tokens

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
        if self.watch is not None:
            self.watch.expect(len(self.engine.mine(asked)))
        with self.engine.generator(self.config.batch) as generator:
            made = generator.generate(
                self.engine.mine(asked),
                self.greedy if greedy else self.sampling,
                self.listen,
                self.stopped,
            )
        self.check_stopped()
        shares = self.engine.all([pack_samples(made)])
        return [one for share in shares for one in unpack_samples(share)]

    def play(
        self, rows: Sequence[PromptRow], first: int, group: int, step: int = 0, greedy: bool = False
    ) -> list[Episode] | list[Sample]:
        """Returns whole answers as `sample` does, of several turns where something replies."""
        if not self.runner.several:
            return self.sample(rows, first, group, greedy)
        kind = "greedy" if greedy else "train"
        episodes = self.runner.open(rows, first, group, step, kind)
        self.grow(episodes, None, greedy)
        return episodes

    def grow(
        self, episodes: Sequence[Episode], budget: int | None, greedy: bool = False
    ) -> None:
        """Let episodes end, or grow by `budget` sampled tokens."""
        kind = "greedy" if greedy else "train"
        sampling = self.greedy if greedy else self.sampling
        self.runner.stopped, self.runner.check = self.stopped, self.check_stopped
        self.runner.advance(episodes, sampling, self.config.batch, kind, budget)

    def draw(self, step: int, number: int, prompts: Prompts, phases: Phases) -> Experience:
        """Returns the scored answers to the draw `number` of prompts, counted from 1."""
        rows = [row for _, row in prompts.examples(number)]
        group = self.config.group
        with phases("rollout"):
            samples = self.play(rows, (number - 1) * len(rows) * group, group, step)
        with phases("reward"):
            return self.scored(step, samples, rows, group)

    def scored(
        self,
        step: int,
        samples: Sequence[Sample] | Sequence[Episode],
        rows: Sequence[PromptRow],
        group: int,
    ) -> Experience:
        """Returns samples with what they earned."""
        texts = [self.codec.text(each.tokens, each.reason) for each in samples]
        columns = [rows[i // group].columns for i in range(len(samples))]
        told = [
            Completion(
                prompt_of(row), text, each.prompt, each.tokens, row, each.reason, **_said(each)
            )
            for each, text, row in zip(samples, texts, columns, strict=True)
        ]
        scores = self.scorer.score(told, step, self.stopped)
        self.check_stopped()
        answers = [
            Response(**{"id": each.id, "group": each.id // group, "step": step} | _sampled(each))
            for each in samples
        ]
        extras = [
            {name: values[i] for name, values in scores.extras.items()} | _extras(each)
            for i, each in enumerate(samples)
        ]
        failed = [text for each in samples if isinstance(each, Episode) for text in each.failures]
        return Experience(
            answers,
            scores.table,
            columns,
            texts,
            extras,
            scores.metrics | turn_metrics(samples),
            [*scores.failures, *failed],
        )


def _sampled(sample: Sample | Episode) -> dict[str, Any]:
    names = ("prompt", "tokens", "log_probs", "reason")
    found = {name: vars(sample)[name] for name in names} | {"version": sample.version}
    if isinstance(sample, Episode):
        found |= {name: vars(sample)[name] for name in ("mask", "versions", "drawn")}
        found["step"] = sample.step
    return found


def _said(sample: Sample | Episode) -> dict[str, Any]:
    """What reward functions are told of an answer of several turns."""
    if not isinstance(sample, Episode) or not sample.messages:
        return {}
    return {"turns": sample.messages, "earned": sample.earned}


def _extras(sample: Sample | Episode) -> dict[str, Any]:
    """Further columns of the sample table."""
    if not isinstance(sample, Episode) or not sample.messages:
        return {}
    return {"turns": sample.turns, "messages": sample.messages, **sample.extras}


def turn_metrics(samples: Sequence[Sample] | Sequence[Episode]) -> dict[str, float]:
    """Returns the figures of turns and of tools, under TRL's names; none of single turns."""
    played = [one for one in samples if isinstance(one, Episode) and one.messages]
    if not played:
        return {}
    calls = sum(message["role"] == "tool" for one in played for message in one.messages)
    failed = sum(len(one.failures) for one in played)
    foreign = sum(len(one.tokens) - one.drawn for one in played)
    return {
        "rl/turns_mean": sum(one.turns for one in played) / len(played),
        "rl/environment_tokens": foreign / len(played),
        "tools/call_frequency": calls / len(played),
        "tools/failure_frequency": failed / calls if calls else 0.0,
    }
