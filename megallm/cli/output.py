"""The one rule for what verbs write: what is there already is refused, unless `--overwrite` is
given.
"""

from __future__ import annotations

import argparse

from megallm.base.files import check_new


def overwrite_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is there (default: refuse, exit code 2)",
    )


def check_outputs(args: argparse.Namespace, *paths: str | None) -> None:
    """Errors: `UsageError` for an output that is there and not empty."""
    check_new(*filter(None, paths), overwrite=args.overwrite)
