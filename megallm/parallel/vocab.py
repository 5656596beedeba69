"""Vocabulary-parallel embedding and log-probabilities. The vocabulary is never padded: pieces are uneven.

Paper: Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.precision import wide
from megallm.parallel import comm
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import Init, Shard, piece
from megallm.parallel.tensor import ShardedModule, leave


class VocabEmbedding(ShardedModule):
    """Rows of `(V, D)` split over tp; `tokens [B, T] -> [B, T/tp, D]` (sp) or `[B, T, D]`; collective over tp."""

    def __init__(self, mesh: Mesh, vocab: int, size: int, init: Init, sp: bool) -> None:
        super().__init__(mesh, sp)
        self.range = piece(vocab, mesh.tp.size, mesh.tp.rank)
        self.add_parameter("weight", Shard((vocab, size), {0: "tp"}, (), init))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mesh.tp.size == 1:
            return F.embedding(tokens, self.weight)
        begin, end = self.range
        here = (tokens >= begin) & (tokens < end)
        rows = F.embedding(torch.where(here, tokens - begin, 0), self.weight)
        return leave(rows * here[..., None], self.mesh, self.sp, "vocab.embedding")


class _LabelLogProb(torch.autograd.Function):
    """log softmax at the label, from logits split over the vocabulary; backward keeps only logits and lse."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, begin: int, axis: Axis) -> Tensor:
        # A wide `top` makes the difference wide in one pass over narrow logits; no wide copy of them is made.
        top = comm.all_reduce_(wide(logits.amax(-1)), axis, "vocab.max", dist.ReduceOp.MAX)
        total = comm.all_reduce_((logits - top[..., None]).exp_().sum(-1), axis, "vocab.sum")
        lse = top + total.log()
        here = (labels >= begin) & (labels < begin + logits.shape[-1])
        local = torch.where(here, labels - begin, 0)
        label = wide(logits.gather(-1, local[..., None])).squeeze(-1) * here
        label = comm.all_reduce_(label, axis, "vocab.label")
        ctx.save_for_backward(logits, lse, local, here)
        return label - lse

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        logits, lse, local, here = ctx.saved_tensors
        result = (logits - lse[..., None]).exp_().mul_(-grad[..., None])
        result.scatter_add_(-1, local[..., None], (grad * here)[..., None])
        return result.to(logits.dtype), None, None, None


def label_log_prob(logits: Tensor, labels: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """Log-probability of each label, wide `[B, T]`, from this rank's piece of the logits `[B, T, V/tp]`.

    Collective over tp (three all-reduces of `[B, T]`); every tp rank gets the same values.
    """
    begin, _ = piece(vocab, mesh.tp.size, mesh.tp.rank)
    return _LabelLogProb.apply(logits, labels, begin, mesh.tp)


def gather_logits(logits: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """The whole `[B, T, V]` on every tp rank from uneven pieces, no gradient; collective over tp."""
    if mesh.tp.size == 1:
        return logits
    longest = piece(vocab, mesh.tp.size, 0)[1]
    padded = F.pad(logits, (0, longest - logits.shape[-1]))
    pieces = comm.all_gather(padded, mesh.tp, logits.dim() - 1).unflatten(-1, (mesh.tp.size, longest))
    spans = [piece(vocab, mesh.tp.size, rank) for rank in range(mesh.tp.size)]
    return torch.cat([pieces[..., rank, : end - begin] for rank, (begin, end) in enumerate(spans)], dim=-1)
