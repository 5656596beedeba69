"""What a rank connects at the start of a run, by formula: its communicators, and about how long
that takes. Pure.

`Mesh.start`, `Mesh.view`, `open_channels` and the axis of a tie make just these. No group but the
world's is waited for by others than its members, so the number of communicators of a rank does not
grow with the world.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megallm.parallel.layout import PURPOSES, Layout, grid_lines
from megallm.parallel.schedule import Placement, pipeline_edges

# Assumed, not measured: MegaScale (arXiv 2402.15627, section 3.5) starts 2,048 GPUs in less than 5
# seconds and more than 10,000 in less than 30 once no barrier of the world remains.
COMMUNICATOR_SECONDS = 0.1  # to exchange an id and connect
CHECK_IN_SECONDS = 1.5e-3  # of one rank at the one store of the rendezvous


@dataclass(frozen=True)
class Communicator:
    """Ranks that are connected for these purposes."""

    purposes: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class StartupPlan:
    """The communicators of the rank that has most of them."""

    world: int
    rank: int
    communicators: tuple[Communicator, ...]

    @property
    def seconds(self) -> float:
        """About how long it takes until all ranks are connected."""
        return self.world * CHECK_IN_SECONDS + len(self.communicators) * COMMUNICATOR_SECONDS


def plan_startup(
    layout: Layout,
    placement: Placement,
    views: Iterable[tuple[str, int]] = (),
    tied: bool = False,
) -> StartupPlan:
    """Returns the plan of a layout; `views` are the `(axis, inner size)` that are cut further, such
    as `("cp", 2)` of a hybrid of context parallelism; `tied`: the first and the last stage share
    the embedding.
    """
    lines = [layout.rank(pp=pp) for pp in range(layout.pp)]
    plans = [
        StartupPlan(layout.world, rank, communicators_of(layout, placement, rank, views, tied))
        for rank in lines
    ]
    return max(plans, key=lambda plan: len(plan.communicators))


def communicators_of(
    layout: Layout,
    placement: Placement,
    rank: int,
    views: Iterable[tuple[str, int]] = (),
    tied: bool = False,
) -> tuple[Communicator, ...]:
    """Returns the communicators of a rank, the world's first."""
    if layout.world == 1:
        return ()
    world, by_ranks = tuple(range(layout.world)), {}
    for name in PURPOSES:
        ranks = world if name == "world" else layout.ranks(name, of=rank)
        by_ranks.setdefault(ranks, []).append(name)
    found = [
        Communicator(tuple(names), ranks) for ranks, names in by_ranks.items() if len(ranks) > 1
    ]
    for name, inner in views:
        whole = layout.ranks(name, of=rank)
        if inner not in (1, len(whole)):
            parts = grid_lines(whole, whole.index(rank), inner)
            found += [Communicator((f"{name} view",), ranks) for ranks in parts if len(ranks) > 1]
    line, place = layout.ranks("pp", of=rank), layout.coords(rank)["pp"]
    for source, destination, kind in pipeline_edges(placement):
        if place in (source, destination):
            ends = line[source], line[destination]
            found.append(Communicator((f"channel {kind} {ends[0]}->{ends[1]}",), ends))
    first, last = placement.rank_of(0), placement.rank_of(placement.num_stages - 1)
    if tied and layout.pp > 2 and first != last and place in (first, last):
        found.append(Communicator(("tie",), (line[first], line[last])))
    return tuple(found)


def told(plan: StartupPlan) -> str:
    """Returns the plan in a sentence: how many communicators of which size, and the seconds."""
    sizes = Counter(len(each.ranks) for each in plan.communicators)
    text = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items()))
    return (
        f"{plan.world} ranks: at most {len(plan.communicators)} communicators a rank ({text} "
        f"ranks), about {plan.seconds:.1f} s to connect"
    )
