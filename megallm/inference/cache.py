"""A paged KV cache (keys and values): positions of a sequence lie in blocks, wherever those are.

No sequence is padded: rotary and learned positions are those that it would have alone. Which block
belongs to whom is planned elsewhere (`blocks`, `scheduler`); here are the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megallm.base import extension
from megallm.inference.blocks import BLOCK, blocks_of
from megallm.models.attention import AttentionInputs, CacheShape, HeadPlan, LayerCache
from megallm.ops.attention import Prefix
from megallm.ops.cached_attention import attend_rows, length_bias
from megallm.ops.precision import wide_dtype

SMALL = 2**20  # numbers of keys that a step reads in a layer, up to which one thread is enough


@dataclass(frozen=True)
class Pages:
    """Which blocks a pass reads and which positions it writes, the same for all layers.

    `table` int64 `[n, m]` on the CPU, unused entries any block; `places` int64 `[n * T]`, where new
    positions go in the pool; `lengths` int64 `[n]`, positions before the new ones.
    """

    table: Tensor
    places: Tensor
    lengths: Tensor
    device: torch.device
    known: dict[tuple, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        tables: Sequence[Sequence[int]], begins: Sequence[int], count: int, device: torch.device
    ) -> Pages:
        """Returns the index of sequences with these block tables that get `count` positions each
        from `begins` on.
        """
        width = max(blocks_of(begin + count) for begin in begins)
        table = np.zeros((len(tables), width), dtype=np.int64)
        for row, blocks in zip(table, tables, strict=True):
            row[: len(blocks)] = blocks[:width]
        new = np.asarray(begins)[:, None] + np.arange(count)
        blocks = np.take_along_axis(table, new // BLOCK, 1)
        places = torch.from_numpy((blocks * BLOCK + new % BLOCK).reshape(-1))
        lengths = torch.from_numpy(np.asarray(begins, dtype=np.int64))
        return Pages(torch.from_numpy(table), places.to(device), lengths.to(device), device)

    def index(self, heads: int, blocks: int) -> Tensor:
        """Returns rows `[n * heads * m]` of a pool seen as `[heads * blocks, ...]`."""
        key = ("index", heads, blocks)
        if key not in self.known:
            table = self.table.to(self.device)
            first = torch.arange(0, heads * blocks, blocks, device=self.device)
            self.known[key] = (table[:, None] + first[:, None]).flatten()
        return self.known[key]

    def bias(self, capacity: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns the mask of one new token a row, `[n, 1, 1, capacity]`."""
        key = ("bias", capacity, window, dtype)
        if key not in self.known:
            self.known[key] = length_bias(self.lengths + 1, capacity, window, dtype)
        return self.known[key]


class Workspace:
    """Memory for what is gathered of one layer, reused by all layers and steps."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, rows: int, size: int) -> Tensor:
        """Returns `[rows, size]` of the dtype and device of `like`, with anything in it."""
        part = self.parts.get(name)
        if part is None or part.numel() < rows * size or part.dtype != like.dtype:
            part = self.parts[name] = like.new_empty(rows * size * 5 // 4)
        return part[: rows * size].view(rows, size)


@dataclass(kw_only=True)
class PagedLayer(LayerCache):
    """One layer's keys and values `[heads, blocks * BLOCK, size]`, as one pass sees them."""

    pages: Pages
    workspace: Workspace

    def write(self, k: Tensor, v: Tensor) -> None:
        """Store new positions `[n, T, heads, size]`."""
        for pool, new in ((self.keys, k), (self.values, v)):
            if pool.shape[-1]:
                pool.index_copy_(1, self.pages.places, new.flatten(0, 1).transpose(0, 1))

    def gather(self, name: str, pool: Tensor) -> Tensor:
        """Returns the blocks of every row, `[n, m * BLOCK, heads, size]`; the positions of a head
        lie together.
        """
        heads, positions, size = pool.shape
        rows, width = self.pages.table.shape
        if not size:
            return pool.new_empty((rows, width * BLOCK, heads, 0))
        blocks = positions // BLOCK
        index = self.pages.index(heads, blocks)
        into = self.workspace.take(name, pool, len(index), BLOCK * size)
        torch.index_select(pool.view(heads * blocks, BLOCK * size), 0, index, out=into)
        return into.view(rows, heads, width * BLOCK, size).transpose(1, 2)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Returns keys and values of every row, old and new."""
        return self.gather("keys", self.keys), self.gather("values", self.values)


class RowCache(PagedLayer):
    """A cache view for a pass in which each sequence gets one token."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one new position per row, `[n, 1, ...]`, each behind what its sequence holds."""
        self.write(k, v)
        return self.stored()

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        sinks: Tensor | None = None,
        prefix: Prefix | None = None,
        cap: float | None = None,
    ) -> Tensor:
        """Computes attention of each row's new query to that row's positions, and a prefix that all
        rows see.
        """
        capacity = self.pages.table.shape[1] * BLOCK
        exact = sinks is not None or cap is not None or k.shape[-1] != v.shape[-1]
        bias = self.pages.bias(capacity, window, wide_dtype(q.dtype) if exact else q.dtype)
        if prefix is not None:
            rows = [x.expand(len(q), *x.shape) for x in prefix]
            k, v = torch.cat((rows[0], k), 1), torch.cat((rows[1], v), 1)
        return attend_rows(q, k, v, bias, sinks, cap)

    def attend(
        self, q: Tensor, kv: Tensor, inputs: AttentionInputs, heads: HeadPlan, window: int | None
    ) -> Tensor:
        """Rotates, stores and attends; see `LayerCache.attend`."""
        out, pages = torch.empty_like(q), self.pages
        tensors = q, kv, inputs.cos, inputs.sin, self.keys, self.values, pages.table, pages.lengths
        _, positions, size = self.keys.shape
        rows, width = pages.table.shape
        sizes = rows, heads.num_q, heads.num_kv, size, width, positions, window or 0
        addresses = (*(x.data_ptr() for x in tensors), out.data_ptr())
        self.ops.attend(addresses, sizes, q.dtype == torch.float64)
        return out


def suits(pages: Pages, keys: Tensor, values: Tensor) -> bool:
    """Returns whether the extension, which runs in one thread, is the faster way to attend to a
    layer's pools: on a CPU, where torch has one thread or the work is not worth several.
    """
    work = keys.shape[0] * keys.shape[-1] * pages.table.numel() * BLOCK
    return (
        keys.device.type == "cpu"
        and keys.dtype in (torch.float32, torch.float64)
        and keys.shape == values.shape
        and keys.shape[-1] % 2 == 0
        and (work <= SMALL or torch.get_num_threads() == 1)
    )


class ChunkCache(PagedLayer):
    """A cache view for a pass over a chunk of the text of each sequence; all chunks begin at
    `length`.
    """

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions `[n, T, ...]` and return everything so far."""
        self.write(k, v)
        if not self.length:
            return k, v
        end = self.length + k.shape[1]
        keys, values = self.stored()
        return keys[:, :end], values[:, :end]


class NoCache(LayerCache):
    """A cache view for a pass of no sequence, which only keeps the ranks of an expert group in
    step.
    """

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        sinks: Tensor | None = None,
        prefix: Prefix | None = None,
        cap: float | None = None,
    ) -> Tensor:
        return q.new_empty((*q.shape[:-1], v.shape[-1]))


class PagedCache:
    """Keys and values of every layer of one pipeline stage, in `blocks` blocks.

    `shapes` are those of a position in each layer, `plain` says whose blocks are (`models.decode`).
    Memory is taken in full at once, but on a CPU
    the system lends a page only when something is written there.
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        plain: Sequence[bool] = (),
    ) -> None:
        self.workspace = Workspace()
        self.plain = plain or [False] * len(shapes)
        self.layers = [
            [
                torch.zeros((heads, blocks * BLOCK, size), dtype=dtype, device=device)
                for heads, size in shape
            ]
            for shape in shapes
        ]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks: all sources are read before any target is written."""
        if not pairs:
            return
        for pool in (pool for layer in self.layers for pool in layer if pool.shape[-1]):
            source, target = torch.tensor(pairs, device=pool.device).T
            blocks = pool.view(pool.shape[0], -1, BLOCK * pool.shape[-1])
            blocks[:, target] = blocks[:, source]

    def rows(self, pages: Pages) -> list[LayerCache]:
        """Returns the layers, for feeding one token to each sequence."""
        return [
            RowCache(
                *layer,
                plain=plain,
                ops=extension.ops() if plain and suits(pages, *layer) else None,
                pages=pages,
                workspace=self.workspace,
            )
            for layer, plain in zip(self.layers, self.plain, strict=True)
        ]

    def chunks(self, pages: Pages, begin: int) -> list[LayerCache]:
        """Returns the layers, for feeding texts from position `begin` on."""
        return [
            ChunkCache(*layer, begin, pages=pages, workspace=self.workspace)
            for layer in self.layers
        ]
