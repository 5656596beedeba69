"""GPT-2's two files, Megatron-LM's `--vocab-file` and `--merge-file`, as a tokenizer folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from megallm.base import files
from megallm.base.errors import DataError, UsageError
from megallm.data.tokenizer import END_OF_TEXT


def write_gpt2_folder(vocab_file: str, merge_file: str, folder: Path) -> None:
    """Write the tokenizer.json and its settings that the two files stand for: a byte-level BPE.

    A folder that holds the same already is left alone. Errors: `DataError` for the files,
    `UsageError` for a folder that holds another tokenizer, `CannotWrite`.
    """
    definition = _definition(vocab_file, merge_file)
    target = folder / "tokenizer.json"
    if target.exists():
        if target.read_text(encoding="utf-8") != definition:
            raise UsageError(
                f"{folder} holds another tokenizer than {vocab_file} and {merge_file}: "
                "remove it, or choose another --output-prefix."
            )
        return
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    files.atomic_write_json(folder / "special_tokens_map.json", {"eos_token": END_OF_TEXT})
    files.atomic_write_json(folder / "tokenizer_config.json", settings)
    files.atomic_write_text(target, definition)


def _definition(vocab_file: str, merge_file: str) -> str:
    vocab, merges = _vocabulary(vocab_file), _merges(merge_file)
    try:
        built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"{vocab_file} and {merge_file} do not belong together: {error}. Give the two of one tokenizer."
        ) from error
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens([END_OF_TEXT])
    return built.to_str(pretty=True)


def _vocabulary(path: str) -> dict[str, int]:
    try:
        value: Any = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({error}); --vocab-file is GPT-2's vocab.json."
        ) from error
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise DataError(f"{path} is no object of token: id; --vocab-file is GPT-2's vocab.json.")
    missing = [byte for byte in tokenizers.pre_tokenizers.ByteLevel.alphabet() if byte not in value]
    if missing or END_OF_TEXT not in value:
        lacking = f"{len(missing)} of the 256 bytes" if missing else END_OF_TEXT
        raise DataError(f"{path} lacks {lacking}, so it is not the vocabulary of a GPT-2.")
    return value


def _merges(path: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, blank, right = line.rstrip("\r").partition(" ")
        if not (left and blank and right) or " " in right:
            raise DataError(
                f"{path}:{number}: want two pieces with a blank between; --merge-file is merges.txt."
            )
        found.append((left, right))
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}.") from error
