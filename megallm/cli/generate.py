"""`megallm generate`: continue prompts with a trained model, at any layout."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import sys
from pathlib import Path
from typing import Any

from megallm.base.config import load
from megallm.base.errors import DataError, UsageError
from megallm.base.files import cannot_write
from megallm.cli.board import BOARD, tell
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command
from megallm.inference.request import PRECISIONS, GenerateRequest
from megallm.launch.environment import RankEnv
from megallm.launch.start import start, world_size
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout

PRELOAD = (
    "megallm.inference.generate",
    "megallm.launch.group",
    "megallm.peft.adapted",
)  # imported once, before the ranks are forked


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which weights, at which layout: the same for `generate` and `chat`.
    """
    parser.add_argument(
        "--model",
        required=True,
        metavar="RUN|STEP|HF",
        help="run folder, step folder or Hugging Face folder",
    )
    parser.add_argument(
        "--adapter",
        metavar="A",
        help="folder of PEFT's with an adapter of the model, or the run that trained it",
    )
    parser.add_argument(
        "--layout",
        default="",
        metavar="tp=2,pp=2",
        help="layout to run at, whatever wrote the model",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR|bytes",
        help="tokenizer of the model (default: the one that it came with)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="compute in this precision (default: the one the weights have)",
    )


def sampling_arguments(
    parser: argparse.ArgumentParser, temperature: float, max_new_tokens: int
) -> None:
    """Add the options that say how tokens are chosen and when an answer ends: the same for
    `generate` and `chat`.
    """
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer, in tokens (default {max_new_tokens})",
    )
    add(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0 takes the likeliest token (default {temperature:g})",
    )
    add("--top-k", type=int, default=0, help="sample among the K likeliest tokens; 0: all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens of this total share",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="F",
        help="above 1, tokens that were already there become less likely",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be given several times",
    )
    add(
        "--q-beta",
        type=float,
        default=0.0,
        metavar="F",
        help="of a model with Q heads (megallm offline, ilql): draw from pi exp(F (Q - V)); "
        "0: from pi",
    )
    add("--seed", type=int, default=0, help="the same seed draws the same tokens (default 0)")


def request_of(args: argparse.Namespace, **more: Any) -> GenerateRequest:
    """Returns the checked request that the arguments of `generate` or `chat` stand for."""
    request = GenerateRequest(
        model=args.model,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        seed=args.seed,
        precision=args.precision,
        tokenizer=args.tokenizer,
        adapter=args.adapter,
        q_beta=args.q_beta,
        **more,
    )
    request.check()
    return request


def _arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--prompts", metavar="F.jsonl", help='one {"prompt": "..."} a line')
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times"
    )
    sampling_arguments(parser, temperature=0.0, max_new_tokens=64)
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="prompts decoded together (default 16)"
    )
    parser.add_argument(
        "--json",
        metavar="F",
        help="write rows {prompt, tokens, text, logprobs, finish_reason} to this file",
    )
    overwrite_argument(parser)
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print text as it is generated (default: on a terminal)",
    )


def _run(args: argparse.Namespace) -> int:
    request = request_of(args, prompts=tuple(_prompts(args)), batch=args.batch, output=args.json)
    layout = parse_layout(args.layout)
    if request.output is not None:
        _check_output(Path(request.output))
        check_outputs(args, request.output)
    world = world_size(None)
    if world is not None and world != layout.world:
        raise UsageError(
            f"--layout {args.layout or 'of one rank'} needs {layout.world} ranks, but {world} "
            "were started."
        )
    live = sys.stdout.isatty() if args.stream is None else args.stream
    printer = Printer(request.prompts, live) if args.stream or request.output is None else None
    if printer is not None and sys.stderr.isatty():
        BOARD.end()  # texts and progress would mix
    start(_rank, (request, layout, printer), layout.world, None, PRELOAD, saves=False)
    if request.output is not None:
        BOARD.end()
        tell(f"the rows are in {request.output}.")
    return 0


def _check_output(path: Path) -> None:
    """What can be seen before anything is generated; a full disk is only noticed at the end."""
    if path.is_dir():
        raise cannot_write(path, IsADirectoryError(errno.EISDIR, "Is a directory"))
    if not path.absolute().parent.is_dir():
        raise cannot_write(path, FileNotFoundError(errno.ENOENT, "No such file or directory"))


def _warn(text: str) -> None:
    print(f"megallm: note: {text}", file=sys.stderr, flush=True)


def parse_layout(text: str) -> Layout:
    """Maps `"tp=2,pp=2"` -> Layout; the same rules as `layout.*` of a configuration."""
    config = load(LayoutConfig, None, [part for part in text.split(",") if part])
    usual = dataclasses.replace(
        LayoutConfig(), tp=config.tp, pp=config.pp, dp=config.dp, ep=config.ep
    )
    if config != usual:
        raise UsageError(f"--layout {text}: only tp, pp, dp and ep can be chosen for generation.")
    if config.tp % config.ep:
        raise UsageError(
            f"--layout {text}: ep {config.ep} does not divide tp {config.tp}. Ranks that hold "
            "different experts decode the same texts, so they are ranks of one tensor-parallel "
            "group."
        )
    return config.grid()


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompts is None) == (args.prompt is None):
        raise UsageError("Give either --prompts F.jsonl or --prompt TEXT.")
    return args.prompt if args.prompts is None else read_prompts(Path(args.prompts))


def read_prompts(path: Path) -> list[str]:
    """Returns the `prompt` of each line; raises DataError `file:line: reason`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}).") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{path}:{number}: expected an object with the text "prompt".')
        prompts.append(row["prompt"])
    if not prompts:
        raise DataError(
            f'{path} holds no prompt; it needs lines such as {{"prompt": "In the beginning"}}.'
        )
    return prompts


class Printer:
    """Prints prompts with their continuations, in their order: `live` piece by piece, else each
    when it has ended.
    """

    def __init__(self, prompts: tuple[str, ...], live: bool) -> None:
        self.prompts, self.live = prompts, live
        self.pending = ["" for _ in prompts]
        self.ended = [False for _ in prompts]
        self.turn = 0  # the prompt that is being printed
        self.begun = False

    def __call__(self, number: int, piece: str, ended: bool) -> None:
        """New text of one prompt; those that are not yet to be printed are kept."""
        self.pending[number] += piece
        self.ended[number] = ended
        while self.turn < len(self.prompts) and (
            self.ended[self.turn] or (self.live and self.pending[self.turn])
        ):
            text = (
                self.pending[self.turn]
                if self.begun
                else self.prompts[self.turn] + self.pending[self.turn]
            )
            self.pending[self.turn], self.begun = "", True
            print(text, end="", flush=True)
            if not self.ended[self.turn]:
                return
            print("\n", flush=True)
            self.turn, self.begun = self.turn + 1, False


def _rank(env: RankEnv, request: GenerateRequest, layout: Layout, printer: Printer | None) -> None:
    from megallm.inference import generate
    from megallm.launch.group import process_group
    from megallm.parallel.mesh import Mesh
    from megallm.peft.adapted import open_adapted

    with process_group(env) as device:
        generate.run(request, Mesh.start(layout, device), printer, _warn, open_adapted)


COMMANDS = {"generate": Command(_arguments, _run)}
