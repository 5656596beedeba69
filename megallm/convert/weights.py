"""Sources of weights: anything with `names`, `info` and `read_into`, whatever the bytes lie in.

`HfReader` reads a Hugging Face folder by logical name; `Cast` lets a checkpoint's Reader fill
tensors of another dtype. Both hold one block of at most BLOCK_BYTES (one row where a row is longer)
beside the caller's tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint.plan import outside_problem, split_box
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.families import Family
from megallm.convert.folder import TensorEntry, catalogue, match_shapes
from megallm.convert.hf_config import read_config
from megallm.convert.packed import FP8, MXFP4, PackedEntry, unpacked
from megallm.convert.rules import Bridge, Counts, WeightRule, plan_bridge
from megallm.convert.tokenizer_files import tokenizer_spec
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.stages import StageSpan
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Box, WeightSource, named_shards

BODY = {
    "head": "none",
    "head_bias": False,
    "head_dense_bias": False,
    "num_labels": None,
    "pooler": False,
    "tie_embeddings": False,
}
BLOCK_BYTES = 16 * 2**20
MAX_LAYERS = 4096  # each costs 40 KiB and a millisecond before its tensors are looked at
MASTER = "optim.master."

HF_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the full shape of each logical tensor of a resolved model, from the built model's own
    Shard records, and of its state beside parameters."""
    shards = named_shards(whole_stage(replace(model, critic=None), Mesh.single("meta")))
    return {name: tuple(shard.full) for name, _, shard in shards} | model.state_shapes()


def stored_dtype(entry: TensorEntry) -> torch.dtype:
    """Returns the dtype of a stored tensor's numbers; those with scales are read into bf16."""
    return HF_DTYPES.get(entry.dtype, torch.bfloat16)


def _head(model: ModelConfig) -> tuple[Any, ...]:
    return model.head, model.num_labels, model.pooler


def is_state(name: str) -> bool:
    """Returns whether a logical tensor is state (`ModelConfig.state_shapes`), float32 whatever the
    weights are.
    """
    return name.endswith(".router.bias")


def counts_of(model: ModelConfig) -> Counts:
    """Returns how often the rules of a resolved model are spelled out."""
    experts, depths = model.moe.num_experts, model.mtp.depth
    heads = model.num_heads, model.num_kv_heads
    return Counts(model.num_layers, experts, depths, *heads, model.rope_size)


def bridge_of(model: ModelConfig, rules: Iterable[WeightRule]) -> Bridge:
    """Returns the rules of a family applied to a resolved model."""
    return plan_bridge(rules, logical_shapes(model), counts_of(model))


def dtype_of(bridge: Bridge, theirs: str, dtype: torch.dtype) -> torch.dtype:
    """Returns what a tensor of theirs is written as in a folder of `dtype`."""
    return torch.float32 if is_state(bridge.by_theirs[theirs][0].ours) else dtype


def whole_stage(model: ModelConfig, mesh: Mesh) -> Stage:
    """Returns all layers of the model in one stage, with parameters on the meta device."""
    return Stage(model, mesh, StageSpan(0, model.num_layers, True, True))


class HfReader:
    """A Hugging Face folder, read by logical name; a context manager. Nothing of the folder is
    executed.

    `meta` is what `generate` asks a checkpoint for: the model, the precision that holds its weights
    exactly, and where its tokenizer is. Errors: UsageError for a model that megallm cannot compute,
    CheckpointError for a folder that is damaged or not what its config.json says.

    `wanted` is the model to train, which may have another head than the folder: then `names` are
    those of the body. It may also predict fewer further tokens.
    """

    def __init__(self, folder: str | os.PathLike[str], wanted: ModelConfig | None = None) -> None:
        self.folder = Path(folder)
        described = read_config(self.folder)
        self.model, self.notes = described.model, described.notes
        found = unpacked(catalogue(self.folder), described.raw.get("quantization_config"))
        family = described.family
        _check_size(self.folder, self.model, found)
        self.new_head = wanted is not None and _head(wanted) != _head(self.model)
        if self.new_head:
            self.model = wanted
        elif self.model.head == "none" and not any("pooler." in name for name in found):
            self.model = replace(self.model, pooler=False)
        named = self._named(found, family)
        self.blocks = described.model.num_blocks
        if wanted is not None and wanted.mtp.depth < self.model.mtp.depth:
            self.model = replace(self.model, mtp=wanted.mtp)
        stored = replace(self.model, **BODY) if self.new_head else self.model
        rules = family.rules_of(self.model.head, fused=family.is_fused(named))
        self.bridge = bridge_of(
            stored, [each for each in rules if not (self.new_head and each.of_head)]
        )
        self.entries = self._own(named, family)
        needed = {
            name: full
            for name, full in self.bridge.theirs.items()
            if name not in self.bridge.copies
        }
        match_shapes(
            self.folder, self.entries, needed | {n: self.bridge.theirs[n] for n in self.entries}
        )
        self._files: dict[Path, int] = {}
        self._check_repeats(named, family)
        self.check_copies(sample=True)

    def _own(self, named: dict[str, TensorEntry], family: Family) -> dict[str, TensorEntry]:
        """Returns the entries by the names of the rules; what is left over is refused by name."""
        extra = [
            name
            for name in named
            if name not in self.bridge.theirs and not re.fullmatch(family.buffers, name)
        ]
        if self.model.tie_embeddings and family.tied in extra:
            extra.remove(family.tied)
            self.notes += (
                f"{family.tied} is left aside: config.json ties it to the embedding, which it "
                "equals.",
            )
        heads = {
            each.theirs
            for head in ("lm", "mlm", "value")
            for each in family.rules_of(head)
            if each.of_head
        }
        unused = tuple(
            f"{family.prefix}layers.{n}." for n in range(self.model.num_blocks, self.blocks)
        )
        aside = [
            name
            for name in extra
            if re.fullmatch(family.aside, name)
            or name.startswith(unused)
            or (self.new_head and name in heads)
        ]
        if aside:
            extra = [name for name in extra if name not in aside]
            more = f" and {len(aside) - 8} others" if len(aside) > 8 else ""
            self.notes += (
                f"{', '.join(aside[:8])}{more}: left aside, they belong to another head.",
            )
        if extra:
            raise CheckpointError(
                f"{self.folder} holds tensors that a {self.model.family} of its config.json does "
                "not have: "
                f"{', '.join(sorted(extra)[:5])}{' and others' if len(extra) > 5 else ''}. "
                f"{_DIFFERENT}"
            )
        for name in self.bridge.theirs:
            if name in named and named[name].dtype not in HF_DTYPES | dict.fromkeys((MXFP4, FP8)):
                kinds = ", ".join(HF_DTYPES)
                raise CheckpointError(
                    f"{name} in {self.folder} is {named[name].dtype}; weights are {kinds}."
                )
        return {name: named[name] for name in self.bridge.theirs if name in named}

    def _named(self, found: dict[str, TensorEntry], family: Family) -> dict[str, TensorEntry]:
        """Returns the tensors as the rules call them: old spellings made new, and with the prefix
        that bare bodies lack.
        """
        named: dict[str, tuple[str, TensorEntry]] = {}
        bare = not any(name.startswith(family.prefix) for name in found)
        for stored, entry in found.items():
            name = stored
            for old, new in family.spellings:
                name = name.replace(old, new)
            if self.model.head == "none":
                name = name.removeprefix(family.prefix)
            elif bare and name != family.tied:
                name = family.prefix + name
            if name in named:
                raise CheckpointError(
                    f"{self.folder} holds one tensor under two names, {named[name][0]} and "
                    f"{stored}: take one away."
                )
            named[name] = stored, entry
        return {name: entry for name, (_, entry) in named.items()}

    def _check_repeats(self, named: Mapping[str, TensorEntry], family: Family) -> None:
        """What is left aside because another tensor stands for it must equal that one. Errors:
        CheckpointError.
        """
        repeats = dict(family.repeats)
        if self.model.tie_embeddings:
            repeats[family.tied] = self.bridge.by_ours["embedding.weight"][0].theirs
        for name, own in repeats.items():
            if name not in named or own not in self.entries:
                continue
            aside, kept = named[name], self.entries[own]
            if aside.shape != kept.shape or aside.dtype not in HF_DTYPES:
                raise CheckpointError(
                    f"{self.folder}: {name} of shape {aside.shape} is tied to {own} of another one."
                )
            row = self._first_difference(aside, kept)
            if row is not None:
                free = name == family.tied and "tie_embeddings" in family.keys
                untie = (
                    'set "tie_word_embeddings": false in config.json to keep both, or '
                    if free
                    else ""
                )
                raise CheckpointError(
                    f"{self.folder}: {name} differs from {own} in row {row}, though the two are "
                    f"tied: loaders disagree on which counts (transformers 4 drops {name}, 5 keeps "
                    f"it). To mend it, {untie}take {name} out of the file."
                )

    def _first_difference(self, one: TensorEntry, other: TensorEntry) -> int | None:
        """Returns the first row in which two tensors of one shape hold other numbers; a NaN equals
        a NaN.
        """
        row = prod(one.shape[1:])
        step = max(1, BLOCK_BYTES // (row * 8))
        for begin in range(0, one.shape[0], step):
            count = min(step, one.shape[0] - begin)
            a, b = (self._rows(entry, begin * row, count * row) for entry in (one, other))
            same = ((a == b) | (a.isnan() & b.isnan())).view(count, row).all(1)
            if not same.all():
                return begin + int(same.logical_not().nonzero()[0])
        return None

    def _rows(self, entry: TensorEntry, begin: int, count: int) -> Tensor:
        return self._stored(entry, begin, count, 1).to(torch.float64)

    def check_copies(self, sample: bool = False) -> None:
        """Check that tensors that repeat others hold the same numbers (in their first and last
        rows). Errors: CheckpointError.
        """
        for name in sorted(self.bridge.copies & self.entries.keys()):
            (link,), entry = self.bridge.by_theirs[name], self.entries[name]
            rows, columns = entry.shape
            step = max(1, BLOCK_BYTES // (columns * stored_dtype(entry).itemsize))
            begins = range(0, rows, step)
            if sample:
                step, begins = 1, (0, rows - 1)
            for begin in begins:
                box = Box((begin, 0), (min(step, rows - begin), columns))
                copy, own = (torch.empty(box.shape, dtype=stored_dtype(entry)) for _ in range(2))
                self._read_box(entry, box, copy)
                self.read_into(link.ours, box.offset, own)
                if not torch.equal(copy, own):
                    raise CheckpointError(
                        f"{self.folder}: {name} must repeat the model's own {link.ours}, but "
                        f"differs from row {begin} on; megallm has one matrix for both."
                    )

    @property
    def dtype(self) -> torch.dtype:
        """Returns the narrowest dtype of ours that holds every weight exactly; float16 becomes
        float32.
        """
        weights = [
            links[0].theirs for name, links in self.bridge.by_ours.items() if not is_state(name)
        ]
        kinds = {stored_dtype(self.entries[name]) for name in weights}
        if kinds == {torch.bfloat16}:
            return torch.bfloat16
        return torch.float64 if torch.float64 in kinds else torch.float32

    @property
    def meta(self) -> dict[str, Any]:
        spec = tokenizer_spec(self.folder)
        return {"model": asdict(self.model), "precision": PRECISIONS[self.dtype], "tokenizer": spec}

    def names(self) -> list[str]:
        return sorted(self.bridge.ours)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Returns full logical shape, and the dtype of the first stored piece."""
        if name not in self.bridge.ours:
            raise CheckpointError(f"{self.folder} holds no tensor for {name}.")
        return self.bridge.ours[name], stored_dtype(
            self.entries[self.bridge.by_ours[name][0].theirs]
        )

    @torch.no_grad()
    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        """Fill `tensor` with the box at `offset` of the logical tensor `name`, in the dtype and
        strides it has.
        """
        full, _ = self.info(name)
        target = Box(tuple(offset), tuple(tensor.shape))
        problem = outside_problem(full, target)
        if problem is not None:
            raise CheckpointError(
                f"Tensor {name} of shape {full} cannot be read that way: {problem}."
            )
        for link in self.bridge.by_ours[name]:
            common = link.ours_box.intersect(target)
            if common is None:
                continue
            view = tensor[common.slices(target)][(0,) * link.stack_dims]
            view = view.transpose(-1, -2) if link.transpose and view.dim() > 1 else view
            self._read_box(self.entries[link.theirs], link.to_theirs(common), view, link.steps)

    def _read_box(
        self, entry: TensorEntry, box: Box, into: Tensor, steps: tuple[int, int] = (1, 1)
    ) -> None:
        """Copy a box of a stored tensor, or every few of its rows or columns, whole rows at a time.

        `into` is a vector or a matrix: stack dims of the box have one element and stand before it.
        """
        stack, dtype, (step, across) = len(entry.shape) - into.dim(), stored_dtype(entry), steps
        row = prod(entry.shape[stack + 1 :])
        first = 0  # number of the first row, counted through the stack
        for size, offset in zip(entry.shape[: stack + 1], box.offset, strict=False):
            first = first * size + offset
        inner = tuple(
            slice(o, o + (n - 1) * across + 1, across)
            for o, n in zip(box.offset[stack + 1 :], box.shape[stack + 1 :], strict=True)
        )
        most = max(1, BLOCK_BYTES // (row * dtype.itemsize * step))
        for begin in range(0, into.shape[0], most):
            count = min(most, into.shape[0] - begin)
            rows = (count - 1) * step + 1
            block = self._stored(entry, first + begin * step, rows, row)
            block = block.view(rows, *entry.shape[stack + 1 :])
            into[begin : begin + count].copy_(block[(slice(None, None, step), *inner)])

    def _stored(self, entry: TensorEntry, first: int, rows: int, row: int) -> Tensor:
        """Rows of `row` numbers of a stored tensor, those of a packed one in float32."""
        if isinstance(entry, PackedEntry):
            return entry.rows(self._bytes, first, rows)
        dtype = HF_DTYPES[entry.dtype]
        data = self._bytes(entry, first * row * dtype.itemsize, rows * row * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype)

    def _bytes(self, entry: TensorEntry, offset: int, nbytes: int) -> bytearray:
        if entry.path not in self._files:
            self._files[entry.path] = os.open(
                entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            )
        data = bytearray(nbytes)
        view = memoryview(data)
        while view:
            count = os.preadv(
                self._files[entry.path], [view], entry.offset + offset + nbytes - len(view)
            )
            if count == 0:
                raise CheckpointError(f"{entry.path} was cut off while it was read.")
            view = view[count:]
        return data

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> HfReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_size(folder: Path, model: ModelConfig, found: Mapping[str, TensorEntry]) -> None:
    """config.json cannot ask for far more than there is: rules are spelled out for each layer,
    expert and head.
    """
    if model.num_blocks > min(len(found), MAX_LAYERS):
        raise CheckpointError(
            f"{folder} has {len(found)} tensors, but its config.json says {model.num_blocks} "
            f"layers; more than {MAX_LAYERS} are refused."
        )
    wanted = model.num_params() - model.critic_matrices  # which a run may put beside them
    stored = sum(prod(entry.shape) for entry in found.values())
    if wanted > 2 * stored:
        raise CheckpointError(
            f"{folder} holds {stored} numbers, but the model of its config.json has {wanted} "
            "parameters."
        )


_DIFFERENT = "It would be another model without them."


class Cast:
    """A checkpoint's weights in whatever dtype is asked for, block by block.

    A wider dtype than the stored one takes the float32 master weights when the checkpoint has them.
    `through` rounds every value to that dtype first. Only weights are listed, no optimizer state.
    """

    def __init__(self, reader: WeightSource, through: torch.dtype | None = None) -> None:
        self.reader, self.through = reader, through
        self._all = set(reader.names())

    def names(self) -> list[str]:
        return sorted(name for name in self._all if not name.startswith("optim."))

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.reader.info(name)

    @torch.no_grad()
    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        """Fill `tensor` with the box at `offset` of the logical tensor `name`, in the dtype and
        strides it has.
        """
        _, stored = self.reader.info(name)
        through = None if is_state(name) else self.through
        wanted = through or tensor.dtype
        if wanted.itemsize > stored.itemsize and MASTER + name in self._all:
            name = MASTER + name
            _, stored = self.reader.info(name)
        if stored == tensor.dtype and through in (None, stored):
            self.reader.read_into(name, offset, tensor)
            return
        whole = Box(tuple(offset), tuple(tensor.shape))
        for box in split_box(whole, stored.itemsize, BLOCK_BYTES):
            block = torch.empty(box.shape, dtype=stored)
            self.reader.read_into(name, box.offset, block)
            tensor[box.slices(whole)].copy_(block if through is None else block.to(through))


def fill_theirs(bridge: Bridge, source: WeightSource, name: str, box: Box, into: Tensor) -> None:
    """Fill `into`, of the box's shape, with the box of their tensor `name`, from our tensors."""
    for link in bridge.by_theirs[name]:
        part = link.part_in(box)
        if part is None:
            continue
        ours, slices = part
        view = into[slices][(0,) * link.their_stack_dims]
        view = view.transpose(-1, -2) if link.transpose and view.dim() > 1 else view
        source.read_into(link.ours, ours.offset, view[(None,) * link.stack_dims])


def stored_model(reader: CheckpointReader) -> ModelConfig:
    """Returns the model of one of our checkpoints. Errors: UsageError when its meta does not hold
    one.
    """
    meta = reader.meta
    try:
        return ModelConfig(**meta["model"]).resolve()
    except (KeyError, TypeError) as error:
        raise UsageError(f"{reader.folder} does not say which model it holds ({error}).") from error
