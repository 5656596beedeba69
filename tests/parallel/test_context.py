"""Context parallelism against attention in one process at 1e-12, forward and backward, and what must be noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.base.errors import DataError, UsageError
from megallm.ops.attention import Gradients, Partial
from megallm.ops.tiles import MaskSpec, Span, plan_tiles
from megallm.parallel import context
from megallm.parallel.config import LayoutConfig
from megallm.parallel.context import (
    GRADIENTS,
    KEYS,
    AllGather,
    Context,
    Moving,
    Ring,
    divisible_heads,
    pass_on,
)
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.zigzag import KINDS, hybrid_degrees, natural_order, rank_order, spans, ulysses_degree
from tests.ops.test_attention import dense_mask, plain_attention
from tests.ranks import run_ranks

ATOL = 1e-12
SIZE = 6


@dataclass(frozen=True)
class Case:
    """One comparison: sizes, documents (packed when there are several) and window."""

    length: int = 32
    heads: int = 4
    kv_heads: int = 2
    packed: bool = False
    window: int | None = None
    seed: int = 0
    value_size: int = SIZE  # of the values, as in latent attention
    causal: bool = True

    @property
    def mask_spec(self) -> MaskSpec:
        if not self.packed:
            return MaskSpec((0, self.length), self.window, self.causal)
        draw = random.Random(self.seed)
        ends = sorted(draw.sample(range(1, self.length), draw.randint(1, 6)))
        return MaskSpec((0, *ends, self.length), self.window, self.causal)


CASES = (
    Case(),
    Case(kv_heads=4),
    Case(kv_heads=1),
    Case(window=5),
    Case(window=19, kv_heads=1),
    Case(packed=True, seed=1),
    Case(packed=True, seed=2, kv_heads=1),
    Case(packed=True, seed=3, window=4),
    Case(heads=12, kv_heads=6, packed=True, seed=4),
    Case(value_size=10, packed=True, seed=6),
    Case(causal=False),
    Case(causal=False, packed=True, seed=7, kv_heads=1),
)
EIGHT = (Case(heads=8, length=48), Case(heads=8, length=48, packed=True, seed=5, window=7), Case(heads=8, kv_heads=8))

FORMS = (
    ("ring", 2, None, CASES),
    ("ring", 4, None, CASES),
    ("ring", 8, None, EIGHT),
    ("ulysses", 2, None, CASES),
    ("ulysses", 4, None, CASES),
    ("allgather", 2, None, CASES),
    ("allgather", 4, None, CASES),
    ("hybrid", 4, None, CASES),
    ("hybrid", 8, 2, EIGHT),
    ("hybrid", 8, 4, EIGHT),
)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of the whole row and the direction of the gradient."""
    make = torch.Generator().manual_seed(case.seed)
    rows = 1 if case.packed else 2
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    sizes = zip(heads, (SIZE, SIZE, case.value_size, case.value_size), strict=True)
    return tuple(torch.randn(rows, case.length, *size, generator=make, dtype=torch.float64) for size in sizes)


def batch_of(case: Case) -> dict[str, Tensor]:
    batch = {"positions": torch.zeros(1 if case.packed else 2, case.length, dtype=torch.long)}
    if case.packed:
        batch["cu_seqlens"] = torch.tensor(case.mask_spec.documents, dtype=torch.int32)
    return batch


def single(case: Case) -> list[Tensor]:
    """The output and the gradients of q, k and v in one process."""
    *leaves, direction = inputs(case)
    leaves = [x.requires_grad_() for x in leaves]
    out = plain_attention(*leaves, dense_mask(case.mask_spec))
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def attend(cp: int, kind: str, degree: int | None, cases: tuple[Case, ...], broken: frozenset[str]) -> list:
    """The rank's side: its pieces of the output and of the three gradients, case by case."""
    mesh = Mesh.start(Layout(cp=cp), broken=broken)
    results = []
    for case in cases:
        here = Context(mesh, LayoutConfig(cp_kind=kind, cp_ulysses=degree), case.heads)
        *leaves, direction = (here.local(x) for x in inputs(case))
        leaves = [x.requires_grad_() for x in leaves]
        mask_spec = here.mask_spec(batch_of(case), case.window, case.causal)
        out = here.parallel_attention(*leaves, mask_spec, case.window)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, direction)])
    return results


def errors(cp: int, case: Case, pieces: list[list[Tensor]]) -> list[float]:
    """Largest deviation of the output and of each gradient, over all ranks."""
    worst = [0.0] * 4
    for rank, mine in enumerate(pieces):
        for n, whole in enumerate(single(case)):
            want = torch.cat([whole[:, s.begin : s.end] for s in spans(case.length, cp, rank)], dim=1)
            assert mine[n].shape == want.shape
            worst[n] = max(worst[n], (mine[n] - want).abs().max().item())
    return worst


@pytest.mark.parametrize(("kind", "cp", "degree", "cases"), FORMS, ids=[f"{f[0]}-{f[1]}-{f[2]}" for f in FORMS])
def test_equals_one_process(kind: str, cp: int, degree: int | None, cases: tuple[Case, ...]) -> None:
    pieces = run_ranks(cp, attend, cp, kind, degree, cases, frozenset())
    for n, case in enumerate(cases):
        worst = errors(cp, case, [rank[n] for rank in pieces])
        assert max(worst) < ATOL, (case, worst)


def attend_narrow(kind: str, case: Case, dtype: torch.dtype) -> list[Tensor]:
    mesh = Mesh.start(Layout(cp=4))
    here = Context(mesh, LayoutConfig(cp_kind=kind), case.heads)
    *leaves, direction = (here.local(x).to(dtype) for x in inputs(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = here.parallel_attention(*leaves, here.mask_spec(batch_of(case), case.window), case.window)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_good_as_its_storage(kind: str) -> None:
    case = CASES[5]
    pieces = run_ranks(4, attend_narrow, kind, case, torch.bfloat16)
    assert {x.dtype for rank in pieces for x in rank} == {torch.bfloat16}
    worst = errors(4, case, [[x.double() for x in rank] for rank in pieces])
    assert max(worst) < 0.06, worst  # values up to 3 in 8 bits; sums of blocks and of gradients are wide


# What is kept and what is overlapped


def saved_bytes(kind: str, case: Case) -> tuple[int, int]:
    """Bytes that attention keeps for its backward pass, and those of q, k, v, the output and the log-sum-exp."""
    mesh = Mesh.start(Layout(cp=4))
    here = Context(mesh, LayoutConfig(cp_kind=kind), case.heads)
    q, k, v = (here.local(x).requires_grad_() for x in inputs(case)[:3])
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        here.parallel_attention(q, k, v, here.mask_spec(batch_of(case), None), None)
    lse = q.numel() // SIZE
    return sum(kept.values()), (2 * q.numel() + k.numel() + v.numel() + lse) * q.element_size()


@pytest.mark.parametrize("kind", ["ring", "allgather", "ulysses"])
def test_only_this_ranks_share_is_kept(kind: str) -> None:
    for kept, share in run_ranks(4, saved_bytes, kind, Case(kv_heads=4)):
        assert kept == share


def order_of_events(case: Case) -> list[str]:
    """What one rank of a ring does, in order, forward and backward."""
    mesh, events = Mesh.start(Layout(cp=4)), []
    send, add, add_grads, wait = context.pass_on, Partial.add, Gradients.add, Moving.wait

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            events.append(name if name != "send" else {KEYS: "send keys", GRADIENTS: "send gradients"}[arguments[2]])
            return function(*arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "pass_on", told("send", send))
        patch.setattr(Partial, "add", told("compute", add))
        patch.setattr(Gradients, "add", told("compute", add_grads))
        patch.setattr(Moving, "wait", told("wait", wait))
        here = Context(mesh, LayoutConfig(), case.heads)
        q, k, v = (here.local(x).requires_grad_() for x in inputs(case)[:3])
        here.parallel_attention(q, k, v, here.mask_spec(batch_of(case), None), None).sum().backward()
    return events


def test_a_block_travels_while_another_is_computed() -> None:
    forward = ["send keys", "compute", "wait"] * 3 + ["compute"]
    first = ["send keys", "compute", "send gradients", "wait"]
    between = ["send keys", "compute", "wait", "send gradients", "wait"] * 2
    last = ["compute", "wait", "send gradients", "wait"]
    assert run_ranks(4, order_of_events, Case()) == [forward + first + between + last] * 4


# Negative controls: leaving something out is seen where it should be, and only there


@pytest.mark.parametrize("kind", ["ring", "hybrid", "allgather"])
def test_a_lost_gradient_of_keys_is_seen(kind: str) -> None:
    pieces = run_ranks(4, attend, 4, kind, None, CASES[:1], frozenset({"cp.kv_grads"}))
    out, grad_q, grad_k, grad_v = errors(4, CASES[0], [rank[0] for rank in pieces])
    assert max(out, grad_q) < ATOL
    assert min(grad_k, grad_v) > 1e-3


@pytest.mark.parametrize(("name", "kind"), [("cp.lse", "ring"), ("cp.heads", "ulysses"), ("cp.heads", "hybrid")])
def test_a_skipped_merge_or_exchange_is_seen(name: str, kind: str) -> None:
    pieces = run_ranks(4, attend, 4, kind, None, CASES[:1], frozenset({name}))
    assert min(errors(4, CASES[0], [rank[0] for rank in pieces])) > 1e-3


def attend_with_plain_order(case: Case) -> list[Tensor]:
    """Two ranks that hold halves of the row instead of zigzag chunks, and do not know it."""
    mesh = Mesh.start(Layout(cp=2))
    here = Context(mesh, LayoutConfig(), case.heads)
    *leaves, direction = (x.chunk(2, dim=1)[mesh.cp.rank].contiguous() for x in inputs(case))
    leaves = [x.requires_grad_() for x in leaves]
    out = here.parallel_attention(*leaves, here.mask_spec(batch_of(case), None), None)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def test_wrong_positions_are_seen() -> None:
    assert min(errors(2, CASES[0], run_ranks(2, attend_with_plain_order, CASES[0]))) > 1e-3


def attend_across_documents(kind: str, case: Case) -> list[Tensor]:
    """A packed row whose document ends were lost on the way."""
    mesh = Mesh.start(Layout(cp=2))
    here = Context(mesh, LayoutConfig(cp_kind=kind), case.heads)
    *leaves, direction = (here.local(x) for x in inputs(case))
    leaves = [x.requires_grad_() for x in leaves]
    batch = {"positions": batch_of(case)["positions"]}
    out = here.parallel_attention(*leaves, here.mask_spec(batch, None), None)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


@pytest.mark.parametrize("kind", ["ring", "ulysses", "allgather"])
def test_attention_across_documents_is_seen(kind: str) -> None:
    assert min(errors(2, CASES[5], run_ranks(2, attend_across_documents, kind, CASES[5]))) > 1e-3


# Zigzag order and the balance of work


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_zigzag_is_a_permutation_of_the_row(size: int) -> None:
    length = 6 * size
    runs = [spans(length, size, rank) for rank in range(size)]
    held = [token for rank in runs for span in rank for token in range(span.begin, span.end)]
    assert sorted(held) == list(range(length))
    assert [rank_order(size)[place] for place in natural_order(size)] == list(range(2 * size))
    chunks = [token // 3 for token in held[::3]]
    assert chunks == rank_order(size)


def axis(size: int, rank: int) -> Axis:
    return Axis("cp", rank, size, tuple(range(size)))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_causal_work_is_balanced_at_every_step(size: int) -> None:
    length, mask_spec = 16 * size, MaskSpec((0, 16 * size))
    chunk = 8
    square, triangle = chunk * chunk, chunk * (chunk + 1) // 2
    for step in range(size):
        work = [sum(t.work for t in Ring(axis(size, rank)).tiles(step, length, mask_spec)) for rank in range(size)]
        assert set(work) == {square + 2 * triangle if step == 0 else 2 * square}
    gathered = [sum(t.work for t in AllGather(axis(size, rank)).tiles(length, mask_spec)) for rank in range(size)]
    assert set(gathered) == {(2 * size - 1) * square + 2 * triangle}
    assert size * gathered[0] == length * (length + 1) // 2, "nothing masked is computed"
    straight = [Span(rank * 16, (rank + 1) * 16) for rank in range(size)]
    uneven = [sum(t.work for t in plan_tiles((span,), (Span(0, length),), mask_spec)) for span in straight]
    assert max(uneven) > 2.5 * min(uneven), "without zigzag the last rank would do most of it"


@pytest.mark.parametrize("seed", range(10))
def test_packed_off_diagonal_chunk_pairs_are_at_most_one_rectangle(seed: int) -> None:
    size, length = 4, 64
    mask_spec = Case(length=length, packed=True, seed=seed).mask_spec
    chunks = [Span(begin, begin + 8) for begin in range(0, length, 8)]
    total = 0
    for i, queries in enumerate(chunks):
        for j, keys in enumerate(chunks):
            tiles = plan_tiles((queries,), (keys,), mask_spec)
            total += sum(tile.work for tile in tiles)
            if i != j:
                assert len(tiles) <= 1
                assert all(tile.kind == "full" for tile in tiles)
    assert total == int(dense_mask(mask_spec).sum())
    work = [sum(t.work for t in AllGather(axis(size, rank)).tiles(length, mask_spec)) for rank in range(size)]
    assert sum(work) == total


# Degrees and refusals


def test_ulysses_degrees() -> None:
    assert [ulysses_degree(kind, 4, 8) for kind in ("ring", "allgather", "ulysses", "hybrid")] == [1, 1, 4, 2]
    assert ulysses_degree("hybrid", 8, 8) == 4 and ulysses_degree("hybrid", 8, 8, 2) == 2
    assert hybrid_degrees(8, 12) == [2, 4] and hybrid_degrees(2, 8) == [] and hybrid_degrees(6, 9) == [3]
    assert ulysses_degree("ulysses", 1, 3) == 1
    for arguments in (("ulysses", 4, 6), ("hybrid", 2, 8), ("hybrid", 8, 8, 8), ("hybrid", 8, 8, 3), ("rings", 2, 8)):
        with pytest.raises(UsageError, match="layout.cp"):
            ulysses_degree(*arguments)


@pytest.mark.parametrize(("kv_heads", "size", "repeats"), [(1, 2, 2), (2, 4, 2), (3, 2, 2), (4, 2, 1), (6, 4, 2)])
def test_key_heads_are_repeated_as_little_as_needed(kv_heads: int, size: int, repeats: int) -> None:
    x = torch.arange(kv_heads, dtype=torch.float64).view(1, 1, -1, 1).requires_grad_()
    y = divisible_heads(x, size)
    assert y.shape[2] == kv_heads * repeats and y.shape[2] % size == 0
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad == repeats).all()


def test_rows_that_do_not_fit_are_refused() -> None:
    alone = Context(Mesh.single(), LayoutConfig(), 4)
    two = Mesh(Layout(cp=2), 0, torch.device("cpu"), Mesh.single().axes | {"cp": axis(2, 0)})
    with pytest.raises(UsageError, match="30 tokens cannot be split over layout.cp 2"):
        Context(two, LayoutConfig(), 4).local(torch.zeros(1, 30))
    batch = batch_of(CASES[5])
    with pytest.raises(DataError, match="has 2 rows; packed documents fill one row"):
        alone.mask_spec(batch | {"positions": torch.zeros(2, 32)}, None)
    with pytest.raises(DataError, match="must rise from 0 to 40"):
        alone.mask_spec(batch | {"positions": torch.zeros(1, 40)}, None)
    assert alone.mask_spec(batch_of(CASES[0]), None) is None


# Messages


def pass_many(rounds: int) -> list[tuple[int, ...]]:
    """Several messages of both kinds in flight at once between two ranks; what arrived, in the order of waiting."""
    mesh = Mesh.start(Layout(cp=2))
    rank = mesh.cp.rank
    big = torch.randn(300, 300)
    flights = []
    for n in range(rounds):
        for tag in (KEYS, GRADIENTS):
            size = 300_000 if (n + tag) % 2 else 3  # large and small ones take different paths
            flights.append(pass_on(torch.full((size,), 100 * rank + 10 * tag + n), mesh.cp, tag))
        if rank == n % 2:
            big @ big  # one rank is late, now this one and now that one
    order = sorted(range(len(flights)), key=lambda n: (n % 2 == rank, n))  # ranks wait for one kind first
    arrived = {n: flights[n].wait() for n in order}
    assert all((x == x[0]).all() for x in arrived.values())
    return [int(arrived[n][0]) for n in range(len(flights))]


def test_messages_in_flight_are_never_mistaken() -> None:
    first, second = run_ranks(2, pass_many, 8)
    assert first == [100 + 10 * tag + n for n in range(8) for tag in (1, 2)]
    assert second == [10 * tag + n for n in range(8) for tag in (1, 2)]


def many_layers(kind: str, layers: int) -> float:
    """Layer after layer without a barrier, one rank slow in the forward pass and another in the backward pass."""
    mesh = Mesh.start(Layout(cp=4))
    here = Context(mesh, LayoutConfig(cp_kind=kind), 4)
    case = Case()
    q, k, v, direction = (here.local(x) for x in inputs(case))
    x = q.requires_grad_()
    for layer in range(layers):
        if mesh.cp.rank == layer % 4:
            torch.randn(200, 200) @ torch.randn(200, 200)
        x = here.parallel_attention(x, k, v, here.mask_spec(batch_of(case), None), None)
    (grad,) = torch.autograd.grad(x, q, direction)
    return float(grad.abs().sum())


@pytest.mark.parametrize("kind", ["ring", "hybrid"])
def test_many_layers_in_a_row_do_not_hang(kind: str) -> None:
    assert all(total > 0 for total in run_ranks(4, many_layers, kind, 30))
