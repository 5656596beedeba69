"""`megallm merge`: a base and an adapter of PEFT's become a full Hugging Face folder, tensor by
tensor."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.base.files import atomic_write_json
from megallm.checkpoint.io import DTYPE_NAMES
from megallm.checkpoint.store import weights_only
from megallm.checkpoint.tools import resolve_step
from megallm.convert import tokenizer_files
from megallm.convert.convert import (
    DTYPES,
    MAX_SHARD_BYTES,
    check_output,
    whole_folder,
    write_tokenizer,
    write_weights,
)
from megallm.convert.folder import is_model_folder
from megallm.convert.hf_config import CONFIG, family_of, write_config
from megallm.convert.weights import HfReader, bridge_of
from megallm.peft.adapted import open_adapted
from megallm.peft.merge import MergedSource


@dataclass(frozen=True)
class MergeRequest:
    """`model` is a Hugging Face folder, a run or a step folder, `adapter` a folder of PEFT's or the
    run that wrote one, None where the run `model` holds adapters itself; `dtype` is a key of
    `convert.DTYPES`, or None for the base's.
    """

    model: str
    adapter: str | None
    output: str
    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False


def run(request: MergeRequest) -> dict[str, Any]:
    """Merge; returns {output, family, dtype, tensors, bytes, notes}.

    Errors: UsageError, CheckpointError, CannotWrite; then nothing is left at the output.
    """
    output = Path(request.output)
    check_output(output, request.model, request.overwrite)
    for name, path in (("--model", request.model), ("--adapter", request.adapter)):
        if path is not None and not Path(path).is_dir():
            raise UsageError(f"{name} {path} is not a folder.")
    with whole_folder(output) as folder:
        return _fill(request, folder)


def _fill(request: MergeRequest, folder: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        place = Path(request.model)
        place = place if is_model_folder(place) else resolve_step(place, weights_only)
        opened = stack.enter_context(open_adapted(place, request.adapter))
        reader, model, base = opened.reader, opened.model, opened.base
        if opened.adapter is None:
            raise UsageError(
                f"--model {request.model} is a plain model: give --adapter A, a folder of PEFT's "
                "or the run that wrote one."
            )
        notes = list(base.notes) if isinstance(base, HfReader) else []
        stored = base.dtype if isinstance(base, HfReader) else base.info("embedding.weight")[1]
        if isinstance(reader, HfReader):
            tokenizer_files.copy_tokenizer(reader.folder, folder)
            ids = tokenizer_files.token_ids(reader.folder)
        else:
            more, ids = write_tokenizer(folder, place, reader.meta)
            notes += more
        if opened.config.quantize != "none":
            notes.append(
                "merged into the values that the base had in 4 bit, as the adapter was trained"
            )
        source = MergedSource(base, opened.adapter, opened.config, model)
        if source.model.tie_embeddings != model.tie_embeddings:
            notes.append(
                "the head is no longer tied to the embedding: the adapter changes one alone"
            )
        dtype = DTYPES[request.dtype] if request.dtype else stored
        family = family_of(source.model)
        bridge = bridge_of(source.model, family.rules_of(source.model.head))
        nbytes = write_weights(folder, bridge, source, dtype, request.max_shard_bytes)
    atomic_write_json(folder / CONFIG, write_config(source.model, DTYPE_NAMES[dtype], ids))
    tokenizer_files.write_generation_config(folder, ids)
    return {
        "output": request.output,
        "family": family.name,
        "dtype": DTYPE_NAMES[dtype],
        "tensors": len(bridge.theirs),
        "bytes": nbytes,
        "notes": notes,
    }
