"""One rank as its launcher sees it: the process, its log, how it ended."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megallm.base.errors import InternalError, PeerLost, Requeue
from megallm.base.stopping import INTERRUPTED, NOTHING_TO_SAVE
from megallm.launch.blame import find_mismatch
from megallm.launch.board import RankState
from megallm.launch.incident import Incident
from megallm.launch.rank import RankExit

TAIL_LINES = 20


@dataclass
class Rank:
    """One child process as the launcher sees it."""

    number: int
    pid: int
    log: Path
    log_begin: int  # size of the log when the rank started: what stands before is of earlier runs
    report: int
    status: int | None = None  # of waitpid
    ended_at: float = 0.0
    ending: RankExit | None = None

    @property
    def failed(self) -> bool:
        """AttemptEnded otherwise than by finishing or by saving for a requeue."""
        return self.status is not None and self.code not in (0, Requeue.exit_code)

    @property
    def left_early(self) -> bool:
        """Ended by a signal before it trained: nobody it would have met can go on, as in gloo's
        rendezvous.
        """
        return self.ending is not None and self.ending.message.endswith(NOTHING_TO_SAVE)

    @property
    def code(self) -> int:
        """Exit code; a death by signal is 128 + its number, an exit 0 without a report is not a
        success.
        """
        if self.ending is not None:
            return self.ending.code
        code = os.waitstatus_to_exitcode(self.status or 0)
        if code < 0:
            return 128 - code
        return code or InternalError.exit_code

    def cause(self) -> str:
        """Returns what happened, in words."""
        if self.ending is not None:
            return self.ending.message
        code = os.waitstatus_to_exitcode(self.status or 0)
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        return f"it left with exit code {code} before its end"


def moment(rank: Rank) -> float:
    """Returns when a rank ended, as it says itself or as was seen."""
    return rank.ending.at if rank.ending is not None else rank.ended_at


def hear(rank: Rank, keep: bool) -> None:
    """Read what the rank reported of its end, if it did; `keep` it in the rank's log."""
    try:
        said = os.read(rank.report, 1 << 20)
    except BlockingIOError:
        return
    if not said:
        return
    rank.ending = RankExit(**json.loads(said))
    if (
        keep and rank.ending.expected and rank.ending.message
    ):  # ours to show; the rank's log keeps it too
        with suppress(OSError), rank.log.open("a") as log:
            log.write(f"megallm: error: {rank.ending.message}\n")


def describe(rank: Rank, nproc: int, state: RankState | None) -> str:
    """Returns what ended a rank, where it was, and the end of its log."""
    if rank.code == INTERRUPTED and rank.ending is not None:
        return rank.cause()
    if rank.ending is not None and rank.ending.expected:
        return rank.cause() if nproc == 1 else f"rank {rank.number}: {rank.cause()}"
    where = "" if state is None else f", {state.place} (process {rank.pid})"
    begin = f"rank {rank.number} of {nproc} failed: {rank.cause()}{where}."
    if rank.ending is not None and rank.number == 0:
        return f"{begin} What it wrote stands above, and in {rank.log}."
    lines = (
        rank.log.read_bytes()[rank.log_begin :][-8192:]
        .decode(errors="replace")
        .splitlines()[-TAIL_LINES:]
    )
    tail = "".join(f"\n    {line}" for line in lines) or " (empty)"
    return f"{begin} {rank.log} ends with:{tail}"


def incident_of(rank: Rank, nproc: int, states: Sequence[RankState]) -> Incident:
    """Returns the end of a rank as an incident; `states` are where the ranks were, if they told.

    Collectives that did not match are the cause of what a backend makes of them.
    """
    state = next((one for one in states if one.rank == rank.number and one.beats > 2), None)
    sentence, differing = describe(rank, nproc, state), find_mismatch(states)
    code = 0 if rank.ending is not None else os.waitstatus_to_exitcode(rank.status or 0)
    kind = "killed" if code < 0 else "left" if rank.ending is None else "failed"
    if rank.code == PeerLost.exit_code:
        kind = "lost"
    explained = rank.ending is not None and rank.ending.expected
    culprit = rank.number
    if not explained and differing is not None:
        kind = "mismatch"
        culprit = rank.number if differing.rank is None else differing.rank
        sentence = f"{differing.sentence}. {sentence}"
    return Incident(
        kind,
        rank.code,
        sentence,
        culprit,
        socket.gethostname(),
        rank.pid,
        signal.Signals(-code).name if code < 0 else None,
        state.step if state else 0,
        state.phase if state else "",
        round(max(0.0, rank.ended_at - state.beat_at), 3) if state else 0.0,
        expected=explained and rank.code not in (PeerLost.exit_code, InternalError.exit_code),
        table=differing.table if differing is not None and kind == "mismatch" else (),
    )
