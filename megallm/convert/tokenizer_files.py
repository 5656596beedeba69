"""The files around the weights: tokenizer, chat template, generation config. Copied by name, never
executed. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megallm.base.errors import CannotWrite, CheckpointError, DataError
from megallm.base.files import atomic_write_json, writing
from megallm.convert.folder import plain_file, read_json
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer import BYTES, END_OF_TEXT
from megallm.data.text.tokenizer_folder import (
    CONFIG,
    DEFINITION,
    FILES,
    GENERATION,
    ID_KEYS,
    MORE_TEMPLATES,
    SETTINGS,
    SPECIALS,
    TOKEN_IDS,
    definition_file,
    extra_chat_templates,
    rank_files,
    text_settings,
)

TOKENIZER = "tokenizer"  # the folder of it in a run folder
MAX_TOKENIZER_BYTES = 64 * 2**20  # the largest tokenizer.json known has 33 MB
MAX_TEMPLATES = 100
_BLOCK = 1 << 20

Ids = Mapping[
    str, Any
]  # bos_token_id, eos_token_id, pad_token_id: a number, a list of them, or None


def has_tokenizer(folder: Path) -> bool:
    """Returns whether the folder holds a tokenizer in a form that megallm reads."""
    return definition_file(folder) is not None


def tokenizer_spec(folder: Path) -> str | None:
    """Returns what `data.tokenizer` would be: the folder, `bytes` when its tokenizer is that one,
    None without any.
    """
    form = definition_file(folder)
    if form is None:
        return None
    return (
        BYTES
        if form.name == DEFINITION and _is_byte_tokenizer(_definition(folder))
        else str(folder)
    )


def copy_tokenizer(source: Path, target: Path, definition: bool = True) -> list[str]:
    """Copy the files about texts that `source` has and the existing folder `target` has not; their
    names.

    What config.json says about texts, their ids, becomes `token_ids.json`. Without `definition` the
    tokenizer itself stays behind. Errors: CheckpointError for links that leave the folder or files
    that are too large, CannotWrite.
    """
    copied, told = [], os.path.lexists(source / CONFIG)
    for name in (*FILES, *rank_files(source)) if definition else _ABOUT:
        if (
            os.path.lexists(source / name)
            and not (target / name).exists()
            and not (told and name == TOKEN_IDS)
        ):
            _copy(plain_file(source, name), target / name)
            copied.append(name)
    templates = extra_chat_templates(source)
    if len(templates) > MAX_TEMPLATES:
        raise CheckpointError(
            f"{source / MORE_TEMPLATES} has more than {MAX_TEMPLATES} templates; no model has."
        )
    for path in templates:
        with writing(target):
            (target / MORE_TEMPLATES).mkdir(exist_ok=True)
        _copy(plain_file(path.parent, path.name), target / MORE_TEMPLATES / path.name)
        copied.append(f"{MORE_TEMPLATES}/{path.name}")
    if told and not (target / TOKEN_IDS).exists():
        atomic_write_json(target / TOKEN_IDS, _said(source))
        copied.append(TOKEN_IDS)
    return copied


_ABOUT = (SETTINGS, SPECIALS, GENERATION, TOKEN_IDS, "chat_template.jinja", "chat_template.json")


def copy_beside(source: Path, folder: Path, spec: str | None) -> None:
    """Put into the run folder `folder` what `source` says about texts: its tokenizer (but `bytes`),
    templates, ids.
    """
    with writing(folder):
        (folder / TOKENIZER).mkdir()
    copy_tokenizer(source, folder / TOKENIZER, definition=spec != BYTES)


def _said(folder: Path) -> dict[str, Any]:
    try:
        return text_settings(read_json(folder / CONFIG))
    except DataError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def config_ids(folder: Path) -> dict[str, Any]:
    """Returns the ids of texts that a model's config.json has, or had where only `token_ids.json`
    is left of it.
    """
    said: dict[str, Any] = {}
    if os.path.lexists(folder / CONFIG):
        said = _said(folder)
    elif os.path.lexists(folder / TOKEN_IDS):
        said = read_json(folder / TOKEN_IDS)
    return {key: said[key] for key in ID_KEYS if key in said}


def end_ids(folder: Path) -> list[int]:
    """Returns `eos_token_id` as transformers takes it: of generation_config.json, else of
    config.json; empty without any.
    """
    value = (
        read_json(folder / GENERATION).get("eos_token_id")
        if os.path.lexists(folder / GENERATION)
        else None
    )
    value = config_ids(folder).get("eos_token_id") if value in (None, []) else value
    return [
        number for number in (value if isinstance(value, list) else [value]) if type(number) is int
    ]


def _copy(source: Path, target: Path) -> None:
    left = MAX_TOKENIZER_BYTES
    with writing(target), open(source, "rb") as read, open(target, "xb") as write:
        while block := read.read(min(_BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise CheckpointError(
                    f"{source} is larger than {MAX_TOKENIZER_BYTES} bytes; no file of a "
                    "tokenizer is."
                )
            write.write(block)


def write_byte_tokenizer(target: Path) -> list[str]:
    """Returns the tokenizer `bytes` as files that transformers and tokenizers read: id = byte, 256
    ends a text.
    """
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
    for name, content in ((SETTINGS, settings), (SPECIALS, {"eos_token": END_OF_TEXT})):
        if not (target / name).exists():  # kept from where the model came from
            atomic_write_json(target / name, content)
    return [DEFINITION, SETTINGS, SPECIALS]


def _is_byte_tokenizer(definition: dict[str, Any]) -> bool:
    """Returns whether `write_byte_tokenizer` made this: the ids are the bytes and one token ends a
    text.
    """
    model, splitter = definition.get("model"), definition.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(splitter, dict) or model.get("merges") != []:
        return False
    plain = splitter.get("type") == "ByteLevel" and splitter.get("add_prefix_space") is False
    numbers = dict(_vocabulary(definition))
    plain = (
        plain and definition.get("normalizer") is None and definition.get("post_processor") is None
    )
    return plain and numbers == _byte_vocabulary() | {END_OF_TEXT: 256}


def _byte_vocabulary() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where printable, else the next free one
    from 256.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = [byte for byte in range(256) if byte not in printable]
    return {
        chr(byte if byte in printable else 256 + hidden.index(byte)): byte for byte in range(256)
    }


def token_ids(folder: Path) -> dict[str, Any]:
    """Returns `bos_token_id`, `eos_token_id` and `pad_token_id`: as the model's config.json had
    them, else as the tokenizer's settings name them; what ends a text else as `eod` of the
    tokenizer is found; else None.
    """
    found = dict.fromkeys(ID_KEYS) | config_ids(folder)
    settings: dict[str, Any] = {}
    for name in (SPECIALS, SETTINGS):
        if os.path.lexists(folder / name):
            settings |= {
                key: value for key, value in read_json(folder / name).items() if value is not None
            }
    missing = [key for key in ID_KEYS if found[key] is None]
    named = {key: settings.get(key.removesuffix("_id")) for key in missing}
    named = {
        key: token.get("content") if isinstance(token, dict) else token
        for key, token in named.items()
    }
    named = {key: token for key, token in named.items() if isinstance(token, str)}
    if definition_file(folder) is None or not (named or found["eos_token_id"] is None):
        return found
    words = tokenizer.load(str(folder), check=False)
    found |= {key: words.token_id(token) for key, token in named.items()}
    if found["eos_token_id"] is None:
        with suppress(DataError):  # a tokenizer may have no end of texts
            found["eos_token_id"] = words.eod
    return found


def choose_padding(folder: Path, ids: Ids) -> tuple[Ids, list[str]]:
    """Let the tokenizer of an exported folder pad with a token that ends no text; returns the ids
    with it, and notes. transformers scores the last token that is not padding: with the end of text
    as padding it would score the one before.
    """
    if definition_file(folder) is None:
        return ids, []
    words = tokenizer.load(str(folder), check=False)
    settings = read_json(folder / SETTINGS) if os.path.lexists(folder / SETTINGS) else {}
    ends = set(end_ids(folder)) | {ids.get("eos_token_id")}
    with suppress(DataError):
        ends.add(words.eod)
    for key in ("pad_token", "unk_token", "bos_token", None):
        token = _ZERO_BYTE if key is None else settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        number = words.token_id(token) if isinstance(token, str) else None
        if number is not None and number not in ends:
            for name in (SETTINGS, SPECIALS):
                content = read_json(folder / name) if os.path.lexists(folder / name) else {}
                if name == SETTINGS or "pad_token" in content:
                    atomic_write_json(folder / name, content | {"pad_token": token})
            return dict(ids) | {"pad_token_id": number}, []
    return dict(ids) | {"pad_token_id": None}, [
        "no token of the tokenizer can pad, since each may end a text: score one text at a time"
    ]


_ZERO_BYTE = "Ā"  # how byte-level vocabularies write the byte 0, which no text ends with


def begin_bare(folder: Path) -> list[str]:
    """Let the tokenizer of an exported folder put nothing before a text, as its model was trained;
    notes where that would be another tokenizer. transformers and `generate` would add a Llama's
    <s>, which the model has never seen."""
    form = definition_file(folder)
    if form is None or not tokenizer.load(str(folder), check=False).template[0]:
        return []
    if form.name == DEFINITION:
        return [
            f"the model was trained on texts without what the template of {DEFINITION} puts before "
            "them: tokenise with add_special_tokens=False, or make the data with `megallm "
            "preprocess --add-special-tokens`"
        ]
    settings = read_json(folder / SETTINGS) if os.path.lexists(folder / SETTINGS) else {}
    atomic_write_json(folder / SETTINGS, settings | {"add_bos_token": False})
    return []


def _definition(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / DEFINITION):
        return {}
    return read_json(folder / DEFINITION, MAX_TOKENIZER_BYTES)


def _vocabulary(definition: dict[str, Any]) -> list[tuple[str, int]]:
    model = definition.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pairs = list(vocab.items()) if isinstance(vocab, dict) else []
    added = definition.get("added_tokens")
    pairs += [(row.get("content"), row.get("id")) for row in added or [] if isinstance(row, dict)]
    return [
        (token, number)
        for token, number in pairs
        if isinstance(token, str) and isinstance(number, int)
    ]


def write_generation_config(target: Path, ids: Ids) -> None:
    """Write generation_config.json with the ids that end and begin a text, unless one was copied.
    """
    if not (target / GENERATION).exists():
        known = {key: number for key, number in ids.items() if number is not None}
        atomic_write_json(target / GENERATION, {"_from_model_config": True} | known)


def copied_folder(step: Path) -> Path | None:
    """Returns the folder of a run that holds what belongs to its texts; None when there is none."""
    kept = step.parent.parent / TOKENIZER
    return kept if kept.is_dir() else None


def check_vocabulary(meta: Any, spec: str, loaded: tokenizer.Tokenizer) -> None:
    """Refuse, for a checkpoint with this meta, another tokenizer than the one it was trained with.

    A folder may have been changed since, or a path that was written down may lead elsewhere now.
    Errors: DataError.
    """
    trained = meta.get("words") if isinstance(meta, dict) else None
    if trained is not None and loaded.fingerprint != trained:
        raise DataError(
            f"{spec} is the tokenizer {loaded.fingerprint}, but the model was trained with "
            f"{trained}: its ids mean other texts. Put the one of data.tokenizer back."
        )


def checkpoint_tokenizer(step: Path, meta: Any) -> str | None:
    """Returns where a checkpoint's tokenizer is: kept in its run folder, or where it was
    configured; `bytes` only where its meta says so; or None."""
    kept = copied_folder(step)
    if kept is not None and has_tokenizer(kept):
        return str(kept)
    named = meta.get("tokenizer") if isinstance(meta, dict) else None
    if named == BYTES or (
        isinstance(named, str) and (has_tokenizer(Path(named)) or Path(named).is_file())
    ):
        return named
    return None
