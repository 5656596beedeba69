"""Tiny random models of each family, made with transformers, and megallm's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# What a subprocess starts with to measure its own peak: getrusage would tell that of the parent before the exec.
MEASURING = """
import re, sys
def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def begin():
    open("/proc/self/clear_refs", "w").write("5")
    return kib("VmRSS")
"""

THETA = {"rope_theta": 1e6, "rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 48}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8,
        "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


@dataclass(frozen=True)
class Case:
    """One transformers model: its config class and arguments, and what makes a model of them."""

    name: str
    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"


def case(name: str, config: str, auto: str = "AutoModelForCausalLM", **arguments: Any) -> Case:
    sizes = GPT2 if config == "GPT2Config" else SIZES
    if config == "BertConfig":
        sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return Case(name, config, sizes | arguments, auto)


CLASSES = "AutoModelForSequenceClassification"


CASES = [
    case("gpt2", "GPT2Config"),
    case("gpt2-untied", "GPT2Config", tie_word_embeddings=False, activation_function="gelu", n_inner=40),
    case("llama", "LlamaConfig"),
    case("llama-tied", "LlamaConfig", tie_word_embeddings=True, rope_parameters=THETA | {"rope_theta": 5e5}),
    case("llama-head-dim", "LlamaConfig", head_dim=16, num_key_value_heads=1),
    case("llama-biases", "LlamaConfig", attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    case("llama-linear", "LlamaConfig", rope_parameters=THETA | {"rope_type": "linear", "factor": 4.0}),
    case("llama-3.1", "LlamaConfig", rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=32),
    case("llama-yarn", "LlamaConfig", rope_parameters=YARN, head_dim=32),
    case(
        "llama-dynamic",
        "LlamaConfig",
        rope_parameters=THETA | {"rope_type": "dynamic", "factor": 3.0},
        max_position_embeddings=6,
    ),
    case("mistral", "MistralConfig", sliding_window=8),
    case("mistral-full", "MistralConfig", sliding_window=None, head_dim=24),
    case("qwen2", "Qwen2Config", rope_parameters=THETA),
    case("qwen2-tied", "Qwen2Config", tie_word_embeddings=True, num_key_value_heads=1),
    case("qwen2-window", "Qwen2Config", use_sliding_window=True, sliding_window=7, max_window_layers=0),
    case("qwen3", "Qwen3Config", head_dim=16),
    case("qwen3-tied", "Qwen3Config", head_dim=8, tie_word_embeddings=True),
    case("phi3", "Phi3Config", sliding_window=9, rope_parameters=THETA, pad_token_id=None),
    case("phi3-tied", "Phi3Config", tie_word_embeddings=True, num_key_value_heads=4, pad_token_id=None),
    case("bert", "BertConfig", "AutoModelForMaskedLM"),
    case("bert-tanh", "BertConfig", "AutoModelForMaskedLM", hidden_act="gelu_new", type_vocab_size=3),
    case("bert-body", "BertConfig", "AutoModel"),
    case("bert-classes", "BertConfig", CLASSES, num_labels=5),
    case("bert-value", "BertConfig", CLASSES, num_labels=1),
    case("llama-classes", "LlamaConfig", CLASSES, num_labels=3),
    case("llama-two-classes", "LlamaConfig", CLASSES),
    case("llama-reward", "LlamaConfig", CLASSES, num_labels=1, tie_word_embeddings=True),
    case("gpt2-reward", "GPT2Config", CLASSES, num_labels=1),
    case("mistral-classes", "MistralConfig", CLASSES, sliding_window=8, num_labels=4),
    case("qwen2-classes", "Qwen2Config", CLASSES, rope_parameters=THETA, num_labels=4),
    case("qwen3-reward", "Qwen3Config", CLASSES, head_dim=16, num_labels=1),
]


def make(folder: Path, wanted: Case, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """Save a random model of the case, all its parameters (norms and biases too) away from their neutral values."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, wanted.config)(**wanted.arguments)
    model = getattr(transformers, wanted.auto).from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder
