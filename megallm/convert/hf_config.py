"""`config.json` <-> `ModelConfig`, without transformers and without running anything. Pure.

What a key asks for is computed, or refused by name; a key that nobody here knows is told as a note.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from megallm.base.config import get, leaves, replace
from megallm.base.errors import UsageError
from megallm.convert.families import FAMILIES
from megallm.convert.family import NEUTRAL, Family
from megallm.convert.folder import catalogue, is_model_folder, packing_problem, read_json
from megallm.convert.layer_keys import (
    layers_problem,
    read_layers,
    read_rope,
    typed,
    write_layers,
    write_rope,
)
from megallm.models.config import ModelConfig
from megallm.models.rope_scaling import ROPE_NUMBERS

CONFIG = "config.json"
ADVICE = "Nothing was converted: the result would not be the same model."

# Keys that say nothing about the computation of a forward pass (dropout is a training choice:
# megallm has none).
HARMLESS = frozenset((
    "architectures", "attention_bias", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop",
    "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "hidden_dropout_prob", "num_labels",
    "dtype", "embd_pdrop", "eos_token_id", "gradient_checkpointing", "hidden_dropout", "id2label",
    "is_llama_config", "label2id", "layer_types", "max_length", "max_window_layers", "mlp_bias", "model_type",
    "n_ctx", "original_max_position_embeddings", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "rope_parameters",
    "rope_scaling", "rope_theta", "sep_token_id", "sliding_window", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_cache", "use_sliding_window",
    "vocab_file", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "aux_loss_alpha", "seq_aux",
    "ep_size", "residual_dropout", "embedding_dropout", "mlp_dropout", "cache_implementation",
))  # fmt: skip


@dataclass(frozen=True)
class HfConfig:
    """What a folder says about its model: resolved sizes and switches, its family, and notes for
    the user.
    """

    model: ModelConfig
    family: Family
    raw: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_config(folder: Path) -> HfConfig:
    """Read `folder/config.json`. Errors: UsageError for a model that megallm cannot compute, each
    switch by name.

    transformers writes that there are modules of further tokens whether it saves them or not: the
    tensors tell.
    """
    if not is_model_folder(folder):
        raise UsageError(f"{folder} is no Hugging Face model folder: it has no {CONFIG}.")
    found = parse_config(read_json(folder / CONFIG), str(folder / CONFIG))
    if not found.model.mtp.depth or any(re.match(found.family.further, name) for name in catalogue(folder)):
        return found
    note = f"{CONFIG} speaks of modules that predict further tokens; the folder has none of them."
    return dataclasses.replace(found, model=replace(found.model, {"mtp.depth": 0}), notes=(*found.notes, note))


def parse_config(raw: Mapping[str, Any], where: str) -> HfConfig:
    """Returns the model of a decoded config.json; `where` names it in errors."""
    family = _family(raw, where)
    problems: list[str] = []
    raw = _by_own_names(raw, family, problems)
    problems += _refusals(raw, family).values()
    values: dict[str, Any] = {}
    for field, key in family.keys.items():
        value = raw[key] if key in raw else family.defaults.get(key)
        if value is not None:
            values[field] = typed(field, key, value, problems)
    act = raw.get(family.activation_key) or family.defaults[family.activation_key]
    if not isinstance(act, str) or act not in family.activations:
        known = ", ".join(family.activations)
        problems.append(f"{family.activation_key} is {act!r}; megallm computes {known} in this family")
    else:
        values["activation"] = family.activations[act]
    values |= _biases(raw, family, problems) | read_layers(raw, family, problems) | _head(raw, family, problems)
    if family.more is not None:
        values |= family.more.read(raw, problems)
    if values.get("head") != "lm":
        values["mtp.depth"] = 0  # which belongs to the head
    if family.switches["positions"] == "rope":
        values |= read_rope(raw, family, problems)
    for field in ("num_layers", "hidden_size", "num_heads", "vocab_size"):
        if field not in values:
            problems.append(f"{family.keys[field]} is missing")
    if problems:
        listed = "\n  ".join(f"{problem}." for problem in problems)
        raise UsageError(f"{where}: megallm cannot compute this model:\n  {listed}\n{ADVICE}")
    model = ModelConfig(family=family.name, **_nested(values)).resolve()
    if found := _hindrances(model, family):
        raise UsageError(f"{where} is no {family.name} that megallm knows: {'; '.join(found)}. {ADVICE}")
    return HfConfig(model, family, raw, tuple(_notes(raw, family, where)))


def _by_own_names(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """config.json with every key under one name; two names of a key must agree."""
    result = {key: value for key, value in raw.items() if key not in family.aliases}
    for alias, key in family.aliases.items():
        if raw.get(alias) is None:
            continue
        if result.get(key) not in (None, raw[alias]):
            problems.append(f"{key} is {str(result[key])[:40]} and {alias} {str(raw[alias])[:40]}: they must agree")
        result[key] = raw[alias]
    return result


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as the nested fields of a ModelConfig, those without a value left out."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        if value is not None:
            (result.setdefault(section, {}) if section else result)[field] = value
    return result


def _family(raw: Mapping[str, Any], where: str) -> Family:
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        family, difference = nearest_family(raw)
        raise UsageError(
            f"{where} has model_type {str(name)[:60]!r}, which megallm does not convert. The nearest that it does is "
            f"{family.name} ({family.models}); {difference}. `megallm convert --list` has all of them; code that a "
            "folder brings along is never run."
        )
    named = raw.get("architectures") or []
    family = FAMILIES[name]
    if not isinstance(named, list) or any(one not in _heads(family) for one in named):
        known = [one for one in (family.architecture, family.classifier, family.body) if one is not None]
        raise UsageError(f"{where} has architectures {str(named)[:120]}; known is {' or '.join(known)}.")
    return family


def nearest_family(raw: Mapping[str, Any]) -> tuple[Family, str]:
    """Returns the family that shares most keys with a config.json of none, and the first key that
    differs, in words.
    """
    name = str(raw.get("model_type"))
    named = {key for key in raw if key not in HARMLESS}

    def shared(family: Family) -> float:
        known = _known(family)
        missing = len(set(family.keys.values()) - named - set(family.defaults))
        likeness = SequenceMatcher(None, family.name, name).ratio()
        return len(named & known) - len(named - known) - missing + 6 * likeness

    family = max(FAMILIES.values(), key=shared)
    refused = _refusals(raw, family)
    for key, value in raw.items():
        if key in refused:
            return family, f"the first key that differs is {key}: {refused[key]}"
        if key in named and key not in _known(family) and key[:1] != "_" and value not in (None, False):
            return family, f"the first key that differs is {key} ({str(value)[:40]}), which that family does not have"
    return family, "no key of its config.json differs, so it may be that family under another name"


def _heads(family: Family) -> dict[str, str]:
    """Their architecture -> our head."""
    bare = family.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
    heads = dict.fromkeys((family.architecture, bare, *family.also), family.head)
    if family.classifier is not None:
        heads[family.classifier] = "classification"
    return heads if family.body is None else heads | {family.body: "none"}


def _head(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """Returns the head that the architecture names; a classifier with one label gives a value."""
    named = raw.get("architectures") or [family.architecture]
    head = _heads(family)[named[0]]
    if head == "none":
        return {"head": head, "pooler": family.pooler}
    if head != "classification":
        return {"head": head}
    names = raw.get("id2label")
    labels = raw.get("num_labels", len(names) if isinstance(names, dict) else 2)
    labels = typed("num_labels", "num_labels", labels, problems)
    head = "value" if labels == 1 else "classification"
    return {"head": head, "num_labels": labels if head == "classification" else None, "pooler": family.pooler}


def _refusals(raw: Mapping[str, Any], family: Family) -> dict[str, str]:
    """Returns a sentence for each key that asks for something else than this family computes."""
    problems = {}
    read = {*family.keys.values(), *family.layers.keys, *family.flags.values()}
    read |= family.more.keys if family.more is not None else set()
    neutral = {key: accepted for key, accepted in NEUTRAL.items() if key not in read}
    for key, accepted in {**neutral, **family.only}.items():
        value = raw.get(key)
        if key == "quantization_config" and value is not None:
            problem = packing_problem(value)
            problems |= {key: problem} if problem else {}
            continue
        if value is None or any(type(value) is type(good) and value == good for good in accepted):
            continue
        words = " or ".join(["absent", *(repr(good) for good in accepted)])
        problem = f"{key} is {str(value)[:80]}; it must be {words}"
        if key == "auto_map":
            problem += ", since it asks for code of the folder, which is never run"
        problems[key] = problem
    return problems


_BIASES = ("qkv_bias", "o_bias", "bias")


def _biases(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, bool]:
    """Returns which linears have biases, by the family's keys or as it always has them."""
    values = {field: family.switches[field] for field in _BIASES if field in family.switches}
    for field, key in family.flags.items():
        value = raw.get(key, family.defaults.get(key, False))
        values[field] = False if value is None else value
        if type(values[field]) is not bool:
            problems.append(f"{key} is {str(value)[:40]!r}; it must be true or false")
    return values


def _known(family: Family) -> set[str]:
    """Keys that say something to this family, or nothing to any."""
    known = HARMLESS | set(NEUTRAL) | set(family.only) | set(family.keys.values()) | {family.activation_key}
    known |= family.more.keys if family.more is not None else set()
    return known | {*family.layers.keys, *family.flags.values()}


def _notes(raw: Mapping[str, Any], family: Family, where: str) -> list[str]:
    known = _known(family)
    unknown = [key for key, value in raw.items() if key not in known and key[:1] != "_" and value not in (None, False)]
    if not unknown:
        return []
    names = ", ".join(sorted(unknown)[:20])
    return [f"{where}: left aside, since megallm does not know {names}; --verify tells whether it matters."]


# Writing.


def family_of(model: ModelConfig) -> Family:
    """Returns the family that can hold this model: its own, else the first that fits. UsageError
    says what hinders.
    """
    own = FAMILIES.get(model.family or "")
    for family in [own, *FAMILIES.values()] if own else FAMILIES.values():
        if not _hindrances(model, family):
            return family
    reasons = "; ".join(_hindrances(model, own)) if own else f"its family is {model.family!r}"
    raise UsageError(f"No Hugging Face family ({', '.join(FAMILIES)}) can hold this model: {reasons}.")


def _hindrances(model: ModelConfig, family: Family) -> list[str]:
    found = [
        f"model.{field} is {get(model, field)}, {family.name} needs {wanted}"
        for field, wanted in family.switches.items()
        if get(model, field) not in (wanted if isinstance(wanted, frozenset) else (wanted,))
    ]
    if model.activation not in family.activations.values():
        found.append(f"model.activation is {model.activation}, {family.name} has {', '.join(family.activations)}")
    for key in set(family.flags.values()):
        fields = [field for field, own in family.flags.items() if own == key]
        if len({get(model, field) for field in fields}) > 1:
            names = " and ".join(f"model.{field}" for field in fields)
            found.append(f"{names} differ, {family.name} has both or neither")
    found += layers_problem(model, family)
    if family.architecture_of(model.head) is None:
        found.append(f"model.head is {model.head}, {family.name} has no class of that")
    if model.head in ("classification", "value") and model.pooler != family.pooler:
        found.append(f"model.pooler is {model.pooler}, {family.name} has {'one' if family.pooler else 'none'}")
    if "tie_embeddings" not in family.keys and model.head == family.head and not model.tie_embeddings:
        found.append(f"model.tie_embeddings is False, {family.name} ties them")
    if "num_kv_heads" not in family.keys and model.num_kv_heads != model.num_heads:
        found.append(f"model.num_kv_heads differs from model.num_heads, {family.name} has no such key")
    if family.more is not None:
        found += [] if found else family.more.hindrances(model)
    if "head_size" not in family.keys and not model.mla.on and model.head_size * model.num_heads != model.hidden_size:
        found.append(f"model.head_size x model.num_heads is not model.hidden_size, {family.name} needs that")
    return found


def write_config(model: ModelConfig, dtype: str, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Returns the content of config.json; `dtype` is their word (float32), `token_ids` holds
    bos_token_id and eos_token_id.

    The base of the rotary embedding stands under both names: transformers 4 reads only `rope_theta`
    and would silently take 10000, transformers 5 reads `rope_parameters`.
    """
    family = family_of(model)
    content: dict[str, Any] = {"architectures": [family.architecture_of(model.head)], "model_type": family.name}
    content |= {key: _told(model, field) for field, key in family.keys.items()} | family.writes
    content |= {} if family.more is None else family.more.write(model)
    acts = {ours: theirs for theirs, ours in reversed(family.activations.items())}
    content[family.activation_key] = acts[model.activation]
    if model.positions == "rope":
        content |= write_rope(model, family)
    content |= {key: get(model, field) for field, key in family.flags.items()}
    content |= write_layers(model, family)
    if model.head in ("classification", "value"):
        names = [f"LABEL_{n}" for n in range(model.head_outputs)]
        content |= {"id2label": {str(n): name for n, name in enumerate(names)}}
        content |= {"label2id": {name: n for n, name in enumerate(names)}}
        content |= {"problem_type": "regression"} if model.head == "value" else {}
    content |= {"pad_token_id": None} | token_ids  # absent, some families have a default beyond a small vocabulary
    if family.more is not None and "pad_token_id" in family.more.keys:
        content |= family.more.write(model)  # where positions begin behind it
    return content | {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}


def _told(model: ModelConfig, field: str) -> Any:
    """A field as their keys have it: scales are always said."""
    value = get(model, field)
    if value is None and field == "attention_scale":
        return model.head_size**-0.5
    return 1.0 if value is None and field in ("embedding_scale", "residual_scale", "logits_scaling") else value


# Choices of training among the fields of a model.
FREE = {"moe.aux_coef", "moe.z_coef", "moe.bias_rate", "moe.capacity", "moe.drop", "mtp.weight"}


def agree(wanted: ModelConfig, found: ModelConfig, where: str) -> ModelConfig:
    """Returns `found`, with the fields that a user may choose anew; UsageError when `wanted` names
    another model.

    A longer context needs another `rope_theta`, `max_positions` or `sliding_window`: those and
    `init_std` hold no weights of a rotary model and may be given. So may `causal`, another head,
    which then starts afresh, and fewer depths of multi-token prediction.
    """
    free = (
        {"rope_theta", "sliding_window", "init_std", *ROPE_NUMBERS, "rope_scaling", "causal", *_HEAD}
        | FREE
        | ({"max_positions"} if found.positions == "rope" else set())
    )
    given = {key: value for key in leaves(ModelConfig) if (value := get(wanted, key)) is not None and key not in _FROM}
    if "preset" in given:
        key = "model.init" if where.startswith("model.init") else "model.hf"
        raise UsageError(f"{key} and model.preset are both given; the folder says what the model is: keep one.")
    differing = [
        f"model.{key} is {value}, {where} has {get(found, key)}"
        for key, value in given.items()
        if key not in free and value != get(found, key) and not (key == "mtp.depth" and 0 <= value < found.mtp.depth)
    ]
    if differing:
        raise UsageError(
            f"The configuration contradicts {where.partition(' ')[0]}: {'; '.join(differing)}. "
            "Leave these keys out."
        )
    chosen = {key: get(wanted, key) for key in _FROM}
    chosen |= {key: value for key, value in given.items() if key in free or key == "mtp.depth"}
    if given.get("head", found.head) != found.head:  # what is not said of the new head is as the family has it
        chosen = dict.fromkeys((*_HEAD, "tie_embeddings", "head_dense_bias")) | {"mtp.depth": 0} | chosen
    return replace(found, chosen).resolve()


_HEAD = ("head", "num_labels", "pooler", "critic")
_FROM = ("hf", "init")  # where the first weights come from
