"""`megallm pretrain`: everything is checked before a process starts; then the ranks run the training loop."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from megallm.base.stopping import ignore_stop_signals
from megallm.cli.config import load_and_check, overrides_argument
from megallm.cli.table import Command
from megallm.data.indexed import IndexedDataset
from megallm.launch.environment import RankEnv
from megallm.launch.start import start, world_size
from megallm.training.config import PretrainConfig
from megallm.training.lease import drop_dead_lease, held_by
from megallm.training.runfolder import RunFolder

PRELOAD = ("megallm.training.pretrain", "megallm.launch.group")  # imported once, before the ranks are forked


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file (see `megallm config --schema`)")
    overrides_argument(parser)
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="ranks to start on this machine (default: what the layout asks for)"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "must", "never"),
        default="auto",
        help="auto: from the newest checkpoint of run.dir when there is one; must: fail without one; never: refuse one",
    )
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY",
        help="go on from a checkpoint although this key, or section, makes it another run; may be given again",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    config = load_and_check(args.config, args.overrides, world_size(args.nproc))
    for prefix in config.data.prefixes:
        IndexedDataset(prefix)  # a missing or broken file ends here, before any rank
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

    own_log = env.launcher != "local" or sys.stdout.isatty()  # else our launcher copies rank 0's lines to its log
    with process_group(env) as device:
        try:
            pretrain.run(config, Mesh.start(config.layout.grid(), device), resume, own_log, allowed)
        finally:
            ignore_stop_signals()


COMMANDS = {"pretrain": Command(_arguments, _run)}
