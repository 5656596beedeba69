"""Load balancing of experts: where tokens of a microbatch stand, the router's losses, and the
selection bias.

The losses are sums over tokens, so any split of a batch gives the same number. A rank adds its own
tokens' share; it enters the backward pass through the activations (`RouterStats.attach`), so
pipeline stages, recomputation and schedules that split the backward pass need nothing of it, and
what a step reports is added up in the backward pass, once; where no gradient comes by, because all
parameters up to here are frozen, in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.models.sections import MoeConfig
from megallm.ops.documents import token_sequences
from megallm.parallel import comm
from megallm.parallel.context import Context
from megallm.parallel.expert import scatter_over_tp
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runs_again

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class RoutingInputs:
    """Where the `n` tokens that this rank routes stand. A sequence is a row, or a document of a
    packed row; a shared prefix is part of the first one behind it.

    Tokens without a label (padding among them) take no part in balancing.
    """

    sequence: Tensor  # int64 [n]
    place: Tensor  # int64 [n], in the row, from 1; 0 where there is no token
    counts: Tensor  # int64 [n], 1 for a token with a label
    lengths: Tensor  # int64 [S], tokens of each sequence
    counted: Tensor  # int64 [S], those of them with a label

    @staticmethod
    def of(batch: Batch, context: Context, mesh: Mesh, sp: bool) -> RoutingInputs:
        """Returns this rank's share of a microbatch; no communication, since every rank of a
        replica holds all of the batch.
        """
        mask, rows = batch["mask"], batch["mask"].shape[0]
        if "cu_seqlens" in batch:
            sequence = token_sequences(batch)
            lengths = sequence.bincount().to(mask.device, non_blocking=True)
            sequence = sequence.to(mask.device, non_blocking=True)[None]
        else:
            lengths = torch.full((rows,), mask.shape[1], device=mask.device)
            sequence = torch.arange(rows, device=mask.device)[:, None].expand_as(mask)
        counted = torch.zeros_like(lengths).index_add_(
            0, sequence.flatten(), mask.flatten().to(torch.int64)
        )
        place = torch.arange(1, mask.shape[1] + 1, device=mask.device).expand_as(mask)
        sequence, place, counts = (
            scatter_tokens(context.local(x), mesh, sp)
            for x in (sequence, place, mask.to(torch.int64))
        )
        return RoutingInputs(sequence, place, counts, lengths, counted)


def scatter_tokens(x: Tensor, mesh: Mesh, sp: bool) -> Tensor:
    """Maps `[B, T/cp]` of this cp rank -> `[n]` of the tokens that this tp rank routes, as
    `scatter_over_tp` divides them.
    """
    if sp:
        return comm.own_slice(x, mesh.tp, 1).flatten()
    return scatter_over_tp(x.flatten(), mesh)


@dataclass(frozen=True)
class RouterSums:
    """What a router reports of one microbatch: `terms` wide `[2]` (balance, z) with a gradient,
    `load` int64 `[X + 1]` (copies of tokens that count for each expert; the last: how many were
    dropped)."""

    terms: Tensor
    load: Tensor


class RouterStats:
    """What one router adds up over a step, and its selection bias: float32 `[X]`, or None."""

    def __init__(self, moe: MoeConfig, device: torch.device) -> None:
        self.scale = torch.zeros(2, dtype=torch.float64, device=device)  # the gradient of each term
        self.terms = torch.zeros(2, dtype=torch.float64, device=device)
        self.load = torch.zeros(moe.num_experts + 1, dtype=torch.int64, device=device)
        self.bias = torch.zeros(moe.num_experts, device=device) if moe.selection_bias else None

    def attach(self, x: Tensor, sums: RouterSums | None) -> Tensor:
        """Returns `x`, whose backward pass also gives `sums.terms` their gradient and adds them up.
        """
        if sums is None:
            return x
        if x.requires_grad or sums.terms.requires_grad:
            return _Attach.apply(x, sums.terms, sums.load, self)
        if not runs_again():
            self.add(sums.terms, sums.load)
        return x

    def add(self, terms: Tensor, load: Tensor) -> None:
        """Count what a router reports of one microbatch."""
        self.terms += terms
        self.load += load

    def begin(self, scale: Tensor) -> None:
        """Prepare for a step: set the gradient of each term, and empty sums."""
        self.scale.copy_(scale)
        self.terms.zero_()
        self.load.zero_()


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, terms: Tensor, load: Tensor, stats: RouterStats
    ) -> Tensor:
        ctx.save_for_backward(terms, load)
        ctx.stats = stats
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        terms, load = ctx.saved_tensors
        ctx.stats.add(terms, load)
        return grad, ctx.stats.scale.to(terms.dtype), None, None


def balance_sum(scores: Tensor, experts: Tensor, routing: RoutingInputs, mesh: Mesh) -> Tensor:
    """Returns this rank's share of the balancing loss, a sum over tokens that count; collective
    over tp and cp.

    For a sequence of N such tokens it is `X / (k N) sum_i c_i S_i`, with c_i how many chose expert
    i (over tp and cp, without a gradient) and S_i the sum of their scores for it, scaled to a sum
    of 1: N times the sequence loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20). Scores
    `[n, X]`, experts `[n, k]`.
    """
    num_experts, k, sequences = scores.shape[1], experts.shape[1], len(routing.lengths)
    shares = scores / scores.sum(-1, keepdim=True) * routing.counts[:, None]
    chosen = torch.zeros(sequences * num_experts, dtype=torch.int64, device=scores.device)
    index = (routing.sequence[:, None] * num_experts + experts).flatten()
    chosen.index_add_(0, index, routing.counts[:, None].expand(-1, k).flatten())
    for axis in (mesh.tp, mesh.cp):
        comm.all_reduce_(chosen, axis, "moe.counts")
    weights = chosen.view(sequences, num_experts).to(scores.dtype) * num_experts / k
    weights = weights / routing.counted.clamp(min=1)[:, None]
    times = mesh.tp.size if "moe.twice" in mesh.tp.broken else 1
    return (weights[routing.sequence] * shares).sum() * times


def z_sum(logits: Tensor, routing: RoutingInputs) -> Tensor:
    """Returns the square of log sum exp of the logits `[n, X]`, summed over tokens that count
    (arXiv 2202.08906).
    """
    return (logits.logsumexp(-1).square() * routing.counts).sum()


def load_of(experts: Tensor, keep: Tensor | None, counts: Tensor, num_experts: int) -> Tensor:
    """Returns int64 `[X + 1]`: copies `[n, k]` of tokens that count for each expert, and how many
    of these were dropped.
    """
    weight = counts[:, None].expand_as(experts)
    load = weight.new_zeros(num_experts + 1).scatter_add_(0, experts.flatten(), weight.flatten())
    if keep is not None:
        load[-1] = (weight * ~keep).sum()
    return load


def within_capacity(
    experts: Tensor, scores: Tensor, routing: RoutingInputs, moe: MoeConfig, mesh: Mesh
) -> Tensor:
    """Returns which copies `[n, k]` their experts keep: of each sequence of N tokens at most
    `ceil(capacity N k / X)`.

    Those of the highest scores, or of the first places (`drop`); of equal scores the first place.
    Which tokens are dropped does not depend on the layout: the choices of a sequence are gathered
    over tp and cp, and scores are compared in half their precision, so that a token and its
    repetition, which differ by rounding alone, are equal.
    """
    sequences, num_experts, k = len(routing.lengths), moe.num_experts, moe.top_k
    group = (
        torch.where(routing.place > 0, routing.sequence, sequences)[:, None] * num_experts + experts
    )
    places = routing.place[:, None].expand_as(group)
    axes = [axis for axis in (mesh.tp, mesh.cp) if "moe.capacity" not in axis.broken]
    for axis in axes:
        group, places, scores = (comm.all_gather(x, axis, 0) for x in (group, places, scores))
    groups = group.flatten()
    order = places.flatten().argsort(stable=True)
    if moe.drop == "score":
        scores = scores.to(torch.float32 if scores.dtype == torch.float64 else torch.bfloat16)
        order = order[scores.flatten()[order].argsort(descending=True, stable=True)]
    order = order[groups[order].argsort(stable=True)]
    limits = (
        (routing.lengths.to(torch.float64) * moe.capacity * k / num_experts).ceil().to(torch.int64)
    )
    limits = torch.cat((limits, limits.new_zeros(1)))  # places without a token
    sorted_groups = groups[order]
    number = torch.arange(len(order), device=order.device) - torch.searchsorted(
        sorted_groups, sorted_groups
    )
    keep = torch.empty_like(groups, dtype=torch.bool)
    keep[order] = number < limits[sorted_groups // num_experts]
    for axis in reversed(axes):
        keep = comm.own_slice(keep, axis, 0)
    return keep.view_as(experts)
