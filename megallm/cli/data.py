"""`megallm preprocess|tokenizer train|data verify|show|merge|split|stats`: raw text and indexed
datasets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from megallm.base.errors import UsageError
from megallm.cli.board import BOARD, tell
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command


def _inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="F", help="JSONL, text, Parquet; packed; pipes"
    )
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text"
    )
    parser.add_argument(
        "--split-text",
        choices=("file", "lines", "paragraphs"),
        default="file",
        help="what is a document of plain text",
    )


def _preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    _inputs(parser)
    parser.add_argument(
        "--output", required=True, metavar="P", help="prefix: P_text_document.bin, .idx, .meta.json"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR|bytes", help="tokenizer folder, or 'bytes'"
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    parser.add_argument(
        "--add-special-tokens",
        action="store_true",
        help="put around each document what the tokenizer's template does, such as [CLS] and [SEP]",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="skip writes bad lines to P.rejects.jsonl",
    )
    parser.add_argument(
        "--max-reject-percent",
        type=float,
        default=100.0,
        metavar="X",
        help="with skip: more bad lines are an error",
    )
    parser.add_argument(
        "--max-document-mib",
        type=int,
        default=64,
        metavar="N",
        help="a longer document is a bad line (default 64)",
    )
    parser.add_argument(
        "--backend", choices=("auto", "gigatoken", "tokenizers"), default="auto",
        help="auto: gigatoken where it is installed and gives the same ids",
    )  # fmt: skip
    parser.add_argument(
        "--shards", type=int, metavar="N", help="write N datasets P-00000-of-N, each of whole files"
    )
    parser.add_argument(
        "--shard",
        type=int,
        metavar="I",
        help="with --shards: only this one (one machine of several)",
    )
    overwrite_argument(parser)


def _preprocess(args: argparse.Namespace) -> int:
    from megallm.data.text import preprocess

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many work
    config = preprocess.PreprocessConfig(
        inputs=tuple(args.input),
        output=args.output,
        tokenizer=args.tokenizer,
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        add_special_tokens=args.add_special_tokens,
        workers=args.workers,
        on_error=args.on_error,
        split_text=args.split_text,
        max_document_mib=args.max_document_mib,
        backend=args.backend,
        max_reject_percent=args.max_reject_percent,
        overwrite=args.overwrite,
    )
    if args.shard is not None and args.shards is None:
        raise UsageError("--shard needs --shards.")
    if args.shards is None:
        found: Any = dataclasses.asdict(preprocess.run(config, _counts()))
    else:
        found = [
            dataclasses.asdict(one)
            for one in preprocess.run_shards(config, args.shards, args.shard, _counts())
        ]
    BOARD.end()
    print(json.dumps(found, indent=2))
    prefixes = [
        prefix
        for one in (found if isinstance(found, list) else [found])
        for prefix in one["outputs"].values()
    ]
    named = ", ".join(prefixes[:3]) + (
        f" and {len(prefixes) - 3} more" if len(prefixes) > 3 else ""
    )
    tell(
        f"the data is in {named} (.bin, .idx).",
        f"{_train_on(prefixes[0])}; `megallm data stats {prefixes[0]}` looks at it.",
    )
    return 0


def _train_on(prefix: str) -> str:
    return f"`megallm pretrain CONFIG data.sources='{{{prefix}: 1}}'`"


def _counts() -> Callable[[Any], None]:
    """Returns what notes the counts of a run for the process that shows them."""

    def show(stats: Any) -> None:
        told = f"{sum(stats.tokens.values()):,} tokens, {stats.rejected:,} rejected"
        BOARD.show(told, stats.documents, None, "documents")

    return show


def _tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    _inputs(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="at most this many tokens"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for tokenizer.json")
    parser.add_argument(
        "--special-tokens",
        nargs="+",
        default=[],
        metavar="T",
        help="more special tokens, as for FIM",
    )
    parser.add_argument(
        "--sample-mib",
        type=int,
        default=256,
        metavar="N",
        help="learn from at most N MiB of the text, spread over it: bounds time and memory "
        "(default 256)",
    )
    overwrite_argument(parser)


def _tokenizer_train(args: argparse.Namespace) -> int:
    from megallm.data.text.readers import ReadOptions
    from megallm.data.text.sample import TextSample
    from megallm.data.text.tokenizer import TOKENIZER_FILES, train_bpe

    options = ReadOptions(keys=tuple(args.json_keys), split_text=args.split_text)
    check_outputs(args, *(f"{args.output}/{name}" for name in TOKENIZER_FILES))
    sample = TextSample(args.sample_mib << 20, BOARD.show)
    found = train_bpe(
        args.input, args.vocab_size, args.output, options, args.special_tokens, sample
    )
    BOARD.end()
    print(json.dumps(found, indent=2))
    tell(
        f"the tokenizer is in {args.output}.",
        f"`megallm preprocess --input F.. --output P --tokenizer {args.output} --append-eod`.",
    )
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin/.idx")
    parser.add_argument("--vocab", type=int, metavar="N", help="refuse token ids of N and above")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _verify(args: argparse.Namespace) -> int:
    from megallm.data.indexed import dataset as indexed

    if args.vocab is not None and args.vocab < 1:
        raise UsageError(f"--vocab is {args.vocab}; it must be at least 1.")
    found = indexed.verify_dataset(args.prefix, args.vocab, BOARD.show)
    BOARD.end()
    line = f"{found['prefix']}: {found['documents']} documents, {found['tokens']} tokens"
    line += f" of {found['dtype']}, all sound."
    print(json.dumps(found, indent=2) if args.json else line)
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin/.idx")
    parser.add_argument(
        "--document", type=int, default=0, metavar="I", help="first document to print (default 0)"
    )
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="how many documents (default 1)"
    )
    parser.add_argument("--tokenizer", metavar="DIR|bytes", help="also print the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def _show(args: argparse.Namespace) -> int:
    import numpy as np

    from megallm.data.indexed import meta
    from megallm.data.indexed.dataset import IndexedDataset, check_tokens
    from megallm.data.text.tokenizer import load

    data = IndexedDataset(args.prefix)
    last = min(args.document + args.count, data.num_documents)
    if not 0 <= args.document < data.num_documents or args.count < 1:
        has = f"documents 0 to {data.num_documents - 1}" if data.num_documents else "no documents"
        raise UsageError(
            f"--document {args.document} --count {args.count}: {args.prefix} has {has}."
        )
    tokenizer = None if args.tokenizer is None else load(args.tokenizer)
    if tokenizer is not None:
        meta.check_tokenizer(args.prefix, tokenizer.fingerprint, "--tokenizer")
    for number in range(args.document, last):
        tokens = data.document(number)
        if tokenizer is not None:
            begin = int(data.document_starts(np.array([number]))[0])
            check_tokens(data, begin, tokens, tokenizer.vocab_size)
        tokens = tokens.tolist()
        row: dict[str, Any] = {"document": number, "tokens": tokens}
        if tokenizer is not None:
            row["text"] = tokenizer.decode(tokens)
        print(
            json.dumps(row)
            if args.json
            else f"document {number}, {len(tokens)} tokens:\n{row.get('text', tokens)}"
        )
    return 0


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefixes",
        metavar="PREFIX",
        nargs="+",
        help="datasets of one dtype and tokenizer, in order",
    )
    parser.add_argument("--output", required=True, metavar="P", help="prefix of the new dataset")
    overwrite_argument(parser)


def _merge(args: argparse.Namespace) -> int:
    from megallm.data.indexed import dataset as indexed

    check_outputs(args, *indexed.indexed_files(args.output))
    found = indexed.merge_datasets(args.prefixes, args.output, BOARD.show)
    BOARD.end()
    print(json.dumps({"output": args.output, **found}, indent=2))
    tell(f"the data is in {args.output} (.bin, .idx).", f"{_train_on(args.output)}.")
    return 0


def _split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin/.idx")
    parser.add_argument("--output", required=True, metavar="P", help="writes P-0, P-1, ...")
    parser.add_argument(
        "--shares", required=True, metavar="A,B,..", help="documents of each part, such as 98,1,1"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="choose documents at random; without it: in order"
    )
    overwrite_argument(parser)


def _split(args: argparse.Namespace) -> int:
    from megallm.data.indexed import split_merge
    from megallm.data.indexed.dataset import indexed_files

    shares = split_merge.parse_shares(args.shares)
    parts = [f"{args.output}-{part}" for part in range(len(shares))]
    check_outputs(args, *(path for part in parts for path in indexed_files(part)))
    found = split_merge.split_dataset(args.prefix, args.output, shares, args.seed, BOARD.show)
    BOARD.end()
    print(json.dumps(found, indent=2))
    tell(f"the parts are in {parts[0]} to {parts[-1]} (.bin, .idx).", f"{_train_on(parts[0])}.")
    return 0


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin/.idx")
    parser.add_argument(
        "--seq-len", type=int, default=2048, metavar="T", help="row length for the packing figures"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _stats(args: argparse.Namespace) -> int:
    from megallm.data.indexed import split_merge

    found = split_merge.stats(args.prefix, args.seq_len, BOARD.show)
    BOARD.end()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        print(f"{name.replace('_', ' ')}: {shown}")
    return 0


COMMANDS = {
    "preprocess": Command(_preprocess_arguments, _preprocess),
    "tokenizer train": Command(_tokenizer_arguments, _tokenizer_train),
    "data verify": Command(_verify_arguments, _verify),
    "data show": Command(_show_arguments, _show),
    "data merge": Command(_merge_arguments, _merge),
    "data split": Command(_split_arguments, _split),
    "data stats": Command(_stats_arguments, _stats),
}
