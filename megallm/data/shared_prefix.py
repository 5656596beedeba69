"""Rows in which answers to one prompt share it: the prompt stands once, its answers behind it, and
they do not see each other (prefix sharing, as of a KV cache, in training). Pure.

Each answer begins with a copy of the prompt's last token, at that token's position: the label of
this one is the first token of the answer, so that answers cannot share it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from megallm.data.objective import Arrays

SharedPrefix = Literal["auto", "on", "off"]


class Sized(NamedTuple):
    """A sequence of `size` tokens; sequences of one `prompt` have their first `common` tokens in
    common.
    """

    size: int
    common: int
    prompt: Hashable


class SequencePlace(NamedTuple):
    """Where the tokens of a sequence lie in a row: from `begin` on those from its number `first`
    on; those before lie in a shared prefix, or are not there.
    """

    begin: int
    first: int


class PrefixPlace(NamedTuple):
    """A shared prefix: from `begin` on the first `size` tokens of the sequence `source`."""

    begin: int
    size: int
    source: int


class RowCost(NamedTuple):
    """What a forward pass computes: tokens, and products of a query with a key."""

    tokens: int = 0
    products: int = 0

    def plus(self, other: RowCost) -> RowCost:
        """Returns the sum."""
        return RowCost(self.tokens + other.tokens, self.products + other.products)


def causal(tokens: int) -> int:
    """Returns the products of a text that sees itself causally."""
    return tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class SharedRow:
    """Sequences in one row: `places` of each, the `prefixes`, and the documents that all make up:
    their `ends` from 0 on, and for each the one that stands before it (`prefix_of`, -1: none).
    """

    places: tuple[SequencePlace, ...]
    prefixes: tuple[PrefixPlace, ...]
    ends: tuple[int, ...]
    prefix_of: tuple[int, ...]

    @property
    def cost(self) -> RowCost:
        """Returns what is computed for it, without padding."""
        products = 0
        sizes = np.diff(self.ends).tolist()
        for size, before in zip(sizes, self.prefix_of, strict=True):
            products += causal(size) + (size * sizes[before] if before >= 0 else 0)
        return RowCost(self.ends[-1], products)

    def of_documents(self, length: int) -> Arrays:
        """Returns `positions` `[1, length]`, `cu_seqlens` and `prefix_of` of a row that is filled
        up to `length`.
        """
        ends, before = [*self.ends], [*self.prefix_of]
        starts = np.arange(length)  # padding stays at position 0: learned ones have an end
        for begin, end, parent in zip(ends, ends[1:], before, strict=False):
            shift = 0 if parent < 0 else ends[parent + 1] - ends[parent]
            starts[begin:end] = begin - shift
        if ends[-1] < length:
            ends.append(length)
            before.append(-1)
        return {
            "positions": (np.arange(length) - starts)[None],
            "cu_seqlens": np.array(ends, np.int32),
            "prefix_of": np.array(before, np.int32),
        }


def shared_row(sequences: Sequence[Sized]) -> SharedRow:
    """Returns the row of these sequences; those of one prompt follow each other."""
    places, prefixes, ends, before = [], [], [0], []
    for _, found in groupby(enumerate(sequences), lambda one: one[1].prompt):
        group = list(found)
        common = min(min(one.common, one.size - 1) for _, one in group) if len(group) > 1 else 0
        parent = -1
        if common > 0:
            prefixes.append(PrefixPlace(ends[-1], common, group[0][0]))
            parent = len(before)
            before.append(-1)
            ends.append(ends[-1] + common)
        for _, one in group:
            places.append(SequencePlace(ends[-1], max(common, 0)))
            before.append(parent)
            ends.append(ends[-1] + one.size - max(common, 0))
    return SharedRow(tuple(places), tuple(prefixes), tuple(ends), tuple(before))


@dataclass(frozen=True)
class PrefixSharing:
    """When prompts are shared: wherever answers have one (`always`), or where a row then costs
    less; a product of a query with a key costs `product` tokens.
    """

    always: bool = False
    product: float = 0.0

    def pays(self, plain: RowCost, shared: RowCost) -> bool:
        """Returns whether shared rows are made instead of plain ones."""
        if self.always:
            return True
        gain = plain.tokens - shared.tokens + self.product * (plain.products - shared.products)
        return gain > 0
