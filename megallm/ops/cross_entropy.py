"""Cross entropy over a piece of a large vocabulary, some tokens at a time: `[T, V]` logits never
exist as a whole.

A chunk of tokens makes its logits, keeps three numbers a token of them, and makes them again in the
backward pass, since the gradient of a per-token log-probability is known only then. Pieces of the
vocabulary on other ranks are merged by whoever knows them (`parallel.vocab`). The online form of
the sum: arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops.precision import wide, wide_dtype

CHUNK_BYTES = (
    64 * 2**20
)  # of one chunk's wide logits; a chunk has at least MIN_TOKENS, or the matrix is read too often
MIN_TOKENS = 64
BLOCK_BYTES = 2**20  # of wide logits that several passes go over while they are in a CPU's cache


class Statistics(NamedTuple):
    """Of each token's logits over a piece of the vocabulary, wide `[T]`: the largest, the sum of
    exponentials less that, and the label's (0 where the label is elsewhere)."""

    top: Tensor
    total: Tensor
    label: Tensor


def chunk_tokens(vocab: int, dtype: torch.dtype) -> int:
    """Tokens whose logits over `vocab` entries are made at once."""
    return max(MIN_TOKENS, CHUNK_BYTES // (vocab * wide_dtype(dtype).itemsize))


def statistics(logits: Tensor, labels: Tensor, begin: int, reuse: bool = False) -> Statistics:
    """Of logits `[..., T, V]` of the vocabulary's entries from `begin` on; labels `[..., T]` count
    from entry 0.

    With `reuse` wide logits are overwritten.
    """
    here, local = locate(labels, begin, logits.shape[-1])
    label = wide(logits.gather(-1, local[..., None])).squeeze(-1) * here
    flat, top, total = (
        logits.flatten(0, -2),
        label.new_empty(label.shape),
        label.new_empty(label.shape),
    )
    tops, totals = (
        top.view(-1),
        total.view(-1),
    )  # written in place: small allocations between blocks fragment memory
    for rows in _blocks(flat):
        tops[rows] = flat[rows].amax(-1)
        torch.sum(_minus(flat[rows], tops[rows], reuse).exp_(), -1, out=totals[rows])
    return Statistics(top, total, label)


def _blocks(logits: Tensor) -> list[slice]:
    """Rows of `[T, V]` whose wide logits a CPU's cache holds through all passes over them;
    elsewhere all at once.
    """
    tokens, vocab = logits.shape
    wide_row = vocab * wide_dtype(logits.dtype).itemsize
    step = max(1, BLOCK_BYTES // wide_row) if logits.device.type == "cpu" else max(1, tokens)
    return [slice(begin, begin + step) for begin in range(0, max(1, tokens), step)]


def _minus(logits: Tensor, row: Tensor, reuse: bool) -> Tensor:
    """Wide `logits - row[..., None]`; a copy that becomes wide may be overwritten too."""
    own = reuse or logits.dtype != row.dtype
    return wide(logits).sub_(row[..., None]) if own else logits - row[..., None]


def locate(labels: Tensor, begin: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Whether each label is among entries `begin .. begin + vocab`, and its place there (0
    elsewhere).
    """
    here = (labels >= begin) & (labels < begin + vocab)
    return here, torch.where(here, labels - begin, 0)


def logit_gradient_(
    logits: Tensor, lse: Tensor, labels: Tensor, begin: int, grad: Tensor
) -> Tensor:
    """Gradient of `logits [..., T, V]` in their place, from that of the log-probabilities `[...,
    T]`.

    Logits that are no matrix in memory are copied first, and stay.
    """
    flat = logits.flatten(0, -2)
    return _gradient(
        flat, lse.flatten(), labels.flatten(), begin, grad.flatten(), flat.dtype
    ).view_as(logits)


def _gradient(
    logits: Tensor, lse: Tensor, labels: Tensor, begin: int, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """Of logits `[T, V]`, in `dtype`; in their place when that is theirs."""
    here, local = locate(labels, begin, logits.shape[-1])
    at_label = grad * here
    into = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    for rows in _blocks(logits):
        share = wide(logits[rows]).sub_(lse[rows, None]).exp_().mul_(-grad[rows, None])
        share.scatter_add_(-1, local[rows, None], at_label[rows, None])
        if into is not logits or share.dtype != dtype:
            into[rows] = share
    return into


def linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, begin: int
) -> Statistics:
    """`statistics` of `hidden W^T + b` without the logits: hidden `[T, D]`, W `[V, D]`, labels
    `[T]`.
    """
    parts = [
        statistics(F.linear(hidden[rows], weight, bias), labels[rows], begin, reuse=True)
        for rows in _chunks(hidden.shape[0], weight)
    ]
    return Statistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


class LinearGradients(NamedTuple):
    """Of the hidden states, in their dtype, and of weight and bias, accumulated wide over the
    chunks.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def linear_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    begin: int,
    lse: Tensor,
    grad: Tensor,
) -> LinearGradients:
    """Gradients of the log-probabilities `[T]` of which `grad` is given, through logits that are
    made again.

    The weight's is left out (None) when it takes none.
    """
    dtype, device = wide_dtype(weight.dtype), weight.device
    into = torch.empty_like(hidden)
    into_weight = (
        torch.zeros(weight.shape, dtype=dtype, device=device) if weight.requires_grad else None
    )
    into_bias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=device)
    weight = weight.detach()
    for rows in _chunks(hidden.shape[0], weight):
        x = hidden[rows]
        dy = _gradient(F.linear(x, weight, bias), lse[rows], labels[rows], begin, grad[rows], dtype)
        torch.mm(dy.to(x.dtype), weight, out=into[rows])
        if into_bias is not None:
            into_bias += dy.sum(0)
        if into_weight is not None:
            _add_product_(into_weight, dy, x)
    return LinearGradients(into, into_weight, into_bias)


def _add_product_(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """`total += dy^T x` for wide dy. A GPU multiplies narrow numbers many times faster, a CPU adds
    wide ones faster.
    """
    if x.dtype == total.dtype or total.device.type == "cpu":
        total.addmm_(dy.mT, x.to(total.dtype))
    else:
        total += dy.to(x.dtype).mT @ x


def _chunks(tokens: int, weight: Tensor) -> Iterator[slice]:
    step = chunk_tokens(weight.shape[0], weight.dtype)
    yield from (slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step))
