"""One table per Hugging Face family: its tensors, its configuration keys, and what of them megallm
can do. Pure.

To add a family: its rules, its keys, the defaults that transformers takes for absent keys, and the
keys that must have one value for the architecture to be ours. Everything else reads these tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megallm.convert import moe_keys, moe_rules
from megallm.convert.moe_keys import ConfigExtension
from megallm.convert.rules import WeightRule, rule

LLAMA_RULES = (
    rule("model.embed_tokens.weight", "embedding.weight"),
    rule("model.layers.{n}.input_layernorm.weight", "layers.{n}.attention_norm.weight"),
    rule("model.layers.{n}.self_attn.q_proj.weight", "layers.{n}.attention.q.weight"),
    rule("model.layers.{n}.self_attn.q_proj.bias", "layers.{n}.attention.q.bias"),
    rule("model.layers.{n}.self_attn.k_proj.weight", "layers.{n}.attention.kv.weight[0]"),
    rule("model.layers.{n}.self_attn.k_proj.bias", "layers.{n}.attention.kv.bias[0]"),
    rule("model.layers.{n}.self_attn.v_proj.weight", "layers.{n}.attention.kv.weight[1]"),
    rule("model.layers.{n}.self_attn.v_proj.bias", "layers.{n}.attention.kv.bias[1]"),
    rule("model.layers.{n}.self_attn.q_norm.weight", "layers.{n}.attention.q_norm.weight"),
    rule("model.layers.{n}.self_attn.k_norm.weight", "layers.{n}.attention.k_norm.weight"),
    rule("model.layers.{n}.self_attn.o_proj.weight", "layers.{n}.attention.o.weight"),
    rule("model.layers.{n}.self_attn.o_proj.bias", "layers.{n}.attention.o.bias"),
    rule("model.layers.{n}.post_attention_layernorm.weight", "layers.{n}.mlp_norm.weight"),
    rule("model.layers.{n}.mlp.gate_proj.weight", "layers.{n}.mlp.gate_up.weight[0]"),
    rule("model.layers.{n}.mlp.gate_proj.bias", "layers.{n}.mlp.gate_up.bias[0]"),
    rule("model.layers.{n}.mlp.up_proj.weight", "layers.{n}.mlp.gate_up.weight[1]"),
    rule("model.layers.{n}.mlp.up_proj.bias", "layers.{n}.mlp.gate_up.bias[1]"),
    rule("model.layers.{n}.mlp.down_proj.weight", "layers.{n}.mlp.down.weight"),
    rule("model.layers.{n}.mlp.down_proj.bias", "layers.{n}.mlp.down.bias"),
    rule("model.norm.weight", "final_norm.weight"),
    rule("lm_head.weight", "head.weight"),
)

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


@dataclass(frozen=True)
class Family:
    """What conversion knows about one `model_type`.

    `keys`: our field -> their key. `defaults`: what transformers takes when a key is absent.
    `only`: keys that must be absent, null or have one of these values. `switches`: what our model
    must be to be written as this family. `activations`: their activation -> ours. `buffers`:
    regular expression of stored tensors that are no weights.

    `architecture` is that of the family's own head (`head`), `classifier` the one of classes or of
    one number, and `body` the one without a head; `rules` hold the first, `score` those of the
    classifier. `aside` matches stored tensors of a head that megallm does not have, `spellings` are
    old endings of names and what they are now. `fused` are rules of tensors with all experts of a
    layer in place of those with one each; `further` matches the tensors of multi-token prediction;
    `more` are the keys that do not go over one by one; `aliases` are other names of keys, which
    transformers writes; `writes` are keys of an exported config.json with one value.
    """

    name: str
    architecture: str
    prefix: str  # of the body's tensors; folders saved from the bare body lack it
    rules: tuple[WeightRule, ...]
    keys: Mapping[str, str]
    activation_key: str
    activations: Mapping[str, str]
    defaults: Mapping[str, Any]
    switches: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    buffers: str = r".*\.rotary_emb\.inv_freq"
    head: str = "lm"
    tied: str = "lm_head.weight"  # their name of the head's matrix when it is the embedding
    repeats: Mapping[str, str] = field(
        default_factory=dict
    )  # further tensors that must equal another one of theirs
    classifier: str | None = None
    score: tuple[WeightRule, ...] = (rule("score.weight", "head.weight"),)
    pooler: bool = False  # before the classifier
    body: str | None = None
    also: tuple[str, ...] = ()  # other architectures that hold all of `architecture`
    aside: str = ""
    spellings: tuple[tuple[str, str], ...] = ()
    fused: tuple[WeightRule, ...] = ()
    further: str = r"(?!)"
    more: ConfigExtension | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    writes: Mapping[str, Any] = field(default_factory=dict)

    def is_fused(self, names: Iterable[str]) -> bool:
        """Returns whether tensors with these names hold all experts of a layer."""
        endings = tuple(each.theirs.rpartition("}.")[2].split("[")[0] for each in self.fused)
        return bool(endings) and any(name.endswith(endings) for name in names)

    def rules_of(self, head: str, fused: bool = False) -> tuple[WeightRule, ...]:
        """Returns the rules of a model with this head; of a body alone, whose tensors have no
        prefix.
        """
        rules = self.rules
        if fused:
            rules = (*(each for each in rules if "{x}" not in each.theirs), *self.fused)
        if head == self.head:
            return rules
        rest = tuple(each for each in rules if not each.of_head)
        if head != "none":
            return rest + self.score
        bare = (
            replace(each, theirs=each.theirs.removeprefix(self.prefix))
            for each in rest + self.score
        )
        return tuple(bare)

    def architecture_of(self, head: str) -> str | None:
        """Returns their class of a model with this head, None when there is none."""
        others = {"classification": self.classifier, "value": self.classifier, "none": self.body}
        return self.architecture if head == self.head else others.get(head)


_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
_EXPERT_KEYS = _KEYS | {"moe.top_k": "num_experts_per_tok"}
_QWEN_EXPERTS = _EXPERT_KEYS | {
    "moe.num_experts": "num_experts", "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.norm_topk_prob": "norm_topk_prob",
}  # fmt: skip
_SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
_PLAIN = {"mla.kv_lora_dim": 0, "mtp.depth": 0, "attention_sinks": False}
_DECODER = {"causal": True, "norm_place": "pre", "embedding_norm": False, "token_types": 0, "head_bias": False,
            "moe.num_experts": 0} | _PLAIN  # fmt: skip
_ROPE_SWITCHES = _DECODER | {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"}
_SPARSE_SWITCHES = {name: value for name, value in _ROPE_SWITCHES.items() if name != "moe.num_experts"} | {
    "bias": False, "moe.score": "softmax", "moe.routed_scale": 1.0, "moe.num_groups": 1, "moe.selection_bias": False,
}  # fmt: skip
_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu",
             "rope_theta": 10000.0}  # fmt: skip

# Published folders name code of their own, which transformers has itself by now. None of it is run.
_CODE_OF_PHI3 = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}

# Keys of any config.json that ask for something no family here computes, with the values that ask
# for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "logits_soft_cap": (),
    "logit_scale": (1, 1.0),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (),
    "compression_config": (),
    "auto_map": ({},),
    "attention_chunk_size": (),
    "parallel_attn": (False,),
    "alibi": (False,),
    "clip_qkv": (),
    "num_nextn_predict_layers": (0,),
    "tie_encoder_decoder": (False,),
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", "LlamaForCausalLM", "model.", LLAMA_RULES, _KEYS, "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 2048},
        _ROPE_SWITCHES | {"qk_norm": False, "sliding_window": None},
        {"sliding_window": (), "use_sliding_window": (False,)},
        classifier="LlamaForSequenceClassification",
    ),
    "mistral": Family(
        "mistral", "MistralForCausalLM", "model.", LLAMA_RULES, _KEYS, "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        _ROPE_SWITCHES | {"qk_norm": False, "qkv_bias": False, "bias": False},
        {"attention_bias": (False,), "mlp_bias": (False,)},
        classifier="MistralForSequenceClassification",
    ),
    "qwen2": Family(
        "qwen2", "Qwen2ForCausalLM", "model.", LLAMA_RULES, _KEYS, "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        _ROPE_SWITCHES | {"qk_norm": False, "qkv_bias": True, "bias": False},
        {"attention_bias": (True,), "mlp_bias": (False,)},
        classifier="Qwen2ForSequenceClassification",
    ),
    "qwen3": Family(
        "qwen3", "Qwen3ForCausalLM", "model.", LLAMA_RULES, _KEYS, "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        _ROPE_SWITCHES | {"qk_norm": True, "qk_norm_span": "head", "qkv_bias": False, "bias": False},
        {"attention_bias": (False,), "mlp_bias": (False,)},
        classifier="Qwen3ForSequenceClassification",
    ),
    "phi3": Family(
        "phi3", "Phi3ForCausalLM", "model.", PHI3_RULES,
        {field: key for field, key in _KEYS.items() if field != "head_size"}, "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        _ROPE_SWITCHES | {"qk_norm": False, "qkv_bias": False, "bias": False, "rope_scaling": None},
        {"attention_bias": (False,), "mlp_bias": (False,), "auto_map": ({}, _CODE_OF_PHI3)},
        classifier="Phi3ForSequenceClassification",
    ),
    "mixtral": Family(
        "mixtral", "MixtralForCausalLM", "model.", LLAMA_RULES + moe_rules.MIXTRAL,
        _EXPERT_KEYS | {"moe.num_experts": "num_local_experts"}, "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                     "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        _SPARSE_SWITCHES | {"qk_norm": False, "qkv_bias": False, "moe.norm_topk_prob": True,
                            "moe.shared_ffn_hidden_size": 0},
        {"attention_bias": (False,), "mlp_bias": (False,)},
        classifier="MixtralForSequenceClassification", spellings=((".mlp.", ".block_sparse_moe."),),
        fused=moe_rules.MIXTRAL_STACKED, more=moe_keys.EVERY_LAYER,
    ),
    "qwen2_moe": Family(
        "qwen2_moe", "Qwen2MoeForCausalLM", "model.", LLAMA_RULES + moe_rules.PLAIN + moe_rules.SHARED_GATE,
        _QWEN_EXPERTS | {"moe.shared_ffn_hidden_size": "shared_expert_intermediate_size"}, "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 16, "norm_topk_prob": False,
                     "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                     "shared_expert_intermediate_size": 5632, "intermediate_size": 5632},
        _SPARSE_SWITCHES | {"qk_norm": False, "qkv_bias": True, "sliding_window": None, "moe.shared_gate": True},
        {"attention_bias": (True,), "qkv_bias": (True,), "mlp_bias": (False,), "use_sliding_window": (False,)},
        classifier="Qwen2MoeForSequenceClassification", fused=moe_rules.STACKED, more=moe_keys.SPARSE,
    ),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", "model.", LLAMA_RULES + moe_rules.PLAIN, _QWEN_EXPERTS,
        "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 4, "norm_topk_prob": False,
                     "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                     "intermediate_size": 6144},
        _SPARSE_SWITCHES | {"qk_norm": True, "qk_norm_span": "head", "qkv_bias": False, "sliding_window": None,
                            "moe.shared_ffn_hidden_size": 0},
        {"attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,)},
        classifier="Qwen3MoeForSequenceClassification", fused=moe_rules.STACKED, more=moe_keys.SPARSE,
        aliases={"num_local_experts": "num_experts"},
    ),
    "olmoe": Family(
        "olmoe", "OlmoeForCausalLM", "model.", LLAMA_RULES + moe_rules.PLAIN,
        {field: key for field, key in _EXPERT_KEYS.items() if field != "head_size"}
        | {"moe.num_experts": "num_experts", "moe.norm_topk_prob": "norm_topk_prob"},
        "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64,
                     "num_experts_per_tok": 8, "norm_topk_prob": False, "intermediate_size": 2048},
        _SPARSE_SWITCHES | {"qk_norm": True, "qk_norm_span": "all", "qkv_bias": False, "sliding_window": None,
                            "moe.shared_ffn_hidden_size": 0},
        {"attention_bias": (False,), "mlp_bias": (False,), "sliding_window": ()},
        fused=moe_rules.STACKED, more=moe_keys.EVERY_LAYER, aliases={"num_local_experts": "num_experts"},
    ),
    "deepseek_v3": Family(
        "deepseek_v3", "DeepseekV3ForCausalLM", "model.", DEEPSEEK_RULES,
        {field: key for field, key in _EXPERT_KEYS.items() if field != "head_size"}
        | {
            "moe.num_experts": "n_routed_experts", "moe.ffn_hidden_size": "moe_intermediate_size",
            "moe.norm_topk_prob": "norm_topk_prob", "moe.routed_scale": "routed_scaling_factor",
            "moe.num_groups": "n_group", "moe.top_groups": "topk_group", "mla.kv_lora_dim": "kv_lora_rank",
            "mla.nope_head_size": "qk_nope_head_dim", "mla.rope_head_size": "qk_rope_head_dim",
            "mla.value_head_size": "v_head_dim",
        },
        "hidden_act", _SWIGLU,
        _DEFAULTS | {"max_position_embeddings": 4096, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                     "n_routed_experts": 256, "num_experts_per_tok": 8, "norm_topk_prob": True,
                     "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "kv_lora_rank": 512,
                     "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        {name: value for name, value in _SPARSE_SWITCHES.items() if name not in moe_keys.OPEN_IN_DEEPSEEK}
        | {"moe.score": "sigmoid", "moe.selection_bias": True, "moe.shared_gate": False, "sliding_window": None,
           "qk_norm": False, "qkv_bias": False},
        moe_keys.ONLY_IN_DEEPSEEK,
        classifier="DeepseekV3ForSequenceClassification", fused=moe_rules.STACKED, more=moe_keys.DEEPSEEK,
        further=r"model\.layers\.\d+\.(enorm|hnorm|eh_proj)\.weight",
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
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
        _DECODER | {"norm": "layernorm", "positions": "learned", "qkv_bias": True, "bias": True, "qk_norm": False,
                    "sliding_window": None},
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        r".*\.attn\.(bias|masked_bias)",
        classifier="GPT2ForSequenceClassification", writes={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
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
        _PLAIN | {"causal": False, "norm_place": "post", "embedding_norm": True, "head_bias": True, "norm": "layernorm",
                  "positions": "learned", "qkv_bias": True, "bias": True, "qk_norm": False, "sliding_window": None,
                  "moe.num_experts": 0},
        {"position_embedding_type": ("absolute",), "is_decoder": (False,), "tie_word_embeddings": (True,)},
        r".*\.position_ids|cls\.predictions\.decoder\.bias",
        head="mlm", tied="cls.predictions.decoder.weight",
        repeats={"cls.predictions.decoder.bias": "cls.predictions.bias"}, classifier="BertForSequenceClassification",
        score=BERT_CLASSIFIER, pooler=True, body="BertModel", also=("BertForPreTraining",),
        aside=r"cls\.seq_relationship\..*|bert\.pooler\..*",
        spellings=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
        writes={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": True},
    ),
}  # fmt: skip
