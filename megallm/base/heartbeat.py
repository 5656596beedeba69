"""Heartbeats: what this rank is doing, in memory that a supervisor outside its interpreter reads.

A record of fixed size a rank: its step and phase, the collective that it waits in, how many it has
issued in each process group, and the last ones. A write costs about a microsecond and takes no
lock: a reader takes a record that it read twice alike. Without a board the record is private
memory, so that code that beats never asks whether anybody looks. No torch.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol
from zlib import crc32

PHASES = (
    "start", "data", "forward", "backward", "reduce", "optimizer", "evaluate", "save",
    "rollout", "reward", "score", "update", "between", "close", "end",
)  # fmt: skip
OPERATIONS = (
    "none", "all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather",
    "send", "recv", "exchange",
)  # fmt: skip
PHASE = {name: number for number, name in enumerate(PHASES)}
OPERATION = {name: number for number, name in enumerate(OPERATIONS)}

# pid, beats, monotonic, step, phase, waiting, operation, group slot, sequence, bytes, since
HEAD = struct.Struct("<qQdqIIIIQQd")
STEP_SECONDS, NUMBER, SECONDS = struct.Struct("<64d"), struct.Struct("<Q"), struct.Struct("<d")
OWN_SECONDS = struct.Struct(f"<{len(PHASES)}d")  # by phase, without what was waited in collectives
GROUP = struct.Struct("<QQ80s")  # key, collectives issued, purpose and ranks
ISSUED = struct.Struct("<QIIQd")  # sequence in the group, group slot, operation, bytes, monotonic
NUM_GROUPS, NUM_ISSUED = 64, 64
STEPS_AT = HEAD.size
OWN_AT = STEPS_AT + NUMBER.size + STEP_SECONDS.size
LONGEST_AT = OWN_AT + OWN_SECONDS.size  # the longest visit to each phase
GROUPS_AT = LONGEST_AT + OWN_SECONDS.size
RING_AT = GROUPS_AT + NUM_GROUPS * GROUP.size
RECORD_BYTES = RING_AT + NUMBER.size + NUM_ISSUED * ISSUED.size


class StepListener(Protocol):
    """Hears at once what a rank does: a profiler (`training.profiling`). Times are those of
    time.monotonic.
    """

    finished: bool  # it has heard enough: the run ends without a checkpoint

    def enter_step(self, now: float) -> None: ...

    def enter(self, phase: str, now: float) -> None: ...

    def issued(self, operation: str, slot: int, nbytes: int) -> None: ...

    def wait(self, operation: str, slot: int, now: float) -> None: ...

    def done(self, now: float) -> None: ...


class Heartbeat:
    """The writer of one rank's record."""

    def __init__(self) -> None:
        self.fault: Callable[[Heartbeat, str], None] | None = None  # of the chaos tests
        self.listener: StepListener | None = None
        self.skips = 0  # collectives to leave out: a bug made on purpose
        self.attach(bytearray(RECORD_BYTES), 0)

    def attach(self, memory: memoryview | bytearray, begin: int) -> None:
        """Write into `memory` from `begin` on, in this process from now on."""
        self._memory, self._begin, self._pid = memory, begin, os.getpid()
        self.step, self.phase_name, self._phase, self._beats = 0, PHASES[0], 0, 0
        self._since = self._step_since = time.monotonic()
        self._waited = 0.0  # in collectives, since the phase began
        self._steps = self._issued = 0
        self._own, self._longest = [0.0] * len(PHASES), [0.0] * len(PHASES)
        self.slots: dict[Hashable, int] = {}  # by what the caller knows a group by
        self._counts: list[int] = []
        self._head(self._since, 0, 0, 0, 0, 0, self._since)

    def _head(
        self,
        now: float,
        waiting: int,
        operation: int,
        slot: int,
        number: int,
        nbytes: int,
        since: float,
    ) -> None:
        self._beats += 1
        HEAD.pack_into(
            self._memory,
            self._begin,
            self._pid,
            self._beats,
            now,
            self.step,
            self._phase,
            waiting,
            operation,
            slot,
            number,
            nbytes,
            since,
        )

    def enter_step(self, step: int) -> None:
        """Say that a step begins, and with it the phase that reads data."""
        now = time.monotonic()
        if self.step and step == self.step + 1:
            at = self._begin + STEPS_AT
            place = at + NUMBER.size + self._steps % 64 * SECONDS.size
            SECONDS.pack_into(self._memory, place, now - self._step_since)
            self._steps += 1
            NUMBER.pack_into(self._memory, at, self._steps)
        self.step, self._step_since = step, now
        if self.listener is not None:
            self.listener.enter_step(now)
        self.enter("data")

    def enter(self, phase: str) -> None:
        """Say that a phase begins, one of PHASES."""
        now = time.monotonic()
        spent, before = now - self._since, self._phase
        self._own[before] += spent - self._waited
        SECONDS.pack_into(self._memory, self._begin + OWN_AT + 8 * before, self._own[before])
        if spent > self._longest[before]:
            self._longest[before] = spent
            SECONDS.pack_into(self._memory, self._begin + LONGEST_AT + 8 * before, spent)
        self._phase, self._since, self._waited = PHASE[phase], now, 0.0
        self.phase_name = phase
        self._head(now, 0, 0, 0, 0, 0, now)
        if self.listener is not None:
            self.listener.enter(phase, now)
        if self.fault is not None:
            self.fault(self, phase)

    def beat(self) -> None:
        """Say that this rank goes on, in the phase that it is in."""
        now = time.monotonic()
        self._head(now, 0, 0, 0, 0, 0, now)

    def new_slot(self, known_by: Hashable, name: str, purpose: str, ranks: Sequence[int]) -> int:
        """Returns the place in the record of a process group that is not in `slots` yet; all its
        ranks call it by the same `name`.
        """
        place = min(len(self._counts), NUM_GROUPS - 1)
        self.slots[known_by] = place
        if place == len(self._counts):
            self._counts.append(0)
        text = f"{purpose} {ranges(ranks)}".encode()[:80]
        GROUP.pack_into(self._memory, self._group_at(place), crc32(name.encode()), 0, text)
        return place

    def group(self, slot: int) -> str:
        """Returns what a group is for and its ranks, such as `tp 0-1` or `pp 0>1 0-1`."""
        text = GROUP.unpack_from(self._memory, self._group_at(slot))[2]
        return text.rstrip(b"\0").decode(errors="replace")

    def _group_at(self, slot: int) -> int:
        return self._begin + GROUPS_AT + slot * GROUP.size

    def issue(self, operation: int, slot: int, nbytes: int) -> int:
        """Note that a collective is issued; returns its number in its group, from 1."""
        number = self._counts[slot] + 1
        self._counts[slot] = number
        NUMBER.pack_into(self._memory, self._group_at(slot) + NUMBER.size, number)
        at, now = self._begin + RING_AT, time.monotonic()
        place = at + NUMBER.size + self._issued % NUM_ISSUED * ISSUED.size
        ISSUED.pack_into(self._memory, place, number, slot, operation, nbytes, now)
        self._issued += 1
        NUMBER.pack_into(self._memory, at, self._issued)
        return number

    def wait(self, operation: int, slot: int, number: int, nbytes: int) -> float:
        """Note that this rank waits in a collective; returns when, for `done`."""
        now = time.monotonic()
        self._head(now, 1, operation, slot, number, nbytes, now)
        if self.listener is not None:
            self.listener.wait(OPERATIONS[operation], slot, now)
        return now

    def done(self, since: float) -> None:
        """Note that a collective is over that was waited for `since`."""
        now = time.monotonic()
        self._waited += now - since
        self._head(now, 0, 0, 0, 0, 0, now)
        if self.listener is not None:
            self.listener.done(now)


def ranges(ranks: Sequence[int]) -> str:
    """Maps `(0, 1, 2, 5)` -> `"0-2,5"`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def ranks_of(text: str) -> tuple[int, ...]:
    """Maps `"0-2,5"` -> `(0, 1, 2, 5)`; what a cut text still says."""
    found: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        if first.isdigit():
            found += range(int(first), int(last if last.isdigit() else first) + 1)
    return tuple(found)


HEARTBEAT = Heartbeat()
