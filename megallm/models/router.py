"""Which experts a token goes to, and how much each counts: the router of a mixture of experts, in
wide precision.

Softmax or sigmoid scores, the k best of all or of the best groups (DeepSeek-V3, arXiv 2412.19437),
with an optional bias on the choice alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megallm.models.balance import (
    Batch,
    RouterStats,
    RouterSums,
    RoutingInputs,
    balance_sum,
    load_of,
    within_capacity,
    z_sum,
)
from megallm.models.config import ModelConfig
from megallm.models.sections import MoeConfig
from megallm.ops.precision import wide
from megallm.parallel import comm
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Box, Shard, StateTensor, constant, normal
from megallm.parallel.tensor import ShardedModule

TERMS = ("moe_balance", "moe_z")  # the router's losses, as a step reports them


@dataclass(frozen=True)
class Choice:
    """Experts int64 `[n, k]` and their weights wide `[n, k]`; which copies are kept (None: all);
    what to report.
    """

    experts: Tensor
    weights: Tensor
    keep: Tensor | None
    sums: RouterSums | None


class Router(ShardedModule):
    """Tokens `[n, D]` -> their experts. The tp ranks route different tokens, so the gradient is
    partial over tp.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.moe = config.moe
        partial = ("tp",) if mesh.tp.size > 1 else ()
        shard = Shard(
            (config.moe.num_experts, config.hidden_size), {}, partial, normal(config.init_std)
        )
        self.add_parameter("weight", shard)
        self.register_parameter("logit_bias", None)
        if config.moe.router_bias:
            shard = Shard((config.moe.num_experts,), {}, partial, constant(0.0), decay=False)
            self.add_parameter("logit_bias", shard)
        self.stats = RouterStats(config.moe, mesh.device)

    def forward(self, x: Tensor, routing: RoutingInputs | None) -> Choice:
        """Choose the experts of each token. Without routing (decoding) nothing is dropped and
        nothing reported.
        """
        moe = self.moe
        bias = None if self.logit_bias is None else wide(self.logit_bias)
        logits = F.linear(wide(x), wide(self.weight), bias)
        scores = logits.sigmoid() if moe.score == "sigmoid" else logits.softmax(-1)
        experts = select_experts(scores.detach(), self.stats.bias, moe)
        chosen = scores.gather(-1, experts)
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) if moe.norm_topk_prob else chosen
        keep = sums = None
        if routing is not None and moe.capacity is not None:
            keep = within_capacity(experts, chosen.detach(), routing, moe, self.mesh)
        if routing is not None and torch.is_grad_enabled():
            nothing = logits.new_zeros(())
            balance = balance_sum(scores, experts, routing, self.mesh) if moe.aux_coef else nothing
            terms = torch.stack((balance, z_sum(logits, routing) if moe.z_coef else nothing))
            sums = RouterSums(terms, load_of(experts, keep, routing.counts, moe.num_experts))
        return Choice(experts, weights * moe.routed_scale, keep, sums)


def select_experts(scores: Tensor, bias: Tensor | None, moe: MoeConfig) -> Tensor:
    """Returns the experts `[n, k]` of tokens with scores `[n, X]`, the best first; no gradient.

    With groups, a token first chooses groups: by their best score, or with a bias by the sum of
    their two best.
    """
    choice = scores if bias is None else scores + bias
    if moe.num_groups > 1:
        groups = choice.unflatten(-1, (moe.num_groups, -1))
        best = (
            groups.amax(-1)
            if bias is None
            else groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        )
        open_groups = torch.zeros_like(best, dtype=torch.bool).scatter_(
            -1, best.topk(moe.top_groups, -1).indices, True
        )
        choice = groups.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)
    return choice.topk(moe.top_k, -1).indices


@dataclass(frozen=True)
class RouterReport:
    """The router losses of a step `[2]`, weighed as they were differentiated, and how even it was;
    on the device.

    `names` are those of the losses that the model has. `load_balance` is the load of the busiest
    expert over the mean, in the worst layer; `dropped` a share of all copies.
    """

    names: tuple[str, ...]
    losses: Tensor
    load_balance: Tensor
    dropped: Tensor

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the losses that the model has by name, and metrics by name; waits for the device.
        """
        values = dict(zip(TERMS, self.losses.tolist(), strict=True))
        losses = {name: value for name, value in values.items() if name in self.names}
        metrics = {
            "moe/load_balance": float(self.load_balance),
            "moe/dropped_fraction": float(self.dropped),
        }
        return losses, metrics | {f"train/{name}": value for name, value in losses.items()}


class Routers:
    """Every router of this rank's stages as one: weighs the losses before a step, reports and moves
    biases after it.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, stages: dict[int, nn.Module]) -> None:
        self.moe, self.mesh = config.moe, mesh
        modules = [pair for stage in stages.values() for pair in stage.named_modules()]
        self.all_stats = {
            name: module.stats for name, module in modules if isinstance(module, Router)
        }
        self.weights = torch.zeros(2, dtype=torch.float64, device=mesh.device)

    def begin(self, batches: list[Batch], factor: float | Tensor = 1.0) -> None:
        """Prepare for a step: a loss is weighed by its coefficient over the tokens of the global
        batch that count; `factor` (a loss scale) multiplies its gradient alone. Collective over
        data.
        """
        tokens = sum(batch["mask"].sum() for batch in batches).to(torch.int64)
        comm.all_reduce_(tokens, self.mesh.data, "loss.counts")
        coefficients = torch.tensor([self.moe.aux_coef, self.moe.z_coef], dtype=torch.float64)
        self.weights = coefficients.to(tokens.device, non_blocking=True) / tokens.clamp(min=1)
        for stats in self.all_stats.values():
            stats.begin(self.weights * factor)

    def finish(self, skip: Tensor) -> RouterReport:
        """Update the selection biases after a step (load balancing without a loss), unless `skip`
        (a bool scalar on the device). Collective over the world.
        """
        mesh, all_stats = self.mesh, list(self.all_stats.values())
        sums = torch.zeros(4, dtype=torch.float64, device=mesh.device)
        load = torch.zeros(
            len(all_stats), self.moe.num_experts + 1, dtype=torch.int64, device=mesh.device
        )
        for row, stats in enumerate(all_stats):
            sums[:2] += stats.terms
            load[row] = stats.load
        sums[2], sums[3] = load[:, -1].sum(), load[:, :-1].sum()
        for axis in (mesh.grads, mesh.tp):
            comm.all_reduce_(load, axis, "moe.load")
        self._move_biases(load[:, :-1], skip)
        experts = load[:, :-1].to(torch.float64)
        ratios = experts.amax(1) / experts.mean(1).clamp(min=1e-9)
        worst = torch.cat((ratios, ratios.new_zeros(1))).amax()
        worst = comm.all_reduce_(worst, mesh.pp, "moe.report", dist.ReduceOp.MAX)
        comm.all_reduce_(sums, mesh.world, "moe.report")
        names = tuple(
            name
            for name, used in zip(TERMS, (self.moe.aux_coef, self.moe.z_coef), strict=True)
            if used
        )
        return RouterReport(names, sums[:2] * self.weights, worst, sums[2] / sums[3].clamp(min=1))

    def _move_biases(self, load: Tensor, skip: Tensor) -> None:
        """Up where an expert had fewer tokens than the mean, down where it had more (arXiv
        2408.15664).
        """
        if not self.moe.selection_bias:
            return
        step = self.moe.bias_rate * (1 - skip.to(load.device, torch.float32))
        for stats, counts in zip(self.all_stats.values(), load, strict=True):
            # Of integers, so the sign is exact and the bias has the same bits on every rank and at
            # every layout.
            stats.bias += step * torch.sign(counts.sum() - counts * len(counts)).to(
                stats.bias.dtype
            )

    def state(self) -> Iterator[StateTensor]:
        """Yields the selection biases, float32 `[X]`: state that every rank of a stage holds alike.
        """
        for name, bias in self.biases():
            shard = Shard(tuple(bias.shape))
            yield StateTensor(
                name, shard, Box((0,), shard.full), bias, shard.owned(self.mesh.coords)
            )

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(logical name, float32 [X])`: state that every rank of a stage holds alike."""
        for name, stats in self.all_stats.items():
            if stats.bias is not None:
                yield f"{name}.bias", stats.bias
