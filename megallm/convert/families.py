"""One table per Hugging Face family: its tensors, its configuration keys, and what of them megallm
can do. Pure.

To add a family: its rules, its keys, the defaults that transformers takes for absent keys, and the
keys that must have one value for the architecture to be ours. Everything else reads these tables.
"""

from __future__ import annotations

from megallm.convert import moe_keys, moe_rules
from megallm.convert.family import (
    DECODER,
    DEFAULTS,
    EXPERT_KEYS,
    KEYS,
    PLAIN,
    QWEN_EXPERTS,
    ROPE_SWITCHES,
    SPARSE_SWITCHES,
    SWIGLU,
    Family,
    LayerKeys,
    without,
)
from megallm.convert.layered_families import LAYERED
from megallm.convert.llama_rules import LLAMA_RULES
from megallm.convert.rules import rule

PHI3_RULES = (  # q, k and v in one matrix, gate and up in another
    *(each for each in LLAMA_RULES if not each.theirs.endswith(("_proj.weight", "_proj.bias", "_norm.weight"))),
    rule(
        "model.layers.{n}.self_attn.qkv_proj.weight",
        "layers.{n}.attention.q.weight", "layers.{n}.attention.kv.weight[0]", "layers.{n}.attention.kv.weight[1]",
    ),
    rule("model.layers.{n}.self_attn.o_proj.weight", "layers.{n}.attention.o.weight"),
    rule(
        "model.layers.{n}.mlp.gate_up_proj.weight",
        "layers.{n}.mlp.gate_up.weight[0]", "layers.{n}.mlp.gate_up.weight[1]",
    ),
    rule("model.layers.{n}.mlp.down_proj.weight", "layers.{n}.mlp.down.weight"),
)  # fmt: skip

DEEPSEEK_RULES = (
    *(
        each
        for each in LLAMA_RULES
        if "attention.q." not in each.ours[0] and "attention.kv." not in each.ours[0]
    ),
    *moe_rules.PLAIN,
    *moe_rules.SHARED_BIAS,
    *moe_rules.LATENT,
    *moe_rules.FURTHER,
)

_ATTENTION = "layers.{n}.attention."
GPT2_RULES = (  # their Conv1D keeps a matrix as (input, output), and c_attn holds q, k and v side by side
    rule("transformer.wte.weight", "embedding.weight"),
    rule("transformer.wpe.weight", "positions.weight"),
    rule("transformer.h.{n}.ln_1.weight", "layers.{n}.attention_norm.weight"),
    rule("transformer.h.{n}.ln_1.bias", "layers.{n}.attention_norm.bias"),
    rule(
        "transformer.h.{n}.attn.c_attn.weight",
        _ATTENTION + "q.weight", _ATTENTION + "kv.weight[0]", _ATTENTION + "kv.weight[1]", transpose=True,
    ),
    rule(
        "transformer.h.{n}.attn.c_attn.bias",
        _ATTENTION + "q.bias", _ATTENTION + "kv.bias[0]", _ATTENTION + "kv.bias[1]",
    ),
    rule("transformer.h.{n}.attn.c_proj.weight", _ATTENTION + "o.weight", transpose=True),
    rule("transformer.h.{n}.attn.c_proj.bias", _ATTENTION + "o.bias"),
    rule("transformer.h.{n}.ln_2.weight", "layers.{n}.mlp_norm.weight"),
    rule("transformer.h.{n}.ln_2.bias", "layers.{n}.mlp_norm.bias"),
    rule("transformer.h.{n}.mlp.c_fc.weight", "layers.{n}.mlp.up.weight", transpose=True),
    rule("transformer.h.{n}.mlp.c_fc.bias", "layers.{n}.mlp.up.bias"),
    rule("transformer.h.{n}.mlp.c_proj.weight", "layers.{n}.mlp.down.weight", transpose=True),
    rule("transformer.h.{n}.mlp.c_proj.bias", "layers.{n}.mlp.down.bias"),
    rule("transformer.ln_f.weight", "final_norm.weight"),
    rule("transformer.ln_f.bias", "final_norm.bias"),
    rule("lm_head.weight", "head.weight"),
)  # fmt: skip

_LAYER = "bert.encoder.layer.{n}."
# Post-norm: a layer's LayerNorms stand after attention and after the feed-forward layer.
BERT_RULES = (
    rule("bert.embeddings.word_embeddings.weight", "embedding.weight"),
    rule("bert.embeddings.position_embeddings.weight", "positions.weight"),
    rule("bert.embeddings.token_type_embeddings.weight", "token_types.weight"),
    rule("bert.embeddings.LayerNorm.weight", "embedding_norm.weight"),
    rule("bert.embeddings.LayerNorm.bias", "embedding_norm.bias"),
    *(
        rule(f"{_LAYER}{theirs}.{kind}", ours.replace("*", kind))
        for theirs, ours in (
            ("attention.self.query", _ATTENTION + "q.*"),
            ("attention.self.key", _ATTENTION + "kv.*[0]"),
            ("attention.self.value", _ATTENTION + "kv.*[1]"),
            ("attention.output.dense", _ATTENTION + "o.*"),
            ("attention.output.LayerNorm", "layers.{n}.attention_norm.*"),
            ("intermediate.dense", "layers.{n}.mlp.up.*"),
            ("output.dense", "layers.{n}.mlp.down.*"),
            ("output.LayerNorm", "layers.{n}.mlp_norm.*"),
        )
        for kind in ("weight", "bias")
    ),
    rule("cls.predictions.transform.dense.weight", "head.dense.weight"),
    rule("cls.predictions.transform.dense.bias", "head.dense.bias"),
    rule("cls.predictions.transform.LayerNorm.weight", "head.norm.weight"),
    rule("cls.predictions.transform.LayerNorm.bias", "head.norm.bias"),
    rule("cls.predictions.bias", "head.bias"),
)
BERT_CLASSIFIER = (
    rule("bert.pooler.dense.weight", "head.pooler.weight"),
    rule("bert.pooler.dense.bias", "head.pooler.bias"),
    rule("classifier.weight", "head.weight"),
    rule("classifier.bias", "head.bias"),
)


# Published folders name code of their own, which transformers has itself by now. None of it is run.
_CODE_OF_PHI3 = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
_CODE_OF_PHI4 = _CODE_OF_PHI3 | {"AutoTokenizer": "Xenova/gpt-4o"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", "LlamaForCausalLM", "model.", LLAMA_RULES, KEYS, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 2048},
        without(ROPE_SWITCHES, "qkv_bias", "o_bias", "bias") | {"sliding_window": None},
        {"sliding_window": (), "use_sliding_window": (False,)},
        classifier="LlamaForSequenceClassification",
        flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "bias": "mlp_bias"},
        models="Llama 2, 3, 3.1, 3.2, SmolLM2 and others of that shape",
    ),
    "mistral": Family(
        "mistral", "MistralForCausalLM", "model.", LLAMA_RULES, KEYS, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        ROPE_SWITCHES, {"attention_bias": (False,), "mlp_bias": (False,)},
        classifier="MistralForSequenceClassification", layers=LayerKeys("fw"), models="Mistral 7B",
    ),
    "qwen2": Family(
        "qwen2", "Qwen2ForCausalLM", "model.", LLAMA_RULES, KEYS, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        without(ROPE_SWITCHES, "layer_pattern") | {"qkv_bias": True},
        {"attention_bias": (True,), "mlp_bias": (False,)},
        classifier="Qwen2ForSequenceClassification", layers=LayerKeys("fw", use=True), models="Qwen2, Qwen2.5",
    ),
    "qwen3": Family(
        "qwen3", "Qwen3ForCausalLM", "model.", LLAMA_RULES, KEYS, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        without(ROPE_SWITCHES, "layer_pattern") | {"qk_norm": True, "qk_norm_span": "head"},
        {"attention_bias": (False,), "mlp_bias": (False,)},
        classifier="Qwen3ForSequenceClassification", layers=LayerKeys("fw", use=True), models="Qwen3 (dense)",
    ),
    "phi3": Family(
        "phi3", "Phi3ForCausalLM", "model.", PHI3_RULES,
        {field: key for field, key in KEYS.items() if field != "head_size"}, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        without(ROPE_SWITCHES, "rope_fraction") | {"rope_scaling": frozenset((None, "longrope"))},
        {"attention_bias": (False,), "mlp_bias": (False,), "auto_map": ({}, _CODE_OF_PHI3, _CODE_OF_PHI4)},
        classifier="Phi3ForSequenceClassification",
        layers=LayerKeys("fw", fraction="partial_rotary_factor", stretches={"yarn": "longrope", "su": "longrope"}),
        models="Phi-3, Phi-3.5-mini (LongRoPE), Phi-4, Phi-4-mini (partial rotary embeddings)",
    ),
    "mixtral": Family(
        "mixtral", "MixtralForCausalLM", "model.", LLAMA_RULES + moe_rules.MIXTRAL,
        EXPERT_KEYS | {"moe.num_experts": "num_local_experts"}, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                     "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        SPARSE_SWITCHES | {"moe.norm_topk_prob": True, "moe.shared_ffn_hidden_size": 0},
        {"attention_bias": (False,), "mlp_bias": (False,)}, layers=LayerKeys("fw"), models="Mixtral 8x7B, 8x22B",
        classifier="MixtralForSequenceClassification", spellings=((".mlp.", ".block_sparse_moe."),),
        fused=moe_rules.MIXTRAL_STACKED, more=moe_keys.EVERY_LAYER,
    ),
    "qwen2_moe": Family(
        "qwen2_moe", "Qwen2MoeForCausalLM", "model.", LLAMA_RULES + moe_rules.PLAIN + moe_rules.SHARED_GATE,
        QWEN_EXPERTS | {"moe.shared_ffn_hidden_size": "shared_expert_intermediate_size"}, "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 16, "norm_topk_prob": False,
                     "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                     "shared_expert_intermediate_size": 5632, "intermediate_size": 5632},
        SPARSE_SWITCHES | {"qkv_bias": True, "sliding_window": None, "moe.shared_gate": True},
        {"attention_bias": (True,), "qkv_bias": (True,), "mlp_bias": (False,), "use_sliding_window": (False,)},
        classifier="Qwen2MoeForSequenceClassification", fused=moe_rules.STACKED, more=moe_keys.SPARSE,
        layers=LayerKeys(use=True), models="Qwen1.5-MoE, Qwen2-57B-A14B",
    ),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", "model.", LLAMA_RULES + moe_rules.PLAIN, QWEN_EXPERTS,
        "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 4, "norm_topk_prob": False,
                     "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                     "intermediate_size": 6144},
        SPARSE_SWITCHES | {"qk_norm": True, "qk_norm_span": "head", "sliding_window": None,
                            "moe.shared_ffn_hidden_size": 0},
        {"attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,)},
        classifier="Qwen3MoeForSequenceClassification", fused=moe_rules.STACKED, more=moe_keys.SPARSE,
        aliases={"num_local_experts": "num_experts"}, layers=LayerKeys(use=True),
        models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    ),
    "olmoe": Family(
        "olmoe", "OlmoeForCausalLM", "model.", LLAMA_RULES + moe_rules.PLAIN,
        {field: key for field, key in EXPERT_KEYS.items() if field != "head_size"}
        | {"moe.num_experts": "num_experts", "moe.norm_topk_prob": "norm_topk_prob"},
        "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64,
                     "num_experts_per_tok": 8, "norm_topk_prob": False, "intermediate_size": 2048},
        SPARSE_SWITCHES | {"qk_norm": True, "qk_norm_span": "all", "sliding_window": None,
                            "moe.shared_ffn_hidden_size": 0},
        {"attention_bias": (False,), "mlp_bias": (False,), "sliding_window": ()},
        fused=moe_rules.STACKED, more=moe_keys.EVERY_LAYER, aliases={"num_local_experts": "num_experts"},
        models="OLMoE-1B-7B",
    ),
    "deepseek_v3": Family(
        "deepseek_v3", "DeepseekV3ForCausalLM", "model.", DEEPSEEK_RULES,
        {field: key for field, key in EXPERT_KEYS.items() if field != "head_size"}
        | {
            "moe.num_experts": "n_routed_experts", "moe.ffn_hidden_size": "moe_intermediate_size",
            "moe.norm_topk_prob": "norm_topk_prob", "moe.routed_scale": "routed_scaling_factor",
            "moe.num_groups": "n_group", "moe.top_groups": "topk_group", "mla.kv_lora_dim": "kv_lora_rank",
            "mla.nope_head_size": "qk_nope_head_dim", "mla.rope_head_size": "qk_rope_head_dim",
            "mla.value_head_size": "v_head_dim",
        },
        "hidden_act", SWIGLU,
        DEFAULTS | {"max_position_embeddings": 4096, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                     "n_routed_experts": 256, "num_experts_per_tok": 8, "norm_topk_prob": True,
                     "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "kv_lora_rank": 512,
                     "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        {name: value for name, value in SPARSE_SWITCHES.items() if name not in moe_keys.OPEN_IN_DEEPSEEK}
        | {"moe.score": "sigmoid", "moe.selection_bias": True, "moe.shared_gate": False, "sliding_window": None},
        moe_keys.ONLY_IN_DEEPSEEK,
        classifier="DeepseekV3ForSequenceClassification", fused=moe_rules.STACKED, more=moe_keys.DEEPSEEK,
        further=r"model\.layers\.\d+\.(enorm|hnorm|eh_proj)\.weight",
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        models="DeepSeek-V3, R1, Moonlight and others of that shape, in bf16 or FP8",
    ),
    "gpt2": Family(
        "gpt2", "GPT2LMHeadModel", "transformer.", GPT2_RULES,
        {
            "num_layers": "n_layer", "hidden_size": "n_embd", "ffn_hidden_size": "n_inner", "num_heads": "n_head",
            "vocab_size": "vocab_size", "max_positions": "n_positions", "tie_embeddings": "tie_word_embeddings",
            "norm_eps": "layer_norm_epsilon", "init_std": "initializer_range",
        },
        "activation_function",
        {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        {
            "n_positions": 1024, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
            "activation_function": "gelu_new",
        },
        DECODER | {"norm": "layernorm", "positions": "learned", "qkv_bias": True, "o_bias": True, "bias": True,
                   "qk_norm": False, "sliding_window": None},
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        r".*\.attn\.(bias|masked_bias)",
        classifier="GPT2ForSequenceClassification", writes={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        models="GPT-2",
    ),
    "bert": Family(
        "bert", "BertForMaskedLM", "bert.", BERT_RULES,
        {
            "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
            "num_heads": "num_attention_heads", "vocab_size": "vocab_size", "token_types": "type_vocab_size",
            "max_positions": "max_position_embeddings", "norm_eps": "layer_norm_eps", "init_std": "initializer_range",
        },
        "hidden_act",
        {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
        {
            "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
            "hidden_act": "gelu",
        },
        PLAIN | {"causal": False, "norm_place": "post", "embedding_norm": True, "head_bias": True, "norm": "layernorm",
                  "positions": "learned", "qkv_bias": True, "o_bias": True, "bias": True, "qk_norm": False,
                 "sliding_window": None, "head_dense_bias": True, "moe.num_experts": 0},
        {"position_embedding_type": ("absolute",), "is_decoder": (False,), "tie_word_embeddings": (True,)},
        r".*\.position_ids|cls\.predictions\.decoder\.bias",
        head="mlm", tied="cls.predictions.decoder.weight",
        repeats={"cls.predictions.decoder.bias": "cls.predictions.bias"}, classifier="BertForSequenceClassification",
        score=BERT_CLASSIFIER, pooler=True, body="BertModel", also=("BertForPreTraining",),
        aside=r"cls\.seq_relationship\..*|bert\.pooler\..*",
        spellings=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
        writes={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": True},
        models="BERT, uncased and cased",
    ),
} | LAYERED  # fmt: skip
