"""NF4, the 4-bit data type of QLoRA (Dettmers et al., arXiv 2305.14314), with double quantisation.

Bit for bit what bitsandbytes computes: a matrix, flattened by rows, is divided into blocks of 64;
each value is a code of 4 bits times the block's largest magnitude. Those magnitudes, less their
mean, are themselves codes of 8 bits in blocks of 256, of bitsandbytes' dynamic data type (arXiv
1511.04561). 0.516 bytes a value in all.

A piece of a matrix keeps the codes that the whole matrix has, so values do not depend on how it is
divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops.kernels import DTYPES, KERNELS

BLOCK, OUTER_BLOCK = 64, 256
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def pair_table(device: torch.device) -> Tensor:
    """Returns float32 `[256, 2]`: the levels of the high and of the low half of a byte."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
    return pairs.to(device)


@cache
def level_table(device: torch.device) -> Tensor:
    """Returns LEVELS as float32 `[16]`."""
    return torch.tensor(LEVELS, dtype=torch.float32).to(device)


@cache
def dynamic_table(device: torch.device) -> Tensor:
    """Returns float32 `[256]`, rising: seven decades, each with twice as many steps as the one
    below.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


def nearest_codes(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns the code `uint8 [n]` of each of `[n]` float32 values, and the largest magnitude of
    each block `[n / block]`.
    """
    blocks = F.pad(values, (0, -len(values) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    # As bitsandbytes: a product with the inverse for whole blocks, a quotient for the last one.
    scaled = (blocks * (1.0 / largest.clamp(min=1e-38))[:, None]).flatten()
    tail = len(values) % block
    if tail:
        scaled[-block:] = blocks[-1] / largest[-1].clamp(min=1e-38)
    middles = (table[:-1] + table[1:]) / 2
    codes = torch.bucketize(scaled[: len(values)].clamp(-1, 1), middles, out_int32=True)
    return codes.to(torch.uint8), largest


@dataclass(frozen=True)
class MatrixRange:
    """Rows and columns of a matrix `(R, C)`: `[begin, end)` of each."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    full: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def runs(self) -> tuple[int, int, int, int]:
        """How many contiguous runs it is, how long each is, where the first begins in the
        flattened matrix, and from one to the next.
        """
        (rows, columns), width = self.shape, self.full[1]
        begin = self.rows[0] * width + self.columns[0]
        return (1, rows * columns, begin, 0) if columns == width else (rows, columns, begin, width)

    @property
    def is_aligned(self) -> bool:
        """Whether every run is whole blocks, but for the end of the matrix."""
        count, length, begin, stride = self.runs
        ends = length % BLOCK == 0 or (count == 1 and begin + length == self.full[0] * self.full[1])
        return begin % BLOCK == 0 and stride % BLOCK == 0 and ends


@dataclass(frozen=True)
class Nf4:
    """A piece of a matrix in 4 bit.

    `codes` holds two values a byte, the first one in the high half. `scales` are the 8-bit codes of
    the blocks that the piece has, by runs; of all blocks of the matrix where runs are not whole
    blocks (then up to 1/64 byte per value of the whole matrix more). `outer` and `mean` are those
    of the whole matrix.
    """

    piece: MatrixRange
    codes: Tensor
    scales: Tensor
    outer: Tensor
    mean: Tensor

    @staticmethod
    def of(matrix: Tensor, piece: MatrixRange) -> Nf4:
        """Quantise the whole matrix `(R, C)` and keep a piece."""
        flat = matrix.to(torch.float32).flatten()
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=flat.device)
        codes, largest = nearest_codes(flat, levels, BLOCK)
        mean = largest.mean()
        scales, outer = nearest_codes(largest - mean, dynamic_table(flat.device), OUTER_BLOCK)
        rows, columns = slice(*piece.rows), slice(*piece.columns)
        own = codes.view(piece.full)[rows, columns].flatten()
        own = F.pad(own, (0, len(own) % 2), value=LEVELS.index(0.0))
        kept = scales[_blocks(piece, flat.device)].clone() if piece.is_aligned else scales
        return Nf4(piece, own[::2] << 4 | own[1::2], kept, outer, mean)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is stored."""
        stored = (self.codes, self.scales, self.outer, self.mean)
        return sum(x.numel() * x.element_size() for x in stored)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the piece in `dtype`, computed in float32."""
        piece, device = self.piece, self.codes.device
        kernels = KERNELS.of(self.outer) if piece.is_aligned and dtype in DTYPES else None
        if kernels is not None:
            out = self.outer.new_empty(piece.shape, dtype=dtype)
            stored = self.codes, self.scales.flatten(), self.outer, self.mean
            tables = level_table(device), dynamic_table(device)
            kernels.nf4_dequantise(*stored, *tables, *piece.runs, out)
            return out
        blocks = _blocks(piece, device)
        stored = blocks if piece.is_aligned else torch.arange(len(self.scales), device=device)
        scales = dynamic_table(device)[self.scales.to(torch.int32)]
        scales = scales * self.outer[stored // OUTER_BLOCK] + self.mean
        values = pair_table(device)[self.codes.to(torch.int32)].flatten()
        rows, columns = piece.shape
        values = values[: rows * columns]
        if piece.is_aligned:
            count, length = piece.runs[:2]
            values = F.pad(values.view(count, length), (0, -length % BLOCK))
            values = values.view(count, -1, BLOCK) * scales[..., None]
            values = values.view(count, -1)[:, :length]
        else:
            values = values * scales[blocks.flatten()]
        return values.reshape(piece.shape).to(dtype)


def _blocks(piece: MatrixRange, device: torch.device) -> Tensor:
    """Numbers of blocks of the flattened matrix: those of each run `[runs, blocks]`, or where runs
    are not whole blocks that of each value `[runs, length]`.
    """
    count, length, begin, stride = piece.runs
    firsts = begin + stride * torch.arange(count, device=device)
    step = BLOCK if piece.is_aligned else 1
    return (firsts[:, None] + torch.arange(0, length, step, device=device)) // BLOCK
