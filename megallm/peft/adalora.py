"""AdaLoRA: low-rank adapters `B diag(E) A` that share one budget of ranks (Zhang et al., arXiv
2303.10512).

Each of a matrix's triplets (a row of A, an element of E, a column of B) has a score: how much the
loss would feel its loss, averaged over steps, times how uncertain that is. After an update the
triplets with the lowest scores of the whole model have their E set to zero; how many stay falls
from `init_dim` to `dim` a matrix on the average, as a cubic. A regulariser keeps A and B near
orthogonal. Formulas and order of operations are those of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from math import prod
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.engine.state import Piece, pieces
from megallm.models.decoder import Stage
from megallm.ops.precision import wide
from megallm.parallel import comm
from megallm.parallel.linear import linear
from megallm.parallel.shard import Shard, StateTensor, constant, normal
from megallm.parallel.tensor import ColumnLinear, Linear, RowLinear
from megallm.peft.config import PeftConfig
from megallm.peft.dropout import Dropout, watch_tokens
from megallm.peft.injection import Injection
from megallm.peft.lora import A, B, LowRank, LowRankLinear, LowRankOptions, rows_of
from megallm.peft.slots import put
from megallm.peft.targets import LINEAR

E = "lora_E"
START = 0.02
EPSILON = 1e-5  # added to the rank that alpha is divided by, as in PEFT
METRIC = "orthogonality"


class AdaptiveLowRank(LowRank):
    """`y + s B (E * A x)`; E `(r, 1)` starts at zero, A and B with standard deviation 0.02.

    `weight` is what a microbatch's share of the regulariser is multiplied by: the mean over all A
    and B of `|A A^T - 1|` and `|B^T B - 1|` (Frobenius norms). It enters as a gradient in the
    backward pass, so stages, recomputation and schedules need nothing of it.
    """

    def __init__(self, base: Linear, member: int, options: LowRankOptions) -> None:
        super().__init__(base, member, options)
        for name in (A, B):
            self.add_parameter(name, replace(self.shards[name], init=normal(START)))
        tp = ("tp",) if self.mesh.tp.size > 1 else ()
        partial = (
            tp if isinstance(base, (ColumnLinear, RowLinear)) else base.shards["weight"].partial
        )
        record = Shard((options.dim, 1), {}, partial, constant(0.0), decay=False)
        self.add_parameter(E, record)
        self.weight: Tensor | float = 0.0
        self.pulls: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}

    is_plain = False

    def low_rank(self, x: Tensor, rows: slice | None) -> Tensor:
        queue, dropout = self.weight_grads, self.options.dropout
        x = x if dropout is None else dropout(x, self)
        b = rows_of(self.lora_B, rows)
        inner = linear(x, self.lora_A, None, queue) * self.lora_E[:, 0]
        made = linear(inner, b, None, queue) * self.options.scale
        if not torch.is_grad_enabled():
            return made
        return _Regularise.apply(made, self.lora_A, self.lora_B, self)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Computes `s B diag(E) A` of this rank's piece of the matrix, wide."""
        return wide(self.lora_B) @ (wide(self.lora_A) * wide(self.lora_E)) * self.options.scale

    def begin(self, weight: Tensor | float) -> None:
        """Prepare for an update, in which the matrices do not change."""
        self.weight = weight
        self.pulls.clear()
        self.norms.clear()

    def pull(self, name: str, matrix: Tensor) -> Tensor:
        """Returns a microbatch's share, of this rank, of the regulariser's gradient for `matrix`
        `(r, n)`, A or the transpose of B; made once an update, collective over the axes that split
        it.
        """
        if name not in self.pulls:
            self.pulls[name] = self._pull(name, matrix)
        return self.pulls[name]

    def _pull(self, name: str, matrix: Tensor) -> Tensor:
        shard, rows = self.shards[name], wide(matrix)
        gram = rows @ rows.mT
        for axis in shard.split.values():
            comm.all_reduce_(gram, self.mesh.axes[axis], "adalora.gram")
        gram.diagonal().sub_(1)
        norm = gram.norm()
        self.norms[name] = norm
        copies = prod(self.mesh.axes[axis].size for axis in shard.partial)
        factor = (
            2 * self.weight / copies
        )  # the derivative of |A A^T - 1| is 2 (A A^T - 1) A / |...|
        return ((gram @ rows) * (factor / norm.clamp(min=1e-12))).to(matrix.dtype)


class _Regularise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, a: Tensor, b: Tensor, adapter: AdaptiveLowRank
    ) -> Tensor:
        ctx.adapter, ctx.a, ctx.b = adapter, a.detach(), b.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return grad, ctx.adapter.pull(A, ctx.a), ctx.adapter.pull(B, ctx.b.mT).mT, None


def fill_adalora(stage: Stage, injection: Injection) -> None:
    """Put an adapter of the first rank beside each target of the stage."""
    config, modules = injection.config, dict(stage.named_modules())
    for name, targets in groupby(injection.chosen, attrgetter("module")):
        base = modules.get(name)
        if base is None:
            continue
        made = LowRankLinear(base)
        for target in targets:
            if target.kind != LINEAR:
                raise UsageError(
                    f"peft.method adalora does not adapt {target.names[-1]}: name linears that "
                    "are no experts in peft.targets."
                )
            at = f"{name}[{target.member}]"
            dropout = Dropout.of(config.dropout, injection.seed, at, base)
            scale = config.alpha / (config.first_dim + EPSILON)
            options = LowRankOptions(config.first_dim, scale, dropout)
            made[str(target.member)] = AdaptiveLowRank(base, target.member, options)
        put(base, config.name, made)
    if config.dropout:
        watch_tokens(stage)


def plan_budget(step: int, total_steps: int, matrices: int, config: PeftConfig) -> tuple[int, bool]:
    """Returns how many triplets the matrices keep together after update `step` (from 1 on), and
    whether they are chosen anew then. Pure."""
    begin, end = config.warmup_steps, total_steps - config.final_steps
    first, last = config.first_dim * matrices, config.dim * matrices
    if step <= begin:
        return first, False
    left = max(0.0, 1 - (step - begin) / (end - begin))
    due = step == end or (step < end and step % config.interval == 0)
    return int((first - last) * left**3 + last), due


class RankAllocator:
    """Scores the triplets of all adapters after each update and takes the lowest out.

    Made by `attach`; construction and every update are collective over the world. Its averages lie
    beside the gradients, divided as those are, and are part of the engine's checkpoints.
    """

    def __init__(self, engine: Engine, config: PeftConfig, total_steps: int) -> None:
        self.engine, self.config, self.total_steps = engine, config, total_steps
        self.adapters = {
            name: module
            for stage in engine.model.stages.values()
            for name, module in stage.named_modules()
            if isinstance(module, AdaptiveLowRank)
        }
        gathered = engine.mesh.gather_json(list(self.adapters))
        every = gathered and sorted({name for names in gathered for name in names})
        self.names = {name: i for i, name in enumerate(engine.mesh.broadcast_json(every))}
        if not self.names:
            raise UsageError("The model has no adapters of peft.method adalora.")
        device, shape = engine.mesh.device, (len(self.names), config.first_dim)
        self.kept = torch.ones(shape, dtype=torch.float32, device=device)
        self.sensitivity, self.uncertainty = (
            {
                bucket.index: torch.zeros_like(bucket.shard_grads)
                for bucket in engine.parameters.trainable
            }
            for _ in range(2)
        )

    # What the engine calls

    def begin(self, micros: int, scale: Tensor | float) -> None:
        """Prepare for an update of so many microbatches a data rank."""
        shares = 2 * len(self.names) * micros * self.engine.mesh.grads.size
        for adapter in self.adapters.values():
            adapter.begin(self.config.orthogonal / shares * scale)

    def finish(self, skipped: bool) -> dict[str, float]:
        """Updates the averages after an update, chooses the triplets when it is time, and returns
        what goes into metrics.
        """
        if skipped:
            return {}
        step, end = self.engine.optimizer.updates, self.total_steps - self.config.final_steps
        if step < end:
            self._average()
        budget, due = plan_budget(step, self.total_steps, len(self.names), self.config)
        sums = torch.zeros(self.kept.numel() + 1, dtype=torch.float64, device=self.kept.device)
        if due:
            self._add_scores(sums[1:].view(self.kept.shape))
        sums[0] = self._norms()
        comm.all_reduce_(sums, self.engine.mesh.world, "adalora.scores")
        if due:
            self._choose(sums[1:], budget)
        if due or step > end:
            self._apply()
        return {METRIC: float(sums[0]) / (2 * len(self.names)), "rank_budget": float(budget)}

    def state(self) -> Iterator[StateTensor]:
        """Yields the averages, shaped like the adapters' parameters, and which triplets are kept.
        """
        parameters, mesh = self.engine.parameters, self.engine.mesh
        for kind, flats in (("sensitivity", self.sensitivity), ("uncertainty", self.uncertainty)):
            for name, shard, box, tensor in self._own(flats):
                owned = parameters.owns(name)
                yield StateTensor(f"optim.{kind}.{name}", shard, box, tensor, owned, True)
        for name in self.adapters:
            shard = parameters.shards[f"{name}.{E}"]
            box = shard.box(mesh.layout, mesh.coords)
            tensor = self.kept[self.names[name]][:, None]
            yield StateTensor(
                f"optim.kept.{name}.{E}", shard, box, tensor, shard.owned(mesh.coords), True
            )

    # How

    def _own(self, flats: dict[int, Tensor]) -> Iterator[Piece]:
        """The pieces of buffers that belong to adapters of this method."""
        for piece in pieces(self.engine.parameters, flats):
            if piece.name.rpartition(".")[0] in self.names:
                yield piece

    @torch.no_grad()
    def _average(self) -> None:
        beta1, beta2 = self.config.betas
        for bucket in self.engine.parameters.trainable:
            felt, doubt = self.sensitivity[bucket.index], self.uncertainty[bucket.index]
            bucket.settle()
            now = (bucket.master.to(felt.device) * bucket.shard_grads).abs_()
            felt.lerp_(now, 1 - beta1)
            doubt.lerp_(now.sub_(felt).abs_(), 1 - beta2)

    def _add_scores(self, sums: Tensor) -> None:
        """Add what this rank answers for to the scores `[matrices, r]`: E's, and the means of A's
        rows and of B's columns."""
        scores = {i: felt * self.uncertainty[i] for i, felt in self.sensitivity.items()}
        for name, shard, box, tensor in self._own(scores):
            if not self.engine.parameters.owns(name):
                continue
            adapter, _, leaf = name.rpartition(".")
            dim = 1 if leaf == B else 0  # of the ranks
            ranks = slice(box.offset[dim], box.offset[dim] + box.shape[dim])
            mean = tensor.to(torch.float64).sum(1 - dim) / shard.full[1 - dim]
            sums[self.names[adapter], ranks] += mean

    def _norms(self) -> Tensor:
        """The sum of the regulariser's norms of this rank's adapters, on one rank of those that
        have them."""
        mesh = self.engine.mesh
        first = not any(mesh.coords[axis] for axis in ("dp", "cp", "tp"))
        found = [norm for adapter in self.adapters.values() for norm in adapter.norms.values()]
        total = torch.zeros((), dtype=torch.float64, device=self.kept.device)
        return sum((norm.to(torch.float64) for norm in found), total) if first else total

    def _choose(self, scores: Tensor, budget: int) -> None:
        """Keep the `budget` triplets with the highest scores of the whole model; those that equal
        the highest one that goes, go."""
        gone = self.kept.numel() - budget
        if gone:
            threshold = torch.kthvalue(scores, gone).values
            self.kept.copy_((scores > threshold).view(self.kept.shape))

    @torch.no_grad()
    def _apply(self) -> None:
        """Set E of what is not kept to zero."""
        parameters = self.engine.parameters
        parameters.wait_and_reshard()
        masters = {bucket.index: bucket.master for bucket in parameters.trainable}
        for name, _, box, tensor in self._own(masters):
            adapter, _, leaf = name.rpartition(".")
            if leaf == E:
                ranks = slice(box.offset[0], box.offset[0] + box.shape[0])
                kept = self.kept[self.names[adapter], ranks, None]
                tensor.mul_(kept.to(tensor.device, tensor.dtype))
        parameters.publish(frozen=False)


def attach(engine: Engine, config: PeftConfig, total_steps: int) -> RankAllocator:
    """Let the engine allocate ranks in each of the `total_steps` updates; collective over the
    world.

    To be called before a checkpoint is loaded. Raises UsageError when the steps leave no room.
    """
    if total_steps <= config.warmup_steps + config.final_steps:
        raise UsageError(
            f"{total_steps} updates leave no step between peft.warmup_steps {config.warmup_steps} "
            f"and peft.final_steps {config.final_steps}; lower them, or train longer."
        )
    allocator = RankAllocator(engine, config, total_steps)
    engine.observe(allocator)
    return allocator
