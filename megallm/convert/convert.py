"""`megallm convert`: a checkpoint to a Hugging Face folder and back, block by block, into a folder
that appears whole.

Whatever is read lies in another folder than what is written, and the output has a temporary name
until everything is in it, synced, and verified when that was asked for: a crash leaves nothing at
the final name.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from glob import escape
from math import prod
from pathlib import Path
from typing import Any

import torch

from megallm.base import files
from megallm.base.config import to_yaml
from megallm.base.errors import CheckpointError, InternalError, UsageError
from megallm.base.files import (
    TEMPORARY,
    atomic_write_json,
    atomic_write_text,
    fsync_dir,
    fsync_file,
    is_empty,
    temporary_name,
    writing,
)
from megallm.checkpoint import store
from megallm.checkpoint.io import DTYPE_NAMES, Part, raw
from megallm.checkpoint.plan import MAX_PIECE_BYTES, split_box
from megallm.checkpoint.reader import CheckpointReader
from megallm.checkpoint.shard_file import ShardWriter, header_bytes
from megallm.checkpoint.store import weights_only
from megallm.checkpoint.tools import resolve_step
from megallm.convert import tokenizer_files, verify
from megallm.convert.finite import check_finite
from megallm.convert.folder import INDEX, SINGLE, is_model_folder
from megallm.convert.hf_config import CONFIG, family_of, write_config
from megallm.convert.rules import Bridge
from megallm.convert.verify import TOLERANCE
from megallm.convert.weights import (
    PRECISIONS,
    Cast,
    HfReader,
    WeightSource,
    bridge_of,
    dtype_of,
    fill_theirs,
    is_state,
    stored_model,
)
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer import BYTES
from megallm.data.text.tokenizer_folder import TOKEN_IDS, TOKENIZER_FORMS, save_tokenizer_files
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Box

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MAX_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class ConvertRequest:
    """`target` is hf or megallm; `dtype` a key of DTYPES or None for the stored one."""

    target: str
    input: str
    output: str
    dtype: str | None = None
    verify: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False


class NotEqual(InternalError):
    """The converted model computes something else; `max_rel_error` is by how much."""

    def __init__(self, sentence: str, max_rel_error: float) -> None:
        super().__init__(sentence)
        self.max_rel_error = max_rel_error


def run(request: ConvertRequest) -> dict[str, Any]:
    """Convert; returns {output, family, dtype, tensors, bytes, notes, max_rel_error when verified}.

    Errors: UsageError, CheckpointError, CannotWrite; NotEqual when the logits differ from
    transformers' by more than TOLERANCE. With any of them nothing is left at the output.
    """
    output = Path(request.output)
    if request.verify:
        verify.check_available()
    check_output(output, request.input, request.overwrite)
    if not Path(request.input).is_dir():
        raise UsageError(
            f"--input {request.input} is not a folder; give a run, step or model folder."
        )
    abandoned = sorted(
        str(path) for path in output.absolute().parent.glob(f"{escape(output.name)}{TEMPORARY}*")
    )
    with whole_folder(output) as folder:
        done = to_hf(request, folder) if request.target == "hf" else to_megallm(request, folder)
    if abandoned:
        done["notes"].append(
            f"{', '.join(abandoned)}: left by a conversion that was killed, or another one that "
            "still runs; delete it in the first case"
        )
    return done


def check_output(output: Path, source: str, overwrite: bool) -> None:
    """Errors: UsageError for an output that is there already, unless it is an empty folder, or to
    be overwritten and such a folder as conversion writes: a model that does not hold `source`, and
    no training run."""
    if not overwrite or is_empty(output):
        files.check_new(output)
        return
    ours = is_model_folder(output) or (output / "checkpoints").is_dir()
    if (
        output.is_symlink()
        or not ours
        or any((output / name).exists() for name in ("metrics.jsonl", "run.yaml"))
    ):
        raise UsageError(
            f"--output {output} is not a folder that conversion made, or a run was trained in it "
            "since: --overwrite does not remove it. Choose another folder, or remove it yourself."
        )
    if Path(source).resolve().is_relative_to(output.resolve()):
        raise UsageError(f"--output {output} holds the input {source}: choose another folder.")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `output` that is synced and takes its name when the block
    ends well, else vanishes.
    """
    temporary = temporary_name(output.absolute())
    with writing(output):
        temporary.mkdir()
    try:
        yield temporary
        with writing(output):
            for path, _, files in os.walk(temporary, topdown=False):
                for name in files:
                    fsync_file(os.path.join(path, name))
                fsync_dir(path)
            old = temporary_name(output.absolute())
            if not is_empty(output):  # `check_output` allowed it
                os.rename(output, old)
            os.rename(temporary, output)
            shutil.rmtree(old, ignore_errors=True)
            fsync_dir(temporary.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # only there when something failed


# To Hugging Face.


def to_hf(request: ConvertRequest, folder: Path) -> dict[str, Any]:
    """Fill `folder` from the checkpoint `request.input`."""
    if is_model_folder(Path(request.input)):
        raise UsageError(
            f"--input {request.input} is a Hugging Face folder already; --to megallm converts it."
        )
    step = resolve_step(request.input, weights_only)
    with CheckpointReader(step) as reader:
        model = stored_model(reader)
        family = family_of(model)
        bridge = bridge_of(model, family.rules_of(model.head))
        missing = [name for name in bridge.ours if name not in reader.names()]
        if missing and isinstance(reader.meta, dict) and "base" in reader.meta:
            raise UsageError(
                f"--input {request.input} holds adapters alone: `megallm merge --model "
                f"{request.input} --output DIR` puts them into their base."
            )
        if missing:
            raise CheckpointError(f"{step} lacks {', '.join(missing[:3])}, which its model has.")
        dtype = DTYPES[request.dtype] if request.dtype else reader.info("embedding.weight")[1]
        source = Cast(reader)
        nbytes = write_weights(folder, bridge, source, dtype, request.max_shard_bytes)
        notes, ids = write_tokenizer(folder, step, reader.meta)
        if model.causal and model.head in ("classification", "value"):
            ids, more = tokenizer_files.choose_padding(folder, ids)
            notes += more
        atomic_write_json(folder / CONFIG, write_config(model, DTYPE_NAMES[dtype], ids))
        tokenizer_files.write_generation_config(folder, ids)
        if not is_import(reader) and not reader.meta.get("framed"):
            notes += tokenizer_files.begin_bare(folder)
        result = _result(request, family.name, dtype, len(bridge.theirs), nbytes, notes)
        if request.verify:
            _compare(result, model, Cast(reader, through=dtype), folder)
    return result


def write_weights(
    folder: Path, bridge: Bridge, source: WeightSource, dtype: torch.dtype, max_shard_bytes: int
) -> int:
    """Returns all tensors of theirs as safetensors of at most `max_shard_bytes` data each, with an
    index when there are more.

    Beside what the source holds, one block of at most MAX_PIECE_BYTES is in memory. Returns the
    bytes of the data.
    """
    dtypes = {name: dtype_of(bridge, name, dtype) for name in bridge.theirs}
    sizes = {name: prod(full) * dtypes[name].itemsize for name, full in bridge.theirs.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, start=1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        entries = [
            (name, DTYPE_NAMES[dtypes[name]], bridge.theirs[name], sizes[name]) for name in names
        ]
        with writing(folder / file), ShardWriter(folder / file) as out:
            out.write(header_bytes(entries, {"format": "pt"}))
            for name in names:
                full = bridge.theirs[name]
                for box in split_box(
                    Box((0,) * len(full), full), dtypes[name].itemsize, MAX_PIECE_BYTES
                ):
                    block = torch.empty(box.shape, dtype=dtypes[name])
                    fill_theirs(bridge, source, name, box, block)
                    check_finite(
                        block, name, box.offset, partial(_their_number, bridge, source, name)
                    )
                    out.write(raw(block))
                    del block  # before the next one is made
        weight_map |= dict.fromkeys(names, file)
        total += sum(nbytes for _, _, _, nbytes in entries)
    if len(shards) > 1:
        atomic_write_json(
            folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return total


def _their_number(bridge: Bridge, source: WeightSource, name: str, place: tuple[int, ...]) -> float:
    """One number of their tensor `name` in float64."""
    found = torch.empty((1,) * len(place), dtype=torch.float64)
    fill_theirs(bridge, source, name, Box(place, (1,) * len(place)), found)
    return float(found)


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into files of at most `limit` bytes; a tensor that is larger has a file
    to itself.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, nbytes in sizes.items():
        if shards[-1] and held + nbytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    return shards


def write_tokenizer(folder: Path, step: Path, meta: Any) -> tuple[list[str], tokenizer_files.Ids]:
    """Copy or make the tokenizer's files; notes, and the ids that begin, end and fill a text."""
    spec, kept = (
        tokenizer_files.checkpoint_tokenizer(step, meta),
        tokenizer_files.copied_folder(step),
    )
    if spec is not None:
        tokenizer_files.check_vocabulary(meta, spec, tokenizer.load(spec))
    if spec not in (None, BYTES):
        source = Path(spec)
        tokenizer_files.copy_tokenizer(source, folder) if source.is_dir() else save_tokenizer_files(
            spec, folder
        )
    elif kept is not None:
        tokenizer_files.copy_tokenizer(kept, folder, definition=False)
    if spec == BYTES:
        tokenizer_files.write_byte_tokenizer(folder)
    ids = tokenizer_files.token_ids(folder)
    (folder / TOKEN_IDS).unlink(missing_ok=True)  # config.json says it from here on
    return [] if spec is not None else [
        "no tokenizer is known for this checkpoint; add one to the folder"
    ], ids


# To megallm.


class LazyTensors:
    """What a checkpoint's Part needs of a tensor: shape, dtype and slices. A slice is read when it
    is asked for, and refused unless all of it is finite."""

    def __init__(
        self, source: WeightSource, name: str, full: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.source, self.name, self.shape, self.dtype = source, name, full, dtype
        self.itemsize = dtype.itemsize

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        """Returns the box that `slices` (with begin and end) cut out."""
        block = torch.empty([s.stop - s.start for s in slices], dtype=self.dtype)
        offset = tuple(s.start for s in slices)
        self.source.read_into(self.name, offset, block)
        check_finite(block, self.name, offset, self._number)
        return block

    def _number(self, place: tuple[int, ...]) -> float:
        """One number as the source has it."""
        found = torch.empty((1,) * len(place), dtype=torch.float64)
        self.source.read_into(self.name, place, found)
        return float(found)


def to_megallm(request: ConvertRequest, folder: Path) -> dict[str, Any]:
    """Fill `folder`, a run folder with one checkpoint of step 0, from the Hugging Face folder
    `request.input`.
    """
    if not is_model_folder(Path(request.input)):
        raise UsageError(f"--input {request.input} is no Hugging Face folder: it has no {CONFIG}.")
    with HfReader(request.input) as reader:
        dtype = DTYPES[request.dtype] if request.dtype else reader.dtype
        if dtype not in PRECISIONS:
            raise UsageError(
                f"--dtype {request.dtype}: a model of megallm is {', '.join(PRECISIONS.values())}."
            )
        reader.check_copies()
        lazy = [
            LazyTensors(
                reader, name, reader.info(name)[0], torch.float32 if is_state(name) else dtype
            )
            for name in reader.names()
        ]
        parts = [Part(part.name, part.shape, (0,) * len(part.shape), part) for part in lazy]
        spec = tokenizer_files.tokenizer_spec(reader.folder)
        meta = imported_meta(reader.model, dtype, spec if spec == BYTES else None)
        notes = list(reader.notes)
        tokenizer_files.copy_beside(reader.folder, folder, spec)
        if spec is None:
            notes.append(f"{reader.folder} has no {TOKENIZER_FORMS}; the result has no tokenizer")
        step = store.save(folder / "checkpoints", 0, parts, meta, Mesh.single())
        atomic_write_text(folder / "model.yaml", to_yaml_section(reader.model))
        nbytes = sum(prod(part.shape) * part.itemsize for part in lazy)
        result = _result(request, reader.model.family, dtype, len(lazy), nbytes, notes)
        if request.verify:
            with CheckpointReader(step) as written:
                _compare(result, reader.model, Cast(written), reader.folder, round_theirs=dtype)
    return result


IMPORTED = "import"


def imported_meta(
    model: ModelConfig, dtype: torch.dtype, tokenizer: str | None = None
) -> dict[str, Any]:
    """Returns the meta of a checkpoint that conversion made: weights only, no history of
    training.
    """
    described = asdict(model.described)
    return {
        "kind": IMPORTED,
        "model": described,
        "precision": PRECISIONS[dtype],
        "tokenizer": tokenizer,
    }


def is_import(reader: CheckpointReader) -> bool:
    """Returns whether conversion made this checkpoint: weights without a history of training."""
    return isinstance(reader.meta, dict) and reader.meta.get("kind") == IMPORTED


def to_yaml_section(model: ModelConfig) -> str:
    """Returns the `model:` section of a training configuration for this model."""
    lines = to_yaml(model.described).splitlines()
    return (
        "\n".join(["model:", *(f"  {line}" for line in lines if not line.endswith(": null"))])
        + "\n"
    )


def _result(
    request: ConvertRequest,
    family: str,
    dtype: torch.dtype,
    tensors: int,
    nbytes: int,
    notes: list[str],
) -> dict[str, Any]:
    return {
        "output": request.output,
        "family": family,
        "dtype": DTYPE_NAMES[dtype],
        "tensors": tensors,
        "bytes": nbytes,
        "notes": notes,
    }


def _compare(
    result: dict[str, Any],
    model: ModelConfig,
    ours: WeightSource,
    theirs: Path,
    round_theirs: torch.dtype | None = None,
) -> None:
    """Add what the comparison found to the result. Errors: NotEqual."""
    compared = verify.compare(model, ours, theirs, round_theirs)
    error = compared.max_rel_error
    if not error <= TOLERANCE:
        raise NotEqual(
            f"The logits differ from those of transformers by {error:.2e} of the largest; at most "
            f"{TOLERANCE:g} is accepted in float32. Nothing was written; please report the "
            "model's config.json.",
            error,
        )
    result |= dataclasses.asdict(compared)
    if compared.left_out:
        result["notes"].append(
            f"{compared.left_out} of {compared.positions} positions differ by up to "
            f"{compared.max_rel_error_everywhere:.1e}: there the logits of transformers alone move "
            "as far when the last bits of its inputs do, so float32 cannot judge them; all others "
            "agree"
        )
