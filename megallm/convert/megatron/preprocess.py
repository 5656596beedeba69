"""The tokenizer that the flags of Megatron-LM's tools/preprocess_data.py name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.convert.megatron.data import GPT2, TIKTOKENIZER, megatron_tokenizer
from megallm.data.text.megatron_tokenizers import write_gpt2_folder, write_tiktoken_folder

_WANTED = "give --tokenizer-model FOLDER with a Hugging Face tokenizer.json, or `bytes`"


def preprocess_tokenizer(given: Mapping[str, Any], folder: Path) -> str:
    """Returns what `megallm preprocess --tokenizer` is for the parsed flags.

    Files that megallm does not read as they are become a tokenizer in `folder`. Without a type they
    say what they are. Errors: `UsageError`, `DataError` for the files, `CannotWrite`.
    """
    vocab, merges, model = given["vocab_file"], given["merge_file"], given["tokenizer_model"]
    kind = given["tokenizer_type"] or (GPT2 if vocab else "HuggingFaceTokenizer")
    if kind == GPT2 and vocab and merges:
        write_gpt2_folder(vocab, merges, folder)
        return str(folder)
    if kind == TIKTOKENIZER and model and Path(model).suffix == ".json":
        rules = given["tiktoken_pattern"], given["tiktoken_num_special_tokens"]
        return str(write_tiktoken_folder(model, folder, *rules, given["vocab_size"] or 2**17))
    flags = {"--vocab-file": vocab, "--merge-file": merges, "--tokenizer-model": model}
    try:
        found = megatron_tokenizer(kind, {flag: value or "" for flag, value in flags.items()})
    except UsageError as error:
        sentence = str(error).replace("data.tokenizer", "--tokenizer-model")
        raise UsageError(f"{sentence} Or {_WANTED}.") from error
    if found is None:
        raise UsageError(f"--tokenizer-type {kind} reads no text: {_WANTED}.")
    return found
