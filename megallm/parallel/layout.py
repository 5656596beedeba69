"""Who is rank 37, and which ranks share its tensor, pipeline, data, context and expert parallel
groups: integers only, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from megallm.base.errors import UsageError

AXES = ("pp", "dp", "cp", "tp")  # slowest first; tp ranks are neighbours
EXPERT_AXES = ("pp", "edp", "ep")  # the same ranks as experts see them

# Purposes are sets of axes, of one of the two views, whose coordinates vary inside the group.
PURPOSES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "data": ("dp",),  # who reads which sample
    "grads": ("dp", "cp"),  # who sums gradients of a dense parameter
    "model": ("pp", "cp", "tp"),  # the ranks of one replica
    "ep": ("ep",),  # who exchanges tokens for experts
    "expert_grads": ("edp",),  # who sums gradients of an expert
    "world": AXES,
}


@dataclass(frozen=True)
class Layout:
    """The rank grid `arange(world).view(pp, dp, cp, tp)`; every size is at least 1.

    Experts see the same ranks as `(pp, edp, ep)`: ep spans tp, then cp, then dp. The ranks of a
    stage, numbered with tp fastest, are cut into runs of ep neighbours; a run holds every expert
    once.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in (*AXES, "ep"):
            size = self.size(axis)
            if not isinstance(size, int) or size < 1:
                raise UsageError(f"layout.{axis} is {size!r}; it must be an integer of at least 1.")
        if self.stage_ranks % self.ep:
            raise UsageError(
                f"layout.ep {self.ep} does not divide dp x cp x tp = {self.stage_ranks}: the ranks "
                "of a pipeline stage are cut into runs of ep, each with every expert once."
            )

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the same layers."""
        return self.dp * self.cp * self.tp

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def size(self, axis: str) -> int:
        """Number of coordinates along one of pp, dp, cp, tp, and of edp, ep."""
        if axis == "edp":
            return self.stage_ranks // self.ep
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ep": self.ep}[axis]

    def coords(self, rank: int) -> dict[str, int]:
        """Returns the coordinates of a rank in both views, e.g. `{"pp": 1, "dp": 0, "cp": 0, "tp":
        1, "edp": 1, "ep": 0}`.
        """
        if not 0 <= rank < self.world:
            raise UsageError(f"rank {rank} is outside this layout of {self.world} ranks.")
        edp, ep = divmod(rank % self.stage_ranks, self.ep)
        coords = {}
        for axis in reversed(AXES):
            rank, coords[axis] = divmod(rank, self.size(axis))
        return {axis: coords[axis] for axis in AXES} | {"edp": edp, "ep": ep}

    def rank(self, **coords: int) -> int:
        """Returns the rank at the given coordinates; axes left out are at 0."""
        return _number([coords.get(axis, 0) for axis in AXES], [self.size(axis) for axis in AXES])

    def ranks(self, purpose: str, of: int) -> tuple[int, ...]:
        """Returns the ranks of the group of this purpose that contains rank `of`, in ascending
        order.
        """
        here = self.coords(of)
        free = PURPOSES[purpose]
        view = AXES if set(free) <= set(AXES) else EXPERT_AXES
        sizes = [self.size(axis) for axis in view]
        choices = [
            range(n) if axis in free else (here[axis],) for axis, n in zip(view, sizes, strict=True)
        ]
        return tuple(_number(point, sizes) for point in product(*choices))

    def communicators(self, rank: int) -> list[tuple[int, ...]]:
        """Returns the ranks of each group that a rank is in, for all purposes, in one order
        everywhere: larger than one, each once, the world left out.
        """
        found = [self.ranks(purpose, of=rank) for purpose in PURPOSES if purpose != "world"]
        return [ranks for ranks in dict.fromkeys(found) if 1 < len(ranks) < self.world]

    def groups(self, purpose: str) -> list[tuple[int, ...]]:
        """Returns every group of this purpose, each rank in exactly one, ordered by first rank."""
        return sorted({self.ranks(purpose, of=rank) for rank in range(self.world)})


def grid_lines(ranks: tuple[int, ...], place: int, inner: int) -> tuple[tuple[int, ...], ...]:
    """Returns the two groups that a rank at `place` of `ranks` is in when these are a grid of rows
    of `inner` neighbours: its column, and its row.
    """
    begin = place - place % inner
    return ranks[place % inner :: inner], ranks[begin : begin + inner]


def _number(point: Sequence[int], sizes: Sequence[int]) -> int:
    """The place of a point in a grid of the given sizes, the last axis fastest."""
    number = 0
    for coordinate, size in zip(point, sizes, strict=True):
        number = number * size + coordinate
    return number
