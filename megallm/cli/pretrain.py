"""`megallm pretrain`: everything is checked before a process starts; then the ranks run the
training loop.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from megallm.base.errors import UsageError
from megallm.base.stopping import ignore_stop_signals
from megallm.cli import text
from megallm.cli.config import load_and_check, overrides_argument
from megallm.cli.table import Command
from megallm.launch.environment import RankEnv
from megallm.launch.start import start, world_size
from megallm.run.lease import drop_dead_lease, held_by
from megallm.run.runfolder import RunFolder
from megallm.training.config import PretrainConfig
from megallm.training.files import check_files

PRELOAD = (
    "megallm.training.pretrain",
    "megallm.launch.group",
)  # imported once, before the ranks are forked


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="YAML file (see `megallm config --schema`)"
    )
    overrides_argument(parser)
    parser.add_argument(
        "--text",
        metavar="DIR",
        help="instead of CONFIG: a folder of text files (or one file) to train on, all in one",
    )
    parser.add_argument(
        "--preset", metavar="NAME",
        help="with --text: model size of `megallm presets`, or tiny (the default): the tiny one "
             "that fits the text",
    )  # fmt: skip
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
        "--allow-change", action="append", default=[], metavar="KEY",
        help="go on from a checkpoint although this key, or section, makes it another run; may be "
             "given again",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    if args.text is not None:
        return text.run(args, _train)
    if args.preset is not None:
        raise UsageError(
            f"--preset goes with --text DIR; with a CONFIG write model.preset={args.preset}."
        )
    if args.config is None:
        raise UsageError(
            "the following arguments are required: CONFIG. Or train on a folder of text: "
            "`megallm pretrain --text DIR --preset tiny`. See `megallm pretrain --help`."
        )
    return _train(args)


def _train(args: argparse.Namespace) -> int:
    config = load_and_check(args.config, args.overrides, world_size(args.nproc))
    check_files(config)  # what is missing or cannot be used ends here, before any rank
    folder = RunFolder(config.run.dir)
    try:
        world, owns = config.layout.grid().world, partial(held_by, folder)
        start(_rank, (config, args.resume, args.allow_change), world, folder.logs, PRELOAD, owns)
    finally:
        drop_dead_lease(folder)  # of rank 0, when it was ended because another rank failed
    return 0


def _rank(env: RankEnv, config: PretrainConfig, resume: str, allowed: list[str]) -> None:
    from megallm.launch.group import process_group
    from megallm.parallel.mesh import Mesh
    from megallm.training import pretrain

    own_log = (
        env.launcher != "local" or sys.stdout.isatty()
    )  # else our launcher copies rank 0's lines to its log
    with process_group(env) as device:
        try:
            pretrain.run(config, Mesh.start(config.layout.grid(), device), resume, own_log, allowed)
        finally:
            ignore_stop_signals()


COMMANDS = {"pretrain": Command(_arguments, _run)}
