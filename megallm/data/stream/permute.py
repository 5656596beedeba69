"""A keyed permutation of range(n) whose entries are computed one by one: no array of n numbers ever
exists. Pure.

A balanced Feistel network (Luby and Rackoff, 1988) permutes the smallest power of 4 that holds n,
and what falls outside range(n) is walked on until it falls inside (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

import numpy as np

from megallm.base import rng

_ROUNDS = 8
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # Stafford's mixer 13, as in splitmix64
_LAST = 31


class Permutation:
    """Entry i is where the item at place i comes from; the same for the same (key, n), on every
    machine.
    """

    def __init__(self, key: int, n: int) -> None:
        if n < 1:
            raise ValueError(f"A permutation needs at least one item, not {n}.")
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = rng.bits(key, 0, _ROUNDS)

    def at(self, begin: int, count: int) -> np.ndarray:
        """Returns entries begin to begin + count, int64 [count]."""
        if begin < 0 or count < 0 or begin + count > self.n:
            raise IndexError(f"Entries {begin} to {begin + count} of a permutation of {self.n}.")
        values = np.arange(begin, begin + count, dtype=np.uint64)
        outside = np.arange(count)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= np.uint64(self.n)]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return (left << self._half) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    for shift, factor in _MIX:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(_LAST))
