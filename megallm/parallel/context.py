"""Context parallelism: attention over a row that is split along T over the cp ranks.

Outside attention a rank simply has fewer tokens, in zigzag order (`parallel.zigzag`). Inside, the
ranks are `ulysses` neighbours that exchange heads for tokens by all-to-all (DeepSpeed-Ulysses,
arXiv 2309.14509), times a ring of the rest over which keys and values travel: passed on from rank
to rank while the previous block is computed (Ring Attention, arXiv 2310.01889), or all-gathered
(Llama 3, arXiv 2407.21783). Ring is (1, ring), Ulysses (cp, -), all-gather (1, allgather) and
hybrid (u, ring) of this one module (USP, arXiv 2405.07719). The backward passes are written by
hand: a ring's key gradients travel the ring too and end up at home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megallm.base.errors import DataError, InternalError
from megallm.ops.attention import (
    Gradients,
    Partial,
    Prefix,
    Queries,
    causal_attention,
    packed_attention,
)
from megallm.ops.precision import wide_dtype
from megallm.ops.tiles import MaskSpec, Span, Tile, plan_tiles, row_mask_spec
from megallm.parallel import comm, ledger
from megallm.parallel.config import LayoutConfig
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.zigzag import check_length, natural_order, rank_order, spans, ulysses_degree

TOKENS_DIM = 1
KEYS, GRADIENTS = 1, 2  # tags of the two kinds of messages on a ring


@dataclass(frozen=True)
class Moving:
    """A message on its way to the next rank and the one that comes from the previous."""

    sent: Tensor
    arriving: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        """Returns what arrived; both directions are done."""
        for work in self.works:
            work.wait()
        return self.arriving


def pass_on(x: Tensor, axis: Axis, tag: int) -> Moving:
    """Start sending contiguous `x` to the next rank of the axis and receiving its like from the
    previous one.

    Every rank of the axis calls this in the same order. Messages of one direction and tag arrive in
    the order they were sent; the tag keeps keys and gradients apart where the next rank is also the
    previous one.
    """
    arriving = torch.empty_like(x)
    after, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[(axis.rank - 1) % axis.size]
    works = ledger.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, after, axis.group, tag),
            dist.P2POp(dist.irecv, arriving, before, axis.group, tag),
        ]
    )
    return Moving(x, arriving, works)


def pack(k: Tensor, v: Tensor) -> Tensor:
    """Returns keys and values as one message."""
    return torch.cat((k.flatten(), v.flatten()))


def unpack(message: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the two tensors in a message, shaped like `k` and `v`."""
    first, second = message.split((k.numel(), v.numel()))
    return first.view(k.shape), second.view(v.shape)


def to_natural(x: Tensor, size: int) -> Tensor:
    """Maps `[B, T, ...]` in the order of `size` ranks' pieces -> in the order of the row."""
    return _reorder(x, natural_order(size))


def to_ranks(x: Tensor, size: int) -> Tensor:
    """Maps `[B, T, ...]` in the order of the row -> the ranks' pieces, rank after rank."""
    return _reorder(x, rank_order(size))


def _reorder(x: Tensor, order: list[int]) -> Tensor:
    chunks = x.chunk(
        len(order), TOKENS_DIM
    )  # not an index tensor: making one on the device would wait for it
    return torch.cat([chunks[n] for n in order], TOKENS_DIM)


Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KeyExchange:
    """How this rank's queries meet the keys of all ranks: over which transport, and what they may
    see of them.

    With `expand` it is not keys and values that travel but the pair of which it makes them, such as
    the latents of all heads: less to send and to keep, for work that every rank does anew in both
    passes.
    """

    transport: Ring | AllGather
    mask_spec: MaskSpec
    expand: Expand | None = None

    def keys_and_values(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of what has travelled."""
        return (k, v) if self.expand is None else self.expand(k, v)

    def add_gradients(
        self, sums: Gradients, queries: Queries, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]
    ) -> None:
        """Add what the tiles contribute to the gradients of queries and of what has travelled, in
        place.

        Parameters that `expand` uses get their gradients too.
        """
        if self.expand is None or not tiles:
            sums.add(queries, k, v, tiles)
            return
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (k, v)]
            made = self.expand(*leaves)
        found = Gradients(sums.q, *(torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in made))
        found.add(queries, *(x.detach() for x in made), tiles)
        torch.autograd.backward(
            made, [grad.to(x.dtype) for grad, x in zip((found.k, found.v), made, strict=True)]
        )
        for total, leaf in zip((sums.k, sums.v), leaves, strict=True):
            total += leaf.grad


# Transports of keys: each has `forward` -> the finished Partial of this rank's queries, and
# `backward` -> Gradients.


class Ring:
    """Key blocks go round the ring, each on its way while the one before it is computed."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def source(self, step: int) -> int:
        """Returns the rank whose keys are here in this step."""
        return (self.axis.rank - step) % self.axis.size

    def tiles(self, step: int, length: int, mask_spec: MaskSpec) -> tuple[Tile, ...]:
        """Returns what this rank's queries see of the keys of one step."""
        size = self.axis.size
        return plan_tiles(
            spans(length, size, self.axis.rank), spans(length, size, self.source(step)), mask_spec
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, exchange: KeyExchange) -> Partial:
        size, length, here, partial = (
            self.axis.size,
            exchange.mask_spec.documents[-1],
            pack(k, v),
            None,
        )
        for step in range(size):
            moving = pass_on(here, self.axis, KEYS) if step + 1 < size else None
            if step == 0 or "cp.lse" not in self.axis.broken:
                keys, values = exchange.keys_and_values(*unpack(here, k, v))
                partial = Partial.empty(q, values) if partial is None else partial
                partial.add(q, keys, values, self.tiles(step, length, exchange.mask_spec))
            here = moving.wait() if moving else here
        return partial

    def backward(self, queries: Queries, k: Tensor, v: Tensor, exchange: KeyExchange) -> Gradients:
        size, length = self.axis.size, exchange.mask_spec.documents[-1]
        here, dtype = pack(k, v), wide_dtype(k.dtype)
        grad_q, own, arriving = torch.zeros_like(queries.q, dtype=dtype), None, None
        for step in range(size):
            moving = pass_on(here, self.axis, KEYS) if step + 1 < size else None
            sums = torch.zeros_like(here, dtype=dtype)
            grads, tiles = (
                Gradients(grad_q, *unpack(sums, k, v)),
                self.tiles(step, length, exchange.mask_spec),
            )
            exchange.add_gradients(grads, queries, *unpack(here, k, v), tiles)
            own = sums.clone() if own is None else own
            if arriving:
                sums += arriving.wait()  # of this block, from the ranks that had it before
            arriving = pass_on(sums, self.axis, GRADIENTS)
            here = moving.wait() if moving else here
        home = arriving.wait()  # the last pass brings each block's gradient to its owner
        return Gradients(grad_q, *unpack(own if "cp.kv_grads" in self.axis.broken else home, k, v))


class AllGather:
    """Every rank gathers all keys, and again in the backward pass instead of keeping them."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def tiles(self, length: int, mask_spec: MaskSpec) -> tuple[Tile, ...]:
        """Returns what this rank's queries see of the whole row."""
        return plan_tiles(
            spans(length, self.axis.size, self.axis.rank), (Span(0, length),), mask_spec
        )

    def gather(self, x: Tensor) -> Tensor:
        return to_natural(comm.all_gather(x, self.axis, TOKENS_DIM), self.axis.size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, exchange: KeyExchange) -> Partial:
        keys, values = exchange.keys_and_values(self.gather(k), self.gather(v))
        partial = Partial.empty(q, values)
        partial.add(
            q, keys, values, self.tiles(exchange.mask_spec.documents[-1], exchange.mask_spec)
        )
        return partial

    def backward(self, queries: Queries, k: Tensor, v: Tensor, exchange: KeyExchange) -> Gradients:
        keys, values = self.gather(k), self.gather(v)
        grads = Gradients.zeros(queries.q, keys, values)
        exchange.add_gradients(
            grads,
            queries,
            keys,
            values,
            self.tiles(exchange.mask_spec.documents[-1], exchange.mask_spec),
        )
        pieces = (to_ranks(x, self.axis.size) for x in (grads.k, grads.v))
        return Gradients(
            grads.q, *(comm.reduce_scatter(x, self.axis, TOKENS_DIM, "cp.kv_grads") for x in pieces)
        )


class _Attend(torch.autograd.Function):
    """Attention of this rank's queries over the keys of all ranks of the transport."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        exchange: KeyExchange,
        sinks: Tensor | None,
        *prefix: Tensor | None,
    ) -> Tensor:
        partial = exchange.transport.forward(q, k, v, exchange)
        # Each rank for its queries: together each meets it once.
        partial.add_prefix(q, *prefix, cap=exchange.mask_spec.cap)
        out = partial.finish(sinks).to(q.dtype)
        ctx.exchange = exchange
        ctx.save_for_backward(q, k, v, sinks, *prefix, out, partial.lse)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        q, k, v, sinks, *prefix, out, lse = ctx.saved_tensors
        queries = Queries(q, out, lse, grad)
        grads = ctx.exchange.transport.backward(queries, k, v, ctx.exchange)
        of_prefix = grads.add_prefix(queries, *prefix, cap=ctx.exchange.mask_spec.cap)
        further = queries.sink_gradient(sinks), *of_prefix
        return grads.q.to(q.dtype), grads.k.to(k.dtype), grads.v.to(v.dtype), None, *further


# Ulysses


def heads_for_tokens(tensors: tuple[Tensor, ...], axis: Axis) -> list[Tensor]:
    """Exchanges (all-to-all) all heads of some tokens `[B, T, heads, E]` -> some heads of all the
    axis's tokens `[B, T size, heads/size, E]`.

    One all-to-all for all tensors; what arrives is in the order of the row.
    """
    size, b, t = axis.size, *tensors[0].shape[:2]
    sent = torch.cat([x.unflatten(2, (size, -1)).flatten(3) for x in tensors], dim=-1)
    got = comm.all_to_all_fwd_all_to_all_bwd(sent.movedim(2, 0), axis, "cp.heads")
    row = to_natural(got.movedim(0, 1).reshape(b, size * t, -1), size)
    shapes = [(x.shape[2] // size, x.shape[3]) for x in tensors]
    return [
        x.unflatten(-1, s)
        for x, s in zip(row.split([h * e for h, e in shapes], dim=-1), shapes, strict=True)
    ]


def tokens_for_heads(x: Tensor, axis: Axis) -> Tensor:
    """Exchanges one tensor back (all-to-all): `[B, T size, heads/size, E]` -> `[B, T, heads, E]`.
    """
    sent = to_ranks(x, axis.size).unflatten(TOKENS_DIM, (axis.size, -1)).movedim(TOKENS_DIM, 0)
    return comm.all_to_all_fwd_all_to_all_bwd(sent, axis, "cp.heads").movedim(0, 2).flatten(2, 3)


def divisible_heads(x: Tensor, size: int) -> Tensor:
    """Returns key/value heads `[..., K, E]` repeated as little as lets `size` divide them; autograd
    adds the copies up.

    With `heads % size == heads % K == 0` query heads, each still meets its own key head after the
    exchange.
    """
    heads = x.shape[-2]
    return x.repeat_interleave(lcm(heads, size) // heads, dim=-2)


class Context:
    """How the tokens of a row are spread over cp, and attention across them; construction is
    collective over the world.

    `heads` are the query heads of a tensor-parallel rank. Raises UsageError where `kind` does not
    fit them.
    """

    def __init__(self, mesh: Mesh, layout: LayoutConfig, heads: int) -> None:
        degree = ulysses_degree(layout.cp_kind, mesh.cp.size, heads, layout.cp_ulysses)
        ring, self.ulysses = mesh.view("cp", degree)
        self.axis = mesh.cp
        self.transport = AllGather(ring) if layout.cp_kind == "allgather" else Ring(ring)

    def local(self, x: Tensor) -> Tensor:
        """Returns this rank's tokens of `[B, T, ...]`."""
        check_length(x.shape[TOKENS_DIM], self.axis.size)
        if self.axis.size == 1:
            return x
        pieces = [
            x[:, span.begin : span.end]
            for span in spans(x.shape[TOKENS_DIM], self.axis.size, self.axis.rank)
        ]
        return torch.cat(pieces, dim=TOKENS_DIM)

    def whole(self, x: Tensor) -> Tensor:
        """Gathers per-token results `[B, T/cp]` -> `[B, T]` in the order of the row; collective
        over cp.

        Every cp rank computes the identical loss from it, so the gradient of a rank's tokens is a
        slice.
        """
        if self.axis.size == 1:
            return x
        return to_natural(
            comm.gather_fwd_slice_bwd(x, self.axis, TOKENS_DIM, "cp.outputs"), self.axis.size
        )

    def mask_spec(
        self, batch: dict[str, Tensor], window: int | None, causal: bool = True
    ) -> MaskSpec | None:
        """Returns what the tokens of a microbatch may see; None when that is ordinary causal
        attention on one rank.

        A packed row has `cu_seqlens` int32 `[n+1]` and B = 1, else DataError is raised; and perhaps
        `prefix_of` int32 `[n]`, the document that stands before each, -1: none. Both lie on the
        CPU, since they are read here.
        """
        rows, length = batch["positions"].shape
        if "cu_seqlens" not in batch:
            return (
                None
                if causal and self.axis.size == 1
                else row_mask_spec(length, None, window, causal)
            )
        if rows != 1:
            raise DataError(
                f"a microbatch with cu_seqlens has {rows} rows; packed documents fill one row (B "
                "= 1)."
            )
        prefixes = batch["prefix_of"].tolist() if "prefix_of" in batch else ()
        return row_mask_spec(length, batch["cu_seqlens"].tolist(), window, causal, prefixes)

    def parallel_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_spec: MaskSpec | None,
        window: int | None,
        sinks: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Computes attention over a split sequence: q `[B, T/cp, H, E]`, k `[B, T/cp, K, E]`, v
        `[B, T/cp, K, Ev]`, sinks `[H]` -> `[B, T/cp, H, Ev]`; over cp. A prefix is the same on all
        cp ranks, its gradient a partial sum.
        """
        if mask_spec is None:
            return causal_attention(q, k, v, window, sinks, prefix)
        if self.axis.size == 1:
            return packed_attention(q, k, v, mask_spec, sinks, prefix)
        self._check(q, mask_spec)
        size = self.ulysses.size
        if size > 1:
            q, k, v = heads_for_tokens(
                (q, divisible_heads(k, size), divisible_heads(v, size)), self.ulysses
            )
            sinks = None if sinks is None else comm.own_slice(sinks, self.ulysses, 0)
            prefix = prefix and tuple(
                comm.own_slice(divisible_heads(x, size), self.ulysses, -2) for x in prefix
            )
        if self.transport.axis.size == 1:
            out = packed_attention(q, k, v, mask_spec, sinks, prefix)
        else:
            exchange = KeyExchange(self.transport, mask_spec)
            out = _Attend.apply(q, k, v, exchange, sinks, *(prefix or (None, None)))
        return tokens_for_heads(out, self.ulysses) if size > 1 else out

    @property
    def carries_latents(self) -> bool:
        """Whether `parallel_latent_attention` applies: keys travel, and no heads are exchanged for
        tokens before.
        """
        return self.transport.axis.size > 1 and self.ulysses.size == 1

    def parallel_latent_attention(
        self,
        q: Tensor,
        latent: Tensor,
        key: Tensor,
        expand: Expand,
        mask_spec: MaskSpec,
        sinks: Tensor | None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Computes `parallel_attention` to `expand(latent, key)` of every rank's `[B, T/cp, 1,
        ...]`, which travel in place of that.
        """
        self._check(q, mask_spec)
        exchange = KeyExchange(self.transport, mask_spec, expand)
        return _Attend.apply(q, latent, key, exchange, sinks, *(prefix or (None, None)))

    def _check(self, q: Tensor, mask_spec: MaskSpec) -> None:
        tokens, row = q.shape[TOKENS_DIM], mask_spec.documents[-1]
        if tokens * self.axis.size != row:
            raise InternalError(
                f"{tokens} tokens on each of {self.axis.size} cp ranks, but {row} in the row."
            )
