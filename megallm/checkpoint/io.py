"""The bytes of a checkpoint: shard files in safetensors layout, written and read one hashed piece
at a time.

A shard file opens in any safetensors reader. Its keys are the logical names; a piece that is not
the whole tensor is `NAME@o0,o1,...`, its offset in the logical tensor. At most one piece (64 MiB)
is in memory beside the tensors of the caller, on both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megallm.base.errors import CheckpointError, InternalError
from megallm.base.files import writing
from megallm.checkpoint.manifest import (
    FileRecord,
    Manifest,
    StoredPiece,
    TensorRecord,
    digest,
)
from megallm.checkpoint.plan import MAX_PIECE_BYTES, outside_problem, split_box
from megallm.checkpoint.shard_file import ShardWriter, header_bytes, read_regular
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


@dataclass(frozen=True)
class ShardPlan:
    """What a shard file is going to hold: a header, then each box of a part at its byte offset."""

    parts: Sequence[Part]
    header: bytes
    pieces: tuple[tuple[Part, Box, int], ...]
    nbytes: int

    def record(
        self, name: str, digests: Sequence[str]
    ) -> tuple[FileRecord, dict[str, TensorRecord]]:
        """Returns what the manifest says of the file `name`; `digests` are those of the pieces."""
        held: dict[str, list[StoredPiece]] = {part.name: [] for part in self.parts}
        for (part, box, offset), hexadecimal in zip(self.pieces, digests, strict=True):
            held[part.name].append(StoredPiece(name, offset, box, hexadecimal))
        table = {}
        for part in self.parts:
            dtype = DTYPE_NAMES[part.tensor.dtype]
            table[part.name] = TensorRecord(tuple(part.full), dtype, tuple(held[part.name]))
        return FileRecord(self.nbytes, len(self.header), digest(self.header)), table


def plan_shard(parts: Sequence[Part], max_piece_bytes: int = MAX_PIECE_BYTES) -> ShardPlan:
    """Returns the plan of the file that holds `parts`. Errors: `InternalError` for a part that
    cannot be stored.
    """
    cut = _cut(parts, max_piece_bytes)
    header = header_bytes(
        [(_key(part, box), DTYPE_NAMES[part.tensor.dtype], box.shape, box.size * part.tensor.itemsize)
         for part, box in cut],
        {"format": "megallm"},
    )  # fmt: skip
    pieces, position = [], len(header)
    for part, box in cut:
        pieces.append((part, box, position))
        position += box.size * part.tensor.itemsize
    return ShardPlan(parts, header, tuple(pieces), position)


def write_shard(
    path: Path, parts: Sequence[Part], max_piece_bytes: int = MAX_PIECE_BYTES
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """Write the parts of this rank to `path`, hash each piece, sync; returns what the manifest says
    about them.

    Errors: `CannotWrite` when the file cannot be written, `InternalError` for a part that cannot be
    stored.
    """
    plan = plan_shard(parts, max_piece_bytes)
    digests = []
    with writing(path), ShardWriter(path) as file:
        file.write(plan.header)
        for part, box, _ in plan.pieces:
            data = raw(part.tensor[box.slices(part.box)])
            digests.append(digest(data))
            file.write(data)
            del data  # before the next piece is copied: one at a time
    return plan.record(path.name, digests)


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
