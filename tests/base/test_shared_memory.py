"""Collectives over shared memory against plain sums of everybody's tensors, and what happens when a peer is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base import extension, shared_memory
from megallm.base.errors import InternalError, UsageError
from megallm.launch.environment import uses_shared_memory
from megallm.launch.rank import hung_up, lost_peer
from tests.base import lost_peers
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(extension.collectives() is None, reason="megallm._collectives is not built")

ROOT = Path(__file__).parents[2]
SIZES = (0, 1, 7, 1000, 5003, 200_001)  # in one slot and over several steps
OPS = {
    "SUM": lambda rows: rows.sum(0), "MAX": lambda rows: rows.amax(0), "MIN": lambda rows: rows.amin(0),
    "PRODUCT": lambda rows: rows.prod(0), "AVG": lambda rows: rows.sum(0) / len(rows),
}  # fmt: skip
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FOUR = pytest.mark.parametrize("n", [2, 3, 4])


def numbers(dtype: torch.dtype, size: int, rank: int, seed: int = 0) -> Tensor:
    """Whole numbers, so that sums are exact in each dtype."""
    random = torch.Generator().manual_seed(1000 * seed + rank)
    low, high = (0, 2) if dtype == torch.bool else (0, 4) if dtype == torch.uint8 else (-3, 4)
    return torch.randint(low, high, (size,), generator=random).to(dtype)


def reduced(dtype: torch.dtype, op: str, rows: list[Tensor]) -> Tensor:
    """The plain sum; of truths whether any, or all, hold."""
    if dtype == torch.bool:
        return torch.stack(rows).all(0) if op in ("MIN", "PRODUCT") else torch.stack(rows).any(0)
    wide = torch.stack(rows).to(torch.float64 if dtype.is_floating_point else torch.int64)
    return OPS[op](wide).to(dtype)


def same(x: Tensor, y: Tensor, what: object) -> None:
    assert x.dtype == y.dtype and torch.equal(x, y), what


def check_reductions() -> int:
    n, rank, checked = dist.get_world_size(), dist.get_rank(), 0
    assert isinstance(dist.group.WORLD, shared_memory.SharedMemoryGroup)
    for dtype in shared_memory.TYPES:
        for op in OPS:
            if op == "AVG" and not dtype.is_floating_point:
                continue
            for size in SIZES if op == "SUM" else SIZES[3:4]:
                rows = [numbers(dtype, size, r) for r in range(n)]
                x = rows[rank].clone()
                dist.all_reduce(x, getattr(dist.ReduceOp, op))
                same(x, reduced(dtype, op, rows), (dtype, op, size))
                rows = [numbers(dtype, size * n, r) for r in range(n)]
                out = torch.empty(size, dtype=dtype)
                dist.reduce_scatter_tensor(out, rows[rank], getattr(dist.ReduceOp, op))
                same(out, reduced(dtype, op, rows).view(n, size)[rank], (dtype, op, size, "scattered"))
                checked += 2
    return checked


def check_moves() -> int:
    n, rank, checked = dist.get_world_size(), dist.get_rank(), 0
    for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.complex64):
        for size in SIZES:
            rows = [numbers(torch.int64, size, r).to(dtype) for r in range(n)]
            out = torch.empty(n * size, dtype=dtype)
            dist.all_gather_into_tensor(out, rows[rank])
            same(out, torch.cat(rows), ("all_gather", dtype, size))
            x = rows[rank].clone()
            dist.broadcast(x, n - 1)
            same(x, rows[n - 1], ("broadcast", dtype, size))
            pieces = [torch.empty(size, dtype=dtype) for _ in range(n)] if rank == 1 else None
            dist.gather(rows[rank], pieces, dst=1)
            for row, piece in zip(rows, pieces or rows, strict=True):
                same(piece, row, ("gather", dtype, size))
            # Uneven: rank r sends r + p rows of `size` // 5 to rank p; nothing at all from 0 to 0.
            few = size // 5
            sent = {r: [numbers(torch.int64, (r + p) * few, r, p).to(dtype) for p in range(n)] for r in range(n)}
            mine = torch.cat(sent[rank]).view(-1, size // 5) if size >= 5 else torch.empty(0, 1, dtype=dtype)
            counts = [rank + p for p in range(n)] if size >= 5 else [0] * n
            arrived = torch.empty(sum(counts), *mine.shape[1:], dtype=dtype)
            dist.all_to_all_single(arrived, mine, counts, counts)
            same(arrived.flatten(), torch.cat([sent[r][rank] for r in range(n)]), ("all_to_all", dtype, size))
            checked += 4
    equal = torch.arange(n * 3) + 100 * rank
    arrived = torch.empty_like(equal)
    dist.all_to_all_single(arrived, equal)
    same(arrived, torch.cat([torch.arange(3) + 3 * rank + 100 * r for r in range(n)]), "equal all_to_all")
    dist.barrier()
    name = os.readlink(f"/proc/self/fd/{dist.group.WORLD.native.fd}")
    assert name.startswith("/memfd:"), "memory with a name would stay when all ranks are killed"
    return checked


@FOUR
def test_reductions_equal_plain_sums_in_every_dtype_and_size(n: int) -> None:
    assert run_ranks(n, check_reductions) == [2 * (10 * len(SIZES) + 3 * 10 + len(FLOATS))] * n


@FOUR
def test_moves_arrive_where_they_belong(n: int) -> None:
    assert run_ranks(n, check_moves) == [4 * 5 * len(SIZES)] * n


def bits_of_sums() -> tuple[Tensor, Tensor, Tensor]:
    n, rank = dist.get_world_size(), dist.get_rank()
    rows = [torch.randn(n * 20_001, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    whole = rows[rank].clone()
    dist.all_reduce(whole)
    part, gathered = torch.empty(20_001), torch.empty(n * 20_001)
    dist.reduce_scatter_tensor(part, rows[rank])
    dist.all_gather_into_tensor(gathered, part)
    return whole, gathered, sum(rows[1:], rows[0].clone())


def test_sums_have_the_bits_of_a_sum_in_the_order_of_the_ranks() -> None:
    results = run_ranks(4, bits_of_sums)
    for whole, gathered, plain in results:
        assert torch.equal(whole, results[0][0]) and torch.equal(gathered, whole) and torch.equal(plain, whole)
    rows = [torch.randn(4 * 20_001, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    assert not torch.equal((rows[0] + rows[1]) + (rows[2] + rows[3]), results[0][0]), "another order is seen"


def sums_in_16_bits() -> tuple[Tensor, Tensor]:
    """256 and three small numbers: each alone is lost in bf16, their sum is not."""
    x = torch.full((50_000,), 256.0 if dist.get_rank() == 0 else 0.75, dtype=torch.bfloat16)
    special = torch.tensor([float("inf"), float("nan"), 3e38, -0.0], dtype=torch.bfloat16)
    largest = torch.tensor([float("nan") if dist.get_rank() == 1 else 1.0])
    dist.all_reduce(x)
    dist.all_reduce(special)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    assert largest.isnan().all()
    return x, special


def test_16_bit_floats_are_summed_in_fp32_and_rounded_once() -> None:
    for x, special in run_ranks(4, sums_in_16_bits):
        assert bool((x == 258.0).all())
        assert special.isnan().tolist() == [False, True, False, False]
        assert special[[0, 2, 3]].tolist() == [float("inf"), float("inf"), 0.0]


def all_halves() -> bool:
    """Every finite half: the sum with zeros is itself; the sum with itself is rounded as torch rounds."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()]
    kept, doubled = x.clone() if dist.get_rank() == 0 else torch.zeros_like(x), x.clone()
    dist.all_reduce(kept)
    dist.all_reduce(doubled)
    third = (x.float() / 3).half()
    sums = x.clone() if dist.get_rank() == 0 else third.clone()
    dist.all_reduce(sums)
    rounded = (x.float() + third.float()).half()
    return torch.equal(kept, x) and torch.equal(doubled, x + x) and torch.equal(sums, rounded)


def test_halves_are_rounded_as_torch_rounds() -> None:
    assert run_ranks(2, all_halves) == [True] * 2


def check_layouts() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    base = torch.arange(24.0).view(4, 6) * (rank + 1)
    total = torch.arange(24.0).view(4, 6) * sum(range(1, n + 1))
    x = base.clone().t()
    dist.all_reduce(x)
    same(x, total.t(), "transposed")
    x = torch.zeros(4, 12)
    x[:, ::2] = base
    dist.all_reduce(x[:, ::2], async_op=True).wait()
    same(x[:, ::2], total, "strided")
    assert not x[:, 1::2].any()
    out = torch.zeros(n * 6, 4).t()
    dist.all_gather_into_tensor(out, base.t().contiguous().t())
    same(out.reshape(-1), torch.cat([torch.arange(24.0) * (r + 1) for r in range(n)]), "gathered into strides")
    received = torch.zeros(6, 8)[:, ::2]
    works = [dist.isend(base.t(), (rank + 1) % n), dist.irecv(received, (rank - 1) % n)]
    for work in works:
        work.wait()
    before = (rank - 1) % n
    same(received, (torch.arange(24.0).view(4, 6) * (before + 1)).t(), "received into strides")


@FOUR
def test_tensors_with_strides(n: int) -> None:
    run_ranks(n, check_layouts)


def check_many_in_flight() -> None:
    n, rank = dist.get_world_size(), dist.get_rank()
    xs = [torch.full((size,), float(rank + i)) for i, size in enumerate((5, 300_000, 0, 9, 70_000) * 6)]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    now = torch.ones(3) * rank  # behind them all, and waited for first
    dist.all_reduce(now)
    assert now.tolist() == [n * (n - 1) / 2] * 3
    for i in reversed(range(len(xs))):
        works[i].wait()
        assert bool((xs[i] == n * i + n * (n - 1) / 2).all())
    # Messages larger than what is between two ranks, both ways at once, asked for in another order, by tag.
    after, before = (rank + 1) % n, (rank - 1) % n
    sizes = (3, 1_500_000, 40_000, 1, 0)
    sends = [dist.isend(torch.full((size,), 10.0 * rank + tag), after, tag=tag) for tag, size in enumerate(sizes)]
    inbox = [torch.empty(size) for size in sizes]
    order = (3, 0, 4, 2, 1)
    receives = [dist.irecv(inbox[tag], before, tag=tag) for tag in order]
    for work in (*sends, *receives):  # as `batch_isend_irecv` is waited for: no send needs a wait on a receive
        work.wait()
    for tag, x in enumerate(inbox):
        assert bool((x == 10.0 * before + tag).all()), tag
    for i in range(50):  # work that nobody holds on to
        dist.isend(torch.full((100_000,), float(i)), after)
    for i in range(50):
        dist.recv(x := torch.empty(100_000), before)
        assert bool((x == i).all())


@FOUR
def test_many_calls_in_flight_and_messages_by_tag(n: int) -> None:
    run_ranks(n, check_many_in_flight)


def check_two_groups() -> list[float]:
    """Calls of two groups, issued in another order on each rank."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1, 2, 3], use_local_synchronization=True) for _ in range(2)]
    line = dist.new_group([0, 2] if rank % 2 == 0 else [1, 3], use_local_synchronization=True)
    xs = [torch.full((400_000,), float(rank)), torch.full((400_000,), 10.0 * rank)]
    order = (0, 1) if rank % 2 else (1, 0)
    works = [dist.all_reduce(xs[i], group=pairs[i], async_op=True) for i in order]
    small = torch.tensor([float(rank)])
    dist.all_reduce(small, group=line)
    for work in works:
        work.wait()
    return [xs[0][-1].item(), xs[1][0].item(), small.item()]


def test_two_groups_at_once() -> None:
    assert run_ranks(4, check_two_groups) == [[6.0, 60.0, 2.0 + 2 * (rank % 2)] for rank in range(4)]


def the_rest_of_torch() -> list[Any]:
    """Operations that are gloo's."""
    n, rank = dist.get_world_size(), dist.get_rank()
    rows = [torch.empty(2) for _ in range(n)]
    dist.all_gather(rows, torch.full((2,), float(rank)))
    objects = [None] * n
    dist.all_gather_object(objects, {"rank": rank})
    total = torch.tensor([1.0])
    dist.reduce(total, 0)
    return [torch.stack(rows).sum().item(), objects, total.item() if rank == 0 else n]


def test_what_is_not_made_here_is_gloo_s() -> None:
    assert run_ranks(3, the_rest_of_torch) == [[6.0, [{"rank": r} for r in range(3)], 3.0]] * 3


# Where there is no shared memory


def group_without(where: str, at: int) -> tuple[str, float]:
    """The kind of a group where one rank has another host, no extension or no memory."""
    if dist.get_rank() == at:
        if where == "extension":
            shared_memory.extension.collectives = lambda: None
        else:
            setattr(shared_memory, where, (lambda: ["elsewhere"]) if where == "_host" else (lambda *_: None))
    group = dist.new_group([0, 1, 2], backend=shared_memory.NAME, use_local_synchronization=True)
    dist.all_reduce(x := torch.ones(4), group=group)
    return type(group._get_backend(torch.device("cpu"))).__name__, x.sum().item()


@pytest.fixture
def fresh_pool() -> Iterator[None]:
    """The ranks of a test that changes modules are ended."""
    from tests.ranks import pool

    yield
    pool()._kill()


@pytest.mark.parametrize(("where", "at"), [("_host", 2), ("extension", 1), ("_open", 0), ("_open", 2)])
@pytest.mark.usefixtures("fresh_pool")
def test_a_rank_that_cannot_share_memory_makes_all_fall_back_to_gloo(where: str, at: int) -> None:
    assert run_ranks(3, group_without, where, at) == [("ProcessGroupGloo", 12.0)] * 3


def test_the_environment_can_ask_for_gloo() -> None:
    assert uses_shared_memory({}) and uses_shared_memory({"MEGALLM_COLLECTIVES": "auto"})
    assert not uses_shared_memory({"MEGALLM_COLLECTIVES": "gloo"})
    with pytest.raises(UsageError, match="MEGALLM_COLLECTIVES is 'nccl'; it can be auto or gloo"):
        uses_shared_memory({"MEGALLM_COLLECTIVES": "nccl"})


# Lost peers


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What rank 0 of each scenario of `lost_peers` reports; all in one process that forks ranks."""
    folder = tmp_path_factory.mktemp("lost")
    subprocess.run(
        [sys.executable, "-m", "tests.base.lost_peers", str(folder)], cwd=ROOT, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in lost_peers.SCENARIOS}


@pytest.mark.parametrize("name", ["killed", "killed_async", "killed_in_send", "killed_in_receive", "left"])
def test_a_peer_that_ended_is_noticed_within_a_second(endings, name: str) -> None:
    told = endings[name]
    error = dist.DistNetworkError(told["error"])
    assert told["kind"] == "DistNetworkError" and told["seconds"] < 1.0
    assert "Connection closed by peer: rank 1 of 2" in told["error"] and lost_peer(error) and hung_up(error)


@pytest.mark.parametrize("name", ["stopped", "stopped_async"])
def test_a_peer_that_stands_still_is_given_the_time_limit(endings, name: str) -> None:
    told = endings[name]
    error = dist.DistNetworkError(told["error"])
    assert told["kind"] == "DistNetworkError" and "Timed out waiting" in told["error"]
    assert lost_peers.LIMIT <= told["seconds"] < lost_peers.LIMIT + 2
    assert lost_peer(error) and not hung_up(error), "it has not ended"


def test_destroying_a_group_ends_what_waits(endings) -> None:
    assert endings["destroyed"]["kind"] == "DistBackendError" and endings["destroyed"]["seconds"] < 1.0


def test_different_calls_are_told(endings) -> None:
    assert "different collectives: rank 0 all_reduce of 16 bytes" in endings["mismatch"]["error"]
    assert "rank 1 broadcast of 16 bytes" in endings["mismatch"]["error"]


def test_sums_of_what_cannot_be_summed_are_refused() -> None:
    run_ranks(2, refused)


def refused() -> None:
    with pytest.raises(InternalError, match="is not possible over shared memory"):
        dist.all_reduce(torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(InternalError, match="SUM, AVG, MAX, MIN, PRODUCT"):
        dist.all_reduce(torch.zeros(2, dtype=torch.int64), dist.ReduceOp.BXOR)
    with pytest.raises(ValueError, match="is not 2 times"):
        dist.all_gather_into_tensor(torch.empty(5), torch.empty(2))
    with pytest.raises(ValueError, match="does not divide 3 rows"):
        dist.all_to_all_single(torch.empty(3), torch.empty(3), [1, 1], [2, 1])
    dist.barrier()
