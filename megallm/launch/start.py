"""One door for every verb that runs on ranks: start them here, or be the rank that torchrun or srun
started.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from megallm.base import terminal
from megallm.base.errors import PeerLost, UsageError
from megallm.base.files import writing
from megallm.base.output import BackgroundWriter, FdWriter, LossyText
from megallm.launch.environment import RankEnv, detect, thread_count
from megallm.launch.local import NO_HOOKS, Hooks, run_ranks
from megallm.launch.process import default_signals, keep_memory, limit_threads
from megallm.launch.rank import lost_peer
from megallm.launch.restart import Start
from megallm.launch.watcher import watched


def world_size(nproc: int | None) -> int | None:
    """Returns how many ranks there will be: the environment's, else `nproc`, else None (what the
    layout asks for).
    """
    env = started_by_others()
    if env is None:
        return nproc
    if nproc is not None and nproc != env.world:
        raise UsageError(
            f"--nproc is {nproc}, but {env.launcher} started {env.world} ranks: leave --nproc out "
            f"under {env.launcher}."
        )
    return env.world


def started_by_others() -> RankEnv | None:
    """Returns this rank under torchrun or srun. A single srun task counts as a plain process, which
    may start ranks.
    """
    env = detect()
    return None if env is not None and env.launcher == "srun" and env.world == 1 else env


def start(
    fn: Callable[..., None],
    args: Sequence[Any],
    nproc: int | Start,
    log_dir: Path | None,
    preload: Sequence[str] = ("torch",),
    hooks: Hooks = NO_HOOKS,
    saves: bool = True,
) -> None:
    """Run `fn(env, *args)` on every rank: in forked ones here (see `run_ranks`), or in this process
    if it is one.
    """
    env = started_by_others()
    if env is None:
        run_ranks(fn, args, nproc, log_dir, preload, hooks, saves)
        return
    if env.rank != 0 and log_dir is not None:
        with writing(log_dir):
            log_dir.mkdir(parents=True, exist_ok=True)
        os.dup2(
            os.open(
                log_dir / f"rank-{env.rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
            ),
            1,
        )
    hung = isinstance(nproc, Start) and nproc.hang_seconds > 0
    with watched(env, nproc, hooks.event) if hung else nullcontext():
        _run_here(partial(fn, env, *args), env, env.rank != 0 and log_dir is not None, saves)


def _run_here(run: Callable[[], None], env: RankEnv, own_log: bool, saves: bool) -> None:
    """Call `run` in this process, a rank that others started."""
    _use_lossy_output(own_log)
    if saves:
        default_signals()
    keep_memory()
    limit_threads(thread_count(env.local_world))
    try:
        run()
    except Exception as error:
        if lost_peer(error):
            raise PeerLost(f"rank {env.rank} of {env.world} lost a peer: {error}") from error
        raise


def _use_lossy_output(own_log: bool) -> None:
    """What srun or torchrun reads may be stuck or gone: lines are dropped then, and the rank goes
    on.
    """
    out = FdWriter(1) if own_log else BackgroundWriter(1)
    err = BackgroundWriter(2)
    with suppress(OSError):
        sys.stdout.flush()
    sys.stdout, sys.stderr = LossyText(out), LossyText(err)
    terminal.escape_streams()
    for writer in (out, err):
        atexit.register(writer.close, 2.0)
