"""`config.json` <-> `ModelConfig`, without transformers and without running anything. Pure.

What a key asks for is computed, or refused by name; a key that nobody here knows is told as a note.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallm.base.config import get, leaves, replace
from megallm.base.errors import UsageError
from megallm.convert.families import FAMILIES, NEUTRAL, Family
from megallm.convert.folder import catalogue, is_model_folder, read_json
from megallm.models.config import ModelConfig
from megallm.models.rope_scaling import ROPE_NUMBERS, ROPE_OPTIONS

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
    "ep_size",
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
    problems += _refused(raw, family)
    values: dict[str, Any] = {}
    for field, key in family.keys.items():
        value = raw[key] if key in raw else family.defaults.get(key)
        if value is not None:
            values[field] = _typed(field, key, value, problems)
    act = raw.get(family.activation_key) or family.defaults[family.activation_key]
    if not isinstance(act, str) or act not in family.activations:
        known = ", ".join(family.activations)
        problems.append(f"{family.activation_key} is {act!r}; megallm computes {known} in this family")
    else:
        values["activation"] = family.activations[act]
    values |= _biases(raw, family, problems) | _window(raw, family, problems) | _head(raw, family, problems)
    if family.more is not None:
        values |= family.more.read(raw, problems)
    if values.get("head") != "lm":
        values["mtp.depth"] = 0  # which belongs to the head
    if family.switches["positions"] == "rope":
        values |= _rope(raw, family, problems)
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
        raise UsageError(
            f"{where} has model_type {str(name)[:60]!r}; megallm converts {', '.join(FAMILIES)} (Qwen2.5 is qwen2, "
            "Llama 2 and 3 are llama). Code that a folder brings along is never run."
        )
    named = raw.get("architectures") or []
    family = FAMILIES[name]
    if not isinstance(named, list) or any(one not in _heads(family) for one in named):
        known = [one for one in (family.architecture, family.classifier, family.body) if one is not None]
        raise UsageError(f"{where} has architectures {str(named)[:120]}; known is {' or '.join(known)}.")
    return family


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
    labels = _typed("num_labels", "num_labels", labels, problems)
    head = "value" if labels == 1 else "classification"
    return {"head": head, "num_labels": labels if head == "classification" else None, "pooler": family.pooler}


def _refused(raw: Mapping[str, Any], family: Family) -> list[str]:
    """Returns a sentence for each key that asks for something else than this family computes."""
    problems = []
    read = {*family.keys.values(), *(family.more.keys if family.more is not None else ())}
    neutral = {key: accepted for key, accepted in NEUTRAL.items() if key not in read}
    for key, accepted in {**neutral, **family.only}.items():
        value = raw.get(key)
        if value is None or any(type(value) is type(good) and value == good for good in accepted):
            continue
        words = " or ".join(["absent", *(repr(good) for good in accepted)])
        problem = f"{key} is {str(value)[:80]}; it must be {words}"
        if key == "auto_map":
            problem += ", since it asks for code of the folder, which is never run"
        problems.append(problem)
    return problems


_INTEGERS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_size", "vocab_size",
             "max_positions", "rope_positions", "token_types", "num_labels", "moe.num_experts", "moe.top_k",
             "moe.ffn_hidden_size", "moe.shared_ffn_hidden_size", "moe.num_groups", "moe.top_groups",
             "mla.kv_lora_dim", "mla.nope_head_size", "mla.rope_head_size", "mla.value_head_size")  # fmt: skip
_LARGEST = 2**31 - 1


def _typed(field: str, key: str, value: Any, problems: list[str]) -> Any:
    """Returns the value when it has the type and range of the field, else None with a sentence
    added.
    """
    if field in _INTEGERS:
        good, words = type(value) is int and 1 <= value <= _LARGEST, f"a whole number from 1 to {_LARGEST}"
    elif field in ("tie_embeddings", "moe.norm_topk_prob", "rope_truncate"):
        good, words = type(value) is bool, "true or false"
    else:
        good, words = type(value) in (int, float) and 0 < value < 1e30, "a positive number"
    if good:
        return value
    problems.append(f"{key} is {str(value)[:40]!r}; it must be {words}")
    return None


def _biases(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, bool]:
    if family.name != "llama":
        return {field: family.switches[field] for field in ("qkv_bias", "bias")}
    attention, mlp = (raw.get(key) or False for key in ("attention_bias", "mlp_bias"))
    if attention != mlp or type(attention) is not bool:
        problems.append(f"attention_bias is {attention} and mlp_bias {mlp}; megallm has both of them or neither")
    return {"qkv_bias": attention, "bias": attention}


_QWEN = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


def _window(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, int | None]:
    """Returns the one window of all layers; layers that differ among themselves are refused."""
    layers = raw.get(family.keys["num_layers"])
    window = raw["sliding_window"] if "sliding_window" in raw else family.defaults.get("sliding_window")
    kinds = raw.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and kinds):
        problems.append(f"layer_types is {str(kinds)[:40]!r}; it must be a list of words")
        return {}
    if family.name in _QWEN:
        slides = (raw.get("use_sliding_window") or False) and window is not None
        first = raw.get("max_window_layers", 28)
        if kinds is None and slides and type(layers) is int and type(first) is int:
            kinds = ["full_attention" if n < first else "sliding_attention" for n in range(min(layers, 10_000))]
        if not slides:
            window = None
    if kinds and len({str(kind) for kind in kinds}) > 1:
        problems.append("layer_types (or max_window_layers) mixes full and sliding attention; all layers must be alike")
    elif kinds and kinds[0] == "full_attention":
        window = None
    elif kinds and (kinds[0] != "sliding_attention" or window is None):
        problems.append(
            f"layer_types is {kinds[0]!r} with sliding_window {window}; megallm computes full_attention, or "
            "sliding_attention with a window"
        )
    if window is not None and (type(window) is not int or window < 1):
        problems.append(f"sliding_window is {str(window)[:40]!r}; it must be a whole number of at least 1, or null")
        return {}
    return {"sliding_window": window}


def _rope(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """rope_theta from either key, and how the embedding was stretched, from either key."""
    found, values = {}, {}
    for key in ("rope_parameters", "rope_scaling"):
        table = raw.get(key)
        if table is None:
            continue
        if not isinstance(table, dict):
            problems.append(f"{key} is {str(table)[:40]!r}; it must be an object")
            continue
        values |= _stretch(key, table, raw, problems)
        if table.get("partial_rotary_factor", 1) != 1:
            problems.append(f"{key}.partial_rotary_factor is {table['partial_rotary_factor']}; it must be 1")
        if table.get("rope_theta") is not None:
            found[f"{key}.rope_theta"] = table["rope_theta"]
    if raw.get("rope_theta") is not None:
        found["rope_theta"] = raw["rope_theta"]
    if len(set(map(str, map(_number, found.values())))) > 1:
        problems.append(" and ".join(f"{key} is {value}" for key, value in found.items()) + ": they must agree")
    theta = next(iter(found.values()), family.defaults["rope_theta"])
    theta = _typed("rope_theta", "rope_theta", theta, problems)
    return values | {"rope_theta": None if theta is None else float(theta)}


# Their rope types -> our fields and where their numbers stand.
STRETCHES: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_factor": "low_freq_factor",
        "rope_high_factor": "high_freq_factor",
        "rope_positions": "original_max_position_embeddings",
    },
    "dynamic": {"rope_factor": "factor", "rope_positions": "max_position_embeddings"},
    "yarn": {
        "rope_factor": "factor",
        "rope_positions": "original_max_position_embeddings",
        "rope_beta_fast": "beta_fast",
        "rope_beta_slow": "beta_slow",
        "rope_attention_factor": "attention_factor",
        "rope_mscale": "mscale",
        "rope_mscale_all_dim": "mscale_all_dim",
        "rope_truncate": "truncate",
    },
}


def _stretch(key: str, table: Mapping[str, Any], raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the fields of a stretched rotary embedding; others than STRETCHES are refused by
    name.
    """
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in STRETCHES:
        problems.append(f"{key} asks for rope type {str(kind)[:40]!r}; megallm computes {', '.join(STRETCHES)}")
        return {}
    if kind == "default":
        return {}
    values: dict[str, Any] = {"rope_scaling": kind}
    for field, name in STRETCHES[kind].items():
        value = table.get(name, raw.get(name))
        value = None if name.startswith("mscale") and value == 0 else value  # 0 is their way of saying none
        if value is None and field not in ROPE_OPTIONS.get(kind, ()):
            problems.append(f"{key} of type {kind} lacks {name}")
        elif value is not None:
            value = _typed(field, f"{key}.{name}", value, problems)
            values[field] = float(value) if type(value) is int and field != "rope_positions" else value
    return values


def _number(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _notes(raw: Mapping[str, Any], family: Family, where: str) -> list[str]:
    known = HARMLESS | set(NEUTRAL) | set(family.only) | set(family.keys.values()) | {family.activation_key}
    known |= family.more.keys if family.more is not None else set()
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
        if get(model, field) != wanted
    ]
    if model.activation not in family.activations.values():
        found.append(f"model.activation is {model.activation}, {family.name} has {', '.join(family.activations)}")
    if family.name == "llama" and model.qkv_bias != model.bias:
        found.append("model.qkv_bias and model.bias differ, llama has both or neither")
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
    content |= {key: get(model, field) for field, key in family.keys.items()} | family.writes
    content |= {} if family.more is None else family.more.write(model)
    acts = {ours: theirs for theirs, ours in reversed(family.activations.items())}
    content[family.activation_key] = acts[model.activation]
    if model.positions == "rope":
        content |= _rope_keys(model)
    if family.name == "llama":
        content |= {"attention_bias": model.bias, "mlp_bias": model.bias}
    if "sliding_window" not in family.switches and family.name not in _QWEN:
        content |= {"sliding_window": model.sliding_window}
    if family.name in _QWEN:
        slides = model.sliding_window is not None
        content |= {"use_sliding_window": slides, "sliding_window": model.sliding_window}
        content |= {"max_window_layers": 0 if slides else model.num_layers}
    if model.head in ("classification", "value"):
        names = [f"LABEL_{n}" for n in range(model.head_outputs)]
        content |= {"id2label": {str(n): name for n, name in enumerate(names)}}
        content |= {"label2id": {name: n for n, name in enumerate(names)}}
        content |= {"problem_type": "regression"} if model.head == "value" else {}
    content |= {"pad_token_id": None} | token_ids  # absent, some families have a default beyond a small vocabulary
    return content | {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}


def _rope_keys(model: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and, when stretched, `rope_scaling` for transformers 4; `rope_parameters` for
    5.
    """
    kind, theta = model.rope_scaling or "default", model.rope_theta
    if kind == "ntk":  # a larger theta and nothing else
        kind, theta = "default", theta * model.rope_factor ** (model.rope_size / (model.rope_size - 2))
    if kind == "dynamic" and model.rope_positions != model.max_positions:
        raise UsageError(
            f"model.rope_scaling dynamic has model.rope_positions {model.rope_positions}, for which transformers takes "
            f"max_position_embeddings, here {model.max_positions}: the model has no Hugging Face form."
        )
    numbers = {name: getattr(model, field) for field, name in STRETCHES[kind].items()}
    table = {"rope_type": kind} | {name: value for name, value in numbers.items() if value is not None}
    if kind == "dynamic":
        del table["max_position_embeddings"]  # which stands outside
    keys = {"rope_theta": theta, "rope_parameters": table | {"rope_theta": theta}}
    return keys | ({} if kind == "default" else {"rope_scaling": table})


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
        chosen = dict.fromkeys((*_HEAD, "tie_embeddings")) | {"mtp.depth": 0} | chosen
    return replace(found, chosen).resolve()


_HEAD = ("head", "num_labels", "pooler", "critic")
_FROM = ("hf", "init")  # where the first weights come from
