"""The bytes of a checkpoint: shard files in safetensors layout, written and read one hashed piece
at a time.

A shard file opens in any safetensors reader. Its keys are the logical names; a piece that is not
the whole tensor is `NAME@o0,o1,...`, its offset in the logical tensor. At most one piece (64 MiB)
is in memory beside the tensors of the caller, on both ways.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.base.errors import CheckpointError, InternalError
from megallm.base.files import writing
from megallm.checkpoint.manifest import (
    DTYPES,
    FileRecord,
    Manifest,
    StoredPiece,
    TensorRecord,
    digest,
)
from megallm.checkpoint.plan import MAX_PIECE_BYTES, outside_problem, split_box
from megallm.parallel.shard import Box

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """A box of a logical tensor that this rank holds and owns.

    `tensor` has the shape of the box, at `offset` in the tensor `name` of shape `full`; any device,
    any strides.
    """

    name: str
    full: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def box(self) -> Box:
        return Box(tuple(self.offset), tuple(self.tensor.shape))


def dtype_name(dtype: torch.dtype, name: str) -> str:
    """Returns the manifest's word for a torch dtype. Errors: InternalError for one that checkpoints
    cannot hold.
    """
    if dtype not in DTYPE_NAMES:
        raise InternalError(
            f"Tensor {name} has dtype {dtype}; a checkpoint holds "
            f"{', '.join(DTYPE_NAMES.values())}."
        )
    return DTYPE_NAMES[dtype]


def raw(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor in C order, on the CPU; copies only what is not already
    contiguous there.
    """
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def header_bytes(
    entries: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]
) -> bytes:
    """Returns a safetensors header (length prefix, JSON, spaces to a multiple of 8).

    `entries` are `(key, dtype name, shape, bytes)` in the order of their data, which follows
    without gaps.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, dtype, shape, nbytes in entries:
        header[key] = {
            "dtype": DTYPES[dtype][0],
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    path: Path, parts: Sequence[Part], max_piece_bytes: int = MAX_PIECE_BYTES
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """Write the parts of this rank to `path`, hash each piece, sync; returns what the manifest says
    about them.

    Errors: `CannotWrite` when the file cannot be written, `InternalError` for a part that cannot be
    stored.
    """
    pieces = _cut(parts, max_piece_bytes)
    header = header_bytes(
        [(_key(part, box), DTYPE_NAMES[part.tensor.dtype], box.shape, box.size * part.tensor.itemsize)
         for part, box in pieces],
        {"format": "megallm"},
    )  # fmt: skip
    held: dict[str, list[StoredPiece]] = {part.name: [] for part in parts}
    with writing(path), ShardWriter(path) as file:
        file.write(header)
        for part, box in pieces:
            data = raw(part.tensor[box.slices(part.box)])
            held[part.name].append(StoredPiece(path.name, file.position, box, digest(data)))
            file.write(data)
            del data  # before the next piece is copied: one at a time
        record = FileRecord(file.position, len(header), digest(header))
    table = {
        part.name: TensorRecord(
            tuple(part.full), DTYPE_NAMES[part.tensor.dtype], tuple(held[part.name])
        )
        for part in parts
    }
    return record, table


def _cut(parts: Sequence[Part], max_piece_bytes: int) -> list[tuple[Part, Box]]:
    """Returns the pieces in file order: widest elements first, so that every piece is aligned to
    its element.
    """
    pieces = []
    known: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for part in parts:
        dtype_name(part.tensor.dtype, part.name)
        if known.setdefault(part.name, (tuple(part.full), part.tensor.dtype)) != (
            tuple(part.full),
            part.tensor.dtype,
        ):
            raise InternalError(f"Two parts of tensor {part.name} differ in full shape or dtype.")
        problem = outside_problem(part.full, part.box)
        if problem is not None:
            raise InternalError(f"A part of tensor {part.name} cannot be stored: {problem}.")
        pieces += [
            (part, box) for box in split_box(part.box, part.tensor.itemsize, max_piece_bytes)
        ]
    return sorted(pieces, key=lambda item: (-item[0].tensor.itemsize, item[0].name, item[1].offset))


def _key(part: Part, box: Box) -> str:
    if box.shape == tuple(part.full):
        return part.name
    return f"{part.name}@{','.join(map(str, box.offset))}"


class ShardWriter:
    """An unbuffered new file that counts its bytes and is synced when the block ends without an
    error.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.position = 0

    def write(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            count = os.write(self.fd, view)
            self.position += count
            view = view[count:]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self.fd)
        finally:
            os.close(self.fd)


def read_regular(
    path: Path, offset: int, nbytes: int | None, file_bytes: int | None = None
) -> bytearray:
    """Returns `nbytes` bytes (None: the whole file) at `offset` of a regular file that is no
    symbolic link.

    `file_bytes` is the size the file must have. Errors: `CheckpointError` when it is missing, of
    another kind or size, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            problem = size_problem(os.fstat(fd), file_bytes)
            if problem is not None:
                raise CheckpointError(f"{path} {problem}.")
            size = os.fstat(fd).st_size - offset if nbytes is None else nbytes
            return _read_exactly(fd, offset, size, path)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def size_problem(status: os.stat_result, file_bytes: int | None) -> str | None:
    """Returns why a file is not the regular file of `file_bytes` bytes that the manifest
    promises.
    """
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file (symbolic links are refused)"
    if file_bytes is not None and status.st_size != file_bytes:
        return f"has {status.st_size} bytes, the manifest says {file_bytes}"
    return None


def _read_exactly(fd: int, offset: int, nbytes: int, path: Path) -> bytearray:
    buffer = bytearray(nbytes)
    view = memoryview(buffer)
    position = 0
    while position < nbytes:
        count = os.preadv(fd, [view[position:]], offset + position)
        if count == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset + position}, {nbytes - position} bytes too early."
            )
        position += count
    return buffer


class PieceReader:
    """Reads verified pieces of one step folder; keeps the last one, so that neighbouring boxes cost
    one read.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._verified_headers: set[str] = set()
        self._last: tuple[StoredPiece, torch.Tensor] | None = None

    def check_header(self, file: str) -> None:
        """Errors: `CheckpointError` when the safetensors header of `file` does not match its
        hash.
        """
        if file in self._verified_headers:
            return
        record = self.manifest.files[file]
        header = read_regular(self.folder / file, 0, record.header_bytes, record.nbytes)
        if digest(header) != record.header_digest:
            raise CheckpointError(
                f"{self.folder / file} is damaged: its header does not match the manifest's hash."
            )
        self._verified_headers.add(file)

    def load(self, name: str, piece: StoredPiece) -> torch.Tensor:
        """Returns the bytes of a piece as a CPU tensor of the box's shape, after its hash was
        checked.

        Errors: `CheckpointError` that names tensor, file and byte range.
        """
        if self._last is not None and self._last[0] is piece:
            return self._last[1]
        self._last = None  # free the old piece before the new one is read
        self.check_header(piece.file)
        tensor = self.manifest.tensors[name]
        nbytes = piece.box.size * tensor.itemsize
        buffer = read_regular(
            self.folder / piece.file, piece.offset, nbytes, self.manifest.files[piece.file].nbytes
        )
        if digest(buffer) != piece.digest:
            raise CheckpointError(
                f"Tensor {name} is damaged in {self.folder / piece.file}, bytes {piece.offset} to "
                f"{piece.offset + nbytes}: they do not match the manifest's hash."
            )
        loaded = torch.frombuffer(buffer, dtype=TORCH_DTYPES[tensor.dtype]).view(piece.box.shape)
        self._last = (piece, loaded)
        return loaded


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies `source` into `target`, both of one dtype; one-byte floats go as raw bytes (not every
    device can copy them).
    """
    if source.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        target, source = target.view(torch.uint8), source.view(torch.uint8)
    target.copy_(source)
