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
from megallm.parallel.p2p import open_channels
from megallm.parallel.schedule import Placement
from tests.engine.tiny import batches, engine_of
from tests.ranks import run_ranks

MESSAGES = 12
Key = tuple[int, int]


def code(source: int, destination: int, kind: str, key: Key) -> float:
    """A number that names one message of one channel."""
    return float(hash((source, destination, kind == "F", *key)) % 100_003)


def traffic(source: int, destination: int, kind: str, seed: int) -> list[Key]:
    """The messages of a channel in the order of its sender: the same on both ends."""
    keys = [(micro, stage) for micro in range(MESSAGES // 2) for stage in range(2)]
    random.Random(f"{source}-{destination}-{kind}-{seed}").shuffle(keys)
    return keys


def exchange(chunks: int, vee: bool, seed: int, swap: bool) -> int:
    """Send and take on all channels, each end going through them in an order of its own; the number of right messages.

    With `swap` the receivers expect two messages of each channel in the other order.
    """
    size = torch.distributed.get_world_size()
    mesh = Mesh.start(Layout(pp=size))
    channels = open_channels(mesh, Placement(size, chunks, vee))
    draw = random.Random(seed * 100 + mesh.rank)
    plans = {channel: traffic(*channel, seed) for channel in channels}
    for (source, destination, kind), channel in channels.items():
        if destination == mesh.rank:
            plan = list(plans[source, destination, kind])
            channel.expect([plan[1], plan[0], *plan[2:]] if swap else plan, lambda: torch.empty(3))
    todo = [channel for channel in channels for _ in range(MESSAGES)]
    draw.shuffle(todo)
    todo.sort(key=lambda channel: channel[1] == mesh.rank)  # sends first: a take before them could wait for ever
    done, right = dict.fromkeys(channels, 0), 0
    for channel in todo:
        key = plans[channel][done[channel]]
        done[channel] += 1
        if channel[0] == mesh.rank:
            channels[channel].send(torch.full((3,), code(*channel, key)))
        else:
            right += bool((channels[channel].take(key) == code(*channel, key)).all())
    for channel in channels.values():
        channel.flush()
    return right


@pytest.mark.parametrize(("ranks", "chunks", "vee"), [(2, 1, False), (2, 2, False), (3, 2, False), (3, 2, True)])
def test_messages_arrive_at_whom_they_are_for(ranks, chunks, vee):
    """At two ranks and two chunks the stage before and the stage after are the same peer, in both directions."""
    placement = Placement(ranks, chunks, vee)
    holders = [placement.rank_of(stage) for stage in range(placement.num_stages)]
    edges = {(a, b) for a, b in pairwise(holders) if a != b}  # one channel forward and one backward over each
    for seed in range(3):
        assert sum(run_ranks(ranks, exchange, chunks, vee, seed, False)) == MESSAGES * 2 * len(edges), seed


def test_a_plan_in_another_order_is_told():
    with pytest.raises(RankFailed, match=r"InternalError: The channel \d->\d delivers \(\d, \d\), the plan asks for"):
        run_ranks(2, exchange, 1, False, 0, True)


def peak_of_step(layout: Layout, micros: int) -> int:
    engine = engine_of(Mesh.start(layout))
    engine.train_step(batches(micros, rows=1), NextToken(), 0.01)
    return engine.last_run.peak_live


@pytest.mark.parametrize("micros", [1, 2, 5])
def test_a_measured_step_keeps_as_many_microbatches_alive_as_1f1b_allows(micros):
    """Every rank of a line measures min(pp - rank, micros)."""
    assert run_ranks(2, peak_of_step, Layout(pp=2), micros) == [min(2 - rank, micros) for rank in range(2)]
