"""`megallm report` and `megallm watch`: what a run folder tells, as a page and on a terminal. No
torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megallm.base import terminal
from megallm.base.files import atomic_write_text
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command
from megallm.report.facts import read_run
from megallm.report.page import render_page
from megallm.report.watch import watch


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, whether the run goes on or not")
    parser.add_argument(
        "--output",
        metavar="F.html",
        help="where the page goes (default: RUN/report.html, which is made anew each time)",
    )
    overwrite_argument(parser)


def _report(args: argparse.Namespace) -> int:
    check_outputs(args, args.output)
    facts = read_run(args.run)
    output = Path(args.output) if args.output else facts.path / "report.html"
    atomic_write_text(output, render_page(facts))
    print(output)
    return 0


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder; it is only read")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="how often to look (default 2)"
    )


def _watch(args: argparse.Namespace) -> int:
    watch(args.run, terminal.console(sys.stdout), max(0.1, args.every))
    return 0


COMMANDS = {
    "report": Command(_report_arguments, _report),
    "watch": Command(_watch_arguments, _watch),
}
