"""The collectives of torch.distributed that megallm issues, each noted in the rank's heartbeat: its
group, its number there, its operation and bytes, and whether the rank waits in it.

A supervisor reads from it which rank the others wait for, and which one issued another collective
than its peers. Names and arguments are those of torch.distributed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megallm.base.heartbeat import HEARTBEAT, OPERATION, ranges

# torch 2.13 renamed the two; older releases have the old names only.
_RENAMED = "all_gather_single" in vars(dist)
_all_gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor

# Of each group, by its identity: a name that its ranks agree on, what it is for, its ranks.
_groups: dict[int, tuple[str, str, tuple[int, ...]]] = {}
_made: Counter[str] = Counter()  # groups of the same ranks
_Group = dist.ProcessGroup | None


class NotedWork:
    """Work under way, as torch's `Work`; waiting for it is noted."""

    def __init__(self, work: Any, noted: tuple[int, int, int, int]) -> None:
        self._work, self._noted = work, noted

    def wait(self) -> bool:
        """Wait until it is done (on nccl: until the stream may go on)."""
        since = HEARTBEAT.wait(*self._noted)
        done = self._work.wait()
        HEARTBEAT.done(since)
        return done

    def beside(self, work: Any) -> NotedWork:
        """Returns other work that belongs to the same collective."""
        return NotedWork(work, self._noted)

    def is_completed(self) -> bool:
        """Returns whether it is done."""
        return self._work.is_completed()


class NothingIssued:
    """What a collective leaves behind that a chaos test had left out."""

    def wait(self) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """Returns True."""
        return True


def note_group(group: _Group, ranks: Sequence[int]) -> None:
    """Take notice of a new group: all its ranks make their groups in one order, and so give it one
    name.
    """
    text = ranges(ranks)
    _made[text] += 1
    _groups[id(_world(group))] = (f"{text} {_made[text]}", "group", tuple(ranks))


def say_purpose(group: _Group, purpose: str) -> None:
    """Say what a group is for, as incidents show it; the first purpose stays."""
    if group is not None and id(group) in _groups:
        name, before, ranks = _groups[id(group)]
        _groups[id(group)] = (name, purpose if before == "group" else before, ranks)


def _world(group: _Group) -> dist.ProcessGroup:
    world = dist.group.WORLD if group is None else group
    assert world is not None
    return world


def _slot(group: _Group, peers: tuple[int, int] | None = None) -> int:
    of = _world(group)
    if id(of) not in _groups:
        note_group(of, dist.get_process_group_ranks(of))
    name, purpose, ranks = _groups[id(of)]
    slot = HEARTBEAT.slots.get((name, peers))
    if slot is not None:
        return slot
    way = f" {peers[0]}>{peers[1]}" if peers else ""
    return HEARTBEAT.new_slot((name, peers), f"{name}{way}", f"{purpose}{way}", peers or ranks)


def _noted(
    call: Callable[[], Any], operation: str, slot: int, nbytes: int, async_op: bool, own: int = 0
) -> Any:
    """Issue a collective, with what the supervisor must know of it; `own` are bytes of this rank
    that other ranks do not know of.
    """
    if HEARTBEAT.fault is not None:
        HEARTBEAT.fault(HEARTBEAT, operation)
    if HEARTBEAT.skips:
        HEARTBEAT.skips -= 1
        return NothingIssued()
    code = OPERATION[operation]
    number = HEARTBEAT.issue(code, slot, nbytes)
    if HEARTBEAT.listener is not None:
        HEARTBEAT.listener.issued(operation, slot, own or nbytes)
    if async_op:
        return NotedWork(call(), (code, slot, number, nbytes))
    since = HEARTBEAT.wait(code, slot, number, nbytes)
    done = call()
    HEARTBEAT.done(since)
    return done


def all_reduce(
    x: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: _Group = None,
    async_op: bool = False,
) -> Any:
    """Reduce `x` in place over the group."""
    return _noted(
        lambda: dist.all_reduce(x, op=op, group=group, async_op=async_op),
        "all_reduce",
        _slot(group),
        x.nbytes,
        async_op,
    )


def broadcast(x: Tensor, src: int, group: _Group = None) -> Any:
    """Give every rank of the group what the global rank `src` has."""
    return _noted(
        lambda: dist.broadcast(x, src, group=group), "broadcast", _slot(group), x.nbytes, False
    )


def all_gather_into_tensor(
    out: Tensor, x: Tensor, group: _Group = None, async_op: bool = False
) -> Any:
    """Gather equal pieces into `out`."""
    return _noted(
        lambda: _all_gather(out, x, group=group, async_op=async_op),
        "all_gather",
        _slot(group),
        out.nbytes,
        async_op,
    )


def reduce_scatter_tensor(
    out: Tensor, x: Tensor, group: _Group = None, async_op: bool = False
) -> Any:
    """Sum over the group and keep this rank's piece."""
    return _noted(
        lambda: _reduce_scatter(out, x, group=group, async_op=async_op),
        "reduce_scatter",
        _slot(group),
        x.nbytes,
        async_op,
    )


def all_to_all_single(
    out: Tensor,
    x: Tensor,
    received: list[int] | None = None,
    sent: list[int] | None = None,
    group: _Group = None,
) -> Any:
    """Exchange runs of rows with every rank of the group; how many may differ between ranks, so
    that no bytes are noted.
    """
    return _noted(
        lambda: dist.all_to_all_single(out, x, received, sent, group=group),
        "all_to_all",
        _slot(group),
        0,
        False,
        x.nbytes,
    )


def gather(x: Tensor, rows: list[Tensor] | None, dst: int, group: _Group = None) -> Any:
    """Gather equal tensors on the global rank `dst`."""
    return _noted(
        lambda: dist.gather(x, rows, dst=dst, group=group), "gather", _slot(group), x.nbytes, False
    )


def isend(x: Tensor, dst: int, group: _Group = None) -> Any:
    """Begin to send to a global rank."""
    slot = _slot(group, (dist.get_rank(), dst))
    return _noted(lambda: dist.isend(x, dst, group=group), "send", slot, x.nbytes, True)


def irecv(x: Tensor, src: int, group: _Group = None) -> Any:
    """Begin to receive from a global rank."""
    slot = _slot(group, (src, dist.get_rank()))
    return _noted(lambda: dist.irecv(x, src, group=group), "recv", slot, x.nbytes, True)


def batch_isend_irecv(operations: Sequence[dist.P2POp]) -> list[Any]:
    """Begin sends and receives that belong together, with every rank of the group taking part."""
    first = operations[0]
    nbytes = sum(operation.tensor.nbytes for operation in operations)
    works: list[Any] = []

    def begin() -> Any:
        works.extend(dist.batch_isend_irecv(list(operations)))
        return works[0]

    noted = _noted(begin, "exchange", _slot(first.group), nbytes, True)
    if isinstance(noted, NothingIssued):
        return [noted]
    return [noted, *(noted.beside(work) for work in works[1:])]
