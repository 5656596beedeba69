"""`megallm launch VERB CONFIG`: a verb that trains, with a supervisor that starts it again after an
incident, from its last good checkpoint; on this machine or as a job of Slurm.
"""

from __future__ import annotations

import argparse

from megallm.base.errors import UsageError
from megallm.cli import elastic, slurm, train
from megallm.cli.table import Command
from megallm.launch.restart import supervise
from megallm.training.kinds import KINDS


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", metavar="VERB", help=f"what to run: {', '.join(KINDS)}")
    train.common_arguments(parser)
    elastic.elastic_arguments(parser)
    slurm.slurm_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    if args.verb not in KINDS:
        raise UsageError(
            f"'{args.verb}' is no verb that trains; megallm launch takes {', '.join(KINDS)}."
        )
    if args.config is None:
        raise UsageError(f"megallm launch {args.verb} needs a CONFIG.")
    if args.fit is not None:
        return elastic.fit(args)
    if args.slurm or args.dry_run:
        return slurm.run(args)
    args.store = args.text = args.preset = None
    supervisor = supervise if args.min_ranks is None else elastic.Elastic(args)
    args.nproc = args.max_ranks or args.nproc
    return train.train(KINDS[args.verb], args, restarts=True, supervised=supervisor)


COMMANDS = {"launch": Command(_arguments, _run)}
