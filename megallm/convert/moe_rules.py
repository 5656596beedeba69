"""Rules of families with experts, latent attention and further tokens, beside those of `families`.
Pure.

Published folders keep each expert by itself; transformers 5 has them stacked in memory and writes
that form when asked not to keep the original one. `stacked` rules read it.
"""

from __future__ import annotations

from megallm.convert.rules import WeightRule, rule

_LAYER, _OURS = "model.layers.{n}.", "layers.{n}."


def experts(theirs: str, gate: str, up: str, down: str) -> tuple[WeightRule, ...]:
    """Returns experts one by one, in a module called `theirs` of the layer, with these names of the
    three matrices.
    """
    one, ours = f"{_LAYER}{theirs}.experts.{{x}}.", f"{_OURS}moe.experts."
    return (
        rule(f"{one}{gate}.weight", ours + "gate_up.weight[{x},0]"),
        rule(f"{one}{up}.weight", ours + "gate_up.weight[{x},1]"),
        rule(f"{one}{down}.weight", ours + "down.weight[{x}]"),
    )


def stacked(theirs: str) -> tuple[WeightRule, ...]:
    """Returns all experts of a layer in two tensors."""
    both, ours = f"{_LAYER}{theirs}.experts.", f"{_OURS}moe.experts."
    return (
        rule(
            both + "gate_up_proj[{x}]",
            ours + "gate_up.weight[{x},0]",
            ours + "gate_up.weight[{x},1]",
        ),
        rule(both + "down_proj[{x}]", ours + "down.weight[{x}]"),
    )


def router_rule(theirs: str) -> WeightRule:
    """Returns the router's matrix."""
    return rule(f"{_LAYER}{theirs}.gate.weight", f"{_OURS}moe.router.weight")


def shared(theirs: str) -> tuple[WeightRule, ...]:
    """Returns the dense layer beside the experts."""
    name, ours = f"{_LAYER}mlp.{theirs}.", f"{_OURS}moe.shared."
    return (
        rule(name + "gate_proj.weight", ours + "gate_up.weight[0]"),
        rule(name + "up_proj.weight", ours + "gate_up.weight[1]"),
        rule(name + "down_proj.weight", ours + "down.weight"),
    )


NAMED = ("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL = (router_rule("block_sparse_moe"), *experts("block_sparse_moe", "w1", "w3", "w2"))
MIXTRAL_STACKED = stacked("block_sparse_moe")
PLAIN = (router_rule("mlp"), *experts(*NAMED))
STACKED = stacked("mlp")
SHARED_GATE = (
    *shared("shared_expert"),
    rule(f"{_LAYER}mlp.shared_expert_gate.weight", f"{_OURS}moe.shared_gate.weight"),
)
SHARED_BIAS = (
    *shared("shared_experts"),
    rule(f"{_LAYER}mlp.gate.e_score_correction_bias", f"{_OURS}moe.router.bias"),
)

_THEIRS, _ATTENTION = _LAYER + "self_attn.", _OURS + "attention."
LATENT = (  # rotary features are neighbours; keys and values of one head stand together
    rule(_THEIRS + "q_a_proj.weight", _ATTENTION + "q_down.weight"),
    rule(_THEIRS + "q_a_layernorm.weight", _ATTENTION + "q_latent_norm.weight"),
    rule(
        _THEIRS + "kv_a_proj_with_mqa.weight",
        _ATTENTION + "kv_down.weight",
        _ATTENTION + "k_rope.weight",
        pairs=True,
    ),
    rule(_THEIRS + "kv_a_layernorm.weight", _ATTENTION + "kv_latent_norm.weight"),
    rule(
        _THEIRS + "kv_b_proj.weight",
        _ATTENTION + "k_up.weight",
        _ATTENTION + "v_up.weight",
        by_head=True,
    ),
    *(
        rule(_THEIRS + name, _ATTENTION + "q.weight", by_head=True, pairs=True, where=where)
        for name, where in (
            ("q_b_proj.weight", _ATTENTION + "q_down.weight"),  # queries made of a latent
            ("q_proj.weight", f"!{_ATTENTION}q_down.weight"),  # of the hidden state
        )
    ),
)

# The modules of further tokens follow the layers and are counted with them. Embedding and head are
# the model's own, and published folders repeat them there.
_FURTHER = "model.layers.{m}."
FURTHER = (
    rule(_FURTHER + "enorm.weight", "mtp.{d}.embedding_norm.weight"),
    rule(_FURTHER + "hnorm.weight", "mtp.{d}.hidden_norm.weight"),
    rule(_FURTHER + "eh_proj.weight", "mtp.{d}.projection.weight"),
    rule(_FURTHER + "shared_head.norm.weight", "mtp.{d}.norm.weight"),
    rule(_FURTHER + "embed_tokens.weight", "embedding.weight", copy=True),
    rule(_FURTHER + "shared_head.head.weight", "head.weight", copy=True),
)
