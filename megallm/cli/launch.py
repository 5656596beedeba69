"""`megallm launch`: start a run on Slurm, or say which layout fits the ranks that are left."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megallm.base.config import replace
from megallm.base.errors import UsageError
from megallm.cli.config import load_and_check, overrides_argument
from megallm.cli.table import Command
from megallm.launch.elastic import Sizes, choose_layout
from megallm.launch.slurm import LAUNCHERS, SlurmJob, submit, write_script
from megallm.run.config import JobConfig
from megallm.training.kinds import KINDS
from megallm.training.validate import find_problems


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", metavar="VERB", choices=tuple(KINDS), help=", ".join(KINDS))
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    overrides_argument(parser)
    slurm_arguments(parser)
    elastic_arguments(parser)


def slurm_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a batch job."""
    group = parser.add_argument_group("Slurm")
    group.add_argument("--slurm", action="store_true", help="write RUN/launch.sbatch, submit it")
    group.add_argument("--dry-run", action="store_true", help="print it; write and submit nothing")
    group.add_argument("--nodes", type=int, metavar="N", default=1, help="nodes (default: 1)")
    group.add_argument("--min-nodes", type=int, metavar="N", help="go on with fewer, down to N, "
                       "when nodes are lost, and with all when they are back")  # fmt: skip
    group.add_argument("--gpus-per-node", type=int, metavar="N", default=0, help="GPUs of a node")
    group.add_argument("--ranks-per-node", type=int, metavar="N",
                       help="ranks of a node (default: one a GPU, else 1)")  # fmt: skip
    group.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of a rank")
    group.add_argument("--time", metavar="D-HH:MM:SS", help="limit of one start of the job")
    group.add_argument("--partition", metavar="NAME", help="partition")
    group.add_argument("--account", metavar="NAME", help="account")
    group.add_argument("--signal-seconds", type=int, metavar="S", default=180,
                       help="the ranks are told to save S seconds before --time is over")  # fmt: skip
    group.add_argument("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0],
                       help="srun: a task is a rank; torchrun: one a node (default: srun)")  # fmt: skip


def elastic_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a world that may shrink."""
    group = parser.add_argument_group("elastic")
    group.add_argument("--fit", type=int, metavar="RANKS", help="print the layout for so many ranks"
                       ": their number and settings; start nothing")  # fmt: skip
    group.add_argument("--min-ranks", type=int, metavar="N", default=1, help="the fewest ranks")
    group.add_argument("--max-ranks", type=int, metavar="N", help="ranks when none is lost "
                       "(default: what the layout asks for)")  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    if args.fit is not None:
        return _fit(args)
    if args.slurm or args.dry_run:
        return _slurm(args)
    raise UsageError("megallm launch needs --slurm, or --fit RANKS; see `megallm launch --help`.")


def layout_for(
    verb: str, config: JobConfig, ranks: int, least: int = 1, most: int | None = None
) -> tuple[Sizes, list[str]]:
    """Returns the layout with which a run goes on with at most `ranks` ranks, and the settings that
    say it. `config` is as loaded, before it is checked; `most` is the number of ranks when none is
    lost. Errors: UsageError with the numbers of ranks that fit.
    """
    vocab, given = KINDS[verb].tokenizer_vocab(config), config.layout
    rest = given.pp * given.cp * given.tp
    dp = given.dp or max(1, (most or rest) // rest)
    wish = Sizes(given.pp, dp, given.cp, given.tp, given.ep)

    def fault(sizes: Sizes) -> str:
        trial = replace(config, {f"layout.{name}": size for name, size in vars(sizes).items()})
        found = find_problems(trial, sizes.world, vocab)
        return found[0].sentence.rstrip(".") if found else ""

    sizes = choose_layout(wish, ranks, fault, least)
    return sizes, sizes.settings(wish)


def _fit(args: argparse.Namespace) -> int:
    from megallm.base.config import load

    if args.fit < 1:
        raise UsageError(f"--fit is {args.fit}; it must be at least 1.")
    config = load(KINDS[args.verb].config, args.config, args.overrides)
    sizes, settings = layout_for(args.verb, config, args.fit, args.min_ranks, args.max_ranks)
    print(sizes.world, *settings)
    return 0


def _slurm(args: argparse.Namespace) -> int:
    job = job_of(args, load_folder=lambda world: _checked(args, world))
    if args.dry_run:
        print(job.script(), end="")
        return 0
    job.script()  # what cannot be ends here, before a file is written
    path = write_script(job)
    number = submit(path)
    print(f"megallm: job {number} is submitted; {path} is what it runs.")
    print(f"megallm: `squeue -j {number}` says where it stands, {job.folder}/logs what it prints; "
          f"`scancel {number}` ends it.")  # fmt: skip
    return 0


def _checked(args: argparse.Namespace, world: int) -> Path:
    kind = KINDS[args.verb]
    config: Any = load_and_check(args.config, args.overrides, world, "--nodes x ranks", kind)
    return Path(config.run.dir).absolute()


def job_of(args: argparse.Namespace, load_folder: Any) -> SlurmJob:
    """Returns the job that the options ask for; `load_folder(world)` checks the configuration and
    returns the run folder.
    """
    config = str(Path(args.config).absolute())
    per_node = args.ranks_per_node if args.ranks_per_node is not None else args.gpus_per_node or 1
    job = SlurmJob(
        [args.verb, config, *args.overrides],
        Path(),
        Path.cwd(),
        sys.executable,
        args.nodes,
        per_node,
        args.gpus_per_node,
        args.cpus_per_task,
        args.time,
        args.partition,
        args.account,
        args.min_nodes,
        args.signal_seconds,
        args.launcher,
    )
    faults = list(job.faults())
    if faults:
        raise UsageError(" ".join(faults))
    return SlurmJob(**vars(job) | {"folder": load_folder(job.world)})


COMMANDS = {"launch": Command(_arguments, _run)}
