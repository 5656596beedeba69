"""Families whose layers differ among themselves, or with caps, scales and other norms: rows of the
table in `families`. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from megallm.convert import model_keys, moe_keys, moe_rules
from megallm.convert.family import (
    DECODER,
    DEFAULTS,
    EXPERT_KEYS,
    KEYS,
    PLAIN,
    ROPE_SWITCHES,
    SPARSE_SWITCHES,
    SWIGLU,
    Family,
    LayerKeys,
    without,
)
from megallm.convert.llama_rules import LLAMA_RULES
from megallm.convert.rules import WeightRule, rule

_LAYER, _OURS, _ATTENTION = "model.layers.{n}.", "layers.{n}.", "layers.{n}.attention."


def _rest(*but: str) -> tuple[WeightRule, ...]:
    """Llama's rules without those of tensors whose names end so."""
    return tuple(each for each in LLAMA_RULES if not each.theirs.endswith(but))


def _pairs(theirs: str, *kinds: str) -> tuple[WeightRule, ...]:
    """Rules `theirs.kind` <- ours with `*` for weight and bias, of a table of both names."""
    names = (line.split() for line in kinds)
    return tuple(
        rule(f"{theirs}{name}.{kind}", *(one.replace("*", kind) for one in ours))
        for name, *ours in names
        for kind in ("weight", "bias")
    )


_OUTPUT_NORMS = (
    rule(_LAYER + "post_attention_layernorm.weight", _OURS + "attention_output_norm.weight"),
    rule(_LAYER + "post_feedforward_layernorm.weight", _OURS + "mlp_output_norm.weight"),
)
OLMO2_RULES = (*_rest("layernorm.weight"), *_OUTPUT_NORMS)
GEMMA_RULES = (
    *_rest("post_attention_layernorm.weight"),
    *_OUTPUT_NORMS,
    rule(_LAYER + "pre_feedforward_layernorm.weight", _OURS + "mlp_norm.weight"),
)

_EXPERTS = _LAYER + "mlp.experts."
GPT_OSS_RULES = (  # all experts in one tensor, (input, output), gate and up taking turns
    *(each for each in LLAMA_RULES if ".mlp." not in each.theirs),
    rule(_LAYER + "self_attn.sinks", _ATTENTION + "sinks"),
    rule(_LAYER + "mlp.router.weight", _OURS + "moe.router.weight"),
    rule(_LAYER + "mlp.router.bias", _OURS + "moe.router.logit_bias"),
    rule(_EXPERTS + "gate_up_proj_bias[{x}]", _OURS + "moe.experts.gate_up.bias[{x},0]",
         _OURS + "moe.experts.gate_up.bias[{x},1]", interleave=True),
    rule(_EXPERTS + "down_proj_bias[{x}]", _OURS + "moe.experts.down.bias[{x}]"),
)  # fmt: skip
_GATE_UP = _OURS + "moe.experts.gate_up.weight[{x},0]", _OURS + "moe.experts.gate_up.weight[{x},1]"
_DOWN = _OURS + "moe.experts.down.weight[{x}]"
GPT_OSS_EXPERTS = (
    rule(_EXPERTS + "gate_up_proj[{x}]", *_GATE_UP, interleave=True, transpose=True),
    rule(_EXPERTS + "down_proj[{x}]", _DOWN, transpose=True),
)
GPT_OSS_PACKED = (  # MXFP4, as (output, input)
    *(each for each in GPT_OSS_RULES if "{x}" in each.theirs),
    rule(_EXPERTS + "gate_up_proj_blocks[{x}]", *_GATE_UP, interleave=True),
    rule(_EXPERTS + "down_proj_blocks[{x}]", _DOWN),
)

_ERNIE = (  # rotated features are neighbours
    *_rest("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"),
    *(
        rule(f"{_LAYER}self_attn.{name}_proj.{kind}", _ATTENTION + ours, by_head=True, pairs=True)
        for kind in ("weight", "bias")
        for name, ours in (("q", f"q.{kind}"), ("k", f"kv.{kind}[0]"))
    ),
)
ERNIE_MOE_RULES = (
    *_ERNIE,
    *moe_rules.PLAIN,
    *moe_rules.shared("shared_experts"),
    rule(_LAYER + "mlp.moe_statics.e_score_correction_bias[0]", _OURS + "moe.router.bias"),
)
STARCODER2_RULES = (
    *(each for each in _rest("norm.weight") if ".mlp." not in each.theirs),
    *_pairs(
        _LAYER,
        f"input_layernorm {_OURS}attention_norm.*",
        f"post_attention_layernorm {_OURS}mlp_norm.*",
        f"mlp.c_fc {_OURS}mlp.up.*",
        f"mlp.c_proj {_OURS}mlp.down.*",
    ),
    *_pairs("model.", "norm final_norm.*"),
)
_NEOX = "gpt_neox.layers.{n}."
NEOX_RULES = (
    rule("gpt_neox.embed_in.weight", "embedding.weight"),
    *_pairs(
        _NEOX,
        f"input_layernorm {_OURS}attention_norm.*",
        f"post_attention_layernorm {_OURS}mlp_norm.*",
        f"attention.dense {_ATTENTION}o.*",
        f"mlp.dense_h_to_4h {_OURS}mlp.up.*",
        f"mlp.dense_4h_to_h {_OURS}mlp.down.*",
    ),
    *(
        rule(_NEOX + f"attention.query_key_value.{kind}", _ATTENTION + f"q.{kind}",
             _ATTENTION + f"kv.{kind}[0]", _ATTENTION + f"kv.{kind}[1]", by_head=True)
        for kind in ("weight", "bias")
    ),
    *_pairs("gpt_neox.", "final_layer_norm final_norm.*"),
    rule("embed_out.weight", "head.weight"),
)  # fmt: skip

DEEPSEEK2_RULES = (
    *_rest("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    *moe_rules.PLAIN,
    *moe_rules.shared("shared_experts"),
    *moe_rules.LATENT,
)
GLM4_MOE_RULES = (*LLAMA_RULES, *moe_rules.PLAIN, *moe_rules.SHARED_BIAS, *moe_rules.FURTHER)

MODERNBERT_RULES = (
    *_pairs("model.embeddings.", "norm embedding_norm.*"),
    rule("model.embeddings.tok_embeddings.weight", "embedding.weight"),
    *_pairs(
        _LAYER,
        f"attn_norm {_OURS}attention_norm.*",
        f"attn.Wqkv {_ATTENTION}q.* {_ATTENTION}kv.*[0] {_ATTENTION}kv.*[1]",
        f"attn.Wo {_ATTENTION}o.*",
        f"mlp_norm {_OURS}mlp_norm.*",
        f"mlp.Wi {_OURS}mlp.gate_up.*[0] {_OURS}mlp.gate_up.*[1]",
        f"mlp.Wo {_OURS}mlp.down.*",
    ),
    *_pairs("model.", "final_norm final_norm.*"),
    *_pairs("head.", "dense head.dense.*", "norm head.norm.*"),
    rule("decoder.weight", "head.weight"),
    rule("decoder.bias", "head.bias"),
)
_ROBERTA = "roberta.encoder.layer.{n}."
ROBERTA_RULES = (
    *(
        rule(f"roberta.embeddings.{theirs}.weight", f"{ours}.weight")
        for theirs, ours in (
            ("word_embeddings", "embedding"),
            ("position_embeddings", "positions"),
            ("token_type_embeddings", "token_types"),
        )
    ),
    *_pairs("roberta.embeddings.", "LayerNorm embedding_norm.*"),
    *_pairs(
        _ROBERTA,
        f"attention.self.query {_ATTENTION}q.*",
        f"attention.self.key {_ATTENTION}kv.*[0]",
        f"attention.self.value {_ATTENTION}kv.*[1]",
        f"attention.output.dense {_ATTENTION}o.*",
        f"attention.output.LayerNorm {_OURS}attention_norm.*",
        f"intermediate.dense {_OURS}mlp.up.*",
        f"output.dense {_OURS}mlp.down.*",
        f"output.LayerNorm {_OURS}mlp_norm.*",
    ),
    *_pairs("lm_head.", "dense head.dense.*", "layer_norm head.norm.*"),
    rule("lm_head.bias", "head.bias"),
)
ROBERTA_CLASSIFIER = _pairs("classifier.", "dense head.pooler.*", "out_proj head.*")

_GEMMA_SWITCHES = without(
    ROPE_SWITCHES, "layer_pattern", "attention_scale", "attention_cap", "logit_cap", "embedding_scale", "qkv_bias",
    "o_bias",
) | {"norm": "rmsnorm_unit", "norm_place": "both", "activation": "geglu_tanh"}  # fmt: skip
_GEMMA_KEYS = KEYS | {
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = DEFAULTS | {
    "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
_GEMMA_ONLY = {"use_bidirectional_attention": (False,), "hidden_act": ("gelu_pytorch_tanh",)}
_GEMMA_ONLY |= {"sliding_window_size": (4096,)}
_OUTPUT_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_NORMED = {"norm_place": "output", "qk_norm": True, "qk_norm_span": "all"}
_OLMO_DEFAULTS = DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
_ALL_BIASES = dict.fromkeys(("qkv_bias", "o_bias", "bias"), "use_bias")
_ERNIE_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip
_NO_HEAD_SIZE = without(KEYS, "head_size")
_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_BIASED = {"qkv_bias": True, "o_bias": True, "bias": True}
_ENCODER = PLAIN | {
    "causal": False, "embedding_norm": True, "head_bias": True, "qk_norm": False, "moe.num_experts": 0,
}  # fmt: skip
_DEEPSEEK_KEYS = without(EXPERT_KEYS, "head_size") | {
    "moe.num_experts": "n_routed_experts", "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.routed_scale": "routed_scaling_factor",
}  # fmt: skip

LAYERED: dict[str, Family] = {
    "gemma3_text": Family(
        "gemma3_text", "Gemma3ForCausalLM", "model.", GEMMA_RULES, _GEMMA_KEYS, "hidden_activation",
        {"gelu_pytorch_tanh": "geglu_tanh"},
        _GEMMA_DEFAULTS | {"max_position_embeddings": 131072, "rope_theta": 1e6, "window_rope_theta": 1e4},
        without(_GEMMA_SWITCHES, "window_rope_theta") | {"qk_norm": True, "qk_norm_span": "head"}, _GEMMA_ONLY,
        more=model_keys.GEMMA, flags=_OUTPUT_BIASES, classifier="Gemma3TextForSequenceClassification",
        layers=LayerKeys("fw", pattern="wwwwwf", period="sliding_window_pattern",
                         window_theta="rope_local_base_freq"),
        models="Gemma 3 270M and 1B, and other text models of that shape",
    ),
    "gemma2": Family(
        "gemma2", "Gemma2ForCausalLM", "model.", GEMMA_RULES, _GEMMA_KEYS, "hidden_activation",
        {"gelu_pytorch_tanh": "geglu_tanh"},
        _GEMMA_DEFAULTS | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
                           "final_logit_softcapping": 30.0},
        _GEMMA_SWITCHES, _GEMMA_ONLY, more=model_keys.GEMMA, flags=_OUTPUT_BIASES,
        classifier="Gemma2ForSequenceClassification", layers=LayerKeys("fw", pattern="wf"),
        models="Gemma 2 2B, 9B, 27B",
    ),
    "gpt_oss": Family(
        "gpt_oss", "GptOssForCausalLM", "model.", GPT_OSS_RULES + GPT_OSS_EXPERTS,
        EXPERT_KEYS | {"moe.num_experts": "num_local_experts", "moe.top_k": "num_experts_per_tok"}, "hidden_act",
        {"silu": "swiglu_clamped"},
        DEFAULTS | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "head_dim": 64, "rope_theta": 150000.0,
                    "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 4,
                    "attention_bias": True, "sliding_window": 128, "original_max_position_embeddings": 4096},
        without(SPARSE_SWITCHES, "layer_pattern", "qkv_bias", "o_bias") | {
            "activation": "swiglu_clamped", "attention_sinks": True, "moe.bias": True, "moe.router_bias": True,
            "moe.norm_topk_prob": True, "moe.shared_ffn_hidden_size": 0,
        },
        {"swiglu_alpha": (1.702,), "swiglu_limit": (7, 7.0), "initial_context_length": (4096,),
         "experts_per_token": (4,)},
        fused=GPT_OSS_PACKED, more=moe_keys.EVERY_LAYER, flags=_OUTPUT_BIASES,
        classifier="GptOssForSequenceClassification", layers=LayerKeys("fw", pattern="wf"),
        models="gpt-oss-20b, gpt-oss-120b (MXFP4 is read into bf16)",
    ),
    "smollm3": Family(
        "smollm3", "SmolLM3ForCausalLM", "model.", LLAMA_RULES, _NO_HEAD_SIZE, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 32768, "rope_theta": 2e6, "num_key_value_heads": 4,
                    "tie_word_embeddings": True},
        without(ROPE_SWITCHES, "layer_pattern", "qkv_bias", "o_bias", "bias"),
        flags=_OUTPUT_BIASES | {"bias": "mlp_bias"}, classifier="SmolLM3ForSequenceClassification",
        more=model_keys.UNROTATED, layers=LayerKeys("fwnm", use=True, pattern="f"), models="SmolLM3-3B",
    ),
    "olmo2": Family(
        "olmo2", "Olmo2ForCausalLM", "model.", OLMO2_RULES, _NO_HEAD_SIZE, "hidden_act", SWIGLU, _OLMO_DEFAULTS,
        without(ROPE_SWITCHES, "qkv_bias", "o_bias") | _NORMED | {"sliding_window": None}, {"sliding_window": ()},
        flags=_OUTPUT_BIASES, classifier="Olmo2ForSequenceClassification", models="OLMo 2 1B, 7B, 13B, 32B",
    ),
    "olmo3": Family(
        "olmo3", "Olmo3ForCausalLM", "model.", OLMO2_RULES, _NO_HEAD_SIZE, "hidden_act", SWIGLU,
        _OLMO_DEFAULTS | {"rope_theta": 500000.0, "sliding_window": 4096},
        without(ROPE_SWITCHES, "qkv_bias", "o_bias", "layer_pattern", "window_rope_theta") | _NORMED,
        flags=_OUTPUT_BIASES, classifier="Olmo3ForSequenceClassification",
        layers=LayerKeys("fw", pattern="wwwf", window_theta="rope_theta"), models="OLMo 3 7B, 32B",
    ),
    "glm4_moe": Family(
        "glm4_moe", "Glm4MoeForCausalLM", "model.", GLM4_MOE_RULES,
        _DEEPSEEK_KEYS | {"head_size": "head_dim", "moe.norm_topk_prob": "norm_topk_prob", "moe.num_groups": "n_group",
                          "moe.top_groups": "topk_group"},
        "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_fraction": 0.5,
                    "num_key_value_heads": 8, "intermediate_size": 10944, "moe_intermediate_size": 1408,
                    "n_routed_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
                    "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1},
        without(SPARSE_SWITCHES, "qkv_bias", "qk_norm", "rope_fraction", "moe.routed_scale", "moe.num_groups",
                "mtp.depth")
        | {"moe.score": "sigmoid", "moe.selection_bias": True, "moe.shared_gate": False, "qk_norm_span": "head",
           "sliding_window": None},
        fused=moe_rules.STACKED, more=moe_keys.GLM4, further=r"model\.layers\.\d+\.(enorm|hnorm|eh_proj)\.weight",
        flags={"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"},
        layers=LayerKeys(fraction="partial_rotary_factor"),
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        models="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    ),
    "granite": Family(
        "granite", "GraniteForCausalLM", "model.", LLAMA_RULES,
        _NO_HEAD_SIZE | {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
                         "attention_scale": "attention_multiplier", "logits_scaling": "logits_scaling"},
        "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 2048, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
                    "attention_multiplier": 1.0, "logits_scaling": 1.0},
        without(ROPE_SWITCHES, "qkv_bias", "o_bias", "bias", "embedding_scale", "residual_scale", "attention_scale",
                "logits_scaling") | {"sliding_window": None},
        {"sliding_window": ()}, flags=_OUTPUT_BIASES | {"bias": "mlp_bias"}, models="Granite 3.0 to 3.3 2B, 8B",
    ),
    "seed_oss": Family(
        "seed_oss", "SeedOssForCausalLM", "model.", LLAMA_RULES, KEYS, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 524288, "head_dim": 128, "num_key_value_heads": 8,
                    "attention_bias": True},
        without(ROPE_SWITCHES, "qkv_bias", "o_bias", "bias") | {"sliding_window": None}, {"sliding_window": ()},
        flags={"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "bias": "mlp_bias"},
        classifier="SeedOssForSequenceClassification", models="Seed-OSS-36B",
        writes={"residual_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "ernie4_5": Family(
        "ernie4_5", "Ernie4_5ForCausalLM", "model.", _ERNIE, KEYS, "hidden_act", SWIGLU,
        _ERNIE_DEFAULTS | {"head_dim": 128, "num_key_value_heads": 2},
        without(ROPE_SWITCHES, "qkv_bias", "o_bias", "bias") | {"sliding_window": None}, {"sliding_window": ()},
        flags=_ALL_BIASES, models="ERNIE-4.5-0.3B",
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "model.", ERNIE_MOE_RULES,
        _NO_HEAD_SIZE | {"moe.num_experts": "moe_num_experts", "moe.top_k": "moe_k",
                         "moe.ffn_hidden_size": "moe_intermediate_size"},
        "hidden_act", SWIGLU,
        _ERNIE_DEFAULTS | {"num_key_value_heads": 4, "intermediate_size": 12288, "moe_intermediate_size": 1536,
                           "moe_num_experts": 64, "moe_k": 6},
        SPARSE_SWITCHES | {"moe.selection_bias": True, "moe.norm_topk_prob": True, "moe.shared_gate": False,
                           "sliding_window": None},
        {"sliding_window": (), "use_bias": (False,), "moe_norm_min": (1e-12,)}, fused=moe_rules.STACKED,
        more=moe_keys.ERNIE, aside=r"model\.mtp_.*", models="ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B",
        aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k",
                 "num_local_experts": "moe_num_experts"},
    ),
    "starcoder2": Family(
        "starcoder2", "Starcoder2ForCausalLM", "model.", STARCODER2_RULES, _NO_HEAD_SIZE | {"norm_eps": "norm_epsilon"},
        "hidden_act", {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        without(DEFAULTS, "rms_norm_eps") | {
            "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "num_key_value_heads": 2,
            "tie_word_embeddings": True, "initializer_range": 0.018042, "hidden_act": "gelu_pytorch_tanh",
            "use_bias": True,
        },
        DECODER | {"norm": "layernorm", "positions": "rope", "qk_norm": False},
        {"norm_type": ("layer_norm",), "mlp_type": ("default",)}, flags=_ALL_BIASES, layers=LayerKeys("fw"),
        classifier="Starcoder2ForSequenceClassification", models="StarCoder2 3B, 7B, 15B",
    ),
    "gpt_neox": Family(
        "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", NEOX_RULES,
        without(_NO_HEAD_SIZE, "num_kv_heads") | {"norm_eps": "layer_norm_eps"}, "hidden_act", _GELUS,
        {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "initializer_range": 0.02, "hidden_act": "gelu",
         "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_fraction": 0.25, "use_parallel_residual": True,
         "attention_bias": True},
        without(DECODER, "parallel_residual", "rope_fraction")
        | {"norm": "layernorm", "positions": "rope", "qk_norm": False, "bias": True, "sliding_window": None},
        buffers=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", tied="embed_out.weight",
        flags=_OUTPUT_BIASES | {"parallel_residual": "use_parallel_residual"},
        layers=LayerKeys(theta="rotary_emb_base", fraction="rotary_pct"),
        classifier="GPTNeoXForSequenceClassification", models="Pythia 14M to 12B, GPT-NeoX-20B",
    ),
    "deepseek_v2": Family(
        "deepseek_v2", "DeepseekV2ForCausalLM", "model.", DEEPSEEK2_RULES,
        _DEEPSEEK_KEYS | {"mla.kv_lora_dim": "kv_lora_rank", "mla.nope_head_size": "qk_nope_head_dim",
                          "mla.rope_head_size": "qk_rope_head_dim", "mla.value_head_size": "v_head_dim"},
        "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 2048, "intermediate_size": 11008, "moe_intermediate_size": 1407,
                    "n_routed_experts": 64, "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
                    "qk_rope_head_dim": 64, "v_head_dim": 128},
        without(SPARSE_SWITCHES, "mla.kv_lora_dim", "moe.routed_scale", "moe.num_groups")
        | {"moe.norm_topk_prob": False, "moe.shared_gate": False, "sliding_window": None},
        moe_keys.ONLY_IN_DEEPSEEK_2, classifier="DeepseekV2ForSequenceClassification", fused=moe_rules.STACKED,
        more=moe_keys.DEEPSEEK_2, aliases={"num_experts": "n_routed_experts"},
        models="DeepSeek-V2-Lite, DeepSeek-V2, DeepSeek-Coder-V2",
    ),
    "modernbert": Family(
        "modernbert", "ModernBertForMaskedLM", "model.", MODERNBERT_RULES,
        without(_NO_HEAD_SIZE, "num_kv_heads") | {"norm_eps": "norm_eps"}, "hidden_activation",
        {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"},
        {"max_position_embeddings": 8192, "norm_eps": 1e-5, "initializer_range": 0.02, "hidden_activation": "gelu",
         "tie_word_embeddings": True, "rope_theta": 160000.0, "window_rope_theta": 10000.0, "local_attention": 128},
        without(_ENCODER, "layer_pattern", "window_rope_theta")
        | {"norm": "layernorm_unbiased", "norm_place": "pre", "positions": "rope", "first_norm": False,
           "token_types": 0, "qkv_bias": False, "o_bias": False, "bias": False, "head_dense_bias": False},
        {"attention_bias": (False,), "mlp_bias": (False,), "norm_bias": (False,), "classifier_bias": (False,),
         "decoder_bias": (True,), "classifier_activation": ("gelu",), "sparse_prediction": (False,),
         "position_embedding_type": ("absolute",), "layer_norm_eps": (1e-5,)},
        head="mlm", tied="decoder.weight", body="ModernBertModel", more=model_keys.MODERNBERT,
        layers=LayerKeys("fw", window="local_attention", pattern="fww", period="global_attn_every_n_layers",
                         first_whole=True, halved=True, theta="global_rope_theta", window_theta="local_rope_theta"),
        models="ModernBERT-base, ModernBERT-large",
    ),
    "roberta": Family(
        "roberta", "RobertaForMaskedLM", "roberta.", ROBERTA_RULES,
        without(_NO_HEAD_SIZE, "num_kv_heads", "max_positions", "tie_embeddings")
        | {"norm_eps": "layer_norm_eps", "token_types": "type_vocab_size"}, "hidden_act", _GELUS,
        {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
         "hidden_act": "gelu"},
        without(_ENCODER, "position_offset")
        | {"norm_place": "post", "norm": "layernorm", "positions": "learned", "sliding_window": None} | _BIASED
        | {"head_dense_bias": True},
        {"position_embedding_type": ("absolute",), "is_decoder": (False,), "tie_word_embeddings": (True,)},
        r".*\.position_ids", head="mlm", tied="lm_head.decoder.weight",
        repeats={"lm_head.decoder.bias": "lm_head.bias"}, classifier="RobertaForSequenceClassification",
        score=ROBERTA_CLASSIFIER, pooler=True, body="RobertaModel", more=model_keys.ROBERTA,
        aside=r"roberta\.pooler\..*",
        writes={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": True},
        models="RoBERTa",
    ),
}  # fmt: skip
LAYERED["xlm-roberta"] = replace(
    LAYERED["roberta"],
    name="xlm-roberta",
    architecture="XLMRobertaForMaskedLM",
    classifier="XLMRobertaForSequenceClassification",
    body="XLMRobertaModel",
    models="XLM-R base, large",
)
