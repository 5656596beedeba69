"""`megallm data stream|trace`: which documents a run reads at which step, and where their text came
from. No torch.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from megallm.base import files
from megallm.base.errors import UsageError
from megallm.cli.config import load_and_check, overrides_argument
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command
from megallm.data.batches import BatchReader, Share
from megallm.data.stream import trace
from megallm.training import reading
from megallm.training.config import PretrainConfig


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    overrides_argument(parser)
    parser.add_argument(
        "--from",
        dest="start",
        metavar="STEP_DIR",
        help="go on from where this checkpoint stood (a changed plan)",
    )


def _stream_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument(
        "--steps",
        required=True,
        metavar="A:B",
        help="the steps after A up to B, so 0:10 are the first ten",
    )
    parser.add_argument(
        "--json", metavar="F", help="write one JSON object a line to this file (default: print)"
    )
    overwrite_argument(parser)


def _stream(args: argparse.Namespace) -> int:
    check_outputs(args, args.json)
    config = load_and_check(args.config, args.overrides, None)
    match = re.fullmatch(r"(\d*):(\d*)", args.steps)
    if match is None:
        raise UsageError(f"--steps {args.steps} is not of the form A:B, such as 0:10.")
    first, last = int(match[1] or 0), int(match[2] or config.train.steps)
    if last <= first:
        raise UsageError(f"--steps {args.steps} holds no step; want A < B.")
    with ExitStack() as stack:
        out: TextIO = sys.stdout
        if args.json:
            with files.writing(args.json):
                out = stack.enter_context(
                    stack.enter_context(files.atomic_path(args.json)).open("w", encoding="utf-8")
                )
        for row in _rows(config, first, last, args.start):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


def _rows(
    config: PretrainConfig, first: int, last: int, start: str | None
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the steps after `first` up to `last`."""
    reader, done = _reader(config, first, start)
    for step in range(done + 1, last + 1):
        rows = reader.consumed(step)
        if step > first:
            yield from rows


def _reader(config: PretrainConfig, before: int, start: str | None) -> tuple[BatchReader, int]:
    """Returns a reader of all rows, and the step it stands after: at most `before`."""
    reading.check_tokenizers(config)
    done, state = (before, None) if start is None else reading.saved_state(Path(start))
    if done > before:
        raise UsageError(
            f"--from {start} is the state after step {done}; an earlier step cannot be reached "
            "from it."
        )
    share = Share(config.train.global_batch, config.train.micro_batch)
    return reading.open_reader(config, share, done + 1, state, bookmarks=True), done


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--step", type=int, required=True, metavar="S", help="step, from 1")
    parser.add_argument(
        "--row", type=int, required=True, metavar="R", help="row of the global batch, from 0"
    )
    parser.add_argument(
        "--ledger", metavar="F", help="ledger.jsonl of `megallm curate`: name the raw lines too"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _trace(args: argparse.Namespace) -> int:
    config = load_and_check(args.config, args.overrides, None)
    if args.step < 1 or not 0 <= args.row < config.train.global_batch:
        raise UsageError(
            f"--step {args.step} --row {args.row}: steps count from 1, rows from 0 to "
            f"{config.train.global_batch - 1}."
        )
    (row,) = [
        one for one in _rows(config, args.step - 1, args.step, args.start) if one["row"] == args.row
    ]
    places = trace.places(row["source"], [document for document, _, _ in row["spans"]])
    documents = [
        {"document": document, "begin": begin, "end": end, "origin": place}
        for (document, begin, end), place in zip(row["spans"], places, strict=True)
    ]
    if args.ledger is not None:
        raw = trace.raw_places(place for place in places if place)
        rows = trace.ledger_rows(args.ledger, raw.values())
        for entry in documents:
            place = entry["origin"]
            entry["raw"] = rows.get(raw.get((place["file"], place["line"]))) if place else None
    found = {key: row[key] for key in ("step", "micro", "row", "source", "epoch")} | {
        "documents": documents
    }
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else _told(found))
    return 0


def _told(found: dict[str, Any]) -> str:
    lines = [f"step {found['step']}, row {found['row']}: {found['source']}, epoch {found['epoch']}"]
    for entry in found["documents"]:
        place, raw = entry["origin"], entry.get("raw")
        where = (
            f" from {place['file']}:{place['line']}"
            if place
            else " (the side-car does not say from where)"
        )
        from_raw = f", raw {raw['file']}:{raw['line']} ({raw['action']})" if raw else ""
        lines.append(
            f"  document {entry['document']}, tokens {entry['begin']} to "
            f"{entry['end']}{where}{from_raw}"
        )
    return "\n".join(lines)


COMMANDS = {
    "data stream": Command(_stream_arguments, _stream),
    "data trace": Command(_trace_arguments, _trace),
}
