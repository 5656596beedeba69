"""`manifest.json`: what a checkpoint holds, where each piece lies, and the hash of every byte of
it.

Schema 1, all keys required and no others allowed::

    {"format": "megallm-checkpoint", "schema": 1, "needs": "0.1.0", "step": 1200,
     "files":   {"weights-00000.safetensors": {"bytes": n, "header_bytes": n, "header_xxh3_128": hex}},
     "tensors": {"layers.0.mlp.down.weight": {"full": [8, 4], "dtype": "float32", "pieces": [
                  {"file": name, "offset": bytes, "box_offset": [0, 0], "box_shape": [8, 2], "xxh3_128": hex}]}},
     "meta": anything,
     "xxh3_128": hex}

The last key is the hash of all bytes before it, so a flipped bit in the manifest itself is found
too. That trailer and the first three keys are the same in every future schema; `needs` names the
oldest megallm that reads the file. The pieces of a file must tile it from `header_bytes` to its
end: no byte is without a hash. A manifest is untrusted input: names are plain file names, sizes are
bounded by the files, nothing is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import xxhash

from megallm.base.errors import CheckpointError, NewerCheckpoint
from megallm.base.version import VERSION
from megallm.checkpoint.plan import cover_problem
from megallm.parallel.shard import Box

FORMAT = "megallm-checkpoint"
SCHEMA = 1
NEEDS = "0.1.0"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**30

# dtype name -> (name in a safetensors header, bytes per element)
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_HASH = re.compile(r"[0-9a-f]{32}")
_TRAILER = re.compile(rb',\n"xxh3_128": "([0-9a-f]{32})"\n}\n')
_TRAILER_BYTES = 51
_MAX_COUNT = 2**62


def digest(data: Any) -> str:
    """Returns xxh3-128 of a bytes-like object, 32 hex digits (the XXH128 canonical form)."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class StoredPiece:
    """One box of a logical tensor: `nbytes` bytes at byte `offset` of `file`, in C order."""

    file: str
    offset: int
    box: Box
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "offset": self.offset,
            "box_offset": list(self.box.offset),
            "box_shape": list(self.box.shape),
            "xxh3_128": self.digest,
        }


@dataclass(frozen=True)
class TensorRecord:
    """A logical tensor: full shape, dtype name of `DTYPES`, and the pieces that hold it."""

    full: tuple[int, ...]
    dtype: str
    pieces: tuple[StoredPiece, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        return prod(self.full) * self.itemsize

    def to_json(self) -> dict[str, Any]:
        return {
            "full": list(self.full),
            "dtype": self.dtype,
            "pieces": [p.to_json() for p in self.pieces],
        }


@dataclass(frozen=True)
class FileRecord:
    """A shard file: its size, and size and hash of its safetensors header (length prefix
    included).
    """

    nbytes: int
    header_bytes: int
    header_digest: str

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes": self.nbytes,
            "header_bytes": self.header_bytes,
            "header_xxh3_128": self.header_digest,
        }


@dataclass(frozen=True)
class Manifest:
    step: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    meta: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all shard files."""
        return sum(record.nbytes for record in self.files.values())

    def encode(self) -> bytes:
        """Returns the bytes of manifest.json; floats in `meta` round-trip exactly, tuples come back
        as lists.
        """
        content = {
            "format": FORMAT,
            "schema": SCHEMA,
            "needs": NEEDS,
            "step": self.step,
            "files": {name: record.to_json() for name, record in sorted(self.files.items())},
            "tensors": {name: record.to_json() for name, record in sorted(self.tensors.items())},
            "meta": self.meta,
        }
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        body = ("{\n" + ",\n".join(lines)).encode("ascii")
        return body + f',\n"xxh3_128": "{digest(body)}"\n}}\n'.encode("ascii")

    def check(self) -> None:
        """Checks that every tensor is covered exactly once and every file is tiled by its pieces,
        else CheckpointError.
        """
        spans: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.files}
        for name, tensor in self.tensors.items():
            problem = cover_problem(tensor.full, [piece.box for piece in tensor.pieces])
            if problem is not None:
                raise CheckpointError(
                    f"Tensor {name} of shape {tensor.full} is not held exactly once: {problem}."
                )
            for piece in tensor.pieces:
                if piece.file not in spans:
                    raise CheckpointError(
                        f"Tensor {name} names the file {piece.file}, which 'files' does not list."
                    )
                spans[piece.file].append(
                    (piece.offset, piece.offset + piece.box.size * tensor.itemsize, name)
                )
        for name, record in self.files.items():
            _check_tiling(name, record, spans[name])


def _check_tiling(file: str, record: FileRecord, spans: list[tuple[int, int, str]]) -> None:
    position = record.header_bytes
    for begin, end, name in sorted(spans):
        if begin != position:
            what = (
                "overlaps another piece" if begin < position else "leaves bytes that no hash covers"
            )
            raise CheckpointError(
                f"The piece of {name} at byte {begin} of {file} {what} (expected {position})."
            )
        position = end
    if position != record.nbytes:
        raise CheckpointError(
            f"The pieces of {file} end at byte {position}, the file at {record.nbytes}."
        )


def merge_tables(tables: Sequence[Mapping[str, TensorRecord]]) -> dict[str, TensorRecord]:
    """Returns one table from the tables of all ranks; full shape and dtype of a name must agree,
    else CheckpointError.
    """
    merged: dict[str, TensorRecord] = {}
    for table in tables:
        for name, record in table.items():
            known = merged.get(name)
            if known is None:
                merged[name] = record
            elif (known.full, known.dtype) != (record.full, record.dtype):
                raise CheckpointError(
                    f"Ranks disagree about tensor {name}: {known.dtype} {known.full} and "
                    f"{record.dtype} {record.full}."
                )
            else:
                merged[name] = TensorRecord(known.full, known.dtype, known.pieces + record.pieces)
    return merged


def decode(data: bytes, where: str) -> Manifest:
    """Parse and check manifest bytes; `where` names the file in errors. Errors: CheckpointError."""
    trailer = _TRAILER.fullmatch(data[-_TRAILER_BYTES:])
    body = data[:-_TRAILER_BYTES]
    if trailer is None:
        raise CheckpointError(f"{where} is cut off or damaged: it does not end with its own hash.")
    if digest(body) != trailer[1].decode("ascii"):
        raise CheckpointError(f"{where} is damaged: its content does not match its own hash.")
    try:
        content = json.loads(body + b"}", object_pairs_hook=_unique)
        return _manifest(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}.") from error
    except CheckpointError as error:
        raise type(error)(f"{where}: {error}") from error


def table_from_json(value: Any) -> dict[str, TensorRecord]:
    """Returns the tensor table of one rank from its JSON form (`to_json` of each record). Errors:
    CheckpointError.
    """
    return {name: _tensor(name, entry) for name, entry in _mapping(value, "tensors").items()}


def file_from_json(value: Any, where: str) -> FileRecord:
    """Returns a `FileRecord` from its JSON form. Errors: CheckpointError."""
    entry = _fields(value, ("bytes", "header_bytes", "header_xxh3_128"), where)
    return FileRecord(
        _count(entry["bytes"], f"{where}.bytes"),
        _count(entry["header_bytes"], f"{where}.header_bytes"),
        _match(_HASH, entry["header_xxh3_128"], f"{where}.header_xxh3_128"),
    )


def _manifest(content: Any) -> Manifest:
    content = _mapping(content, "the manifest")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"'format' is {content.get('format')!r}, not {FORMAT!r}: this is no megallm checkpoint."
        )
    schema = content.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        raise (NewerCheckpoint if newer else CheckpointError)(
            f"It has schema {schema!r}; this megallm, {VERSION}, reads schema {SCHEMA}. "
            f"It needs megallm >= {str(content.get('needs'))[:40]}."
        )
    _fields(
        content, ("format", "schema", "needs", "step", "files", "tensors", "meta"), "the manifest"
    )
    files = {
        _match(_FILE, name, "a file name"): file_from_json(entry, f"files[{name}]")
        for name, entry in _mapping(content["files"], "files").items()
    }
    manifest = Manifest(
        _count(content["step"], "step"), files, table_from_json(content["tensors"]), content["meta"]
    )
    manifest.check()
    return manifest


def _tensor(name: str, value: Any) -> TensorRecord:
    _match(_NAME, name, "a tensor name")
    entry = _fields(value, ("full", "dtype", "pieces"), name)
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{name} has dtype {entry['dtype']!r}; accepted are {', '.join(DTYPES)}."
        )
    pieces = tuple(
        _piece(piece, f"{name}.pieces") for piece in _list(entry["pieces"], f"{name}.pieces")
    )
    return TensorRecord(_counts(entry["full"], f"{name}.full"), entry["dtype"], pieces)


def _piece(value: Any, where: str) -> StoredPiece:
    entry = _fields(value, ("file", "offset", "box_offset", "box_shape", "xxh3_128"), where)
    box = Box(
        _counts(entry["box_offset"], f"{where}.box_offset"),
        _counts(entry["box_shape"], f"{where}.box_shape"),
    )
    return StoredPiece(
        _match(_FILE, entry["file"], f"{where}.file"),
        _count(entry["offset"], f"{where}.offset"),
        box,
        _match(_HASH, entry["xxh3_128"], f"{where}.xxh3_128"),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, not {type(value).__name__}.")
    return value


def _fields(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    value = _mapping(value, where)
    if set(value) != set(names):
        raise CheckpointError(
            f"{where} must have exactly the keys {', '.join(names)}; it has {', '.join(value)}."
        )
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{where} must be a JSON list, not {type(value).__name__}.")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise CheckpointError(
            f"{where} must be a whole number from 0 to 2^62, not {str(value)[:40]!r}."
        )
    return value


def _counts(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_count(item, where) for item in _list(value, where))


def _match(pattern: re.Pattern[str], value: Any, where: str) -> str:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise CheckpointError(
            f"{where} is {str(value)[:80]!r}, which does not match {pattern.pattern}."
        )
    return value
