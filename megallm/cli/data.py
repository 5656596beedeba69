"""`megallm preprocess`, `megallm tokenizer train`, `megallm data verify|show`: raw text and indexed datasets."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from megallm.base.errors import UsageError
from megallm.cli.table import Command


def _inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="F", help="JSONL, plain text or Parquet; .gz .zst")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text")
    parser.add_argument(
        "--split-text", choices=("file", "lines", "paragraphs"), default="file", help="what is a document of plain text"
    )


def _preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    _inputs(parser)
    parser.add_argument("--output", required=True, metavar="P", help="prefix: P_text_document.bin, .idx, .meta.json")
    parser.add_argument("--tokenizer", required=True, metavar="DIR|bytes", help="tokenizer folder, or 'bytes'")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="skip writes bad lines to P.rejects.jsonl"
    )


def _preprocess(args: argparse.Namespace) -> int:
    from megallm.data import preprocess

    config = preprocess.PreprocessConfig(
        inputs=tuple(args.input),
        output=args.output,
        tokenizer=args.tokenizer,
        json_keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        workers=args.workers,
        on_error=args.on_error,
        split_text=args.split_text,
    )
    print(json.dumps(dataclasses.asdict(preprocess.run(config)), indent=2))
    return 0


def _tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    _inputs(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="at most this many tokens")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for tokenizer.json")
    parser.add_argument("--special-tokens", nargs="+", default=[], metavar="T", help="more special tokens, as for FIM")


def _tokenizer_train(args: argparse.Namespace) -> int:
    from megallm.data.readers import ReadOptions
    from megallm.data.tokenizer import train_bpe

    options = ReadOptions(keys=tuple(args.json_keys), split_text=args.split_text)
    print(json.dumps(train_bpe(args.input, args.vocab_size, args.output, options, args.special_tokens), indent=2))
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin/.idx")
    parser.add_argument("--vocab", type=int, metavar="N", help="refuse token ids of N and above")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _verify(args: argparse.Namespace) -> int:
    from megallm.data import indexed

    if args.vocab is not None and args.vocab < 1:
        raise UsageError(f"--vocab is {args.vocab}; it must be at least 1.")
    found = indexed.verify(args.prefix, args.vocab)
    line = (
        f"{found['prefix']}: {found['documents']} documents, {found['tokens']} tokens of {found['dtype']}, all sound."
    )
    print(json.dumps(found, indent=2) if args.json else line)
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin/.idx")
    parser.add_argument("--document", type=int, default=0, metavar="I", help="first document to print (default 0)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="how many documents (default 1)")
    parser.add_argument("--tokenizer", metavar="DIR|bytes", help="also print the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def _show(args: argparse.Namespace) -> int:
    from megallm.data.indexed import IndexedDataset
    from megallm.data.tokenizer import load

    data = IndexedDataset(args.prefix)
    last = min(args.document + args.count, data.num_documents)
    if not 0 <= args.document < data.num_documents or args.count < 1:
        raise UsageError(
            f"--document {args.document} --count {args.count}: {args.prefix} has documents 0 to "
            f"{data.num_documents - 1}."
        )
    tokenizer = None if args.tokenizer is None else load(args.tokenizer)
    for number in range(args.document, last):
        tokens = data.document(number).tolist()
        row: dict[str, Any] = {"document": number, "tokens": tokens}
        if tokenizer is not None:
            row["text"] = tokenizer.decode(tokens)
        print(json.dumps(row) if args.json else f"document {number}, {len(tokens)} tokens:\n{row.get('text', tokens)}")
    return 0


COMMANDS = {
    "preprocess": Command(_preprocess_arguments, _preprocess),
    "tokenizer train": Command(_tokenizer_arguments, _tokenizer_train),
    "data verify": Command(_verify_arguments, _verify),
    "data show": Command(_show_arguments, _show),
}
