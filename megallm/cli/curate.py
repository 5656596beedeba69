"""`megallm curate`, `curate train-classifier`, `curate train-lm` and `megallm synth`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megallm.cli.table import Command


def _curate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file (docs/curation.md)")
    parser.add_argument("overrides", nargs="*", metavar="k=v", help="values that go before the file's")
    parser.add_argument("--output", required=True, metavar="DIR", help="kept/, ledger.jsonl, stats.json, report.html")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; no result depends on it")
    parser.add_argument("--fresh", action="store_true", help="throw away what an earlier run left in DIR")


def _curate(args: argparse.Namespace) -> int:
    from megallm.base import config as configs
    from megallm.curate import run
    from megallm.curate.config import CurateConfig

    config = configs.load(CurateConfig, args.config, args.overrides)
    with _progress() as progress:
        stats = run.run(config, args.output, args.workers, args.fresh, progress)
    totals = stats["totals"]
    summary: dict[str, Any] = dict(totals)
    summary["dropped"] = {
        f"{step}/{reason}": number for step, row in stats["steps"].items() for reason, number in row["dropped"].items()
    }
    summary["report"] = f"{args.output}/{run.REPORT}"
    print(json.dumps(summary, indent=2))
    if not totals["kept"]:
        print("megallm: warning: no document was kept; the report shows which rule dropped them.", file=sys.stderr)
    return 0


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar a phase on a terminal; otherwise a line every ten seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        tasks: dict[str, Any] = {}
        with Progress(*columns, console=Console(stderr=True)) as bars:

            def show(phase: str, done: int, total: int | None) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done, total=total)

            yield show
        return
    last = {"phase": "", "at": 0.0}

    def say(phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase != last["phase"] or now - float(last["at"]) > 10 or done == total:
            last.update(phase=phase, at=now)
            print(f"curate | {phase} | shard {done}{'' if total is None else f'/{total}'}", file=sys.stderr)

    yield say


COMMANDS = {
    "curate": Command(_curate_arguments, _curate),
}
