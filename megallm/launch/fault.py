"""Faults made on purpose, for the chaos tests:
`MEGALLM_FAULT="rank=2,step=7,phase=backward,kind=kill"`.

The hook is asked where a phase begins or a collective is issued; without the variable there is
none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megallm.base.errors import UsageError
from megallm.base.heartbeat import OPERATIONS, PHASES, Heartbeat

VARIABLE = "MEGALLM_FAULT"
FOR_EVER, SLOW_SECONDS = 1_000_000, 0.05


@dataclass(frozen=True)
class InjectedFault:
    """One fault: what happens, on which rank, at which step and phase (or collective)."""

    kind: str
    rank: int
    step: int
    phase: str
    attempt: int | None = 0  # the start that it strikes, 0 is the first; None: each


class Faults:
    """The faults of one rank; each strikes once, but for `slow`, which lasts."""

    def __init__(self, faults: list[InjectedFault]) -> None:
        self.left = faults

    def __call__(self, heartbeat: Heartbeat, name: str) -> None:
        """Strike where it is time."""
        for fault in [one for one in self.left if one.phase == name]:
            if fault.kind == "slow" and heartbeat.step >= fault.step:
                KINDS[fault.kind](heartbeat)
            elif heartbeat.step == fault.step:
                self.left.remove(fault)
                KINDS[fault.kind](heartbeat)


def _raise(heartbeat: Heartbeat) -> None:
    raise RuntimeError(f"a fault made on purpose in step {heartbeat.step}")


def _skip(heartbeat: Heartbeat) -> None:
    heartbeat.skips += 1


def _spin(heartbeat: Heartbeat) -> None:
    while True:
        pass


KINDS: dict[str, Callable[[Heartbeat], object]] = {
    "kill": lambda beat: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda beat: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda beat: os._exit(0),
    "abort": lambda beat: os.abort(),
    "segv": lambda beat: ctypes.string_at(0),
    "gil": lambda beat: ctypes.PyDLL(None).sleep(FOR_EVER),  # PyDLL keeps the GIL
    "sleep": lambda beat: time.sleep(FOR_EVER),
    "slow": lambda beat: time.sleep(SLOW_SECONDS),
    "spin": _spin,
    "raise": _raise,
    "skip_collective": _skip,
}


def parse_faults(text: str) -> list[InjectedFault]:
    """Returns the faults of the variable, which `;` divides. Errors: `UsageError`."""
    found = []
    for part in filter(None, text.split(";")):
        pairs = dict(pair.partition("=")[::2] for pair in part.split(","))
        try:
            fault = InjectedFault(
                pairs["kind"],
                int(pairs["rank"]),
                int(pairs["step"]),
                pairs["phase"],
                None if pairs.get("attempt") == "all" else int(pairs.get("attempt", 0)),
            )
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"{VARIABLE} is '{part}'; it must look like "
                "rank=2,step=7,phase=backward,kind=kill (further: attempt=N or attempt=all)."
            ) from error
        if fault.kind not in KINDS or fault.phase not in (*PHASES, *OPERATIONS[1:]):
            raise UsageError(
                f"{VARIABLE} is '{part}'; kind is one of {', '.join(KINDS)}, phase one of "
                f"{', '.join((*PHASES, *OPERATIONS[1:]))}."
            )
        found.append(fault)
    return found


def install_faults(
    heartbeat: Heartbeat, rank: int, attempt: int, environ: Mapping[str, str] = os.environ
) -> None:
    """Let the faults of this rank strike in this process, if there are any."""
    text = environ.get(VARIABLE, "")
    if not text:
        return
    own = [
        fault
        for fault in parse_faults(text)
        if fault.rank == rank and fault.attempt in (attempt, None)
    ]
    if own:
        heartbeat.fault = Faults(own)
