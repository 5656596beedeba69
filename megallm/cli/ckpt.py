"""`megallm ckpt ls|show|verify|diff|pin|unpin|dump|reshard|upcycle`: look into checkpoints, keep
them, and write them in another form.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from megallm.base.errors import CheckpointError, UsageError
from megallm.cli.board import BOARD
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command

SOURCE = "a run folder (its newest valid checkpoint) or one step folder"


def _one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN|STEP", help=SOURCE)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _dump_arguments(parser: argparse.ArgumentParser) -> None:
    _one(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the safetensors file to write"
    )
    overwrite_argument(parser)


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN|STEP", help=SOURCE)
    parser.add_argument("second", metavar="RUN|STEP", help=SOURCE)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _ls(args: argparse.Namespace) -> int:
    from megallm.checkpoint import tools

    rows = tools.ls(args.source)
    lines = [
        f"{row['step']:>10}  {_gib(row['bytes'])}  "
        f"{'pinned  ' if row['pinned'] else ''}{row['problem'] or 'valid'}"
        for row in rows
    ]
    return _out(args, rows, lines or [f"{args.source} has no checkpoints."])


def _show(args: argparse.Namespace) -> int:
    from megallm.checkpoint import tools

    found = tools.show_step(args.source)
    lines = [f"step {found['step']}  {_gib(found['bytes'])}  {found['path']}"]
    for tensor in found["tensors"]:
        shape = " x ".join(map(str, tensor["full"])) or "scalar"
        lines.append(
            f"  {tensor['name']:<60} {tensor['dtype']:<6} {shape}  ({tensor['pieces']} pieces)"
        )
    lines.append(json.dumps(found["meta"], indent=2))
    return _out(args, found, lines)


def _verify(args: argparse.Namespace) -> int:
    from megallm.checkpoint import tools

    found = tools.verify_checkpoint(args.source, BOARD.show)
    BOARD.end()
    if found["ok"]:
        return _out(
            args,
            found,
            [
                f"{found['path']}: {found['pieces']} pieces, {_gib(found['bytes'])}, every hash "
                "right."
            ],
        )
    if args.json:
        _out(args, found, [])
    raise CheckpointError("\n  ".join([f"{found['path']} is damaged:", *found["problems"]]))


def _diff(args: argparse.Namespace) -> int:
    """Exit code 0 when equal, 1 when not, as `diff` does."""
    from megallm.checkpoint import tools

    found = tools.diff(args.first, args.second, BOARD.show)
    BOARD.end()
    lines = [
        f"{row['name']}: {row['what']}"
        + (f", max error {row['max_abs_error']:.3e}" if row["max_abs_error"] is not None else "")
        for row in found["tensors"]
    ]
    lines += [
        f"meta.{row['key']}: {_short(row['first'])} -> {_short(row['second'])}"
        for row in found["changes"]
    ]
    _out(args, found, lines or ["The checkpoints are equal bit for bit."])
    return 0 if found["same"] else 1


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _pin(args: argparse.Namespace) -> int:
    return _set_pin(args, True)


def _unpin(args: argparse.Namespace) -> int:
    return _set_pin(args, False)


def _set_pin(args: argparse.Namespace, pinned: bool) -> int:
    from megallm.checkpoint import tools

    done = tools.set_pin(args.source, pinned)
    told = "stays whatever checkpoint.keep says" if pinned else "may go when it is old"
    return _out(args, done, [f"{done['path']} {told}."])


def _reshard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=SOURCE)
    parser.add_argument("output", metavar="DST", help="the run folder to make")
    parser.add_argument(
        "--layout",
        required=True,
        metavar="tp=N,pp=N,..",
        help="the ranks whose files are written: tp, pp, cp, ep, dp, chunks, schedule, stages",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    overwrite_argument(parser)


def _reshard(args: argparse.Namespace) -> int:
    from megallm.base.config import load
    from megallm.convert.reshard import ReshardRequest, reshard
    from megallm.parallel.config import LayoutConfig

    layout = load(LayoutConfig, None, [part for part in args.layout.split(",") if part])
    request = ReshardRequest(args.source, args.output, layout, args.overwrite)
    done = reshard(request, BOARD.show)
    BOARD.end()
    return _out(
        args,
        done,
        [
            f"step {done['step']}: {done['tensors']} tensors in {done['files']} files, "
            f"{_gib(done['bytes'])} -> {done['output']}"
        ],
    )


def _dump(args: argparse.Namespace) -> int:
    if not args.output.endswith(".safetensors"):
        raise UsageError(
            f"--output {args.output} must end in .safetensors, since that is what is written."
        )
    from megallm.checkpoint import tools

    check_outputs(args, args.output)
    done = tools.dump(args.source, args.output, BOARD.show)
    BOARD.end()
    return _out(
        args,
        done,
        [
            f"step {done['step']}: {done['tensors']} tensors, {_gib(done['bytes'])} -> "
            f"{done['output']}"
        ],
    )


def _upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="the run folder to make")
    parser.add_argument(
        "--experts", required=True, type=int, metavar="N", help="copies of each feed-forward layer"
    )
    parser.add_argument("--top-k", type=int, default=2, metavar="N", help="experts of each token")
    parser.add_argument(
        "--first-dense",
        type=int,
        default=0,
        metavar="N",
        help="layers before the first with experts",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="from there on, every how many layers"
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the routers' start")
    overwrite_argument(parser)


def _upcycle(args: argparse.Namespace) -> int:
    from megallm.convert.upcycle import UpcycleRequest, run

    request = UpcycleRequest(
        args.source,
        args.output,
        args.experts,
        args.top_k,
        args.first_dense,
        args.every,
        args.seed,
        args.overwrite,
    )
    done = run(request)
    BOARD.end()
    sizes = (
        f"{done['params'] / 1e6:.1f}M parameters, {done['active_params'] / 1e6:.1f}M of them for "
        "a token"
    )
    return _out(
        args,
        done,
        [f"{done['output']}: {sizes}, {_gib(done['bytes'])}. Train it with --resume auto."],
    )


def _gib(size_bytes: int) -> str:
    return (
        f"{size_bytes / 2**30:.3f} GiB"
        if size_bytes >= 1 << 28
        else f"{size_bytes / 2**20:.2f} MiB"
    )


def _out(args: argparse.Namespace, value: Any, lines: list[str]) -> int:
    print(json.dumps(value, indent=2) if args.json else "\n".join(lines))
    return 0


COMMANDS = {
    "ckpt ls": Command(_one, _ls),
    "ckpt show": Command(_one, _show),
    "ckpt verify": Command(_one, _verify),
    "ckpt diff": Command(_diff_arguments, _diff),
    "ckpt dump": Command(_dump_arguments, _dump),
    "ckpt pin": Command(_one, _pin),
    "ckpt unpin": Command(_one, _unpin),
    "ckpt reshard": Command(_reshard_arguments, _reshard),
    "ckpt upcycle": Command(_upcycle_arguments, _upcycle),
}
