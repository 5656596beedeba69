"""Writes adapters as folders that PEFT reads: `adapter_config.json` and
`adapter_model.safetensors` (`reading` reads them).

An adapter is small, so its tensors are made whole here; those of the base never are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.base.files import atomic_write_json, writing
from megallm.checkpoint.io import DTYPE_NAMES, raw
from megallm.checkpoint.shard_file import ShardWriter, header_bytes
from megallm.convert.weights import WeightSource, fill_theirs, whole_stage
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Box, named_shards
from megallm.parallel.tensor import ADAPTER
from megallm.peft import formats
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from megallm.peft.keys import LEAVES, PREFIX, KeyPlan, in_file, plan_keys, to_file
from megallm.peft.lora import A, LowRankOptions
from megallm.peft.sources import TensorSource, read_whole
from megallm.peft.targets import Target, find_targets, match_targets, named

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_shapes(config: PeftConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the full shapes of what is trained, by logical name: the adapter, and the
    modules of the base in `modules_to_save`."""
    stage = whole_stage(model, Mesh.single("meta"))
    prepare_adapters(config, model)(stage)
    saved = {name: shard.full for name, param, shard in named_shards(stage) if param.requires_grad}
    return {name: tuple(full) for name, full in saved.items()}


# Writing.


def write_folder(
    folder: Path,
    source: WeightSource,
    config: PeftConfig,
    model: ModelConfig,
    base: str | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Fill an existing folder with the adapter of `config` in `source`, by logical name.

    `base` is the name or path of the base model for PEFT; `dtype` None keeps the stored one.
    """
    ours = adapter_shapes(config, model)
    if config.method in formats.FORMATS:
        whole = {n: read_whole(source, n, dtype) for n in ours}
        tensors, settings = formats.write_adapter(config, model, whole, base)
        write_tensors(folder / WEIGHTS, tensors)
        atomic_write_json(folder / CONFIG, settings)
        return
    plan = plan_keys(model, ours, config.name)
    held = TensorSource(
        {n: _padded(read_whole(source, n, dtype), plan.blocks.get(n)) for n in ours}
    )
    tensors = {}
    for theirs, full in plan.bridge.theirs.items():
        whole = torch.empty(full, dtype=held.info(plan.bridge.by_theirs[theirs][0].ours)[1])
        fill_theirs(plan.bridge, held, theirs, Box((0,) * len(full), full), whole)
        tensors[in_file(theirs, plan.bridge.theirs)] = to_file(theirs, whole)
    write_tensors(folder / WEIGHTS, tensors)
    atomic_write_json(folder / CONFIG, write_adapter_config(config, model, plan, base))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file."""
    entries = [
        (name, DTYPE_NAMES[x.dtype], tuple(x.shape), x.numel() * x.itemsize)
        for name, x in tensors.items()
    ]
    with writing(path), ShardWriter(path) as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        for x in tensors.values():
            file.write(raw(x))


def _padded(tensor: Tensor, block: tuple[int, int] | None) -> Tensor:
    """B in its block of columns, zeros beside it."""
    if block is None:
        return tensor
    first, total = block
    wide = tensor.new_zeros((*tensor.shape[:-1], total))
    wide[..., first : first + tensor.shape[-1]] = tensor
    return wide


def write_adapter_config(
    config: PeftConfig, model: ModelConfig, plan: KeyPlan, base: str | None
) -> dict[str, Any]:
    """Returns PEFT's configuration of an adapter of LoRA's kind, with no key that PEFT lacks."""
    shapes, parts = plan.bridge.ours, {}
    options = {target: LowRankOptions.of(config, target, None) for target in _chosen(config, model)}
    scales = {_place(target): each.scale for target, each in options.items()}
    for module, slots in plan.modules.items():
        rank = sum(shapes[f"{slot}.{A}"][-2] for slot in slots if f"{slot}.{A}" in shapes)
        factors = {scales[_place_of(slot, config.name)] for slot in slots}
        if len(factors) > 1:
            raise UsageError(
                f"{module} of this family joins matrices whose adapters are scaled differently "
                f"({', '.join(map(str, factors))}): PEFT's files have one factor for it."
            )
        parts[module] = (rank, factors.pop() * (rank**0.5 if config.rs else rank))
    experts = {module for module in parts if module.rpartition(".")[0].endswith(".experts")}
    common_rank = _most(rank for rank, _ in parts.values()) or config.dim
    common_alpha = _most(alpha for _, alpha in parts.values()) or config.alpha
    every = {
        name.removesuffix(".weight") for target in find_targets(model) for name in target.names
    }
    linears = {module for module in (*parts, *_embeddings(plan)) if module not in experts}
    whole = {
        theirs.removeprefix(PREFIX).rpartition(".")[0]
        for theirs in plan.bridge.theirs
        if ADAPTER not in plan.bridge.by_theirs[theirs][0].ours
    }
    return {
        "peft_type": "LORA",
        "task_type": TASKS.get(model.head),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common_rank,
        "lora_alpha": common_alpha,
        "lora_dropout": config.dropout,
        "target_modules": endings(linears, every),
        "target_parameters": sorted(experts) or None,
        "use_rslora": config.rs,
        "use_dora": config.dora,
        "modules_to_save": sorted(whole) or None,
        "rank_pattern": {m: r for m, (r, _) in parts.items() if r != common_rank},
        "alpha_pattern": {m: a for m, (_, a) in parts.items() if not isclose(a, common_alpha)},
        "bias": "none",
        "fan_in_fan_out": model.family == "gpt2",
        "init_lora_weights": True,
    }


TASKS = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS", "value": "SEQ_CLS"}


def _chosen(config: PeftConfig, model: ModelConfig) -> list[Target]:
    return match_targets(config.targets, find_targets(model))


def _place(target: Target) -> tuple[str, int]:
    return target.module, target.member


def _place_of(slot: str, name: str) -> tuple[str, int]:
    """The target of `MODULE.adapter.NAME` or `MODULE.adapter.NAME.MEMBER`."""
    module, _, rest = slot.partition(ADAPTER)
    member = rest.removeprefix(name).removeprefix(".")
    return module, int(member or 0)


def _embeddings(plan: KeyPlan) -> list[str]:
    ending = LEAVES["lora_embedding_A"].ending
    return [
        t.removeprefix(PREFIX).removesuffix(ending)
        for t in plan.bridge.theirs
        if t.endswith(ending)
    ]


def _most(values: Iterable[Any]) -> Any:
    """The most frequent value, the first of equals; None of nothing."""
    listed = list(values)
    return max(listed, key=listed.count, default=None)


def endings(chosen: set[str], every: set[str]) -> list[str]:
    """Returns names that mean exactly the `chosen` modules of `every`, as PEFT compares their ends:
    the last word where all modules with it are meant, else the whole name."""
    words = {name.rpartition(".")[2] for name in chosen}
    whole = {word for word in words if all(n in chosen for n in every if named(word, n))}
    rest = {name for name in chosen if name.rpartition(".")[2] not in whole}
    return sorted(whole | rest)
