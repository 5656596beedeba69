"""A student compared with its teacher over a vocabulary that is split over tp, some tokens at a
time: `[T, V]` logits of neither exist as a whole.

A live teacher gives hidden states and its own piece of the head's matrix, so that both
distributions of a chunk of tokens are made here, and made again in the backward pass; a stored one
gives its top k. Generalised knowledge distillation: arXiv 2306.13649.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.cross_entropy import Projection, linear_backward, locate, token_chunks
from megallm.ops.divergence import Tail, piece_gradient_, piece_sums, top_k_divergence
from megallm.ops.precision import wide
from megallm.parallel import comm
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import piece

UNTEMPERED = "distill.temperature"  # a negative control: the teacher's logits are not divided


class Teacher(NamedTuple):
    """How the head compares with a teacher: generalised JSD of this `beta`, and for a stored top k
    what becomes of its `tail`. `head` is the piece of a live teacher's matrix; None: it is the
    student's own, without adapters.
    """

    beta: float = 0.5
    tail: Tail = "rest"
    head: Projection | None = None


def _divided_logits(hidden: Tensor, head: Projection, temperature: float) -> Tensor:
    """This rank's wide logits `[c, V/tp]` of a chunk, divided."""
    z = wide(F.linear(hidden, *head))
    return z if temperature == 1.0 else z.div_(temperature)


def _lse(pieces: list[Tensor], axis: Axis) -> Tensor:
    """The log of the sum of exponentials `[len(pieces), c]` over all pieces of the vocabulary; two
    all-reduces.
    """
    top = torch.stack([z.amax(-1) for z in pieces])
    comm.all_reduce_(top, axis, "vocab.max", dist.ReduceOp.MAX)
    total = torch.stack([(z - m[:, None]).exp_().sum(-1) for z, m in zip(pieces, top, strict=True)])
    return top + comm.all_reduce_(total, axis, "vocab.sum").log_()


class _Heads(NamedTuple):
    """The student's and the teacher's piece of the head, beta, and what either's logits are divided
    by."""

    student: Projection
    teacher: Projection
    beta: float
    temperatures: tuple[float, float]


class _Divergence(torch.autograd.Function):
    """The divergence `[n]` of student and live teacher, from hidden states `[n, D]` of both. The
    teacher takes no gradient.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        taught: Tensor,
        heads: _Heads,
        axis: Axis,
    ) -> Tensor:
        lses, sums = [], []
        for rows in token_chunks(hidden.shape[0], weight):
            own = _divided_logits(hidden[rows], heads.student, heads.temperatures[0])
            other = _divided_logits(taught[rows], heads.teacher, heads.temperatures[1])
            lses.append(_lse([own, other], axis))
            own.sub_(lses[-1][0, :, None])
            other.sub_(lses[-1][1, :, None])
            sums.append(torch.stack(piece_sums(own, other, heads.beta)))
        found = comm.all_reduce_(torch.cat(sums, 1), axis, "vocab.divergence")
        ctx.save_for_backward(hidden, taught, torch.cat(lses, 1), found[1])
        ctx.heads = heads  # parameters: not to be copied or moved by hooks
        return found[0].clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        hidden, taught, lse, slope = ctx.saved_tensors
        heads = ctx.heads
        scale = grad / heads.temperatures[0]

        def gradient(logits: Tensor, rows: slice) -> Tensor:
            own = wide(logits)
            if heads.temperatures[0] != 1.0:
                own.div_(heads.temperatures[0])
            own.sub_(lse[0, rows, None])
            other = _divided_logits(taught[rows], heads.teacher, heads.temperatures[1])
            other.sub_(lse[1, rows, None])
            dy = piece_gradient_(own, other, heads.beta, slope[rows])
            return dy.mul_(scale[rows, None])

        found = linear_backward(hidden, heads.student, gradient)
        return found.hidden, found.weight, found.bias, None, None, None


class _LabelLogProbs(torch.autograd.Function):
    """Log-probs `[n, K]` of several labels of each token, from hidden states `[n, D]`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        begin: int,
        temperature: float,
        axis: Axis,
    ) -> Tensor:
        head = Projection(weight, bias)
        lses, picked = [], []
        for rows in token_chunks(hidden.shape[0], weight):
            z = _divided_logits(hidden[rows], head, temperature)
            here, local = locate(labels[rows], begin, z.shape[-1])
            lses.append(_lse([z], axis)[0])
            picked.append(z.gather(-1, local) * here)
        lse = torch.cat(lses)
        ctx.save_for_backward(hidden, labels, lse)
        ctx.head, ctx.begin, ctx.temperature = head, begin, temperature
        return comm.all_reduce_(torch.cat(picked), axis, "vocab.label") - lse[:, None]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        hidden, labels, lse = ctx.saved_tensors
        grad = grad / ctx.temperature

        def gradient(logits: Tensor, rows: slice) -> Tensor:
            z = wide(logits)
            if ctx.temperature != 1.0:
                z.div_(ctx.temperature)
            here, local = locate(labels[rows], ctx.begin, z.shape[-1])
            dy = z.sub_(lse[rows, None]).exp_().mul_(-grad[rows].sum(-1, keepdim=True))
            return dy.scatter_add_(-1, local, grad[rows] * here)

        found = linear_backward(hidden, ctx.head, gradient)
        return found.hidden, found.weight, found.bias, None, None, None, None


def live_divergence(
    hidden: Tensor,
    head: Projection,
    taught: Tensor,
    teacher: Teacher,
    temperature: float,
    mesh: Mesh,
) -> Tensor:
    """Returns the divergence `[...]` of the student's hidden states `[..., D]` from the teacher's
    `taught` `[..., D']`, whose matrix `teacher.head` names the same entries as `head`.

    Collective over tp: two all-reduces a chunk of tokens and one more; every tp rank gets the same
    values. The gradient of the hidden states is this rank's share, still to be summed over tp.
    """
    other = 1.0 if UNTEMPERED in mesh.tp.broken else temperature
    heads = _Heads(head, teacher.head, teacher.beta, (temperature, other))
    flat, shape = taught.flatten(0, -2), hidden.shape[:-1]
    found = _Divergence.apply(hidden.flatten(0, -2), *head, flat, heads, mesh.tp)
    return found.view(shape)


def stored_divergence(
    hidden: Tensor,
    head: Projection,
    top: tuple[Tensor, Tensor],
    teacher: Teacher,
    temperature: float,
    own: tuple[Mesh, int],
) -> Tensor:
    """Returns the divergence `[...]` from a teacher's ids and log-probs `top`, each `[..., K]`, at
    the `temperature` that they were stored for; `own` is the mesh and the whole vocabulary's size.

    Collective over tp, as `live_divergence`.
    """
    (mesh, vocab), shape = own, hidden.shape[:-1]
    ids, log_probs = (x.flatten(0, -2) for x in top)
    begin, _ = piece(vocab, mesh.tp.size, mesh.tp.rank)
    broken = 1.0 if UNTEMPERED in mesh.tp.broken else temperature
    flat = hidden.flatten(0, -2)
    found = _LabelLogProbs.apply(flat, *head, ids, begin, broken, mesh.tp)
    made = top_k_divergence(found, log_probs.to(found.dtype), teacher.beta, teacher.tail)
    return made.view(shape)


def top_log_probs(
    hidden: Tensor, head: Projection, k: int, temperature: float, own: tuple[Mesh, int]
) -> tuple[Tensor, Tensor]:
    """Returns ids int64 and wide log-probs `[n, k]` of the likeliest entries of hidden states `[n,
    D]`, the likeliest first, without gradient; collective over tp, the same on all its ranks.
    """
    mesh, vocab = own
    begin, _ = piece(vocab, mesh.tp.size, mesh.tp.rank)
    ids, values = [], []
    for rows in token_chunks(hidden.shape[0], head.weight):
        z = _divided_logits(hidden[rows], head, temperature)
        lse = _lse([z], mesh.tp)[0]
        few = min(k, z.shape[-1])
        best, places = (z - lse[:, None]).topk(few, -1)
        best = F.pad(best, (0, k - few), value=-torch.inf)
        places = F.pad(places + begin, (0, k - few))
        best, places = (comm.all_gather(x, mesh.tp, 1) for x in (best, places))
        best, chosen = best.topk(k, -1)
        ids.append(places.gather(-1, chosen))
        values.append(best)
    return torch.cat(ids), torch.cat(values)
