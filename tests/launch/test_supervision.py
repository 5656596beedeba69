"""Heartbeats, blame, the limits of a hang, stragglers, and what follows an incident: pure functions and one board."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megallm.base import heartbeat
from megallm.base.errors import UsageError
from megallm.base.heartbeat import OPERATION, PHASES, Heartbeat, ranges, ranks_of
from megallm.launch import monitor
from megallm.launch.blame import find_culprit, find_mismatch
from megallm.launch.board import HeartbeatBoard, RankState
from megallm.launch.fault import Faults, install_faults, parse_faults
from megallm.launch.incident import Incident
from megallm.launch.restart import Attempt, AttemptEnded, Restart, Start, Stop, next_start, supervise
from megallm.launch.stacks import dump_stacks

ALL_REDUCE, BROADCAST, SEND, RECV = (OPERATION[name] for name in ("all_reduce", "broadcast", "send", "recv"))


@pytest.fixture
def board():
    board = HeartbeatBoard(4)
    yield board
    board.close()


def beats_of(board: HeartbeatBoard) -> list[Heartbeat]:
    """A writer for each rank, as the ranks' processes would have."""
    found = []
    for index in range(board.count):
        beat = Heartbeat()
        beat.attach(memoryview(board._memory), index * heartbeat.RECORD_BYTES)
        beat.enter_step(7)
        beat.enter("backward")
        found.append(beat)
    return found


def group(beat: Heartbeat, name: str = "world", ranks=(0, 1, 2, 3)) -> int:
    return beat.slots[name] if name in beat.slots else beat.new_slot(name, name, name, ranks)


def wait_in(beat: Heartbeat, operation: int = ALL_REDUCE, nbytes: int = 64, **where) -> None:
    slot = group(beat, **where)
    beat.wait(operation, slot, beat.issue(operation, slot, nbytes), nbytes)


def complete(beats, operation: int = ALL_REDUCE, nbytes: int = 64) -> None:
    for beat in beats:
        slot = group(beat)
        beat.done(beat.wait(operation, slot, beat.issue(operation, slot, nbytes), nbytes))


def test_what_a_rank_writes_is_read(board):
    beat = beats_of(board)[2]
    wait_in(beat, nbytes=4096, name="dp", ranks=(0, 2))
    state = board.read(2)
    assert (state.rank, state.pid, state.step, state.phase) == (2, os.getpid(), 7, "backward")
    assert state.waits.text == "all_reduce of 4096 bytes" and state.waits.number == 1
    assert state.group.text == "dp [0,2]" and state.group.ranks == (0, 2)
    beat.done(0.0)
    assert board.read(2).waits is None and board.read(2).groups[state.group.key].count == 1
    assert board.read(1).rank == 1


def test_a_board_is_found_by_its_process():
    """In a process of its own: launchers that other tests ran in this one may have left theirs open."""
    code = (
        "import os; from megallm.launch.board import HeartbeatBoard, open_board; board = HeartbeatBoard(4); "
        "print(open_board(os.getpid()).count)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "4\n"


def test_steps_and_own_time_are_kept_without_waits(board):
    beat = beats_of(board)[0]
    beat.enter_step(8)
    time.sleep(0.02)
    since = beat.wait(ALL_REDUCE, group(beat), 1, 8)
    time.sleep(0.05)
    beat.done(since)
    beat.enter_step(9)
    state = board.read(0)
    data = PHASES.index("data")
    assert len(state.step_seconds) == 2 and state.step_seconds[1] >= 0.07
    assert 0.02 <= state.own_seconds[data] < 0.06 and state.longest[data] >= 0.07


def test_a_write_costs_microseconds():
    beat = Heartbeat()
    slot, count, best = group(beat), 2000, 1.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(count):
            beat.done(beat.wait(ALL_REDUCE, slot, beat.issue(ALL_REDUCE, slot, 8), 8))
        best = min(best, (time.perf_counter() - begin) / count)
    assert best < 100e-6  # some 4 on an idle machine: three writes; the limit is for busy ones


@pytest.mark.parametrize("ranks", [(0,), (0, 1, 2), (0, 2, 4), (1, 2, 5, 6, 7, 9)])
def test_ranges(ranks):
    assert ranks_of(ranges(ranks)) == ranks


# Blame


def test_the_rank_outside_of_the_collective_is_named(board):
    beats = beats_of(board)
    complete(beats)
    for rank in (0, 1, 3):
        wait_in(beats[rank])
    finding = find_culprit(board.all(), {})
    assert (finding.kind, finding.rank) == ("outside", 2) and "3 of 4 ranks wait" in finding.sentence
    waits = "rank 0 waits in all_reduce of 64 bytes, number 2 of world [0-3], in step 7, backward, for rank 2"
    assert finding.waits[0] == waits


def test_a_chain_of_waits_is_followed_to_its_end(board):
    """0 waits for a message of 1, which waits in a collective with 3; 2 merely has nothing to do yet."""
    beats = beats_of(board)
    wait_in(beats[0], RECV, name="pp 1>0", ranks=(1, 0))
    wait_in(beats[1], name="dp", ranks=(1, 3))
    group(beats[3], name="dp", ranks=(1, 3))
    finding = find_culprit(board.all(), {})
    assert finding.rank == 3


def test_a_stopped_rank_is_named_even_inside_a_collective(board):
    beats = beats_of(board)
    for beat in beats:
        wait_in(beat)
    assert find_culprit(board.all(), {}).rank is None
    finding = find_culprit(board.all(), {0: "S", 3: "T"})
    assert (finding.kind, finding.rank) == ("stopped", 3)


def test_collectives_that_do_not_match_are_a_table(board):
    beats = beats_of(board)
    complete(beats)
    assert find_mismatch(board.all()) is None
    for rank in (0, 1, 3):
        wait_in(beats[rank])
    wait_in(beats[2], BROADCAST, 128)
    finding = find_culprit(board.all(), {})
    assert (finding.kind, finding.rank) == ("mismatch", 2)
    assert finding.table == tuple(
        f"world [0-3] number 2: rank {rank} issued {'broadcast of 128' if rank == 2 else 'all_reduce of 64'} bytes"
        for rank in range(4)
    )
    assert "collective 2 of world [0-3] does not match: rank 2 issued broadcast of 128 bytes" in finding.sentence


def test_a_send_and_its_receive_match(board):
    beats = beats_of(board)
    wait_in(beats[0], SEND, name="pp 0>1", ranks=(0, 1))
    wait_in(beats[1], RECV, name="pp 0>1", ranks=(0, 1))
    assert find_mismatch(board.all()) is None


def test_a_rank_that_skipped_one_and_waits_elsewhere_is_named(board):
    beats = beats_of(board)
    for rank in (0, 1, 3):
        wait_in(beats[rank])
    wait_in(beats[2], name="tp", ranks=(2, 3))
    group(beats[3], name="tp", ranks=(2, 3))
    assert find_culprit(board.all(), {}).rank == 2


# Limits


def state(rank: int = 0, phase: str = "forward", seconds=(1.0,) * 10, **more) -> RankState:
    own, longest = [0.0] * len(PHASES), [0.0] * len(PHASES)
    for name, value in more.pop("own", {}).items():
        own[PHASES.index(name)] = value
    longest[PHASES.index(phase)] = more.pop("longest", 0.0)
    return RankState(rank, 1, 5, 0.0, more.pop("step", 10), phase, None, None, {}, seconds, tuple(own), tuple(longest))


@pytest.mark.parametrize(
    ("states", "limit"),
    [
        ([state()], 10.0),  # five steps are less
        ([state(seconds=(4.0,) * 10)], 20.0),
        ([state(seconds=(1.0, 1.0))], 600.0),  # not known yet
        ([state(phase="save")], 120.0),
        ([state(phase="data", longest=7.0)], 35.0),
    ],
)
def test_limits(states, limit):
    assert monitor.hang_limit(states, 10.0) == pytest.approx(limit)


def test_a_straggler_is_named_in_its_phase_and_stage():
    before = {rank: state(rank, step=0) for rank in range(4)}
    slow = {"forward": 23.0, "backward": 10.0}
    after = {rank: state(rank, own=slow if rank == 3 else {"forward": 10.0, "backward": 10.0}) for rank in range(4)}
    found = monitor.slow_ranks(before, after, 20, 1.2, 1)
    assert found == {(3, "forward"): pytest.approx(2.3)}
    assert monitor.slow_ranks(before, after, 20, 20.0, 1) == {}  # no part of the step to speak of
    after[2] = after[3]
    stages = {rank: replace(one, rank=rank) for rank, one in after.items()}
    assert monitor.slow_ranks(before, stages, 20, 1.2, 2) == {}  # the second stage has more to do


# What follows


def attempt(step: int, kind: str = "killed", code: int = 137, expected: bool = False, sentence: str = "x") -> Attempt:
    return Attempt(Incident(kind, code, sentence, 1, expected=expected), step)


@pytest.mark.parametrize(
    ("history", "goes_on"),
    [
        ([attempt(0)], True),  # killed during imports
        ([attempt(9)], True),
        ([attempt(9), attempt(9), attempt(9)], True),
        ([attempt(9), attempt(9), attempt(9), attempt(9)], False),
        ([attempt(9), attempt(9), attempt(9), attempt(12)], True),
        ([attempt(9), attempt(12), attempt(12), attempt(12), attempt(11)], False),
        ([attempt(0, "failed", 70)], False),  # a bug before the first step
        ([attempt(5, "failed", 70)], True),
        ([attempt(5, "failed", 65, expected=True)], False),
    ],
)
def test_next_start(history, goes_on):
    found = next_start(Start(4, attempt=len(history) - 1), history, 3)
    assert isinstance(found, Restart if goes_on else Stop)
    if goes_on:
        assert found.start == Start(4, attempt=len(history))
    assert isinstance(next_start(Start(4), history, 0), Stop)


def test_the_same_error_is_said():
    same = next_start(Start(1, 3), [attempt(9, sentence=f"killed (process {n})") for n in range(10, 14)], 3)
    assert same.sentence == "It is not started again: the same error 3x without progress beyond step 9."
    other = next_start(Start(1, 3), [attempt(9, code=n) for n in range(4)], 3)
    assert "3 restarts without progress" in other.sentence


def test_supervise_restarts_with_what_was_chosen(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    starts, told = [], []

    def run(start: Start) -> None:
        starts.append(start)
        if start.attempt < 2:
            raise AttemptEnded(attempt(3 + start.attempt), ValueError("lost"))

    def smaller(start: Start, history, restarts):
        assert len(history) == start.attempt + 1 and restarts == 3
        return Restart(replace(start, attempt=start.attempt + 1, overrides=("layout.dp=1",)), 0.0, "again")

    supervise(run, Start(2), 3, lambda kind, sentence, fields: told.append(kind), smaller)
    assert [start.overrides for start in starts] == [(), ("layout.dp=1",), ("layout.dp=1",)]
    assert told == ["incident", "restart"] * 2
    with pytest.raises(ValueError, match="lost"):
        supervise(run, Start(2), 0, lambda kind, sentence, fields: None)


# Faults


def test_a_fault_strikes_once_where_it_is_told(monkeypatch):
    struck = []
    monkeypatch.setitem(__import__("megallm.launch.fault", fromlist=["KINDS"]).KINDS, "raise", struck.append)
    beat = Heartbeat()
    text = "rank=1,step=2,phase=forward,kind=raise;rank=0,step=1,phase=all_reduce,kind=kill"
    install_faults(beat, 1, 0, {"MEGALLM_FAULT": text})
    assert isinstance(beat.fault, Faults)
    for step in (1, 2, 3):
        beat.enter_step(step)
        for _ in range(2):
            beat.enter("forward")
    assert len(struck) == 1
    for rank, number, given in ((1, 1, text), (2, 0, text), (1, 0, "")):  # restarted, another rank, no fault
        quiet = Heartbeat()
        install_faults(quiet, rank, number, {"MEGALLM_FAULT": given})
        assert quiet.fault is None


BAD_FAULTS = ("kind=kill", "rank=a,step=1,phase=data,kind=kill", "rank=0,step=1,phase=lunch,kind=kill")


@pytest.mark.parametrize("text", BAD_FAULTS)
def test_bad_faults_are_refused(text):
    with pytest.raises(UsageError, match="MEGALLM_FAULT is"):
        parse_faults(text)


def test_stacks_name_this_function():
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        stacks = dump_stacks({5: child}, {})
        assert "test_stacks_name_this_function" in stacks["5"]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
