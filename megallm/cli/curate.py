"""`megallm curate`, `curate train-classifier`, `curate train-lm` and `megallm synth`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megallm.base import terminal
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
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        tasks: dict[str, Any] = {}
        console = terminal.console(sys.stderr)
        with Progress(*columns, console=console, auto_refresh=False) as bars:  # no thread: workers fork

            def show(phase: str, done: int, total: int | None) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done, total=total, refresh=True)

            yield show
        return
    last = {"phase": "", "at": 0.0}

    def say(phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase != last["phase"] or now - float(last["at"]) > 10 or done == total:
            last.update(phase=phase, at=now)
            print(f"curate | {phase} | shard {done}{'' if total is None else f'/{total}'}", file=sys.stderr)

    yield say


def _classifier_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--good", nargs="+", required=True, metavar="F", help="files of documents to keep")
    parser.add_argument("--bad", nargs="+", required=True, metavar="F", help="files of documents to drop")
    parser.add_argument("--key", default="text", metavar="KEY", help="JSON key of the text")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the held-out tenth and the order")
    parser.add_argument("--output", required=True, metavar="M.npz", help="the model file")


def _train_classifier(args: argparse.Namespace) -> int:
    from megallm.curate import classifier

    model = classifier.train(args.good, args.bad, args.key, args.seed)
    model.save(args.output)
    print(json.dumps(model.about, indent=2))
    return 0


def _lm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="F", help="files of good text")
    parser.add_argument("--key", default="text", metavar="KEY", help="JSON key of the text")
    parser.add_argument("--order", type=int, default=3, metavar="N", help="length of the longest n-gram")
    parser.add_argument("--min-count", type=int, default=2, metavar="N", help="rarer words become <unk>")
    parser.add_argument("--output", required=True, metavar="M.arpa", help="the model file")


def _train_lm(args: argparse.Namespace) -> int:
    from megallm.curate import kneser_ney, readers

    model = kneser_ney.train(readers.texts(args.input, args.key), args.order, args.min_count)
    model.save(args.output)
    print(json.dumps({f"{size}-grams": len(level.count) for size, level in enumerate(model.levels, start=1)}, indent=2))
    return 0


def _synth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", nargs="+", default=["arithmetic", "code", "template"], metavar="K", help="in turn")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many tasks")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed makes the same tasks")
    parser.add_argument(
        "--avoid", nargs="*", default=[], metavar="F", help="training and evaluation sets not to repeat"
    )
    parser.add_argument("--output", required=True, metavar="F.jsonl[.gz]", help="one task a line")


def _synth(args: argparse.Namespace) -> int:
    import gzip

    from megallm.base.files import atomic_path, writing
    from megallm.curate import synth

    rows = synth.generate(args.kind, args.count, args.seed, args.avoid)
    with writing(args.output), atomic_path(args.output) as path, open(path, "wb") as raw:
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if args.output.endswith(".gz") else raw
        for row in rows:
            packed.write(synth.dump(row).encode())
        if packed is not raw:
            packed.close()
    print(json.dumps({"tasks": args.count, "output": args.output}))
    return 0


COMMANDS = {
    "curate train-classifier": Command(_classifier_arguments, _train_classifier),
    "curate train-lm": Command(_lm_arguments, _train_lm),
    "synth": Command(_synth_arguments, _synth),
    "curate": Command(_curate_arguments, _curate),
}
