"""What a model looks like: sizes and switches, with families and presets filled in. No torch.

A field left at None is taken from the preset, then from the family, then from its general default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megallm.base.errors import UsageError
from megallm.base.suggest import did_you_mean
from megallm.models.layer_plan import LETTERS, LayerPlan, check_pattern, letter_of
from megallm.models.presets import FAMILIES, PRESETS
from megallm.models.rope_scaling import ROPE_SCALINGS, RopeScaling, check_rope, rotated
from megallm.models.sections import MTP_KINDS, MlaConfig, MoeConfig, MtpConfig


@dataclass(frozen=True)
class ModelConfig:
    """The model as the user writes it; `resolve()` fills every None that matters."""

    preset: str | None = None  # sizes and switches of a known model (`megallm presets` lists them)
    hf: str | None = None  # a Hugging Face folder: its sizes, weights and tokenizer
    init: str | None = None  # a run or step folder of megallm: its sizes, weights and tokenizer, without its history
    family: str | None = None  # the switches of a family such as llama, qwen3, gpt2, bert; null: llama
    num_layers: int | None = None  # transformer blocks
    hidden_size: int | None = None  # features of the hidden state of a token
    ffn_hidden_size: int | None = None  # features inside a feed-forward layer; null: 8/3 (gated) or 4 x hidden_size
    num_heads: int | None = None  # query heads of attention
    num_kv_heads: int | None = None  # key and value heads, which divide num_heads (GQA); null: num_heads
    head_size: int | None = None  # features of one head; null: hidden_size / num_heads
    vocab_size: int | None = None  # rows of the embedding; null: the vocabulary of the tokenizer that made the data
    max_positions: int | None = None  # the longest text the model is made for; learned positions: rows of them
    tie_embeddings: bool | None = None  # the head uses the matrix of the embedding
    # rmsnorm | rmsnorm_unit (weights are counted from 1) | layernorm (with a bias) | layernorm_unbiased
    norm: str | None = None
    norm_eps: float | None = None  # beside the mean of squares in a norm, against a division by 0
    # of the feed-forward layers: swiglu | geglu | geglu_tanh | swiglu_clamped (gpt-oss), all gated | gelu | gelu_tanh
    activation: str | None = None
    positions: str | None = None  # rope (rotary embedding) | learned (a vector for each position)
    causal: bool | None = None  # false: every token sees its whole document (encoders, masked diffusion)
    # pre: before attention and mlp | output: of what they give, before it is added (OLMo 2) | both (Gemma) |
    # post: after it was added, and none at the end (BERT)
    norm_place: str | None = None
    first_norm: bool | None = None  # false: layer 0 has no norm before attention (ModernBERT)
    parallel_residual: bool | None = None  # attention and mlp read the same hidden state (GPT-NeoX)
    embedding_norm: bool | None = None  # a norm after the embedding
    token_types: int | None = None  # kinds of tokens with a learned vector each (BERT's segments); 0: none
    head: str | None = None  # lm | mlm | classification | value (regression, reward, critic) | none (the body alone)
    head_bias: bool | None = None  # of the head's matrices
    head_dense_bias: bool | None = None  # of its layer before the last one (mlm, pooler); null: as head_bias
    num_labels: int | None = None  # classes of the classification head
    pooler: bool | None = None  # a tanh layer before the classification or value head
    critic: str | None = None  # beside head lm: value (of a state) | q (and twice of each next token: ILQL); null: none
    position_offset: int | None = None  # learned positions: rows of their table before the first one (RoBERTa)
    rope_theta: float | None = None  # base of the wave lengths of the rotary embedding
    rope_fraction: float | None = None  # only this part of a head's features is rotated, the first ones; null: all
    window_rope_theta: float | None = None  # base in layers with a window, which are then not stretched; null: the same
    rope_scaling: str | None = None  # linear | ntk | dynamic | llama3 | yarn | longrope: positions times rope_factor
    rope_factor: float | None = None  # how many times longer texts become than the model knew, with rope_scaling
    rope_low_factor: float | None = None  # llama3: waves longer than rope_positions / this are stretched in full
    rope_high_factor: float | None = None  # llama3: waves shorter than rope_positions / this are left alone
    rope_positions: int | None = None  # dynamic, llama3, yarn, longrope: positions that it knew before it was stretched
    rope_beta_fast: float | None = None  # yarn: waves that turn this often in rope_positions are left alone; null: 32
    rope_beta_slow: float | None = None  # yarn: waves that turn this often are stretched in full; null: 1
    rope_attention_factor: float | None = None  # yarn, longrope: size of cosines and sines; null: from the rest
    rope_mscale: float | None = None  # yarn: numerator of that size, with rope_mscale_all_dim
    rope_mscale_all_dim: float | None = None  # yarn: its denominator; its square also scales latent attention
    rope_truncate: bool | None = None  # yarn: the ramp begins and ends at whole features; null: true
    rope_short_factors: tuple[float, ...] | None = None  # longrope: a divisor for each wave
    rope_long_factors: tuple[float, ...] | None = None  # longrope: the same in texts of more than rope_positions
    qkv_bias: bool | None = None  # biases of the query, key and value projections; null: as bias
    o_bias: bool | None = None  # of the output projection of attention; null: as bias
    bias: bool | None = None  # up, down; and qkv and o unless qkv_bias and o_bias say otherwise
    qk_norm: bool | None = None  # a norm of queries and keys before their product (Qwen3, OLMoE)
    qk_norm_span: str | None = None  # head: each head by itself (Qwen3) | all: the heads of a layer together (OLMoE)
    sliding_window: int | None = None  # a token sees so many tokens back, itself included; null: all
    # a letter for each layer, repeated: f sees all, w has the window, n and m the same without rotary positions
    layer_pattern: str | None = None
    attention_scale: float | None = None  # what scores are multiplied by; null: 1 / sqrt(head_size)
    attention_cap: float | None = None  # soft cap: scores become cap * tanh(score / cap) (Gemma 2); null: none
    logit_cap: float | None = None  # the same of the language model's logits
    embedding_scale: float | None = None  # what the embedding's output is multiplied by; null: 1
    residual_scale: float | None = None  # what the outputs of attention and mlp are multiplied by (Granite); null: 1
    logits_scaling: float | None = None  # what logits are divided by (Granite); null: 1
    # a learned score for each head, which takes weight and gives no value (gpt-oss)
    attention_sinks: bool | None = None
    init_std: float | None = None  # standard deviation of the initial weights
    moe: MoeConfig = field(default_factory=MoeConfig)
    mla: MlaConfig = field(default_factory=MlaConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            given = getattr(self, name)
            if isinstance(given, Mapping):  # plain JSON of a checkpoint or an oracle row
                object.__setattr__(self, name, section(**given))
        for name in ("rope_short_factors", "rope_long_factors"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def resolve(self) -> ModelConfig:
        """Fill the fields from preset, family and defaults; raises UsageError naming what is missing."""
        preset: dict[str, Any] = {}
        if self.preset is not None:
            preset = _entry("model.preset", self.preset, PRESETS)
        family_name = self.family or preset.get("family") or "llama"
        if preset and family_name != preset["family"]:
            raise UsageError(
                f"model.family is {family_name}, but model.preset {self.preset} is of the family {preset['family']}: "
                "leave one of the two out."
            )
        values = dict(_entry("model.family", family_name, FAMILIES))
        values.update(preset)
        for name in (f.name for f in dataclasses.fields(self)):
            given = getattr(self, name)
            if name in SECTIONS:
                values[name] = given.resolve(values.get(name, {}))
            elif given is not None:
                values[name] = given
        values["family"] = family_name
        missing = [k for k in ("num_layers", "hidden_size", "num_heads", "vocab_size") if not values.get(k)]
        if missing:
            names = ", ".join(f"model.{name}" for name in missing)
            raise UsageError(f"The model lacks {names}: give them, or name a model.preset ({', '.join(PRESETS)}).")
        _derive(values)
        return ModelConfig(**values)

    @property
    def described(self) -> ModelConfig:
        """Returns the model without where its first weights come from."""
        return dataclasses.replace(self, hf=None, init=None)

    @property
    def rope_scaling_spec(self) -> RopeScaling | None:
        """None for the plain rotary embedding."""
        return RopeScaling.of(vars(self))

    @property
    def ropes(self) -> list[tuple[float, RopeScaling | None]]:
        """Returns base and scaling of the rotary embedding, and of that of layers with a window where it differs."""
        turned = self.window_rope_theta is not None and self.sliding_window is not None
        windowed = [(self.window_rope_theta, None)] if turned else []
        return [(self.rope_theta, self.rope_scaling_spec), *windowed]

    @property
    def rope_size(self) -> int:
        """Features of a head that are rotated."""
        return rotated(vars(self))

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    def layer_plan(self, number: int) -> LayerPlan:
        """Returns what the block of this number is; those of multi-token prediction follow the layers."""
        windowed, rope = LETTERS[letter_of(self.layer_pattern, self.sliding_window, number)]
        return LayerPlan(
            self.sliding_window if windowed else None,
            rope and self.positions == "rope",
            windowed and self.window_rope_theta is not None,
            self.norm_place in ("pre", "both", "post") and (self.first_norm or number > 0),
            self.moe.has_experts(number),
        )

    @property
    def layer_plans(self) -> list[LayerPlan]:
        """Returns the plans of all blocks."""
        return [self.layer_plan(number) for number in range(self.num_blocks)]

    @property
    def query_factor(self) -> float:
        """Number that queries are multiplied by, so that scores of 1 / sqrt(head_size) have attention_scale."""
        return 1.0 if self.attention_scale is None else self.attention_scale * self.head_size**0.5

    def num_params(self, active: bool = False) -> int:
        """Number of parameters of the resolved model; tied embeddings count once. Equals the built
        model's count.

        `active` leaves out the experts that a token does not go to.
        """
        norm = self._norm_params
        norms = {"both": 4}.get(self.norm_place, 2)
        total = self.num_blocks * (norms * norm + self._attention_params) + self._ffn_params(active)
        total += norm * ((self.norm_place != "post") + self.embedding_norm - (not self.first_norm))
        learned = self.max_positions + self.position_offset if self.positions == "learned" else 0
        rows = self.vocab_size + self.token_types + learned
        return total + rows * self.hidden_size + self._head_params + self._mtp_params

    @property
    def _attention_params(self) -> int:
        q, kv = self.num_heads * self.head_size, 2 * self.num_kv_heads * self.head_size
        total = self.attention_matrices + self.hidden_size * self.o_bias + self.num_heads * self.attention_sinks
        if self.mla.on:
            return total + self.mla.q_lora_dim + self.mla.kv_lora_dim  # the norms of the latents
        return total + (q + kv) * self.qkv_bias + self._qk_norm_params

    @property
    def _qk_norm_params(self) -> int:
        heads = self.num_heads + self.num_kv_heads if self.qk_norm_span == "all" else 2
        return heads * self.head_size * self.qk_norm

    def _ffn_params(self, active: bool) -> int:
        """Of all feed-forward layers."""
        matrices = 2 if self.gated else 1
        biases = self.hidden_size + matrices * self.ffn_hidden_size
        total = self._ffn_matrices(active) + self.bias * self.num_blocks * biases  # model.bias is not beside experts
        return total + self.num_expert_layers * self.moe.layer_biases(self.hidden_size, matrices, active)

    def _ffn_matrices(self, active: bool) -> int:
        """Weights of the matrices (and gates) of all feed-forward layers: `active` are those that one token uses."""
        experts = self.num_expert_layers
        dense = (self.num_blocks - experts) * self.mlp_matrices
        if not experts:
            return dense
        return dense + experts * self.moe.layer_params(self.hidden_size, 3 if self.gated else 2, active)

    @property
    def num_blocks(self) -> int:
        """Layers, and the blocks of multi-token prediction, which are numbered after them."""
        return self.num_layers + self.mtp.depth

    @property
    def num_expert_layers(self) -> int:
        """Blocks with experts."""
        return sum(self.moe.has_experts(layer) for layer in range(self.num_blocks))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns what a checkpoint holds of the model beside parameters, float32: the routers'
        selection biases.
        """
        if not self.moe.selection_bias:
            return {}
        first_ahead = self.num_layers
        places = [f"layers.{n}" if n < first_ahead else f"mtp.{n - first_ahead}.block" for n in range(self.num_blocks)]
        layers = [place for n, place in enumerate(places) if self.moe.has_experts(n)]
        return {f"{place}.moe.router.bias": (self.moe.num_experts,) for place in layers}

    @property
    def block_matrices(self) -> int:
        """Weights that a token meets in one block, on average over the blocks."""
        return self.attention_matrices + self._ffn_matrices(active=True) // self.num_blocks

    @property
    def _mtp_params(self) -> int:
        """Beside the blocks: a norm before the head, and what joins hidden state and embedding."""
        norms = 3 if self.mtp.joins else 1
        return self.mtp.depth * (norms * self._norm_params + self.mtp_matrices)

    @property
    def attention_matrices(self) -> int:
        """Weights of one layer's attention matrices."""
        d, h, mla = self.hidden_size, self.num_heads, self.mla
        if not mla.on:
            return d * self.head_size * (2 * h + 2 * self.num_kv_heads)
        q = (d + h * self.head_size) * mla.q_lora_dim if mla.q_lora_dim else d * h * self.head_size
        kv = d * (mla.kv_lora_dim + mla.rope_head_size) + mla.kv_lora_dim * h * (
            mla.nope_head_size + mla.value_head_size
        )
        return q + kv + h * mla.value_head_size * d

    @property
    def mlp_matrices(self) -> int:
        """Weights of one layer's feed-forward matrices."""
        return (3 if self.gated else 2) * self.hidden_size * self.ffn_hidden_size

    @property
    def embeds_last(self) -> bool:
        """Whether the last stage needs the embedding too: as the head's matrix, or for multi-token prediction."""
        return bool(self.tie_embeddings or self.mtp.joins)

    @property
    def mtp_matrices(self) -> int:
        """Weights of the matrix that joins hidden state and embedding, of one depth of multi-token prediction."""
        return 2 * self.hidden_size**2 * self.mtp.joins

    @property
    def _norm_params(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    @property
    def _head_params(self) -> int:
        d, outputs, layers = self.hidden_size, self.head_outputs, self.head_layers
        total = layers * d * (d + self.head_dense_bias) + self._norm_params * (self.head == "mlm")
        return total + outputs * (d * (not self.tie_embeddings) + self.head_bias) + self.critic_matrices

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the per-token scalars `[B, T]` that the model's last stage returns."""
        of_head = {"value": ("value",), "none": ()}
        further = tuple(f"mtp_{depth}" for depth in range(1, self.mtp.depth + 1))
        usual = ("log_prob", "entropy", "correct", *CRITIC_SCORES.get(self.critic, ()))
        return of_head.get(self.head, usual) + further

    @property
    def head_outputs(self) -> int:
        """Rows of the head's last matrix: the vocabulary, the classes, one value, or nothing."""
        sizes = {"lm": self.vocab_size, "mlm": self.vocab_size, "classification": self.num_labels, "value": 1}
        return sizes.get(self.head, 0)

    @property
    def head_layers(self) -> int:
        """`D x D` layers before that: the transform of a masked language model, or the pooler."""
        return int(self.head == "mlm" or self.pooler)

    @property
    def critic_matrices(self) -> int:
        """Weights of the values beside the head."""
        outputs = {"value": 1, "q": 1 + 2 * self.vocab_size}
        return self.hidden_size * outputs.get(self.critic, 0)

    @property
    def head_matrices(self) -> int:
        """Weights of the head's matrix multiplies, and of the values beside it."""
        own = self.hidden_size * (self.head_layers * self.hidden_size + self.head_outputs)
        return own + self.critic_matrices

    def num_flops(self, seq_len: int, causal: bool = False) -> int:
        """Number of training FLOPs (forward and backward) per token: 6 per weight of each matrix
        multiply, plus attention.

        `causal` counts the lower triangle only; without it, the full square (Megatron's convention).
        """
        matrices = self.num_blocks * self.attention_matrices + self._ffn_matrices(active=True)
        value_size = self.mla.value_head_size if self.mla.on else self.head_size
        attention = 0
        for plan in self.layer_plans:
            span = min(seq_len, plan.window or seq_len)
            work = 2 * self.num_heads * (self.head_size + value_size) * span * 3
            if not self.causal and plan.window:  # it looks to both sides
                span = min(seq_len, 2 * plan.window - 1)
                work = 2 * self.num_heads * (self.head_size + value_size) * span * 3
            attention += work * (2 * seq_len - span) // (2 * seq_len) if causal else work
        further = self.mtp.depth * (self.mtp_matrices + self.head_matrices)
        return attention + 6 * (matrices + self.head_matrices + further)


def _entry(key: str, name: str, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name in table:
        return table[name]
    raise UsageError(f"{key} is '{name}'; known names are {', '.join(table)}.{did_you_mean(name, table)}")


def _derive(values: dict[str, Any]) -> None:
    """Sizes that follow from others, in place."""
    heads, d = values["num_heads"], values["hidden_size"]
    if values["mla"].on:
        _derive_latent(values)
    values.setdefault("num_kv_heads", heads)
    if "head_size" not in values:
        if d % heads:
            raise UsageError(
                f"model.hidden_size {d} is not divisible by model.num_heads {heads}: "
                f"give model.head_size, or a hidden size such as {d // heads * heads or heads}."
            )
        values["head_size"] = d // heads
    if values["num_kv_heads"] < 1 or heads % values["num_kv_heads"]:
        fits = [k for k in range(1, heads + 1) if heads % k == 0]
        raise UsageError(
            f"model.num_heads {heads} is not a multiple of model.num_kv_heads {values['num_kv_heads']}: "
            f"use one of {fits}."
        )
    if "ffn_hidden_size" not in values:
        gated = values["activation"] in GATED
        values["ffn_hidden_size"] = -(-8 * d // 3 // 64) * 64 if gated else 4 * d
    check_pattern(values)
    check_rope(values)
    _check_head(values)
    _check_mtp(values)
    _check_experts(values)
    for name, like in (("qkv_bias", "bias"), ("o_bias", "bias"), ("head_dense_bias", "head_bias")):
        if values.get(name) is None:
            values[name] = values[like]
    if values["parallel_residual"] and values["norm_place"] == "post":
        raise UsageError("model.parallel_residual reads one hidden state: model.norm_place post has none such.")
    if not values["first_norm"] and values["norm_place"] != "pre":
        raise UsageError("model.first_norm false leaves a norm out before attention: model.norm_place must be pre.")


def _check_head(values: dict[str, Any]) -> None:
    """The head has what it needs and nothing that it does not use; only heads over the vocabulary are tied."""
    head, labels = values["head"], values.get("num_labels")
    if (head == "classification") != (labels is not None):
        need = "needs model.num_labels, the number of classes" if labels is None else "has no model.num_labels"
        raise UsageError(f"model.head {head} {need}.")
    if labels is not None and labels < 2:
        raise UsageError(f"model.num_labels is {labels}; classes are at least 2. For one number take model.head value.")
    if values["pooler"] and head in VOCABULARY_HEADS:
        raise UsageError(f"model.pooler stands before a classification or value head; model.head is {head}.")
    if head not in VOCABULARY_HEADS:
        values["tie_embeddings"] = False
    if values.get("critic") and (head != "lm" or values["mtp"].depth):
        raise UsageError(
            f"model.critic {values['critic']} stands beside model.head lm without further tokens; model.head is {head} "
            f"and model.mtp.depth {values['mtp'].depth}."
        )


def _derive_latent(values: dict[str, Any]) -> None:
    """Latent attention says what a head is; the fields of ordinary attention must not say otherwise."""
    mla = values["mla"]
    size = mla.nope_head_size + mla.rope_head_size
    for name, wanted in (("head_size", size), ("num_kv_heads", values["num_heads"])):
        if values.setdefault(name, wanted) != wanted:
            raise UsageError(
                f"model.{name} is {values[name]}, but latent attention (model.mla) makes it {wanted}: leave it out."
            )
    if mla.rope_head_size % 2:
        raise UsageError(f"model.mla.rope_head_size {mla.rope_head_size} must be even: rotary positions turn pairs.")
    if values["positions"] != "rope":
        raise UsageError("Latent attention (model.mla) has its own rotary key: model.positions must be rope.")
    for name in ("qkv_bias", "qk_norm", "attention_scale", "attention_cap", "rope_fraction", "window_rope_theta"):
        if values.get(name):
            raise UsageError(f"Latent attention (model.mla) has no model.{name}: leave it out.")
    values["qkv_bias"] = False


def _check_experts(values: dict[str, Any]) -> None:
    """Experts have sizes that go together, and no biases."""
    moe: MoeConfig = values["moe"]
    if moe.num_experts == 0:
        return
    if moe.ffn_hidden_size is None:
        values["moe"] = moe = dataclasses.replace(moe, ffn_hidden_size=values["ffn_hidden_size"])
    moe.check()
    if values["bias"]:
        raise UsageError(
            f"model.moe.num_experts is {moe.num_experts}, but model.bias is true, which is of dense layers: "
            "set model.bias=false (model.qkv_bias, model.o_bias and model.moe.bias may be true)."
        )


def _check_mtp(values: dict[str, Any]) -> None:
    """Multi-token prediction belongs to a causal language model with pre-norm blocks."""
    if values["mtp"].depth and not (values["head"] == "lm" and values["causal"] and values["norm_place"] != "post"):
        raise UsageError(
            f"model.mtp.depth {values['mtp'].depth} predicts further tokens: that takes model.head lm, "
            "model.causal true and another model.norm_place than post. Or leave it at 0."
        )


SECTIONS = {"moe": MoeConfig, "mla": MlaConfig, "mtp": MtpConfig}
CHOICES = {
    "rope_scaling": tuple(ROPE_SCALINGS),
    "norm": ("rmsnorm", "rmsnorm_unit", "layernorm", "layernorm_unbiased"),
    "activation": ("swiglu", "geglu", "geglu_tanh", "swiglu_clamped", "gelu", "gelu_tanh"),
    "positions": ("rope", "learned"),
    "mtp.kind": MTP_KINDS,
    "norm_place": ("pre", "output", "both", "post"),
    "qk_norm_span": ("head", "all"),
    "moe.score": ("softmax", "sigmoid"),
    "moe.drop": ("score", "position"),
    "head": ("lm", "mlm", "classification", "value", "none"),
    "critic": ("value", "q"),
}
VOCABULARY_HEADS = ("lm", "mlm")
CRITIC_SCORES = {"value": ("value",), "q": ("value", "q1", "q2", "q1_log_prob", "q2_log_prob")}
GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_clamped")
