"""Parts of a model's configuration that only some models have: experts, latent attention, extra
predictions. No torch.

As in `models.config`, a field left at None is taken from the preset, then from the family, then
from `DEFAULTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megallm.base.errors import UsageError


@dataclass(frozen=True)
class Section:
    """A nested group of fields, all None until `resolve`."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    def resolve(self, table: Mapping[str, Any]) -> Self:
        """Fill the fields left at None from `table` (of a preset or family), then from the
        defaults.
        """
        values = dict(self.DEFAULTS) | dict(table)
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(
            **(values | {name: value for name, value in given.items() if value is not None})
        )


@dataclass(frozen=True)
class MoeConfig(Section):
    """Mixture of experts in place of the feed-forward layer (arXiv 1701.06538); DeepSeek's forms:
    arXiv 2412.19437.
    """

    DEFAULTS = {
        "num_experts": 0,
        "top_k": 2,
        "shared_ffn_hidden_size": 0,
        "shared_gate": False,
        "first_dense": 0,
        "every": 1,
        "score": "softmax",
        "norm_topk_prob": True,
        "routed_scale": 1.0,
        "num_groups": 1,
        "top_groups": 1,
        "selection_bias": False,
        "bias_rate": 0.001,
        "aux_coef": 0.001,
        "z_coef": 0.0,
        "drop": "score",
        "bias": False,
        "router_bias": False,
    }

    num_experts: int | None = None  # 0: dense feed-forward layers
    top_k: int | None = None  # experts of each token
    ffn_hidden_size: int | None = None  # of one expert; null: model.ffn_hidden_size
    shared_ffn_hidden_size: int | None = None  # of a dense layer beside the experts, which every token takes; 0: none
    shared_gate: bool | None = None  # scale the shared layer by a sigmoid of the token (Qwen2-MoE)
    first_dense: int | None = None  # layers before the first one with experts
    every: int | None = None  # from there on, every how many layers one has experts
    score: str | None = None  # softmax | sigmoid: router logits to scores
    norm_topk_prob: bool | None = None  # scale the chosen scores to a sum of 1
    routed_scale: float | None = None  # factor of the experts' weights
    num_groups: int | None = None  # groups of neighbouring experts
    top_groups: int | None = None  # groups that a token may choose from
    selection_bias: bool | None = None  # balance by a bias on the choice, without a gradient (arXiv 2408.15664)
    bias_rate: float | None = None  # step of that bias after each update
    aux_coef: float | None = None  # weight of the balancing loss of each sequence
    z_coef: float | None = None  # weight of the squared log-sum-exp of router logits (arXiv 2202.08906)
    capacity: float | None = None  # most copies an expert takes of a sequence, over the even share; null: all
    bias: bool | None = None  # of the experts' matrices (gpt-oss)
    router_bias: bool | None = None  # of the router's logits, which is trained (gpt-oss)
    drop: str | None = None  # score | position: beyond its capacity, which tokens of a sequence an expert keeps

    def has_experts(self, layer: int) -> bool:
        """Returns whether a layer has experts."""
        here = layer >= self.first_dense and (layer - self.first_dense) % self.every == 0
        return self.num_experts > 0 and here

    def layer_params(self, hidden: int, matrices: int, active: bool = False) -> int:
        """Number of parameters of one layer with experts, each of `matrices` matrices; `active`:
        those that one token uses.

        The selection bias is state, not a parameter.
        """
        experts = self.top_k if active else self.num_experts
        width = experts * self.ffn_hidden_size + self.shared_ffn_hidden_size
        gate = hidden * (self.shared_gate and self.shared_ffn_hidden_size > 0)
        return self.num_experts * hidden + matrices * hidden * width + gate

    def layer_biases(self, hidden: int, matrices: int, active: bool = False) -> int:
        """Number of biases of one layer with experts, `matrices` of which lead into an expert."""
        experts = self.top_k if active else self.num_experts
        of_experts = experts * (matrices * (self.ffn_hidden_size or 0) + hidden)
        return of_experts * self.bias + self.num_experts * self.router_bias

    def check(self) -> None:
        """Raise UsageError for numbers of a model with experts that do not go together."""
        experts, groups = self.num_experts, self.num_groups
        for name, fits, must in (
            ("num_experts", experts >= 0, "at least 0"),
            ("top_k", 1 <= self.top_k <= experts, f"from 1 to num_experts {experts}"),
            ("every", self.every >= 1, "at least 1"),
            ("first_dense", self.first_dense >= 0, "at least 0"),
            ("shared_ffn_hidden_size", self.shared_ffn_hidden_size >= 0, "at least 0"),
            ("num_groups", groups >= 1 and experts % max(groups, 1) == 0,
             f"a divisor of num_experts {experts}"),
            ("top_groups", 1 <= self.top_groups <= groups, f"from 1 to num_groups {groups}"),
            ("capacity", self.capacity is None or self.capacity > 0, "greater than 0, or null"),
        ):  # fmt: skip
            if not fits:
                raise UsageError(f"model.moe.{name} is {vars(self)[name]}; it must be {must}.")
        if self.top_k > self.top_groups * (experts // groups):
            raise UsageError(
                f"model.moe.top_k {self.top_k} is more than the experts of model.moe.top_groups "
                f"{self.top_groups} groups of {experts // groups}."
            )


@dataclass(frozen=True)
class MlaConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    DEFAULTS = {
        "kv_lora_dim": 0, "q_lora_dim": 0, "nope_head_size": 128, "rope_head_size": 64, "value_head_size": 128,
    }  # fmt: skip

    kv_lora_dim: int | None = None  # size of the latent that keys and values are made of; 0: ordinary attention
    q_lora_dim: int | None = None  # size of the latent that queries are made of; 0: made from the hidden state
    nope_head_size: int | None = None  # features of a head's queries and keys without position
    rope_head_size: int | None = None  # rotated features beside them; this part of the key is shared by all heads
    value_head_size: int | None = None  # features of a head's values
    norm_eps: float | None = None  # of the norms of the latents; null: model.norm_eps

    @property
    def on(self) -> bool:
        return bool(self.kv_lora_dim)


MTP_KINDS = ("deepseek", "heads")


@dataclass(frozen=True)
class MtpConfig(Section):
    """Multi-token prediction: what lies further ahead than the next token (arXiv 2412.19437,
    2404.19737).
    """

    DEFAULTS = {"depth": 0, "kind": "deepseek", "weight": 0.3}

    depth: int | None = None  # tokens predicted beyond the next one; 0: none
    kind: str | None = None  # deepseek: one after another, each sees the token before its own | heads: independent ones
    weight: float | None = None  # of the mean of their losses, beside the loss of the next token

    @property
    def joins(self) -> bool:
        """Whether each depth joins a hidden state with the embedding of a token."""
        return bool(self.depth) and self.kind == "deepseek"
