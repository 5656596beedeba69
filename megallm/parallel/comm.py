"""Collectives (all-reduce, all-gather, reduce-scatter, all-to-all) as autograd functions whose
names state both directions.

Each reduction has a name, listed in `REDUCTIONS`. An axis whose `broken` set contains the name
skips that reduction; the layout oracle does this on purpose to prove that it would notice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.parallel import ledger
from megallm.parallel.mesh import Axis
from megallm.parallel.shard import piece

REDUCTIONS = {
    "tp.enter": "gradient of the input of column-parallel layers, summed over tp (no sequence "
    "parallelism)",
    "tp.leave": "output of row-parallel layers, summed over tp (no sequence parallelism)",
    "sp.enter": "gradient of the gathered input of column-parallel layers, reduce-scattered over "
    "tp",
    "sp.leave": "output of row-parallel layers, reduce-scattered over tp",
    "tp.latents": "gradient of the latents of latent attention, summed over tp (no sequence "
    "parallelism)",
    "sp.latents": "gradient of the gathered latents of latent attention, reduce-scattered over tp",
    "tp.qk_norm": "squares of the query or key heads of a layer that are normalised together, "
    "summed over tp",
    "vocab.embedding": "output of the vocabulary-parallel embedding, summed or reduce-scattered "
    "over tp",
    "vocab.logits": "gradient of the hidden states before the head, summed or reduce-scattered "
    "over tp",
    "vocab.max": "largest logit over the vocabulary pieces",
    "vocab.sum": "sum of exponentials over the vocabulary pieces",
    "vocab.label": "logit of the label, found on one vocabulary piece",
    "vocab.entropy": "mean logit over the vocabulary pieces, for the entropy",
    "vocab.best": "place of the largest logit, found on one vocabulary piece",
    "vocab.divergence": "divergence from a teacher over the vocabulary pieces, and the mean of its "
    "slope",
    "head.outputs": "per-token results of the other tp ranks' tokens, gathered before the loss "
    "(sequence parallelism)",
    "fp8.amax": "largest magnitude of a tensor that tp or cp divides, or of a step, for its FP8 "
    "scale",
    "fp8.expert_amax": "the same of an expert whose rows lie on several ranks that hold it, or of "
    "a step, over edp",
    "cp.lse": "attention over the key blocks of other cp ranks, merged by log-sum-exp (ring)",
    "cp.kv_grads": "gradient of a rank's keys and values, summed over the cp ranks that attended "
    "to them",
    "cp.heads": "all-to-all over cp of heads for tokens (Ulysses)",
    "cp.outputs": "per-token results of the other cp ranks, gathered before the loss",
    "grads.data": "parameter gradients, summed over dp and cp",
    "grads.partial": "parameter gradients that are partial sums over tp (replicated kv, norms "
    "under sp)",
    "grads.tie": "gradient of the embedding shared by the first and the last stage",
    "zero.parameters": "updated weights, gathered over the ranks that divide them (ZeRO 1 to 3)",
    "grads.expert": "gradients of an expert, summed over the ranks that hold the same experts "
    "(edp)",
    "moe.enter": "gradient of the tokens that tp ranks share out before experts, gathered (no "
    "sequence parallelism)",
    "moe.leave": "outputs of the experts for the tokens of the other tp ranks, gathered (no "
    "sequence parallelism)",
    "moe.dispatch": "all-to-all over ep of tokens to the ranks that hold their experts",
    "moe.combine": "all-to-all over ep of the experts' outputs back to their tokens",
    "moe.counts": "tokens of a sequence that chose each expert, summed over tp and cp for the "
    "balancing loss",
    "moe.capacity": "choices of a sequence's tokens on other tp and cp ranks, gathered to say "
    "which are dropped",
    "moe.load": "tokens of the step that chose each expert, summed over dp, cp and tp for the "
    "selection bias",
    "moe.report": "router losses as reported, summed over the world",
    "muon.matrices": "pieces of a matrix on tp ranks, gathered before it is made orthogonal (Muon)",
    "adafactor.sums": "sums of squares over the pieces of a matrix, over the shard group and over "
    "tp (Adafactor)",
    "dora.norm": "squares of the rows of a matrix whose columns tp divides, for DoRA",
    "adalora.gram": "products of the low-rank matrices that tp divides, for AdaLoRA's regulariser",
    "adalora.scores": "scores of AdaLoRA's triplets, of every matrix of the model",
    "clip.norm": "squares of owned gradient elements, summed over the world",
    "loss.counts": "number of tokens of each loss term, summed over data",
    "loss.report": "loss terms as reported, summed over data and told to every stage",
}

# Mistakes that are no missing reduction, which `--break` makes the same way.
MISTAKES = {
    "fp8.wrong_expert": "the FP8 scale of one expert used for another",
    "moe.twice": "the balancing loss counted once on every tp rank instead of once",
    "grads.wrong_group": "gradients of an expert summed over dp and cp, as those of dense layers, "
    "instead of over edp",
}
BREAKS = REDUCTIONS | MISTAKES


def all_reduce_(
    x: Tensor, axis: Axis, name: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce `x` in place over the axis and return it; no gradient."""
    if axis.size > 1 and name not in axis.broken:
        ledger.all_reduce(x, op=op, group=axis.group)
    return x


def broadcast_(x: Tensor, axis: Axis, source: int) -> Tensor:
    """Give every rank of the axis the values that its rank `source` has, in place."""
    if axis.size > 1:
        ledger.broadcast(x, axis.ranks[source], group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate equal pieces along `dim` in rank order; no gradient."""
    if axis.size == 1:
        return x
    out = x.new_empty((axis.size, *x.shape))
    ledger.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=axis.group)
    return out.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
    """Sum over the axis and keep this rank's piece of `dim`; no gradient."""
    if axis.size == 1:
        return x
    if name in axis.broken:
        return own_slice(x, axis, dim)
    pieces = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    out = torch.empty_like(pieces[0])
    ledger.reduce_scatter_tensor(out, pieces.flatten(0, 1), group=axis.group)
    return out


def start_all_reduce(x: Tensor, axis: Axis, name: str) -> Callable[[], None]:
    """Begin summing `x` in place over the axis; call the result before reading it."""
    if axis.size == 1 or name in axis.broken:
        return lambda: None
    return ledger.all_reduce(x, group=axis.group, async_op=True).wait


def start_all_gather(out: Tensor, piece: Tensor, axis: Axis) -> ledger.NotedWork:
    """Begin gathering equal flat pieces into `out`; wait on the result before reading it."""
    return ledger.all_gather_into_tensor(out, piece, group=axis.group, async_op=True)


def start_gather_uneven(x: Tensor, axis: Axis, dim: int, total: int) -> Callable[[], Tensor]:
    """Begin to gather the pieces of `total` along `dim`, long ones first; the result waits and
    joins them.
    """
    ends = [piece(total, axis.size, rank) for rank in range(axis.size)]
    longest = ends[0][1]
    front = x.movedim(dim, 0)
    if len(front) < longest:
        front = torch.cat((front, front.new_zeros(longest - len(front), *front.shape[1:])))
    out = front.new_empty(axis.size * longest, *front.shape[1:])
    sent = front.contiguous()
    work = ledger.all_gather_into_tensor(out, sent, group=axis.group, async_op=True)

    def finish(sent: Tensor = sent) -> Tensor:  # holds what is being sent until it has left
        work.wait()
        pieces = [
            out[rank * longest : rank * longest + end - begin]
            for rank, (begin, end) in enumerate(ends)
        ]
        return torch.cat(pieces).movedim(0, dim)

    return finish


def start_reduce_scatter(out: Tensor, whole: Tensor, axis: Axis) -> ledger.NotedWork:
    """Begin summing `whole` over the axis into this rank's piece `out`; wait on the result before
    reading it.
    """
    return ledger.reduce_scatter_tensor(out, whole, group=axis.group, async_op=True)


def own_slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Returns this rank's equal piece of `dim`."""
    return x.chunk(axis.size, dim)[axis.rank] if axis.size > 1 else x


class _CopyFwdSumBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, name: str) -> Tensor:
        ctx.axis, ctx.name = axis, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return (
            all_reduce_(grad.clone(memory_format=torch.contiguous_format), ctx.axis, ctx.name),
            None,
            None,
        )


class _SumFwdCopyBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, name: str) -> Tensor:
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis, name)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return grad, None, None


class _SumFwdSumBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, name: str) -> Tensor:
        ctx.axis, ctx.name = axis, name
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis, name)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return (
            all_reduce_(grad.clone(memory_format=torch.contiguous_format), ctx.axis, ctx.name),
            None,
            None,
        )


class _GatherFwdReduceScatterBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.name = axis, dim, name
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return reduce_scatter(grad, ctx.axis, ctx.dim, ctx.name), None, None, None


class _ReduceScatterFwdGatherBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim, name)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return all_gather(grad, ctx.axis, ctx.dim), None, None, None


class _GatherFwdSliceBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return torch.cat([x] * axis.size, dim) if name in axis.broken else all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return own_slice(grad, ctx.axis, ctx.dim).contiguous(), None, None, None


class _SliceFwdGatherBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.name = axis, dim, name
        return own_slice(x, axis, dim).contiguous()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        axis, dim = ctx.axis, ctx.dim
        whole = (
            torch.cat([grad] * axis.size, dim)
            if ctx.name in axis.broken
            else all_gather(grad, axis, dim)
        )
        return whole, None, None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, axis: Axis, sent: list[int], received: list[int], name: str
    ) -> Tensor:
        ctx.axis, ctx.sent, ctx.received, ctx.name = axis, sent, received, name
        return exchange_rows(x, axis, sent, received, name)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return (
            exchange_rows(grad, ctx.axis, ctx.received, ctx.sent, ctx.name),
            None,
            None,
            None,
            None,
        )


def exchange_rows(x: Tensor, axis: Axis, sent: list[int], received: list[int], name: str) -> Tensor:
    """Exchanges rows of `x` in runs of `sent[i]` for rank i -> runs of `received[i]` rows from rank
    i; no gradient.
    """
    if axis.size == 1:
        return x
    out = x.new_empty(sum(received), *x.shape[1:])
    if name in axis.broken:
        out.zero_()
        both = min(len(out), len(x))
        out[:both] = x[:both]
    else:
        ledger.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: Axis, name: str) -> Tensor:
        ctx.axis, ctx.name = axis, name
        return _all_to_all(x, axis, name)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        return _all_to_all(grad, ctx.axis, ctx.name), None, None


def _all_to_all(x: Tensor, axis: Axis, name: str) -> Tensor:
    if name in axis.broken:
        return x.clone()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    ledger.all_to_all_single(out, x.contiguous(), group=axis.group)
    return out


def copy_fwd_sum_bwd(x: Tensor, axis: Axis, name: str) -> Tensor:
    """Copies forward; the gradient is summed over the axis. Megatron's `f` (arXiv 1909.08053)."""
    return x if axis.size == 1 else _CopyFwdSumBwd.apply(x, axis, name)


def sum_fwd_copy_bwd(x: Tensor, axis: Axis, name: str) -> Tensor:
    """Sum over the axis forward; the gradient passes as it is. Megatron's `g` (arXiv
    1909.08053).
    """
    return x if axis.size == 1 else _SumFwdCopyBwd.apply(x, axis, name)


def sum_fwd_sum_bwd(x: Tensor, axis: Axis, name: str) -> Tensor:
    """Sum over the axis forward, and the gradient too: each rank used the sum for something of its
    own.
    """
    return x if axis.size == 1 else _SumFwdSumBwd.apply(x, axis, name)


def gather_fwd_reduce_scatter_bwd(x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
    """Gather pieces of `dim` forward, sum and scatter the gradient. Sequence parallelism (arXiv
    2205.05198).
    """
    return x if axis.size == 1 else _GatherFwdReduceScatterBwd.apply(x, axis, dim, name)


def reduce_scatter_fwd_gather_bwd(x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
    """Sum and scatter pieces of `dim` forward, gather the gradient. Sequence parallelism (arXiv
    2205.05198).
    """
    return x if axis.size == 1 else _ReduceScatterFwdGatherBwd.apply(x, axis, dim, name)


def gather_fwd_slice_bwd(x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
    """Gather pieces of `dim` forward; backward keeps the own slice: for what every rank then uses
    identically.
    """
    return x if axis.size == 1 else _GatherFwdSliceBwd.apply(x, axis, dim, name)


def all_to_all_fwd_all_to_all_bwd(x: Tensor, axis: Axis, name: str) -> Tensor:
    """Exchanges slices: `x[i]` of `[size, ...]` goes to rank i, result `[i]` came from rank i; the
    gradient goes the same way back.
    """
    return x if axis.size == 1 else _AllToAll.apply(x, axis, name)


def slice_fwd_gather_bwd(x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
    """Returns this rank's equal piece of `dim` of what all ranks hold alike; the gradient is
    gathered.
    """
    return x if axis.size == 1 else _SliceFwdGatherBwd.apply(x, axis, dim, name)


def exchange_rows_fwd_exchange_rows_bwd(
    x: Tensor, axis: Axis, sent: list[int], received: list[int], name: str
) -> Tensor:
    """Exchanges uneven runs of rows, as `exchange_rows`; the gradient goes the same way back."""
    return x if axis.size == 1 else _ExchangeRows.apply(x, axis, sent, received, name)
