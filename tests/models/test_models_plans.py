"""Pure plans of the model: which heads a rank computes, which layers a stage holds, which weights it starts with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine import engine as engine_module
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.models.attention import HeadPlan
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.stages import plan_stages
from megallm.oracle.table import MODELS, TINY
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Box, Shard
from tests.ranks import run_ranks


def all_plans():
    for heads in range(1, 33):
        for kv in (k for k in range(1, heads + 1) if heads % k == 0):
            for tp in (t for t in range(1, heads + 1) if heads % t == 0):
                yield heads, kv, tp, [HeadPlan.of(heads, kv, tp, rank) for rank in range(tp)]


def reads(plan: HeadPlan, local_q: int) -> int:
    """The kv head that a local query head reads, by the pairing or by even groups in order."""
    local = plan.pairing[local_q] if plan.pairing is not None else local_q // (plan.num_q // plan.num_kv)
    return plan.kv_begin + local


def test_every_query_head_reads_its_kv_head_and_no_rank_projects_more_than_it_needs():
    seen = set()
    for heads, kv, tp, plans in all_plans():
        group = heads // kv
        for rank, plan in enumerate(plans):
            wanted = [(rank * plan.num_q + i) // group for i in range(plan.num_q)]
            assert [reads(plan, i) for i in range(plan.num_q)] == wanted, (heads, kv, tp, rank)
            assert {plan.kv_begin + i for i in range(plan.num_kv)} == set(wanted), "minimal and without holes"
            assert plan.replicated == (kv % tp != 0)
            if plan.pairing is None:
                assert plan.num_q % plan.num_kv == 0
            seen.add((plan.replicated, plan.pairing is None))
        assert sum(plan.num_q for plan in plans) == heads
        if not plans[0].replicated:
            assert [plan.kv_begin for plan in plans] == [rank * kv // tp for rank in range(tp)], "pieces of dim 1"
    assert seen == {(False, True), (True, True), (True, False)}, "the grid has every case"


def test_stages_hold_every_layer_once_as_evenly_as_it_goes():
    for layers in range(1, 41):
        for pp in range(1, layers + 1):
            spans = plan_stages(layers, pp)
            assert [n for span in spans for n in range(span.begin, span.end)] == list(range(layers))
            sizes = [span.end - span.begin for span in spans]
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
            assert [span.first for span in spans] == [True] + [False] * (pp - 1)
            assert [span.last for span in spans] == [False] * (pp - 1) + [True]
    with pytest.raises(UsageError, match="3 pipeline stages need at least 3 layers; the model has 2"):
        plan_stages(2, 3)


# --- the same initial weights at every layout ----------------------------------------------------------------------

Held = dict[str, tuple[Box, Tensor]]


def initial_pieces(config: ModelConfig, layout: Layout, sp: bool, precision: str) -> Held:
    """What this rank holds after the engine was built."""
    built = EngineConfig(config, LayoutConfig(sp=sp), compute=ComputeConfig(precision), seed=11)
    engine = Engine.build(built, Mesh.start(layout))
    coords = engine.mesh.coords
    boxes = {name: shard.box(layout, coords) for name, shard in engine.parameters.shards.items()}
    return {name: (boxes[name], view.detach().clone()) for name, view in engine.parameters.views.items()}


def differences(whole: Held, ranks: list[Held]) -> list[str]:
    """Names whose pieces are not, bit for bit, slices of the whole, or which nobody holds."""
    held = {name for pieces in ranks for name in pieces}
    wrong = set(whole) ^ held
    for pieces in ranks:
        wrong |= {name for name, (box, x) in pieces.items() if not torch.equal(x, whole[name][1][box.slices()])}
    return sorted(wrong)


@pytest.mark.parametrize(
    ("model", "layout", "sp", "precision"),
    [
        ("three-groups", Layout(tp=2), True, "fp32"),
        ("gpt2", Layout(pp=2, tp=2), False, "bf16"),
        ("tied", Layout(pp=2, dp=2), False, "fp64"),
        ("one-kv", Layout(dp=2, tp=2), True, "fp32"),
    ],
)
def test_initial_weights_are_the_same_at_every_layout(model, layout, sp, precision):
    config = ModelConfig(**(TINY | MODELS[model])).resolve()
    whole = initial_pieces(config, Layout(), False, precision)
    assert not differences(whole, run_ranks(layout.world, initial_pieces, config, layout, sp, precision))
    other = initial_pieces(replace(config, init_std=0.1), Layout(), False, precision)
    assert differences(other, [whole]), "another start is noticed"


def by_rank(name: str, shard: Shard, offset: tuple[int, ...], shape: tuple[int, ...], seed: int) -> Tensor:
    """A start drawn piece by piece, as a generator that lives on the rank would."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def initial_pieces_by_rank(config: ModelConfig, layout: Layout) -> Held:
    original = engine_module.initial_values
    engine_module.initial_values = by_rank
    try:
        return initial_pieces(config, layout, False, "fp32")
    finally:
        engine_module.initial_values = original


def test_a_start_drawn_piece_by_piece_is_noticed():
    config = ModelConfig(**TINY).resolve()
    whole = initial_pieces_by_rank(config, Layout())
    assert differences(whole, run_ranks(2, initial_pieces_by_rank, config, Layout(tp=2)))
