"""Rows of the fault table, each with real processes: what is killed, stopped or broken is named, and the run ends as
the one that nobody disturbed.

Restarts fork from a process that has imported everything, so that one run can be struck many times.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.harness import HANG_SECONDS, Scene, events_of, fault, scene_in, wait_for_phase
from tests.system.commands import _alive, rows_of


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return scene_in(tmp_path_factory.mktemp("chaos"))


def told(run: Path) -> list[tuple]:
    """(kind, rank, step, phase) of every incident."""
    return [(e["kind"], e["rank"], e["step"], e.get("phase")) for e in events_of(run, "incident")]


def test_rows_1_2_3_11_12_14_a_rank_dies_anywhere(scene):
    """Row 1 forward, 2 backward, 3 optimizer, 12 rank 0 (its store), 11 SIGSEGV, abort and exit 0, 14 two at once."""
    deaths = [
        ("kill", 3, 3, "forward"), ("kill", 1, 5, "backward"), ("kill", 2, 7, "optimizer"), ("kill", 0, 9, "reduce"),
        ("segv", 1, 11, "data"), ("abort", 2, 13, "forward"), ("exit", 3, 15, "between"), ("kill", 2, 18, "backward"),
    ]  # fmt: skip
    faults = [fault(*death, attempt) for attempt, death in enumerate(deaths)]
    run, done = scene.launch("dies", "dp2 tp2", [*faults, fault("kill", 1, 18, "backward", len(deaths) - 1)])
    assert done.code == 0, done.err
    incidents = events_of(run, "incident")
    for incident, (kind, rank, step, phase) in zip(incidents[:-1], deaths[:-1], strict=True):
        assert (incident["rank"], incident["step"], incident["phase"]) == (rank, step, phase)
        assert incident["kind"] == ("left" if kind == "exit" else "killed") and incident["pid"] > 0
        assert incident["detected_seconds"] < 1.0
    assert incidents[-1]["rank"] in (1, 2) and incidents[-1]["signal"] == "SIGKILL"
    assert [incident.get("signal") for incident in incidents[4:7]] == ["SIGSEGV", "SIGABRT", None]
    assert "it left with exit code 0 before its end" in incidents[6]["sentence"]
    scene.check_same(run, "dp2 tp2")


def test_row_4_a_rank_dies_in_a_message(scene):
    """Pipeline and ring messages: the peer that is blocked in its receive does not keep the others."""
    run, done = scene.launch("messages", "pp2 dp2", [fault("kill", 0, 5, "send"), fault("kill", 3, 9, "recv", 1)])
    assert done.code == 0, done.err
    assert [(kind, rank, step) for kind, rank, step, _ in told(run)] == [("killed", 0, 5), ("killed", 3, 9)]
    scene.check_same(run, "pp2 dp2")


def test_rows_24_25_a_hang_is_blamed_on_the_rank_that_hangs(scene):
    """Row 24 SIGSTOP, 25 a rank that sleeps with the GIL: named, with stacks and what each rank waits in, and ended."""
    run, done = scene.launch("hangs", "cp2 tp2", [fault("stop", 2, 7, "backward"), fault("gil", 1, 13, "forward", 1)])
    assert done.code == 0, done.err
    assert told(run) == [("hang", 2, 7, "backward"), ("hang", 1, 13, "forward")]
    for incident in events_of(run, "incident"):
        assert incident["detected_seconds"] >= HANG_SECONDS and incident["code"] == 76
        others = [rank for rank in range(4) if rank != incident["rank"]]
        waiting = [line for line in incident["waits"] if line.startswith(f"rank {others[0]} waits in ")]
        assert len(incident["waits"]) == 4 and waiting and "number" in waiting[0]
        assert "train_step" in incident["stacks"][str(others[0])]
    assert "rank 2 (process" in done.err and "is stopped in step 7, backward" in done.err
    scene.check_same(run, "cp2 tp2")


def test_row_26_a_collective_that_does_not_match_is_a_table(scene):
    run, done = scene.launch("skips", "dp4", [fault("skip_collective", 2, 5, "reduce")])
    assert done.code == 0, done.err
    (incident,) = events_of(run, "incident")
    assert (incident["kind"], incident["rank"]) == ("mismatch", 2)
    assert len(incident["table"]) == 4 and "rank 2 issued all_reduce of" in incident["table"][2]
    assert incident["table"][2].split("issued")[1] != incident["table"][1].split("issued")[1]
    scene.check_same(run, "dp4")


def test_row_15_a_crash_loop_ends(scene):
    run, done = scene.launch("loops", "dp4", [fault("raise", 1, 6, "optimizer", "all")])
    assert done.code == 70 and "the same error 3x without progress beyond step 6" in done.err
    assert len(events_of(run, "incident")) == 4 and len(events_of(run, "restart")) == 3
    assert events_of(run, "gave_up") and "a fault made on purpose in step 6" in done.err


def test_a_plain_verb_does_not_restart(scene):
    from tests.chaos.harness import fault_variable
    from tests.system.commands import megallm

    with fault_variable([fault("kill", 1, 3, "forward")]):
        done = megallm("pretrain", scene.config("plain", "dp4"), cwd=scene.folder)
    assert done.code == 137 and "rank 1 of 4 failed: killed by signal 9 (SIGKILL), in step 3, forward" in done.err
    assert len(events_of(scene.folder / "plain", "incident")) == 1 and not events_of(scene.folder / "plain", "restart")


def test_row_13_ranks_die_with_the_supervisor(scene):
    running = scene.begin("orphans", "dp4")
    try:
        assert wait_for_phase(running.process.pid, running, 1, "forward", 4) is not None
        ranks = running.ranks()
        assert len(ranks) == 4
        os.kill(running.process.pid, signal.SIGKILL)
        begin = time.monotonic()
        while any(map(_alive, ranks)):
            assert time.monotonic() - begin < 20.0  # 2 s on a machine of its own
            time.sleep(0.01)
    finally:
        running.kill_all()
        running.wait()
    again, done = scene.launch("orphans", "dp4")
    assert done.code == 0 and events_of(again, "resumed")
    scene.check_same(again, "dp4")


def test_row_28_a_slow_rank_is_named(tmp_path):
    """Every forward pass of rank 1 takes 50 ms longer from step 4 on."""
    scene = scene_in(tmp_path, steps=90)
    run, done = scene.launch("slow", "dp4", [fault("slow", 1, 4, "forward")], checkpoint={"every": 0})
    assert done.code == 0, done.err
    found = events_of(run, "straggler")
    assert [(event["rank"], event["phase"]) for event in found] == [(1, "forward")], found
    assert found[0]["ratio"] > 1.5 and f"slower in forward since step {found[0]['step']}" in done.err
    assert len(rows_of(run)) == 90
