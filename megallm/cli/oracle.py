"""`megallm oracle`: parallel layouts against an independent reference in float64."""

from __future__ import annotations

import argparse
import sys

from megallm.cli.board import BOARD
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="all",
        metavar="all|gqa|moe|mla|encoder",
        help="architecture (default all)",
    )
    parser.add_argument(
        "--trainer",
        default="pretrain",
        metavar="NAME",
        help="what trains: pretrain (default); sft; lora, rslora, dora, adalora, ia3, prefix, "
        "prompt, p-tuning, houlsby, parallel, qlora beside a frozen model; reward, dpo, kto, "
        "grpo, gspo, ppo, chord, awr, ilql",
    )
    parser.add_argument("--layout", metavar="k=v,..", help="one layout, such as tp=2,pp=2,sp=true")
    parser.add_argument(
        "--layouts", type=int, metavar="N", help="N random layouts instead of the table"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random layouts")
    parser.add_argument(
        "--break",
        dest="break_name",
        metavar="NAME",
        help="leave one reduction out: the row must fail",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "emulated"),
        default="auto",
        help="auto: nccl where each rank has a GPU, else gloo; emulated: nccl's rules on CPUs",
    )
    parser.add_argument("--json", metavar="F", help="write the rows to this file")
    parser.add_argument(
        "--list", action="store_true", help="list the table and the reductions, run nothing"
    )
    overwrite_argument(parser)


def _run(args: argparse.Namespace) -> int:
    from megallm.oracle.run import main

    check_outputs(args, args.json)
    return main(args, _write, BOARD.show)


def _write(text: str) -> None:
    """At once: what is interrupted, or killed, has told its rows."""
    sys.stdout.write(text)
    sys.stdout.flush()


COMMANDS = {"oracle": Command(_arguments, _run)}
