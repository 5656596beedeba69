"""Reading a `tokenizer.json` that nobody vouches for, within bounds: before a library builds
anything of it. Pure.

A small file can ask for any amount of memory: an id of four billion, a pattern whose repeats are
multiplied out, a replacement that doubles the text forty times. Whatever no published tokenizer
comes near is refused.
"""

from __future__ import annotations

import base64
import binascii
import gc
import hashlib
import importlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from megallm.base.errors import DataError

MAX_BYTES = 64 << 20  # of a file; the largest published are half as large
MAX_VALUES = 8 << 20  # in its JSON: each takes some 64 bytes
MAX_ID = 1 << 24
MAX_TOKEN = 1 << 14  # characters of a token
MAX_UNIGRAM = (
    8 << 20
)  # characters of all tokens of a unigram model: each is a node of a tree, some 150 bytes
MAX_ADDED, MAX_ADDED_CHARACTERS = 1 << 17, 4 << 20
MAX_STEPS = 64  # of a normaliser or a splitting, of a template and the ids that it adds
MAX_GROWTH = 64  # that a normaliser may lengthen a text by
MAX_PATTERN = 1 << 22  # characters of a pattern when its repeats are multiplied out
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_DIGEST_BYTES = 16


def read_bytes(path: Path) -> bytes:
    """Returns the content of a tokenizer's file. Errors: `FileNotFoundError`, `DataError` for what
    is no file or too large.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(
                    f"{path} is not a regular file: give a tokenizer's file, or the folder that "
                    "holds it."
                )
            if status.st_size > MAX_BYTES:
                raise DataError(
                    f"{path} has {status.st_size} bytes; no tokenizer has more than {MAX_BYTES}: "
                    "refused."
                )
            return file.read(MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def read_definition(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the checked definition of a tokenizer, and a hash of the file. Errors:
    `FileNotFoundError`, `DataError`.
    """
    return checked(read_bytes(path), path)


def checked(data: bytes, path: Path) -> tuple[dict[str, Any], str]:
    """Returns the definition in `data`, which `path` stands for, and a hash of it. Errors:
    `DataError`.
    """
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > MAX_VALUES:
        raise DataError(
            f"{path} holds {values} values; no tokenizer has more than {MAX_VALUES}: refused."
        )
    with _without_collection():
        definition = parse_json_object(data, path)
    try:
        for problem in _problems(definition):
            raise DataError(
                f"{path}: {problem}: refused, since it would take too much memory. No tokenizer "
                "needs it."
            )
    except (AttributeError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a tokenizer definition: {error}.") from error
    return definition, hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


@contextmanager
def _without_collection() -> Iterator[None]:
    """Make hundreds of thousands of lists without the collector going through them again and
    again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse_json_object(data: bytes, path: Path) -> dict[str, Any]:
    """Returns a JSON object. Errors: `DataError`."""
    quick = _orjson()
    value = None
    if quick is not None:
        with suppress(ValueError):  # what it refuses is judged by `json`
            value = quick.loads(data)
    try:
        value = json.loads(data.decode("utf-8")) if value is None else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def dumps(definition: dict[str, Any]) -> str:
    """Returns JSON of a definition for a library to read."""
    quick = _orjson()
    if quick is not None:
        with suppress(TypeError, ValueError):
            return quick.dumps(definition).decode()
    return json.dumps(definition)


@cache
def _orjson() -> ModuleType | None:
    try:
        return importlib.import_module("orjson")
    except ImportError:
        return None


def tokenizer_fingerprint(definition: dict[str, Any]) -> str:
    """Hash of everything in tokenizer.json that changes ids, whatever the file's layout."""
    relevant = {
        k: v for k, v in definition.items() if k not in ("version", "truncation", "padding")
    }
    with _without_collection():
        text = json.dumps(_ordered(relevant), ensure_ascii=True, check_circular=False)
    return "hf-" + hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _ordered(value: Any) -> Any:
    """Returns the same with sorted keys: for 128,000 of them faster than `sort_keys`."""
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value)}
    if not isinstance(value, list):
        return value
    kinds = set(map(type, value))
    if kinds == {list}:  # the merges, pairs of texts: nothing in them has keys
        kinds = set(map(type, chain.from_iterable(value)))
    return [_ordered(one) for one in value] if kinds & {dict, list} else value


def _problems(definition: dict[str, Any]) -> Iterator[str]:
    """Yields what of a definition is out of all proportion."""
    yield from _problems_of_vocabulary(definition.get("model") or {})
    added = definition.get("added_tokens") or []
    sizes = [len(token["content"]) for token in added]
    if (
        len(added) > MAX_ADDED
        or sum(sizes) > MAX_ADDED_CHARACTERS
        or max(sizes, default=0) > MAX_TOKEN
    ):
        yield f"{len(added)} added tokens, or too long ones"
    if any(not 0 <= token["id"] < MAX_ID for token in added):
        yield f"an added token has an id outside 0 to {MAX_ID}"
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(steps_of(definition.get(part)))
        if len(steps) > MAX_STEPS:
            yield f"{part} has {len(steps)} steps"
        for step in steps:
            yield from _problems_of_step(part, step)
        if part == "normalizer" and prod(map(_growth, steps)) > MAX_GROWTH:
            yield f"the normaliser makes a text more than {MAX_GROWTH} times as long"
    for step in steps_of(definition.get("post_processor")):
        ids = [
            token["ids"]
            for token in (step.get("special_tokens") or {}).values()
            if isinstance(token, dict)
        ]
        parts = [*(step.get("single") or []), *(step.get("pair") or [])]
        if sum(map(len, ids)) > MAX_ID or len(parts) * max(map(len, ids), default=1) > MAX_STEPS**2:
            yield "the template of post_processor adds too many ids"


def _problems_of_vocabulary(model: dict[str, Any]) -> Iterator[str]:
    vocab = model.get("vocab")
    tokens = vocab or ()
    if isinstance(vocab, dict):
        ids = vocab.values()
        if set(map(type, ids)) - {int} or min(ids, default=0) < 0 or max(ids, default=0) >= MAX_ID:
            yield f"the vocabulary has an id that is no whole number from 0 to {MAX_ID}"
    else:
        tokens = [entry[0] for entry in tokens]
    if max(map(len, tokens), default=0) > MAX_TOKEN:
        yield f"a token has more than {MAX_TOKEN} characters"
    if not isinstance(vocab, dict) and sum(map(len, tokens)) > MAX_UNIGRAM:
        yield f"the vocabulary has more than {MAX_UNIGRAM} characters"


def checked_id(number: int) -> int:
    """Returns the same id. Errors: ValueError for one that no vocabulary reaches."""
    if not 0 <= number < MAX_ID:
        raise ValueError(f"id {number} is outside 0 to {MAX_ID}")
    return number


def steps_of(part: Any) -> Iterator[dict[str, Any]]:
    """Yields the steps of a normaliser, a splitting, a decoder or a template, sequences
    resolved.
    """
    if not part:
        return
    inner = [part.get(name) for name in ("normalizers", "pretokenizers", "decoders", "processors")]
    if part.get("type") == "Sequence":
        for one in (step for steps in inner if steps for step in steps):
            yield from steps_of(one)
    else:
        yield part


def _problems_of_step(part: str, step: dict[str, Any]) -> Iterator[str]:
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        regex = pattern["Regex"]
        repeats = [
            int(number) for pair in _REPEAT.findall(regex) for number in pair[-1:] or pair if number
        ]
        repeats += [int(pair[0]) for pair in _REPEAT.findall(regex) if pair[0] and not pair[1]]
        if len(regex) * prod(max(1, number) for number in repeats) > MAX_PATTERN:
            yield f"a pattern of {part} is too long when its repeats are multiplied out"


def _growth(step: dict[str, Any]) -> float:
    """Returns how many times longer than before a step of a normaliser can make a text, at most."""
    kind = step.get("type")
    if kind == "Replace":
        return max(1, len(step.get("content") or ""))
    if kind == "Prepend":
        return 1 + len(step.get("prepend") or "") / MAX_STEPS
    if kind == "Precompiled" and step.get("precompiled_charsmap"):
        try:
            data = base64.b64decode(step["precompiled_charsmap"])
        except (binascii.Error, ValueError):
            return 1  # the library says what is wrong with it
        begin = 4 + int.from_bytes(data[:4], "little")
        return max(1, max(map(len, data[begin:].split(b"\0"))) / MAX_STEPS)
    return 1
