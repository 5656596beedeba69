"""Merge indexed datasets: a folder of .bin/.idx pairs, or prefixes, into one pair, as Megatron-LM's tool does."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megallm.base.errors import MegallmError, UsageError
from megallm.data.indexed.dataset import merge_datasets


def prefixes(inputs: list[str]) -> list[str]:
    """The prefixes that the inputs name; a folder stands for all pairs in it, in the order of their names."""
    found: list[str] = []
    for name in inputs:
        path = Path(name)
        found += sorted(str(file.with_suffix("")) for file in path.glob("*.idx")) if path.is_dir() else [name]
    if not found:
        raise UsageError(f"{', '.join(inputs)}: there is no .idx file to merge.")
    return found


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help="folders, or prefixes without .bin/.idx")
    parser.add_argument("--output-prefix", "--output", required=True)
    args = parser.parse_args()
    try:
        print(json.dumps(merge_datasets(prefixes(args.input), args.output_prefix)))
    except MegallmError as error:
        print(f"merge_datasets: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run())
