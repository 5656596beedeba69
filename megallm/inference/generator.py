"""Continuous batching: decoding many sequences together on the training weights, at any layout.

Sequences are in groups, one per pipeline rank, which go round the stages one after another
(`rotation`). A group's steps are planned as plain data that every rank of the replica computes
alike (`scheduler`); what differs between ranks is only which layers run. Context-parallel ranks
hold the same weights, so they take different requests; where experts are exchanged between ranks
with different requests, all of them make equally many passes, empty ones included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import ExitStack
from itertools import count

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.base.heartbeat import HEARTBEAT
from megallm.inference.blocks import BlockPool, blocks_of
from megallm.inference.cache import NoCache, PagedCache, Pages
from megallm.inference.native import NativeStage
from megallm.inference.rotation import BEGIN, RUN, SEND, Operation, Rotation
from megallm.inference.samples import Request, Sample
from megallm.inference.sampling import Draws, Sampling, sample
from megallm.inference.scheduler import Pass, Scheduler, Sequence, Step
from megallm.models.attention import AttentionInputs, LayerCache
from megallm.models.decode import is_plain
from megallm.models.parallel_model import ParallelModel
from megallm.ops.precision import wide_dtype
from megallm.ops.rope import rope_tables
from megallm.parallel import comm, ledger
from megallm.parallel.p2p import Channel
from megallm.parallel.pipeline import buffer_maker
from megallm.parallel.schedule import FORWARD
from megallm.parallel.tensor import whole_sequences

FinishListener = Callable[[Request], None]
NUMBERS = 4  # of a chosen token: itself and three log-probabilities


class Generator:
    """Generates from a model's weights as they are.

    `batch` sequences are decoded together, and at most `chunk` tokens of texts prefilled in a step.
    `blocks` bounds the memory beside the weights: the number of blocks of 16 positions, None for as
    many as `batch` of the longest requests need. `version` goes into the samples: the number of
    updates that the weights have seen. With `keep` a request whose id an earlier call has answered
    continues on that one's blocks, as far as they were not needed for others.
    """

    def __init__(
        self,
        model: ParallelModel,
        batch: int = 16,
        blocks: int | None = None,
        chunk: int = 2048,
        version: Callable[[], int] = int,
        keep: bool = False,
    ) -> None:
        self.model, self.mesh, self.stages = model, model.mesh, model.stages
        self.keep = keep
        self.rollout: Rollout | None = None
        self.batch, self.blocks, self.chunk, self.version = batch, blocks, chunk, version
        self.rotation = Rotation(model.placement)
        moe = model.config.moe.num_experts > 0
        # Experts on ranks that have other requests: those must exchange tokens in step.
        self.in_step = moe and self.mesh.ep.size > self.mesh.tp.size

    def generate(
        self,
        requests: Many[Request],
        sampling: Sampling,
        listen: FinishListener | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> list[Sample]:
        """Let the answer of every request grow until it ends; returns their samples in order.

        Collective over the replica, whose ranks give the same requests and get the same samples;
        with experts divided over data ranks collective over the world. `listen` is told of each
        token (of this context-parallel rank's requests). `stopped` is given on all ranks or none
        and asked on the replica's first; once it says so, each sequence ends at its next token.
        Raises UsageError, before anything runs, when a prompt is empty or a sequence would not fit
        the model or the blocks.
        """
        for request in requests:
            request.virtual = self.virtual_rows
            self._check(request)
        self._guide(sampling.q_beta)
        mine = list(requests[self.mesh.cp.rank :: self.mesh.cp.size])
        begun = [len(request.answer.tokens) for request in requests]
        with torch.no_grad(), ExitStack() as modes:
            for stage in self.stages.values():
                modes.enter_context(whole_sequences(stage))
            rollout = self.rollout
            if rollout is None or not rollout.go_on(mine, sampling):
                rollout = Rollout(self, mine, sampling, listen, stopped)
            self.rollout = rollout if self.keep else None
            rollout.run()
        self._exchange(requests, begun)
        version = self.version()
        return [Sample.of(request, version) for request in requests]

    def _guide(self, q_beta: float) -> None:
        """Let the last stage add Q to the logits. Errors: UsageError for a model without Q."""
        if q_beta and self.model.config.critic != "q":
            raise UsageError(
                f"Decoding with Q (q_beta {q_beta:g}) needs a model with Q heads (model.critic q), "
                "as `megallm offline` with offline.algorithm=ilql trains it; this model has "
                f"model.critic {self.model.config.critic or 'null'}."
            )
        for stage in self.stages.values():
            stage.q_beta = q_beta

    @property
    def virtual_rows(self) -> int:
        """Returns rows of hidden states that stand in front of every prompt (prompt tuning)."""
        virtual = next(iter(self.stages.values())).virtual(None)
        return 0 if virtual is None else virtual.rows

    def _check(self, request: Request) -> None:
        config, limit = self.model.config, request.answer.ending.limit
        asked = f"A prompt of {len(request.prompt)} tokens and {limit} new ones"
        if not request.prompt:
            raise UsageError("The prompt has no tokens; give at least one.")
        outside = [token for token in request.prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise UsageError(
                f"The prompt has the token {outside[0]}, but the model's vocabulary has "
                f"{config.vocab_size}: the tokenizer is not the one that the model was trained "
                "with."
            )
        if config.rope_scaling == "dynamic" and request.most > config.rope_positions:
            raise UsageError(
                f"{asked} need {request.most} positions; beyond model.rope_positions "
                f"{config.rope_positions} model.rope_scaling dynamic turns all of them otherwise, "
                "which cached keys cannot follow: ask for fewer new tokens."
            )
        if config.positions == "learned" and request.most > config.max_positions:
            raise UsageError(
                f"{asked} need {request.most} positions; this model learned {config.max_positions}."
            )
        if self.blocks is not None and blocks_of(request.most) > self.blocks_each(1, 1):
            raise UsageError(
                f"{asked} need {blocks_of(request.most)} blocks of the cache; each of the "
                f"{self.rotation.num_groups} groups has {self.blocks_each(1, 1)} of the "
                f"{self.blocks}: give more blocks or ask for fewer new tokens."
            )

    def blocks_each(self, rows: int, longest: int) -> int:
        """Returns blocks of one group of `rows` sequences."""
        if self.blocks is not None:
            return self.blocks // self.rotation.num_groups
        return rows * blocks_of(longest)

    def _exchange(self, requests: Many[Request], begun: Many[int]) -> None:
        """Let every context-parallel rank have the answers of all, of which `begun` tokens were
        there before; collective over cp.
        """
        cp = self.mesh.cp
        if cp.size == 1:
            return
        most = max((request.answer.ending.limit for request in requests), default=0)
        shares = [requests[rank :: cp.size] for rank in range(cp.size)]
        packed = torch.zeros(len(shares[0]), most + 1, NUMBERS, dtype=torch.float64)
        for row, request in zip(packed, shares[cp.rank], strict=False):
            answer = request.answer
            row[0, 0], row[0, 1] = len(answer.tokens), answer.reason == "interrupted"
            row[1 : len(answer.tokens) + 1] = torch.tensor(
                [answer.tokens, answer.log_probs, answer.policy_log_probs,
                 answer.behaviour_log_probs], dtype=torch.float64
            ).T  # fmt: skip
        everything = comm.all_gather(packed[None].to(self.mesh.device), cp, 0).tolist()
        for rank, (share, rows) in enumerate(zip(shares, everything, strict=True)):
            before = begun[rank :: cp.size]
            others = zip(share, rows, before, strict=False) if rank != cp.rank else ()
            for request, row, known in others:
                for token, *log_probs in row[1 + known : int(row[0][0]) + 1]:
                    request.answer.push(int(token), *log_probs)
                if row[0][1] and not request.answer.done:
                    request.answer.end("interrupted")


class Rollout:
    """One call of `generate`: the groups, their caches on this rank, and what is on its way."""

    def __init__(
        self,
        generator: Generator,
        requests: list[Request],
        sampling: Sampling,
        listen: FinishListener | None,
        stopped: Callable[[], bool] | None,
    ) -> None:
        self.model, self.mesh, self.in_step = generator.model, generator.mesh, generator.in_step
        self.rotation, self.sampling = generator.rotation, sampling
        self.listen, self.stopped = listen, stopped
        self.device, self.last = self.mesh.device, self.model.placement.num_stages - 1
        groups, open_requests = self.rotation.num_groups, [r for r in requests if not r.answer.done]
        rows = min(-(-generator.batch // groups), max(1, -(-len(open_requests) // groups)))
        longest = max((request.most for request in open_requests), default=1)
        blocks = generator.blocks_each(rows, longest)
        self.longest = longest
        self.waiting = deque(Sequence(request) for request in open_requests)
        self.groups = [
            Scheduler(self.waiting, rows, BlockPool(blocks), generator.chunk, generator.keep)
            for _ in range(groups)
        ]
        self.caches = [
            {number: self._cache(stage, blocks) for number, stage in self.model.stages.items()}
            for _ in range(groups)
        ]
        self._begin_anew()
        self.tables = self._rope_tables(longest)
        self.draws = {request.id: Draws(sampling.seed, request.id) for request in open_requests}

    def _begin_anew(self) -> None:
        groups = len(self.groups)
        self.steps: list[Step] = [Step([], []) for _ in range(groups)]
        self.pages: list[list[Pages | None]] = [[] for _ in range(groups)]
        self.left = True  # something is to be done, here or on a rank that runs in step
        self.passes = [0] * groups  # of a step, the same on all ranks of an expert group
        self.hidden: dict[int, list[Tensor]] = {}  # by group: what its next stage takes

    def go_on(self, requests: Many[Request], sampling: Sampling) -> bool:
        """Take requests that continue those of the last run, on their blocks; returns False, with
        nothing changed, where there is no room for them.
        """
        open_requests = [request for request in requests if not request.answer.done]
        longest = max((request.most for request in open_requests), default=1)
        if sampling != self.sampling or longest > self.longest:
            return False
        for scheduler in self.groups:
            scheduler.park()
        for request in open_requests:
            if not any(scheduler.resume(request) for scheduler in self.groups):
                self.waiting.append(Sequence(request))
            if request.id not in self.draws:
                self.draws[request.id] = Draws(sampling.seed, request.id)
        for scheduler in self.groups:
            scheduler.forget()
        self._begin_anew()
        return True

    def _cache(self, stage, blocks: int) -> PagedCache:
        shapes = [block.attention.cache_shape for block in stage.layers.values()]
        plain = [is_plain(block) for block in stage.layers.values()]
        return PagedCache(shapes, blocks, self.model.dtype, self.device, plain)

    def _rope_tables(self, longest: int) -> list[tuple[Tensor, Tensor]]:
        """Rotary tables `[kinds * positions, E/2]` of all positions that there will be, made once.

        LongRoPE has two kinds, for texts within and beyond the old context; a request is of one
        kind from its first token on, by the length that it may reach.
        """
        config = self.model.config
        if config.positions != "rope":
            return []
        positions, dtype = torch.arange(longest, device=self.device), wide_dtype(self.model.dtype)
        lengths = (0,) if config.rope_scaling != "longrope" else (0, config.rope_positions + 1)
        made = []
        for theta, scaling in config.ropes:
            kinds = [
                rope_tables(positions, config.rope_size, theta, dtype, scaling, length)
                for length in lengths
            ]
            made.append(tuple(torch.cat(parts) for parts in zip(*kinds, strict=True)))
        return made

    def run(self) -> None:
        """Run, tick by tick, this rank's part of the operations in their order, until all have
        ended.
        """
        stages = self.model.stages
        self.native = [
            {
                number: NativeStage.of(stages[number], cache, self.tables)
                for number, cache in each.items()
            }
            for each in self.caches
        ]
        doing = {BEGIN: self._begin, RUN: self._run, SEND: self._send}
        for tick in count():
            for operation in self.rotation.operations(tick):
                if self.mesh.pp.rank in operation.ranks:
                    doing.get(operation.kind, self._tell)(operation)
            if not self.left:
                break
        for channel in self.model.pipeline.channels.values():
            channel.flush()

    def _begin(self, operation: Operation) -> None:
        """Plan a group's next step, and agree with others on the number of its passes."""
        HEARTBEAT.beat()
        group = operation.group
        scheduler = self.groups[group]
        step = self.steps[group] = scheduler.step()
        self.passes[group] = len(step.passes)
        left = bool(self.waiting) or any(each.busy for each in self.groups)
        if self.in_step:
            vote = torch.tensor([len(step.passes), int(left)], device=self.device)
            ledger.all_reduce(vote, dist.ReduceOp.MAX, group=self.mesh.grads.group)
            self.passes[group], left = vote.tolist()
        self.left = left
        self.pages[group] = [self._pages(one) for one in step.passes]

    def _pages(self, one: Pass) -> Pages:
        begins = [each.stored - one.count for each in one.sequences]
        tables = [each.table for each in one.sequences]
        return Pages.of(tables, begins, one.count, self.device)

    def _run(self, operation: Operation) -> None:
        """This rank's layers of one stage for every pass of a group's step."""
        group, number = operation.group, operation.stage
        step, stage = self.steps[group], self.model.stages[number]
        cache = self.caches[group][number]
        cache.copy(step.copies)
        taken = self.hidden.pop(group, [])
        made: list[Tensor] = []
        for place in range(self.passes[group]):
            one = step.passes[place] if place < len(step.passes) else None
            pages = self.pages[group][place] if one is not None else None
            native = self.native[group][number]
            if one is not None and native is not None and native.suits(one.tokens):
                x, rows = self._taken(taken, place, one), [row for row, _ in one.outputs]
                x = native.run(self._fed(one), x, pages, self._further(one), rows)
                made += [x] if number < self.last or rows else []
                continue
            tokens, positions, caches = self._inputs(one, pages, cache)
            x = self._taken(taken, place, one)
            inputs = self._attention_inputs(stage, positions, one)
            x = stage.decode(x, tokens, positions, caches, inputs)
            if one is not None and (number < self.last or one.outputs):
                made.append(self._rows(x, one) if number == self.last else x)
        self.hidden[group] = made

    def _taken(self, taken: list[Tensor], place: int, one: Pass | None) -> Tensor | None:
        """The hidden states that a pass begins with; None on the first stage."""
        if one is not None:
            return taken[place] if taken else None
        size = self.model.config.hidden_size
        return torch.empty((0, 1, size), dtype=self.model.dtype, device=self.device)

    @staticmethod
    def _rows(logits: Tensor, one: Pass) -> Tensor:
        """Logits of the rows that tokens are drawn from, `[outputs, V]`."""
        rows = [row for row, _ in one.outputs]
        return logits if rows == list(range(len(logits))) else logits[rows]

    def _inputs(
        self, one: Pass | None, pages: Pages | None, cache: PagedCache
    ) -> tuple[Tensor, Tensor, list[LayerCache]]:
        """Tokens and positions `[n, T]` of a pass, and the cache as it sees it."""
        if one is None or pages is None:
            nothing = torch.empty((0, 1), dtype=torch.int64, device=self.device)
            empty = torch.empty(0, device=self.device)
            return nothing, nothing, [NoCache(empty, empty) for _ in cache.layers]
        tokens = torch.from_numpy(self._fed(one)).to(self.device)
        if one.begin is None:
            return tokens, pages.lengths[:, None], cache.rows(pages)
        positions = torch.arange(one.begin, one.begin + one.count, device=self.device)
        return tokens, positions.expand_as(tokens), cache.chunks(pages, one.begin)

    @staticmethod
    def _fed(one: Pass) -> np.ndarray:
        """The tokens of a pass, int64 `[n, T]`."""
        fed = [
            each.request.tokens(each.stored - one.count, each.stored) for each in one.sequences
        ]
        return np.array(fed, dtype=np.int64)

    def _further(self, one: Pass) -> np.ndarray:
        """By how many rows LongRoPE's tables of long texts stand behind the others, `[n, 1]`."""
        config = self.model.config
        if config.rope_scaling != "longrope":
            return np.zeros((1, 1), dtype=np.int64)
        grown = [each.request.most > config.rope_positions for each in one.sequences]
        return np.array(grown)[:, None] * (len(self.tables[0][0]) // 2)

    def _attention_inputs(self, stage, positions: Tensor, one: Pass | None) -> AttentionInputs:
        if not self.tables:
            return AttentionInputs(None, None, stage.context)
        if one is not None:
            positions = positions + torch.from_numpy(self._further(one)).to(self.device)
        tables = [(cos[positions], sin[positions]) for cos, sin in self.tables]
        return AttentionInputs.with_tables(tables, stage.context)

    def _send(self, operation: Operation) -> None:
        """Hand a stage's results to the rank of the next one, or take them."""
        group, (source, destination) = operation.group, operation.ranks
        passes = self.steps[group].passes
        line, hidden = self.mesh.pp.ranks, self.model.config.hidden_size
        channel: Channel = self.model.pipeline.channels[line[source], line[destination], FORWARD]
        if self.mesh.pp.rank == source:
            for x in self.hidden.pop(group, []):
                channel.send(x)
            return
        taken = self.hidden[group] = []
        for place, one in enumerate(passes):
            shape = (len(one.sequences), one.count, hidden)
            maker = buffer_maker(shape, self.model.dtype, self.device)
            channel.expect([(place, operation.stage + 1)], maker)
            taken.append(channel.take((place, operation.stage + 1)))

    def _tell(self, operation: Operation) -> None:
        """Choose the tokens of a step on one rank of the last stage, tell the replica, and let the
        answers grow.
        """
        group, source = operation.group, self.model.placement.rank_of(self.last)
        sequences = self.steps[group].outputs
        logits = self.hidden.pop(group, [])
        self.steps[group] = Step([], [])
        if not sequences:
            return
        if self.mesh.pp.rank == source and self.mesh.tp.rank == 0:
            numbers = self._choose(torch.cat(logits) if len(logits) > 1 else logits[0], sequences)
        else:
            shape = (NUMBERS, len(sequences))
            numbers = torch.zeros(shape, dtype=torch.float64, device=self.device)
        numbers = self._broadcast(numbers, source)
        stop = self._stop()
        for sequence, token, *log_probs in zip(sequences, *numbers.tolist(), strict=True):
            answer = sequence.request.answer
            answer.push(int(token), *log_probs)
            if stop and not answer.done:
                answer.end("interrupted")
            if self.listen is not None:
                self.listen(sequence.request)

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """Tokens and log-probabilities `[4, n]` from logits `[n, V]`."""
        draws = seen = None
        if self.sampling.temperature > 0:
            requests = [each.request for each in sequences]
            numbers = [self.draws[request.id].at(request.length) for request in requests]
            draws = torch.tensor(numbers, dtype=torch.float64).to(logits.device)
        if self.sampling.repetition_penalty != 1.0:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, each in enumerate(sequences):
                seen[row, each.request.prompt + each.request.answer.tokens] = True
        chosen = sample(logits, self.sampling, draws, seen)
        return torch.stack([values.to(torch.float64) for values in chosen])

    def _stop(self) -> bool:
        """What the replica's first rank says about ending everything, on every rank of it."""
        if self.stopped is None:
            return False
        first = self.mesh.pp.rank == self.mesh.tp.rank == 0
        flag = torch.tensor([float(first and self.stopped())], device=self.device)
        return bool(self._broadcast(flag, 0))

    def _broadcast(self, values: Tensor, stage_rank: int) -> Tensor:
        """Give the ranks that share these requests what a pipeline rank's first tp rank has."""
        comm.broadcast_(values, self.mesh.pp, stage_rank)
        return comm.broadcast_(values, self.mesh.tp, 0)
