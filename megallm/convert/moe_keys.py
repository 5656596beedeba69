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


def _read_deepseek(raw: Raw, problems: list[str]) -> dict[str, Any]:
    width = whole(raw, "moe_intermediate_size", 2048, problems)
    queries = (
        0
        if "q_lora_rank" in raw and raw["q_lora_rank"] is None
        else whole(raw, "q_lora_rank", 1536, problems)
    )
    return {
        "moe.shared_ffn_hidden_size": whole(raw, "n_shared_experts", 1, problems) * width,
        "moe.first_dense": whole(raw, "first_k_dense_replace", 3, problems, least=0),
        "mla.q_lora_dim": queries,
        "mtp.depth": whole(raw, "num_nextn_predict_layers", 0, problems, least=0),
    }


def _write_deepseek(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return {
        "n_shared_experts": moe.shared_ffn_hidden_size // moe.ffn_hidden_size,
        "first_k_dense_replace": moe.first_dense,
        "q_lora_rank": model.mla.q_lora_dim or None,
        "num_nextn_predict_layers": model.mtp.depth,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    }


def _not_deepseek(model: ModelConfig) -> list[str]:
    moe, found = model.moe, []
    if not model.mla.on:
        found.append("model.mla.kv_lora_dim is 0, deepseek_v3 has latent attention")
    if (model.mla.norm_eps or model.norm_eps) != 1e-6:
        found.append("the norms of latents (model.mla.norm_eps) have another epsilon than 1e-06")
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
