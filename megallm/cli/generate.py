"""`megallm generate`: continue prompts with a trained model, at any layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from megallm.base.config import load
from megallm.base.errors import DataError, UsageError
from megallm.cli.table import Command
from megallm.inference.request import GenerateRequest
from megallm.launch.environment import RankEnv
from megallm.launch.start import start, world_size
from megallm.parallel.layout import Layout
from megallm.training.config import LayoutConfig

PRELOAD = ("megallm.inference.generate", "megallm.launch.group")  # imported once, before the ranks are forked


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="RUN|STEP|HF", help="run folder, step folder or Hugging Face folder")
    parser.add_argument("--prompts", metavar="F.jsonl", help='one {"prompt": "..."} a line')
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the K likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this total share"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", default="", metavar="tp=2,pp=2", help="layout to run at, whatever wrote the model")
    parser.add_argument("--json", metavar="F", help="write rows {prompt, tokens, text, logprobs} to this file")


def _run(args: argparse.Namespace) -> int:
    request = GenerateRequest(
        model=args.model,
        prompts=tuple(_prompts(args)),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        output=args.json,
    )
    request.check()
    layout = parse_layout(args.layout)
    world = world_size(None)
    if world is not None and world != layout.world:
        raise UsageError(
            f"--layout {args.layout or 'of one rank'} needs {layout.world} ranks, but {world} were started."
        )
    start(_rank, (request, layout), layout.world, None, PRELOAD)
    return 0


def parse_layout(text: str) -> Layout:
    """`"tp=2,pp=2"` -> Layout; the same rules as `layout.*` of a configuration."""
    config = load(LayoutConfig, None, [part for part in text.split(",") if part])
    usual = dataclasses.replace(LayoutConfig(), tp=config.tp, pp=config.pp, dp=config.dp)
    if config != usual:
        raise UsageError(f"--layout {text}: only tp, pp and dp can be chosen for generation.")
    return config.grid()


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompts is None) == (args.prompt is None):
        raise UsageError("Give either --prompts F.jsonl or --prompt TEXT.")
    return args.prompt if args.prompts is None else read_prompts(Path(args.prompts))


def read_prompts(path: Path) -> list[str]:
    """The `prompt` of each line; raises DataError `file:line: reason`."""
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
        raise DataError(f'{path} holds no prompt; it needs lines such as {{"prompt": "In the beginning"}}.')
    return prompts


def _rank(env: RankEnv, request: GenerateRequest, layout: Layout) -> None:
    from megallm.inference import generate
    from megallm.launch.group import process_group
    from megallm.parallel.mesh import Mesh

    with process_group(env) as device:
        generate.run(request, Mesh.start(layout, device), _show)


def _show(row: dict[str, Any]) -> None:
    print(f"{row['prompt']}{row['text']}\n", flush=True)


COMMANDS = {"generate": Command(_arguments, _run)}
