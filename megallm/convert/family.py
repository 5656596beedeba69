"""What conversion knows about one Hugging Face family, and the switches and keys that many share.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megallm.convert.moe_keys import ConfigExtension
from megallm.convert.rules import WeightRule, rule


@dataclass(frozen=True)
class LayerKeys:
    """Keys that say which layers have a window, and where the numbers of rotary embeddings stand.

    `letters` are those of `model.layer_pattern` that the family has; `pattern` is the one without
    `layer_types`, and `period` the key of a number of layers with one that sees all: the first of
    them where `first_whole`, else the last. With `use` the window counts only where
    `use_sliding_window` is true. `halved`: the window's number covers both sides.
    """

    letters: str = "f"
    window: str = "sliding_window"
    use: bool = False
    pattern: str | None = None
    period: str = ""
    first_whole: bool = False
    halved: bool = False
    theta: str = "rope_theta"
    window_theta: str | None = None  # the key of layers with a window, which are not stretched then
    fraction: str | None = None
    stretches: Mapping[str, str] = field(default_factory=dict)  # their words of rope types, renamed

    @property
    def mixes(self) -> bool:
        """Returns whether layers may differ."""
        return len(self.letters) > 1

    @property
    def keys(self) -> frozenset[str]:
        """Returns the keys that say it."""
        named = (self.window, self.period, self.theta, self.window_theta, self.fraction)
        return frozenset(name for name in named if name)


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
    transformers writes; `writes` are keys of an exported config.json with one value. `flags`: our
    field -> the key that switches it, false unless `defaults` says otherwise; `layers` is how they
    differ, and where rotary embeddings stand. `models` are published ones, for people.
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
    flags: Mapping[str, str] = field(default_factory=dict)
    layers: LayerKeys = LayerKeys()
    models: str = ""

    def is_fused(self, names: Iterable[str]) -> bool:
        """Returns whether tensors with these names hold all experts of a layer."""
        own = [each for each in self.fused if each not in self.rules]
        endings = tuple(each.theirs.rpartition("}.")[2].split("[")[0] for each in own)
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


KEYS = {
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
EXPERT_KEYS = KEYS | {"moe.top_k": "num_experts_per_tok"}
QWEN_EXPERTS = EXPERT_KEYS | {
    "moe.num_experts": "num_experts", "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.norm_topk_prob": "norm_topk_prob",
}  # fmt: skip
SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
PLAIN = {"mla.kv_lora_dim": 0, "mtp.depth": 0, "attention_sinks": False, "layer_pattern": None,
         "window_rope_theta": None, "rope_fraction": None, "attention_scale": None, "attention_cap": None,
         "logit_cap": None, "embedding_scale": None, "residual_scale": None, "logits_scaling": None,
         "parallel_residual": False, "first_norm": True, "position_offset": 0, "moe.bias": False,
         "moe.router_bias": False}  # fmt: skip
DECODER = {"causal": True, "norm_place": "pre", "embedding_norm": False, "token_types": 0, "head_bias": False,
            "moe.num_experts": 0} | PLAIN  # fmt: skip
ROPE_SWITCHES = DECODER | {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "qkv_bias": False,
                           "o_bias": False, "bias": False, "qk_norm": False}  # fmt: skip
SPARSE_SWITCHES = {name: value for name, value in ROPE_SWITCHES.items() if name != "moe.num_experts"} | {
    "bias": False, "moe.score": "softmax", "moe.routed_scale": 1.0, "moe.num_groups": 1, "moe.selection_bias": False,
}  # fmt: skip
DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu",
             "rope_theta": 10000.0}  # fmt: skip



def without(table: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Returns a table without some of its rows: what a family leaves open, or has no key for."""
    return {name: value for name, value in table.items() if name not in names}


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
