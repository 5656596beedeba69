"""Vocabulary-parallel embedding and log-probabilities. The vocabulary is never padded: pieces are
uneven.

Paper: Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.cross_entropy import (
    Statistics,
    linear_gradients,
    linear_statistics,
    logit_gradient_,
    statistics,
)
from megallm.ops.embedding import look_up
from megallm.ops.precision import wide_dtype
from megallm.parallel import comm
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.shard import Init, Shard, piece
from megallm.parallel.tensor import Adaptable, reduce_output


class VocabEmbedding(Adaptable):
    """Rows of `(V, D)` split over tp; `tokens [B, T] -> [B, T/tp, D]` (sp) or `[B, T, D]`;
    collective over tp.

    An adapter is called with this rank's row numbers `[B, T]`, the rows `[B, T, D]` (zeros for
    tokens of other ranks), and which tokens are of this rank (None: all).
    """

    def __init__(self, mesh: Mesh, vocab: int, size: int, init: Init, sp: bool) -> None:
        super().__init__(mesh, sp)
        self.range = piece(vocab, mesh.tp.size, mesh.tp.rank)
        self.add_parameter("weight", Shard((vocab, size), {0: "tp"}, (), init))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mesh.tp.size == 1:
            rows = look_up(tokens, self.weight)
            return self.adapter(tokens, rows, None) if self.is_adapted else rows
        begin, end = self.range
        here = (tokens >= begin) & (tokens < end)
        numbers = torch.where(here, tokens - begin, 0)
        rows = look_up(numbers, self.weight) * here[..., None]
        if self.is_adapted:
            rows = self.adapter(numbers, rows, here)
        return reduce_output(rows, self.mesh, self.sp, "vocab.embedding")


class _LabelLogProb(torch.autograd.Function):
    """log softmax at the label, from logits split over the vocabulary.

    Only logits and lse are kept, and the gradient takes the logits' place: nothing else may read
    them from then on. Autograd raises when another operation saved them for its own backward pass.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, begin: int, axis: Axis) -> Tensor:
        lse, label = _merge(statistics(logits, labels, begin), axis)
        ctx.save_for_backward(logits, lse, labels)
        ctx.begin = begin
        return label - lse

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        logits, lse, labels = ctx.saved_tensors
        return logit_gradient_(logits, lse, labels, ctx.begin, grad), None, None, None


class _FusedLogProb(torch.autograd.Function):
    """The same from hidden states, a chunk of tokens at a time: no logits are kept.

    The gradients of weight and bias are complete at the end of `backward` even where weight
    gradients are put off: to put them off, the logits would have to be made a third time.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        begin: int,
        axis: Axis,
    ) -> Tensor:
        flat, marks = hidden.flatten(0, -2), labels.flatten()
        lse, label = _merge(linear_statistics(flat, weight, bias, marks, begin), axis)
        ctx.save_for_backward(hidden, lse, labels)
        ctx.weight, ctx.bias, ctx.begin = (
            weight,
            bias,
            begin,
        )  # parameters: not to be copied or moved by hooks
        return (label - lse).view_as(labels)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        hidden, lse, labels = ctx.saved_tensors
        found = linear_gradients(
            hidden.flatten(0, -2),
            ctx.weight,
            ctx.bias,
            labels.flatten(),
            ctx.begin,
            lse,
            grad.flatten(),
        )
        return found.hidden.view_as(hidden), found.weight, found.bias, None, None, None


def _merge(local: Statistics, axis: Axis) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, the label's logit) over all pieces of the vocabulary; three
    all-reduces.
    """
    top = comm.all_reduce_(local.top.clone(), axis, "vocab.max", dist.ReduceOp.MAX)
    total = comm.all_reduce_(local.total * (local.top - top).exp(), axis, "vocab.sum")
    return top + total.log(), comm.all_reduce_(local.label, axis, "vocab.label")


def label_log_prob(logits: Tensor, labels: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """Log-probability of each label, wide `[B, T]`, from this rank's piece of the logits `[B, T,
    V/tp]`.

    Collective over tp (three all-reduces of `[B, T]`); every tp rank gets the same values. The
    backward pass overwrites the logits.
    """
    begin, _ = piece(vocab, mesh.tp.size, mesh.tp.rank)
    return _LabelLogProb.apply(logits, labels, begin, mesh.tp)


def fused_log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mesh: Mesh, vocab: int
) -> Tensor:
    """`label_log_prob` of `hidden W^T + b` for hidden states `[B, T, D]`, W `[V/tp, D]`: the logits
    never exist.

    Collective over tp, as `label_log_prob`. The gradient of the hidden states is this rank's share,
    still to be summed over tp (`tensor.gather_input` does it).
    """
    begin, _ = piece(vocab, mesh.tp.size, mesh.tp.rank)
    return _FusedLogProb.apply(hidden, weight, bias, labels, begin, mesh.tp)


FUSE_BYTES = 256 * 2**20


def fuses(choice: str, tokens: int, weight: Tensor) -> bool:
    """Whether to fuse. `auto` does when the wide logits of `tokens` tokens would fill more than
    FUSE_BYTES: making them twice costs a quarter to a third of the head's time, and only large ones
    are worth it."""
    if choice == "auto":
        return tokens * weight.shape[0] * wide_dtype(weight.dtype).itemsize > FUSE_BYTES
    return choice == "on"


def gather_logits(logits: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """The whole `[B, T, V]` on every tp rank from uneven pieces, no gradient; collective over
    tp.
    """
    if mesh.tp.size == 1:
        return logits
    return comm.start_gather_uneven(logits, mesh.tp, logits.dim() - 1, vocab)()
