"""Cross entropy over a piece of a large vocabulary, some tokens at a time: `[T, V]` logits never
exist as a whole.

A chunk of tokens makes its logits, keeps a few numbers a token of them, and makes them again in the
backward pass, since the gradient of a per-token log-probability or entropy is known only then.
Pieces of the
vocabulary on other ranks are merged by whoever knows them (`parallel.vocab`). The online form of
the sum: arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megallm.ops import native, product
from megallm.ops.kernels import KERNELS
from megallm.ops.precision import wide, wide_dtype

CHUNK_BYTES = (
    64 * 2**20
)  # of one chunk's wide logits; a chunk has at least MIN_TOKENS, or the matrix is read too often
MIN_TOKENS = 64
BLOCK_BYTES = 2**20  # of wide logits that several passes go over while they are in a CPU's cache


class Targets(NamedTuple):
    """Labels `[T]` of tokens, counted from entry 0 of the vocabulary, beside logits of its entries
    from `begin` on, which are softly capped (`soft_cap`) and divided by `temperature` before the
    softmax."""

    labels: Tensor
    begin: int = 0
    temperature: float = 1.0
    cap: float | None = None

    def of(self, rows: slice) -> Targets:
        """Returns those of some tokens."""
        return self._replace(labels=self.labels[rows])


class Statistics(NamedTuple):
    """Statistics of each token's divided logits z over a piece of the vocabulary, wide `[T]`: the
    largest, the sum of `exp(z - top)`, and the label's z (0 where the label is elsewhere).

    Where they are wanted also `moment`, the sum of `exp(z - top) (z - top)`, and `best`, int64, the
    place of the largest in the piece.
    """

    top: Tensor
    total: Tensor
    label: Tensor
    moment: Tensor | None = None
    best: Tensor | None = None
    others: Tensor | None = None  # see `linear_statistics`


class Softmax(NamedTuple):
    """What the backward pass knows of each token's softmax, wide `[T]`: the log of its sum over the
    whole vocabulary, and where that has a gradient its entropy."""

    lse: Tensor
    entropy: Tensor | None = None

    def of(self, rows: slice) -> Softmax:
        """Returns those of some tokens."""
        return Softmax(self.lse[rows], None if self.entropy is None else self.entropy[rows])


class Upstream(NamedTuple):
    """The gradients of log-probabilities and perhaps of entropies and of the labels' logits, wide
    `[T]`."""

    log_prob: Tensor
    entropy: Tensor | None = None
    logit: Tensor | None = None

    def of(self, rows: slice) -> Upstream:
        """Returns those of some tokens."""
        return Upstream(*(None if x is None else x[rows] for x in self))


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Returns `cap * tanh(logits / cap)` (Gemma 2, arXiv 2408.00118); without a cap the logits."""
    return logits if cap is None else (logits / cap).tanh() * cap


def chunk_tokens(vocab: int, dtype: torch.dtype) -> int:
    """Number of tokens whose logits over `vocab` entries are made at once."""
    return max(MIN_TOKENS, CHUNK_BYTES // (vocab * wide_dtype(dtype).itemsize))


def statistics(
    logits: Tensor,
    targets: Targets,
    moment: bool = False,
    best: bool = False,
    reuse: bool = False,
    powers: Tensor | None = None,
) -> Statistics:
    """Returns the statistics of logits `[T, V]`; `moment` and `best` say whether these are wanted.
    With `reuse` wide logits are overwritten. `powers` takes `exp(z - top)`, which may be the logits
    themselves.
    """
    labels, begin, temperature, cap = targets
    kernels = None if best or powers is not None else _kernels_for(logits)
    if kernels is not None:
        top, total, label = (torch.empty_like(labels, dtype=torch.float32) for _ in range(3))
        moments = torch.empty_like(top) if moment else None
        numbers = labels.contiguous(), begin, temperature, cap or 0.0
        kernels.cross_entropy_statistics(logits, *numbers, top, total, label, moments)
        return Statistics(top, total, label, moments)
    if powers is None and cap is None and _is_native(logits):
        return Statistics(*native.softmax_statistics(logits, targets[:3], moment, best))
    if cap is not None:
        logits, reuse = soft_cap(wide(logits), cap), True
    here, local = locate(labels, begin, logits.shape[-1])
    label = wide(logits.gather(-1, local[..., None])).squeeze(-1) * here
    # Written in place: small allocations between blocks fragment memory.
    top, total = torch.empty_like(label), torch.empty_like(label)
    moments = torch.empty_like(label) if moment else None
    places = torch.empty_like(labels) if best else None
    for rows in _blocks(logits):
        top[rows] = logits[rows].amax(-1)
        if places is not None:
            torch.argmax(logits[rows], -1, out=places[rows])
        z = _minus(logits[rows], top[rows], reuse)
        if temperature != 1.0:
            z.div_(temperature)
        exp = z.exp_() if moments is None else z.exp()
        torch.sum(exp, -1, out=total[rows])
        if moments is not None:
            torch.sum(z.mul_(exp), -1, out=moments[rows])
        if powers is not None and (moments is not None or exp.dtype != powers.dtype or not reuse):
            powers[rows] = exp
    if temperature != 1.0:
        top, label = top / temperature, label / temperature
    return Statistics(top, total, label, moments, places)


def _kernels_for(logits: Tensor) -> object | None:
    return KERNELS.of(logits) if logits.is_contiguous() else None


def _is_native(logits: Tensor) -> bool:
    return native.kernels(logits) is not None and logits.is_contiguous() and logits.shape[-1] > 0


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
    """Returns whether each label is among entries `begin .. begin + vocab`, and its place there (0
    elsewhere).
    """
    here = (labels >= begin) & (labels < begin + vocab)
    return here, torch.where(here, labels - begin, 0)


def logit_gradient_(
    logits: Tensor, targets: Targets, softmax: Softmax, upstream: Upstream
) -> Tensor:
    """Returns gradient of `logits [T, V]` in their place.

    Logits that are no matrix in memory are copied first, and stay.
    """
    flat = logits.flatten(0, -2)
    return _gradient(flat, targets, softmax, upstream, flat.dtype).view_as(logits)


def _gradient(
    logits: Tensor, targets: Targets, softmax: Softmax, upstream: Upstream, dtype: torch.dtype
) -> Tensor:
    """Of logits `[T, V]`, in `dtype`; in their place when that is theirs.

    For capped and divided logits z, p = softmax(z) and H its entropy, `d log p_y / d z_j = (j = y)
    - p_j` and `d H / d z_j = -p_j (log p_j + H)`.
    """
    labels, begin, temperature, cap = targets
    kernels = _kernels_for(logits)
    if kernels is not None:
        into = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
        entropy = softmax.entropy if upstream.entropy is not None else None
        given = softmax.lse, upstream.log_prob, entropy, upstream.entropy, upstream.logit
        given = [x if x is None else x.contiguous() for x in given]
        numbers = labels.contiguous(), begin, temperature, cap or 0.0
        kernels.cross_entropy_gradient(logits, *numbers, *given, into)
        return into
    here, local = locate(labels, begin, logits.shape[-1])
    of_log_prob = upstream.log_prob / temperature
    of_entropy = None if upstream.entropy is None else upstream.entropy / temperature
    at_label = of_log_prob if upstream.logit is None else of_log_prob + upstream.logit / temperature
    at_label = at_label * here
    into = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    if cap is None and _is_native(logits) and native.kernels(into):
        given = softmax.lse, softmax.entropy, of_log_prob, of_entropy, at_label
        return native.softmax_gradient(logits, targets[:3], given, into)
    for rows in _blocks(logits):
        share = wide(logits[rows])
        if cap is not None:
            bent = (share / cap).tanh()
            share = bent * cap
        if temperature != 1.0:
            share.div_(temperature)
        share.sub_(softmax.lse[rows, None])
        if of_entropy is None:
            share.exp_().mul_(-of_log_prob[rows, None])
        else:
            factor = share + softmax.entropy[rows, None]
            factor.mul_(-of_entropy[rows, None]).sub_(of_log_prob[rows, None])
            share.exp_().mul_(factor)
        share.scatter_add_(-1, local[rows, None], at_label[rows, None])
        if cap is not None:
            share.mul_(1 - bent.square())
        if into is not logits or share.dtype != dtype or cap is not None:
            into[rows] = share
    return into


class Projection(NamedTuple):
    """A head's matrix `[V, D]` and perhaps bias `[V]`, of a piece of the vocabulary."""

    weight: Tensor
    bias: Tensor | None = None


def linear_statistics(
    hidden: Tensor,
    head: Projection,
    targets: Targets,
    moment: bool = False,
    best: bool = False,
    others: bool = False,
) -> Statistics:
    """Returns `statistics` of `hidden W^T + b` for hidden states `[T, D]`, without the logits.

    `others` says whether that of the name is wanted: the sum over all entries of the piece but the
    label of `exp(z - top)` times the entry's row of W, `[T, D]`. A frozen head's gradient needs no
    more (`frozen_gradient`), and makes no logits again.
    """
    parts = []
    for rows in token_chunks(hidden.shape[0], head.weight):
        logits, own = product.linear(hidden[rows], *head), targets.of(rows)
        if not others:
            parts.append(statistics(logits, own, moment, best, reuse=True))
            continue
        found = statistics(logits, own, moment, best, reuse=True, powers=logits)
        here, local = locate(own.labels, own.begin, logits.shape[-1])
        at = local[:, None]  # of a label elsewhere the first entry, which stays
        logits.scatter_(-1, at, logits.gather(-1, at).masked_fill_(here[:, None], 0))
        parts.append(found._replace(others=product.matmul(logits, head.weight.detach())))
    return Statistics(
        *(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True))
    )


def frozen_gradient(
    weight: Tensor, targets: Targets, found: Statistics, lse: Tensor, upstream: Tensor
) -> Tensor:
    """Returns the gradient of hidden states `[T, D]` through a head that is not trained, for that
    of log-probabilities `[T]`: `sum_j ((j = y) - p_j) W_j`, of this piece of the vocabulary.

    The label's own share is apart, so that a likely label's `1 - p` is not lost in rounding.
    """
    here, local = locate(targets.labels, targets.begin, weight.shape[0])
    away = -torch.expm1(found.label - lse) * here
    factor = upstream / targets.temperature
    made = wide(weight.detach()[local]) * (factor * away)[:, None]
    share = (factor * (found.top - lse).exp())[:, None]
    return made.sub_(wide(found.others) * share).to(weight.dtype)


class LinearGradients(NamedTuple):
    """Gradients of the hidden states, in their dtype, and of weight and bias, accumulated wide over
    the chunks.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def linear_gradients(
    hidden: Tensor, head: Projection, targets: Targets, softmax: Softmax, upstream: Upstream
) -> LinearGradients:
    """Returns gradients for those of `upstream`, through logits that are made again.

    The weight's is left out (None) when it takes none.
    """
    dtype = wide_dtype(head.weight.dtype)

    def gradient(logits: Tensor, rows: slice) -> Tensor:
        return _gradient(logits, targets.of(rows), softmax.of(rows), upstream.of(rows), dtype)

    return linear_backward(hidden, head, gradient)


def linear_backward(
    hidden: Tensor, head: Projection, gradient: Callable[[Tensor, slice], Tensor]
) -> LinearGradients:
    """Returns gradients through the logits of hidden states `[T, D]`, made again a chunk at a time:
    `gradient(logits, rows)` returns the wide one of a chunk's, and may overwrite them.

    The weight's is left out (None) when it takes none.
    """
    weight, bias = head
    dtype, device = wide_dtype(weight.dtype), weight.device
    into = torch.empty_like(hidden)
    into_weight = (
        torch.zeros(weight.shape, dtype=dtype, device=device) if weight.requires_grad else None
    )
    into_bias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=device)
    weight = weight.detach()
    for rows in token_chunks(hidden.shape[0], weight):
        x = hidden[rows]
        dy = gradient(product.linear(x, weight, bias), rows)
        product.matmul(dy.to(x.dtype), weight, into[rows])
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
        product.matmul(dy.mT, x.to(total.dtype), total, add=True)
    else:
        total += dy.to(x.dtype).mT @ x


def token_chunks(tokens: int, weight: Tensor) -> Iterator[slice]:
    """Yields the tokens whose logits over `weight` `[V, D]` are made at once; without any one empty
    chunk.
    """
    step = chunk_tokens(weight.shape[0], weight.dtype)
    # Without tokens one empty chunk: what is made of it has the right shape.
    yield from (slice(begin, min(begin + step, tokens)) for begin in range(0, max(1, tokens), step))
