"""A frozen parameter costs its weights and nothing else, at every ZeRO stage, and may be thawed later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.sections import MoeConfig
from megallm.ops.low_precision import Fp8Options
from megallm.optim.config import GroupConfig, OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import MODEL, batches, config_of, share
from tests.optim.test_zero import live_bytes, whole_weights
from tests.ranks import run_ranks

WIDE = replace(MODEL, hidden_size=32, ffn_hidden_size=32, head_size=8)
BLOCKS = (GroupConfig("layers.*", frozen=True),)


def engine_of(mesh: Mesh, groups=(), stage: int = 0, precision: str = "bf16", prepare=None) -> Engine:
    optim = OptimConfig(clip=1.0, groups=tuple(groups))
    config = config_of(MODEL, optim, zero=stage, precision=precision)
    return Engine.build(config, mesh, prepare)


def used_bytes(layout: Layout, stage: int, everything: bool) -> tuple[int, int, bool]:
    """Bytes that live between uses, elements of all buckets, and whether frozen weights stayed as they were."""
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, (GroupConfig("*", frozen=True),) if everything else BLOCKS, stage)
    before = whole_weights(engine)
    engine.parameters.reshard()
    engine.train_step(share(batches(2), mesh), NextToken(), 0.1) if not everything else None
    held = live_bytes(engine)
    after = whole_weights(engine)
    same = all(torch.equal(x, after[name]) for name, x in before.items() if name.startswith("layers."))
    moved = everything or not torch.equal(before["embedding.weight"], after["embedding.weight"])
    return held, sum(bucket.plan.numel for bucket in engine.parameters.flat), same and moved


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_model_takes_two_bytes_a_parameter_in_bf16(stage):
    """18 before: gradient, master and two moments were kept for nothing."""
    for held, numel, same in run_ranks(2, used_bytes, Layout(dp=2), stage, True):
        assert held == (2 * numel if stage < 3 else 2 * numel // 2)
        assert same


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_blocks_stay_as_they_are_while_the_embedding_moves(stage):
    assert all(same for _, _, same in run_ranks(2, used_bytes, Layout(dp=2), stage, False))


def test_prepare_freezes_before_buckets_are_planned():
    def prepare(stage: torch.nn.Module) -> None:
        for name, param in stage.named_parameters():
            assert param.device.type == "meta"
            param.requires_grad_(not name.startswith("layers."))

    engine = engine_of(Mesh.single(), prepare=prepare)
    by_group = engine_of(Mesh.single(), BLOCKS)
    assert live_bytes(engine) == live_bytes(by_group) < live_bytes(engine_of(Mesh.single()))
    params = engine.parameters.params
    assert {name for name, param in params.items() if not param.requires_grad} == {n for n in params if "layers." in n}


def test_frozen_weights_start_with_the_bits_of_trained_ones():
    """By way of fp32, as a master's weights do."""
    frozen = whole_weights(engine_of(Mesh.single(), (GroupConfig("*", frozen=True),)))
    trained = whole_weights(engine_of(Mesh.single()))
    assert all(torch.equal(x, trained[name]) for name, x in frozen.items())


def state_of(folder: Path) -> dict[str, Tensor]:
    with CheckpointReader(store.latest(folder)[0]) as reader:
        return {name: reader.read(name) for name in reader.names()}


def test_what_was_frozen_has_no_optimizer_state_in_a_checkpoint_and_may_be_thawed(tmp_path):
    mesh = Mesh.single()
    engine = engine_of(mesh, BLOCKS)
    engine.train_step(batches(2), NextToken(), 0.1)
    store.save(tmp_path, 1, list(engine.parts()), {"engine": engine.counters()}, mesh)
    saved = state_of(tmp_path)
    assert "layers.0.mlp.down.weight" in saved and "optim.master.embedding.weight" in saved
    assert not any(name.startswith("optim.") and ".layers." in name for name in saved)
    thawed = engine_of(mesh)
    with CheckpointReader(store.latest(tmp_path)[0]) as reader:
        thawed.load(reader)
    state = {part.name: part.tensor for part in thawed.parts()}
    name = "layers.0.mlp.down.weight"
    assert torch.equal(state[name], saved[name]) and torch.equal(state[f"optim.master.{name}"], saved[name].float())
    assert not state[f"optim.exp_avg.{name}"].any() and state["optim.exp_avg.embedding.weight"].any()
    thawed.train_step(batches(2), NextToken(), 0.1)
    assert not torch.equal(dict(thawed.parameters.views)[name], saved[name])


def test_what_was_frozen_as_a_whole_may_be_thawed(tmp_path):
    mesh = Mesh.single()
    engine = engine_of(mesh, (GroupConfig("*", frozen=True),))
    engine.train_step(batches(2), NextToken(), 0.1)
    store.save(tmp_path, 1, list(engine.parts()), {"engine": engine.counters()}, mesh)
    thawed, name = engine_of(mesh), "layers.0.mlp.down.weight"
    with CheckpointReader(store.latest(tmp_path)[0]) as reader:
        thawed.load(reader)
    state = {part.name: part.tensor for part in thawed.parts()}
    assert torch.equal(state[f"optim.master.{name}"], state_of(tmp_path)[name].float())


def kept_numbers(engine: Engine) -> int:
    """Elements that autograd keeps of one microbatch, views and weights included."""
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_step(batches(1), NextToken(), 0.0)
    return sum(kept)


@pytest.mark.parametrize("kind", ["experts", "tensorwise", "rowwise"])
def test_frozen_matrices_keep_no_inputs_for_gradients_that_nobody_wants(kind):
    moe = MoeConfig(num_experts=4, ffn_hidden_size=64)
    fp8 = None if kind == "experts" else Fp8Options(kind)
    precision = {"precision": "bf16"} if fp8 is None else {"precision": "fp8", "fp8": fp8}
    model = replace(MODEL, moe=moe) if fp8 is None else WIDE
    pattern = "*.experts.*" if fp8 is None else "*.mlp.*"
    group = GroupConfig(pattern, frozen=True)
    base = config_of(model.resolve(), OptimConfig(), **precision)
    frozen = replace(base, optim=OptimConfig(groups=(group,)))
    trained = kept_numbers(Engine.build(base, Mesh.single()))
    assert kept_numbers(Engine.build(frozen, Mesh.single())) < trained
