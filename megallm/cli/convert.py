"""`megallm convert`: between our checkpoints and Hugging Face folders."""

from __future__ import annotations

import argparse
import json
import sys

from megallm.base.errors import UsageError
from megallm.cli.board import BOARD, tell
from megallm.cli.output import overwrite_argument
from megallm.cli.table import Command

DTYPES = ("fp64", "fp32", "bf16", "fp16")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--list", action="store_true", help="print what is supported, as docs/models.md has it"
    )
    parser.add_argument("--to", choices=("hf", "megallm"), help="what to write")
    parser.add_argument(
        "--input",
        metavar="X",
        help="run or step folder (to hf), Hugging Face folder (to megallm)",
    )
    parser.add_argument(
        "--output", metavar="Y", help="a new folder; it appears when it is complete"
    )
    overwrite_argument(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the written weights (default: as stored)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare float32 logits with transformers; exit code 70 above 1e-5",
    )
    parser.add_argument(
        "--max-shard-gib",
        type=float,
        default=4.0,
        metavar="G",
        help="largest safetensors file, to hf (default: 4)",
    )


def _run(args: argparse.Namespace) -> int:
    if args.list:
        from megallm.convert.listing import page

        print(page(), end="")
        return 0
    missing = [f"--{name}" for name in ("to", "input", "output") if getattr(args, name) is None]
    if missing:
        raise UsageError(f"megallm convert needs {', '.join(missing)}, or --list alone.")
    if not args.max_shard_gib > 0:
        raise UsageError(f"--max-shard-gib is {args.max_shard_gib:g}; it must be greater than 0.")
    from megallm.convert import convert

    limit = int(min(args.max_shard_gib, 2**20) * 2**30)
    request = convert.ConvertRequest(
        args.to, args.input, args.output, args.dtype, args.verify, limit, args.overwrite
    )
    try:
        done = convert.run(request)
    except convert.NotEqual as error:
        print(json.dumps({"output": None, "max_rel_error": error.max_rel_error}))
        raise
    BOARD.end()
    for note in done["notes"]:
        print(f"megallm: note: {note}", file=sys.stderr)
    print(json.dumps(done))
    then = (
        "transformers' AutoModelForCausalLM.from_pretrained loads it"
        if args.to == "hf"
        else (
            f"`megallm pretrain CONFIG run.dir={args.output}` with the section of "
            f"{args.output}/model.yaml"
        )
    )
    tell(
        f"the model is in {args.output}.",
        f"`megallm generate --model {args.output} --prompt TEXT`; {then}.",
    )
    return 0


COMMANDS = {"convert": Command(_arguments, _run)}
