"""Opening a model folder that nobody vouches for: bounded JSON, plain files, checked safetensors
headers. Pure.

Only `*.safetensors` and JSON are ever read; nothing is executed. A header is checked completely
(sizes, offsets, overlaps, names) before a byte is allocated for a tensor, and may not describe far
more tensors than the file can hold, so memory is bounded by the file and by what is asked for.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError, UsageError

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
MAX_JSON_BYTES = 4 * 2**20  # config.json and friends
MAX_INDEX_BYTES = 32 * 2**20
MAX_HEADER_BYTES = 16 * 2**20
MAX_VALUES = (
    8 * 2**20
)  # commas and brackets in a JSON file: what each makes takes some hundred bytes
FREE_TENSORS, TENSOR_BYTES, TENSOR_VALUES = (
    4096,
    1024,
    16,
)  # a file may have more tensors only where it has the bytes
MAX_TENSORS = 500_000  # of all files together; each costs about a kilobyte of memory
MAX_DIMS = 8
MAX_ELEMENTS = 2**48

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}  # fmt: skip
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: `nbytes` bytes at byte `offset` of `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def is_model_folder(path: Path) -> bool:
    """Returns whether this is a Hugging Face folder (ours have a manifest.json or checkpoints/
    instead).
    """
    return (path / "config.json").is_file()


def plain_file(folder: Path, name: str) -> Path:
    """Returns the file `name` of the folder, links resolved. Errors: CheckpointError when it is not
    a plain file inside it.

    A link may point to the folder itself, or, as in the cache that Hugging Face's tools keep, from
    `snapshots/REVISION/` to `blobs/` beside `snapshots`.
    """
    if _PLAIN.fullmatch(name) is None:
        raise CheckpointError(
            f"{folder} names the file {name[:120]!r}; only plain names inside the folder are."
        )
    home = folder.resolve()
    try:
        found = (home / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / name} is missing or cannot be read.") from error
    allowed = {home}
    if home.parent.name == "snapshots":
        allowed.add(home.parent.parent / "blobs")
    if found.parent not in allowed:
        raise CheckpointError(
            f"{folder / name} is a link that leaves the folder (to {found}); it is not followed."
        )
    if not stat.S_ISREG(os.lstat(found).st_mode):
        raise CheckpointError(f"{folder / name} is not a regular file.")
    return found


def read_json(path: Path, limit: int = MAX_JSON_BYTES, values: int = MAX_VALUES) -> dict[str, Any]:
    """Returns a JSON object from a file of the folder. Errors: CheckpointError; too large, too deep
    or not JSON.
    """
    found = plain_file(path.parent, path.name)
    with open(found, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit} bytes; no file of this kind is.")
    return _decoded(data, str(path), values)


def _decoded(data: bytes, where: str, values: int) -> dict[str, Any]:
    found = sum(map(data.count, (b",", b"[", b"{")))
    if found > values:
        raise CheckpointError(
            f"{where} holds {found} values; more than {values} are refused: they fill the memory."
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not JSON that can be read: {str(error)[:200]}."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def catalogue(folder: Path) -> dict[str, TensorEntry]:
    """Returns every tensor of the folder's safetensors files, by their name. Errors:
    CheckpointError, UsageError.

    A single `model.safetensors` comes first; otherwise the index says which files there are.
    Pickles are refused, and so are adapters, which other readers would silently add to the weights
    or take instead of them.
    """
    if os.path.lexists(folder / ADAPTER):
        raise UsageError(
            f"{folder} holds an adapter ({ADAPTER}), so its weights alone are not the model: merge "
            "it first with peft (`model.merge_and_unload().save_pretrained(Y)`), or take the file "
            "away."
        )
    if os.path.lexists(folder / SINGLE):
        return read_header(plain_file(folder, SINGLE))
    if not os.path.lexists(folder / INDEX):
        raise UsageError(_no_weights(folder))
    weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES, 2 * MAX_TENSORS).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to file names.")
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX} names {name[:120]!r}; only .safetensors files are read."
            )
    headers: dict[str, dict[str, TensorEntry]] = {}
    for name in sorted(set(weight_map.values())):
        headers[name] = read_header(plain_file(folder, name))
        if sum(map(len, headers.values())) > MAX_TENSORS:
            raise CheckpointError(f"{folder} has more than {MAX_TENSORS} tensors; no model has.")
    found: dict[str, TensorEntry] = {}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise CheckpointError(
                f"{folder / INDEX} says that {name} holds {tensor[:120]}, but it does not."
            )
        found[tensor] = headers[name][tensor]
    for name, header in headers.items():
        for tensor in header:
            if weight_map.get(tensor) != name:
                raise CheckpointError(
                    f"{folder / name} holds {tensor[:120]}, which {INDEX} does not place there."
                )
    return found


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        return f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there."
    return (
        f"{folder} holds its weights as {pickles[0]}, a pickle, which can run code when it is "
        "read: refused. Convert it where nothing can be harmed, with transformers: "
        "`AutoModelForCausalLM.from_pretrained(X).save_pretrained(Y)` writes safetensors."
    )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Returns the checked header of one safetensors file. Errors: CheckpointError."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} is no safetensors file, or it is cut off: its header does not fit in it."
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} has a header of {length} bytes; more than {MAX_HEADER_BYTES} are refused."
            )
        data = file.read(length)
    values = TENSOR_VALUES * (
        FREE_TENSORS + size // TENSOR_BYTES
    )  # so that it takes a few times the file at most
    header = _decoded(data, f"The header of {path}", values)
    header.pop("__metadata__", None)
    begin = 8 + length
    entries = {
        name: _entry(path, name, value, begin, size - begin) for name, value in header.items()
    }
    position = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            what = (
                "overlaps another tensor" if entry.offset < position else "leaves a hole before it"
            )
            raise CheckpointError(
                f"{path}: the tensor {name[:120]} {what} (byte {entry.offset}, expected "
                f"{position})."
            )
        position += entry.nbytes
    if position != size:
        raise CheckpointError(
            f"{path} has {size - position} bytes after its last tensor, or is damaged."
        )
    return entries


def _entry(path: Path, name: str, value: Any, begin: int, room: int) -> TensorEntry:
    where = f"{path}: the tensor {name[:120]}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} needs exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where} has dtype {str(dtype)[:40]!r}; known are {', '.join(ITEM_BYTES)}."
        )
    if not _counts(shape) or len(shape) > MAX_DIMS or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where} has a shape or data_offsets that are no lists of whole numbers."
        )
    if not 0 <= offsets[0] <= offsets[1] <= room:
        raise CheckpointError(f"{where} lies at {offsets} of {room} bytes: outside the file.")
    if offsets[1] - offsets[0] != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{where} of shape {shape} and dtype {dtype} has {offsets[1] - offsets[0]} bytes."
        )
    return TensorEntry(path, dtype, tuple(shape), begin + offsets[0], offsets[1] - offsets[0])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_ELEMENTS for item in value
    )


def match_shapes(
    folder: Path, found: Mapping[str, TensorEntry], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that every wanted tensor is there with its shape. Errors: CheckpointError with the
    first few that are not.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [
        f"{name} has shape {found[name].shape}, config.json makes it {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f" ({len(problems)} in all)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder} does not hold the model of its config.json: {'; '.join(problems[:3])}{more}."
        )

def packing_problem(config: Any) -> str | None:
    """Returns what of a quantization_config is not read, None when all of it is."""
    if not isinstance(config, dict) or config.get("quant_method") not in ("mxfp4", "fp8"):
        method = config.get("quant_method") if isinstance(config, dict) else config
        return (
            f"quantization_config is of {str(method)[:40]!r}; mxfp4 and fp8 (block scales) are read"
        )
    block = config.get("weight_block_size")
    good = isinstance(block, list) and len(block) == 2
    good = good and all(type(n) is int and n > 0 for n in block)
    if config["quant_method"] == "fp8" and not (good and config.get("fmt", "e4m3") == "e4m3"):
        return (
            f"quantization_config has weight_block_size {str(block)[:40]} and fmt "
            f"{config.get('fmt')}; fp8 is read in blocks of two sizes and e4m3"
        )
    return None
