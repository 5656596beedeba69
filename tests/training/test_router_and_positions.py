"""Issue R, A.8: a router that nothing teaches, and rows longer than the model says it can read, are refused."""

from __future__ import annotations

import dataclasses

import pytest

from megallm.base.config import replace
from megallm.base.errors import UsageError
from megallm.convert.upcycle import UpcycleRequest, with_experts
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig, SegmentConfig
from megallm.training.validate import check, find_problems
from tests.models.test_moe import batches, engine_config, model_of

SIZES = {"model.family": "llama", "model.num_layers": 2, "model.hidden_size": 32, "model.ffn_hidden_size": 48,
         "model.num_heads": 4, "model.vocab_size": 64, "data.sources": {"d": 1.0}, "data.seq_len": 32,
         "train.steps": 10, "optim.warmup_steps": 0}  # fmt: skip
EXPERTS = {"model.moe.num_experts": 4, "model.moe.top_k": 1}


def config(**more) -> PretrainConfig:
    return replace(PretrainConfig(), SIZES | more)


REFUSED = {
    "a family that normalises": EXPERTS | {"model.family": "mixtral"},
    "by default": EXPERTS,
    "with sigmoid scores and a selection bias": EXPERTS
    | {"model.moe.score": "sigmoid", "model.moe.norm_topk_prob": True, "model.moe.selection_bias": True},
    "with a balancing loss": EXPERTS | {"model.moe.norm_topk_prob": True, "model.moe.aux_coef": 0.1},
    "in groups of one": EXPERTS | {"model.moe.num_groups": 4, "model.moe.top_groups": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_expert_with_normalised_probabilities_is_refused(name):
    given = config(**REFUSED[name])
    (problem,) = [each for each in find_problems(given, None) if each.rule == "router"]
    assert "gets no gradient" in problem.sentence and "model.moe.norm_topk_prob=false" in str(problem)
    for fix in problem.fixes:
        assert not [each for each in find_problems(replace(given, fix), None) if each.rule in ("router", "model")]
    assert ({"model.moe.top_k": 2} in problem.fixes) == (name != "in groups of one")
    with pytest.raises(UsageError, match="gets no gradient"):
        check(given)


@pytest.mark.parametrize(
    "moe",
    [
        {"model.moe.num_experts": 4, "model.moe.top_k": 2},
        EXPERTS | {"model.moe.norm_topk_prob": False},
        EXPERTS | {"model.family": "qwen2_moe"},  # which does not normalise
        {"model.moe.num_experts": 1, "model.moe.top_k": 1},  # nothing to choose
        {},
    ],
)
def test_the_others_are_not(moe):
    assert not [each for each in find_problems(config(**moe), None) if each.rule == "router"]


@pytest.mark.parametrize("top_k, normed, taught", [(1, True, False), (1, False, True), (2, True, True)])
def test_the_rule_is_true_of_the_router(top_k, normed, taught):
    """The control: the loss's gradient with respect to the router's weight."""
    model = model_of(top_k=top_k, norm_topk_prob=normed, aux_coef=0.0)
    engine = Engine.build(engine_config(model), Mesh.single())
    engine.train_step(batches(2), NextToken(), 0.0)
    largest = max(float(grad.abs().max()) for name, *_, grad in engine.gradients() if name.endswith("router.weight"))
    assert (largest > 1e-9) == taught


def test_upcycling_refuses_it_too():
    dense = ModelConfig(family="llama", num_layers=2, hidden_size=32, num_heads=4, vocab_size=64).resolve()
    for experts in (2, 8):
        with pytest.raises(UsageError, match="--top-k 1.*no gradient"):
            with_experts(dense, UpcycleRequest("a", "b", experts, top_k=1))
    assert with_experts(dense, UpcycleRequest("a", "b", 1, top_k=1)).moe.num_experts == 1
    assert with_experts(dense, UpcycleRequest("a", "b", 2)).moe.top_k == 2


# Positions.


@pytest.mark.parametrize(
    "more, wanted",
    [
        ({"model.max_positions": 16}, "data.seq_len 32 is greater than model.max_positions 16"),
        ({"data.seq_len": 8192}, "data.seq_len 8192 is greater than model.max_positions 4096"),
        ({"model.family": "gpt2", "model.max_positions": 16}, "one learned vector per position"),
        ({"model.max_positions": 16, "model.rope_scaling": "linear", "model.rope_factor": 2.0}, ".max_positions=32"),
        ({"data.segments": (SegmentConfig(until_tokens=500), SegmentConfig(seq_len=8192))},
         "data.segments[1].seq_len 8192 is greater than model.max_positions 4096"),
    ],
)  # fmt: skip
def test_rows_beyond_max_positions_are_refused_with_a_way_out(more, wanted):
    given = config(**more)
    (problem,) = [each for each in find_problems(given, None) if each.rule == "positions"]
    assert wanted in str(problem) and problem.fixes
    for fix in problem.fixes:
        assert not [each for each in find_problems(replace(given, fix), None) if each.rule == "positions"]


def test_a_row_of_just_that_length_passes_and_so_does_a_model_made_to_grow():
    for more in (
        {"data.seq_len": 4096},
        {"data.seq_len": 64, "model.max_positions": 16, "model.rope_scaling": "dynamic", "model.rope_factor": 4.0,
         "model.rope_positions": 16},
    ):  # fmt: skip
        assert not [each for each in find_problems(config(**more), None) if each.rule in ("positions", "model")]
    assert dataclasses.is_dataclass(check(config()))


def test_the_advice_about_groups_of_one_is_not_refused_in_its_turn():
    """One expert a token is what a group of one allows, and its weight must not be scaled to 1 then."""
    wrong = config(**EXPERTS | {"model.moe.top_k": 2, "model.moe.num_groups": 4, "model.moe.top_groups": 1})
    (problem,) = find_problems(wrong, 1)
    for fix in problem.fixes:
        assert find_problems(replace(wrong, fix), 1) == [], fix
