"""Reads adapters of PEFT's folders as a source of weights by logical name.

What a folder adapts is told by the names of its tensors, so its patterns need not be understood; a
setting that would change what is computed and is not ours is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint.shard_file import read_regular
from megallm.convert.folder import plain_file, read_header, read_json
from megallm.convert.hf_config import family_of
from megallm.convert.rules import Bridge, TensorLink
from megallm.convert.weights import HF_DTYPES, bridge_of
from megallm.models.config import ModelConfig
from megallm.peft import formats
from megallm.peft.config import PeftConfig
from megallm.peft.files import CONFIG, WEIGHTS, adapter_shapes, endings
from megallm.peft.keys import LEAVES, PREFIX, from_file, in_file, plan_keys
from megallm.peft.lora import A, B
from megallm.peft.sources import TensorSource
from megallm.peft.targets import EXPERTS, Target, find_targets

FURTHER = frozenset(form.peft_type for form in formats.FORMATS.values())
# Settings that are read, or that change nothing; any other that is set is refused.
KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_dora",
    "use_rslora",
))  # fmt: skip
# Starts that change the base, unless the adapter was saved for the unchanged one: no file tells.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdaptedModule:
    """One module of a folder: its rank, its factor and our targets that it adapts."""

    rank: int
    scale: float
    targets: tuple[Target, ...]
    shared: bool  # one A for several matrices of ours

    @property
    def dim(self) -> int:
        """The rank of each of ours."""
        return self.rank if self.shared else self.rank // len(self.targets)


class AdapterFolder:
    """An adapter of LoRA's kind, as a source of the tensors that a model prepared with `config`
    has. Errors: UsageError for what megallm cannot compute, CheckpointError for a damaged folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: ModelConfig, name: str = "default"
    ) -> None:
        self.folder = Path(folder)
        if not (self.folder / CONFIG).is_file():
            raise UsageError(f"{self.folder} is no adapter of PEFT: it has no {CONFIG}.")
        raw = read_json(self.folder / CONFIG)
        if raw.get("peft_type") in FURTHER:
            tensors = load_tensors(self.folder / WEIGHTS)
            self.config, made = formats.read(raw, model, tensors, name)
            self._source = TensorSource(made)
            return
        _check_settings(raw, self.folder)
        tensors = load_tensors(self.folder / WEIGHTS)
        aside = {
            key for key in tensors if ".base_layer." in key and ".experts.base_layer." not in key
        }
        tensors = {key: x for key, x in tensors.items() if key not in aside}
        parts = _parts(raw, tensors, model, self.folder)
        self.config = _config(raw, tensors, parts, model, name)
        shapes = adapter_shapes(self.config, model)
        plan = plan_keys(model, shapes, name)
        theirs = _theirs(tensors, plan.bridge, parts, self.folder)
        made = {}
        for ours, full in plan.bridge.ours.items():
            whole = _ours(plan.bridge, theirs, ours, full)
            first, _ = plan.blocks.get(ours, (0, 0))
            made[ours] = whole[..., first : first + shapes[ours][-1]].contiguous()
        self._source = TensorSource(made)

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._source.info(name)

    def read_into(self, name: str, offset: Sequence[int], tensor: Tensor) -> None:
        self._source.read_into(name, offset, tensor)


def base_links(model: ModelConfig) -> Mapping[str, Sequence[TensorLink]]:
    """Returns the links of the base's tensors by the names of theirs."""
    return bridge_of(model, family_of(model).rules_of(model.head)).by_theirs


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of one safetensors file, after its header was checked."""
    found = {}
    for name, entry in read_header(plain_file(path.parent, path.name)).items():
        if entry.dtype not in HF_DTYPES:
            raise CheckpointError(
                f"{name} in {path} is {entry.dtype}; weights are {', '.join(HF_DTYPES)}."
            )
        data = read_regular(entry.path, entry.offset, entry.nbytes)
        flat = torch.frombuffer(data, dtype=HF_DTYPES[entry.dtype]) if data else torch.empty(0)
        found[name] = flat.view(entry.shape)
    return found


def _check_settings(raw: Mapping[str, Any], folder: Path) -> None:
    """Errors: UsageError for a setting that would make it another model."""
    start = raw.get("init_lora_weights")
    problems = [f"{key} is set" for key in sorted(set(raw) - KNOWN) if raw[key]]
    if raw.get("peft_type") != "LORA":
        problems = [f"peft_type is {raw.get('peft_type')!r}, accepted is LORA"]
    if raw.get("bias", "none") != "none":
        problems.append(f"bias is {raw['bias']!r}, accepted is none")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        problems.append(
            f"init_lora_weights is {start!r}, which changes the base (PEFT's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=X)` makes it LoRA)"
        )
    if problems:
        raise UsageError(f"{folder / CONFIG}: {'; '.join(problems)}: it would be another model.")


def _parts(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], model: ModelConfig, folder: Path
) -> dict[str, AdaptedModule]:
    """The adapted modules by their name, an expert's parameter by its own."""
    by_name: dict[str, list[Target]] = {}
    joins = base_links(model)
    for target in find_targets(model):
        for name in target.names:
            by_name.setdefault(name, []).append(target)
    found = {}
    for leaf in (A, "lora_embedding_A"):
        for key, x in tensors.items():
            if not key.endswith(LEAVES[leaf].ending):
                continue
            module = _parameter(key.removeprefix(PREFIX).removesuffix(LEAVES[leaf].ending), raw)
            here = by_name.get(module)
            if here is None:
                raise UsageError(f"{folder} adapts {module}, which the model does not have.")
            experts = model.moe.num_experts if here[0].kind == EXPERTS else 1
            rank = x.shape[0] // experts
            alpha = _pattern(raw.get("alpha_pattern") or {}, module, raw.get("lora_alpha", 8))
            scale = alpha / (rank**0.5 if raw.get("use_rslora") else rank)
            b = tensors.get(key.replace("_A", "_B"))
            shared = len(here) > 1 and not (
                b is not None and _is_diagonal(b, here, joins[f"{module}.weight"])
            )
            found[module] = AdaptedModule(rank, scale, tuple(here), shared)
    return found


def _parameter(module: str, raw: Mapping[str, Any]) -> str:
    """The name of what is adapted: PEFT says in its configuration which parameters of experts."""
    head, _, last = module.removesuffix(".base_layer").rpartition(".")
    if last != "experts":
        return module
    inside = module.endswith(".base_layer")
    wanted = {name.rpartition(".")[2] for name in raw.get("target_parameters") or ()}
    first = inside or wanted == {"gate_up_proj"}
    return f"{head}.experts.{'gate_up_proj' if first else 'down_proj'}"


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the pattern that PEFT would take for a module."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _is_diagonal(b: Tensor, targets: Sequence[Target], links: Sequence[TensorLink]) -> bool:
    """Whether B `(out, r)` of several matrices has a block of columns for the rows of each, and
    zeros beside; `links` are those of the matrix of theirs that joins them."""
    rank, places = b.shape[1], [(target.module, target.member) for target in targets]
    if rank % len(places):
        return False
    beside, width = b.clone(), rank // len(places)
    for link in links:
        stack = link.ours_box.offset[: link.stack_dims]
        block = places.index((link.ours.removesuffix(".weight"), stack[-1] if stack else 0))
        dim = link.their_stack_dims + link.transpose
        begin, count = link.theirs_box.offset[dim], link.theirs_box.shape[dim]
        rows = slice(begin, begin + (count - 1) * link.step + 1, link.step)
        beside[rows, block * width : (block + 1) * width] = 0
    return not beside.any()


def _config(
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, AdaptedModule],
    model: ModelConfig,
    name: str,
) -> PeftConfig:
    """The configuration that has exactly these adapters."""
    rs, dims, alphas = bool(raw.get("use_rslora")), {}, {}
    for part in parts.values():
        for target in part.targets:
            label = next(n for n in reversed(target.names[:2]) if n.startswith(target.module))
            dims[label] = part.dim
            alphas[label] = round(part.scale * (part.dim**0.5 if rs else part.dim), 12)
    dim, alpha = (
        max(table.values(), key=[*table.values()].count, default=8) for table in (dims, alphas)
    )
    every = {each for target in find_targets(model) for each in target.names}
    targets = tuple(endings(set(parts), every))
    adapted = tuple(leaf.ending for leaf in LEAVES.values())
    whole = {k.removeprefix(PREFIX).rpartition(".")[0] for k in tensors if not k.endswith(adapted)}
    return PeftConfig(
        "lora",
        targets,
        dim,
        alpha,
        rs=rs,
        dora=bool(raw.get("use_dora")),
        dropout=float(raw.get("lora_dropout") or 0.0),
        rank_pattern={label: each for label, each in dims.items() if each != dim},
        alpha_pattern={label: each for label, each in alphas.items() if each != alpha},
        modules_to_save=tuple(sorted(whole)),
        name=name,
    )


def _theirs(
    tensors: dict[str, Tensor], bridge: Bridge, parts: Mapping[str, AdaptedModule], folder: Path
) -> dict[str, Tensor]:
    """The tensors of the bridge, each of its shape. Errors: CheckpointError."""
    found, left = {}, dict(tensors)
    for theirs, full in bridge.theirs.items():
        key = in_file(theirs, bridge.theirs)
        if key not in left:
            raise CheckpointError(f"{folder / WEIGHTS} lacks {key}.")
        tensor = left.pop(key)
        module = theirs.removeprefix(PREFIX)
        for leaf in (A, B):
            part = parts.get(module.removesuffix(LEAVES[leaf].ending))
            if module.endswith(LEAVES[leaf].ending) and part is not None and part.shared:
                count = len(part.targets)
                tensor = tensor.repeat((count, 1) if leaf == A else (1, count))
        if tensor.numel() != prod(full):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {key} has the shape {list(tensor.shape)}; the model and "
                f"{CONFIG} make it {list(full)}."
            )
        found[theirs] = from_file(theirs, tensor, full)
    if left:
        raise CheckpointError(
            f"{folder / WEIGHTS} holds {sorted(left)[0]}, which is no part of the adapter."
        )
    return found


def _ours(bridge: Bridge, theirs: Mapping[str, Tensor], name: str, full: tuple[int, ...]) -> Tensor:
    """One of our tensors, made of theirs."""
    first = theirs[bridge.by_ours[name][0].theirs]
    whole = torch.empty(full, dtype=first.dtype)
    for link in bridge.by_ours[name]:
        view = whole[link.ours_box.slices()][(0,) * link.stack_dims]
        view = view.transpose(-1, -2) if link.transpose and view.dim() > 1 else view
        slices = list(link.theirs_box.slices())
        rows = slices[link.their_stack_dims]
        end = rows.start + (rows.stop - rows.start - 1) * link.step + 1
        slices[link.their_stack_dims] = slice(rows.start, end, link.step)
        view.copy_(theirs[link.theirs][tuple(slices)][(0,) * link.their_stack_dims])
    return whole
