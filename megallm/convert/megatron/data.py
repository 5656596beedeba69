"""Megatron-LM's ways to say what data a run reads, and with which tokenizer.

Pure, except for the files that flags name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.base.paths import is_placeholder
from megallm.convert.megatron.translation import Translation, shown_values, unfilled_word
from megallm.data.text.native import SENTENCEPIECE, TIKTOKEN

Sources = dict[str, float | None]
MAX_BYTES = 1 << 20  # of a file of paths
SPLITS = ("train", "valid", "test")
GPT2, TIKTOKENIZER = "GPT2BPETokenizer", "TikTokenizer"
SENTENCEPIECE_TYPES = ("Llama2Tokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer")


def sources_of(words: Sequence[str]) -> Sources:
    """Returns prefix -> weight of the words of `--data-path`, or None where they hold none.

    As Megatron-LM's `get_blend_from_list`: an odd number of words are prefixes; else every other
    word is a weight if Python reads it as a number. What it stops at, or reads in a way that nobody
    means, is refused. Errors: `UsageError`, a clause.
    """
    words = [word.strip() for word in words]
    open_places = [word for word in words if is_placeholder(word)]
    if open_places:
        raise UsageError(f"{open_places[0]} stands for something that is to be filled in")
    numbers = [_number(word) for word in words[::2]]
    if len(words) % 2 or not any(number is not None for number in numbers):
        strange = [word for word in words if _number(word) is not None]
        if strange:
            raise UsageError(
                f"Megatron-LM takes {strange[0]} for the prefix of a dataset; "
                "write weight prefix weight prefix"
            )
        pairs: list[tuple[str, float | None]] = [(word, None) for word in words]
    else:
        lacking = [word for word, number in zip(words[::2], numbers, strict=True) if number is None]
        if lacking:
            raise UsageError(
                f"{lacking[0]} stands where a weight is wanted; write weight prefix weight prefix"
            )
        pairs = list(zip(words[1::2], numbers, strict=True))
    for number, (prefix, weight) in enumerate(pairs):
        if weight is not None and not 0 < weight < math.inf:
            raise UsageError(
                f"the weight of {prefix} is {weight:g}; it must be a finite number above 0"
            )
        if prefix in dict(pairs[:number]):
            raise UsageError(
                f"{prefix} is given twice, which Megatron-LM reads as two datasets, each from its "
                "beginning; here a source has one weight. For the same samples give the second "
                "another name (links to .bin and .idx)"
            )
    return dict(pairs)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def words_of_file(path: str) -> list[str]:
    """Returns the words of a file for `--data-args-path`. Errors: `UsageError`, a clause."""
    return _read(path).split()


def splits_of_file(path: str) -> dict[str, list[str]]:
    """Returns the words of each split in a JSON file for `--per-split-data-args-path`.

    Errors: `UsageError`, a clause.
    """
    try:
        value: Any = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the file is not JSON ({error})") from error
    found = {}
    for split in SPLITS:
        words = value.get(split) if isinstance(value, dict) else value
        words = words.split() if isinstance(words, str) else words
        if words is not None and not (
            isinstance(words, list) and all(isinstance(word, str) for word in words)
        ):
            raise UsageError(
                'the file must hold {"train": [words], "valid": ..., "test": ...}; '
                f"{split} is no list of words"
            )
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


def megatron_tokenizer(kind: str, given: Mapping[str, str]) -> str | None:
    """Returns what `data.tokenizer` is for `--tokenizer-type` and the flags beside it.

    None without a type, and for NullTokenizer, whose data has no text. Errors: `UsageError`.
    """
    model, vocab, merges = (
        given.get(flag, "") for flag in ("--tokenizer-model", "--vocab-file", "--merge-file")
    )
    if kind in ("", "NullTokenizer"):
        return None
    wanted = {
        "HuggingFaceTokenizer": ("--tokenizer-model", model, "a folder with a tokenizer.json"),
        **dict.fromkeys(
            SENTENCEPIECE_TYPES, ("--tokenizer-model", model, "a sentencepiece .model file")
        ),
        TIKTOKENIZER: ("--tokenizer-model", model, "a .tiktoken file of ranks"),
        GPT2: (
            "--vocab-file",
            vocab,
            "a folder with a tokenizer.json, or with a vocab.json and merges.txt",
        ),
    }
    if kind not in wanted:
        raise UsageError(
            f"--tokenizer-type {kind}: megallm reads {', '.join(wanted)}; set data.tokenizer to a "
            "folder with a tokenizer.json (data that is already tokenised is read as it is)."
        )
    flag, value, what = wanted[kind]
    if not value:
        raise UsageError(f"{flag} is absent: set data.tokenizer to {what}.")
    suffix = Path(value).suffix
    if kind in SENTENCEPIECE_TYPES and suffix not in SENTENCEPIECE and not Path(value).is_dir():
        raise UsageError(
            f"--tokenizer-model {value}: a sentencepiece model is told by its name; call it "
            "NAME.model."
        )
    if kind == TIKTOKENIZER and suffix not in TIKTOKEN:
        raise UsageError(
            f"--tokenizer-model {value}: set data.tokenizer to {what}, a base64 token and its rank "
            "a line, with a NAME.json of its pattern and special tokens (tools/preprocess_data.py "
            "with the same flags makes them of a NAME.json of Megatron-LM)."
        )
    if kind == GPT2:
        return _gpt2_folder(vocab, merges)
    return value


def _gpt2_folder(vocab: str, merges: str) -> str:
    """The folder of the two files when they have their usual names there."""
    if not merges:
        raise UsageError(
            "--merge-file is absent: GPT2BPETokenizer needs the merges that belong to --vocab-file."
        )
    one, other = Path(vocab), Path(merges)
    if (one.name, other.name) == ("vocab.json", "merges.txt") and one.parent == other.parent:
        return str(one.parent)
    raise UsageError(
        f"--vocab-file {vocab} --merge-file {merges}: set data.tokenizer to a folder that holds "
        "them as vocab.json and merges.txt (tools/preprocess_data.py with the same flags makes "
        "one, PREFIX_tokenizer)."
    )


# The rules of `from_megatron` about data.

_WHOLE = ("--data-path", "--data-args-path")
_APART = {"train": "--train-data-path", "valid": "--valid-data-path", "test": "--test-data-path"}


def translate_data(found: Translation) -> None:
    """Translate the sources: one blend that `--split` divides, or a blend for each split."""
    flags = [
        flag
        for flag in (*_WHOLE, *_APART.values(), "--per-split-data-args-path")
        if flag in found.given
    ]
    if not flags:
        found.problems.append("--data-path is absent: data.sources has to be given.")
    elif flags[0] in _WHOLE:
        for ignored in flags[1:]:
            found.problems.append(f"{ignored}: {flags[0]} is given too, and only that is read.")
        sources, weighted = _sources(found, flags[0])
        if (
            sources and len(sources) == 1 and weighted
        ):  # Megatron-LM makes a blend of it: with a surplus
            found.config.setdefault("data.surplus", 0.005)
        _set_sources(found, "data.sources", sources, weighted)
    else:
        _data_of_splits(found)


def _data_of_splits(found: Translation) -> None:
    """Training and validation data of their own; `--split` means nothing then."""
    if "--split" in found.given:
        found.problems.append(
            f"--split {found.text('--split')}: each split has data of its own, read whole."
        )
    found.config["data.split"] = "100,0,0"
    flag, words = "--per-split-data-args-path", {}
    if flag in found.given and not any(map(unfilled_word, found.given[flag])):
        try:
            words = splits_of_file(found.text(flag))
        except UsageError as error:
            found.problems.append(f"{flag} {found.text(flag)}: {error}.")
            return
    flags = dict.fromkeys(SPLITS, flag) if words else _APART
    for split, key in (("train", "data.sources"), ("valid", "data.valid_sources")):
        sources, _ = _sources(found, flags[split], words.get(split))
        if split == "train" and not (words.get(split) or found.given.get(flags[split])):
            found.problems.append(f"{flags[split]} is absent: data.sources has to be given.")
        _set_sources(found, key, sources, False)
    if "data.valid_sources" not in found.config:
        found.config["eval.batches"] = 0
    if words.get("test") or found.given.get(_APART["test"]):
        found.problems.append(f"{flags['test']}: a run ends without a loss on test data.")


def _sources(found: Translation, flag: str, words: list[str] | None = None) -> tuple[Sources, bool]:
    """The blend that a flag gives, and whether it has weights; ({}, False) without any that is
    usable.
    """
    words = found.given.get(flag, []) if words is None else words
    if any(map(unfilled_word, words)):
        if found.given.get(flag) != words:  # else it was said when the flag was read
            found.problems.append(
                f"{flag}: {next(filter(unfilled_word, words))} is a placeholder; fill it in."
            )
        return {}, False
    try:
        if flag in found.given and not words:
            raise UsageError("no words follow it")
        if flag == "--data-args-path":
            words = words_of_file(" ".join(words))
        sources = sources_of(words)
    except UsageError as error:
        found.problems.append(f"{flag}{shown_values(words[:8])}: {error}.")
        return {}, False
    return sources, None not in sources.values()


def _set_sources(found: Translation, key: str, sources: Sources, blended: bool) -> None:
    """Write a blend; a source alone has no surplus in Megatron-LM unless it is `blended`."""
    if len(sources) == 1 and not blended:
        sources = dict.fromkeys(sources, None if "data.surplus" in found.config else 1.0)
    if sources:
        found.config[key] = sources


def translate_tokenizer(found: Translation) -> None:
    """Set `data.tokenizer` to that of the type of a tokenizer and the files that belong to it."""
    flags = ("--tokenizer-model", "--vocab-file", "--merge-file")
    given = {flag: found.text(flag) for flag in flags}
    if any(unfilled_word(text) for text in given.values()):
        return  # said already
    try:
        spec = megatron_tokenizer(found.text("--tokenizer-type"), given)
    except UsageError as error:
        found.problems.append(str(error))
        return
    if spec is not None:
        found.config["data.tokenizer"] = spec
