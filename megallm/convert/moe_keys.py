"""Keys of config.json that do not go over one by one: which layers have experts, shared experts,
latents. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megallm.models.config import ModelConfig

Raw = Mapping[str, Any]
LARGEST_LAYERS = 10_000


@dataclass(frozen=True)
class ConfigExtension:
    """What a family reads and writes beside its table of keys.

    `read` takes config.json and a list for sentences about what is wrong, and gives our fields;
    `write` gives their keys; `hindrances` says why a model cannot be written so. `keys` are those
    that it knows.
    """

    keys: frozenset[str]
    read: Callable[[Raw, list[str]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    hindrances: Callable[[ModelConfig], list[str]]


def whole(raw: Raw, key: str, absent: int, problems: list[str], least: int = 1) -> int:
    """Returns a whole number of at least `least`; with another value a sentence is added."""
    value = raw.get(key)
    if value is None:
        return absent
    if type(value) is int and least <= value < 2**31:
        return value
    problems.append(f"{key} is {str(value)[:40]!r}; it must be a whole number of at least {least}")
    return absent


# Mixtral and OLMoE: one size of feed-forward layers.


def _same_size(model: ModelConfig) -> list[str]:
    found = _each_layer(model)
    if model.moe.ffn_hidden_size != model.ffn_hidden_size:
        found.append(
            "model.moe.ffn_hidden_size differs from model.ffn_hidden_size, this family has one size"
        )
    return found


def _each_layer(model: ModelConfig) -> list[str]:
    if model.moe.first_dense == 0 and (model.moe.every == 1 or model.num_layers == 1):
        return []
    return [
        "some layers have no experts (model.moe.first_dense, model.moe.every), in this family all "
        "have"
    ]


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


EVERY_LAYER = ConfigExtension(frozenset(), _nothing, _nothing, _same_size)


# Qwen: decoder_sparse_step and a list of layers without experts.


def _read_sparse(raw: Raw, problems: list[str]) -> dict[str, Any]:
    """Returns the layers with experts, which must be every nth from a first one on."""
    layers, step = raw.get("num_hidden_layers"), whole(raw, "decoder_sparse_step", 1, problems)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(n) is not int for n in dense):
        problems.append(f"mlp_only_layers is {str(dense)[:60]}; it must be a list of layer numbers")
        return {}
    if type(layers) is not int or not 1 <= layers <= LARGEST_LAYERS:
        return {}
    sparse = [n for n in range(layers) if n not in dense and (n + 1) % step == 0]
    if not sparse:
        problems.append("decoder_sparse_step and mlp_only_layers leave no layer with experts")
        return {}
    first, every = sparse[0], sparse[1] - sparse[0] if len(sparse) > 1 else layers
    if sparse != list(range(first, layers, every)):
        problems.append(
            f"decoder_sparse_step {step} and mlp_only_layers {str(dense)[:80]} put experts into "
            f"the layers {str(sparse)[:80]}; megallm has them in every nth layer from a first one "
            "on"
        )
    return {"moe.first_dense": first, "moe.every": every}


def _write_sparse(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    if moe.first_dense == moe.every - 1:
        return {"decoder_sparse_step": moe.every, "mlp_only_layers": []}
    dense = [n for n in range(model.num_layers) if not moe.has_experts(n)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _some_layer(model: ModelConfig) -> list[str]:
    return (
        []
        if model.moe.first_dense < model.num_layers
        else ["no layer has experts (model.moe.first_dense)"]
    )


SPARSE = ConfigExtension(
    frozenset(("decoder_sparse_step", "mlp_only_layers")), _read_sparse, _write_sparse, _some_layer
)


# DeepSeek.


def _read_shared(
    raw: Raw, problems: list[str], width: int, shared: int, first: int
) -> dict[str, Any]:
    """Returns shared experts and dense layers in front; the numbers are what absent keys mean."""
    width = whole(raw, "moe_intermediate_size", width, problems)
    return {
        "moe.shared_ffn_hidden_size": whole(raw, "n_shared_experts", shared, problems) * width,
        "moe.first_dense": whole(raw, "first_k_dense_replace", first, problems, least=0),
    }


def _read_queries(raw: Raw, problems: list[str]) -> dict[str, Any]:
    none = "q_lora_rank" in raw and raw["q_lora_rank"] is None
    return {"mla.q_lora_dim": 0 if none else whole(raw, "q_lora_rank", 1536, problems)}


def _read_deepseek(raw: Raw, problems: list[str]) -> dict[str, Any]:
    depth = whole(raw, "num_nextn_predict_layers", 0, problems, least=0)
    found = _read_shared(raw, problems, 2048, 1, 3) | _read_queries(raw, problems)
    return found | {"mtp.depth": depth}


def _write_shared(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return {
        "n_shared_experts": moe.shared_ffn_hidden_size // moe.ffn_hidden_size,
        "first_k_dense_replace": moe.first_dense,
    }


def _write_deepseek(model: ModelConfig) -> dict[str, Any]:
    return _write_shared(model) | {
        "q_lora_rank": model.mla.q_lora_dim or None,
        "num_nextn_predict_layers": model.mtp.depth,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    }


def _not_deepseek(model: ModelConfig) -> list[str]:
    found = []
    if not model.mla.on:
        found.append("model.mla.kv_lora_dim is 0, this family has latent attention")
    if (model.mla.norm_eps or model.norm_eps) != 1e-6:
        found.append("the norms of latents (model.mla.norm_eps) have another epsilon than 1e-06")
    return found + _not_shared(model)


def _not_shared(model: ModelConfig) -> list[str]:
    moe, found = model.moe, []
    if not moe.shared_ffn_hidden_size or moe.shared_ffn_hidden_size % moe.ffn_hidden_size:
        found.append("model.moe.shared_ffn_hidden_size is not that of one or several experts")
    if model.mtp.depth and not model.mtp.joins:
        found.append("model.mtp.kind is not deepseek")
    if model.num_layers <= moe.first_dense:
        found.append("no layer has experts (model.moe.first_dense)")
    return found


_DEEPSEEK_KEYS = ("n_shared_experts", "first_k_dense_replace", "q_lora_rank", "num_nextn_predict_layers",
                  "qk_head_dim", "head_dim")  # fmt: skip
DEEPSEEK = ConfigExtension(
    frozenset(_DEEPSEEK_KEYS), _read_deepseek, _write_deepseek, _not_deepseek
)
OPEN_IN_DEEPSEEK = ("mla.kv_lora_dim", "mtp.depth", "moe.routed_scale", "moe.num_groups")
ONLY_IN_DEEPSEEK: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "auto_map": ({}, {  # the published folder's; transformers has that code itself since, and nothing of it is run
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }),
}  # fmt: skip


def _read_deepseek_2(raw: Raw, problems: list[str]) -> dict[str, Any]:
    found = _read_shared(raw, problems, 1407, 2, 0) | _read_queries(raw, problems)
    if raw.get("topk_method") == "group_limited_greedy":
        found["moe.num_groups"] = whole(raw, "n_group", 1, problems)
        found["moe.top_groups"] = whole(raw, "topk_group", 1, problems)
    return found


def _write_deepseek_2(model: ModelConfig) -> dict[str, Any]:
    grouped = model.moe.num_groups > 1
    return _write_shared(model) | {
        "q_lora_rank": model.mla.q_lora_dim or None,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": model.moe.num_groups,
        "topk_group": model.moe.top_groups,
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    }


DEEPSEEK_2 = ConfigExtension(
    frozenset((*_DEEPSEEK_KEYS, "n_group", "topk_group")),
    _read_deepseek_2,
    _write_deepseek_2,
    _not_deepseek,
)
ONLY_IN_DEEPSEEK_2: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
    "norm_topk_prob": (False,),
    "moe_layer_freq": (1,),
    "auto_map": ({}, {  # as in `ONLY_IN_DEEPSEEK`
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    }),
}  # fmt: skip


# GLM-4.5: DeepSeek's experts beside ordinary attention.


def _read_glm4(raw: Raw, problems: list[str]) -> dict[str, Any]:
    depth = whole(raw, "num_nextn_predict_layers", 1, problems, least=0)
    return _read_shared(raw, problems, 1408, 1, 1) | {"mtp.depth": depth}


def _write_glm4(model: ModelConfig) -> dict[str, Any]:
    return _write_shared(model) | {"num_nextn_predict_layers": model.mtp.depth}


GLM4 = ConfigExtension(
    frozenset(("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")),
    _read_glm4,
    _write_glm4,
    _not_shared,
)


# ERNIE: from a first layer to a last one, every nth.


def _read_ernie(raw: Raw, problems: list[str]) -> dict[str, Any]:
    layers = whole(raw, "num_hidden_layers", 28, problems)
    step = whole(raw, "moe_layer_interval", 1, problems)
    begin = whole(raw, "moe_layer_start_index", 1, problems, least=0)
    end = raw.get("moe_layer_end_index", -1)
    here = range(begin, min(layers, LARGEST_LAYERS))
    sparse = [n for n in here if (n + 1) % step == 0]
    if not sparse or end not in (None, -1) and not (type(end) is int and end >= sparse[-1]):
        problems.append(
            f"moe_layer_start_index, moe_layer_interval and moe_layer_end_index {str(end)[:40]} "
            "must leave experts in every nth layer up to the last one"
        )
        return {}
    width = whole(raw, "moe_intermediate_size", 1536, problems)
    shared = whole(raw, "moe_num_shared_experts", 2, problems, least=0)
    return {
        "moe.first_dense": sparse[0],
        "moe.every": step,
        "moe.shared_ffn_hidden_size": shared * width,
    }


def _write_ernie(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return {
        "moe_layer_start_index": moe.first_dense,
        "moe_layer_end_index": model.num_layers - 1,
        "moe_layer_interval": moe.every,
        "moe_num_shared_experts": moe.shared_ffn_hidden_size // moe.ffn_hidden_size,
        "use_bias": False,
    }


def _not_ernie(model: ModelConfig) -> list[str]:
    moe, found = model.moe, _some_layer(model)
    if moe.shared_ffn_hidden_size % moe.ffn_hidden_size:
        found.append("model.moe.shared_ffn_hidden_size is not that of whole experts")
    if (moe.first_dense + 1) % moe.every:
        found.append("model.moe.first_dense + 1 is not a multiple of model.moe.every")
    return found


_ERNIE_KEYS = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_num_shared_experts",
               "num_nextn_predict_layers", "moe_capacity", "moe_gate", "moe_use_aux_free", "moe_norm_min")  # fmt: skip
ERNIE = ConfigExtension(frozenset(_ERNIE_KEYS), _read_ernie, _write_ernie, _not_ernie)
