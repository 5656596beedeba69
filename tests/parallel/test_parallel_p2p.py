"""Wires between pipeline ranks: never mis-paired, in whatever order the two ends come to them; a wrong plan is told."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from megallm.losses.language import NextToken
from megallm.oracle.pool import RankFailed
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.p2p import open_wires
from megallm.parallel.schedule import Placement
from tests.engine.tiny import batches, engine_of
from tests.ranks import run_ranks

MESSAGES = 12
Key = tuple[int, int]


def code(source: int, destination: int, kind: str, key: Key) -> float:
    """A number that names one message of one wire."""
    return float(hash((source, destination, kind == "F", *key)) % 100_003)


def traffic(source: int, destination: int, kind: str, seed: int) -> list[Key]:
    """The messages of a wire in the order of its sender: the same on both ends."""
    keys = [(micro, stage) for micro in range(MESSAGES // 2) for stage in range(2)]
    random.Random(f"{source}-{destination}-{kind}-{seed}").shuffle(keys)
    return keys


def exchange(chunks: int, vee: bool, seed: int, swap: bool) -> int:
    """Send and take on all wires, each end going through them in an order of its own; the number of right messages.

    With `swap` the receivers expect two messages of each wire in the other order.
    """
    size = torch.distributed.get_world_size()
    mesh = Mesh.start(Layout(pp=size))
    wires = open_wires(mesh, Placement(size, chunks, vee))
    draw = random.Random(seed * 100 + mesh.rank)
    plans = {wire: traffic(*wire, seed) for wire in wires}
    for (source, destination, kind), wire in wires.items():
        if destination == mesh.rank:
            plan = list(plans[source, destination, kind])
            wire.expect([plan[1], plan[0], *plan[2:]] if swap else plan, lambda: torch.empty(3))
    todo = [wire for wire in wires for _ in range(MESSAGES)]
    draw.shuffle(todo)
    todo.sort(key=lambda wire: wire[1] == mesh.rank)  # sends first: a take before them could wait for ever
    done, right = dict.fromkeys(wires, 0), 0
    for wire in todo:
        key = plans[wire][done[wire]]
        done[wire] += 1
        if wire[0] == mesh.rank:
            wires[wire].send(torch.full((3,), code(*wire, key)))
        else:
            right += bool((wires[wire].take(key) == code(*wire, key)).all())
    for wire in wires.values():
        wire.flush()
    return right


@pytest.mark.parametrize(("ranks", "chunks", "vee"), [(2, 1, False), (2, 2, False), (3, 2, False), (3, 2, True)])
def test_messages_arrive_at_whom_they_are_for(ranks, chunks, vee):
    """At two ranks and two chunks the stage before and the stage after are the same peer, in both directions."""
    placement = Placement(ranks, chunks, vee)
    holders = [placement.rank_of(stage) for stage in range(placement.num_stages)]
    edges = {(a, b) for a, b in pairwise(holders) if a != b}  # one wire forward and one backward over each
    for seed in range(3):
        assert sum(run_ranks(ranks, exchange, chunks, vee, seed, False)) == MESSAGES * 2 * len(edges), seed


def test_a_plan_in_another_order_is_told():
    with pytest.raises(RankFailed, match=r"InternalError: The wire \d->\d delivers \(\d, \d\), the plan asks for"):
        run_ranks(2, exchange, 1, False, 0, True)


def peak_of_step(layout: Layout, micros: int) -> int:
    engine = engine_of(Mesh.start(layout))
    engine.train_step(batches(micros, rows=1), NextToken(), 0.01)
    return engine.last_walk.peak_live


@pytest.mark.parametrize("micros", [1, 2, 5])
def test_a_measured_step_keeps_as_many_microbatches_alive_as_1f1b_allows(micros):
    """Every rank of a line measures min(pp - rank, micros)."""
    assert run_ranks(2, peak_of_step, Layout(pp=2), micros) == [min(2 - rank, micros) for rank in range(2)]
