"""Tiny random models of the families whose layers differ, with caps, scales and other norms; each with a window and an
old context that the texts of the tests exceed."""

from __future__ import annotations

from typing import Any

from tests.convert.tiny import CLASSES, SIZES, Case

MLM = "AutoModelForMaskedLM"
MHA = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
MIXED = {"num_hidden_layers": 4}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
OLMO3 = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}


def case(
    name: str, config: str, sizes: dict[str, Any] = SIZES, auto: str = "AutoModelForCausalLM", **more: Any
) -> Case:
    return Case(name, config, sizes | {"pad_token_id": None} | more, auto)


def layer_types(word: str) -> list[str]:
    return [{"f": "full_attention", "w": "sliding_attention"}[letter] for letter in word]


LAYERED = [
    case("gemma3", "Gemma3TextConfig", head_dim=8, sliding_window=5, layer_types=layer_types("wwwf"),
         rope_parameters=GEMMA3, query_pre_attn_scalar=11, **MIXED),
    case("gemma3-all-whole", "Gemma3TextConfig", head_dim=16, layer_types=layer_types("fff"), attention_bias=True),
    case("gemma2", "Gemma2Config", head_dim=16, sliding_window=5, query_pre_attn_scalar=144, attn_logit_softcapping=0.7,
         final_logit_softcapping=0.6, **MIXED),
    case("gpt-oss", "GptOssConfig", head_dim=16, sliding_window=5, num_local_experts=4, num_experts_per_tok=2,
         rope_parameters=YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}, **MIXED),
    case("smollm3", "SmolLM3Config", no_rope_layer_interval=2),
    case("smollm3-window", "SmolLM3Config", use_sliding_window=True, sliding_window=5, no_rope_layers=[1, 0, 1, 0],
         **MIXED),
    case("olmo2", "Olmo2Config"),
    case("olmo3", "Olmo3Config", sliding_window=5, rope_parameters=OLMO3, **MIXED),
    case("phi3-longrope", "Phi3Config", rope_parameters=LONGROPE | {
        "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 9.0], "partial_rotary_factor": 0.75},
        original_max_position_embeddings=16),
    case("phi3-longrope-short", "Phi3Config", rope_parameters=LONGROPE | {
        "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.5, 3.0, 9.0, 12.0],
        "original_max_position_embeddings": 60}, original_max_position_embeddings=60),
    case("glm4-moe", "Glm4MoeConfig", head_dim=8, n_routed_experts=8, n_group=2, topk_group=1, use_qk_norm=True,
         attention_bias=True, num_mtp_layers=0, routed_scaling_factor=2.5, **EXPERTS),
    case("granite", "GraniteConfig", embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.3,
         logits_scaling=7.0, tie_word_embeddings=True),
    case("seed-oss", "SeedOssConfig", head_dim=12),
    case("ernie4.5", "Ernie4_5Config", head_dim=8),
    case("ernie4.5-biases", "Ernie4_5Config", head_dim=8, use_bias=True, num_key_value_heads=1),
    case("ernie4.5-moe", "Ernie4_5_MoeConfig", moe_num_experts=4, moe_k=2, moe_intermediate_size=12),
    case("starcoder2", "Starcoder2Config", sliding_window=5),
    case("gpt-neox", "GPTNeoXConfig", MHA),
    case("gpt-neox-serial", "GPTNeoXConfig", MHA, use_parallel_residual=False, attention_bias=False,
         rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}),
    case("deepseek-v2", "DeepseekV2Config", num_key_value_heads=None, q_lora_rank=None, n_routed_experts=8,
         first_k_dense_replace=1, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6,
         rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}, **EXPERTS),
    case("deepseek-v2-groups", "DeepseekV2Config", num_key_value_heads=None, q_lora_rank=20, n_routed_experts=8,
         first_k_dense_replace=1, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6, n_group=4,
         topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=4.0, **EXPERTS),
    case("qwen2-mixed", "Qwen2Config", use_sliding_window=True, sliding_window=5, max_window_layers=2),
    case("qwen3-mixed", "Qwen3Config", head_dim=16, use_sliding_window=True, sliding_window=5,
         layer_types=layer_types("wfw")),
    case("llama-attention-bias", "LlamaConfig", attention_bias=True),
    case("modernbert", "ModernBertConfig", MHA, MLM, local_attention=8, **MIXED),
    case("modernbert-body", "ModernBertConfig", MHA, "AutoModel", local_attention=8, **MIXED),
    case("roberta", "RobertaConfig", MHA, MLM, pad_token_id=1, type_vocab_size=1),
    case("xlm-roberta", "XLMRobertaConfig", MHA, MLM, pad_token_id=1, type_vocab_size=1),
    case("roberta-classes", "RobertaConfig", MHA, CLASSES, pad_token_id=1, num_labels=3),
    case("gemma2-classes", "Gemma2Config", auto=CLASSES, head_dim=8, sliding_window=5, num_labels=3),
    case("olmo2-reward", "Olmo2Config", auto=CLASSES, num_labels=1),
]  # fmt: skip
