"""Weights that a folder holds in 4 or 8 bit with scales, seen as bf16 tensors and read in blocks.

MXFP4 (OCP Microscaling v1.0; gpt-oss): `X_blocks` uint8 `[..., rows, K / 32, 16]`, two e2m1 numbers
a byte, the low half first, and `X_scales` uint8 `[..., rows, K / 32]`, exponents of 2 counted from
127. FP8 (DeepSeek-V3): `X` float8 e4m3 `[rows, K]` and `X_scale_inv` float32, one factor for each
block of rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallm.base.errors import CheckpointError
from megallm.convert.folder import TensorEntry

MXFP4, FP8 = "MXFP4", "FP8"
GROUP = 32  # numbers that share an MXFP4 scale
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = _E2M1 + tuple(-value for value in _E2M1)
ReadBytes = Callable[[TensorEntry, int, int], bytearray]


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """A tensor of numbers with scales; `dtype` is MXFP4 or FP8, `shape` that of the numbers."""

    scales: TensorEntry | None = None
    block: tuple[int, int] = (1, GROUP)  # rows and columns that share a scale

    def rows(self, read: ReadBytes, first: int, count: int) -> Tensor:
        """Returns float32 rows `[count, K]`, counted through the stack."""
        return (_mxfp4 if self.dtype == MXFP4 else _fp8)(self, read, first, count)


def _mxfp4(entry: PackedEntry, read: ReadBytes, first: int, count: int) -> Tensor:
    size = entry.shape[-1]
    packed = torch.frombuffer(read(entry, first * size // 2, count * size // 2), dtype=torch.uint8)
    both = torch.stack((packed & 15, packed >> 4), -1).view(count, size // GROUP, GROUP)
    groups = size // GROUP
    raw = torch.frombuffer(read(entry.scales, first * groups, count * groups), dtype=torch.uint8)
    exponents = raw.to(torch.int32).sub_(127).view(count, groups, 1)
    numbers = torch.tensor(_VALUES)[both.to(torch.int64)]
    return torch.ldexp(numbers, exponents).view(count, size)


def _fp8(entry: PackedEntry, read: ReadBytes, first: int, count: int) -> Tensor:
    size, (tall, wide) = entry.shape[-1], entry.block
    raw = read(entry, first * size, count * size)
    numbers = torch.frombuffer(raw, dtype=torch.float8_e4m3fn).view(count, size).to(torch.float32)
    across = -(-size // wide)
    top, bottom = first // tall, (first + count - 1) // tall + 1
    raw = read(entry.scales, top * across * 4, (bottom - top) * across * 4)
    scales = torch.frombuffer(raw, dtype=torch.float32).view(bottom - top, across)
    places = torch.arange(first, first + count) // tall - top
    return numbers * scales[places].repeat_interleave(wide, 1)[:, :size]


def unpacked(found: Mapping[str, TensorEntry], config: Any) -> dict[str, TensorEntry]:
    """Returns the tensors of a folder with numbers and scales joined; `config` is the
    quantization_config, None without one. Errors: CheckpointError for scales of another shape.
    """
    if config is None:
        return dict(found)
    method, entries = config["quant_method"], dict(found)
    for name, entry in found.items():
        if method == "mxfp4" and name.endswith("_blocks"):
            scales = entries.pop(f"{name.removesuffix('blocks')}scales", None)
            shape, wanted = (*entry.shape[:-2], entry.shape[-2] * GROUP), entry.shape[:-1]
            _check(name, entry, scales, wanted, ("U8", "U8"))
            entries[name] = _packed(entry, MXFP4, shape, scales, (1, GROUP))
        elif method == "fp8" and f"{name}_scale_inv" in found:
            scales, block = entries.pop(f"{name}_scale_inv"), tuple(config["weight_block_size"])
            wanted = tuple(-(-n // b) for n, b in zip(entry.shape, block, strict=False))
            _check(name, entry, scales, wanted, ("F8_E4M3", "F32"))
            entries[name] = _packed(entry, FP8, entry.shape, scales, block)
    return entries


def _packed(
    entry: TensorEntry,
    kind: str,
    shape: tuple[int, ...],
    scales: TensorEntry,
    block: tuple[int, ...],
) -> PackedEntry:
    return PackedEntry(entry.path, kind, shape, entry.offset, entry.nbytes, scales, block)


def _check(
    name: str,
    entry: TensorEntry,
    scales: TensorEntry | None,
    wanted: tuple[int, ...],
    dtypes: tuple[str, str],
) -> None:
    if scales is None or scales.shape != wanted or (entry.dtype, scales.dtype) != dtypes:
        found = "none" if scales is None else f"{scales.dtype} {scales.shape}"
        raise CheckpointError(
            f"{name} is {entry.dtype} {entry.shape} with scales {found}; it must be {dtypes[0]} "
            f"with scales {dtypes[1]} {wanted}."
        )
