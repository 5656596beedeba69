"""Decoding with a key/value cache on the training weights, at any tp x pp; data ranks repeat the same work."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine.model import ParallelModel
from megallm.inference.sampling import Sampling, choose
from megallm.models.attention import LayerCache
from megallm.parallel.tensor import whole_sequences


@dataclass
class Completion:
    """New tokens and the log-probability of each."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class Generator:
    """Generates from a model's weights as they are; collective over the ranks of a replica."""

    def __init__(self, model: ParallelModel) -> None:
        self.model, self.stage, self.mesh = model, model.stage, model.mesh
        self.wires = model.pipeline.wires

    def generate(self, prompt: list[int], sampling: Sampling, request: int = 0, stop: int | None = None) -> Completion:
        """Continue `prompt` by up to `max_new_tokens` tokens, ending after the token `stop`.

        Every rank of the replica gets the same completion. Raises UsageError when the text would not fit
        a model with learned positions, or the prompt is empty.
        """
        self._check(prompt, sampling)
        completion = Completion()
        caches = self._caches(len(prompt) + sampling.max_new_tokens)
        fresh, done = prompt, 0
        with torch.no_grad(), whole_sequences(self.stage):
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

    def _caches(self, capacity: int) -> list[LayerCache]:
        heads, device = next(iter(self.stage.layers.values())).attention.heads, self.mesh.device
        shape = (1, capacity, heads.num_kv, self.model.config.model.head_size)
        make = lambda: torch.zeros(shape, dtype=self.model.dtype, device=device)  # noqa: E731
        return [LayerCache(make(), make()) for _ in self.stage.layers]

    def _step(
        self, fresh: list[int], done: int, caches: list[LayerCache], sampling: Sampling, request: int
    ) -> tuple[int, float]:
        """Feed `fresh` tokens after `done` earlier ones; choose the next on the last stage and tell the others."""
        device, span = self.mesh.device, self.stage.span
        tokens = torch.tensor([fresh], device=device)
        positions = torch.arange(done, done + len(fresh), device=device)[None]
        x = None if span.first else self._receive(len(fresh), done)
        out = self.stage.decode(x, tokens, positions, caches)
        chosen = torch.zeros(2, dtype=torch.float64, device=device)
        if span.last:
            chosen[:] = torch.tensor(choose(out[0], sampling, request, done + len(fresh)))
        else:
            self.wires["out", "F"].send(out)
            self.wires["out", "F"].flush()
        if self.mesh.pp.size > 1:
            dist.broadcast(chosen, self.mesh.pp.ranks[-1], group=self.mesh.pp.group)
        return int(chosen[0]), float(chosen[1])

    def _receive(self, count: int, key: int) -> Tensor:
        wire = self.wires["in", "F"]
        shape = (1, count, self.model.config.model.hidden_size)
        wire.expect([(key, 0)], lambda: torch.empty(shape, dtype=self.model.dtype, device=self.mesh.device))
        return wire.take((key, 0))
