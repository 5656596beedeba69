"""Answers of several turns, and those that grow over several steps.

The next turn continues the prompt's ids, the answer's ids and the ids of what tools and
environments have said: nothing is encoded again. A token is a pure function of the weights, the
seed, the request's id and its position, so that an answer which pauses goes on as if it had not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megallm.data.chat.rows import PromptRow
from megallm.engine.engine import Engine
from megallm.inference.generator import Generator
from megallm.inference.samples import Request, Sample
from megallm.inference.sampling import Sampling
from megallm.run.phases import PhaseLine
from megallm.training.replies import Episode, Replies
from megallm.training.reward_calls import tell_all

# What a reply changes in an episode.
GROWING = ("tokens", "log_probs", "mask", "versions", "messages", "actions", "failures", "text")
CHANGING = ("begin", "turns", "earned", "extras", "reason")


class EpisodeRunner:
    """Lets episodes grow; `replies` answers their turns on rank 0 (None: on another rank, or where
    each has one turn). All calls are collective over the world.

    `request` makes what a generator is asked for, and `text` says what a turn says.
    """

    def __init__(
        self,
        engine: Engine,
        request: Callable[[int, Sequence[int], int], Request],
        text: Callable[[Sequence[int], str], str],
        max_tokens: int,
        turn_tokens: int = 0,
    ) -> None:
        self.engine, self.request, self.text = engine, request, text
        self.max_tokens, self.turn_tokens = max_tokens, turn_tokens
        self.replies: Replies | None = None
        self.watch: PhaseLine | None = None
        self.listen: Callable[[Request], None] | None = None
        self.several = False  # whether anything answers a turn
        self.stopped: Callable[[], bool] | None = None  # ends answers early
        self.check: Callable[[], None] = lambda: None  # may give the step up, on all ranks

    def open(
        self, rows: Sequence[PromptRow], first: int, group: int, step: int, kind: str
    ) -> list[Episode]:
        """Returns `group` new episodes for each prompt, whose ids count from `first` on."""
        ids = range(first, first + len(rows) * group)
        asked = [row for row in rows for _ in range(group)]
        made = [
            Episode(id, id // group, step, row.ids.tolist(), dict(row.columns))
            for id, row in zip(ids, asked, strict=True)
        ]
        if self.several:

            def begin() -> list:
                self.replies.open(made, kind)
                return [[one.prompt, one.text, one.actions] for one in made]

            for one, told in zip(made, tell_all(self.engine.mesh, begin), strict=True):
                one.prompt, one.text, one.actions = told
        return made

    def advance(
        self,
        episodes: Sequence[Episode],
        sampling: Sampling,
        batch: int,
        kind: str,
        budget: int | None = None,
    ) -> None:
        """Let each episode that has not ended grow until it does, or by `budget` sampled tokens."""
        mesh = self.engine.mesh
        most = {one.id: one.drawn + (budget or self.max_tokens) for one in episodes}
        ids = [one.id for one in episodes if not one.reason]
        mine = frozenset(self.engine.mine(ids))
        with self.engine.generator(batch, keep=self.several) as generator:
            while True:
                left = [one for one in episodes if not one.reason and one.drawn < most[one.id]]
                if not left:
                    return
                samples = self._turn(generator, left, mine, most, sampling)
                ended = [one for one in left if self._grow(one, samples[one.id])]
                if self.several and ended:
                    told = tell_all(mesh, partial(self._answered, ended, kind))
                    for one, changes in zip(ended, told, strict=True) if mesh.rank else ():
                        for name, value in changes.items():
                            vars(one)[name] = vars(one)[name] + value if name in GROWING else value

    def _answered(self, ended: Sequence[Episode], kind: str) -> list[dict[str, Any]]:
        """What rank 0 adds to episodes whose turn has ended: of lists what is new."""
        sizes = [{name: len(vars(one)[name]) for name in GROWING} for one in ended]
        texts = [self.text(one.tokens[one.begin :], one.reason) for one in ended]
        self.replies.answer(ended, texts, kind)
        return [
            {name: vars(one)[name] for name in CHANGING}
            | {name: vars(one)[name][begin:] for name, begin in size.items()}
            for one, size in zip(ended, sizes, strict=True)
        ]

    def _turn(
        self,
        generator: Generator,
        left: Sequence[Episode],
        mine: frozenset[int],
        most: dict[int, int],
        sampling: Sampling,
    ) -> dict[int, Sample]:
        """What each episode says next, by its id."""
        asked = [
            self._request(one, most[one.id] - one.drawn) for one in left if one.id in mine
        ]
        if self.watch is not None:
            self.watch.expect(len(asked))
        made = generator.generate(asked, sampling, self.listen, self.stopped)
        self.check()
        every = self.engine.all([vars(each) for each in made])
        return {each["id"]: Sample(**each) for each in every}

    def _limit(self, one: Episode) -> int:
        """Most tokens of the turn that an episode is in."""
        left = self.max_tokens - one.begin
        return min(left, self.turn_tokens) if self.turn_tokens else left

    def _request(self, one: Episode, budget: int) -> Request:
        """An unfinished turn goes on with its tokens, in which a stop text may have begun."""
        said = len(one.tokens) - one.begin
        limit = min(self._limit(one), said + budget)
        asked = self.request(one.id, [*one.prompt, *one.tokens[: one.begin]], limit)
        asked.room = len(one.prompt) + self.max_tokens
        for token, value in zip(one.tokens[one.begin :], one.log_probs[one.begin :], strict=True):
            asked.answer.push(token, value)
        return asked

    def _grow(self, one: Episode, sample: Sample) -> bool:
        """Add what was sampled; returns whether the turn has ended."""
        said = len(one.tokens) - one.begin
        fresh = len(sample.tokens) - said
        one.tokens += sample.tokens[said:]
        one.log_probs += sample.log_probs[said:]
        one.mask += [True] * fresh
        one.versions += [sample.version] * fresh
        one.drawn += fresh
        if sample.reason == "length" and len(sample.tokens) < self._limit(one):
            return False
        one.reason = sample.reason
        return True
