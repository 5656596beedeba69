"""Keys and values of several texts of different lengths, side by side; each text fills a row from
position 0.

No text is padded: rotary and learned positions of a text are those it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megallm.models.attention import CacheShape, LayerCache
from megallm.ops.attention import Prefix
from megallm.ops.cached_attention import attend_rows

BLOCK = 64  # capacity grows in multiples of this many positions


@dataclass(kw_only=True)
class RowCache(LayerCache):
    """One layer for a step in which each text gets one token: views `[n, longest + 1, ...]`, int64
    lengths `[n]`.
    """

    lengths: Tensor

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one new position per row, `[n, 1, ...]`, each behind what its row holds."""
        rows = torch.arange(len(self.lengths), device=k.device)
        self.keys[rows, self.lengths] = k[:, 0]
        self.values[rows, self.lengths] = v[:, 0]
        return self.keys, self.values

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        sinks: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Each row's new query against that row's positions."""
        return attend_rows(q, k, v, self.lengths + 1, window, sinks, prefix)


class TextCache:
    """Keys and values `[rows, capacity, *shape]` of every layer of one pipeline stage; grows as
    texts need it.

    `shapes` are those of a position in each layer.
    """

    def __init__(
        self, shapes: Sequence[CacheShape], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.capacity, self.shapes = rows, 0, shapes
        self.empty = partial(torch.zeros, dtype=dtype, device=device)
        self.layers = [self._allocate(0, shape) for shape in shapes]

    def _allocate(self, capacity: int, shape: CacheShape) -> tuple[Tensor, Tensor]:
        keys, values = (self.empty((self.rows, capacity, *size)) for size in shape)
        return keys, values

    def reserve(self, positions: int) -> None:
        """Make room for texts of this many positions; what is stored stays."""
        if positions <= self.capacity:
            return
        grown, old = -(-positions // BLOCK) * BLOCK, self.capacity
        for number, pair in enumerate(self.layers):
            wider = self._allocate(grown, self.shapes[number])
            for new, stored in zip(wider, pair, strict=True):
                new[:, :old] = stored
            self.layers[number] = wider
        self.capacity = grown

    def begin(self, row: int) -> list[LayerCache]:
        """An emptied row, for feeding a whole prompt at once."""
        for keys, values in self.layers:
            keys[row].zero_()
            values[row].zero_()
        return [
            LayerCache(keys[row : row + 1], values[row : row + 1]) for keys, values in self.layers
        ]

    def step(self, lengths: list[int], device: torch.device) -> list[LayerCache]:
        """The first `len(lengths)` rows, which hold that many positions each, for feeding one token
        to each.
        """
        count, end = len(lengths), max(lengths) + 1
        places = torch.tensor(lengths, device=device)
        return [
            RowCache(keys[:count, :end], values[:count, :end], lengths=places)
            for keys, values in self.layers
        ]

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for keys, values in self.layers:
            keys[target] = keys[source]
            values[target] = values[source]
