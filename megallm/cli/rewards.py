"""`megallm rewards`: try reward functions on rows of a file, as training would call them; list
them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megallm.base.errors import DataError, UsageError
from megallm.base.terminal import escaped
from megallm.cli.table import Command
from megallm.data.text.tokenizer import load
from megallm.rewards.config import RewardConfig
from megallm.rewards.samples import Completion
from megallm.rewards.signatures import accepted
from megallm.rewards.table import ALIASES, GIVEN, TABLE
from megallm.rewards.workers import RewardFunctions, build

SHOWN = 60  # characters of an answer


def _try_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "functions",
        nargs="+",
        metavar="FUNCTION",
        help="a name (`megallm rewards list`), file.py:function or package.module:function; "
        "options as 'name(key=value)'",
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="ROWS.jsonl",
        help="rows with prompt, completion and the columns that the functions need",
    )
    parser.add_argument("--tokenizer", default="bytes", help="for lengths in tokens (bytes)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a sample (60)")
    parser.add_argument("--json", action="store_true", help="print a JSON line a row")


def samples(path: Path, tokenizer: str) -> Iterator[Completion]:
    """Yields the samples of a file, with the ids of a tokenizer where a row has none.

    Errors: DataError, with its line, for a row that is no sample; UsageError for a file that is not
    there.
    """
    encode = load(tokenizer).encode
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row.pop("prompt"), row.pop("completion")
            text = answer if isinstance(answer, str) else answer[-1]["content"]
            ids = row.pop("completion_ids", None)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{path}:{number}: a row needs prompt and completion, a text or messages, as JSON: "
                f"{type(error).__name__}: {error}."
            ) from error
        yield Completion(prompt, text, (), encode(text) if ids is None else ids, row)


def _try(args: argparse.Namespace) -> int:
    config = RewardConfig(
        dict.fromkeys(args.functions, 1.0), on_error="none", timeout_seconds=args.timeout
    )
    rows = list(samples(Path(args.input), args.tokenizer))
    if not rows:
        raise DataError(f"{args.input} has no row.")
    with build(config) as functions:
        table = functions(rows)
        for at, (row, rewards) in enumerate(zip(rows, table, strict=True)):
            print(
                _json(functions, at, rewards) if args.json else _line(functions, at, row, rewards)
            )
        failures = [str(failure) for failure in functions.failures]
    if not args.json:
        for name, column in zip(functions.names, zip(*table, strict=True), strict=True):
            print(_summary(name, [reward for reward in column if reward is not None], len(column)))
    if failures:
        raise DataError("\n".join(failures))
    return 0


def _json(functions: RewardFunctions, at: int, rewards: list[float | None]) -> str:
    extras: dict[str, Any] = {name: values[at] for name, values in functions.extras.items()}
    row = {"row": at, **dict(zip(functions.names, rewards, strict=True))}
    return json.dumps(row | ({"extras": extras} if extras else {}))


def _line(functions: RewardFunctions, at: int, row: Completion, rewards: list[float | None]) -> str:
    parts = [
        f"{name} {'none' if reward is None else f'{reward:.4g}'}"
        for name, reward in zip(functions.names, rewards, strict=True)
    ]
    text = " ".join(row.completion.split())
    shown = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    return f"{at:4d}  {', '.join(parts)}  |  {escaped(shown)}"


def _summary(name: str, rewards: list[float], count: int) -> str:
    if not rewards:
        return f"{name}: no reward for any of {count} rows"
    mean = math.fsum(rewards) / len(rewards)
    spread = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    missing = f", none for {count - len(rewards)}" if len(rewards) < count else ""
    return f"{name}: mean {mean:.4g}, standard deviation {spread:.4g}, {count} rows{missing}"


def _list(args: argparse.Namespace) -> int:
    print("Rewards by name, with their options:")
    for name, row in TABLE.items():
        takes = inspect.signature(row.build, eval_str=True).replace(
            return_annotation=inspect.Signature.empty
        )
        print(f"  {name}{takes}\n      {' '.join(inspect.getdoc(row.build).split())}")
    print(f"Of a trainer that has the model: {', '.join(GIVEN)}.")
    print("TRL's names: " + ", ".join(f"{name} = {here}" for name, here in ALIASES.items()) + ".")
    print(f"Signatures of functions in file.py:function or package.module:function:\n{accepted()}")
    return 0


COMMANDS = {
    "rewards try": Command(_try_arguments, _try),
    "rewards list": Command(lambda parser: None, _list),
}
