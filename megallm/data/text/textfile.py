"""Opening a file of raw text: what it is is seen in its first bytes, and it is read as UTF-8 in
bounded blocks.

gzip, zstd, bzip2 and xz are unpacked and UTF-16 and UTF-32 with a byte order mark become UTF-8,
whatever the name says. Pipes and /dev/stdin are read once, from the beginning to the end. Archives
of several files are refused.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megallm.base import optional
from megallm.base.errors import DataError, UsageError

BLOCK_BYTES = 1 << 20
SUFFIXES = (
    ".gz",
    ".zst",
    ".zstd",
    ".bz2",
    ".xz",
    ".lzma",
)  # of packed files: the suffix before says what is in it
WRITER_SECONDS = 60.0  # so long a named pipe may have no writer
_POLL_SECONDS = 0.05
_READ_BYTES = 1 << 16  # compressed bytes read at once
_FEED_BYTES = 1 << 8  # compressed bytes given to zstd at once: 4 of them unfold to at most 128 KiB
_MAX_WINDOW_BYTES = 1 << 31  # `zstd --long=31`: what the Reddit dumps of Pushshift were made with
_HEAD_BYTES = 1 << 10
_UTF8_MARK = codecs.BOM_UTF8
_MARKS = {  # the mark of UTF-32 begins like that of UTF-16, so it comes first
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x5d\x00\x00": "xz",
}  # fmt: skip - the last is the older .lzma, which the same library reads
_PARQUET = b"PAR1"
_REFUSED = {  # how it begins: what it is, and what to do with it
    b"PK\x03\x04": ("a zip archive", "unzip it and give the files in it"),
    b"PK\x05\x06": ("a zip archive without files", "give another file"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it and give the files in it"),
    b"Rar!\x1a\x07": ("a rar archive", "unpack it and give the files in it"),
    b"\x04\x22\x4d\x18": (
        "packed with lz4",
        "unpack it, for example `lz4 -d FILE - | megallm ... --input /dev/stdin`",
    ),
    b"\x1f\x9d": ("packed with compress", "unpack it with `gzip -d`"),
    b"LZIP": ("packed with lzip", "unpack it with `lzip -d`"),
    b"ARROW1": ("an Arrow file", "write it as Parquet or JSONL"),
    b"\xff\xff\xff\xff": (
        "an Arrow stream",
        "write it as Parquet or JSONL; datasets have `to_parquet`, `to_json`",
    ),
    b"Obj\x01": ("an Avro file", "write it as Parquet or JSONL"),
    b"SQLite format 3\0": ("an SQLite database", "write the texts of its tables as JSONL"),
    b"%PDF-": ("a PDF", "extract its text, for example with `pdftotext`"),
}
_TAR = (257, b"ustar")
_MOST_NULS = 0.4  # of the bytes of a text: in UTF-16 half of them are, wherever it is ASCII
_DAMAGES = (OSError, EOFError, zlib.error)


def is_stream(name: str) -> bool:
    """Returns whether this is a pipe or a socket, which can be read only once. Errors: OSError."""
    mode = os.stat(name).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def check_readable(names: Sequence[str]) -> None:
    """Refuse what cannot be read, before any work starts; pipes are not opened.

    Errors: `DataError` for what is no file or no pipe, `UsageError` for a package that is missing.
    """
    streams: set[tuple[int, int]] = set()
    for name in names:
        if name == "-":
            raise DataError("- is not a file: /dev/stdin is the name of standard input.")
        if Path(name).is_dir():
            raise DataError(
                f"{name} is a folder: give the files in it, for example {name}/*.jsonl."
            )
        try:
            found = os.stat(name)
            if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
                what = "a terminal" if _is_terminal(name) else "a device"
                raise DataError(
                    f"{name} is {what}: give a file or a pipe, for example `zcat F | megallm ...`."
                )
            if not is_stream(name):
                with opened(name) as file:
                    file.check_library()
                continue
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}.") from error
        place = (found.st_dev, found.st_ino)
        if place in streams:
            raise DataError(f"{name} is given twice, but a pipe can be read only once.")
        streams.add(place)


def _is_terminal(name: str) -> bool:
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return os.isatty(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class TextFile:
    """An open file: `packing` is gzip, zstd, bzip2, xz or nothing; `head` is how its bytes begin.

    by_range: whether its text is its bytes, so that any part of it can be read again by the file's
    name.
    """

    name: str
    raw: BinaryIO
    packing: str
    head: bytes
    by_range: bool

    @property
    def parquet(self) -> bool:
        return self.head.startswith(_PARQUET)

    def check_library(self) -> None:
        """Errors: `UsageError` when what unpacks it is not installed."""
        if self.parquet:
            optional.need_for_file("pyarrow.parquet", self.name)
        elif self.packing:
            _library(self.packing, self.name)

    def blocks(self) -> Iterator[bytes]:
        """Yields its text as UTF-8, at most about BLOCK_BYTES at once. Errors: `DataError`; see
        `damage`.
        """
        yield from _as_utf8(self.name, _unpacked(self), bool(self.packing))

    def start(self, limit: int) -> bytes:
        """Returns the first `limit` bytes of its text."""
        held: list[bytes] = []
        size = 0
        for block in self.blocks():
            held.append(block)
            size += len(block)
            if size >= limit:
                break
        return b"".join(held)[:limit]


@contextmanager
def opened(name: str) -> Iterator[TextFile]:
    """Yields the file called `name`. Errors: `DataError` for an archive, or a pipe that nobody
    writes to; OSError.
    """
    stream = is_stream(name)
    with _open_pipe(name) if stream else open(name, "rb") as raw:
        head = raw.read(_HEAD_BYTES)
        if stream:
            raw = io.BufferedReader(_Rejoined(head, raw), BLOCK_BYTES)
        else:
            raw.seek(0)
        packing = _packing(name, head)
        plain = not (packing or stream or name.startswith(("/dev/", "/proc/")))
        yield TextFile(name, raw, packing, head, plain and not head.startswith(tuple(_MARKS)))


@contextmanager
def damage(name: str) -> Iterator[None]:
    """Turn what unpacking raises for a damaged or truncated file into a `DataError` that names
    it.
    """
    try:
        yield
    except _DAMAGES as error:
        raise DataError(
            f"{name} cannot be read: {error}. The file is damaged or incomplete."
        ) from error


def _packing(name: str, head: bytes) -> str:
    """Returns how a file is packed. Errors: `DataError` for an archive, and for a packed file's
    name without its beginning.
    """
    packing = _packing_of(head)
    if packing:
        return packing
    _refuse(name, head)
    if name.lower().endswith(SUFFIXES) and head and not _is_text(head):
        raise DataError(
            f"{name} cannot be read: neither its first bytes nor text is what its name says. "
            "The file is damaged or incomplete."
        )
    return ""


def _packing_of(head: bytes) -> str:
    for magic, packing in _PACKED.items():
        if head.startswith(magic):
            return packing
    skippable = (
        head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5
    )  # a frame that pzstd writes first
    return "zstd" if skippable else ""


def _is_text(head: bytes) -> bool:
    """Returns whether bytes may be the beginning of a text: something unpacked it on the way and
    left the name.
    """
    if head.startswith(tuple(_MARKS)):
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _refuse(name: str, head: bytes) -> None:
    """Errors: `DataError` for the beginning of an archive, of tables, or of text in a wide encoding
    without a mark.
    """
    found = next((said for magic, said in _REFUSED.items() if head.startswith(magic)), None)
    at, magic = _TAR
    if head[at : at + len(magic)] == magic:
        found = "a tar archive", "unpack it and give the files in it"
    if found is not None:
        raise DataError(f"{name} is {found[0]}, which is not read: {found[1]}.")
    head = head[:_HEAD_BYTES]
    if not head.startswith((*_MARKS, _PARQUET)) and head.count(0) > _MOST_NULS * len(head):
        raise DataError(
            f"{name} is no text: {head.count(0)} of its first {len(head)} bytes are NUL. If it is "
            "UTF-16 or UTF-32 without a byte order mark, make it UTF-8, for example with `iconv "
            "-f UTF-16LE -t UTF-8`."
        )


class _Rejoined(io.RawIOBase):
    """What was read already, then the rest."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        super().__init__()
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _open_pipe(name: str) -> BinaryIO:
    """Returns a pipe, open for reading. One that nobody writes to is waited for, but not for ever.
    Errors: `DataError`.
    """
    own = _own_descriptor(name)
    if own is not None:
        return os.fdopen(os.dup(own), "rb")
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        first = _first_byte(name, fd)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return io.BufferedReader(_Rejoined(first, os.fdopen(fd, "rb", buffering=0)))  # type: ignore[arg-type]


def _first_byte(name: str, fd: int) -> bytes:
    """Returns the first byte of a named pipe, or none when a writer is there that has not written
    yet.
    """
    deadline = time.monotonic() + WRITER_SECONDS
    while time.monotonic() < deadline:
        try:
            if first := os.read(fd, 1):
                return first
        except BlockingIOError:
            return b""
        time.sleep(_POLL_SECONDS)
    raise DataError(
        f"{name} is a pipe that nothing wrote to for {WRITER_SECONDS:g} seconds: start its writer "
        "first."
    )


def _own_descriptor(name: str) -> int | None:
    """N of /dev/stdin, /dev/fd/N and /proc/self/fd/N: the end that this process already holds."""
    if name == "/dev/stdin":
        return 0
    for folder in ("/dev/fd/", "/proc/self/fd/"):
        if name.startswith(folder) and name[len(folder) :].isdecimal():
            return int(name[len(folder) :])
    return None


def _library(packing: str, name: str) -> Any:
    if packing == "zstd":
        return optional.need_for_file("zstandard", name)
    module = {"gzip": "gzip", "bzip2": "bz2", "xz": "lzma"}[packing]
    try:
        return importlib.import_module(module)
    except ImportError as error:  # of the standard library, yet some builds of Python lack it
        raise UsageError(
            f"Reading {name} needs a Python that was built with {module}; unpack the file."
        ) from error


def _unpacked(file: TextFile) -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked."""
    library = _library(file.packing, file.name) if file.packing else None
    if file.packing == "zstd":
        yield from _gathered(_zstd(library, file.raw))
        return
    if file.packing in ("bzip2", "xz"):
        fresh = library.BZ2Decompressor if file.packing == "bzip2" else library.LZMADecompressor
        yield from _gathered(
            _streams(fresh, () if file.packing == "bzip2" else library.LZMAError, file.raw)
        )
        return
    unpacked: Any = gzip.GzipFile(fileobj=file.raw) if file.packing else file.raw
    try:
        while block := unpacked.read(BLOCK_BYTES):
            yield block
    except ValueError as error:
        raise EOFError(str(error)) from error


def _streams(fresh: Callable[[], Any], bad: Any, file: BinaryIO) -> Iterator[bytes]:
    """Yields the streams of a file one after the other, zeros between them aside; `fresh` makes
    what unpacks one.

    The classes of the standard library take a later stream that is damaged for the end of the file.
    """
    stream, data = None, b""
    while data or (data := file.read(_READ_BYTES)):
        if stream is None:
            data = data.lstrip(b"\0")
            stream = fresh() if data else None
            continue
        try:
            yield stream.decompress(data, BLOCK_BYTES)
            while not (stream.eof or stream.needs_input):
                yield stream.decompress(b"", BLOCK_BYTES)
        except bad as error:
            raise EOFError(str(error)) from error
        data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None:
        raise EOFError("a compressed stream has no end")


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the same bytes in blocks of at least BLOCK_BYTES, but for the last: pieces may be
    empty.
    """
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def _zstd(zstandard: Any, file: BinaryIO) -> Iterator[bytes]:
    frame = None
    while block := file.read(_FEED_BYTES):  # the file is buffered
        while block:
            frame = (
                frame
                or zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
            )
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _as_utf8(name: str, blocks: Iterator[bytes], packed: bool) -> Iterator[bytes]:
    """Yields the same text as UTF-8; a byte order mark of UTF-8 stays. Half a surrogate pair
    becomes bytes that no UTF-8 has, so that only the document that holds it is refused."""
    first = next(blocks, b"")
    if packed and (first.startswith(_PARQUET) or _packing_of(first)):
        what = "a packed Parquet file" if first.startswith(_PARQUET) else "packed twice"
        raise DataError(f"{name} is {what}, which is not read: unpack it once.")
    _refuse(name, first)
    codec = next((codec for mark, codec in _MARKS.items() if first.startswith(mark)), None)
    if codec is None:
        yield first
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(codec)("surrogatepass")
    try:
        yield decoder.decode(first).encode("utf-8", "surrogatepass")
        for block in blocks:
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise EOFError(f"not valid {codec.upper()}: {error.reason}") from error
