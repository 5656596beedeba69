"""`megallm config`: a configuration checked and resolved without starting anything."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megallm.base.config import load, schema, to_dict, to_yaml
from megallm.base.errors import UsageError
from megallm.cli.table import Command
from megallm.convert.megatron.translate import translate
from megallm.convert.megatron.translate import translation_yaml as megatron_yaml
from megallm.training.kinds import KINDS, Kind
from megallm.training.validate import check

DEFAULT = "pretrain"  # the kind of a configuration when none is said


def load_and_check(
    path: str,
    overrides: list[str],
    world: int | None,
    world_name: str = "--nproc",
    kind: Kind = KINDS[DEFAULT],
) -> Any:
    """Returns the resolved configuration of a training run of one kind.

    Errors: one `UsageError` with everything that is wrong.
    """
    config = load(kind.config, path, overrides)
    return check(config, world, kind.tokenizer_vocab(config), world_name)


def overrides_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the `k=v ..` words that follow a configuration file."""
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that replace those of the file"
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    overrides_argument(parser)
    parser.add_argument(
        "--kind",
        choices=tuple(KINDS),
        default=DEFAULT,
        help="the verb that the configuration is for (default: pretrain)",
    )
    parser.add_argument(
        "--world",
        type=int,
        metavar="N",
        help="number of processes (default: what the layout asks for)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    parser.add_argument(
        "--no-files",
        action="store_true",
        help="do not look whether data files and tokenizer are there",
    )
    parser.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON schema with the documentation of each key",
    )
    parser.add_argument(
        "--from-megatron-args",
        metavar='FILE.sh|"--flags"',
        help="print the configuration that a launch script of Megatron-LM, or its flags, stand for",
    )


def from_megatron(source: str) -> int:
    """Print YAML for a launch script or for flags.

    What could not be mapped stands in its comments, and on stderr where stdout is no terminal.
    """
    text, name = source, "the flags"
    if not source.lstrip().startswith("--"):
        name = source
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--from-megatron-args: {source} cannot be read as a script ({error}); give a "
                'file, or "--flags ...".'
            ) from error
    found = translate(text, name)
    print(megatron_yaml(found, name), end="")
    for problem in found.problems if not sys.stdout.isatty() else ():  # else it is seen twice
        print(f"megallm: not mapped: {problem}", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace) -> int:
    if args.schema:
        print(json.dumps(schema(KINDS[args.kind].config), indent=2))
        return 0
    if args.from_megatron_args is not None:
        return from_megatron(args.from_megatron_args)
    if args.config is None:
        raise UsageError("megallm config needs a CONFIG file, or --schema.")
    kind = KINDS[args.kind]
    config = load_and_check(args.config, args.overrides, args.world, "--world", kind)
    print(json.dumps(to_dict(config), indent=2) if args.json else to_yaml(config).rstrip())
    if not args.no_files:
        kind.check_files(config)
    return 0


COMMANDS = {"config": Command(_arguments, _run)}
