"""The body of one forked rank: run the function, report how it ended over a pipe, leave. No torch
at import.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from megallm.base import terminal
from megallm.base.errors import InternalError, MegallmError, PeerLost
from megallm.base.output import FdWriter, LossyText
from megallm.base.stopping import INTERRUPTED, die_with, stop_signals
from megallm.launch.environment import RankEnv, thread_count
from megallm.launch.process import default_signals, keep_memory, limit_threads

MAX_MESSAGE = 8000  # characters: the report must fit a pipe's buffer, it is read after the end


@dataclass(frozen=True)
class RankExit:
    """How a rank ended, in its own words; a rank that says nothing did not end by itself."""

    code: int
    message: str
    expected: bool  # an error with a sentence of ours, which needs no log beside it
    at: float  # time.monotonic, which all processes of a machine share


def rank_main(
    fn: Callable[..., None],
    args: tuple[Any, ...],
    env: RankEnv,
    parent: int,
    outputs: tuple[int, int],
    report: int,
) -> NoReturn:
    """Run `fn(env, *args)` in this forked process with its outputs redirected; never returns.

    Signals stay blocked but inside `run_function`, so that none can end the process without a
    report.
    """
    code = InternalError.exit_code
    try:
        os.setpgid(0, 0)  # the terminal's Ctrl-C reaches the launcher only, which passes it on once
        die_with(parent)
        default_signals()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        sys.stdout, sys.stderr = (
            LossyText(FdWriter(1)),
            LossyText(FdWriter(2)),
        )  # a full disk costs lines only
        terminal.escape_streams()
        faulthandler.enable(sys.stderr)  # a segmentation fault leaves its stack in the log
        keep_memory()
        limit_threads(thread_count(env.local_world))
        ending = run_function(_listening(fn), args, env)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(report, json.dumps(vars(ending)).encode())
        code = ending.code
    finally:
        os._exit(code)


def _listening(fn: Callable[..., None]) -> Callable[..., None]:
    """Returns the same function, during which signals arrive; those that came before arrive when it
    begins.
    """

    def call(*args: Any) -> None:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            fn(*args)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, (*stop_signals(), signal.SIGINT))

    return call


def run_function(fn: Callable[..., None], args: tuple[Any, ...], env: RankEnv) -> RankExit:
    """Call `fn(env, *args)`; every way of leaving it but the death of the process becomes an
    Ending.
    """
    try:
        fn(env, *args)
    except KeyboardInterrupt as error:
        return RankExit(INTERRUPTED, str(error) or "interrupted.", True, time.monotonic())
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        return RankExit(
            code or InternalError.exit_code, f"sys.exit({error.code})", False, time.monotonic()
        )
    except MegallmError as error:
        return RankExit(error.exit_code, str(error)[:MAX_MESSAGE], True, time.monotonic())
    except Exception as error:  # the boundary of the process: nothing above could catch it
        at = time.monotonic()
        if hung_up(
            error
        ):  # the cause is what the other rank says; a traceback of ours would bury it
            print(f"megallm: another rank went away: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = PeerLost.exit_code if lost_peer(error) else InternalError.exit_code
        return RankExit(code, f"{type(error).__name__}: {error}"[:MAX_MESSAGE], False, at)
    return RankExit(0, "", True, time.monotonic())


def lost_peer(error: BaseException) -> bool:
    """Returns whether an error of torch.distributed says that another rank went away (gloo raises
    plain RuntimeErrors).
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"DistNetworkError", "DistBackendError", "DistStoreError"}:
        return True
    text = str(error)
    return "RuntimeError" in names and ("gloo" in text or "Connection closed by peer" in text)


def hung_up(error: BaseException) -> bool:
    """Returns whether another rank's process ended, as opposed to not answering in time."""
    return lost_peer(error) and any(
        words in str(error) for words in ("closed by peer", "reset by peer")
    )
