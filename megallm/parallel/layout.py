"""Who is rank 37, and which ranks share its tensor-parallel group: integers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from megallm.base.errors import UsageError

AXES = ("pp", "dp", "cp", "tp")  # slowest first; tp ranks are neighbours

# Purposes are sets of axes whose coordinates vary inside the group.
PURPOSES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "data": ("dp",),  # who reads which sample
    "grads": ("dp", "cp"),  # who sums gradients of a dense parameter
    "model": ("pp", "cp", "tp"),  # the ranks of one replica
    "world": AXES,
}


@dataclass(frozen=True)
class Layout:
    """The rank grid `arange(world).view(pp, dp, cp, tp)`; every size is at least 1.

    Experts see the same ranks as `(pp, edp, ep)`: ep spans tp, then cp, then dp.
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

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def size(self, axis: str) -> int:
        """Number of coordinates along one of pp, dp, cp, tp, ep."""
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ep": self.ep}[axis]

    def coords(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank, e.g. `{"pp": 1, "dp": 0, "cp": 0, "tp": 1}`."""
        if not 0 <= rank < self.world:
            raise UsageError(f"rank {rank} is outside this layout of {self.world} ranks.")
        coords = {}
        for axis in reversed(AXES):
            rank, coords[axis] = divmod(rank, self.size(axis))
        return {axis: coords[axis] for axis in AXES}

    def rank(self, **coords: int) -> int:
        """The rank at the given coordinates; axes left out are at 0."""
        rank = 0
        for axis in AXES:
            rank = rank * self.size(axis) + coords.get(axis, 0)
        return rank

    def ranks(self, purpose: str, of: int) -> tuple[int, ...]:
        """The ranks of the group of this purpose that contains rank `of`, in ascending order."""
        here = self.coords(of)
        free = PURPOSES[purpose]
        choices = [range(self.size(axis)) if axis in free else (here[axis],) for axis in AXES]
        return tuple(self.rank(**dict(zip(AXES, point, strict=True))) for point in product(*choices))

    def groups(self, purpose: str) -> list[tuple[int, ...]]:
        """Every group of this purpose, each rank in exactly one, ordered by first rank."""
        return sorted({self.ranks(purpose, of=rank) for rank in range(self.world)})
