"""`megallm pretrain` and every other verb that trains: everything is checked before a process
starts; then the ranks run the training loop.

`training.kinds` has a row for each verb: its configuration, and the module that the ranks run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megallm.base.config import to_dict
from megallm.base.errors import UsageError
from megallm.base.stopping import JOB_END, ignore_stop_signals
from megallm.cli import text
from megallm.cli.board import tell
from megallm.cli.config import load_and_check, overrides_argument
from megallm.cli.memory import explained_memory
from megallm.cli.table import Command
from megallm.launch.environment import RankEnv, job_end
from megallm.launch.local import Hooks, RanksFailed
from megallm.launch.restart import Attempt, AttemptEnded, Start, supervise
from megallm.launch.start import start, world_size
from megallm.run.config import JobConfig
from megallm.run.lease import drop_dead_lease, held_by, is_taken
from megallm.run.rows import append_event
from megallm.run.runfolder import RunFolder
from megallm.training.kinds import KINDS, Kind

STORING = "distill"  # the kind whose data a teacher can complete
FROM_TEXT = "pretrain"  # the kind that can make its configuration of a folder of text


def _arguments(kind: Kind, parser: argparse.ArgumentParser) -> None:
    common_arguments(parser)
    if kind.name == FROM_TEXT:
        text.arguments(parser)
    if kind.name == STORING:
        parser.add_argument(
            "--store",
            metavar="DIR",
            help="write the top k log-probs of teacher.model for every row to DIR, and train "
            "nothing",
        )


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every verb that trains takes."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="YAML file (see `megallm config --schema`)"
    )
    overrides_argument(parser)
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks to start on this machine (default: what the layout asks for)",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "must", "never"),
        default="auto",
        help="auto: from the newest checkpoint of run.dir when there is one; must: fail without "
        "one; never: refuse one",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on from a checkpoint although this key, or section, makes it another run; may be "
             "given again",
    )


def _run(kind: Kind, args: argparse.Namespace) -> int:
    if kind.name == FROM_TEXT and args.text is not None:
        return text.run(args, partial(_train, kind))
    if kind.name == FROM_TEXT and args.preset is not None:
        raise UsageError(
            f"--preset goes with --text DIR; with a CONFIG write model.preset={args.preset}."
        )
    if args.config is None:
        hint = " Or train on a folder of text: `megallm pretrain --text DIR --preset tiny`."
        raise UsageError(
            f"the following arguments are required: CONFIG.{hint * (kind.name == FROM_TEXT)} "
            f"See `megallm {kind.name} --help`."
        )
    return _train(kind, args)


def _train(kind: Kind, args: argparse.Namespace) -> int:
    return train(kind, args, restarts=False)


def train(
    kind: Kind,
    args: argparse.Namespace,
    restarts: bool,
    supervised: Callable[..., None] = supervise,
) -> int:
    """Train as the arguments say; the exit code. `restarts`: start again after an incident, as
    `supervised` does.
    """
    overrides, module = args.overrides, kind.module
    if kind.name == STORING and args.store is not None:
        module = "megallm.training.store_teacher"
        storing = ["teacher.kind=stored", f"teacher.store={args.store}", "distill.lmbda=0"]
        overrides = [*overrides, *storing]
    config = load_and_check(args.config, overrides, world_size(args.nproc), kind=kind)
    kind.check_files(config)  # what is missing or cannot be used ends here, before any rank
    JOB_END.set(job_end())
    job = _Job(kind, args, overrides, module, config)
    supervised(job.attempt, job.first(), config.launch.restarts if restarts else 0, job.tell)
    if module != kind.module:
        tell(f"the teacher's log-probs of all rows are in {args.store}.")
    return 0


class _Job:
    """One run, which may be started more than once."""

    def __init__(
        self,
        kind: Kind,
        args: argparse.Namespace,
        overrides: Sequence[str],
        module: str,
        config: JobConfig,
    ) -> None:
        self.kind, self.args, self.overrides, self.module = kind, args, overrides, module
        self.config, self.folder = config, RunFolder(config.run.dir)

    def first(self) -> Start:
        """Returns the first start: what the configuration asks for, on this machine."""
        world, launch = self.config.layout.grid().world, self.config.launch
        return Start(world, hang_seconds=launch.hang_seconds, stages=self.config.layout.pp)

    def attempt(self, begin: Start) -> None:
        """Start the ranks and wait for them. Errors: `AttemptEnded` for an incident."""
        config, args = self.config, self.args
        if begin.overrides:
            words = [*self.overrides, *begin.overrides]
            config = load_and_check(args.config, words, begin.size, kind=self.kind)
        resume = args.resume if begin.attempt == 0 else "auto"
        work = (self.module, config, resume, args.allow_change)
        preload = (self.module, "megallm.launch.group")  # once, before the ranks are forked
        hooks = Hooks(partial(held_by, self.folder), self.tell)
        try:
            start(_rank, work, begin, self.folder.logs, preload, hooks)
        except RanksFailed as error:
            if error.incident is None:
                raise
            raise AttemptEnded(Attempt(error.incident, error.last_step), error) from error
        finally:
            drop_dead_lease(self.folder)  # of rank 0, when another rank's failure ended it

    def tell(self, kind: str, sentence: str, fields: dict[str, Any]) -> None:
        """Write an event of the launcher, and show its sentence."""
        if not is_taken(self.folder):
            append_event(self.folder.events, kind, fields)
        if sentence:
            tell(sentence)


def _rank(env: RankEnv, module: str, config: JobConfig, resume: str, allowed: list[str]) -> None:
    from megallm.launch.group import process_group
    from megallm.launch.meeting import digest_of
    from megallm.parallel.mesh import Mesh

    if config.train.determinism == "strict":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at its first use

    run = importlib.import_module(module).run
    guard = importlib.import_module("megallm.training.guard")
    own_log = (
        env.launcher != "local" or sys.stdout.isatty()
    )  # else our launcher copies rank 0's lines to its log
    sections = to_dict(config) if env.world > 1 else {}
    alike = {f"{name}:": digest_of(repr(value)) for name, value in sections.items()}
    seconds = config.launch.timeout_seconds, config.launch.meet_seconds
    with process_group(env, *seconds, alike) as device:
        try:
            mesh = Mesh.start(config.layout.grid(), device)
            with explained_memory(config, env, device):
                guard.run_guarded(run, config, mesh, resume, own_log, allowed)
        finally:
            ignore_stop_signals()


COMMANDS = {
    name: Command(partial(_arguments, kind), partial(_run, kind)) for name, kind in KINDS.items()
}
