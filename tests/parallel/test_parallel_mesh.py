"""Process groups of a layout, and JSON between ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megallm.base.errors import UsageError
from megallm.oracle.pool import RankFailed
from megallm.parallel.layout import PURPOSES, Layout
from megallm.parallel.mesh import Mesh
from tests.ranks import run_ranks

Found = dict[str, tuple[int, int, tuple[int, ...], float]]


def sums_of_ranks(layout: Layout) -> Found:
    """Per purpose: this rank's place, the size, the ranks, and what the group sums `2^rank` to."""
    mesh = Mesh.start(layout)
    found = {}
    for purpose, axis in mesh.axes.items():
        value = torch.tensor(2.0**mesh.rank)
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
        found[purpose] = (axis.rank, axis.size, axis.ranks, float(value))
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, dp=2, tp=2), Layout(pp=3), Layout(dp=2, cp=2), Layout(tp=4), Layout(pp=2, dp=2, tp=2, ep=2),
        Layout(dp=2, cp=2, tp=2, ep=4), Layout(tp=3, cp=2, ep=2),
    ],
    ids=str,
)  # fmt: skip
def test_every_group_holds_just_its_ranks(layout):
    for rank, found in enumerate(run_ranks(layout.world, sums_of_ranks, layout)):
        assert found.keys() == PURPOSES.keys()
        for purpose, (place, size, ranks, total) in found.items():
            assert ranks == layout.ranks(purpose, of=rank) and size == len(ranks) and ranks[place] == rank
            assert total == sum(2.0**member for member in ranks), "who really takes part"


def test_a_world_of_another_size_is_refused():
    with pytest.raises(RankFailed, match=r"UsageError: 2 processes were started, but the layout .* tp=3 needs 3"):
        run_ranks(2, sums_of_ranks, Layout(tp=3))
    with pytest.raises(UsageError):
        Mesh.single().layout.coords(1)


def talk(values: list) -> tuple:
    mesh = Mesh.start(Layout(tp=dist.get_world_size()))
    gathered = mesh.gather_json(values[mesh.rank])
    told = mesh.broadcast_json(values[0] if mesh.rank == 0 else None)
    largest = mesh.largest(mesh.rank * 3 - 5)
    mesh.barrier()
    return gathered, told, largest


def test_json_travels_between_ranks_whatever_its_length():
    values = [{"a": [1, None, "ä€😀"], "f": 0.1}, "", "x" * 100_000]
    results = run_ranks(3, talk, values)
    assert [gathered for gathered, _, _ in results] == [values, None, None]
    assert [told for _, told, _ in results] == [values[0]] * 3
    assert [largest for _, _, largest in results] == [1, 1, 1]
    alone = Mesh.single()
    assert alone.gather_json(7) == [7] and alone.broadcast_json([1]) == [1] and alone.largest(-2) == -2
