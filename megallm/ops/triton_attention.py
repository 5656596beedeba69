"""Attention in Triton for GPUs: each query sees one interval of the keys, which is what causality,
a window, a document, a block of a ring or a shared prefix leave of them; with the log-sum-exp, and
the backward pass (FlashAttention-2, arXiv 2307.08691).

Only what some query of a block sees is read. `Intervals` is the plan, made of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megallm.ops.backends import require
from megallm.ops.precision import wide_dtype
from megallm.ops.tiles import CAUSAL, FULL, Tile

triton, tl = require("triton"), require("triton", "triton.language")

ROWS, KEYS = 64, 32  # of a block of scores


@dataclass(frozen=True)
class Intervals:
    """Query i sees keys `lows[i] <= j < highs[i]`; block n of keys is seen by queries
    `firsts[n] <= i < lasts[n]` alone. int32.
    """

    lows: Tensor
    highs: Tensor
    firsts: Tensor
    lasts: Tensor


@lru_cache(maxsize=256)
def intervals_of(
    tiles: tuple[Tile, ...], num_q: int, num_k: int, device: torch.device
) -> tuple[Intervals, ...]:
    """Returns the tiles as few plans: in each a query sees one interval; what touches is joined."""
    layers: list[tuple[Tensor, Tensor]] = []
    for tile in tiles:
        rows, (low, high) = slice(tile.q_begin, tile.q_end), _sight(tile)
        for lows, highs in layers:
            before, after = lows[rows], highs[rows]
            empty, joins = before == after, (high == before) | (low == after)
            if bool((empty | joins | (low == high)).all()):
                before.copy_(torch.where(empty, low, torch.minimum(before, low)))
                after.copy_(torch.where(empty, high, torch.maximum(after, high)))
                break
        else:
            lows, highs = (torch.zeros(num_q, dtype=torch.int32) for _ in range(2))
            lows[rows], highs[rows] = low, high
            layers.append((lows, highs))
    return tuple(_planned(lows, highs, num_k, device) for lows, highs in layers)


def _sight(tile: Tile) -> tuple[Tensor, Tensor]:
    place = torch.arange(tile.q_end - tile.q_begin, dtype=torch.int32)
    begin, end = tile.k_begin, tile.k_end
    if tile.kind == FULL:
        return torch.full_like(place, begin), torch.full_like(place, end)
    high = (place + tile.shift + 1 + begin).clamp(begin, end)
    low = torch.full_like(place, begin)
    if tile.kind != CAUSAL and tile.window is not None:
        low = (place + tile.shift - tile.window + 1 + begin).clamp(begin, end)
    return low, torch.maximum(low, high)


def _planned(lows: Tensor, highs: Tensor, num_k: int, device: torch.device) -> Intervals:
    begins = torch.arange(0, num_k, KEYS)[:, None]
    sees = (lows < begins + KEYS) & (highs > begins) & (highs > lows)
    firsts = torch.where(sees.any(1), sees.int().argmax(1), 0).to(torch.int32)
    lasts = len(lows) - sees.flip(1).int().argmax(1)
    lasts = torch.where(sees.any(1), lasts, 0).to(torch.int32)
    return Intervals(*(x.to(device, non_blocking=True) for x in (lows, highs, firsts, lasts)))


@triton.jit
def _rows(base, head, rows, num_rows, stride, heads, columns, SIZE: tl.constexpr):
    """Rows of one head of `[T, heads, SIZE]`, zeros outside."""
    places = base + rows[:, None] * stride * heads + head * stride + columns[None, :]
    seen = (rows[:, None] < num_rows) & (columns[None, :] < SIZE)
    return tl.load(places, mask=seen, other=0.0)


@triton.jit
def _pair(a, b, places, seen):
    """Two numbers of each query, 0 outside."""
    return tl.load(a + places, mask=seen, other=0), tl.load(b + places, mask=seen, other=0)


@triton.jit
def _forward(
    q,
    k,
    v,
    out,
    lse,
    lows,
    highs,
    scale,
    num_q,
    num_k,
    heads,
    share,
    E: tl.constexpr,
    EV: tl.constexpr,
    E2: tl.constexpr,
    EV2: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = heads // share
    rows, wide, wide_v = block * ROWS + tl.arange(0, ROWS), tl.arange(0, E2), tl.arange(0, EV2)
    low, high = _pair(lows, highs, rows, rows < num_q)
    begin = tl.min(tl.where(high > low, low, num_k), 0) // KEYS * KEYS
    mine = _rows(q + batch * num_q * heads * E, head, rows, num_q, E, heads, wide, E)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, EV2), tl.float32)
    keys_of, values_of = k + batch * num_k * kv_heads * E, v + batch * num_k * kv_heads * EV
    for first in range(begin, tl.max(high, 0), KEYS):
        keys = first + tl.arange(0, KEYS)
        theirs = _rows(keys_of, head // share, keys, num_k, E, kv_heads, wide, E)
        scores = tl.dot(mine, tl.trans(theirs), input_precision=PRECISION) * scale
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(better == float("-inf"), 0.0, better)
        weights, keep = tl.exp(scores - base[:, None]), tl.exp(best - base)
        values = _rows(values_of, head // share, keys, num_k, EV, kv_heads, wide_v, EV)
        total = total * keep + tl.sum(weights, 1)
        part = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        sums, best = sums * keep[:, None] + part, better
    some = tl.where(total > 0, total, 1.0)
    result = sums / some[:, None]
    places = batch * num_q * heads + rows * heads + head
    tl.store(
        lse + places, tl.where(total > 0, best + tl.log(some), float("-inf")), mask=rows < num_q
    )
    tl.store(
        out + places[:, None] * EV + wide_v[None, :],
        result.to(out.dtype.element_ty),
        mask=(rows[:, None] < num_q) & (wide_v[None, :] < EV),
    )


@triton.jit
def _weights(mine, theirs, keys, low, high, sums, scale, PRECISION: tl.constexpr):
    """The softmax's share of each pair, from the log-sum-exp of the whole."""
    scores = tl.dot(mine, tl.trans(theirs), input_precision=PRECISION) * scale
    seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
    return tl.where(seen, tl.exp(scores - sums[:, None]), 0.0)


@triton.jit
def _backward_q(
    q,
    k,
    v,
    grad,
    lse,
    inner,
    grad_q,
    lows,
    highs,
    scale,
    num_q,
    num_k,
    heads,
    share,
    E: tl.constexpr,
    EV: tl.constexpr,
    E2: tl.constexpr,
    EV2: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = heads // share
    rows, wide, wide_v = block * ROWS + tl.arange(0, ROWS), tl.arange(0, E2), tl.arange(0, EV2)
    low, high = _pair(lows, highs, rows, rows < num_q)
    begin = tl.min(tl.where(high > low, low, num_k), 0) // KEYS * KEYS
    places = batch * num_q * heads + rows * heads + head
    sums, ours = _pair(lse, inner, places, rows < num_q)
    mine = _rows(q + batch * num_q * heads * E, head, rows, num_q, E, heads, wide, E)
    dy = _rows(grad + batch * num_q * heads * EV, head, rows, num_q, EV, heads, wide_v, EV)
    total = tl.zeros((ROWS, E2), tl.float32)
    keys_of, values_of = k + batch * num_k * kv_heads * E, v + batch * num_k * kv_heads * EV
    for first in range(begin, tl.max(high, 0), KEYS):
        keys = first + tl.arange(0, KEYS)
        theirs = _rows(keys_of, head // share, keys, num_k, E, kv_heads, wide, E)
        values = _rows(values_of, head // share, keys, num_k, EV, kv_heads, wide_v, EV)
        weights = _weights(mine, theirs, keys, low, high, sums, scale, PRECISION)
        back = tl.dot(dy, tl.trans(values), input_precision=PRECISION) - ours[:, None]
        back = (weights * back * scale).to(theirs.dtype)
        total += tl.dot(back, theirs, input_precision=PRECISION)
    tl.store(
        grad_q + places[:, None] * E + wide[None, :],
        total,
        mask=(rows[:, None] < num_q) & (wide[None, :] < E),
    )


@triton.jit
def _backward_kv(
    q,
    k,
    v,
    grad,
    lse,
    inner,
    grad_k,
    grad_v,
    lows,
    highs,
    firsts,
    lasts,
    scale,
    num_q,
    num_k,
    heads,
    share,
    E: tl.constexpr,
    EV: tl.constexpr,
    E2: tl.constexpr,
    EV2: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = heads // share
    keys, wide, wide_v = block * KEYS + tl.arange(0, KEYS), tl.arange(0, E2), tl.arange(0, EV2)
    theirs = _rows(k + batch * num_k * kv_heads * E, kv_head, keys, num_k, E, kv_heads, wide, E)
    values = _rows(
        v + batch * num_k * kv_heads * EV, kv_head, keys, num_k, EV, kv_heads, wide_v, EV
    )
    of_k, of_v = tl.zeros((KEYS, E2), tl.float32), tl.zeros((KEYS, EV2), tl.float32)
    begin, end = tl.load(firsts + block) // ROWS * ROWS, tl.load(lasts + block)
    for number in range(share):
        head = kv_head * share + number
        for first in range(begin, end, ROWS):
            rows = first + tl.arange(0, ROWS)
            low, high = _pair(lows, highs, rows, rows < num_q)
            places = batch * num_q * heads + rows * heads + head
            sums, ours = _pair(lse, inner, places, rows < num_q)
            mine = _rows(q + batch * num_q * heads * E, head, rows, num_q, E, heads, wide, E)
            dy = _rows(grad + batch * num_q * heads * EV, head, rows, num_q, EV, heads, wide_v, EV)
            weights = _weights(mine, theirs, keys, low, high, sums, scale, PRECISION)
            of_v += tl.dot(tl.trans(weights.to(dy.dtype)), dy, input_precision=PRECISION)
            back = tl.dot(dy, tl.trans(values), input_precision=PRECISION) - ours[:, None]
            back = (weights * back * scale).to(mine.dtype)
            of_k += tl.dot(tl.trans(back), mine, input_precision=PRECISION)
    places = batch * num_k * kv_heads + keys * kv_heads + kv_head
    tl.store(
        grad_k + places[:, None] * E + wide[None, :],
        of_k,
        mask=(keys[:, None] < num_k) & (wide[None, :] < E),
    )
    tl.store(
        grad_v + places[:, None] * EV + wide_v[None, :],
        of_v,
        mask=(keys[:, None] < num_k) & (wide_v[None, :] < EV),
    )


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """What all kernels are given: numbers, then the sizes that they are compiled for."""
    size, value_size = q.shape[-1], v.shape[-1]
    whole = [max(16, triton.next_power_of_2(n)) for n in (size, value_size)]
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    numbers = size**-0.5, q.shape[1], k.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    return *numbers, size, value_size, *whole, ROWS, KEYS, precision


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Intervals) -> tuple[Tensor, Tensor]:
    """Computes attention of q `[B, Tq, H, E]` to k, v `[B, Tk, K, E or Ev]`. Returns `[B, Tq, H,
    Ev]` and the wide log-sum-exp `[B, Tq, H]`, -inf where a query sees nothing.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    grid = (triton.cdiv(q.shape[1], ROWS), q.shape[2], len(q))
    _forward[grid](q, k, v, out, lse, plan.lows, plan.highs, *_sizes(q, k, v))
    return out, lse


def backward(
    given: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, v: Tensor, plan: Intervals
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the wide gradients of q, k and v, from `given`: q, the output and the log-sum-exp of
    the whole softmax, and the gradient of that output.
    """
    q, out, lse, grad = (x.contiguous() for x in given)
    k, v, dtype = k.contiguous(), v.contiguous(), wide_dtype(q.dtype)
    inner = (grad.to(dtype) * out.to(dtype)).sum(-1)
    grads = [torch.zeros_like(x, dtype=dtype) for x in (q, k, v)]
    saved, sizes = (q, k, v, grad.to(q.dtype), lse, inner), _sizes(q, k, v)
    grid = (triton.cdiv(q.shape[1], ROWS), q.shape[2], len(q))
    _backward_q[grid](*saved, grads[0], plan.lows, plan.highs, *sizes)
    plans = plan.lows, plan.highs, plan.firsts, plan.lasts
    grid = (triton.cdiv(k.shape[1], KEYS), k.shape[2], len(q))
    _backward_kv[grid](*saved, *grads[1:], *plans, *sizes)
    return tuple(grads)
