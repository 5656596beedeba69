"""Reading, writing, merging and verifying of `PREFIX.bin` + `PREFIX.idx`, byte-compatible with Megatron-LM.

`.bin` holds the tokens of all sequences back to back; `.idx` (little-endian, 34-byte header) holds
dtype, lengths, byte offsets and document boundaries. `PREFIX.meta.json` is ours and optional: counts
and the tokenizer's fingerprint. So is `PREFIX.tokenizer/`, a copy of that tokenizer.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megallm.base import files
from megallm.base.errors import DataError
from megallm.base.progress import Progress, quiet
from megallm.data.indexed import content, meta
from megallm.data.indexed.openfile import OpenFile
from megallm.data.text.tokenizer import BYTES
from megallm.data.text.tokenizer_folder import TOKENIZER_SUFFIX, save_tokenizer_files

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    1: np.dtype("<u1"), 2: np.dtype("<i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"),
    5: np.dtype("<i8"), 6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2"),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_SCAN = 1 << 20  # entries or tokens looked at together: bounds the memory of checks
_COPY_BYTES = 1 << 22
_DOCUMENTS = 1 << 16  # copied between two notes of progress
_PARTS = ("bin", "lengths", "documents")  # what a writer appends to


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns uint16 when every id of the vocabulary surely fits (Megatron's limit), else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """A tokenised corpus; every check is made on open, each failure a `DataError`.

    lengths int32 [S] in tokens, offsets int64 [S] in bytes, document_indices int64 [documents + 1]. Tokens are read
    when they are asked for and a large index is mapped: a file that is cut off while it is open is a `DataError` too.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.index_path, self.data_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        self._index, self._data = OpenFile(self.index_path), OpenFile(self.data_path)
        index = self._index.whole()
        self.dtype, sequences, entries = _read_header(self.index_path, index)
        at = _HEADER.size
        self._lengths = np.frombuffer(index, "<i4", sequences, at)
        self._offsets = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self._document_indices = np.frombuffer(index, "<i8", entries, at + 12 * sequences)
        _check_documents(self)
        _check_sequences(self)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        self._index.check()
        return self._lengths

    @property
    def offsets(self) -> np.ndarray:
        """Returns where each sequence begins in `.bin`, in bytes."""
        self._index.check()
        return self._offsets

    @property
    def document_indices(self) -> np.ndarray:
        """Returns the sequence that each document begins with, and the end of the last."""
        self._index.check()
        return self._document_indices

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._lengths)

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return self._data.size // self.dtype.itemsize

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens `offset` to `offset + length` (default: to the end) of a sequence,
        read-only.
        """
        total = int(self.lengths[sequence])
        length = total - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > total:
            raise IndexError(f"Tokens {offset} to {offset + length} of sequence {sequence}, which has {total}.")
        begin = int(self.offsets[sequence]) + offset * self.dtype.itemsize
        return np.frombuffer(self._data.read(begin, length * self.dtype.itemsize), self.dtype)

    def document_of(self, sequence: int) -> int:
        """Returns the document that a sequence belongs to."""
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1

    def token_index(self, sequence: int, offset: int = 0) -> int:
        """Returns where a token stands in `.bin`, counted in tokens."""
        return int(self.offsets[sequence]) // self.dtype.itemsize + offset

    def place_of(self, token_index: int) -> tuple[int, int]:
        """Returns (document, position in the document) of a token of `.bin`."""
        sequence = int(np.searchsorted(self.offsets, token_index * self.dtype.itemsize, side="right")) - 1
        document = self.document_of(sequence)
        return document, token_index - self.token_index(int(self.document_indices[document]))

    def document(self, document: int) -> np.ndarray:
        """Returns all tokens of one document, read-only."""
        begin, end = self.document_starts(np.array([document, document + 1])).tolist()
        return self.tokens(begin, end - begin)

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """Returns where documents begin in `.bin`, in tokens, int64; `num_documents` stands for the end of the last."""
        sequences = self.document_indices[documents]
        ends = sequences == len(self)
        if len(self) == 0:
            return np.zeros(len(sequences), np.int64)
        return np.where(ends, self.num_tokens, self.offsets[np.where(ends, 0, sequences)] // self.dtype.itemsize)

    def tokens(self, begin: int, count: int) -> np.ndarray:
        """Returns `count` tokens of `.bin` from token `begin` on, read-only."""
        if begin < 0 or count < 0 or begin + count > self.num_tokens:
            raise IndexError(f"Tokens {begin} to {begin + count} of {self.data_path}, which has {self.num_tokens}.")
        item = self.dtype.itemsize
        return np.frombuffer(self._data.read(begin * item, count * item), self.dtype)


def _bad(path: str, at: int, what: str) -> DataError:
    return DataError(f"{path}: byte {at}: {what}. The file is damaged or not an indexed dataset; make it again.")


def _read_header(path: str, index: bytes | mmap.mmap) -> tuple[np.dtype, int, int]:
    """(dtype, number of sequences, number of document entries)."""
    if index[: len(MAGIC)] != MAGIC:
        raise _bad(path, 0, f"the file must begin with {MAGIC!r}, not {index[: len(MAGIC)]!r}")
    if len(index) < _HEADER.size:
        raise _bad(path, len(index), f"the file ends inside its header of {_HEADER.size} bytes")
    _, version, code, sequences, entries = _HEADER.unpack_from(index)
    if version != VERSION:
        raise _bad(path, 9, f"version {version} is unknown, this megallm reads version {VERSION}")
    if code not in DTYPES:
        raise _bad(path, 17, f"dtype code {code} is unknown, accepted are 1 to 8")
    if DTYPES[code].kind == "f":
        raise _bad(path, 17, f"dtype code {code} is {DTYPES[code].name}, but tokens are integers")
    wanted = _HEADER.size + 12 * sequences + 8 * entries
    if len(index) not in (wanted, wanted + sequences):
        raise _bad(
            path,
            min(len(index), wanted),
            f"the file has {len(index)} bytes, but {sequences} sequences and {entries} document entries need {wanted}",
        )
    return DTYPES[code], sequences, entries


def _check_documents(data: IndexedDataset) -> None:
    path, at, entries = data.index_path, _HEADER.size + 12 * len(data), data.document_indices
    if len(entries) == 0 or entries[0] != 0:
        raise _bad(path, at, "the first document entry must be 0")
    for lo in range(0, len(entries) - 1, _SCAN):
        part = entries[lo : lo + _SCAN + 1]
        wrong = np.flatnonzero(part[1:] < part[:-1])
        if wrong.size:
            i = lo + 1 + int(wrong[0])
            raise _bad(path, at + 8 * i, f"document entry {i} is {entries[i]}, less than {entries[i - 1]} before it")
    if entries[-1] != len(data):
        at += 8 * (len(entries) - 1)
        raise _bad(path, at, f"the last document entry is {entries[-1]}, but there are {len(data)} sequences")


def _check_sequences(data: IndexedDataset) -> None:
    """Lengths >= 0, offsets the running sum of the lengths, and a .bin file of exactly that size."""
    path, item, expected = data.index_path, data.dtype.itemsize, 0
    for lo in range(0, len(data), _SCAN):
        lengths, offsets = data.lengths[lo : lo + _SCAN], data.offsets[lo : lo + _SCAN]
        negative = np.flatnonzero(lengths < 0)
        if negative.size:
            i = lo + int(negative[0])
            raise _bad(path, _HEADER.size + 4 * i, f"the length of sequence {i} is {data.lengths[i]}")
        ends = expected + np.cumsum(lengths, dtype=np.int64) * item
        begins = np.concatenate(([expected], ends[:-1]))
        wrong = np.flatnonzero(offsets != begins)
        if wrong.size:
            i, want = lo + int(wrong[0]), begins[wrong[0]]
            at = _HEADER.size + 4 * len(data) + 8 * i
            raise _bad(path, at, f"the offset of sequence {i} is {data.offsets[i]}, but the one before ends at {want}")
        expected = int(ends[-1])
    if data._data.size != expected:
        raise _bad(
            data.data_path, min(data._data.size, expected),
            f"the file has {data._data.size} bytes, but {path} describes {expected}",
        )  # fmt: skip


class IndexedWriter:
    """Writes a dataset by streaming, in memory that does not grow; nothing has a final name until `commit`.

    Use as a context manager: leaving it without `commit`, or by an error, removes everything. With `parts`, a folder,
    the temporary files have fixed names there and stay after an error, and `done`, what `sync` returned, takes up
    from such files: whatever was written later is cut off. Errors: `CannotWrite`.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: np.dtype,
        parts: Path | None = None,
        done: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.prefix, self.dtype, self._keep = os.fspath(prefix), np.dtype(dtype), parts is not None
        if self.dtype not in _CODES:
            raise ValueError(f"{dtype} cannot be stored; accepted: {[d.name for d in _CODES]}.")
        self.num_tokens, self.num_sequences, self.num_documents = done
        base = Path(self.prefix)
        self._paths = {
            suffix: files.temporary_name(f"{base}.{suffix}") if parts is None else parts / f"{base.name}.{suffix}"
            for suffix in ("bin", "idx", "meta.json", TOKENIZER_SUFFIX, "lengths", "documents")
        }
        self._open: dict[str, BinaryIO] = {}
        sizes = (self.num_tokens * self.dtype.itemsize, 4 * self.num_sequences, 8 * self.num_documents)
        with files.writing(self._paths["bin"]):
            for suffix, size in zip(_PARTS, sizes, strict=True):
                self._open[suffix] = open(self._paths[suffix], "r+b" if size else "wb")  # noqa: SIM115
                self._open[suffix].truncate(size)
                self._open[suffix].seek(size)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray | None = None) -> None:
        """Append sequences: `tokens` of all of them back to back, their `lengths`, and how many make each document.

        tokens [sum(lengths)], lengths [n], sequences_per_document [documents] with sum n (default: one each).
        """
        lengths = np.asarray(lengths)
        per_document = np.ones(len(lengths), np.int64) if sequences_per_document is None else sequences_per_document
        if int(lengths.sum()) != len(tokens) or int(np.sum(per_document)) != len(lengths):
            raise ValueError("tokens, lengths and sequences_per_document do not describe the same sequences.")
        ends = self.num_sequences + np.cumsum(per_document, dtype="<i8")
        with files.writing(f"{self.prefix}.bin"):
            for suffix, array, dtype in zip(_PARTS, (tokens, lengths, ends), (self.dtype, "<i4", "<i8"), strict=True):
                self._open[suffix].write(np.ascontiguousarray(array, dtype).data)
        self.num_documents += len(per_document)
        self.num_sequences += len(lengths)
        self.num_tokens += len(tokens)

    def add_documents(self, data: IndexedDataset, first: int, last: int) -> None:
        """Append the documents first to last (not included) of a dataset of the same dtype."""
        sequences = data.document_indices[first : last + 1]
        begin, end = data.document_starts(np.array([first, last])).tolist()
        step = _COPY_BYTES // self.dtype.itemsize
        with files.writing(f"{self.prefix}.bin"):
            for lo in range(begin, end, step):
                self._open["bin"].write(data.tokens(lo, min(step, end - lo)).data)
            self._open["lengths"].write(data.lengths[sequences[0] : sequences[-1]].tobytes())
            self._open["documents"].write((self.num_sequences + (sequences[1:] - sequences[0])).astype("<i8").tobytes())
        self.num_documents += last - first
        self.num_sequences += int(sequences[-1] - sequences[0])
        self.num_tokens += end - begin

    def sync(self) -> tuple[int, int, int]:
        """Make what was written durable; (tokens, sequences, documents) so far."""
        with files.writing(f"{self.prefix}.bin"):
            for file in self._open.values():
                file.flush()
                os.fsync(file.fileno())
        return self.num_tokens, self.num_sequences, self.num_documents

    def commit(self, side_car: Mapping[str, Any] | None = None, tokenizer: str | None = None) -> None:
        """Publish what was written, with a side-car (None: none) and a copy of the tokenizer that made it."""
        publish(self.prefix, self.prepare(side_car, tokenizer))
        self._open.clear()
        self._remove()

    def prepare(self, side_car: Mapping[str, Any] | None = None, tokenizer: str | None = None) -> dict[str, str]:
        """Make everything ready and durable; what `publish` moves, by suffix. `tokenizer` is what `load` reads."""
        with files.writing(self.prefix):
            for file in self._open.values():
                file.close()
            with open(self._paths["idx"], "wb") as index:
                self._write_index(index)
            for suffix in ("bin", "idx"):
                files.fsync_file(self._paths[suffix])
            if side_car is not None:
                held = content.records_of({suffix: self._paths[suffix] for suffix in content.SUFFIXES})
                meta.write(self.prefix, {**side_car, "content": held}, self._paths["meta.json"])
        wanted = ("bin", "idx") if side_car is None else ("meta.json", "bin", "idx")
        if tokenizer not in (None, BYTES):
            _remove(self._paths[TOKENIZER_SUFFIX])
            save_tokenizer_files(tokenizer, self._paths[TOKENIZER_SUFFIX])
            with files.writing(self.prefix):
                for path in (*self._paths[TOKENIZER_SUFFIX].rglob("*"), self._paths[TOKENIZER_SUFFIX]):
                    files.fsync_file(path)
            wanted = (TOKENIZER_SUFFIX, *wanted)
        return {suffix: os.fspath(self._paths[suffix]) for suffix in wanted}

    def abort(self) -> None:
        """Remove what was written, unless it was committed or is kept in `parts`."""
        for file in self._open.values():
            with suppress(OSError):
                file.close()
        if self._open and not self._keep:
            self._remove()
        self._open.clear()

    def _remove(self) -> None:
        for path in self._paths.values():
            with suppress(OSError):
                _remove(path)

    def _write_index(self, index: BinaryIO) -> None:
        index.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self.num_sequences, self.num_documents + 1))
        with open(self._paths["lengths"], "rb") as lengths, open(self._paths["documents"], "rb") as documents:
            while block := lengths.read(4 * _SCAN):
                index.write(block)
            lengths.seek(0)
            begin = 0
            while block := lengths.read(4 * _SCAN):
                ends = begin + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * self.dtype.itemsize
                index.write(np.concatenate(([begin], ends[:-1])).astype("<i8", copy=False).data)
                begin = int(ends[-1])
            index.write(bytes(8))
            while block := documents.read(8 * _SCAN):
                index.write(block)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it, if it is there (raises OSError)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
def indexed_files(prefix: str | os.PathLike[str]) -> list[str]:
    """Returns the files of a dataset."""
    return [f"{os.fspath(prefix)}.{suffix}" for suffix in ("bin", "idx", "meta.json", TOKENIZER_SUFFIX)]


def publish(prefix: str, prepared: Mapping[str, str]) -> None:
    """Give prepared files their names: tokenizer, side-car, `.bin`, then `.idx`, so that an `.idx` never lies about its
    `.bin`. What an earlier dataset of that name had and this one has not is removed.

    Doing it again after it was interrupted anywhere finishes it. Errors: `CannotWrite`.
    """
    with files.writing(prefix):
        if not os.path.exists(prepared["idx"]):
            return  # it is the last, so it was all done
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        for suffix in {"meta.json", TOKENIZER_SUFFIX} - prepared.keys():
            _remove(Path(f"{prefix}.{suffix}"))
        for suffix, path in prepared.items():
            if os.path.exists(path):
                if suffix == TOKENIZER_SUFFIX:
                    _remove(Path(f"{prefix}.{suffix}"))  # a folder is not replaced by another
                os.replace(path, f"{prefix}.{suffix}")
        files.fsync_dir(Path(prefix).parent)


def merge_datasets(
    prefixes: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], progress: Progress = quiet
) -> dict[str, Any]:
    """Concatenate datasets of one dtype, in the order given; returns the counts."""
    sources = [IndexedDataset(prefix) for prefix in prefixes]
    if not sources:
        raise DataError("There is nothing to merge: give at least one prefix.")
    for source in sources[1:]:
        if source.dtype != sources[0].dtype:
            raise DataError(
                f"{source.prefix} holds {source.dtype.name} but {sources[0].prefix} holds {sources[0].dtype.name}: "
                f"only datasets of the same dtype can be merged; preprocess one of them again."
            )
    prefixes = [source.prefix for source in sources]
    side_car = meta.merged(prefixes)
    with IndexedWriter(output, sources[0].dtype) as writer:
        total = sum(source.num_tokens for source in sources)
        for source in sources:
            for low in range(0, source.num_documents, _DOCUMENTS):
                progress("joining", writer.num_tokens, total, "tokens")
                writer.add_documents(source, low, min(low + _DOCUMENTS, source.num_documents))
        counts = {
            "documents": writer.num_documents, "sequences": writer.num_sequences, "tokens": writer.num_tokens,
        }  # fmt: skip
        if side_car is None:
            writer.commit()
        else:
            writer.commit({**side_car, **counts}, next(filter(None, map(meta.kept_tokenizer, prefixes)), None))
    return counts


def check_tokens(data: IndexedDataset, token_index: int, tokens: np.ndarray, vocab_size: int) -> None:
    """Raise the `DataError` that names file, document and position of the first id outside the vocabulary.

    tokens [n]: what stands in `.bin` from token `token_index` on.
    """
    if tokens.size == 0 or (tokens.max() < vocab_size and tokens.min() >= 0):
        return
    first = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
    document, position = data.place_of(token_index + first)
    raise DataError(
        f"{data.data_path}: document {document}, position {position}: token id {int(tokens[first])} is outside the "
        f"vocabulary of {vocab_size}. The corpus was tokenised with another tokenizer, or model.vocab_size is wrong."
    )


def verify_dataset(
    prefix: str | os.PathLike[str], vocab_size: int | None = None, progress: Progress = quiet
) -> dict[str, Any]:
    """Check a whole dataset, every token included; returns counts and the range of ids.

    Without `vocab_size` the side-car's is used when there is one. Errors: `DataError` naming file and
    byte, or document and position.
    """
    data = IndexedDataset(prefix)
    side_car = meta.read_meta(prefix)
    if side_car is not None:
        meta.check_counts(prefix, side_car, {"documents": data.num_documents, "sequences": len(data),
                                             "tokens": data.num_tokens})  # fmt: skip
        vocab_size = side_car["tokenizer"]["vocab_size"] if vocab_size is None else vocab_size
    limit = int(np.iinfo(data.dtype).max) + 1 if vocab_size is None else vocab_size
    lowest, highest = None, None
    for lo in range(0, data.num_tokens, _SCAN):
        progress("reading", lo, data.num_tokens, "tokens")
        tokens = data.tokens(lo, min(_SCAN, data.num_tokens - lo))
        check_tokens(data, lo, tokens, limit)
        lowest = int(tokens.min()) if lowest is None else min(lowest, int(tokens.min()))
        highest = int(tokens.max()) if highest is None else max(highest, int(tokens.max()))
    return {
        "prefix": data.prefix, "dtype": data.dtype.name, "documents": data.num_documents, "sequences": len(data),
        "tokens": data.num_tokens, "empty_documents": int((np.diff(data.document_indices) == 0).sum()),
        "lowest_token": lowest, "highest_token": highest, "vocab_size": vocab_size,
        "tokenizer": None if side_car is None else side_car["tokenizer"],
    }  # fmt: skip
