"""Decoding with a key/value cache on the training weights, at any tp x pp; data ranks repeat the same work."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine.model import ParallelModel
from megallm.inference.sampling import Sampling, choose
from megallm.models.attention import HeadPlan, LayerCache
from megallm.parallel.p2p import Wire
from megallm.parallel.pipeline import buffer_maker
from megallm.parallel.schedule import FORWARD
from megallm.parallel.tensor import whole_sequences


@dataclass
class Completion:
    """New tokens and the log-probability of each."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class Generator:
    """Generates from a model's weights as they are; collective over the ranks of a replica."""

    def __init__(self, model: ParallelModel) -> None:
        self.model, self.mesh, self.stages = model, model.mesh, model.stages
        self.rank_of, self.last = model.placement.rank_of, model.placement.num_stages - 1

    def generate(self, prompt: list[int], sampling: Sampling, request: int = 0, stop: int | None = None) -> Completion:
        """Continue `prompt` by up to `max_new_tokens` tokens, ending after the token `stop`.

        Every rank of the replica gets the same completion. Raises UsageError when the text would not fit
        a model with learned positions, or the prompt is empty.
        """
        self._check(prompt, sampling)
        completion = Completion()
        caches = self._caches(len(prompt) + sampling.max_new_tokens)
        fresh, done = prompt, 0
        with torch.no_grad(), ExitStack() as modes:
            for stage in self.stages.values():
                modes.enter_context(whole_sequences(stage))
            for _ in range(sampling.max_new_tokens):
                token, log_prob = self._step(fresh, done, caches, sampling, request)
                completion.tokens.append(token)
                completion.log_probs.append(log_prob)
                done += len(fresh)
                fresh = [token]
                if token == stop:
                    break
        return completion

    def _check(self, prompt: list[int], sampling: Sampling) -> None:
        config = self.model.config.model
        if not prompt:
            raise UsageError("The prompt has no tokens; give at least one.")
        total = len(prompt) + sampling.max_new_tokens
        if config.positions == "learned" and total > config.max_positions:
            raise UsageError(
                f"A prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones need {total} positions; "
                f"this model learned {config.max_positions}."
            )

    def _caches(self, capacity: int) -> dict[int, list[LayerCache]]:
        """Empty caches for the layers of each local stage."""
        config, tp = self.model.config.model, self.mesh.tp
        heads = HeadPlan.of(config.num_heads, config.num_kv_heads, tp.size, tp.rank)
        empty = partial(
            torch.zeros, (1, capacity, heads.num_kv, config.head_size), dtype=self.model.dtype, device=self.mesh.device
        )
        return {n: [LayerCache(empty(), empty()) for _ in stage.layers] for n, stage in self.stages.items()}

    def _step(
        self, fresh: list[int], done: int, caches: dict[int, list[LayerCache]], sampling: Sampling, request: int
    ) -> tuple[int, float]:
        """Feed `fresh` tokens after `done` earlier ones; choose the next on the last stage and tell the others."""
        device = self.mesh.device
        tokens = torch.tensor([fresh], device=device)
        positions = torch.arange(done, done + len(fresh), device=device)[None]
        x: Tensor | None = None
        for number, stage in self.stages.items():
            if number > 0 and self.rank_of(number - 1) != self.mesh.pp.rank:
                x = self._receive(len(fresh), (done, number))
            x = stage.decode(x, tokens, positions, caches[number])
            if number < self.last and self.rank_of(number + 1) != self.mesh.pp.rank:
                wire = self._wire(self.mesh.pp.rank, self.rank_of(number + 1))
                wire.send(x)
                wire.flush()
        chosen = torch.zeros(2, dtype=torch.float64, device=device)
        if self.last in self.stages:
            chosen[:] = torch.tensor(choose(x[0], sampling, request, done + len(fresh)))
        if self.mesh.pp.size > 1:
            dist.broadcast(chosen, self.mesh.pp.ranks[self.rank_of(self.last)], group=self.mesh.pp.group)
        return int(chosen[0]), float(chosen[1])

    def _wire(self, source: int, destination: int) -> Wire:
        line = self.mesh.pp.ranks
        return self.model.pipeline.wires[line[source], line[destination], FORWARD]

    def _receive(self, count: int, key: tuple[int, int]) -> Tensor:
        wire = self._wire(self.rank_of(key[1] - 1), self.mesh.pp.rank)
        shape = (1, count, self.model.config.model.hidden_size)
        wire.expect([key], buffer_maker(shape, self.model.dtype, self.mesh.device))
        return wire.take(key)
