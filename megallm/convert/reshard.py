"""A checkpoint written again as the ranks of another layout would have written it, by one process.

Checkpoints are read at any layout; after this each rank of the new one finds what it reads in one
file. Nothing is computed: bytes are copied piece by piece, hashes checked on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallm.base.errors import CheckpointError, MegallmError
from megallm.base.files import writing
from megallm.base.progress import Progress, quiet
from megallm.checkpoint import store
from megallm.checkpoint.io import Part, write_shard
from megallm.checkpoint.reader import CheckpointReader, step_name
from megallm.checkpoint.store import RetentionPolicy
from megallm.checkpoint.tools import resolve_step
from megallm.convert.convert import check_output, whole_folder
from megallm.convert.tokenizer_files import copied_folder
from megallm.convert.weights import stored_model
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.stages import head_work, plan_stages
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.schedule import place
from megallm.parallel.shard import Box, Shard, named_shards, piece


@dataclass(frozen=True)
class ReshardRequest:
    """`layout` is that of the ranks whose files are written; `output` becomes a run folder."""

    source: str
    output: str
    layout: LayoutConfig
    overwrite: bool = False


class StoredBox:
    """A box of a stored tensor as what `Part` needs of one: shape, dtype and slices that are read
    when asked for.
    """

    def __init__(self, reader: CheckpointReader, name: str, box: Box) -> None:
        self.reader, self.name, self.box = reader, name, box
        self.shape, self.dtype = box.shape, reader.info(name)[1]
        self.itemsize = self.dtype.itemsize

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        """Returns the box that `slices` (with begin and end) cut out."""
        block = torch.empty([s.stop - s.start for s in slices], dtype=self.dtype)
        offset = tuple(o + s.start for o, s in zip(self.box.offset, slices, strict=True))
        self.reader.read_into(self.name, offset, block)
        return block


def reshard(request: ReshardRequest, progress: Progress = quiet) -> dict[str, Any]:
    """Write the run folder `request.output` with one checkpoint, equal in every logical byte;
    returns {output, step, files, tensors, bytes}.

    Errors: UsageError for an impossible layout, CheckpointError, CannotWrite; with any of them
    nothing is left at the output.
    """
    output, layout = Path(request.output), request.layout.grid()
    check_output(output, request.source, request.overwrite)
    step = resolve_step(request.source, lambda name: True)
    with CheckpointReader(step) as reader, whole_folder(output) as folder:
        homes = _homes(stored_model(reader), request.layout)
        written = _write(reader, folder / "checkpoints", homes, layout, progress)
        beside = copied_folder(step)
        if beside is not None:
            with writing(folder):
                shutil.copytree(beside, folder / beside.name)
        return {"output": request.output, "step": reader.step, **written}


def _homes(model: ModelConfig, layout: LayoutConfig) -> dict[str, tuple[int, Shard]]:
    """Returns of each parameter the pipeline rank that owns it and how it is divided there."""
    placement = place(layout.schedule, layout.pp, layout.chunks)
    spans = plan_stages(model.num_layers, placement.num_stages, layout.stages, head_work(model))
    homes: dict[str, tuple[int, Shard]] = {}
    for number, span in enumerate(spans):
        for name, _, shard in named_shards(Stage(model, Mesh.single("meta"), span)):
            homes.setdefault(name, (placement.rank_of(number), shard))
    return homes


def _write(
    reader: CheckpointReader,
    root: Path,
    homes: Mapping[str, tuple[int, Shard]],
    layout: Layout,
    progress: Progress,
) -> dict[str, Any]:
    keeping = RetentionPolicy()
    begun = store.begin_save(root, reader.step, keeping)
    store.raise_failure(begun)
    folder, reports = root / begun["folder"], []
    try:
        for rank in range(layout.world):
            progress("writing", rank, layout.world, "files")
            parts = list(_parts(reader, homes, layout, rank))
            if parts:
                name = store.shard_name(rank)
                reports.append(store.shard_report(name, *write_shard(folder / name, parts)))
    except MegallmError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    manifest = store.assemble(reader.step, reports, reader.meta)
    store.raise_failure(store.finish_save(root, folder, keeping, lambda: manifest))
    if {n: (t.full, t.dtype) for n, t in manifest.tensors.items()} != {
        n: (t.full, t.dtype) for n, t in reader.manifest.tensors.items()
    }:
        raise CheckpointError(f"{root / step_name(reader.step)} lacks tensors of {reader.folder}.")
    return {
        "files": len(manifest.files),
        "tensors": len(manifest.tensors),
        "bytes": manifest.nbytes,
    }


def _parts(
    reader: CheckpointReader, homes: Mapping[str, tuple[int, Shard]], layout: Layout, rank: int
) -> Iterator[Part]:
    """The boxes that a rank owns. State of the optimizer is divided over replicas too, as with
    ZeRO; what belongs to no parameter stands on rank 0.
    """
    coords = layout.coords(rank)
    for name in reader.names():
        full, _ = reader.info(name)
        stage, shard = homes.get(_parameter(name, homes), (0, Shard(full)))
        if shard.full != full:
            stage, shard = 0, Shard(full)
        if coords["pp"] != stage:
            continue
        box = shard.box(layout, coords)
        replicas = "edp" if shard.expert else "dp"
        if name.startswith("optim.") and full:
            begin, end = piece(box.shape[0], layout.size(replicas), coords[replicas])
            offset = (box.offset[0] + begin, *box.offset[1:])
            box = Box(offset, (end - begin, *box.shape[1:]))
            mine = shard.owned({**coords, replicas: 0})
        else:
            mine = shard.owned(coords)
        if mine:
            yield Part(name, full, box.offset, StoredBox(reader, name, box))


def _parameter(name: str, homes: Mapping[str, tuple[int, Shard]]) -> str:
    """Returns the parameter that a tensor of the state belongs to: `optim.exp_avg.NAME` to NAME."""
    rest = name
    while rest not in homes and "." in rest:
        rest = rest.partition(".")[2]
    return rest
