"""Vocabulary parallel (vocab parallel) embedding and log-probabilities: rows split over tp. The
vocabulary is never padded: pieces are uneven.

Paper: Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.ops.cross_entropy import (
    Projection,
    Softmax,
    Statistics,
    Targets,
    Upstream,
    frozen_gradient,
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


class Wanted(NamedTuple):
    """Per-token scalars that a head is asked for, by name, and what its logits are divided by.

    Of a vocabulary or of classes there are the label's `log_prob`, the `entropy` of the whole
    distribution, the label's `logit` itself, and `correct`: 1 where the label is the likeliest
    entry, without a gradient; of a vocabulary whose stage has a teacher the `divergence` from it. A
    teacher is asked for one thing alone: the `hidden` states that its head would multiply, of
    tokens that count or of whole rows, or the `top` entries, `top_k` of them.
    """

    names: tuple[str, ...] = ("log_prob",)
    temperature: float = 1.0
    top_k: int = 0
    cap: float | None = None  # soft cap of the logits


class _Scores(torch.autograd.Function):
    """The scalars of `Wanted`, in the order of its names, from logits split over the vocabulary.

    Only logits and two numbers a token are kept, and the gradient takes the logits' place: nothing
    else may read them from then on. Autograd raises when another operation saved them for its own
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, targets: Targets, names: tuple[str, ...], axis: Axis
    ) -> tuple[Tensor, ...]:
        found = statistics(logits, targets, "entropy" in names, "correct" in names)
        outputs, softmax = _merge(found, targets, axis)
        _remember(ctx, (logits, targets.labels, *softmax), outputs, names)
        ctx.targets = targets._replace(labels=None)
        return tuple(outputs[name] for name in names)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple:
        logits, labels, *softmax = ctx.saved_tensors
        upstream = _upstream(ctx, grads, softmax[0])
        targets = ctx.targets._replace(labels=labels)
        return logit_gradient_(logits, targets, Softmax(*softmax), upstream), None, None, None


class _FusedScores(torch.autograd.Function):
    """The same from hidden states, a chunk of tokens at a time: no logits are kept.

    A head that is not trained makes its logits once: what the gradient of the hidden states is made
    of is known in the forward pass, but for a factor a token.
    The gradients of weight and bias are complete at the end of `backward` even where weight
    gradients are put off: to put them off, the logits would have to be made a third time.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        names: tuple[str, ...],
        axis: Axis,
    ) -> tuple[Tensor, ...]:
        head = Projection(weight, bias)
        needs = ctx.needs_input_grad
        ctx.frozen = needs[0] and not any(needs[1:3])
        found = linear_statistics(
            hidden, head, targets, "entropy" in names, "correct" in names, ctx.frozen
        )
        outputs, softmax = _merge(found, targets, axis)
        kept = (found.top, found.label, found.others) if ctx.frozen else ()
        _remember(ctx, (hidden, targets.labels, *softmax, *kept), outputs, names)
        # Parameters: not to be copied or moved by hooks.
        ctx.head, ctx.targets = head, targets._replace(labels=None)
        return tuple(outputs[name] for name in names)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple:
        hidden, labels, lse, entropy, *kept = ctx.saved_tensors
        softmax, upstream = Softmax(lse, entropy), _upstream(ctx, grads, lse)
        targets = ctx.targets._replace(labels=labels)
        if ctx.frozen and upstream.entropy is None:
            top, label, others = kept
            local = Statistics(top, lse, label, others=others)
            of_hidden = frozen_gradient(ctx.head.weight, targets, local, lse, upstream.log_prob)
            return of_hidden, *[None] * 5
        found = linear_gradients(hidden, ctx.head, targets, softmax, upstream)
        return found.hidden, found.weight, found.bias, None, None, None


def _remember(
    ctx: FunctionCtx,
    saved: tuple[Tensor | None, ...],
    outputs: dict[str, Tensor],
    names: tuple[str, ...],
) -> None:
    """What both backward passes need; an output that nobody differentiates costs them nothing."""
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)
    ctx.names = names
    if "correct" in names:
        ctx.mark_non_differentiable(outputs["correct"])


def _upstream(ctx: FunctionCtx, grads: tuple[Tensor | None, ...], like: Tensor) -> Upstream:
    given = dict(zip(ctx.names, grads, strict=True))
    of_log_prob = given.get("log_prob")
    return Upstream(
        torch.zeros_like(like) if of_log_prob is None else of_log_prob,
        given.get("entropy"),
        given.get("logit"),
    )


def _merge(local: Statistics, targets: Targets, axis: Axis) -> tuple[dict[str, Tensor], Softmax]:
    """The scalars by name over all pieces of the vocabulary, and what their gradients need.

    Three all-reduces, one more for the entropy and one more for what is correct. The entropy is
    `log sum exp z - sum p z`, with z counted from the largest so that nothing cancels.
    """
    top = comm.all_reduce_(local.top.clone(), axis, "vocab.max", dist.ReduceOp.MAX)
    shift = local.top - top
    total = comm.all_reduce_(local.total * shift.exp(), axis, "vocab.sum")
    lse = top + total.log()
    label = comm.all_reduce_(local.label, axis, "vocab.label")
    outputs = {"log_prob": label - lse, "logit": label}
    if local.moment is not None:
        moment = (local.moment + local.total * shift) * shift.exp()
        mean = comm.all_reduce_(moment, axis, "vocab.entropy") / total
        outputs["entropy"] = total.log() - mean
    if local.best is not None:
        # Of equal logits the first, as `argmax` has it on one rank.
        nowhere = torch.iinfo(torch.int64).max
        best = torch.where(local.top == top, local.best + targets.begin, nowhere)
        best = comm.all_reduce_(best, axis, "vocab.best", dist.ReduceOp.MIN)
        outputs["correct"] = (best == targets.labels).to(lse.dtype)
    return outputs, Softmax(lse, outputs.get("entropy"))


LOG_PROB = Wanted()


def label_scores(
    logits: Tensor, labels: Tensor, mesh: Mesh, vocab: int, wanted: Wanted = LOG_PROB
) -> dict[str, Tensor]:
    """Returns the wanted scalars of each label, wide and of its shape, from this rank's piece of
    the logits `[..., V/tp]`.

    Collective over tp (three to five all-reduces of the labels' shape); every tp rank gets the same
    values. The backward pass overwrites the logits.
    """
    begin, _ = piece(vocab, mesh.tp.size, mesh.tp.rank)
    targets = Targets(labels.flatten(), begin, wanted.temperature, wanted.cap)
    found = _Scores.apply(logits.flatten(0, -2), targets, wanted.names, mesh.tp)
    return {name: x.view(labels.shape) for name, x in zip(wanted.names, found, strict=True)}


def fused_scores(
    hidden: Tensor,
    head: Projection,
    labels: Tensor,
    mesh: Mesh,
    vocab: int,
    wanted: Wanted = LOG_PROB,
) -> dict[str, Tensor]:
    """Computes `label_scores` of `hidden W^T + b` for hidden states `[..., D]`, W `[V/tp, D]`: the
    logits never exist.

    Collective over tp, as `label_scores`. The gradient of the hidden states is this rank's share,
    still to be summed over tp (`tensor.gather_input` does it).
    """
    begin, _ = piece(vocab, mesh.tp.size, mesh.tp.rank)
    targets = Targets(labels.flatten(), begin, wanted.temperature, wanted.cap)
    found = _FusedScores.apply(hidden.flatten(0, -2), *head, targets, wanted.names, mesh.tp)
    return {name: x.view(labels.shape) for name, x in zip(wanted.names, found, strict=True)}


FUSE_BYTES = 256 * 2**20


def fuses(choice: str, tokens: int, weight: Tensor) -> bool:
    """Returns whether to fuse. `auto` does for a head that is not trained, and when the wide logits
    of `tokens` tokens would fill more than FUSE_BYTES: making them twice costs a quarter to a third
    of the head's time, and only large ones are worth it.
    """
    if choice == "auto":
        nbytes = tokens * weight.shape[0] * wide_dtype(weight.dtype).itemsize
        return not weight.requires_grad or nbytes > FUSE_BYTES
    return choice == "on"


def gather_logits(logits: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """Gathers the whole `[B, T, V]` on every tp rank from uneven pieces, no gradient; collective
    over tp.
    """
    if mesh.tp.size == 1:
        return logits
    return comm.start_gather_uneven(logits, mesh.tp, logits.dim() - 1, vocab)()
