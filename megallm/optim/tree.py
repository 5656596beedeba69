"""Sums in a fixed binary tree over the microbatches of a step: the same bits for 1, 2 or 4 data
ranks.

Leaf i is the gradient of logical microbatch i of the global batch. Ranks own contiguous blocks
whose length is a power of two, so each rank's sum is one node of the tree, and the nodes above are
sums of pairs of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.parallel import ledger
from megallm.parallel.mesh import Axis


class TreeSum:
    """Adds leaves in order; holds at most log2(leaves) + 1 partial sums of the leaf's size."""

    def __init__(self) -> None:
        self.partial: list[tuple[int, Tensor]] = []  # (leaves below, sum)

    def add(self, leaf: Tensor) -> None:
        """Add one leaf, which the tree keeps and may overwrite."""
        count = 1
        while self.partial and self.partial[-1][0] == count:
            _, left = self.partial.pop()
            leaf = left.add_(leaf)
            count *= 2
        self.partial.append((count, leaf))

    def total(self) -> Tensor:
        """Returns the root, and an empty tree afterwards; a single node when the count was a power
        of two.
        """
        _, total = self.partial.pop()
        while self.partial:
            total = self.partial.pop()[1].add_(total)
        return total


def tree_all_reduce_(x: Tensor, axis: Axis, exchange: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Sum `x` over the axis (its size a power of two) by doubling, always lower rank plus higher
    rank; in place.
    """
    distance = 1
    while distance < axis.size:
        partner = axis.rank ^ distance
        other = exchange(x, partner)
        low, high = (x, other) if axis.rank < partner else (other, x)
        x.copy_(low + high)
        distance *= 2
    return x


def exchanger(axis: Axis) -> Callable[[Tensor, int], Tensor]:
    """Exchange a tensor with another rank of the axis."""

    def exchange(x: Tensor, partner: int) -> Tensor:
        other = torch.empty_like(x)
        peer = axis.ranks[partner]
        work = [
            dist.P2POp(dist.isend, x, peer, axis.group),
            dist.P2POp(dist.irecv, other, peer, axis.group),
        ]
        for handle in ledger.batch_isend_irecv(work):
            handle.wait()
        return other

    return exchange
