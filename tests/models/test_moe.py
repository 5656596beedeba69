"""Mixture of experts: selection against its definition, capacities, idle experts, counts, and transformers' blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.balance import RoutingInputs, within_capacity
from megallm.models.build import place_parameters
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.moe import Moe
from megallm.models.router import select_experts
from megallm.models.sections import MoeConfig
from megallm.models.stages import StageSpan
from megallm.ops.low_precision import LossScaleOptions
from megallm.optim.config import OptimConfig
from megallm.parallel.config import LayoutConfig
from megallm.parallel.context import Context
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards
from tests.engine.tiny import batches, config_of, share
from tests.ranks import run_ranks

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 40, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 61,
    "max_positions": 64, "init_std": 0.1,
}  # fmt: skip


def model_of(**moe: Any) -> ModelConfig:
    return ModelConfig(**SIZES, moe={"num_experts": 4, "ffn_hidden_size": 12} | moe).resolve()


def engine_config(model: ModelConfig, **changes: Any) -> EngineConfig:
    return config_of(model, **{"optim": OptimConfig(clip=0.0)} | changes)


# The configuration


@pytest.mark.parametrize(
    "moe",
    [
        {}, {"shared_ffn_hidden_size": 6, "shared_gate": True}, {"first_dense": 1}, {"every": 2}, {"num_experts": 0},
        {"num_experts": 6, "num_groups": 3, "top_groups": 2, "selection_bias": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_counts_equal_the_built_model(moe, activation):
    config = dataclasses.replace(model_of(**moe), activation=activation).resolve()
    stage = Stage(config, Mesh.single("meta"), StageSpan(0, config.num_layers, True, True))
    built = {name: parameter.numel() for name, parameter, _ in named_shards(stage)}
    assert config.num_params() == sum(built.values())
    idle = (config.moe.num_experts - config.moe.top_k) / max(config.moe.num_experts, 1)
    experts = sum(count for name, count in built.items() if ".experts." in name)
    assert config.num_params(active=True) == sum(built.values()) - experts * idle
    assert set(config.state_shapes()) == {
        f"layers.{n}.moe.router.bias" for n in range(2) if config.moe.selection_bias and config.moe.has_experts(n)
    }


def test_mixtral_counts_are_the_published_ones():
    config = ModelConfig(preset="mistral-7b", moe={"num_experts": 8}).resolve()
    assert config.num_params() / 1e9 == pytest.approx(46.7, abs=0.05)
    assert config.num_params(active=True) / 1e9 == pytest.approx(12.88, abs=0.05)


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"top_k": 5}, "top_k is 5; it must be from 1 to num_experts 4"),
        ({"num_groups": 3}, "num_groups is 3; it must be a divisor of num_experts 4"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups is 3; it must be from 1 to num_groups 2"),
        ({"num_groups": 4, "top_groups": 1}, "top_k 2 is more than the experts of model.moe.top_groups 1"),
        ({"capacity": 0.0}, "capacity is 0.0; it must be greater than 0"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(moe, said):
    with pytest.raises(UsageError, match=said):
        model_of(**moe)


def test_biases_are_refused():
    with pytest.raises(UsageError, match="model.bias is true, which is of dense layers"):
        ModelConfig(**SIZES, bias=True, moe={"num_experts": 4}).resolve()


# Selection


def test_the_bias_moves_the_choice_and_not_the_weights():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    moe = model_of(top_k=1, selection_bias=True).moe
    assert select_experts(scores, None, moe).tolist() == [[0]]
    assert select_experts(scores, torch.tensor([0.0, 0.0, 0.0, 0.5]), moe).tolist() == [[3]]


def test_groups_limit_the_choice():
    """The best two are in different groups; one group may be taken, the one with the best member or the best pair."""
    scores = torch.tensor([[0.9, 0.0, 0.1, 0.6, 0.5, 0.2]])
    moe = model_of(num_experts=6, num_groups=3, top_groups=1).moe
    assert set(select_experts(scores, None, moe)[0].tolist()) == {0, 1}, "by the best"
    assert set(select_experts(scores * 0, torch.tensor([0.4, 0.0, 0.1, 0.2, 0.3, 0.2]), moe)[0].tolist()) == {4, 5}, (
        "by pairs"
    )


# Capacity


def seats_of(mask: Tensor) -> RoutingInputs:
    return RoutingInputs.of({"mask": mask}, Context(Mesh.single(), LayoutConfig(), 4), Mesh.single(), False)


@pytest.mark.parametrize("drop", ["score", "position"])
def test_no_expert_keeps_more_than_its_capacity_of_a_sequence(drop):
    draw = torch.Generator().manual_seed(1)
    rows, length = 3, 10
    moe = MoeConfig(num_experts=4, top_k=2, capacity=0.7, drop=drop)
    all_scores = torch.rand(rows * length, 4, generator=draw)
    scores, experts = all_scores.topk(2, -1)
    keep = within_capacity(experts, scores, seats_of(torch.ones(rows, length, dtype=torch.bool)), moe, Mesh.single())
    most, dropped = 4, 0  # ceil(0.7 * 10 * 2 / 4)
    for row in range(rows):
        for e in range(4):
            chose = [(i, j) for i in range(row * length, (row + 1) * length) for j in (0, 1) if experts[i, j] == e]
            chose.sort(key=lambda at: -scores[at] if drop == "score" else at[0])
            assert {at for at in chose if keep[at]} == set(chose[:most])
            dropped += len(chose[most:])
    assert dropped > 0, "otherwise nothing was tested"


def test_a_dropped_copy_adds_nothing_and_is_reported():
    engine = Engine.build(engine_config(model_of(capacity=0.5)), Mesh.single())
    metrics = engine.train_step(batches(2), NextToken(), 1e-3).metrics
    assert metrics["moe/dropped_fraction"] > 0.1 and metrics["moe/load_balance"] >= 1
    mesh = Mesh.single()
    moe = Moe(model_of(capacity=1e-9, top_k=1), mesh, False, False)
    place_parameters(moe, {name: torch.randn(p.shape, dtype=torch.float64) for name, p, _ in named_shards(moe)})
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    y = moe(x, seats_of(torch.ones(1, 6, dtype=torch.bool)))
    used = (y != 0).any(-1).sum()
    assert 1 <= used <= 4 and moe(x).ne(0).any(-1).all(), "one token an expert; decoding drops nothing"


# Routing that leaves experts idle


def prefer_expert_0(engine: Engine, by: float) -> None:
    for _, bias in engine.model.selection_biases():
        bias[0] = by


def train_idle(layout: Layout, config: EngineConfig) -> tuple[dict[str, float], dict[str, float]]:
    """One step with all tokens on expert 0; this rank's gradient of each expert piece, and the metrics."""
    mesh = Mesh.start(layout)
    engine = Engine.build(config, mesh)
    prefer_expert_0(engine, 10.0)
    stats = engine.train_step(share(batches(4), mesh), NextToken(), 0.0)
    found: dict[str, float] = {}
    for name, _, box, grad in engine.gradients():
        if ".experts." in name:
            for e in range(box.shape[0]):
                key = f"{name}[{box.offset[0] + e}]"
                found[key] = max(found.get(key, 0.0), float(grad[e].abs().max()))
    return found, stats.metrics


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_experts_that_no_token_chose_hang_no_rank(stage, schedule):
    """ep = 2 over dp: rank 1's experts are idle, and its edp group still reduces as often as rank 0's."""
    model = model_of(top_k=1, aux_coef=0.0, selection_bias=True)
    config = engine_config(model, zero=stage, schedule=schedule)
    layout = Layout(dp=2, tp=2, ep=2) if schedule == "1f1b" else Layout(pp=2, dp=2, ep=2)
    results = run_ranks(layout.world, train_idle, layout, config, timeout=60)
    for found, metrics in results:
        assert metrics["moe/load_balance"] == 4.0
        for name, largest in found.items():
            assert (largest > 0) == name.endswith("[0]"), f"{name}: {largest}"
    assert any(name.endswith("[3]") for found, _ in results for name in found), "idle experts have a gradient too"


# What is reported


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_reports_router_losses_once(mode):
    stats = {}
    for recompute in ("none", mode):
        engine = Engine.build(engine_config(model_of(z_coef=0.1), recompute=recompute), Mesh.single())
        stats[recompute] = engine.train_step(batches(3), NextToken(), 1e-3)
    assert stats["none"].losses == pytest.approx(stats[mode].losses, rel=1e-12)
    assert stats["none"].metrics == pytest.approx(stats[mode].metrics, rel=1e-12)
    assert stats["none"].losses["moe_balance"] > 0


def test_evaluation_has_no_router_losses():
    engine = Engine.build(engine_config(model_of()), Mesh.single())
    sums, _ = engine.evaluate(batches(2), NextToken())
    assert sums.keys() == {"loss"}


def test_a_step_that_is_skipped_leaves_the_selection_bias():
    engine = Engine.build(engine_config(model_of(selection_bias=True)), Mesh.single())
    for name, _, _, tensor in engine.masters():
        if name == "layers.0.attention.q.weight":
            tensor.fill_(float("nan"))
    engine.parameters.publish()
    assert engine.train_step(batches(1), NextToken(), 1e-3).skipped
    assert all(not bias.any() for _, bias in engine.model.selection_biases())


def test_the_selection_bias_evens_out_the_load():
    """Without a balancing loss and with weights that stay, the bias alone brings a lopsided choice near the mean."""
    engine = Engine.build(engine_config(model_of(selection_bias=True, bias_rate=0.02, aux_coef=0.0)), Mesh.single())
    prefer_expert_0(engine, 0.5)
    seen = [engine.train_step(batches(2, seed=0), NextToken(), 0.0).metrics["moe/load_balance"] for _ in range(50)]
    assert seen[0] == pytest.approx(2.0), "every token takes expert 0 as one of its two"
    assert sum(seen[-5:]) / 5 < 1.3, seen


def router_gradients(scale: float, broken: bool = False) -> dict[str, Tensor]:
    """Gradients of the routers of one fp16 step at a loss scale, with a strong balancing loss."""
    config = engine_config(
        model_of(aux_coef=5.0),
        precision="fp16",
        loss_scale=LossScaleOptions(initial=scale),
        optim=OptimConfig(clip=0.0),
    )
    engine = Engine.build(config, Mesh.single())
    if broken:
        begin = engine.model.routers.begin
        engine.model.routers.begin = lambda batches, factor: begin(batches)
    engine.train_step(batches(2), NextToken(), 0.0)
    return {name: grad.double() for name, _, _, grad in engine.gradients() if name.endswith("router.weight")}


def test_router_losses_are_scaled_with_the_loss_in_fp16():
    """The gradient is the same at any loss scale; it would not be if the router losses were left as they are."""
    expected = router_gradients(16.0)
    for name, grad in router_gradients(1024.0).items():
        assert (grad - expected[name]).abs().max() <= 0.02 * expected[name].abs().max()
    wrong = router_gradients(1024.0, broken=True)
    assert any((wrong[name] - x).abs().max() > 0.2 * x.abs().max() for name, x in expected.items())


# transformers' blocks


def theirs(name: str, hidden: int) -> tuple[Any, dict[str, Any]]:
    """transformers' block with random weights, and our settings for it."""
    import transformers
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen

    torch.manual_seed(0)
    if name == "mixtral":
        config = transformers.MixtralConfig(hidden_size=hidden, intermediate_size=12, num_local_experts=4)
        return mixtral.MixtralSparseMoeBlock(config), {}
    if name == "qwen":
        config = transformers.Qwen2MoeConfig(
            hidden_size=hidden, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2,
            shared_expert_intermediate_size=8, norm_topk_prob=False,
        )  # fmt: skip
        return qwen.Qwen2MoeSparseMoeBlock(config), {
            "norm_topk_prob": False, "shared_ffn_hidden_size": 8, "shared_gate": True
        }  # fmt: skip
    config = transformers.DeepseekV3Config(
        hidden_size=hidden, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
        topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    return deepseek.DeepseekV3MoE(config), {
        "num_experts": 8, "top_k": 3, "num_groups": 4, "top_groups": 2, "shared_ffn_hidden_size": 24,
        "score": "sigmoid", "routed_scale": 2.5, "selection_bias": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral", "qwen", "deepseek"])
def test_the_layer_equals_that_of_transformers(name):
    block, settings = theirs(name, 24)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = Moe(model_of(**settings), Mesh.single(), False, False)
    weights = {}
    for ours_name, parameter, _ in named_shards(ours):
        weights[ours_name] = _their_weight(block, ours_name).reshape(parameter.shape).detach().clone()
    place_parameters(ours, weights)
    if name == "deepseek":
        bias = torch.rand(8) * 0.3
        block.gate.e_score_correction_bias.copy_(bias)
        ours.router.stats.bias.copy_(bias)
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        expected, found = block(x), ours(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _their_weight(block: Any, name: str) -> Tensor:
    """Our tensor from their block; fused gate and up have ours' memory order."""
    shared = "shared_expert" if "shared_expert" in dict(block.named_children()) else "shared_experts"
    got = dict(block.named_parameters())
    simple = {
        "router.weight": "gate.weight", "experts.gate_up.weight": "experts.gate_up_proj",
        "experts.down.weight": "experts.down_proj", "shared.down.weight": f"{shared}.down_proj.weight",
        "shared_gate.weight": "shared_expert_gate.weight",
    }  # fmt: skip
    if name == "shared.gate_up.weight":
        return torch.stack((got[f"{shared}.gate_proj.weight"], got[f"{shared}.up_proj.weight"]))
    return got[simple[name]]
