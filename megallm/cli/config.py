"""`megallm config`: a configuration checked and resolved without starting anything."""

from __future__ import annotations

import argparse
import json

from megallm.base.config import load, schema, to_dict, to_yaml
from megallm.base.errors import UsageError
from megallm.cli.table import Command
from megallm.data import meta
from megallm.training.config import PretrainConfig
from megallm.training.validate import check


def load_and_check(path: str, overrides: list[str], world: int | None) -> PretrainConfig:
    """The resolved configuration of a pretraining run; raises UsageError with everything that is wrong."""
    config = load(PretrainConfig, path, overrides)
    return check(config, world, tokenizer_vocab(config))


def tokenizer_vocab(config: PretrainConfig) -> int | None:
    """The largest vocabulary that the sources were made with, from their side-cars; None when none has one."""
    side_cars = [meta.read(prefix) for prefix in config.data.sources]
    return max((side_car["tokenizer"]["vocab_size"] for side_car in side_cars if side_car), default=None)


def overrides_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the `k=v ..` words that follow a configuration file."""
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of the file")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    overrides_argument(parser)
    parser.add_argument(
        "--world", type=int, metavar="N", help="number of processes (default: what the layout asks for)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema with the documentation of each key"
    )


def _run(args: argparse.Namespace) -> int:
    if args.schema:
        print(json.dumps(schema(PretrainConfig), indent=2))
        return 0
    if args.config is None:
        raise UsageError("megallm config needs a CONFIG file, or --schema.")
    config = load_and_check(args.config, args.overrides, args.world)
    print(json.dumps(to_dict(config), indent=2) if args.json else to_yaml(config).rstrip())
    return 0


COMMANDS = {"config": Command(_arguments, _run)}
