"""nccl's rules on CPUs: what hangs, races or is refused there does so under the emulated group; what we do does not."""

from __future__ import annotations

import dataclasses
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megallm.base.errors import InternalError
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.oracle.emulated_device import EmulatedDevice, WrongDevice, is_on_host
from megallm.oracle.emulated_nccl import EmulatedNccl, RuleBroken
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh, device_backend
from megallm.parallel.schedule import place
from megallm.parallel.startup import communicators_of, plan_startup, told
from tests.engine.tiny import MODEL, batches, engine_of
from tests.ranks import run_ranks

DEVICE = torch.device("cpu")  # named in a call, it is the device of the emulation
SCHEDULES = {"1f1b": 1, "interleaved": 2, "zb-v": 2}


def emulated(n: int, fn, *args) -> list:
    return run_ranks(n, fn, *args, device="emulated")


# The rules


def crossing(batched: bool) -> str:
    """Each of two ranks receives first and sends then, on a group that nobody has used."""
    rank = dist.get_rank()
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    mine, theirs = torch.full((3,), float(rank), device=DEVICE), torch.empty(3, device=DEVICE)
    apart = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    groups = (group, apart) if rank == 0 else (apart, group)  # rank 0 receives on what rank 1 sends on, later
    try:
        if batched:
            operations = [
                dist.P2POp(dist.irecv, theirs, 1 - rank, group), dist.P2POp(dist.isend, mine, 1 - rank, group)
            ]  # fmt: skip
            works = dist.batch_isend_irecv(operations)
        else:
            works = [
                dist.irecv(theirs, 1 - rank, group=groups[0]), dist.isend(mine, 1 - rank, group=groups[1])
            ]  # fmt: skip
        for work in works:
            work.wait()
    except RuntimeError:
        return "hung"
    return "met" if float(theirs[0]) == 1 - rank else "wrong"


def test_the_first_unbatched_message_blocks_the_host_until_its_peer_comes() -> None:
    assert "hung" in emulated(2, crossing, False)
    assert emulated(2, crossing, True) == ["met", "met"]
    assert run_ranks(2, crossing, False) == ["met", "met"]  # gloo does not notice


def in_order() -> str:
    """Rank 0 receives and then sends on one communicator, rank 1 the same: each waits for the other's second."""
    rank = dist.get_rank()
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    first, second = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    works = [dist.irecv(first, 1 - rank, group=group), dist.isend(second, 1 - rank, group=group)]
    try:
        for work in works:
            work.wait()
    except RuntimeError:
        return "hung"
    return "met"


def test_work_on_a_communicator_runs_in_order_of_issue() -> None:
    assert "hung" in emulated(2, in_order)
    assert run_ranks(2, in_order) == ["met", "met"]


def misuse(kind: str) -> str:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=20))
    x = torch.ones(4, device=DEVICE)
    out = torch.zeros(8, device=DEVICE)
    try:
        if kind in ("host", "world"):
            dist.all_reduce(torch.ones(4), group=dist.group.WORLD if kind == "world" else group)
            return "fine"
        work = dist.all_gather_single(out, x, group=group, async_op=True)
        if kind == "changed":
            x.add_(1)
        if kind == "written":
            out.zero_()
        if kind == "freed":
            x.untyped_storage().resize_(0)
        early = out.clone()
        work.wait()
    except RuleBroken as error:
        return str(error)
    return "read nan" if bool(early.isnan().all()) and bool((out == 1).all()) else "fine"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("host", "was given a tensor of the host"), ("world", "fine"), ("changed", "was changed while it was in"),
        ("written", "was written by others"), ("freed", "was freed while"), ("early", "read nan"),
    ],
)  # fmt: skip
def test_a_misuse_is_told(kind: str, said: str) -> None:
    assert all(said in text for text in emulated(2, misuse, kind))


def test_tensors_of_the_host_and_of_the_device_are_kept_apart() -> None:
    with EmulatedDevice() as device:
        host, there = torch.arange(3.0), torch.arange(3.0, device=DEVICE)
        moved = host.to(DEVICE)
        assert is_on_host(host) and is_on_host(host[1:]) and not is_on_host(there) and not is_on_host(moved)
        with pytest.raises(WrongDevice, match="add"):
            torch.add(host, there)
        assert not is_on_host(there * host.sum()) and is_on_host(there.cpu())  # a number goes along with either
        host.sum().item()
        assert [name for name, _ in device.waits] == ["cpu"]
        bool(there.sum() > 0)
        there[there > 1]
        assert [name for name, _ in device.waits] == ["cpu", "__bool__", "__getitem__"]


# What we do


def step_of_a_pipeline(schedule: str, opened: bool) -> str:
    connects_late = Mesh.connects_late
    if not opened:
        Mesh.connects_late = property(lambda mesh: False)
    try:
        engine = engine_of(Mesh.start(Layout(pp=2)), pp=2, schedule=schedule, chunks=SCHEDULES[schedule],
                           model=four_layers())  # fmt: skip
        for group in EmulatedNccl.made:
            group.timeout = timedelta(seconds=3)
        engine.train_step(batches(3, rows=1), NextToken(), 0.01)
    except RuntimeError:
        return traceback.format_exc()
    finally:
        Mesh.connects_late = connects_late
    return "trained"


def four_layers() -> ModelConfig:
    return dataclasses.replace(MODEL, num_layers=4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_trains_because_its_channels_are_opened_in_one_order(schedule: str) -> None:
    assert emulated(2, step_of_a_pipeline, schedule, True) == ["trained"] * 2
    texts = emulated(2, step_of_a_pipeline, schedule, False)
    assert any("in _post" in text and "_pair" in text for text in texts), "as every run did before"


def limits_of_groups() -> set[float]:
    mesh = Mesh.start(Layout(pp=2, tp=2))
    groups = [axis.group for axis in mesh.axes.values() if axis.size > 1]
    return {group._get_backend(DEVICE).options._timeout.total_seconds() for group in groups}


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_groups_have_the_time_limit_of_the_world(device: str) -> None:
    assert run_ranks(4, limits_of_groups, timeout=47.0, device=device) == [{47.0}] * 4


def test_a_group_is_of_nccl_alone_on_gpus_and_of_the_world_s_kind_elsewhere() -> None:
    assert device_backend(torch.device("cuda", 3)) == "nccl"
    assert device_backend(DEVICE) is None


LAYOUTS = [
    (Layout(pp=2, dp=2, tp=2), "1f1b", 1), (Layout(pp=4, dp=2), "1f1b", 1),
    (Layout(pp=2, cp=2, tp=2), "interleaved", 2), (Layout(pp=4, tp=2), "zb-v", 2),
]  # fmt: skip


def connected(layout: Layout, schedule: str, chunks: int) -> list[tuple[int, ...]]:
    """The ranks of every communicator that this rank has after a step."""
    mesh = Mesh.start(layout)
    model = dataclasses.replace(MODEL, num_layers=8)
    sizes = {axis: layout.size(axis) for axis in ("pp", "dp", "cp", "tp")}
    engine = engine_of(mesh, model=model, schedule=schedule, chunks=chunks, **sizes)
    engine.train_step(batches(4, rows=1, tokens=8), NextToken(), 0.01)
    found = []
    for group in EmulatedNccl.made:
        members = group.ranks or tuple(range(layout.world))
        for key in group.communicators:
            ends = members if key == "" else tuple(members[int(place)] for place in key.split(":"))
            found.append(ends)
    return sorted(found)


@pytest.mark.parametrize(("layout", "schedule", "chunks"), LAYOUTS)
def test_a_rank_has_the_communicators_of_the_plan(layout: Layout, schedule: str, chunks: int) -> None:
    placement = place(schedule, layout.pp, chunks)
    for rank, found in enumerate(emulated(8, connected, layout, schedule, chunks)):
        plan = communicators_of(layout, placement, rank, tied=True)
        assert found == sorted(tuple(sorted(each.ranks)) for each in plan), rank


@pytest.mark.parametrize(("layout", "most"), [
    (Layout(pp=2, dp=8, tp=4), 8), (Layout(pp=8, dp=16, tp=8), 10), (Layout(pp=16, dp=128, tp=8), 10),
])  # fmt: skip
def test_communicators_do_not_grow_with_the_world(layout: Layout, most: int) -> None:
    plan = plan_startup(layout, place("1f1b", layout.pp))
    assert len(plan.communicators) == most
    assert f"{layout.world} ranks: at most {most} communicators" in told(plan)
    assert plan.seconds < 30


def heard(tree: bool, asked: tuple[int, ...]) -> list[int]:
    """What a step tells of the other ranks' requests, and whether the host's group was used for it."""
    mesh = Mesh.start(Layout(dp=2, tp=2))
    engine = engine_of(mesh, tp=2, tree=tree)
    engine.request = lambda: asked[mesh.rank]
    text = batches(2, rows=1)[mesh.data.rank : mesh.data.rank + 1]
    EmulatedNccl.made[0].host = None  # a message of the host would be refused
    return [engine.train_step(text, NextToken(), 0.01).request for _ in range(2)]


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("asked", [(0, 0, 0, 0), (0, 0, 1, 0), (1, 0, 0, 2)])
def test_a_request_to_stop_rides_on_the_gradient_norm(tree: bool, asked: tuple[int, ...]) -> None:
    assert emulated(4, heard, tree, asked) == [[max(asked)] * 2] * 4


def test_a_gradient_on_another_device_is_told() -> None:
    engine = engine_of()
    engine.train_step(batches(1), NextToken(), 0.01)
    name, param = next(iter(engine.parameters.params.items()))
    bucket = next(b for b in engine.parameters.flat if name in [member.name for member in b.plan.members])
    lost = torch.nn.Parameter(torch.empty_like(param, device="meta"))
    lost.grad = torch.empty_like(lost)
    with pytest.raises(InternalError, match=f"The gradient of {name} is on meta"):
        bucket.accumulate(engine.parameters.params | {name: lost})
