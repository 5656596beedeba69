"""Megatron-LM's name for `megallm preprocess`: the flags that people type, passed on."""

from __future__ import annotations

import argparse
import sys

from megallm.cli.main import main


def translated(arguments: list[str]) -> list[str]:
    """Arguments of `megallm preprocess`; ends with a sentence for a tokenizer that megallm does not read."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--output-prefix", "--output", required=True)
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    parser.add_argument("--tokenizer-type", default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", "--tokenizer", help="a folder with a tokenizer.json, or `bytes`")
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    for flag in ("--log-interval", "--partitions", "--dataset-impl"):
        parser.add_argument(flag, help="accepted and not needed")
    args = parser.parse_args(arguments)
    if args.tokenizer_type != "HuggingFaceTokenizer" or args.tokenizer_model is None:
        parser.error("give --tokenizer-model FOLDER with a Hugging Face tokenizer.json, or `bytes`")
    words = ["preprocess", "--input", *args.input, "--output", args.output_prefix, "--json-keys", *args.json_keys]
    words += ["--tokenizer", args.tokenizer_model, "--workers", str(args.workers)]
    return words + ["--append-eod"] * args.append_eod


if __name__ == "__main__":
    sys.exit(main(translated(sys.argv[1:]), program=True))
