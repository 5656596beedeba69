"""Families (which switches) and presets (which sizes), as tables. No torch.

Sizes are those of the published models' `config.json`; the tiny ones are ours, named after their
parameters, for a first run, a test of a pipeline, or a single machine without a GPU.
"""

from __future__ import annotations

from typing import Any

_ROPE_DECODER: dict[str, Any] = {
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "activation": "swiglu",
    "positions": "rope",
    "rope_theta": 10000.0,
    "qkv_bias": None,  # as `bias`
    "bias": False,
    "qk_norm": False,
    "qk_norm_span": "head",
    "sliding_window": None,
    "attention_sinks": False,
    "tie_embeddings": False,
    "max_positions": 4096,
    "init_std": 0.02,
    "causal": True,
    "norm_place": "pre",
    "first_norm": True,
    "parallel_residual": False,
    "position_offset": 0,
    "embedding_norm": False,
    "token_types": 0,
    "head": "lm",
    "head_bias": False,
    "num_labels": None,
    "pooler": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _ROPE_DECODER,
    "mistral": _ROPE_DECODER,
    "qwen2": _ROPE_DECODER | {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1000000.0},
    "qwen3": _ROPE_DECODER | {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1000000.0},
    "phi3": _ROPE_DECODER,
    "mixtral": _ROPE_DECODER | {"rope_theta": 1000000.0},
    "qwen2_moe": _ROPE_DECODER
    | {
        "qkv_bias": True,
        "norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "moe": {"norm_topk_prob": False, "shared_gate": True},
    },
    "qwen3_moe": _ROPE_DECODER | {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1000000.0},
    "olmoe": _ROPE_DECODER
    | {"qk_norm": True, "qk_norm_span": "all", "moe": {"norm_topk_prob": False}},
    "deepseek_v3": _ROPE_DECODER
    | {
        "norm_eps": 1e-6,
        "moe": {"score": "sigmoid", "selection_bias": True, "aux_coef": 0.0001},
        "mla": {"norm_eps": 1e-6},
    },
    "gpt2": _ROPE_DECODER
    | {
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "positions": "learned",
        "bias": True,
        "tie_embeddings": True,
        "max_positions": 1024,
    },
    "bert": _ROPE_DECODER
    | {
        "norm": "layernorm",
        "norm_eps": 1e-12,
        "activation": "gelu",
        "positions": "learned",
        "bias": True,
        "tie_embeddings": True,
        "max_positions": 512,
        "causal": False,
        "norm_place": "post",
        "embedding_norm": True,
        "token_types": 2,
        "head": "mlm",
        "head_bias": True,
    },
}
_GEMMA = _ROPE_DECODER | {
    "norm": "rmsnorm_unit",
    "norm_eps": 1e-6,
    "norm_place": "both",
    "activation": "geglu_tanh",
    "tie_embeddings": True,
}
_LAYER_NORMED = _ROPE_DECODER | {"norm": "layernorm", "activation": "gelu_tanh", "bias": True}
_NORMED_OUTPUT = _ROPE_DECODER | {
    "norm_place": "output",
    "norm_eps": 1e-6,
    "qk_norm": True,
    "qk_norm_span": "all",
    "rope_theta": 500000.0,
}
FAMILIES |= {
    "gemma2": _GEMMA | {"layer_pattern": "wf"},
    "gemma3_text": _GEMMA
    | {"layer_pattern": "wwwwwf", "qk_norm": True, "rope_theta": 1e6, "window_rope_theta": 10000.0},
    "gpt_oss": _ROPE_DECODER
    | {
        "layer_pattern": "wf",
        "attention_sinks": True,
        "qkv_bias": True,
        "o_bias": True,
        "activation": "swiglu_clamped",
        "rope_theta": 150000.0,
        "moe": {"bias": True, "router_bias": True},
    },
    "smollm3": _ROPE_DECODER
    | {
        "layer_pattern": "fffn",
        "norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "tie_embeddings": True,
    },
    "olmo2": _NORMED_OUTPUT,
    "olmo3": _NORMED_OUTPUT | {"layer_pattern": "wwwf"},
    "glm4_moe": _ROPE_DECODER
    | {
        "qkv_bias": True,
        "rope_theta": 1e6,
        "rope_fraction": 0.5,
        "moe": {"score": "sigmoid", "selection_bias": True, "aux_coef": 0.0001},
    },
    "granite": _ROPE_DECODER | {"tie_embeddings": True},
    "seed_oss": _ROPE_DECODER
    | {"qkv_bias": True, "o_bias": False, "norm_eps": 1e-6, "rope_theta": 1e7},
    "ernie4_5": _ROPE_DECODER | {"tie_embeddings": True, "rope_theta": 500000.0},
    "ernie4_5_moe": _ROPE_DECODER
    | {"tie_embeddings": True, "rope_theta": 500000.0, "moe": {"selection_bias": True}},
    "starcoder2": _LAYER_NORMED | {"tie_embeddings": True, "init_std": 0.018042},
    "gpt_neox": _LAYER_NORMED
    | {"activation": "gelu", "parallel_residual": True, "rope_fraction": 0.25}
    | {"max_positions": 2048},
    "deepseek_v2": _ROPE_DECODER
    | {"norm_eps": 1e-6, "moe": {"norm_topk_prob": False}, "mla": {"norm_eps": 1e-6}},
    "modernbert": _ROPE_DECODER
    | {
        "norm": "layernorm_unbiased",
        "activation": "geglu",
        "causal": False,
        "embedding_norm": True,
        "first_norm": False,
        "layer_pattern": "fww",
        "rope_theta": 160000.0,
        "window_rope_theta": 10000.0,
        "max_positions": 8192,
        "head": "mlm",
        "head_bias": True,
        "head_dense_bias": False,
        "tie_embeddings": True,
    },
    **dict.fromkeys(
        ("roberta", "xlm-roberta"),
        FAMILIES["bert"] | {"norm_eps": 1e-5, "token_types": 1, "position_offset": 2},
    ),
}


def _sizes(
    family: str, layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, **rest: Any
) -> dict[str, Any]:
    return {
        "family": family,
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_heads": heads,
        "num_kv_heads": kv,
        "vocab_size": vocab,
    } | rest


def _experts(family: str, *sizes: int, **rest: Any) -> dict[str, Any]:
    """`_sizes` with those of experts and latents added to the family's switches of them."""
    switches = FAMILIES[family]
    joined = {name: switches.get(name, {}) | rest[name] for name in ("moe", "mla") if name in rest}
    return _sizes(family, *sizes, **(rest | joined))


_DEEPSEEK_V3: dict[str, Any] = {
    "moe": {
        "num_experts": 256,
        "top_k": 8,
        "ffn_hidden_size": 2048,
        "shared_ffn_hidden_size": 2048,
        "first_dense": 3,
        "num_groups": 8,
        "top_groups": 4,
        "routed_scale": 2.5,
    },
    "mla": {
        "kv_lora_dim": 512,
        "q_lora_dim": 1536,
        "nope_head_size": 128,
        "rope_head_size": 64,
        "value_head_size": 128,
    },
    "mtp": {"depth": 1},
    "max_positions": 163840,
    "rope_scaling": "yarn",
    "rope_factor": 40.0,
    "rope_positions": 4096,
    "rope_beta_fast": 32.0,
    "rope_beta_slow": 1.0,
    "rope_mscale": 1.0,
    "rope_mscale_all_dim": 1.0,
}

_LLAMA31: dict[str, Any] = {
    "rope_theta": 500000.0,
    "max_positions": 131072,
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_low_factor": 1.0,
    "rope_high_factor": 4.0,
    "rope_positions": 8192,
}

_TINY: dict[str, Any] = {"tie_embeddings": True, "max_positions": 2048}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny-1m": _sizes("llama", 4, 128, 384, 4, 2, 2048, **_TINY),
    "tiny-7m": _sizes("llama", 8, 256, 704, 8, 4, 4096, **_TINY),
    "tiny-15m": _sizes("llama", 8, 384, 960, 6, 2, 8192, **_TINY),
    "tiny-42m": _sizes("llama", 11, 512, 1472, 8, 4, 16384, **_TINY),
    "gpt2": _sizes("gpt2", 12, 768, 3072, 12, 12, 50257),
    "gpt2-medium": _sizes("gpt2", 24, 1024, 4096, 16, 16, 50257),
    "gpt2-large": _sizes("gpt2", 36, 1280, 5120, 20, 20, 50257),
    "gpt2-xl": _sizes("gpt2", 48, 1600, 6400, 25, 25, 50257),
    "llama2-7b": _sizes("llama", 32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": _sizes("llama", 40, 5120, 13824, 40, 40, 32000),
    "llama2-70b": _sizes("llama", 80, 8192, 28672, 64, 8, 32000),
    "llama3-8b": _sizes(
        "llama", 32, 4096, 14336, 32, 8, 128256, rope_theta=500000.0, max_positions=8192
    ),
    "llama3-70b": _sizes(
        "llama", 80, 8192, 28672, 64, 8, 128256, rope_theta=500000.0, max_positions=8192
    ),
    "llama3.1-8b": _sizes("llama", 32, 4096, 14336, 32, 8, 128256, **_LLAMA31),
    "llama3.1-70b": _sizes("llama", 80, 8192, 28672, 64, 8, 128256, **_LLAMA31),
    "llama3.2-1b": _sizes(
        "llama",
        16,
        2048,
        8192,
        32,
        8,
        128256,
        tie_embeddings=True,
        **(_LLAMA31 | {"rope_factor": 32.0}),
    ),
    "qwen2-0.5b": _sizes(
        "qwen2", 24, 896, 4864, 14, 2, 151936, tie_embeddings=True, max_positions=131072
    ),
    "qwen2-7b": _sizes("qwen2", 28, 3584, 18944, 28, 4, 152064, max_positions=131072),
    "qwen2.5-0.5b": _sizes(
        "qwen2", 24, 896, 4864, 14, 2, 151936, tie_embeddings=True, max_positions=32768
    ),
    "qwen2.5-1.5b": _sizes(
        "qwen2", 28, 1536, 8960, 12, 2, 151936, tie_embeddings=True, max_positions=131072
    ),
    "qwen2.5-7b": _sizes("qwen2", 28, 3584, 18944, 28, 4, 152064, max_positions=131072),
    "qwen3-0.6b": _sizes(
        "qwen3",
        28,
        1024,
        3072,
        16,
        8,
        151936,
        head_size=128,
        tie_embeddings=True,
        max_positions=40960,
    ),
    "qwen3-8b": _sizes("qwen3", 36, 4096, 12288, 32, 8, 151936, head_size=128, max_positions=40960),
    "bert-base": _sizes("bert", 12, 768, 3072, 12, 12, 30522),
    "bert-large": _sizes("bert", 24, 1024, 4096, 16, 16, 30522),
    "mixtral-8x7b": _experts(
        "mixtral", 32, 4096, 14336, 32, 8, 32000, moe={"num_experts": 8}, max_positions=32768
    ),
    "qwen1.5-moe-a2.7b": _experts(
        "qwen2_moe",
        24,
        2048,
        5632,
        16,
        16,
        151936,
        max_positions=8192,
        moe={
            "num_experts": 60,
            "top_k": 4,
            "ffn_hidden_size": 1408,
            "shared_ffn_hidden_size": 5632,
        },
    ),
    "qwen3-30b-a3b": _experts(
        "qwen3_moe",
        48,
        2048,
        6144,
        32,
        4,
        151936,
        head_size=128,
        max_positions=40960,
        moe={"num_experts": 128, "top_k": 8, "ffn_hidden_size": 768},
    ),
    "olmoe-1b-7b": _experts(
        "olmoe", 16, 2048, 1024, 16, 16, 50304, moe={"num_experts": 64, "top_k": 8}
    ),
    "deepseek-v3": _experts("deepseek_v3", 61, 7168, 18432, 128, 128, 129280, **_DEEPSEEK_V3),
    "phi-4": _sizes(
        "phi3", 40, 5120, 17920, 40, 10, 100352, rope_theta=250000.0, max_positions=16384
    ),
    "mistral-7b": _sizes(
        "mistral", 32, 4096, 14336, 32, 8, 32000, sliding_window=4096, max_positions=32768
    ),
}

_YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_beta_fast": 32.0, "rope_beta_slow": 1.0}


def _gemma(family: str, layers: int, hidden: int, *sizes: int, **rest: Any) -> dict[str, Any]:
    return _sizes(family, layers, hidden, *sizes, embedding_scale=hidden**0.5, **rest)


_OF_256 = {"head_size": 256, "attention_scale": 256**-0.5}
_GEMMA2 = {"sliding_window": 4096, "max_positions": 8192, "attention_cap": 50.0, "logit_cap": 30.0}
_GEMMA3 = {"sliding_window": 512, "max_positions": 32768} | _OF_256
_TOP_4 = {"top_k": 4}
_GPT_OSS = _YARN | {
    "head_size": 64, "sliding_window": 128, "max_positions": 131072, "rope_factor": 32.0, "rope_positions": 4096,
    "rope_truncate": False,
}  # fmt: skip
_OLMO3 = _YARN | {
    "sliding_window": 4096, "window_rope_theta": 500000.0, "max_positions": 65536, "rope_factor": 8.0,
    "rope_positions": 8192, "rope_attention_factor": 1.2079441541679836,
}  # fmt: skip
_GLM = {"head_size": 128, "max_positions": 131072, "mtp": {"depth": 1}}
_GRANITE = {"embedding_scale": 12.0, "residual_scale": 0.22}
_LITE = _YARN | {
    "max_positions": 163840, "rope_factor": 40.0, "rope_positions": 4096, "rope_mscale": 0.707,
    "rope_mscale_all_dim": 0.707,
}  # fmt: skip

PRESETS |= {
    "gemma2-2b": _gemma("gemma2", 26, 2304, 9216, 8, 4, 256000, **_OF_256, **_GEMMA2),
    "gemma2-9b": _gemma("gemma2", 42, 3584, 14336, 16, 8, 256000, **_OF_256, **_GEMMA2),
    "gemma2-27b": _gemma("gemma2", 46, 4608, 36864, 32, 16, 256000, head_size=128, attention_scale=1 / 12, **_GEMMA2),
    "gemma3-270m": _gemma("gemma3_text", 18, 640, 2048, 4, 1, 262144, **_GEMMA3),
    "gemma3-1b": _gemma("gemma3_text", 26, 1152, 6912, 4, 1, 262144, **_GEMMA3),
    "gpt-oss-20b": _experts("gpt_oss", 24, 2880, 2880, 64, 8, 201088, moe={"num_experts": 32} | _TOP_4, **_GPT_OSS),
    "gpt-oss-120b": _experts("gpt_oss", 36, 2880, 2880, 64, 8, 201088, moe={"num_experts": 128} | _TOP_4, **_GPT_OSS),
    "smollm3-3b": _sizes("smollm3", 36, 2048, 11008, 16, 4, 128256, max_positions=65536),
    "olmo2-1b": _sizes("olmo2", 16, 2048, 8192, 16, 16, 100352),
    "olmo2-7b": _sizes("olmo2", 32, 4096, 11008, 32, 32, 100352),
    "olmo2-13b": _sizes("olmo2", 40, 5120, 13824, 40, 40, 100352),
    "olmo2-32b": _sizes("olmo2", 64, 5120, 27648, 40, 8, 100352),
    "olmo3-7b": _sizes("olmo3", 32, 4096, 11008, 32, 32, 100278, **_OLMO3),
    "olmo3-32b": _sizes("olmo3", 64, 5120, 27648, 40, 8, 100278, **_OLMO3),
    "glm-4.5": _experts(
        "glm4_moe", 92, 5120, 12288, 96, 8, 151552, qk_norm=True, **_GLM,
        moe={"num_experts": 160, "top_k": 8, "ffn_hidden_size": 1536, "shared_ffn_hidden_size": 1536, "first_dense": 3,
             "routed_scale": 2.5},
    ),
    "glm-4.5-air": _experts(
        "glm4_moe", 46, 4096, 10944, 96, 8, 151552, **_GLM,
        moe={"num_experts": 128, "top_k": 8, "ffn_hidden_size": 1408, "shared_ffn_hidden_size": 1408, "first_dense": 1},
    ),
    "granite3-2b": _sizes(
        "granite", 40, 2048, 8192, 32, 8, 49155, attention_scale=1 / 64, logits_scaling=8.0, **_GRANITE
    ),
    "granite3-8b": _sizes(
        "granite", 40, 4096, 12800, 32, 8, 49155, attention_scale=1 / 128, logits_scaling=16.0, **_GRANITE
    ),
    "seed-oss-36b": _sizes("seed_oss", 64, 5120, 27648, 80, 8, 155136, head_size=128, max_positions=524288),
    "ernie-4.5-0.3b": _sizes("ernie4_5", 18, 1024, 3072, 16, 2, 103424, head_size=128, max_positions=131072),
    "ernie-4.5-21b-a3b": _experts(
        "ernie4_5_moe", 28, 2560, 12288, 20, 4, 103424, max_positions=131072,
        moe={"num_experts": 64, "top_k": 6, "ffn_hidden_size": 1536, "shared_ffn_hidden_size": 3072, "first_dense": 1},
    ),
    "starcoder2-3b": _sizes(
        "starcoder2", 30, 3072, 12288, 24, 2, 49152, sliding_window=4096, max_positions=16384,
        rope_theta=999999.4420358813,
    ),
    "starcoder2-7b": _sizes(
        "starcoder2", 32, 4608, 18432, 36, 4, 49152, sliding_window=4096, max_positions=16384, rope_theta=1e6
    ),
    "starcoder2-15b": _sizes(
        "starcoder2", 40, 6144, 24576, 48, 4, 49152, sliding_window=4096, max_positions=16384, rope_theta=1e5,
        tie_embeddings=False,
    ),
    "pythia-70m": _sizes("gpt_neox", 6, 512, 2048, 8, 8, 50304),
    "pythia-160m": _sizes("gpt_neox", 12, 768, 3072, 12, 12, 50304),
    "pythia-410m": _sizes("gpt_neox", 24, 1024, 4096, 16, 16, 50304),
    "pythia-1b": _sizes("gpt_neox", 16, 2048, 8192, 8, 8, 50304),
    "pythia-1.4b": _sizes("gpt_neox", 24, 2048, 8192, 16, 16, 50304),
    "pythia-2.8b": _sizes("gpt_neox", 32, 2560, 10240, 32, 32, 50304),
    "pythia-6.9b": _sizes("gpt_neox", 32, 4096, 16384, 32, 32, 50432),
    "pythia-12b": _sizes("gpt_neox", 36, 5120, 20480, 40, 40, 50688),
    "gpt-neox-20b": _sizes("gpt_neox", 44, 6144, 24576, 64, 64, 50432),
    "deepseek-v2-lite": _experts(
        "deepseek_v2", 27, 2048, 10944, 16, 16, 102400, **_LITE,
        moe={"num_experts": 64, "top_k": 6, "ffn_hidden_size": 1408, "shared_ffn_hidden_size": 2816, "first_dense": 1},
        mla={"kv_lora_dim": 512},
    ),
    "modernbert-base": _sizes("modernbert", 22, 768, 1152, 12, 12, 50368, sliding_window=65),
    "modernbert-large": _sizes("modernbert", 28, 1024, 2624, 16, 16, 50368, sliding_window=65),
    "roberta-base": _sizes("roberta", 12, 768, 3072, 12, 12, 50265),
    "roberta-large": _sizes("roberta", 24, 1024, 4096, 16, 16, 50265),
    "xlm-roberta-base": _sizes("xlm-roberta", 12, 768, 3072, 12, 12, 250002),
    "xlm-roberta-large": _sizes("xlm-roberta", 24, 1024, 4096, 16, 16, 250002),
}  # fmt: skip
