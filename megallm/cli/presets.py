"""`megallm presets`: the models that `model.preset` and `pretrain --preset` name."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megallm.cli.table import Command
from megallm.models.config import ModelConfig
from megallm.models.presets import PRESETS

COLUMNS = ("name", "params", "family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size",
           "max_positions")  # fmt: skip


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def rows() -> list[dict[str, Any]]:
    """Returns a row for each preset, in the order of the table; `active_params` are those that one
    token uses.
    """
    found = []
    for name in PRESETS:
        model = ModelConfig(preset=name).resolve()
        sizes = {key: vars(model)[key] for key in COLUMNS[2:]}
        counts = {"params": model.num_params(), "active_params": model.num_params(active=True)}
        found.append({"name": name} | counts | sizes)
    return found


def count(number: int) -> str:
    """Returns a number of parameters: 1.1M, 6.7B."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _run(args: argparse.Namespace) -> int:
    found = rows()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    table = [list(COLUMNS)]
    table += [
        [count(row[key]) if key == "params" else str(row[key]) for key in COLUMNS] for row in found
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, row in enumerate(table):
        text = [
            cell.ljust(width) if at in (0, 2) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        active = found[number - 1]["active_params"] if number else 0
        experts = number and active != found[number - 1]["params"]
        print("  ".join(text) + (f"  ({count(active)} of them for a token)" if experts else ""))
    print(
        "\nUse one as model.preset=NAME; `megallm pretrain --text DIR --preset tiny` takes the "
        "tiny one that fits."
    )
    return 0


COMMANDS = {"presets": Command(_arguments, _run)}
