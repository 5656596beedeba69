"""Megatron-LM's ways to say what data a run reads, and with which tokenizer. Pure, except for the files they name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.data.native import SENTENCEPIECE, TIKTOKEN
from megallm.training.data_rules import is_placeholder

Sources = dict[str, float | None]
MAX_BYTES = 1 << 20  # of a file of paths
SPLITS = ("train", "valid", "test")
SENTENCEPIECE_TYPES = ("Llama2Tokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer")


def sources_of(words: Sequence[str]) -> Sources:
    """Prefix -> weight of the words of `--data-path`, or None where they hold none. Errors: `UsageError`, a clause.

    As Megatron-LM's `get_blend_from_list`: an odd number of words are prefixes; else every other word is a weight if
    Python reads it as a number. What it stops at, or reads in a way that nobody means, is refused.
    """
    words = [word.strip() for word in words]
    open_places = [word for word in words if is_placeholder(word)]
    if open_places:
        raise UsageError(f"{open_places[0]} stands for something that is to be filled in")
    numbers = [_number(word) for word in words[::2]]
    if len(words) % 2 or not any(number is not None for number in numbers):
        strange = [word for word in words if _number(word) is not None]
        if strange:
            raise UsageError(f"Megatron-LM takes {strange[0]} for the prefix of a dataset; write weight prefix weight prefix")
        pairs: list[tuple[str, float | None]] = [(word, None) for word in words]
    else:
        lacking = [word for word, number in zip(words[::2], numbers, strict=True) if number is None]
        if lacking:
            raise UsageError(f"{lacking[0]} stands where a weight is wanted; write weight prefix weight prefix")
        pairs = list(zip(words[1::2], numbers, strict=True))
    for number, (prefix, weight) in enumerate(pairs):
        if weight is not None and not 0 < weight < math.inf:
            raise UsageError(f"the weight of {prefix} is {weight:g}; it must be a finite number above 0")
        if prefix in dict(pairs[:number]):
            raise UsageError(
                f"{prefix} is given twice, which Megatron-LM reads as two datasets, each from its beginning; here a "
                "source has one weight. For the same samples give the second another name (links to .bin and .idx)"
            )
    return dict(pairs)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def words_of_file(path: str) -> list[str]:
    """The words of a file for `--data-args-path`. Errors: `UsageError`, a clause."""
    return _read(path).split()


def splits_of_file(path: str) -> dict[str, list[str]]:
    """The words of each split in a JSON file for `--per-split-data-args-path`. Errors: `UsageError`, a clause."""
    try:
        value: Any = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the file is not JSON ({error})") from error
    found = {}
    for split in SPLITS:
        words = value.get(split) if isinstance(value, dict) else value
        words = words.split() if isinstance(words, str) else words
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise UsageError(f'the file must hold {{"train": [words], "valid": ..., "test": ...}}; {split} is no list of words')
        found[split] = words or []
    return found


def _read(path: str) -> str:
    try:
        if not Path(path).is_file():  # a FIFO would be waited for
            raise UsageError("there is no such file here; run this where it is")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"the file is larger than {MAX_BYTES} bytes")
        return data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"the file cannot be read ({error})") from error


def tokenizer_of(kind: str, given: Mapping[str, str]) -> str | None:
    """What `data.tokenizer` is for `--tokenizer-type` and the flags beside it. Errors: `UsageError`, a sentence.

    None without a type, and for NullTokenizer, whose data has no text.
    """
    model, vocab, merges = (given.get(flag, "") for flag in ("--tokenizer-model", "--vocab-file", "--merge-file"))
    if kind in ("", "NullTokenizer"):
        return None
    wanted = {
        "HuggingFaceTokenizer": ("--tokenizer-model", model, "a folder with a tokenizer.json"),
        **dict.fromkeys(SENTENCEPIECE_TYPES, ("--tokenizer-model", model, "a sentencepiece .model file")),
        "TikTokenizer": ("--tokenizer-model", model, "a .tiktoken file of ranks"),
        "GPT2BPETokenizer": ("--vocab-file", vocab, "a folder with a tokenizer.json, or with a vocab.json and merges.txt"),
    }
    if kind not in wanted:
        raise UsageError(
            f"--tokenizer-type {kind}: megallm reads {', '.join(wanted)}; set data.tokenizer to a folder with a "
            "tokenizer.json (data that is already tokenised is read as it is)."
        )
    flag, value, what = wanted[kind]
    if not value:
        raise UsageError(f"{flag} is absent: set data.tokenizer to {what}.")
    suffix = Path(value).suffix
    if kind in SENTENCEPIECE_TYPES and suffix not in SENTENCEPIECE and not Path(value).is_dir():
        raise UsageError(f"--tokenizer-model {value}: a sentencepiece model is told by its name; call it NAME.model.")
    if kind == "TikTokenizer" and suffix not in TIKTOKEN:
        raise UsageError(
            f"--tokenizer-model {value}: set data.tokenizer to {what}, a base64 token and its rank a line, with a "
            "NAME.json of its pattern and special tokens (docs/stream.md)."
        )
    if kind == "GPT2BPETokenizer":
        return _gpt2_folder(vocab, merges)
    return value


def _gpt2_folder(vocab: str, merges: str) -> str:
    """The folder of the two files when they have their usual names there."""
    if not merges:
        raise UsageError("--merge-file is absent: GPT2BPETokenizer needs the merges that belong to --vocab-file.")
    one, other = Path(vocab), Path(merges)
    if (one.name, other.name) == ("vocab.json", "merges.txt") and one.parent == other.parent:
        return str(one.parent)
    raise UsageError(
        f"--vocab-file {vocab} --merge-file {merges}: set data.tokenizer to a folder that holds them as vocab.json and "
        "merges.txt (tools/preprocess_data.py with the same flags makes one, PREFIX_tokenizer)."
    )
