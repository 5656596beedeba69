"""Tokenizers in the files that Megatron-LM's flags name, as folders that megallm reads.

GPT-2's two are `--vocab-file` and `--merge-file`; a TikTokenizer's is the JSON list of its tokens.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from megallm.base import files
from megallm.base.errors import DataError, UsageError
from megallm.data.text.tokenizer import END_OF_TEXT
from megallm.data.text.tokenizer_folder import FolderSettings, pair_of, vocabulary_of

GPT2_SETTINGS = FolderSettings(kind="GPT2Tokenizer")


def write_gpt2_folder(vocab_file: str, merge_file: str, folder: Path) -> None:
    """Write the tokenizer.json and its settings that the two files stand for: a byte-level BPE.

    A folder that holds the same already is left alone. Errors: `DataError` for the files,
    `UsageError` for a folder that holds another tokenizer, `CannotWrite`.
    """
    if END_OF_TEXT not in vocabulary_of(Path(vocab_file)):
        raise DataError(f"{vocab_file} lacks {END_OF_TEXT}: it is not the vocabulary of a GPT-2.")
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    _write(
        folder,
        {
            "tokenizer.json": pair_of(Path(vocab_file), Path(merge_file), GPT2_SETTINGS),
            "tokenizer_config.json": json.dumps(settings, indent=1),
            "special_tokens_map.json": json.dumps({"eos_token": END_OF_TEXT}),
        },
    )


def write_tiktoken_folder(
    path: str, folder: Path, pattern: str = "v2", num_special: int = 1000, vocab_size: int = 2**17
) -> Path:
    """Write the ranks of a TikTokenizer and, beside them, its rules; returns the file of ranks.

    Special tokens come first, so an id is the rank in the list + `num_special`, and of the list
    only the first `vocab_size` - `num_special` tokens are used. Errors: as `write_gpt2_folder`.
    """
    if pattern not in PATTERNS:
        raise UsageError(f"--tiktoken-pattern {pattern}: Megatron-LM has {', '.join(PATTERNS)}.")
    if not len(_SPECIAL) <= num_special < vocab_size:
        raise UsageError(
            f"--tiktoken-num-special-tokens {num_special} must be at least {len(_SPECIAL)} and "
            f"less than --vocab-size {vocab_size}."
        )
    tokens = _tokens(path)[: vocab_size - num_special]
    lines = [f"{token} {number + num_special}" for number, token in enumerate(tokens)]
    names = [*_SPECIAL, *(f"<SPECIAL_{number}>" for number in range(len(_SPECIAL), num_special))]
    special = {name: number for number, name in enumerate(names)}
    rules = {"pattern": PATTERNS[pattern], "special_tokens": special}
    name = Path(path).stem
    _write(folder, {f"{name}.tiktoken": "\n".join(lines) + "\n", f"{name}.json": json.dumps(rules)})
    return folder / f"{name}.tiktoken"


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Write files, unless one of them is there with another text."""
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{folder} holds another tokenizer: remove it, or choose another --output-prefix."
            )
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        files.atomic_write_text(folder / name, text)


PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join((
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    )),
}  # fmt: skip
_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


def _tokens(path: str) -> list[str]:
    """Returns the tokens of the list in base64, in the order of their ranks."""
    try:
        rows: Any = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}).") from error
    found = []
    for number, row in enumerate(rows if isinstance(rows, list) else [None]):
        try:
            token = row["token_bytes"]
            bad = row["rank"] != number or base64.b64decode(token, validate=True) == b""
        except (TypeError, KeyError, ValueError, binascii.Error):
            bad = True
        if bad:
            raise DataError(
                f"{path}, item {number}: want an object of rank {number} with token_bytes in "
                "base64 and token_str, as Megatron-LM's TikTokenizer reads it."
            )
        found.append(token)
    if len(found) < 256:
        raise DataError(f"{path} holds {len(found)} tokens; the first 256 are the bytes.")
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}.") from error
