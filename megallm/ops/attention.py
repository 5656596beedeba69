"""Causal or full attention of query heads over (fewer) key/value heads, with windows, packed
documents and blocks.

The attention mask is never a matrix: `MaskSpec` describes it, `tiles` plans what of it is computed.

`causal_attention` is the one-rank path. Blocks are the parts of a larger softmax: `attention_block`
returns its output together with the log-sum-exp of its scores, from which `Partial` merges any
number of blocks exactly (online softmax, arXiv 2205.14135; ring attention, arXiv 2310.01889), and
`attention_block_backward` gives the gradients of one block from the output and the log-sum-exp of
the whole. Values may be smaller than keys.

Attention sinks are one more score a head with no value behind it, as in gpt-oss: they are merged
into the finished softmax by its log-sum-exp, so no block knows of them. A prefix is one more block
that every query sees whole, whatever its document and window (prefix tuning, arXiv 2101.00190).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel

from megallm.base.optional import version
from megallm.ops import flash, native
from megallm.ops.precision import wide, wide_dtype
from megallm.ops.tiles import (
    BAND,
    CAUSAL,
    FULL,
    NEAR,
    MaskSpec,
    Span,
    Tile,
    pieces_of,
    plan_tiles,
    runs_of,
)

Prefix = tuple[Tensor, Tensor]  # keys [P, K, E] and values [P, K, Ev] that every query sees

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
PIECE = 512  # queries and keys whose scores are written out at once
_LENGTHS = {torch.bfloat16: 64}  # what lengths of documents are rounded up to


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """Returns the attention mask, bool `[..., Tq, Tk]`: key j is seen from query i when `i - window
    < j <= i` (Mistral, arXiv 2310.06825).
    """
    gap = q_positions[..., :, None] - k_positions[..., None, :]
    seen = gap >= 0
    return seen if window is None else seen & (gap < window)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Prefix | None = None,
    cap: float | None = None,
) -> Tensor:
    """Computes causal softmax attention, scale `E**-0.5`; `cap` is a soft cap of the scores.

    q `[B, Tq, H, E]`, k `[B, Tk, K, E]` and v `[B, Tk, K, Ev]` with H a multiple of K, sinks `[H]`;
    the queries are the *last* Tq of the Tk positions. Returns `[B, Tq, H, Ev]`.
    """
    tq, tk, size = q.shape[1], k.shape[1], v.shape[-1]
    windowed = window is not None and window < tk
    further = sinks is not None or prefix is not None or cap is not None
    further = further or native.takes_attention(q, k, v)
    if further or tq > 1 and (windowed or tq != tk) or not _sdpa_fits(q, v):
        return packed_attention(q, k, v, MaskSpec((0, tk), window, cap=cap), sinks, prefix)
    mask = None
    if windowed:
        places = torch.arange(tk, device=q.device)
        mask = visible(places[tk - tq :], places, window)
    return _sdpa(q, k, v, mask, tq > 1)[..., :size]


def _sdpa_fits(q: Tensor, v: Tensor) -> bool:
    """Whether torch's own attention has a kernel: else it would make a matrix of scores."""
    dtypes = flash.CPU_DTYPES if q.device.type == "cpu" else flash.SDPA_DTYPES
    return q.dtype in dtypes and v.shape[-1] <= q.shape[-1]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """torch's own attention, `[B, T, heads, E]` -> the same; the values may be narrower."""
    narrow = q.device.type == "cpu"
    q, k, v = (x.transpose(1, 2) for x in (q, k, _widened(v, q) if narrow else v))
    order = flash.sdpa_order(flash.capability_of(q.device))
    kernels = [SDPBackend.__members__[name] for name in order]
    with nullcontext() if narrow else sdpa_kernel(kernels, set_priority=True):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_spec: MaskSpec,
    sinks: Tensor | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Computes attention inside the documents of a row: q `[B, Tq, H, E]`, k and v `[B, T, K, E or
    Ev]` -> `[B, Tq, H, Ev]`.

    The queries are the last Tq of the T tokens; sinks `[H]`.

    A row that is one document and sees itself whole is torch's own attention. Only tiles with
    something visible are computed, so work grows with the documents (and the window), not with T^2.
    """
    plain = sinks is None and prefix is None and mask_spec.window is None and mask_spec.cap is None
    one = not mask_spec.causal and len(mask_spec.documents) == 2
    one = one and not native.takes_attention(q, k, v)
    if one and plain and _sdpa_fits(q, v):
        return _sdpa(q, k, v, None, False)[..., : v.shape[-1]]
    return _Packed.apply(q, k, v, mask_spec, sinks, *(prefix or (None, None)))


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_spec: MaskSpec,
        sinks: Tensor | None,
        *prefix: Tensor | None,
    ) -> Tensor:
        end = k.shape[1]
        queries = (Span(end - q.shape[1], end),)
        strips = executor(q, v) not in (flash.NATIVE, flash.RUNS, flash.TRITON)
        ctx.tiles = plan_tiles(queries, (Span(0, end),), mask_spec, strips)
        partial = Partial.empty(q, v)
        partial.add(q, k, v, ctx.tiles)
        partial.add_prefix(q, *prefix, cap=mask_spec.cap)
        out = partial.finish(sinks).to(q.dtype)
        ctx.cap = mask_spec.cap
        ctx.save_for_backward(q, k, v, sinks, *prefix, out, partial.lse)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        q, k, v, sinks, *prefix, out, lse = ctx.saved_tensors
        queries, grads = Queries(q, out, lse, grad), Gradients.zeros(q, k, v)
        grads.add(queries, k, v, ctx.tiles)
        prefix_grads = grads.add_prefix(queries, *prefix, cap=ctx.cap)
        return (
            grads.q.to(q.dtype),
            grads.k.to(k.dtype),
            grads.v.to(v.dtype),
            None,
            queries.sink_gradient(sinks),
            *prefix_grads,
        )


# Parts of a larger softmax


@dataclass
class Partial:
    """Attention over the keys seen so far: `out` `[B, Tq, H, Ev]` wide, `lse` `[B, Tq, H]`, -inf
    before the first.
    """

    out: Tensor
    lse: Tensor

    @staticmethod
    def empty(q: Tensor, v: Tensor) -> Partial:
        """Returns the partial result of nothing seen yet."""
        out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=wide_dtype(q.dtype))
        return Partial(out, out.new_full(q.shape[:3], -torch.inf))

    def add(self, q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile]) -> None:
        """Merge tiles of the queries against further keys, in place."""
        tiles = tuple(tiles)
        kind = executor(q, v, tiles)
        if kind == flash.NATIVE:
            native.attend_(self.out, self.lse, q, k, v, tiles)
            return
        if kind == flash.RUNS:
            for run in runs_of(tiles):
                rows, keys = run.rows, run.keys
                self._merge(rows, *flash.run_forward(q[:, rows], k[:, keys], v[:, keys], run))
            return
        if kind == flash.TRITON:
            kernels, whole = _triton(), (q.shape[1], k.shape[1], q.device)
            for plan in kernels.intervals_of(tiles, *whole):
                self._merge(slice(None), *kernels.forward(q, k, v, plan))
            return
        for tile in tiles if kind == flash.CPU else _pieces(tiles):
            rows, keys = slice(tile.q_begin, tile.q_end), slice(tile.k_begin, tile.k_end)
            self._merge(rows, *attention_block(q[:, rows], k[:, keys], v[:, keys], tile))

    def _merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        before, so_far = self.lse[:, rows], self.out[:, rows]
        after = torch.logaddexp(before, lse)
        base = after.clamp(min=torch.finfo(after.dtype).min)  # where nothing was seen yet
        so_far.mul_((before - base).exp_()[..., None]).add_(out * (lse - base).exp_()[..., None])
        before.copy_(after)

    def add_prefix(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, cap: float | None = None
    ) -> None:
        """Merge a prefix `[P, K, E or Ev]`, the same for all rows, in place; None: there is
        none.
        """
        if k is not None:
            self.add(q, *_rows_of(q, k, v), (_prefix_tile(q, k, cap),))

    def finish(self, sinks: Tensor | None) -> Tensor:
        """Returns `out` when all keys were seen; with sinks `[H]` one more score a head, of a value
        that is zero.
        """
        if sinks is not None:
            after = torch.logaddexp(self.lse, wide(sinks))
            self.out.mul_((self.lse - after).exp_()[..., None])
            self.lse = after
        return self.out


@dataclass(frozen=True)
class Queries:
    """Queries with the finished result of theirs and its gradient: all a block's backward needs
    beside its keys.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    grad: Tensor

    def rows(self, rows: slice) -> Queries:
        """Returns some of the queries."""
        return Queries(self.q[:, rows], self.out[:, rows], self.lse[:, rows], self.grad[:, rows])

    def sink_gradient(self, sinks: Tensor | None) -> Tensor | None:
        """Returns gradient `[H]` of the sinks: each takes its share of the softmax away from the
        output.
        """
        if sinks is None:
            return None
        share = (wide(sinks) - self.lse).exp_()
        return -(share * (wide(self.grad) * wide(self.out)).sum(-1)).sum((0, 1)).to(sinks.dtype)


@dataclass(frozen=True)
class Gradients:
    """Wide sums of the gradients of q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def zeros(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        return Gradients(*(torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in (q, k, v)))

    def add(self, queries: Queries, k: Tensor, v: Tensor, tiles: Iterable[Tile]) -> None:
        """Add what the tiles contribute, in place."""
        tiles = tuple(tiles)
        kind = executor(queries.q, v, tiles)
        if kind == flash.NATIVE:
            given = queries.q, queries.out, queries.lse, queries.grad
            native.attend_backward_((self.q, self.k, self.v), given, k, v, tiles)
            return
        if kind == flash.RUNS:
            for run in runs_of(tiles):
                rows, keys, mine = run.rows, run.keys, queries.rows(run.rows)
                given = mine.q, mine.out, mine.lse, mine.grad
                grads = flash.run_backward(given, k[:, keys], v[:, keys], run)
                self._add(rows, keys, grads)
            return
        if kind == flash.TRITON:
            kernels, whole = _triton(), (queries.q.shape[1], k.shape[1], k.device)
            given = queries.q, queries.out, queries.lse, queries.grad
            for plan in kernels.intervals_of(tiles, *whole):
                self._add(slice(None), slice(None), kernels.backward(given, k, v, plan))
            return
        for tile in tiles if kind == flash.CPU else _pieces(tiles):
            rows, keys = slice(tile.q_begin, tile.q_end), slice(tile.k_begin, tile.k_end)
            mine = queries.rows(rows)
            self._add(rows, keys, attention_block_backward(mine, k[:, keys], v[:, keys], tile))

    def _add(self, rows: slice, keys: slice, grads: tuple[Tensor, ...]) -> None:
        totals = (self.q, self.k, self.v)
        for total, part, where in zip(totals, grads, (rows, keys, keys), strict=True):
            total[:, where] += part

    def add_prefix(
        self, queries: Queries, k: Tensor | None, v: Tensor | None, cap: float | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add what a prefix contributes to the gradient of q; returns those of its keys and
        values.
        """
        if k is None:
            return None, None
        keys, values = _rows_of(queries.q, k, v)
        sums = Gradients(self.q, *(torch.zeros_like(x, dtype=self.q.dtype) for x in (keys, values)))
        sums.add(queries, keys, values, (_prefix_tile(queries.q, k, cap),))
        return sums.k.sum(0).to(k.dtype), sums.v.sum(0).to(v.dtype)


def _prefix_tile(q: Tensor, k: Tensor, cap: float | None) -> Tile:
    return Tile(FULL, 0, q.shape[1], 0, len(k), 0, cap=cap)


def _rows_of(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [x.expand(len(q), *x.shape) for x in tensors]


def attention_block(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Computes attention of q `[B, Tq, H, E]` over k, v `[B, Tk, K, E or Ev]` alone, masked as the
    tile's kind says.

    Returns the output `[B, Tq, H, Ev]` and the wide log-sum-exp `[B, Tq, H]` of the scaled scores.
    """
    kind = executor(q, v, (tile,))
    if kind == flash.NATIVE:
        part = Partial.empty(q, v)
        native.attend_(part.out, part.lse, q, k, v, (_alone(tile),))
        return part.out.to(q.dtype), part.lse
    if kind != flash.CPU:
        return _block(q, k, v, tile)
    tokens, size = q.shape[1], v.shape[-1]
    q, k, v = (_lengthened(x, tile, q.dtype).transpose(1, 2) for x in (q, k, _widened(v, q)))
    out, lse = _FLASH(
        q, k, v, 0.0, tile.kind == CAUSAL, attn_mask=_additive(tile, q), scale=q.shape[-1] ** -0.5
    )
    return out.transpose(1, 2)[:, :tokens, :, :size], lse.transpose(1, 2)[:, :tokens]


def attention_block_backward(
    queries: Queries, k: Tensor, v: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of q, k and v through this block, one of those merged into `queries.out`
    and `queries.lse`.
    """
    kind = executor(queries.q, v, (tile,))
    if kind == flash.NATIVE:
        sums = Gradients.zeros(queries.q, k, v)
        sums.add(queries, k, v, (_alone(tile),))
        return sums.q, sums.k, sums.v
    if kind != flash.CPU:
        return _block_backward(queries, k, v, tile)
    tokens, size, whole = (
        k.shape[1],
        v.shape[-1],
        (_widened(x, queries.q) for x in (queries.out, queries.grad, v)),
    )
    given = (_lengthened(x, tile, k.dtype) for x in (queries.q, k, queries.lse, *whole))
    q, k, lse, out, grad, v = (x.transpose(1, 2) for x in given)
    mask, scale = _additive(tile, q), q.shape[-1] ** -0.5
    grads = _FLASH_BACKWARD(
        grad, q, k, v, out, lse, 0.0, tile.kind == CAUSAL, attn_mask=mask, scale=scale
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
    return grad_q[:, : tile.q_end - tile.q_begin], grad_k[:, :tokens], grad_v[:, :tokens, :, :size]


def _alone(tile: Tile) -> Tile:
    """The tile of queries and keys that hold nothing else."""
    queries, keys = tile.q_end - tile.q_begin, tile.k_end - tile.k_begin
    return replace(tile, q_begin=0, q_end=queries, k_begin=0, k_end=keys)


def executor(q: Tensor, v: Tensor, tiles: Iterable[Tile] = ()) -> str:
    """Returns who computes these tiles of the queries; see `flash.executor_of`. No kernel knows a
    soft cap of the scores, and none of GPUs a window to both sides: those are written out.
    """
    capability = flash.capability_of(q.device)
    sizes, installed = (q.shape[-1], v.shape[-1]), q.is_cuda and _has_triton()
    if native.takes_attention(q, v) and all(tile.cap is None for tile in tiles):
        return flash.NATIVE
    kind = flash.executor_of(q.device.type, capability, q.dtype, sizes, installed)
    for tile in tiles:
        if tile.cap is not None or tile.kind == NEAR and kind != flash.CPU:
            return flash.WRITTEN_OUT
    return kind


@cache
def _has_triton() -> bool:
    return version("triton") is not None


def _triton() -> ModuleType:
    """The kernels in Triton, which is imported where they are used."""
    return importlib.import_module("megallm.ops.triton_attention")


def _pieces(tiles: Iterable[Tile]) -> Iterable[Tile]:
    return (piece for tile in tiles for piece in pieces_of(tile, PIECE))


def _widened(x: Tensor, q: Tensor) -> Tensor:
    """`x` with zeros behind its last dim up to the size of a query: kernels want one size."""
    missing = q.shape[-1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing > 0 else x


def _lengthened(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """`x` with zeros behind its tokens, which no query of theirs sees, up to a length that many
    documents share.

    oneDNN compiles its bf16 kernels for each size it meets and keeps a thousand of them, about 1 MB
    each.
    """
    missing = -x.shape[1] % _LENGTHS.get(dtype, 1) if tile.kind == CAUSAL else 0
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x


def _seen(tile: Tile, device: torch.device) -> Tensor | None:
    """Bool `[Tq, Tk]` of what a tile shows; None when it shows everything."""
    if tile.kind == FULL:
        return None
    rows = torch.arange(tile.q_end - tile.q_begin, device=device) + tile.shift
    keys = torch.arange(tile.k_end - tile.k_begin, device=device)
    if tile.kind == NEAR:
        return (rows[:, None] - keys).abs() < tile.window
    return visible(rows, keys, tile.window)


def _additive(tile: Tile, q: Tensor) -> Tensor | None:
    """A BAND, or a window to both sides, as what the flash kernel adds to the scores."""
    if tile.kind not in (BAND, NEAR):
        return None
    seen = _seen(tile, q.device)
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)


# Written out, for every device and dtype, and for values that are larger than the keys


def _grouped(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q `[B, K, H/K, Tq, E]` and k `[B, K, 1, Tk, E]`, wide."""
    return wide(q).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4), wide(k).transpose(1, 2)[
        :, :, None
    ]


def _ungrouped(x: Tensor) -> Tensor:
    """`[B, K, H/K, Tq, E]` -> `[B, Tq, H, E]`."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """The scores as softmax takes them, and with a soft cap its derivative at each of them."""
    scores, slope = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, None
    if tile.cap is not None:
        bent = scores.div_(tile.cap).tanh_()
        scores, slope = bent * tile.cap, 1 - bent.square()
    seen = _seen(tile, q.device)
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf), slope


def _block(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    rows, keys = _grouped(q, k)
    scores, _ = _scores(rows, keys, tile)
    lse = scores.logsumexp(-1, keepdim=True)
    base = lse.clamp(min=torch.finfo(lse.dtype).min)  # a query may see nothing of a piece
    out = (scores - base).exp_() @ wide(v).transpose(1, 2)[:, :, None]
    return _ungrouped(out).to(q.dtype), _ungrouped(lse).squeeze(-1)


def _block_backward(
    queries: Queries, k: Tensor, v: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = _grouped(queries.q, k)
    values = wide(v).transpose(1, 2)[:, :, None]
    out, grad, lse = (
        _grouped(x, k)[0] for x in (queries.out, queries.grad, queries.lse[..., None])
    )
    scores, slope = _scores(rows, keys, tile)
    weights = (scores - lse).exp_()
    inner = (
        (grad @ values.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
        * weights
        * rows.shape[-1] ** -0.5
    )
    inner = inner if slope is None else inner * slope
    grad_k, grad_v = (
        (inner.transpose(-1, -2) @ rows).sum(2),
        (weights.transpose(-1, -2) @ grad).sum(2),
    )
    return _ungrouped(inner @ keys), grad_k.transpose(1, 2), grad_v.transpose(1, 2)
