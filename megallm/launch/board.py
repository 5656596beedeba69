"""Reading the heartbeats of a node's ranks: memory that they inherit, and what it says of each."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from megallm.base import heartbeat as layout
from megallm.base.heartbeat import HEARTBEAT, OPERATIONS, PHASES, RECORD_BYTES

NAME = "megallm-heartbeats"  # of the memory: /proc/PID/fd of the launcher shows it to tools


@dataclass(frozen=True)
class Issued:
    """A collective that a rank issued: its number in its group, from 1, and what it was."""

    number: int
    operation: str
    nbytes: int
    at: float

    @property
    def text(self) -> str:
        return f"{self.operation} of {self.nbytes} bytes" if self.nbytes else self.operation


@dataclass
class KnownGroup:
    """A process group as one rank knows it: how many collectives it issued there, the last ones."""

    key: int
    purpose: str
    ranks: tuple[int, ...]
    count: int = 0
    issued: dict[int, Issued] = field(default_factory=dict)  # by number

    @property
    def text(self) -> str:
        return f"{self.purpose} [{layout.ranges(self.ranks)}]"


@dataclass(frozen=True)
class RankState:
    """What one rank was doing when it last wrote its record."""

    rank: int
    pid: int
    beats: int
    beat_at: float  # time.monotonic of this machine
    step: int
    phase: str
    waits: Issued | None = None  # the collective that it is inside of
    group: KnownGroup | None = None  # where that is
    groups: dict[int, KnownGroup] = field(default_factory=dict)  # by key
    step_seconds: tuple[float, ...] = ()
    own_seconds: tuple[float, ...] = ()  # by phase, without waits
    longest: tuple[float, ...] = ()  # the longest visit to each phase

    @property
    def place(self) -> str:
        """Returns where in a step it is, in words."""
        if self.step == 0:
            return "before its first step"
        return f"in step {self.step}, {self.phase}"


class HeartbeatBoard:
    """The records of `count` ranks of this node, the first of them rank `first`.

    Make it before the ranks are forked; each then calls `join`.
    """

    def __init__(self, count: int, first: int = 0, fd: int | None = None) -> None:
        self.count, self.first = count, first
        self.fd = os.memfd_create(NAME) if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, count * RECORD_BYTES)
        self._memory = mmap.mmap(self.fd, count * RECORD_BYTES)

    def join(self, index: int) -> None:
        """Let this process's heartbeat write the record of the node's rank `index`."""
        HEARTBEAT.attach(memoryview(self._memory), index * RECORD_BYTES)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.fd)

    def read(self, index: int) -> RankState:
        """Returns what the node's rank `index` is doing."""
        begin = index * RECORD_BYTES
        for _ in range(100):
            record = self._memory[begin : begin + RECORD_BYTES]
            if record == self._memory[begin : begin + RECORD_BYTES]:
                break  # else the rank was writing
        return _state(self.first + index, record)

    def beat(self, index: int) -> tuple[int, float]:
        """Returns how often a rank has beaten, and when it last did."""
        _, beats, at, *_ = layout.HEAD.unpack_from(self._memory, index * RECORD_BYTES)
        return beats, at

    def all(self) -> list[RankState]:
        """Returns what every rank of the node is doing."""
        return [self.read(index) for index in range(self.count)]


def open_board(pid: int) -> HeartbeatBoard:
    """Returns the heartbeats of the ranks that the launcher `pid` of this machine started; for
    tools. Errors: `FileNotFoundError`.
    """
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        try:
            found = NAME in os.readlink(path)
        except OSError:
            continue
        if found:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            return HeartbeatBoard(os.fstat(fd).st_size // RECORD_BYTES, fd=fd)
    raise FileNotFoundError(f"process {pid} has no heartbeats of ranks.")


def _state(rank: int, record: bytes) -> RankState:
    pid, beats, at, step, phase, waiting, operation, slot, number, nbytes, since = (
        layout.HEAD.unpack_from(record)
    )
    slots = _groups(record)
    (steps,) = layout.NUMBER.unpack_from(record, layout.STEPS_AT)
    seconds = layout.STEP_SECONDS.unpack_from(record, layout.STEPS_AT + layout.NUMBER.size)
    waits = group = None
    if waiting and slot < len(slots):
        group = slots[slot]
        waits = Issued(number, OPERATIONS[operation], nbytes, since)
    return RankState(
        rank,
        pid,
        beats,
        at,
        step,
        PHASES[phase],
        waits,
        group,
        {each.key: each for each in slots},
        seconds[: min(steps, len(seconds))],
        layout.OWN_SECONDS.unpack_from(record, layout.OWN_AT),
        layout.OWN_SECONDS.unpack_from(record, layout.LONGEST_AT),
    )


def _groups(record: bytes) -> list[KnownGroup]:
    """The groups of a record, in the order of their slots, with their last collectives."""
    found = []
    for slot in range(layout.NUM_GROUPS):
        key, count, text = layout.GROUP.unpack_from(
            record, layout.GROUPS_AT + slot * layout.GROUP.size
        )
        if not key:
            break
        purpose, _, ranks = text.rstrip(b"\0").decode(errors="replace").rpartition(" ")
        found.append(KnownGroup(key, purpose, layout.ranks_of(ranks), count))
    (total,) = layout.NUMBER.unpack_from(record, layout.RING_AT)
    for place in range(min(total, layout.NUM_ISSUED)):
        number, slot, operation, nbytes, at = layout.ISSUED.unpack_from(
            record, layout.RING_AT + layout.NUMBER.size + place * layout.ISSUED.size
        )
        if slot < len(found):
            found[slot].issued[number] = Issued(number, OPERATIONS[operation], nbytes, at)
    return found


def step_percentile(states: Sequence[RankState], fraction: float = 0.99) -> float | None:
    """Returns the given percentile of the ranks' last step times, None before there are three."""
    seconds = sorted(value for state in states for value in state.step_seconds)
    if not states or min(len(state.step_seconds) for state in states) < 3:
        return None
    return seconds[min(len(seconds) - 1, int(fraction * len(seconds)))]


def silent_since(board: HeartbeatBoard) -> float:
    """Returns for how many seconds no rank of the board has beaten."""
    return time.monotonic() - max(board.beat(index)[1] for index in range(board.count))
