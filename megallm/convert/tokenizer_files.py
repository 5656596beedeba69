"""The files around the weights: tokenizer, chat template, generation config. Copied by name, never executed. Pure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megallm.base.errors import CannotWrite, CheckpointError
from megallm.base.files import atomic_write_json, writing
from megallm.convert.folder import plain_file, read_json
from megallm.data.tokenizer import BYTES, END_OF_TEXT

DEFINITION, SETTINGS, SPECIALS, GENERATION = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
)  # fmt: skip
FILES = (
    DEFINITION, SETTINGS, SPECIALS, GENERATION, "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model",
    "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MAX_BYTES = 64 * 2**20  # the largest tokenizer.json known has 33 MB
_BLOCK = 1 << 20


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that megallm reads."""
    return (folder / DEFINITION).is_file()


def tokenizer_spec(folder: Path) -> str | None:
    """What `data.tokenizer` would be: the folder, `bytes` when its tokenizer is that one, None without any."""
    if not has_tokenizer(folder):
        return None
    return BYTES if _is_byte_tokenizer(_definition(folder)) else str(folder)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of `FILES` that `source` has into the existing folder `target`; their names.

    Errors: CheckpointError for links that leave the folder or files that are too large, CannotWrite.
    """
    copied = []
    for name in FILES:
        if os.path.lexists(source / name):
            _copy(plain_file(source, name), target / name)
            copied.append(name)
    return copied


def _copy(source: Path, target: Path) -> None:
    left = MAX_BYTES
    with writing(target), open(source, "rb") as read, open(target, "xb") as write:
        while block := read.read(min(_BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise CheckpointError(f"{source} is larger than {MAX_BYTES} bytes; no file of a tokenizer is.")
            write.write(block)


def write_byte_tokenizer(target: Path) -> list[str]:
    """The tokenizer `bytes` as files that transformers and tokenizers read: id = byte, 256 ends a text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = _byte_vocabulary()
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([END_OF_TEXT])
    try:
        built.save(str(target / DEFINITION))
    except Exception as error:  # the library raises nothing narrower
        raise CannotWrite(f"Cannot write {target / DEFINITION}: {error}.") from error
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": None,
                "add_prefix_space": False, "clean_up_tokenization_spaces": False}  # fmt: skip
    atomic_write_json(target / SETTINGS, settings)
    atomic_write_json(target / SPECIALS, {"eos_token": END_OF_TEXT})
    return [DEFINITION, SETTINGS, SPECIALS]


def _is_byte_tokenizer(definition: dict[str, Any]) -> bool:
    """Whether `write_byte_tokenizer` made this: the ids are the bytes and one token ends a text."""
    model, splitter = definition.get("model"), definition.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(splitter, dict) or model.get("merges") != []:
        return False
    plain = splitter.get("type") == "ByteLevel" and splitter.get("add_prefix_space") is False
    numbers = dict(_vocabulary(definition))
    plain = plain and definition.get("normalizer") is None and definition.get("post_processor") is None
    return plain and numbers == _byte_vocabulary() | {END_OF_TEXT: 256}


def _byte_vocabulary() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where printable, else the next free one from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + hidden.index(byte)): byte for byte in range(256)}


def token_ids(folder: Path) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` as the tokenizer's settings name them, or None."""
    settings: dict[str, Any] = {}
    for name in (SPECIALS, SETTINGS):
        if os.path.lexists(folder / name):
            settings |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    definition = _definition(folder)
    ids = dict(_vocabulary(definition))
    found: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found[f"{kind}_token_id"] = ids.get(token) if isinstance(token, str) else None
    return found


def _definition(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / DEFINITION):
        return {}
    return read_json(folder / DEFINITION, MAX_BYTES)


def _vocabulary(definition: dict[str, Any]) -> list[tuple[str, int]]:
    model = definition.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pairs = list(vocab.items()) if isinstance(vocab, dict) else []
    added = definition.get("added_tokens")
    pairs += [(row.get("content"), row.get("id")) for row in added or [] if isinstance(row, dict)]
    return [(token, number) for token, number in pairs if isinstance(token, str) and isinstance(number, int)]


def write_generation_config(target: Path, ids: dict[str, int | None]) -> None:
    """generation_config.json with the ids that end and begin a text, unless one was copied."""
    if not (target / GENERATION).exists():
        known = {key: number for key, number in ids.items() if number is not None}
        atomic_write_json(target / GENERATION, {"_from_model_config": True} | known)


def find_tokenizer(step: Path, meta: Any) -> str | None:
    """Where a checkpoint's tokenizer is: kept in its run folder, or where it was configured; `bytes`; or None."""
    kept = step.parent.parent / "tokenizer"
    if has_tokenizer(kept):
        return str(kept)
    named = meta.get("tokenizer") if isinstance(meta, dict) else None
    if named == BYTES or (isinstance(named, str) and has_tokenizer(Path(named))):
        return named
    return None
