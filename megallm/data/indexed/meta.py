"""The side-car `PREFIX.meta.json` of an indexed dataset: counts, and which tokenizer made it. Ours,
optional.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from megallm.base import files
from megallm.base.errors import DataError
from megallm.data.indexed import provenance
from megallm.data.text import tokenizer_folder
from megallm.data.text.tokenizer import BYTES, ByteTokenizer

SCHEMA = 1
_COUNTS = ("documents", "sequences", "tokens")


def path_of(prefix: str | os.PathLike[str]) -> str:
    return f"{os.fspath(prefix)}.meta.json"


def write(
    prefix: str | os.PathLike[str], side_car: Mapping[str, Any], path: str | os.PathLike[str] = ""
) -> None:
    """Write the side-car atomically, or to `path` for now. Keys: tokenizer {kind, fingerprint,
    vocab_size, eod} and the counts."""
    files.atomic_write_json(path or path_of(prefix), {"schema": SCHEMA, **side_car})


def read_meta(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the side-car, or None when there is none (a dataset that Megatron-LM wrote). Errors:
    `DataError`.
    """
    path = path_of(prefix)
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Preprocess again, or delete it to go without."
        ) from error
    if not _well_formed(value):
        raise DataError(
            f"{path} is not a side-car of schema {SCHEMA} with tokenizer.fingerprint, "
            "tokenizer.vocab_size and counts. Preprocess again, or delete it to go without."
        )
    return value


def _well_formed(value: Any) -> bool:
    if (
        not isinstance(value, dict)
        or value.get("schema") != SCHEMA
        or not isinstance(value.get("tokenizer"), dict)
    ):
        return False
    tokenizer = value["tokenizer"]
    return (
        isinstance(tokenizer.get("fingerprint"), str)
        and isinstance(tokenizer.get("vocab_size"), int)
        and all(isinstance(value.get(key), int) for key in _COUNTS)
    )


def check_counts(
    prefix: str | os.PathLike[str], side_car: Mapping[str, Any], found: Mapping[str, int]
) -> None:
    """Refuse a side-car that belongs to other files."""
    for key in _COUNTS:
        if side_car[key] != found[key]:
            raise DataError(
                f"{path_of(prefix)} says {side_car[key]} {key} but the dataset has {found[key]}: "
                "the files do not belong together. Preprocess again."
            )


def check_tokenizer(
    prefix: str | os.PathLike[str], fingerprint: str, name: str = "data.tokenizer"
) -> None:
    """Refuse a dataset made with another tokenizer than that of `fingerprint`; without a side-car
    all pass. `name` is the option that chose it."""
    side_car = read_meta(prefix)
    if side_car is not None and side_car["tokenizer"]["fingerprint"] != fingerprint:
        raise DataError(
            f"{os.fspath(prefix)} was made with tokenizer {side_car['tokenizer']['fingerprint']}, "
            f"but {name} is {fingerprint}: the ids mean other texts. Set {name} to the one used, "
            "or preprocess again."
        )


def kept_tokenizer(prefix: str | os.PathLike[str]) -> str | None:
    """Returns the tokenizer that made a dataset: `bytes` when its side-car says so, the folder kept
    beside it, or None.

    Only with a side-car: a folder beside other data says nothing about them.
    """
    side_car = read_meta(prefix)
    if side_car is None:
        return None
    if side_car["tokenizer"]["fingerprint"] == ByteTokenizer.fingerprint:
        return BYTES
    kept = tokenizer_folder.saved_tokenizer(prefix)
    return str(kept) if tokenizer_folder.definition_file(kept) is not None else None


def merged(prefixes: Sequence[str]) -> dict[str, Any] | None:
    """Returns the side-car of a merge without its counts: None unless every part has one.

    Errors: `DataError` when the parts were made with different tokenizers.
    """
    parts = [read_meta(prefix) for prefix in prefixes]
    known = [
        (prefix, part) for prefix, part in zip(prefixes, parts, strict=True) if part is not None
    ]
    for prefix, part in known[1:]:
        if part["tokenizer"]["fingerprint"] != known[0][1]["tokenizer"]["fingerprint"]:
            raise DataError(
                f"{prefix} and {known[0][0]} were made with different tokenizers "
                f"({part['tokenizer']['fingerprint']} and "
                f"{known[0][1]['tokenizer']['fingerprint']}): merging them would mix two meanings "
                "of the same ids."
            )
    if len(known) < len(parts):
        return None
    found = provenance.merge_provenance(
        (part.get("origins"), part["documents"]) for _, part in known
    )
    framed = any(part.get("add_special_tokens") for _, part in known)
    made_by = {name for _, part in known for name in part["tokenizer"].get("encoded_by", ())}
    tokenizer = known[0][1]["tokenizer"] | ({"encoded_by": sorted(made_by)} if made_by else {})
    return {
        "tokenizer": tokenizer, "add_special_tokens": framed, "merged_from": list(prefixes),
        "origins": found,
    }  # fmt: skip
