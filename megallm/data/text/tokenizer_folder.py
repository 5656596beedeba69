"""The files of a tokenizer: which of them define it, what its settings say, and a copy of all that
belongs to it.

A folder holds one of these forms: `tokenizer.json`; sentencepiece's `tokenizer.model`; `vocab.json`
with `merges.txt`; tiktoken's ranks. `PREFIX.tokenizer/` beside an indexed dataset holds the one
that made it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megallm.base import files
from megallm.base.errors import DataError
from megallm.data.text import definition

DEFINITION, SETTINGS, SPECIALS, GENERATION, TOKEN_IDS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "token_ids.json",
)  # fmt: skip
VOCABULARY, MERGES, ADDED, CONFIG = "vocab.json", "merges.txt", "added_tokens.json", "config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
FILES = (
    DEFINITION, SETTINGS, SPECIALS, GENERATION, TOKEN_IDS, VOCABULARY, MERGES, ADDED, *SENTENCEPIECE, "vocab.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKENIZER_FORMS = f"{DEFINITION}, {SENTENCEPIECE[0]}, {VOCABULARY} with {MERGES}, or NAME.tiktoken"
TOKENIZER_SUFFIX = "tokenizer"  # PREFIX.tokenizer
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def saved_tokenizer(prefix: str | os.PathLike[str]) -> Path:
    """Returns where the tokenizer of an indexed dataset lies."""
    return Path(f"{os.fspath(prefix)}.{TOKENIZER_SUFFIX}")


def definition_file(folder: Path) -> Path | None:
    """Returns the file that defines the folder's tokenizer (`vocab.json` for the pair); None
    without any.
    """
    for name in (DEFINITION, *SENTENCEPIECE):
        if (folder / name).is_file():
            return folder / name
    if (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        return folder / VOCABULARY
    ranks = sorted(folder.glob("*.tiktoken")) if folder.is_dir() else []
    return ranks[0] if len(ranks) == 1 else None


def rank_files(folder: Path) -> tuple[str, ...]:
    """Returns the names of tiktoken's ranks and of their rules, where these define the folder's
    tokenizer.
    """
    form = definition_file(folder)
    return (
        (form.name, f"{form.stem}.json") if form is not None and form.suffix == ".tiktoken" else ()
    )


def save_tokenizer_files(spec: str, target: Path) -> None:
    """Copy the tokenizer of a folder or file, and what lies beside it about texts, into the folder
    `target`.

    `tokenizer.load` of the copy gives the same tokenizer. Errors: `CannotWrite`.
    """
    source = Path(spec)
    with files.writing(target):
        target.mkdir(parents=True, exist_ok=True)
        for path, name in _belonging(source):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
    ids = read_optional_json(source / CONFIG)
    if ids is not None:
        files.atomic_write_json(target / TOKEN_IDS, text_settings(ids))


def _belonging(source: Path) -> Iterator[tuple[Path, str]]:
    """(file, its name in the copy)."""
    if source.is_dir():
        more = (f"{MORE_TEMPLATES}/{path.name}" for path in extra_chat_templates(source))
        names = (*FILES, *rank_files(source), *more)
        yield from ((source / name, name) for name in names if (source / name).is_file())
        return
    if source.suffix == ".tiktoken":
        yield source, source.name
        if source.with_suffix(".json").is_file():
            yield source.with_suffix(".json"), f"{source.stem}.json"
    elif source.suffix in (
        ".model",
        ".spm",
    ):  # whose own symbols hold: no settings are read beside it
        yield source, SENTENCEPIECE[0]
    else:
        yield source, DEFINITION
        for name in (SETTINGS, SPECIALS):
            if (source.parent / name).is_file():
                yield source.parent / name, name


def extra_chat_templates(folder: Path) -> list[Path]:
    """Returns the chat templates of `additional_chat_templates/`, by name."""
    return sorted((folder / MORE_TEMPLATES).glob("*.jinja"))


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a model's config.json says about texts: its type and the ids that begin, end and
    fill them.

    Errors: `DataError` for an id that is none.
    """
    found = (
        {"model_type": config["model_type"]} if isinstance(config.get("model_type"), str) else {}
    )
    for key in ID_KEYS:
        value = config.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or any(type(number) is not int for number in ids):
            raise DataError(
                f"{CONFIG} has {key} {str(value)[:60]!r}; it must be a whole number or a list of "
                "them."
            )
        found[key] = value
    return found


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Returns a JSON object; None for a file that is not there. Errors: `DataError`."""
    try:
        return definition.parse_json_object(definition.read_bytes(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return None


@dataclass(frozen=True)
class FolderSettings:
    """What a folder says beside its vocabulary.

    tokens: bos, eos, ... -> written form; added: written form -> id, and how they are found in a
    text (flags); specials: those of them that stand for no text; kind: the class that transformers
    reads it with, model_type: what config.json calls the model.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    specials: frozenset[str] = frozenset()
    kind: str = ""
    model_type: str = ""
    add_bos: bool | None = None
    add_eos: bool | None = None
    prefix_space: bool = False


def settings_of(folder: Path) -> FolderSettings:
    """Returns the settings of a folder, from whichever of its files say something. Errors:
    `DataError`.
    """
    config, specials, added = (
        read_optional_json(folder / name) or {} for name in (SETTINGS, SPECIALS, ADDED)
    )
    model = read_optional_json(folder / CONFIG) or read_optional_json(folder / TOKEN_IDS) or {}
    ids, special = (
        {text: _id(number, folder) for text, number in added.items() if type(number) is int},
        set(added),
    )
    flags = {}
    rows = config.get("added_tokens_decoder")
    for number, row in (rows if isinstance(rows, dict) else {}).items():
        text = _written(row)
        if text is not None and number.isdecimal():
            ids[text] = _id(int(number[:20]), folder)
            flags[text] = {key: row[key] for key in _FLAGS if isinstance(row.get(key), bool)}
            (special.add if row.get("special", True) else special.discard)(text)
    tokens = {}
    for source in (specials, config):
        for key in ("bos", "eos", "unk", "pad"):
            text = _written(source.get(f"{key}_token"))
            tokens |= {} if text is None else {key: text}
    kind, model_type = config.get("tokenizer_class"), model.get("model_type")
    return FolderSettings(
        tokens, ids, flags, frozenset(special | set(tokens.values())), kind if isinstance(kind, str) else "",
        model_type if isinstance(model_type, str) else "", _switch(config, "add_bos_token"),
        _switch(config, "add_eos_token"), config.get("add_prefix_space") is True,
    )  # fmt: skip


def _id(number: int, folder: Path) -> int:
    try:
        return definition.checked_id(number)
    except ValueError as error:
        raise DataError(
            f"{folder} has an added token whose {error}: no vocabulary reaches that."
        ) from error


_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def _written(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _switch(config: Mapping[str, Any], key: str) -> bool | None:
    return config[key] if isinstance(config.get(key), bool) else None


# vocab.json and merges.txt

_END = "<|endoftext|>"
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_CLASSES = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2"}  # and their ...Fast


def pair_definition(folder: Path) -> str:
    """Returns the tokenizer.json that `vocab.json` and `merges.txt` of a folder stand for; see
    `pair_of`.
    """
    return pair_of(folder / VOCABULARY, folder / MERGES, settings_of(folder))


def pair_of(vocabulary: Path, merges: Path, settings: FolderSettings) -> str:
    """Returns the tokenizer.json that two files stand for, read as GPT-2's or Qwen2's class reads
    them.

    Without a word about the class the model's type decides, else it is GPT-2's. Errors:
    `DataError`.
    """
    way = _way(vocabulary, settings)
    try:
        built = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary_of(vocabulary), merges=_merges(merges))
        )
    except DataError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"{vocabulary} and {merges} do not belong together: {error}. Give the two of one "
            "tokenizer."
        ) from error
    built.decoder = decoders.ByteLevel()
    if way == "qwen2":
        built.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=settings.prefix_space, use_regex=False)
        built.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    else:
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.prefix_space)
    _add_tokens(built, settings, vocabulary)
    _add_template(built, settings)
    return built.to_str()


_REMEDY = (
    "Write a tokenizer.json where its class is known, with transformers: "
    "`AutoTokenizer.from_pretrained(X).save_pretrained(Y)`."
)


def vocabulary_of(path: Path) -> dict[str, int]:
    """Returns the vocabulary of a byte-level BPE, token -> id. Errors: `DataError`."""
    found = read_optional_json(path)
    if found is None:
        raise DataError(f"{path} does not exist.")
    if not found or any(
        type(one) is not int or not 0 <= one < definition.MAX_ID for one in found.values()
    ):
        raise DataError(f"{path} must map tokens to ids from 0 to {definition.MAX_ID}.")
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(found))
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} of the 256 bytes of a byte-level BPE (the first: "
            f"{missing[0]!r}), so it belongs to another kind of tokenizer. {_REMEDY}"
        )
    return found


def _way(vocabulary: Path, settings: FolderSettings) -> str:
    kind = settings.kind.removesuffix("Fast")
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind:
        raise DataError(
            f"{vocabulary} belongs to a {settings.kind}; what is known is how "
            f"{', '.join(_CLASSES)} "
            f"split a text. {_REMEDY}"
        )
    return "qwen2" if settings.model_type.startswith(("qwen2", "qwen3")) else "gpt2"


def _merges(path: Path) -> list[tuple[str, str]]:
    pairs = []
    try:
        lines = definition.read_bytes(path).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise DataError(f"{path}:{number}: want two pieces with a blank between them.")
        pairs.append((parts[0], parts[1]))
    return pairs


def _add_tokens(built: tokenizers.Tokenizer, settings: FolderSettings, vocabulary: Path) -> None:
    """Added tokens get the ids that the settings give them, or those of the vocabulary."""
    named = dict(settings.added)
    for text in (*settings.tokens.values(), _END):
        number = built.token_to_id(text)
        if number is not None:
            named.setdefault(text, number)
    for text, number in sorted(named.items(), key=lambda item: item[1]):
        special = text in settings.specials or text == _END
        token = tokenizers.AddedToken(text, special=special, **settings.flags.get(text, {}))
        (built.add_special_tokens if special else built.add_tokens)([token])
        if built.token_to_id(text) != number:
            raise DataError(
                f"The added token {text!r} the id {number}, but {VOCABULARY} leads "
                f"to {built.token_to_id(text)}: the files do not belong together."
            )


def _add_template(built: tokenizers.Tokenizer, settings: FolderSettings) -> None:
    """What the switches add_bos_token and add_eos_token put around a text; nothing when they are
    absent.
    """
    parts, ids = ["$A"], []
    for key, wanted in (("bos", settings.add_bos), ("eos", settings.add_eos)):
        text = settings.tokens.get(key, _END)
        if wanted and built.token_to_id(text) is not None:
            parts = [text, *parts] if key == "bos" else [*parts, text]
            ids.append((text, built.token_to_id(text)))
    if ids:
        built.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=sorted(set(ids))
        )
