"""`megallm merge`: an adapter into its base model, as a full Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import sys

from megallm.cli.board import BOARD, tell
from megallm.cli.convert import DTYPES
from megallm.cli.output import overwrite_argument
from megallm.cli.table import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="X",
        help="the base: Hugging Face, run or step folder; or a run that has adapters of its own",
    )
    parser.add_argument(
        "--adapter",
        metavar="A",
        help="folder with adapter_config.json and adapter_model.safetensors, or the run of it",
    )
    parser.add_argument(
        "--output", required=True, metavar="Y", help="a new folder; it appears when it is complete"
    )
    overwrite_argument(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the written weights (default: as the base)"
    )


def _run(args: argparse.Namespace) -> int:
    from megallm.peft import merge_folder

    request = merge_folder.MergeRequest(
        args.model, args.adapter, args.output, args.dtype, overwrite=args.overwrite
    )
    done = merge_folder.run(request)
    BOARD.end()
    for note in done["notes"]:
        print(f"megallm: note: {note}", file=sys.stderr)
    print(json.dumps(done))
    tell(
        f"the merged model is in {args.output}.",
        f"`megallm generate --model {args.output} --prompt TEXT`; transformers' "
        "AutoModelForCausalLM.from_pretrained loads it.",
    )
    return 0


COMMANDS = {"merge": Command(_arguments, _run)}
