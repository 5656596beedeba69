"""Looks at the heartbeats of a node's ranks while they run: hangs and stragglers.

A hang is a time without a sign of life of any rank: `hang_seconds`, or five times the 99th
percentile of the step times where that is more, or five times the longest visit to the phase.
Before there are step times, and in phases that other programs or a file system decide about, the
limit is longer; not for a rank that is stopped, of which nothing can be expected. A rank that
should move and is busy, or waits for a processor, gets BUSY_FACTOR times as long.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from megallm.base.errors import Hang
from megallm.base.heartbeat import PHASES
from megallm.launch.blame import STOPPED, Finding, find_culprit
from megallm.launch.board import HeartbeatBoard, RankState, silent_since, step_percentile
from megallm.launch.incident import Incident

LOOK_SECONDS, SAMPLES = 0.2, 5
START_SECONDS = 600.0  # for imports, weights, an index: before a rank has its step times
BUSY_FACTOR, STEP_FACTOR = 6.0, 5.0
PATIENCE = {
    "start": START_SECONDS,
    "end": START_SECONDS,
    "save": 120.0,
    "close": 120.0,  # a save beside training settles, trackers take what is left
    "evaluate": 60.0,
    "rollout": START_SECONDS,
    "reward": START_SECONDS,
    "score": 120.0,
}
TICKS = os.sysconf("SC_CLK_TCK")
STRAGGLER_STEPS, STRAGGLER_SECONDS, STRAGGLER_RATIO, STRAGGLER_SHARE = 20, 2.0, 1.5, 0.1
OWN_WORK = ("data", "forward", "backward", "optimizer")


def process_state(pid: int) -> tuple[str, float]:
    """Returns the state of a process, as the kernel's letter, and its seconds of processor time;
    of one that is gone `X`.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X", 0.0
    fields = text.rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / TICKS


def hang_limit(states: Sequence[RankState], least: float) -> float:
    """Returns how many seconds without a sign of life are a hang, no rank being stopped."""
    percentile = step_percentile(states)
    if percentile is None:
        return max(least, START_SECONDS)
    limit = max(least, STEP_FACTOR * percentile)
    for state in states:
        if state.waits is None:
            phase = PHASES.index(state.phase)
            longest = max(each.longest[phase] for each in states)
            limit = max(limit, STEP_FACTOR * longest, PATIENCE.get(state.phase, 0.0))
    return limit


class Monitor:
    """Watches one board; `look` is called often and does little.

    whole: the board has all ranks of the run. Otherwise those of a node may wait for one of
    another node, where the limit may be longer.
    """

    def __init__(
        self, board: HeartbeatBoard, hang_seconds: float, stages: int, whole: bool = True
    ) -> None:
        self.board, self.least, self.whole = board, hang_seconds, whole
        self.stragglers = Stragglers(stages)
        self._next, self._last = 0.0, time.monotonic()
        self._asleep = 0.0  # this process did not run for so long, and perhaps nobody did
        self._silent = 0.0

    def look(self) -> Finding | None:
        """Returns why nothing happens any more, if nothing does for too long."""
        now = time.monotonic()
        if now < self._next or not self.least:
            return None
        gap, self._last = now - self._last, now
        self._next = now + LOOK_SECONDS
        silent = silent_since(self.board)
        if silent < self._silent:
            self._asleep = 0.0
        if gap > 5 * LOOK_SECONDS:
            self._asleep += gap
        self._silent = silent
        if silent - self._asleep < self.least:
            return None
        return self._judge(silent - self._asleep)

    def slow_ranks(self) -> list[tuple[str, dict]]:
        """Returns a sentence and the fields of an event for each straggler that was found now."""
        return self.stragglers.look(self.board) if self.least else []

    def _judge(self, silent: float) -> Finding | None:
        states = [state for state in self.board.all() if state.beats > 1]
        letters = {state.rank: process_state(state.pid)[0] for state in states}
        if not states or any(letter in ("X", "Z", "t") for letter in letters.values()):
            return None  # an end, which is told elsewhere, or a person with a debugger
        stopped = any(letter in STOPPED for letter in letters.values())
        limit = self.least if stopped else hang_limit(states, self.least)
        percentile = step_percentile(states)
        if stopped and percentile is not None:
            limit = max(limit, STEP_FACTOR * percentile)
        if silent < limit:
            return None
        finding = find_culprit(states, letters)
        if stopped or finding.kind == "mismatch":
            return finding
        if finding.rank is None and not self.whole and silent < START_SECONDS + limit:
            return None
        culprits = [state for state in states if finding.rank in (state.rank, None)]
        if silent < BUSY_FACTOR * limit and any(_busy(state.pid) for state in culprits):
            return None
        return finding

    def detected(self, finding: Finding, stacks: dict[str, str]) -> Incident:
        """Returns the incident that a finding is."""
        state = next((one for one in self.board.all() if one.rank == finding.rank), None)
        seconds = silent_since(self.board)
        kind = "mismatch" if finding.kind == "mismatch" else "hang"
        newest = max(self.board.all(), key=lambda one: one.step)
        return Incident(
            kind,
            Hang.exit_code,
            f"no rank moved for {seconds:.1f} s: {finding.sentence}.",
            finding.rank,
            socket.gethostname(),
            state.pid if state else None,
            None,
            (state or newest).step,
            state.phase if state else "",
            round(seconds, 2),
            waits=finding.waits,
            table=finding.table,
            stacks=stacks,
        )


def _busy(pid: int) -> bool:
    """Whether a process computes or wants to, or a thread of it waits for a disk, in a look of half
    a second.
    """
    _, before = process_state(pid)
    begin, letters = time.monotonic(), []
    for _ in range(SAMPLES):
        time.sleep(0.1)
        letters.append(_liveliest(pid))
    used = process_state(pid)[1] - before
    wanted = sum(letter in "RD" for letter in letters)
    return wanted >= 2 or used > 0.2 * (time.monotonic() - begin)


def _liveliest(pid: int) -> str:
    """The state of a thread that runs or waits for a disk, else of any."""
    letter = "X"
    with suppress(OSError):  # it may end meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            text = (task / "stat").read_text(encoding="utf-8", errors="replace")
            letter = text.rpartition(")")[2].split()[0]
            if letter in "RD":
                break
    return letter


class Stragglers:
    """Finds ranks that need much longer than the others of their pipeline stage for the same work,
    in two windows of steps in a row.
    """

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self._begin: dict[int, RankState] = {}
        self._at = self._next = time.monotonic()
        self._suspects: dict[tuple[int, str], int] = {}  # -> the step since when
        self._told: set[tuple[int, str]] = set()

    def look(self, board: HeartbeatBoard) -> list[tuple[str, dict]]:
        """Returns a sentence and the fields of an event for each rank that turned out to be one."""
        now = time.monotonic()
        if now < self._next or board.count < 2:
            return []
        self._next = now + 1.0
        states = {state.rank: state for state in board.all()}
        first = min(state.step for state in states.values())
        if not self._begin or first < min(one.step for one in self._begin.values()):
            self._begin, self._at = states, now
            return []
        steps = first - min(one.step for one in self._begin.values())
        if steps < STRAGGLER_STEPS or now - self._at < STRAGGLER_SECONDS:
            return []
        step_seconds = (now - self._at) / steps
        slow = slow_ranks(self._begin, states, steps, step_seconds, self.stages)
        since = min(one.step for one in self._begin.values())
        self._begin, self._at = states, now
        return self._confirmed(slow, since)

    def _confirmed(self, slow: dict[tuple[int, str], float], since: int) -> list[tuple[str, dict]]:
        found = []
        for key, ratio in slow.items():
            if key in self._suspects and key not in self._told:
                begin = self._suspects[key]
                self._told.add(key)
                sentence = (
                    f"rank {key[0]} is {ratio:.1f} times slower in {key[1]} since step {begin}"
                )
                fields = {"rank": key[0], "phase": key[1], "ratio": round(ratio, 2), "step": begin}
                found.append((sentence, fields | {"host": socket.gethostname()}))
        self._suspects = {key: self._suspects.get(key, since) for key in slow}
        self._told &= slow.keys()
        return found


def slow_ranks(
    before: Mapping[int, RankState],
    after: Mapping[int, RankState],
    steps: int,
    step_seconds: float,
    stages: int,
) -> dict[tuple[int, str], float]:
    """Returns (rank, phase) -> how many times longer it worked than its median peer, for those
    above STRAGGLER_RATIO whose delay is a sizeable part of the step.
    """
    found = {}
    size = max(1, len(after) // stages)
    for phase in OWN_WORK:
        place = PHASES.index(phase)
        own = {
            rank: (state.own_seconds[place] - before[rank].own_seconds[place]) / steps
            for rank, state in after.items()
            if rank in before
        }
        for rank, seconds in own.items():
            peers = [
                value
                for other, value in own.items()
                if other != rank and other // size == rank // size
            ]
            usual = median(peers) if peers else seconds
            slow = seconds > STRAGGLER_RATIO * usual
            if slow and seconds - usual > STRAGGLER_SHARE * step_seconds:
                found[rank, phase] = seconds / max(usual, 1e-9)
    return found
