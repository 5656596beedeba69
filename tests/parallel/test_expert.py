"""Token dispatch against one process that sees all ranks' tensors, and what a rank holds of the experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megallm.engine.engine import Engine
from megallm.models.config import ModelConfig
from megallm.ops.moe_permute import order_of, permute
from megallm.optim.config import OptimConfig, ZeroConfig
from megallm.parallel import comm
from megallm.parallel.expert import combine_rows, dispatch, gather_over_tp, plan_dispatch, scatter_over_tp
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import config_of
from tests.ranks import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXPERTS, WIDTH = 6, 4
ROWS = (5, 0, 7)  # of each rank; one has nothing to send


def choices(rank: int) -> Tensor:
    """An expert for each row; no row of any rank goes to the experts of rank 1 (2 and 3)."""
    draw = torch.Generator().manual_seed(rank)
    return torch.tensor([0, 1, 4, 5])[torch.randint(4, (ROWS[rank],), generator=draw)]


def numbers(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: exact in every dtype."""
    return torch.randint(-8, 9, (rows, WIDTH), generator=torch.Generator().manual_seed(10 + rank)).to(dtype)


def round_trip(broken: frozenset[str]) -> list[tuple[list[int], Tensor, Tensor]]:
    """Per dtype: rows of each local expert, and output and gradient where expert e multiplies by e + 1."""
    mesh, found = Mesh.start(Layout(tp=3, ep=3), "cpu", broken), []
    for dtype in DTYPES:
        x = numbers(mesh.rank, ROWS[mesh.rank], dtype).requires_grad_()
        order, counts = order_of(choices(mesh.rank)[:, None], EXPERTS)
        plan = plan_dispatch(counts, mesh)
        rows = dispatch(permute(x, order, 1), plan, mesh)
        mine = torch.arange(2 * mesh.rank, 2 * mesh.rank + 2)
        factors = torch.repeat_interleave(mine + 1, torch.tensor(plan.runs.sizes)).to(dtype)
        y = combine_rows(rows * factors[:, None], plan, mesh)
        back = torch.zeros_like(x).index_copy(0, order, y)
        back.backward(numbers(mesh.rank + 5, ROWS[mesh.rank], dtype))
        found.append((list(plan.runs.sizes), back.detach(), x.grad))
    return found


def test_tokens_reach_their_experts_and_come_back():
    everything = torch.cat([choices(rank) for rank in range(3)])
    results = run_ranks(3, round_trip, frozenset())
    for rank, found in enumerate(results):
        for dtype, (sizes, y, grad) in zip(DTYPES, found, strict=True):
            assert sizes == [int((everything == e).sum()) for e in (2 * rank, 2 * rank + 1)]
            factors = (choices(rank) + 1).to(dtype)[:, None]
            assert torch.equal(y, numbers(rank, ROWS[rank], dtype) * factors)
            assert torch.equal(grad, numbers(rank + 5, ROWS[rank], dtype) * factors)
    assert results[1][0][0] == [0, 0], "rank 1 has no work and takes part"


@pytest.mark.parametrize("name", ["moe.dispatch", "moe.combine"])
def test_a_dispatch_that_is_left_out_shows_and_does_not_hang(name):
    results = run_ranks(3, round_trip, frozenset({name}))
    wrong = [not torch.equal(found[0][1], numbers(r, ROWS[r], DTYPES[0]) * (choices(r) + 1)[:, None])
             for r, found in enumerate(results)]  # fmt: skip
    assert any(wrong)


def share_and_collect(count: int, broken: frozenset[str]) -> tuple[Tensor, Tensor, Tensor]:
    mesh = Mesh.start(Layout(tp=3), "cpu", broken)
    x = torch.arange(2.0 * count).view(count, 2).requires_grad_()
    mine = scatter_over_tp(x, mesh)
    y = gather_over_tp(mine * (mesh.tp.rank + 1), count, mesh)
    y.backward(torch.ones_like(y))
    return mine.detach(), y.detach(), x.grad


@pytest.mark.parametrize("count", [1, 6, 7])
def test_tensor_parallel_ranks_share_out_any_number_of_tokens(count):
    each = -(-count // 3)
    x = torch.arange(2.0 * count).view(count, 2)
    factors = torch.repeat_interleave(torch.arange(1.0, 4.0), each)[:count, None]
    for rank, (mine, y, grad) in enumerate(run_ranks(3, share_and_collect, count, frozenset())):
        padded = torch.cat((x, torch.zeros(3 * each - count, 2)))
        assert torch.equal(mine, padded[rank * each : (rank + 1) * each])
        assert torch.equal(y, x * factors) and torch.equal(grad, factors.expand_as(x))
    results = run_ranks(3, share_and_collect, count, frozenset({"moe.enter"}))
    if count > 1:
        assert not all(torch.equal(grad, factors.expand_as(x)) for _, _, grad in results)


def test_one_process_exchanges_nothing():
    x, axis = torch.ones(3, 2), Mesh.single().ep
    assert comm.exchange_rows_fwd_exchange_rows_bwd(x, axis, [3], [3], "moe.dispatch") is x
    assert scatter_over_tp(x, Mesh.single()) is x and torch.equal(gather_over_tp(x, 3, Mesh.single()), x)


# What a rank holds

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=48, vocab_size=64,
    moe={"num_experts": 8, "ffn_hidden_size": 24},
).resolve()  # fmt: skip
EXPERT_ELEMENTS = 2 * 8 * 3 * 32 * 24


def held(layout: Layout, stage: int) -> tuple[int, int, int, int]:
    """Elements of experts: parameters between uses, gradients, master weights; and those this rank owns."""
    options = ZeroConfig(stage)
    config = config_of(MODEL, OptimConfig(), precision="bf16", zero=options)
    engine = Engine.build(config, Mesh.start(layout))
    engine.parameters.reshard()
    flat = [bucket for bucket in engine.parameters.flat if bucket.plan.expert]
    params = sum(max(b.params.untyped_storage().nbytes() // 2, len(b.weights) if b.frees_params else 0) for b in flat)
    owned = sum(part.tensor.numel() for part in engine.parts() if part.name.startswith("layers") and "exp" in part.name)
    return params, sum(b.grads.numel() for b in flat), sum(b.master.numel() for b in flat), owned


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_holds_its_experts_over_ep_and_their_state_over_edp(stage):
    """dp=2, tp=2, ep=2: a rank has half of the experts, and from the ZeRO stage on half of that."""
    results = run_ranks(4, held, Layout(dp=2, tp=2, ep=2), stage)
    half, quarter = EXPERT_ELEMENTS // 2, EXPERT_ELEMENTS // 4
    for params, grads, master, _ in results:
        assert params == (quarter if stage == 3 else half)
        assert grads == (quarter if stage >= 2 else half) and master == (quarter if stage >= 1 else half)
    assert sum(owned for *_, owned in results) == EXPERT_ELEMENTS, "each element is saved by one rank"
