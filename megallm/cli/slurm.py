"""`megallm launch --slurm`: the batch script of a run, printed or submitted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.cli.config import load_and_check
from megallm.launch.slurm import LAUNCHERS, SlurmJob, submit, write_script
from megallm.training.kinds import KINDS

# Numbers: option, default, what it is.
_COUNTS: tuple[tuple[str, int | None, str], ...] = (
    ("--nodes", 1, "nodes (default: 1)"),
    ("--min-nodes", None, "go on with fewer, down to N, when nodes are lost; with all again later"),
    ("--gpus-per-node", 0, "GPUs of a node"),
    ("--ranks-per-node", None, "ranks of a node (default: one a GPU, else 1)"),
    ("--cpus-per-task", None, "cores of a rank"),
    ("--signal-seconds", 180, "the ranks are told to save N seconds before --time is over"),
)


def slurm_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a batch job."""
    group = parser.add_argument_group("Slurm")
    group.add_argument("--slurm", action="store_true", help="write RUN/launch.sbatch, submit it")
    group.add_argument("--dry-run", action="store_true", help="print it; write and submit nothing")
    for option, default, text in _COUNTS:
        group.add_argument(option, type=int, metavar="N", default=default, help=text)
    group.add_argument("--time", metavar="D-HH:MM:SS", help="limit of one start of the job")
    group.add_argument("--partition", metavar="NAME", help="partition")
    group.add_argument("--account", metavar="NAME", help="account")
    group.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default=LAUNCHERS[0],
        help="srun: a task is a rank; torchrun: one a node (default: srun)",
    )


def run(args: argparse.Namespace) -> int:
    """Write and submit the batch script, or print it; the exit code."""
    job = job_of(args, load_folder=lambda world: _checked(args, world))
    if args.dry_run:
        print(job.script(), end="")
        return 0
    job.script()  # what cannot be ends here, before a file is written
    path = write_script(job)
    number = submit(path)
    print(f"megallm: job {number} is submitted; {path} is what it runs.")
    print(
        f"megallm: `squeue -j {number}` says where it stands, {job.folder}/logs what it prints; "
        f"`scancel {number}` ends it."
    )
    return 0


def _checked(args: argparse.Namespace, world: int) -> Path:
    kind = KINDS[args.verb]
    config: Any = load_and_check(args.config, args.overrides, world, "--nodes x ranks", kind)
    return Path(config.run.dir).absolute()


def job_of(args: argparse.Namespace, load_folder: Callable[[int], Path]) -> SlurmJob:
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
