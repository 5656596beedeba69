"""PEFT's files of methods that stand beside linears: (IA)3, prefix, prompt and P-tuning; and our
own of bottleneck adapters, which PEFT does not have.

What P-tuning trains is an MLP; what is exported is the prompt that it makes, as PEFT does, and it
comes back as a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.base.errors import CheckpointError, UsageError
from megallm.models.config import ModelConfig
from megallm.parallel.tensor import ADAPTER
from megallm.peft.config import PeftConfig
from megallm.peft.ia3 import DOWN, SCALE
from megallm.peft.targets import runtime_name, their_modules

PREFIX, PROMPT = "base_model.model.", "prompt_embeddings"
TensorDict = dict[str, Tensor]
AdapterSettings = dict[str, Any]


class AdapterFormat(NamedTuple):
    """One method's files: `write` makes tensors and settings of ours by logical name, `read` the
    reverse."""

    peft_type: str
    write: Callable[[PeftConfig, ModelConfig, TensorDict], tuple[TensorDict, AdapterSettings]]
    read: Callable[
        [PeftConfig, ModelConfig, TensorDict, AdapterSettings], tuple[PeftConfig, TensorDict]
    ]


def write_adapter(
    config: PeftConfig, model: ModelConfig, held: TensorDict, base: str | None
) -> tuple[TensorDict, AdapterSettings]:
    """Returns the tensors and the settings of `adapter_config.json` of the adapter in `held`, whole
    tensors by logical name."""
    form = FORMATS[config.method]
    tensors, settings = form.write(config, model, held)
    common = {
        "peft_type": form.peft_type,
        "task_type": "CAUSAL_LM" if model.head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    return {name: x.contiguous() for name, x in tensors.items()}, common | settings


def read(
    settings: AdapterSettings, model: ModelConfig, tensors: TensorDict, name: str
) -> tuple[PeftConfig, TensorDict]:
    """Returns the configuration and our tensors of what a folder holds. Raises UsageError for
    another method, CheckpointError for tensors that do not fit."""
    for method, form in FORMATS.items():
        if form.peft_type == settings.get("peft_type"):
            config = PeftConfig(method, targets=("all-linear",), name=name)
            return form.read(config, model, tensors, settings)
    raise UsageError(
        f"peft_type is {settings.get('peft_type')!r}; megallm reads LORA, "
        f"{', '.join(form.peft_type for form in FORMATS.values())}."
    )


# (IA)3


def _scales(config: PeftConfig, model: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """Our name, their module, and whether it scales the input, of everything that could be
    scaled."""
    for (module, member), names in their_modules(model).items():
        for theirs in dict.fromkeys(map(runtime_name, names)):
            if module.endswith(DOWN):
                slot = f"{module.removesuffix(DOWN)}.scale{ADAPTER}{config.name}"
                yield f"{slot}.{SCALE}", theirs, True
            else:
                yield f"{module}{ADAPTER}{config.name}.{member}.{SCALE}", theirs, False


def _write_scales(
    config: PeftConfig, model: ModelConfig, held: TensorDict
) -> tuple[TensorDict, AdapterSettings]:
    tensors: TensorDict = {}
    modules: dict[bool, set[str]] = {True: set(), False: set()}
    places = {ours: (theirs, inner) for ours, theirs, inner in _scales(config, model)}
    for ours, x in held.items():
        theirs, inner = places.get(ours, ("", False))
        key = f"{PREFIX}{theirs}.{SCALE}"
        if not theirs or key in tensors or sum(at == theirs for at, _ in places.values()) > 1:
            raise UsageError(
                f"{ours} has no place of its own in PEFT's files of this family: a matrix there "
                "joins several of ours, or holds experts."
            )
        tensors[key] = x[None] if inner else x[:, None]
        modules[inner].add(theirs)
    words = {
        inner: sorted({name.rpartition(".")[2] for name in modules[inner]}) for inner in modules
    }
    settings = {"target_modules": words[False] + words[True], "feedforward_modules": words[True]}
    return tensors, settings | {"fan_in_fan_out": model.family == "gpt2", "init_ia3_weights": True}


def _read_scales(
    config: PeftConfig, model: ModelConfig, tensors: TensorDict, settings: AdapterSettings
) -> tuple[PeftConfig, TensorDict]:
    places = {
        f"{PREFIX}{theirs}.{SCALE}": (ours, inner) for ours, theirs, inner in _scales(config, model)
    }
    found = {}
    for key, x in tensors.items():
        if key not in places or (x.shape[0] == 1) != places[key][1]:
            raise CheckpointError(f"The adapter scales {key}, which this model does not have so.")
        found[places[key][0]] = x.flatten()
    targets = tuple(sorted({key.removeprefix(PREFIX).removesuffix(f".{SCALE}") for key in tensors}))
    return replace(config, targets=targets), found


# AdaLoRA


def _triplets(config: PeftConfig, model: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Our slot, their module and how many of ours that joins, of every matrix."""
    places = their_modules(model)
    every = [name for names in places.values() for name in dict.fromkeys(map(runtime_name, names))]
    for (module, member), names in places.items():
        for theirs in dict.fromkeys(map(runtime_name, names)):
            yield f"{module}{ADAPTER}{config.name}.{member}", theirs, every.count(theirs)


def _write_triplets(
    config: PeftConfig, model: ModelConfig, held: TensorDict
) -> tuple[TensorDict, AdapterSettings]:
    tensors: TensorDict = {}
    pattern, modules = {}, set()
    places = {ours: (theirs, joined) for ours, theirs, joined in _triplets(config, model)}
    for ours in sorted({name.rpartition(".")[0] for name in held}):
        theirs, joined = places.get(ours, ("", 0))
        if joined != 1:
            raise UsageError(f"{ours} has no place of its own in PEFT's files of this family.")
        a, b, e = (held[f"{ours}.{leaf}"] for leaf in ("lora_A", "lora_B", "lora_E"))
        kept = e[:, 0] != 0
        kept = torch.ones_like(kept) if not kept.any() and not b.any() else kept
        parts = {"lora_A": a[kept], "lora_B": b[:, kept], "lora_E": e[kept]}
        tensors |= {f"{PREFIX}{theirs}.{leaf}": x for leaf, x in parts.items()}
        pattern[f"{theirs}.lora_E"] = kept.tolist()
        modules.add(theirs.rpartition(".")[2])
    settings = {"target_modules": sorted(modules), "rank_pattern": pattern, "total_step": 1}
    settings |= {"init_r": config.first_dim, "target_r": config.dim, "lora_alpha": config.alpha}
    return tensors, settings | {"orth_reg_weight": config.orthogonal}


def _read_triplets(
    config: PeftConfig, model: ModelConfig, tensors: TensorDict, settings: AdapterSettings
) -> tuple[PeftConfig, TensorDict]:
    places = {theirs: ours for ours, theirs, joined in _triplets(config, model) if joined == 1}
    modules = {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors}
    first, pattern, found = int(settings["init_r"]), settings.get("rank_pattern") or {}, {}
    for theirs in modules:
        if theirs not in places:
            raise CheckpointError(
                f"The adapter adapts {theirs}, which this model does not have so."
            )
        kept = torch.tensor(pattern.get(f"{theirs}.lora_E", [True] * first)).flatten()
        for leaf, dim in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            x = tensors[f"{PREFIX}{theirs}.{leaf}"].movedim(dim, 0)
            whole = x.new_zeros((first, *x.shape[1:]))
            whole[kept] = x
            found[f"{places[theirs]}.{leaf}"] = whole.movedim(0, dim)
    return replace(
        config,
        targets=tuple(sorted(modules)),
        dim=min(int(settings["target_r"]), first),
        init_dim=first,
        alpha=float(settings["lora_alpha"]),
    ), found


# Virtual tokens


def _shape(config: PeftConfig, model: ModelConfig) -> AdapterSettings:
    return {
        "num_virtual_tokens": config.virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.num_layers,
    }


def _prefix_names(config: PeftConfig, model: ModelConfig) -> list[str]:
    slots = (f"layers.{n}.attention.prefix{ADAPTER}{config.name}" for n in range(model.num_layers))
    return [f"{slot}.{part}" for slot in slots for part in ("keys", "values")]


def _write_prefix(
    config: PeftConfig, model: ModelConfig, held: TensorDict
) -> tuple[TensorDict, AdapterSettings]:
    if model.mla.on:
        raise UsageError("PEFT's prefix tuning has no form for latent attention (MLA).")
    width = model.num_kv_heads * model.head_size
    settings = {"token_dim": width, "num_attention_heads": model.num_kv_heads}
    settings |= {"encoder_hidden_size": width, "prefix_projection": False}
    joined = torch.cat([held[name] for name in _prefix_names(config, model)], dim=1)
    return {PROMPT: joined}, _shape(config, model) | settings


def _read_prefix(
    config: PeftConfig, model: ModelConfig, tensors: TensorDict, settings: AdapterSettings
) -> tuple[PeftConfig, TensorDict]:
    width = model.num_kv_heads * model.head_size
    table = _prompt(tensors, 2 * model.num_layers * width)
    config = replace(config, virtual_tokens=len(table))
    return config, dict(zip(_prefix_names(config, model), table.split(width, dim=1), strict=True))


def _prompt(tensors: TensorDict, width: int) -> Tensor:
    table = tensors.get(PROMPT)
    if table is None or tuple(tensors) != (PROMPT,) or table.dim() != 2 or table.shape[1] != width:
        raise CheckpointError(
            f"The adapter should hold {PROMPT} [tokens, {width}] and nothing else."
        )
    return table


def _write_prompt(
    config: PeftConfig, model: ModelConfig, held: TensorDict
) -> tuple[TensorDict, AdapterSettings]:
    slot = f"prompt{ADAPTER}{config.name}."
    x = held[f"{slot}embedding"]
    settings = {"token_dim": model.hidden_size, "num_attention_heads": model.num_heads}
    if config.method == "p-tuning":
        for number in range(3):
            x = F.linear(x, held[f"{slot}weight_{number}"], held[f"{slot}bias_{number}"])
            x = F.relu(x) if number < 2 else x
        settings |= {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": config.hidden}
    else:
        settings |= {"prompt_tuning_init": "RANDOM"}
    return {PROMPT: x}, _shape(config, model) | settings


def _read_prompt(
    config: PeftConfig, model: ModelConfig, tensors: TensorDict, settings: AdapterSettings
) -> tuple[PeftConfig, TensorDict]:
    table = _prompt(tensors, model.hidden_size)
    config = replace(config, method="prompt", virtual_tokens=len(table))
    return config, {f"prompt{ADAPTER}{config.name}.embedding": table}


# Bottleneck adapters, under our own names


def _write_own(
    config: PeftConfig, model: ModelConfig, held: TensorDict
) -> tuple[TensorDict, AdapterSettings]:
    return dict(held), {"hidden": config.hidden, "model_family": model.family, "writer": "megallm"}


def _read_own(
    config: PeftConfig, model: ModelConfig, tensors: TensorDict, settings: AdapterSettings
) -> tuple[PeftConfig, TensorDict]:
    return replace(config, hidden=int(settings["hidden"])), dict(tensors)


FORMATS: dict[str, AdapterFormat] = {
    "adalora": AdapterFormat("ADALORA", _write_triplets, _read_triplets),
    "ia3": AdapterFormat("IA3", _write_scales, _read_scales),
    "prefix": AdapterFormat("PREFIX_TUNING", _write_prefix, _read_prefix),
    "prompt": AdapterFormat("PROMPT_TUNING", _write_prompt, _read_prompt),
    "p-tuning": AdapterFormat("P_TUNING", _write_prompt, _read_prompt),
    "houlsby": AdapterFormat("MEGALLM_HOULSBY", _write_own, _read_own),
    "parallel": AdapterFormat("MEGALLM_PARALLEL", _write_own, _read_own),
}
