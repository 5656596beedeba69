"""Decoding many texts together on the training weights, at any tp x pp.

Texts sit in rows, rows in groups, one group per pipeline stage: while one group's step is in the
later stages, the next group's is in the earlier ones. A row that ends is given to the next waiting
text. Which text sits where is plain data that every rank of the replica computes alike; what
differs between ranks is only which layers run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.inference.answer import Answer
from megallm.inference.cache import TextCache
from megallm.inference.sampling import Sampling, choose
from megallm.models.attention import LayerCache
from megallm.models.parallel_model import ParallelModel
from megallm.parallel.p2p import Channel
from megallm.parallel.pipeline import buffer_maker
from megallm.parallel.schedule import FORWARD
from megallm.parallel.tensor import whole_sequences


@dataclass
class Job:
    """One text to continue; `number` keys its randomness, `answer` grows."""

    number: int
    prompt: list[int]
    answer: Answer

    @property
    def stored(self) -> int:
        """Positions in the cache: everything but the newest token, which is fed next."""
        return len(self.prompt) + len(self.answer.tokens) - 1

    @property
    def most(self) -> int:
        """Positions that the text may come to need."""
        return len(self.prompt) + self.answer.ending.limit


@dataclass
class Group:
    """Texts that step together: row i of the caches (one per local stage) holds `jobs[i]`."""

    caches: dict[int, TextCache]
    size: int
    jobs: list[Job] = field(default_factory=list)


@dataclass
class Turn:
    """One group's step on its way: the texts that get a token, and on the last stage their logits
    `[n, V]`.
    """

    jobs: list[Job]
    logits: list[Tensor]


Listener = Callable[[Job], None]


class Generator:
    """Generates from a model's weights as they are; collective over the ranks of a replica.

    `batch` texts are decoded together. Memory beside the weights: the keys and values of `batch`
    texts.
    """

    def __init__(self, model: ParallelModel, batch: int = 16) -> None:
        self.model, self.mesh, self.stages = model, model.mesh, model.stages
        self.rank_of, self.last = model.placement.rank_of, model.placement.num_stages - 1
        pp = self.mesh.pp.size
        self.rows = -(-batch // pp)
        self.lag = (
            pp - 1 - self.mesh.pp.rank
        )  # steps of other groups begun here before a step's tokens are known
        self.chooser = next(rank for rank in self.mesh.model.ranks if self._chooses(rank))

    def _chooses(self, rank: int) -> bool:
        """Whether a rank of this replica is the one that picks tokens: on the last stage, first of
        its tp ranks.
        """
        coords = self.mesh.layout.coords(rank)
        return coords["pp"] == self.rank_of(self.last) and coords["tp"] == 0 and coords["cp"] == 0

    def generate(
        self, jobs: Sequence[Job], sampling: Sampling, listen: Listener | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        """Let the answer of every job grow until it ends; `listen` is told of each token.

        Every rank of the replica gets the same answers. `stopped` is given on all ranks or none and
        asked on the replica's first; once it says so, each text ends at its next token. Raises
        UsageError, before anything runs, when a prompt is empty or a text would not fit a model
        with learned positions.
        """
        for job in jobs:
            self._check(job)
        waiting = deque(job for job in jobs if not job.answer.done)
        groups = [Group(self._caches(), self.rows) for _ in range(self.mesh.pp.size)]
        started: deque[Turn] = deque()
        number = 0
        with torch.no_grad(), ExitStack() as modes:
            for stage in self.stages.values():
                modes.enter_context(whole_sequences(stage))
            while waiting or any(not job.answer.done for group in groups for job in group.jobs):
                started.append(self._begin(groups[number % len(groups)], waiting))
                number += 1
                if len(started) > self.lag:
                    self._finish(started.popleft(), sampling, listen, stopped)
        for channel in self.model.pipeline.channels.values():
            channel.flush()

    def _check(self, job: Job) -> None:
        config = self.model.config
        if not job.prompt:
            raise UsageError("The prompt has no tokens; give at least one.")
        outside = [token for token in job.prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise UsageError(
                f"The prompt has the token {outside[0]}, but the model's vocabulary has "
                f"{config.vocab_size}: the tokenizer is not the one that the model was trained "
                "with."
            )
        if config.rope_scaling == "dynamic" and job.most > config.rope_positions:
            raise UsageError(
                f"A prompt of {len(job.prompt)} tokens and {job.answer.ending.limit} new ones need "
                f"{job.most} positions; beyond model.rope_positions {config.rope_positions} "
                "model.rope_scaling dynamic turns all of them otherwise, which cached keys cannot "
                "follow: ask for fewer new tokens."
            )
        if config.positions == "learned" and job.most > config.max_positions:
            raise UsageError(
                f"A prompt of {len(job.prompt)} tokens and {job.answer.ending.limit} new ones need "
                f"{job.most} positions; this model learned {config.max_positions}."
            )

    def _caches(self) -> dict[int, TextCache]:
        """Caches for the layers of each local stage."""
        return {
            number: TextCache(
                [block.attention.cache_shape for block in stage.layers.values()], self.rows, self.model.dtype,
                self.mesh.device,
            )
            for number, stage in self.stages.items()
        }  # fmt: skip

    def _begin(self, group: Group, waiting: deque[Job]) -> Turn:
        """Run this rank's layers for one step of a group: a token for each text in it, the prompt
        of each new one.
        """
        self._retire(group)
        turn = Turn([], [])
        if group.jobs:
            self._feed(turn, group, list(group.jobs))
        while waiting and len(group.jobs) < group.size:
            job = waiting.popleft()
            for cache in group.caches.values():
                cache.reserve(job.most)
            group.jobs.append(job)
            self._feed(turn, group, [job], row=len(group.jobs) - 1)
        return turn

    def _retire(self, group: Group) -> None:
        """Drop texts that have ended; the last row moves into each hole."""
        for row in reversed(range(len(group.jobs))):
            if group.jobs[row].answer.done:
                last = len(group.jobs) - 1
                if row != last:
                    for cache in group.caches.values():
                        cache.move(last, row)
                group.jobs[row] = group.jobs[last]
                group.jobs.pop()

    def _feed(self, turn: Turn, group: Group, jobs: list[Job], row: int | None = None) -> None:
        """One pass through the local stages: the prompt of `row`, or (None) the newest token of
        every row.
        """
        device = self.mesh.device
        if row is None:
            tokens = torch.tensor([[job.answer.tokens[-1]] for job in jobs], device=device)
            positions = torch.tensor([[job.stored] for job in jobs], device=device)
        else:
            tokens = torch.tensor([jobs[0].prompt], device=device)
            positions = torch.arange(len(jobs[0].prompt), device=device)[None]
        x: Tensor | None = None
        for number, stage in self.stages.items():
            cache = group.caches[number]
            caches: list[LayerCache] = (
                cache.step([job.stored for job in jobs], device)
                if row is None
                else cache.begin(row)
            )
            if number > 0 and self.rank_of(number - 1) != self.mesh.pp.rank:
                x = self._receive(tuple(tokens.shape), number)
            x = stage.decode(x, tokens, positions, caches)
            if number < self.last and self.rank_of(number + 1) != self.mesh.pp.rank:
                self._wire(self.mesh.pp.rank, self.rank_of(number + 1)).send(x)
        turn.jobs += jobs
        if self.last in self.stages:
            turn.logits.append(x)

    def _finish(
        self,
        turn: Turn,
        sampling: Sampling,
        listen: Listener | None,
        stopped: Callable[[], bool] | None,
    ) -> None:
        """Choose each text's token on one rank of the last stage, tell the replica, and let the
        answers grow.
        """
        if not turn.jobs:
            return
        chosen = torch.zeros(len(turn.jobs), 2, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.rank == self.chooser:
            rows = torch.cat(turn.logits)
            for row, job in enumerate(turn.jobs):
                seen = job.prompt + job.answer.tokens
                token, log_prob = choose(rows[row], sampling, job.number, len(seen), seen)
                chosen[row, 0], chosen[row, 1] = token, log_prob
        self._tell(chosen, self.chooser)
        stop = self._stop(stopped)
        for job, (token, log_prob) in zip(turn.jobs, chosen.tolist(), strict=True):
            job.answer.push(int(token), log_prob)
            if stop and not job.answer.done:
                job.answer.end("interrupted")
            if listen is not None:
                listen(job)

    def _stop(self, stopped: Callable[[], bool] | None) -> bool:
        """What the replica's first rank says about ending everything, on every rank of it."""
        if stopped is None:
            return False
        first = self.mesh.model.ranks[0]
        flag = torch.tensor([float(self.mesh.rank == first and stopped())], device=self.mesh.device)
        self._tell(flag, first)
        return bool(flag)

    def _tell(self, values: Tensor, source: int) -> None:
        """Broadcast over the ranks of the replica."""
        if self.mesh.model.size > 1:
            dist.broadcast(values, source, group=self.mesh.model.group)

    def _wire(self, source: int, destination: int) -> Channel:
        line = self.mesh.pp.ranks
        return self.model.pipeline.channels[line[source], line[destination], FORWARD]

    def _receive(self, shape: tuple[int, int], number: int) -> Tensor:
        """Hidden states `[n, T, D]` from the stage before `number`; messages come in the order of
        the steps.
        """
        channel = self._wire(self.rank_of(number - 1), self.mesh.pp.rank)
        key = (0, number)
        hidden = self.model.config.hidden_size
        channel.expect([key], buffer_maker((*shape, hidden), self.model.dtype, self.mesh.device))
        return channel.take(key)
