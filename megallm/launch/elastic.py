"""Which layout a run goes on with when ranks are lost or come back: integers only.

The global batch and the order of the data stay. Data-parallel replicas are given up first, since
a replica less changes only who computes which microbatches; the axes that divide the model follow
where not even one replica fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from megallm.base.errors import UsageError

MOST_SHOWN = 12  # sizes of the world in a refusal


@dataclass(frozen=True)
class LayoutSizes:
    """The sizes of a layout: world = pp x dp x cp x tp; ep divides dp x cp x tp."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        """Returns the number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    def settings(self, of: LayoutSizes) -> list[str]:
        """Returns `layout.dp=3` and what else differs from the layout `of`, for a command line; dp
        always, since a configuration may leave it open.
        """
        names = [name for name in vars(self) if name == "dp" or vars(self)[name] != vars(of)[name]]
        return [f"layout.{name}={vars(self)[name]}" for name in names]


LayoutFault = Callable[[LayoutSizes], str]  # why a layout cannot be, empty when it can


@dataclass(frozen=True)
class BatchRule:
    """Every replica runs the same number of whole microbatches of the same global batch."""

    global_batch: int
    micro_batch: int = 1

    def microbatches(self, dp: int) -> int:
        """Returns how many microbatches each of dp replicas runs; 0 where they do not go round."""
        count, rest = divmod(self.global_batch, self.micro_batch * dp)
        return 0 if rest else count

    def __call__(self, sizes: LayoutSizes) -> str:
        if self.microbatches(sizes.dp):
            return ""
        return (
            f"{self.global_batch} samples are no whole microbatches of {self.micro_batch} "
            f"on each of {sizes.dp} replicas"
        )


def choose_layout(wish: LayoutSizes, ranks: int, fault: LayoutFault, least: int = 1) -> LayoutSizes:
    """Returns the layout to go on with on at most `ranks` ranks, the largest that keeps what the
    wish divides the model by, else the one that changes the least of it.

    `wish.dp` bounds the replicas. Errors: UsageError, with the sizes of the world that are valid,
    where nothing between `least` and `ranks` ranks fits.
    """
    for sizes in _candidates(wish, ranks):
        if sizes.world >= least and not fault(sizes):
            return sizes
    valid = valid_worlds(wish, fault)
    shown = ", ".join(map(str, valid[:MOST_SHOWN])) + ", ..." * (len(valid) > MOST_SHOWN)
    why = fault(replace(wish, dp=max(1, min(wish.dp, ranks * wish.dp // wish.world))))
    raise UsageError(
        f"{ranks} rank{'s are' if ranks != 1 else ' is'} left, and no layout of {least} to {ranks} "
        f"ranks fits{f': {why}' if why else ''}. Numbers of ranks that fit: {shown or 'none'}. "
        "Choose a train.global_batch that more numbers of replicas divide, or wait for more nodes."
    )


def valid_worlds(wish: LayoutSizes, fault: LayoutFault) -> list[int]:
    """Returns the numbers of ranks up to the wish's for which there is a layout, ascending."""
    found = {sizes.world for sizes in _candidates(wish, wish.world) if not fault(sizes)}
    return sorted(found)


def _candidates(wish: LayoutSizes, ranks: int) -> Iterator[LayoutSizes]:
    """Layouts of at most `ranks` ranks in the order in which they are tried: fewer replicas, then a
    smaller cp, a smaller pp, a smaller tp; each with as many replicas as there is room for.
    """
    axes = product(_divisors(wish.tp), _divisors(wish.pp), _divisors(wish.cp))
    for tp, pp, cp in axes:
        for dp in range(min(wish.dp, ranks // (tp * pp * cp)), 0, -1):
            stage = dp * cp * tp
            ep = next(size for size in _divisors(wish.ep) if stage % size == 0)
            yield LayoutSizes(pp, dp, cp, tp, ep)


def _divisors(number: int) -> list[int]:
    """Divisors, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]
