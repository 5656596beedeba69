"""Tensors of the family that most others are made like. Pure."""

from __future__ import annotations

from megallm.convert.rules import rule

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
