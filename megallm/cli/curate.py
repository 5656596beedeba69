"""`megallm curate`, `curate train-classifier`, `curate train-lm` and `megallm synth`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from megallm.cli.board import BOARD, tell
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command


def _curate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file (docs/curation.md)")
    parser.add_argument(
        "overrides", nargs="*", metavar="k=v", help="values that go before the file's"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="kept/, ledger.jsonl, stats.json, report.html",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; no result depends on it"
    )
    overwrite_argument(parser)
    parser.add_argument(
        "--fresh", action="store_true", dest="overwrite", help="the same as --overwrite"
    )


def _curate(args: argparse.Namespace) -> int:
    from megallm.base import config as configs
    from megallm.curate import run
    from megallm.curate.config import CurateConfig

    config = configs.load(CurateConfig, args.config, args.overrides)
    stats = run.run(config, args.output, args.workers, args.overwrite, BOARD.show)
    BOARD.end()
    totals = stats["totals"]
    summary: dict[str, Any] = dict(totals)
    summary["dropped"] = {
        f"{step}/{reason}": number
        for step, row in stats["steps"].items()
        for reason, number in row["dropped"].items()
    }
    summary["report"] = f"{args.output}/{run.REPORT}"
    print(json.dumps(summary, indent=2))
    bad = totals.get("files_rejected", 0)
    if bad:
        what = (
            "1 file could not be read to its end"
            if bad == 1
            else f"{bad} files could not be read to their ends"
        )
        print(f"megallm: warning: {what}; ledger.jsonl says why (action reject).", file=sys.stderr)
    if not totals["kept"]:
        print(
            "megallm: warning: no document was kept; the report shows which rule dropped them.",
            file=sys.stderr,
        )
    tell(
        f"the text is in {args.output}/kept, the report in {args.output}/{run.REPORT}.",
        f"`megallm preprocess --input {args.output}/kept/*.jsonl.gz --output P "
        "--tokenizer DIR|bytes`.",
    )
    return 0


def _classifier_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--good", nargs="+", required=True, metavar="F", help="files of documents to keep"
    )
    parser.add_argument(
        "--bad", nargs="+", required=True, metavar="F", help="files of documents to drop"
    )
    parser.add_argument("--key", default="text", metavar="KEY", help="JSON key of the text")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the held-out tenth and the order"
    )
    parser.add_argument("--output", required=True, metavar="M.npz", help="the model file")
    overwrite_argument(parser)


def _train_classifier(args: argparse.Namespace) -> int:
    from megallm.curate import classifier

    check_outputs(args, args.output)
    model = classifier.train_classifier(args.good, args.bad, args.key, args.seed, BOARD.show)
    model.save(args.output)
    BOARD.end()
    print(json.dumps(model.about, indent=2))
    tell(
        f"the model is in {args.output}.",
        f"`steps: [classifier]` and `classifier.model={args.output}` in curate.",
    )
    return 0


def _lm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="F", help="files of good text")
    parser.add_argument("--key", default="text", metavar="KEY", help="JSON key of the text")
    parser.add_argument(
        "--order", type=int, default=3, metavar="N", help="length of the longest n-gram"
    )
    parser.add_argument(
        "--min-count", type=int, default=2, metavar="N", help="rarer words become <unk>"
    )
    parser.add_argument("--output", required=True, metavar="M.arpa", help="the model file")
    overwrite_argument(parser)


def _train_lm(args: argparse.Namespace) -> int:
    from megallm.curate import kneser_ney, readers

    check_outputs(args, args.output)
    model = kneser_ney.train_ngrams(
        _counted(readers.document_texts(args.input, args.key)), args.order, args.min_count
    )
    BOARD.show("writing", 0, None)
    model.save(args.output)
    BOARD.end()
    print(
        json.dumps(
            {f"{size}-grams": len(level.count) for size, level in enumerate(model.levels, start=1)},
            indent=2,
        )
    )
    tell(
        f"the model is in {args.output}.",
        f"`steps: [perplexity]` and `perplexity.model={args.output}` in curate.",
    )
    return 0


def _counted(texts: Iterable[str]) -> Iterator[str]:
    """Yields the same texts; how many there were is noted as progress."""
    number = 0
    for number, text in enumerate(texts, start=1):
        BOARD.show("reading", number, None, "texts")
        yield text
    BOARD.show(f"counting n-grams of {number:,} texts", 0, None)


def _synth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", nargs="+", default=["arithmetic", "code", "template"], metavar="K", help="in turn"
    )
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many tasks")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed makes the same tasks"
    )
    parser.add_argument(
        "--avoid",
        nargs="*",
        default=[],
        metavar="F",
        help="training and evaluation sets not to repeat",
    )
    parser.add_argument("--output", required=True, metavar="F.jsonl[.gz]", help="one task a line")
    overwrite_argument(parser)


def _synth(args: argparse.Namespace) -> int:
    import gzip

    from megallm.base.files import atomic_path, writing
    from megallm.curate import synth

    check_outputs(args, args.output)
    rows = synth.generate(args.kind, args.count, args.seed, args.avoid)
    with writing(args.output), atomic_path(args.output) as path, open(path, "wb") as raw:
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if args.output.endswith(".gz") else raw
        for number, row in enumerate(rows):
            BOARD.show("making", number, args.count, "tasks")
            packed.write(synth.dump_row(row).encode())
        if packed is not raw:
            packed.close()
    BOARD.end()
    print(json.dumps({"tasks": args.count, "output": args.output}))
    tell(
        f"the tasks are in {args.output}.",
        f"`megallm preprocess --input {args.output} --output P --tokenizer DIR|bytes`.",
    )
    return 0


COMMANDS = {
    "curate train-classifier": Command(_classifier_arguments, _train_classifier),
    "curate train-lm": Command(_lm_arguments, _train_lm),
    "synth": Command(_synth_arguments, _synth),
    "curate": Command(_curate_arguments, _curate),
}
