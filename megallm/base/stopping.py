"""Which signals ask a run to stop."""

from __future__ import annotations

import signal

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """What batch systems, `kill` and a terminal that closes send; without SIGHUP under `nohup`, which ignores it."""
    hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return _STOPPING if hangup else _STOPPING[:-1]


def ignore_stop_signals() -> None:
    """The state is saved, or there is none: whatever still arrives changes nothing."""
    for number in (*stop_signals(), signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
