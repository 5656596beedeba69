"""The supervisor of ranks that srun or torchrun started: a process beside those of a node, forked
by the first of them, which reads their heartbeats from a file in shared memory.

It cannot start ranks again, which is the business of who started them; it names a rank that died or
hangs, and ends a node's ranks when nothing moves, so that the job does not sit there.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megallm.base.errors import PeerLost
from megallm.base.heartbeat import HEARTBEAT, RECORD_BYTES
from megallm.base.stopping import signals_held
from megallm.launch.board import HeartbeatBoard, RankState
from megallm.launch.environment import RankEnv
from megallm.launch.fault import install_faults
from megallm.launch.incident import Incident
from megallm.launch.monitor import Monitor, process_state
from megallm.launch.restart import Start
from megallm.launch.stacks import dump_stacks

POLL_SECONDS = 0.1
Event = Callable[[str, str, dict], None]


@contextmanager
def watched(env: RankEnv, start: Start, event: Event) -> Iterator[None]:
    """Let a process that the node's first rank forks watch this rank inside the context."""
    path = board_path(env)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fstat(fd).st_size < env.local_world * RECORD_BYTES:
        os.ftruncate(fd, env.local_world * RECORD_BYTES)
    board = HeartbeatBoard(env.local_world, env.rank - env.local_rank, fd)
    if env.local_rank == 0:
        rank = os.getpid()
        with signals_held() as let_through:
            if os.fork() == 0:
                let_through()
                _watch_and_leave(board, path, start, event, rank)
    board.join(env.local_rank)
    install_faults(HEARTBEAT, env.rank, env.attempt)
    try:
        yield
    finally:
        HEARTBEAT.enter("end")


def board_path(env: RankEnv) -> Path:
    """Returns the file that the ranks of one node, run and attempt share."""
    told = (
        f"{os.getuid()} {env.token} {env.host}:{env.port} {env.attempt} {env.rank - env.local_rank}"
    )
    shared = Path("/dev/shm")
    folder = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"megallm-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _watch_and_leave(
    board: HeartbeatBoard, path: Path, start: Start, event: Event, first: int
) -> None:
    """The body of the watching process; never returns."""
    try:
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGHUP,
        ):
            signal.signal(number, signal.SIG_IGN)  # they are for the ranks, whose end is awaited
        watch_ranks(board, start, event, first)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os._exit(0)


def watch_ranks(board: HeartbeatBoard, start: Start, event: Event, first: int) -> None:
    """Wait until the ranks of a board are gone, or hang; `first` is the process of the first."""
    monitor = Monitor(board, start.hang_seconds, start.stages, whole=board.count == start.size)
    # Records that a job left which was killed as a whole are nobody's.
    told = {state.pid for state in board.all() if process_state(state.pid)[0] in "XZ"}
    while True:
        time.sleep(POLL_SECONDS)
        states = [state for state in board.all() if state.pid]
        alive = [state for state in states if process_state(state.pid)[0] not in "XZ"]
        for state in states:
            if state not in alive and state.phase != "end" and state.pid not in told:
                told.add(state.pid)
                incident = _died(state)
                event("incident", incident.sentence, incident.fields())
        finding = monitor.look() if len(alive) == len(states) else None
        if finding is not None:
            stacks = dump_stacks({state.rank: state.pid for state in alive}, {})
            incident = monitor.detected(finding, stacks)
            event("incident", "\n".join(incident.lines()), incident.fields())
            for state in alive:
                with suppress(ProcessLookupError):
                    os.kill(state.pid, signal.SIGKILL)
            return
        for sentence, fields in monitor.slow_ranks():
            event("straggler", sentence, fields)
        if not alive and process_state(first)[0] in "XZ":
            return


def _died(state: RankState) -> Incident:
    sentence = f"rank {state.rank} (process {state.pid}) is gone without a word, {state.place}."
    return Incident(
        "killed",
        PeerLost.exit_code,
        sentence,
        state.rank,
        socket.gethostname(),
        state.pid,
        step=state.step,
        phase=state.phase,
        detected_seconds=round(time.monotonic() - state.beat_at, 3),
    )
