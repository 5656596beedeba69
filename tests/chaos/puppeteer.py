"""`bash tests/chaos.sh kills --count N` and `hangs --count N`: random faults in real runs, and what came of them.

kills: SIGKILL of a rank, the supervisor or the process that writes checkpoints, at random phases; half of the kills
of a run come after a checkpoint exists at least, a quarter inside a save. The final state must be the quiet run's.
hangs: a random rank stops, sleeps, or sleeps with the GIL in a random phase; the incident must name it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.harness import LAYOUTS, Scene, events_of, fault, scene_in, wait_for_phase
from tests.system.commands import Started, _children, megallm

PHASES = ("data", "forward", "backward", "reduce", "optimizer")
A_RUN = 5  # faults of one run
SLOW = {"model": {"hidden_size": 128, "ffn_hidden_size": 384}}  # a save takes as long as some steps


def writer_of(rank: int) -> int | None:
    """The process that writes a rank's checkpoints."""
    for child in _children_of_threads(rank):
        try:
            if b"checkpoint.writer" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        except OSError:
            continue
    return None


def _children_of_threads(pid: int) -> list[int]:
    try:
        tasks = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
        return [int(c) for task in tasks for c in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except OSError:
        return _children(pid)


def strike(running: Started, draw: random.Random, kill: dict) -> str | None:
    """Kill something at the chosen moment: what was hit, None when the run ended before."""
    pid, rank = running.process.pid, draw.randrange(4)
    board = wait_for_phase(pid, running, rank, kill["phase"], kill["step"])
    if board is None:
        return None
    ranks = [board.read(number).pid for number in range(4)]
    board.close()
    target = {"rank": ranks[rank], "supervisor": pid, "writer": writer_of(ranks[rank])}[kill["target"]]
    if target is None:
        return None
    try:
        os.kill(target, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return kill["target"]


def next_kill(draw: random.Random, number: int, step: int) -> dict:
    """Every fourth inside a save; of a run's kills only the first may come before a checkpoint."""
    saving = number % 4 == 0
    target = draw.choice(("rank", "rank", "supervisor", "writer"))
    phase = "save" if saving else draw.choice(PHASES)
    return {"target": target, "phase": phase, "step": step + draw.randint(1, 4)}


def kills(count: int, seed: int, folder: Path) -> bool:
    """Returns whether every run ended like the quiet one."""
    draw, hits, restarts, lost, bad, checkpointed, saving = random.Random(seed), Counter(), 0, 0, 0, 0, 0
    runs = 0
    detected, back = [], []
    scene = scene_in(folder, steps=60)
    for layout in LAYOUTS:
        scene.quiet(layout)
    while hits.total() < count:
        layout, beside = draw.choice(list(LAYOUTS)), draw.random() < 0.5
        name, reached, struck = f"run{runs}", 0, 0
        runs += 1
        more = {"checkpoint": {"every": 2, "keep": 3, "async_save": beside}, "launch": {"restarts": 50}}
        run = scene.folder / name
        running = scene.begin(name, layout, **more)
        while struck < A_RUN and hits.total() < count:
            kill = next_kill(draw, hits.total(), reached)
            if kill["target"] == "writer" and not beside:
                kill["target"] = "rank"
            existed = any((run / "checkpoints").glob("step-*[0-9]")) if run.exists() else False
            hit = strike(running, draw, kill)
            if hit is None:
                if not running.running:
                    break
                continue
            hits[hit] += 1
            struck += 1
            checkpointed, saving = checkpointed + existed, saving + (kill["phase"] == "save")
            reached = min(kill["step"], 50)
            if hit == "supervisor":
                running.wait()
                running = scene.begin(name, layout, **more)
        done = running.wait()
        events = events_of(run, "resumed", "started", "incident", "restart")
        restarts += len([e for e in events if e["event"] in ("resumed", "started")]) - 1
        lost += sum(e.get("lost_steps", 0) for e in events)
        detected += [e["detected_seconds"] for e in events if e["event"] == "incident"]
        back += [
            b["time"] - a["time"]
            for a, b in zip(events, events[1:], strict=False)
            if a["event"] == "restart" and b["event"] in ("resumed", "started")
        ]
        sound = done.code == 0 and verified(scene, run, layout)
        bad += not sound
        how = "same" if sound else f"DIFFERENT, code {done.code}: {done.err[-2000:]}"
        print(f"{name}: {layout}, async_save={beside}, {struck} kills, {how}", flush=True)
    print(
        f"kills {hits.total()} ({dict(hits)}), after a checkpoint {checkpointed}, inside a save {saving}; runs {runs}, "
        f"restarts {restarts}, lost steps {lost}, corrupt states {bad}; {times('detected', detected)}, "
        f"{times('restart', back)}"
    )
    return bad == 0


def verified(scene: Scene, run: Path, layout: str) -> bool:
    """Whether every checkpoint that is left is whole and the final state is the quiet run's."""
    if megallm("ckpt", "verify", run, cwd=scene.folder).code != 0:
        return False
    try:
        scene.check_same(run, layout)
    except AssertionError as error:
        print(error)
        return False
    return True


def times(name: str, values: list[float]) -> str:
    """Median and largest."""
    if not values:
        return f"{name} -"
    return f"{name} median {statistics.median(values):.2f} s, largest {max(values):.2f} s"


def hangs(count: int, seed: int, folder: Path, seconds: float) -> bool:
    """Returns whether at most one hang in fifty was blamed on another rank, or missed."""
    draw, right, total, detected, back = random.Random(seed), 0, 0, [], []
    scene = scene_in(folder, steps=12 * A_RUN)
    runs = 0
    while total < count:
        layout, number = draw.choice(list(LAYOUTS)), min(A_RUN, count - total)
        wanted = []
        for attempt in range(number):
            phase = draw.choice((*PHASES, "between"))
            wanted.append((draw.choice(("stop", "gil", "sleep")), draw.randrange(4), 8 + 10 * attempt, phase, attempt))
        run, done = scene.launch(
            f"run{runs}", layout, [fault(*one) for one in wanted], launch={"hang_seconds": seconds, "restarts": 9}
        )
        runs += 1
        found = {(e["attempt"]): e for e in events_of(run, "incident")}
        for kind, rank, step, phase, attempt in wanted:
            incident = found.get(attempt, {})
            same = (incident.get("kind"), incident.get("rank"), incident.get("step"), incident.get("phase"))
            good = same == ("hang", rank, step, phase)
            right, total = right + good, total + 1
            if not good:
                print(f"{layout}: {kind} rank {rank} step {step} {phase}: blamed {same}; {incident.get('sentence')}")
                print("\n".join(incident.get("waits", [])), flush=True)
        detected += [e["detected_seconds"] for e in found.values()]
        events = events_of(run, "resumed", "restart")
        back += [
            b["time"] - a["time"]
            for a, b in zip(events, events[1:], strict=False)
            if (a["event"], b["event"]) == ("restart", "resumed")
        ]
        print(f"run{runs - 1}: {layout}, code {done.code}, {right} of {total} named right so far", flush=True)
    print(f"hangs {total}, named right {right}; {times('detected', detected)}, {times('restart', back)}")
    return total - right <= total // 50


def main() -> int:
    """Parse, run, tell by the exit code."""
    parser = argparse.ArgumentParser(prog="tests/chaos.sh")
    parser.add_argument("what", choices=("kills", "hangs"))
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hang-seconds", type=float, default=10.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megallm-chaos-") as folder:
        if args.what == "kills":
            return 0 if kills(args.count, args.seed, Path(folder)) else 1
        return 0 if hangs(args.count, args.seed, Path(folder), args.hang_seconds) else 1


if __name__ == "__main__":
    begin = time.monotonic()
    code = main()
    print(f"{time.monotonic() - begin:.0f} s")
    sys.exit(code)
