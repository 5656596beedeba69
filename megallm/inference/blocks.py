"""Blocks of the paged KV cache: who holds which, counted by reference. Pure.

Keys and values live in blocks of `BLOCK` positions; a sequence's block table names those that hold
its positions in order (PagedAttention, arXiv 2309.06180). Sequences with the same beginning share
its blocks; who writes into a block that others hold too gets a copy first.
"""

from __future__ import annotations

from collections.abc import Iterable

BLOCK = 16  # positions


def blocks_of(positions: int) -> int:
    """Number of blocks that hold this many positions."""
    return -(-positions // BLOCK)


class BlockPool:
    """`count` blocks, free or held by one or more block tables."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.holders = [0] * count
        self.free = list(range(count - 1, -1, -1))  # the lowest number is taken first

    def _take(self) -> int:
        block = self.free.pop()
        self.holders[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> list[int]:
        """Returns a further holder's table of blocks that are held already."""
        table = list(blocks)
        for block in table:
            self.holders[block] += 1
        return table

    def release(self, table: list[int]) -> None:
        """Give back what a table holds; it is empty afterwards."""
        for block in reversed(table):
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free.append(block)
        table.clear()

    def extend(self, table: list[int], begin: int, end: int) -> list[tuple[int, int]] | None:
        """Make room in a table for writing positions `begin` to `end`.

        Returns the copies (from block, to block) that must be made before anything is written, or
        None, with nothing changed, when too few blocks are free.
        """
        fresh = blocks_of(end) - len(table)
        first = begin // BLOCK
        shared = [at for at in range(first, len(table)) if self.holders[table[at]] > 1]
        if fresh + len(shared) > len(self.free):
            return None
        copies = []
        for at in shared:
            self.holders[table[at]] -= 1
            copies.append((table[at], self._take()))
            table[at] = copies[-1][1]
        table.extend(self._take() for _ in range(fresh))
        return copies
