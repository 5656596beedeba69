"""Runs whose world may shrink and grow: `megallm launch --min-ranks`, `--fit`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megallm.base.config import load
from megallm.base.config import replace as changed
from megallm.base.errors import Requeue, UsageError
from megallm.base.stopping import hear_again
from megallm.launch.elastic import LayoutSizes, choose_layout
from megallm.launch.restart import (
    Attempt,
    Restart,
    Start,
    Stop,
    next_start,
    supervise,
    without_progress,
)
from megallm.run.config import JobConfig
from megallm.run.runfolder import RunFolder
from megallm.training.kinds import KINDS
from megallm.training.validate import find_problems

LOOK_SECONDS = 0.5  # between two looks for a new checkpoint
LOST = ("killed", "left", "hang", "lost")  # incidents that may mean that a place for a rank is gone
_STEP = re.compile(r"step-(\d+)")


def elastic_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a world that may shrink."""
    group = parser.add_argument_group("elastic")
    for option, text in (
        ("--fit", "print the layout for so many ranks: their number and settings; start nothing"),
        ("--min-ranks", "go on with fewer ranks, down to N, when all of them bring nothing"),
        ("--max-ranks", "ranks when none is lost (default: --nproc, or what the layout asks for)"),
    ):
        group.add_argument(option, type=int, metavar="N", help=text)


def layout_for(
    verb: str, config: JobConfig, ranks: int, least: int = 1, most: int | None = None
) -> tuple[LayoutSizes, list[str]]:
    """Returns the layout with which a run goes on with at most `ranks` ranks, and the settings that
    say it. `config` is as loaded, before it is checked; `most` is the number of ranks when none is
    lost. Errors: UsageError with the numbers of ranks that fit.
    """
    vocab, given = KINDS[verb].tokenizer_vocab(config), config.layout
    rest = given.pp * given.cp * given.tp
    dp = given.dp or max(1, (most or rest) // rest)
    wish = LayoutSizes(given.pp, dp, given.cp, given.tp, given.ep)

    def fault(sizes: LayoutSizes) -> str:
        trial = changed(config, {f"layout.{name}": size for name, size in vars(sizes).items()})
        found = find_problems(trial, sizes.world, vocab)
        return found[0].sentence.rstrip(".") if found else ""

    sizes = choose_layout(wish, ranks, fault, least)
    return sizes, sizes.settings(wish)


def fit(args: argparse.Namespace) -> int:
    """Print the layout for `--fit` ranks; the exit code."""
    if args.fit < 1:
        raise UsageError(f"--fit is {args.fit}; it must be at least 1.")
    config = load(KINDS[args.verb].config, args.config, args.overrides)
    sizes, settings = layout_for(args.verb, config, args.fit, args.min_ranks or 1, args.max_ranks)
    print(sizes.world, *settings)
    return 0


@dataclass
class Grown(Exception):
    """There is a new checkpoint, from which all ranks go on."""

    attempt: int


class Elastic:
    """`launch.restart.supervise` for a world that may shrink and grow.

    A rank that is lost a second time without a step in between has lost its place: the run goes on
    with fewer. At the next checkpoint it tries all ranks again, after each failure of that with
    twice as many checkpoints in between.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.least = args, args.min_ranks
        self.config = load(KINDS[args.verb].config, args.config, args.overrides)
        self.checkpoints = RunFolder(self.config.run.dir).checkpoints
        self.full = Start()
        self.patience = 1  # checkpoints to wait for before all ranks are tried again

    def __call__(
        self,
        attempt: Callable[[Start], None],
        start: Start,
        restarts: int,
        tell: Callable[[str, str, dict], None],
    ) -> None:
        """Supervise the run; see `launch.restart.supervise`."""
        if not 1 <= self.least <= start.size:
            raise UsageError(
                f"--min-ranks is {self.least}; it must be 1 to {start.size}, the ranks of the run."
            )
        self.full = start
        while True:
            try:
                supervise(partial(self._attempt, attempt), start, restarts, tell, self.choose)
                return
            except Grown as grown:
                start = replace(self.full, attempt=grown.attempt + 1)
                said = f"restart {start.attempt}: a new checkpoint; all {start.size} ranks again."
                tell("restart", said, {"attempt": start.attempt, "ranks": start.size})
                hear_again()

    def choose(self, start: Start, history: Sequence[Attempt], restarts: int) -> Restart | Stop:
        """Returns what follows an incident: fewer ranks where the same number brought nothing."""
        chosen = next_start(start, history, restarts)
        incident, stuck = history[-1].incident, without_progress(history)
        if incident.kind not in LOST or incident.expected or not stuck or restarts < 1:
            return chosen
        try:
            sizes, settings = layout_for(
                self.args.verb, self.config, start.size - 1, self.least, self.full.size
            )
        except UsageError as error:
            if isinstance(chosen, Stop):
                return Stop(f"{chosen.sentence} {error}".strip())
            return replace(chosen, sentence=f"{chosen.sentence} {error}")
        if start.attempt > 1 and start.size == self.full.size:
            self.patience *= 2
        again = replace(
            start,
            nproc=sizes.world,
            attempt=start.attempt + 1,
            overrides=tuple(settings),
            stages=sizes.pp,
        )
        sentence = (
            f"restart {again.attempt}: goes on with {sizes.world} of {self.full.size} ranks "
            f"({' '.join(settings)}), the same global batch and order of data."
        )
        return Restart(again, 0.0, sentence)

    def _attempt(self, attempt: Callable[[Start], None], start: Start) -> None:
        if start.size == self.full.size:
            attempt(start)
            return
        with self._watched() as asked:
            try:
                attempt(start)
            except Requeue as error:
                if asked.is_set():
                    raise Grown(start.attempt) from error
                raise

    @contextmanager
    def _watched(self) -> Iterator[threading.Event]:
        """Ask the ranks to save and leave once there are enough new checkpoints; yields whether
        they were asked.
        """
        over, asked = threading.Event(), threading.Event()
        known = saved_steps(self.checkpoints)

        def watch() -> None:
            seen = set(known)
            while not over.wait(LOOK_SECONDS):
                seen |= saved_steps(self.checkpoints)
                if len(seen - known) >= self.patience:
                    asked.set()
                    os.kill(os.getpid(), signal.SIGUSR2)
                    return

        thread = threading.Thread(target=watch, daemon=True, name="elastic")
        thread.start()
        try:
            yield asked
        finally:
            over.set()
            thread.join()


def saved_steps(checkpoints: Path) -> set[int]:
    """Returns the steps that are saved in a folder."""
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    return {int(found[1]) for found in map(_STEP.fullmatch, names) if found}
