"""Families with experts: logits equal to transformers for random sizes, and every bit kept through any layout."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megallm.convert import convert
from megallm.convert.convert import ConvertRequest
from tests.convert.test_convert_parity import assert_same_bits
from tests.convert.tiny import THETA, Case, make


def mixtral(draw: random.Random) -> dict[str, Any]:
    experts = draw.choice([2, 3, 8])
    return {"num_local_experts": experts, "num_experts_per_tok": draw.randint(1, experts)} | {
        "sliding_window": draw.choice([None, 7]), "head_dim": draw.choice([None, 6]),
    }  # fmt: skip


def qwen(draw: random.Random) -> dict[str, Any]:
    experts = draw.choice([2, 5, 8])
    layers = draw.randint(2, 5)
    step = draw.choice([1, 1, 2]) if layers > 2 else 1
    dense = list(range(draw.randint(0, layers - 2))) if step == 1 else []
    return {
        "num_experts": experts, "num_experts_per_tok": draw.randint(1, experts), "num_hidden_layers": layers,
        "moe_intermediate_size": draw.choice([8, 20]), "norm_topk_prob": draw.random() < 0.5,
        "decoder_sparse_step": step, "mlp_only_layers": dense, "rope_parameters": THETA,
    }  # fmt: skip


def qwen2_moe(draw: random.Random) -> dict[str, Any]:
    return qwen(draw) | {"shared_expert_intermediate_size": draw.choice([8, 24])}


def qwen3_moe(draw: random.Random) -> dict[str, Any]:
    return qwen(draw) | {"head_dim": draw.choice([8, 16]), "tie_word_embeddings": draw.random() < 0.3}


def olmoe(draw: random.Random) -> dict[str, Any]:
    experts = draw.choice([2, 5, 8])
    return {"num_experts": experts, "num_experts_per_tok": draw.randint(1, experts)} | {
        "norm_topk_prob": draw.random() < 0.5, "tie_word_embeddings": draw.random() < 0.5,
    }  # fmt: skip


def deepseek(draw: random.Random) -> dict[str, Any]:
    groups = draw.choice([1, 2, 3])
    top_groups = draw.randint(1, groups)
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    if draw.random() < 0.5:
        rope = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                "mscale": 1.0, "mscale_all_dim": draw.choice([0.7, 1.0])}  # fmt: skip
    layers = draw.randint(2, 3)
    return {
        "num_key_value_heads": None, "num_hidden_layers": layers,
        "first_k_dense_replace": draw.randint(0, layers - 1),
        "n_routed_experts": 4 * groups, "num_experts_per_tok": draw.randint(1, 4 * top_groups), "n_group": groups,
        "topk_group": top_groups, "n_shared_experts": draw.choice([1, 2]),
        "moe_intermediate_size": draw.choice([8, 20]),
        "norm_topk_prob": draw.random() < 0.7, "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "kv_lora_rank": draw.choice([12, 16]), "q_lora_rank": draw.choice([None, 20]),
        "qk_rope_head_dim": draw.choice([4, 8]), "qk_nope_head_dim": draw.choice([6, 8]),
        "v_head_dim": draw.choice([6, 10]), "rope_parameters": rope, "rms_norm_eps": draw.choice([1e-6, 0.1]),
    }  # fmt: skip


FAMILIES = {"Mixtral": mixtral, "Qwen2Moe": qwen2_moe, "Qwen3Moe": qwen3_moe, "Olmoe": olmoe, "DeepseekV3": deepseek}


def drawn(family: str, seed: int) -> Case:
    """A random tiny model of the family."""
    draw = random.Random(f"{family} {seed}")
    heads = draw.choice([4, 6])
    sizes = {
        "vocab_size": draw.randint(40, 90), "hidden_size": heads * draw.choice([4, 8]), "intermediate_size": 40,
        "num_hidden_layers": draw.randint(2, 3), "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2, heads]), "max_position_embeddings": 64,
    }  # fmt: skip
    return Case(f"{family}-{seed}", f"{family}Config", sizes | FAMILIES[family](draw))


CASES = [drawn(family, seed) for family in FAMILIES for seed in range(6 if family == "DeepseekV3" else 4)]


@pytest.mark.parametrize("wanted", CASES, ids=lambda one: one.name)
def test_logits_and_round_trip(wanted, tmp_path):
    original = make(tmp_path / "hf", wanted)
    done = convert.run(ConvertRequest("megallm", str(original), str(tmp_path / "ours"), verify=True))
    assert done["max_rel_error"] == done["max_rel_error_everywhere"] <= 1e-5 and done["left_out"] == 0
    done = convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back"), verify=True))
    assert done["max_rel_error"] <= 1e-5 and not done["notes"][1:]
    assert_same_bits(original, tmp_path / "back")
