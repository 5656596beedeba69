"""Real signals at chosen places of a run: a hook that `tests.system.warm` calls in a command before it begins.

`MEGALLM_SIGNAL="PHASE COUNT SIGNAL WHO"`: when a rank enters the phase for the COUNT-th time, WHO is sent SIGNAL: the
launcher (`all`, by rank 0: it tells every rank) or one rank alone (its number). What runs is the command itself.
`MEGALLM_SLOW_DISK=SECONDS`: every shard of a checkpoint takes so long.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

# Phase -> functions of the package, one of which every run of the kind enters there.
PHASES: dict[str, tuple[str, ...]] = {
    "read": ("megallm.training.chat_run:ChatRun._read", "megallm.training.pretrain:open_reader"),
    "build": ("megallm.engine.engine:Engine._initialise",),
    "forward": ("megallm.engine.engine:Engine._run",),
    "update": ("megallm.optim.optimizer:Optimizer.step",),
    "reference": ("megallm.training.preference:DpoRun.complete",),
    "evaluate": ("megallm.training.held_out:to_tensors",),
    "rollout": ("megallm.inference.answer:Answer.push",),
    "reward": ("megallm.rewards.workers:_Pool._begin",),
    "save": ("megallm.checkpoint.store:_write_own",),
    "commit": ("megallm.checkpoint.store:_commit",),
}
SEEN = "signalled"  # a file of the folder in which the command runs: when the signal was sent


def install() -> None:
    """Put the signal in its place; what is not imported yet is imported."""
    if "MEGALLM_SLOW_DISK" in os.environ:
        seconds = float(os.environ["MEGALLM_SLOW_DISK"])
        _put(("megallm.checkpoint.store:write_shard",), lambda: time.sleep(seconds))
    if "MEGALLM_SIGNAL" in os.environ:
        phase, count, name, who = os.environ["MEGALLM_SIGNAL"].split()
        _put(PHASES[phase], _Once(int(count), signal.Signals[name], who))


def _put(targets: tuple[str, ...], fire: Callable[[], None]) -> None:
    """Call `fire` before each of these functions."""
    for target in targets:
        module, _, path = target.partition(":")
        *outer, last = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in outer:
            owner = vars(owner)[part]
        setattr(owner, last, _before(fire, vars(owner)[last]))


class _Once:
    def __init__(self, count: int, number: signal.Signals, who: str) -> None:
        self.count, self.number, self.who, self.calls = count, number, who, 0
        self.launcher = os.getpid()

    def __call__(self) -> None:
        self.calls += 1
        rank = int(self.who) if self.who != "all" else 0
        if self.calls != self.count or _rank() != rank:
            return
        with open(SEEN, "w") as file:
            file.write(str(time.time()))
        os.kill(self.launcher if self.who == "all" else os.getpid(), self.number)
        if self.who == "all":
            time.sleep(0.1)  # it has to come round to this rank


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def _before(fire: Callable[[], None], real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        fire()
        return real(*args, **named)

    return call
