"""Megatron-LM's way of calling `megallm convert`: --loader X --saver Y --load-dir A --save-dir B."""

from __future__ import annotations

import argparse
import sys

from megallm.cli.main import main

OURS, THEIRS = ("megallm",), ("hf", "huggingface", "llama_mistral", "transformers")


def translated(arguments: list[str]) -> list[str]:
    """Arguments of `megallm convert`; ends with a sentence for formats that megallm does not read or write."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-type", default="GPT", choices=("GPT",))
    parser.add_argument("--loader", required=True, help="megallm or hf")
    parser.add_argument("--saver", required=True, help="hf or megallm")
    parser.add_argument("--load-dir", required=True)
    parser.add_argument("--save-dir", required=True)
    for flag in ("--target-tensor-parallel-size", "--target-pipeline-parallel-size", "--target-expert-parallel-size"):
        parser.add_argument(flag, help="accepted and not needed: any layout reads a checkpoint")
    args = parser.parse_args(arguments)
    ways = {(True, True): "hf", (False, False): "megallm"}
    known = args.loader in OURS + THEIRS and args.saver in OURS + THEIRS
    to = ways.get((args.loader in OURS, args.saver in THEIRS)) if known else None
    if to is None:
        parser.error(
            f"--loader {args.loader} --saver {args.saver}: megallm converts between `megallm` and `hf`. Turn a "
            "checkpoint of Megatron-LM into a Hugging Face folder with its own tools first."
        )
    return ["convert", "--to", to, "--input", args.load_dir, "--output", args.save_dir]


if __name__ == "__main__":
    sys.exit(main(translated(sys.argv[1:]), program=True))
