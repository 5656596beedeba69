"""`megallm score`: write the reward of each row of a file."""

from __future__ import annotations

import argparse

from megallm.base.errors import UsageError
from megallm.cli.board import BOARD, tell
from megallm.cli.generate import model_arguments, parse_layout
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command
from megallm.launch.environment import RankEnv
from megallm.launch.start import start, world_size
from megallm.parallel.layout import Layout

PRELOAD = ("megallm.training.scoring", "megallm.launch.group")


def _arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    add = parser.add_argument
    add("--input", required=True, metavar="F", help="rows with answers: JSONL, JSON, CSV, Parquet")
    add("--output", required=True, metavar="G.jsonl", help="the same rows with their rewards")
    overwrite_argument(parser)
    add("--template", metavar="F|chatml", help="chat template (default: the one of the model)")
    add(
        "--strings",
        choices=("plain", "messages"),
        default="plain",
        help="prompts and completions that are texts: as they stand, or as messages",
    )
    add("--batch", type=int, default=16, metavar="N", help="answers computed together (default 16)")


def _run(args: argparse.Namespace) -> int:
    if args.batch < 1:
        raise UsageError(f"--batch is {args.batch}; it must be at least 1.")
    layout = parse_layout(args.layout)
    check_outputs(args, args.output)
    world = world_size(None)
    if world is not None and world != layout.world:
        raise UsageError(
            f"--layout {args.layout or 'of one rank'} needs {layout.world} ranks, but {world} were "
            "started."
        )
    names = ["model", "input", "output", "adapter", "tokenizer", "template", "strings"]
    values = {name: vars(args)[name] for name in [*names, "precision", "batch"]}
    start(_rank, (values, layout), layout.world, None, PRELOAD, saves=False)
    BOARD.end()
    tell(f"the rows with their rewards are in {args.output}.")
    return 0


def _rank(env: RankEnv, values: dict[str, object], layout: Layout) -> None:
    from megallm.launch.group import process_group
    from megallm.parallel.mesh import Mesh
    from megallm.training import scoring

    with process_group(env) as device:
        scoring.run(scoring.ScoreRequest(**values), Mesh.start(layout, device))


COMMANDS = {"score": Command(_arguments, _run)}
