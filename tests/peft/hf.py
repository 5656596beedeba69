"""Tiny models of transformers with adapters of PEFT's that are at work, and their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.engine.engine import Engine
from tests.convert.tiny import SIZES, THETA, Case

SIX = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
MODELS = {
    "llama": Case("llama", "LlamaConfig", SIZES),
    "tied": Case("tied", "LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "gpt2": Case("gpt2", "GPT2Config", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                        "bos_token_id": 1, "eos_token_id": 2}),
    "phi3": Case("phi3", "Phi3Config", SIZES | {"rope_parameters": THETA, "pad_token_id": None}),
    "mixtral": Case("mixtral", "MixtralConfig", SIX | {
        "intermediate_size": 20, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4,
    }),
    "qwen3_moe": Case("qwen3_moe", "Qwen3MoeConfig", SIX | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_key_value_heads": 1,
        "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8, "rope_parameters": THETA,
    }),
    "deepseek_v3": Case("deepseek_v3", "DeepseekV3Config", SIX | {
        "intermediate_size": 20, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12, "kv_lora_rank": 12,
        "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "rope_parameters": THETA,
        "num_key_value_heads": 4,
    }),
}  # fmt: skip
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "two of a stack": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "dora, ranks and alphas": ("llama", {
        "target_modules": SEVEN, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 7},
    }),
    "modules in full": ("llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm"]}),
    "one layer": ("llama", {"target_modules": r".*layers\.1\..*(gate|down)_proj"}),
    "both ends": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied head": ("tied", {"target_modules": ["o_proj", "lm_head"]}),
    "fused, transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "experts": ("mixtral", EXPERTS),
    "half the experts": ("qwen3_moe", EXPERTS | {"target_parameters": ["mlp.experts.down_proj"]}),
    "latents": ("deepseek_v3", {"target_modules": ["q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa", "o_proj"]}),
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """Folders of a base and of an adapter, and what transformers with PEFT makes of `text`."""

    base: Path
    adapter: Path
    text: Tensor
    log_probs: Tensor
    trainable: int


def model_of(name: str, folder: Path) -> Any:
    """A random model of transformers, saved in `folder`."""
    import transformers  # not where ranks import this module: it takes seconds

    case = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, case.config)(**case.arguments)
    model = getattr(transformers, case.auto).from_config(config)
    model.save_pretrained(folder)
    return model


def save(name: str, folder: Path, **changes: Any) -> Saved:
    """The base and the adapter of a row of ADAPTERS, all of whose parameters differ from the start."""
    import peft

    family, options = ADAPTERS[name]
    model = model_of(family, folder / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options | changes)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.base_model.model.name_or_path = str(folder / "base")
    with torch.no_grad():
        for param in adapted.parameters():
            if param.requires_grad:
                param += 0.1 * torch.randn_like(param)
    adapted.save_pretrained(folder / "adapter")
    text = torch.randint(61, (2, 13))
    trainable, _ = adapted.get_nb_trainable_parameters()
    return Saved(folder / "base", folder / "adapter", text, hf_log_probs(adapted, text), trainable)


def hf_log_probs(model: Any, text: Tensor) -> Tensor:
    """Of each next token `[B, T]`, by transformers."""
    with torch.no_grad():
        logits = model(text[:, :-1]).logits.double().log_softmax(-1)
    return logits.gather(-1, text[:, 1:, None]).squeeze(-1)


def log_probs(engine: Engine, text: Tensor) -> Tensor:
    """The same by an engine."""
    batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
    batch["mask"] = torch.ones_like(batch["tokens"], dtype=torch.bool)
    batch["positions"] = torch.arange(text.shape[1] - 1).expand_as(batch["tokens"]).contiguous()
    return engine.log_probs([batch])[0]
