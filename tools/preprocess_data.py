"""Megatron-LM's name for `megallm preprocess`: the flags that people type, passed on."""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path

from megallm.base.errors import MegallmError
from megallm.cli.main import main
from megallm.convert.megatron.preprocess import preprocess_tokenizer

IGNORED = ("keep-newlines", "log-interval", "partitions", "dataset-impl", "lang", "vocab-extra-ids",
           "make-vocab-size-divisible-by", "max-documents")  # fmt: skip


def translated(arguments: list[str]) -> list[str]:
    """Arguments of `megallm preprocess`; ends with a sentence for a tokenizer that megallm does not read."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--output-prefix", "--output", required=True)
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    parser.add_argument("--tokenizer-type", help="HuggingFaceTokenizer, GPT2BPETokenizer, ...")
    parser.add_argument("--tokenizer-model", "--tokenizer", help="a folder, a .model, or `bytes`")
    parser.add_argument("--vocab-file", "--vocab", help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", help="GPT-2's merges.txt")
    parser.add_argument("--tiktoken-pattern", default="v2")
    for flag, usual in (("tiktoken-num-special-tokens", 1000), ("vocab-size", None), ("workers", 1)):
        parser.add_argument(f"--{flag}", type=int, default=usual)
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--keep-sequential-samples", action="store_true", help="always so")
    for flag in IGNORED:
        parser.add_argument(f"--{flag}", nargs="*", help="accepted and not needed")
    parser.add_argument("--split-sentences", action="store_true", help="refused")
    args = parser.parse_args(arguments)
    if args.split_sentences:
        parser.exit(2, "preprocess_data: --split-sentences: a document is one sequence here; leave it out.\n")
    files = [name for one in args.input for name in ([] if Path(one).exists() else sorted(glob.glob(one))) or [one]]
    try:
        spec = preprocess_tokenizer(vars(args), Path(f"{args.output_prefix}_tokenizer"))
    except MegallmError as error:
        parser.exit(error.exit_code, f"preprocess_data: {error}\n")
    words = ["preprocess", "--input", *files, "--output", args.output_prefix, "--json-keys"]
    words += [*args.json_keys, "--tokenizer", spec, "--workers", str(args.workers)]
    return words + ["--append-eod"] * args.append_eod


if __name__ == "__main__":
    sys.exit(main(translated(sys.argv[1:]), program=True))
