"""`megallm launch VERB CONFIG`: a verb that trains, with a supervisor that starts it again after an
incident, from its last good checkpoint.
"""

from __future__ import annotations

import argparse

from megallm.base.errors import UsageError
from megallm.cli import train
from megallm.cli.table import Command
from megallm.training.kinds import KINDS


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", metavar="VERB", help=f"what to run: {', '.join(KINDS)}")
    train.common_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    if args.verb not in KINDS:
        raise UsageError(
            f"'{args.verb}' is no verb that trains; megallm launch takes {', '.join(KINDS)}."
        )
    if args.config is None:
        raise UsageError(f"megallm launch {args.verb} needs a CONFIG.")
    args.store = args.text = args.preset = None
    return train.train(KINDS[args.verb], args, restarts=True)


COMMANDS = {"launch": Command(_arguments, _run)}
