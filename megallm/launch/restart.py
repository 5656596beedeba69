"""Starting ranks again after an incident: how it is decided, and the loop that does it.

`next_start` is a pure function of what happened. A run goes on from its last good checkpoint,
which the ranks find by themselves; it ends when restarts bring it no further.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megallm.base.errors import InternalError
from megallm.base.stopping import hear_again
from megallm.launch.environment import LOOPBACK
from megallm.launch.incident import Incident

# 0 s at first: a lost process is no reason to wait. Then a machine may need to recover.
PAUSES = (0.0, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Start:
    """Which ranks this node starts, and with which settings."""

    nproc: int = 1  # ranks of this node
    attempt: int = 0  # 0 is the first start
    overrides: tuple[str, ...] = ()  # `key=value` over the configuration, such as another layout
    first_rank: int = 0
    world: int | None = None  # ranks of all nodes; None: this node is alone
    host: str = LOOPBACK  # where rank 0 answers
    port: int = 0  # 0: any, opened before the ranks are forked (alone only)
    token: str = ""  # of the run, the same on all nodes; empty: one is drawn (alone only)
    stages: int = 1  # pipeline stages: ranks of one stage do equal work
    hang_seconds: float = 10.0  # without a sign of life; 0: hangs are not looked for

    @property
    def size(self) -> int:
        """Number of ranks of the run."""
        return self.nproc if self.world is None else self.world


@dataclass(frozen=True)
class Attempt:
    """One start that an incident ended: the first and the last step that it began."""

    incident: Incident
    last_step: int


@dataclass(frozen=True)
class Restart:
    """Start again so, after a pause."""

    start: Start
    pause_seconds: float
    sentence: str


@dataclass(frozen=True)
class Stop:
    """Start no more, and say so."""

    sentence: str


def next_start(start: Start, history: Sequence[Attempt], restarts: int) -> Restart | Stop:
    """Returns what follows the last attempt of `history`.

    `restarts` is how many in a row may pass without a step beyond all those before. An error that a
    sentence of megallm explains (configuration, data, a full disk, divergence) would come again and
    is no reason to restart; neither is one that struck before the first step of the first start,
    unless a process was killed.
    """
    last = history[-1]
    incident = last.incident
    if restarts < 1 or incident.expected:
        return Stop("")
    if len(history) == 1 and last.last_step == 0 and incident.kind == "failed":
        return Stop("No step had begun: it is not started again.")
    stuck = without_progress(history)
    if stuck >= restarts:
        same = [one.incident.signature for one in history[-restarts:]]
        how = f"the same error {restarts}x" if len(set(same)) == 1 else f"{restarts} restarts"
        return Stop(
            f"It is not started again: {how} without progress beyond step "
            f"{max(one.last_step for one in history)}."
        )
    pause = PAUSES[min(stuck, len(PAUSES) - 1)]
    again = replace(start, attempt=start.attempt + 1)
    number = f"restart {again.attempt}"
    if stuck:
        number += f", {stuck} of {restarts} without progress so far"
    return Restart(again, pause, f"{number}: goes on from the last good checkpoint.")


def without_progress(history: Sequence[Attempt]) -> int:
    """Returns how many of the last attempts began no step beyond all the ones before them."""
    count, best = 0, 0
    for number, one in enumerate(history):
        count = 0 if number == 0 or one.last_step > best else count + 1
        best = max(best, one.last_step)
    return count


class AttemptEnded(Exception):
    """An attempt was ended by an incident."""

    def __init__(self, attempt: Attempt, error: Exception) -> None:
        super().__init__(attempt.incident.sentence)
        self.attempt, self.error = attempt, error


def supervise(
    attempt: Callable[[Start], None],
    start: Start,
    restarts: int,
    tell: Callable[[str, str, dict], None],
    choose: Callable[[Start, Sequence[Attempt], int], Restart | Stop] = next_start,
) -> None:
    """Call `attempt(start)` until it returns, or `choose` says to stop; the last error is raised.

    `attempt` raises `AttemptEnded` for an incident; any other error passes. `tell(kind, sentence,
    fields)` is called with "incident" (which the error tells), "restart" and "gave_up".
    """
    history: list[Attempt] = []
    while True:
        begin = time.monotonic()
        try:
            attempt(start)
            return
        except AttemptEnded as ended:
            history.append(ended.attempt)
            error, incident = ended.error, ended.attempt.incident
        tell("incident", "", incident.fields() | {"attempt": start.attempt})
        chosen = choose(start, history, restarts)
        if isinstance(chosen, Stop):
            if chosen.sentence:
                tell("gave_up", chosen.sentence, {"restarts": start.attempt})
            raise error
        tell(
            "restart",
            "\n".join([*incident.lines(), chosen.sentence]),
            {
                "attempt": chosen.start.attempt,
                "pause_seconds": chosen.pause_seconds,
                "ran_seconds": time.monotonic() - begin,
                "overrides": list(chosen.start.overrides),
            },
        )
        if chosen.start.attempt <= start.attempt:
            raise InternalError(f"Attempt {start.attempt} is followed by {chosen.start.attempt}.")
        hear_again()
        time.sleep(chosen.pause_seconds)
        start = chosen.start
