"""Collectives forward and backward against one process that sees all ranks' tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megallm.parallel import comm
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import piece
from megallm.parallel.vocab import gather_logits, label_scores
from tests.ranks import run_ranks

# Sums of whole numbers: exact in every dtype and order, so that equality is bit for bit.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPE = (3, 8, 4)


def numbers(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 9, SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(name: str, inputs: list[Tensor], dim: int) -> list[Tensor]:
    """What each rank gets, as ordinary differentiable torch on everybody's inputs."""
    size, total = len(inputs), sum(inputs)
    if name == "copy_fwd_sum_bwd":  # one tensor, copied: its gradient is the sum over the copies
        return [inputs[0]] * size
    if name == "sum_fwd_copy_bwd":
        return [total] * size
    if name == "gather_fwd_reduce_scatter_bwd":
        return [torch.cat(inputs, dim)] * size
    return list(total.chunk(size, dim))


NAMES = (
    "copy_fwd_sum_bwd",
    "sum_fwd_copy_bwd",
    "gather_fwd_reduce_scatter_bwd",
    "reduce_scatter_fwd_gather_bwd",
)
Seen = tuple[Tensor, Tensor]


def call(name: str, x: Tensor, axis: object, dim: int) -> Tensor:
    function: Callable = getattr(comm, name)
    return function(x, axis, "tp.enter") if name in NAMES[:2] else function(x, axis, dim, "sp.enter")


def on_ranks(name: str, dim: int, broken: frozenset[str]) -> list[Seen]:
    """(output, gradient) of this rank in each dtype. The input of rank r is numbers(r), but copies start equal."""
    mesh = Mesh.start(Layout(tp=torch.distributed.get_world_size()), "cpu", broken)
    seen = []
    for dtype in DTYPES:
        seed = 0 if name == "copy_fwd_sum_bwd" else mesh.rank
        x = numbers(seed, dtype).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()  # not contiguous
        y = call(name, x, mesh.tp, dim)
        y.backward(upstream(mesh.rank, y))
        seen.append((y.detach(), x.grad))
    return seen


def upstream(rank: int, y: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(100 + rank)
    return torch.randint(-8, 9, y.shape, generator=draw).to(y.dtype)


def expected(name: str, dim: int, size: int) -> list[list[Seen]]:
    """The same of every rank, from one process; [rank][dtype]."""
    seen: list[list[Seen]] = [[] for _ in range(size)]
    for dtype in DTYPES:
        inputs = [numbers(rank, dtype).requires_grad_() for rank in range(size)]
        outputs = whole(name, inputs, dim)
        if name == "sum_fwd_copy_bwd":
            # every rank goes on with the same sum and computes the same loss: the gradient is that rank's own
            grads = [upstream(rank, outputs[rank]) for rank in range(size)]
        else:
            total = sum((y * upstream(rank, y)).sum() for rank, y in enumerate(outputs))
            total.backward()
            grads = [(inputs[0] if name == "copy_fwd_sum_bwd" else x).grad for x in inputs]
        for rank in range(size):
            seen[rank].append((outputs[rank].detach(), grads[rank]))
    return seen


def equal(ours: list[list[Seen]], theirs: list[list[Seen]]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        for rank_a, rank_b in pairs
        for seen_a, seen_b in zip(rank_a, rank_b, strict=True)
        for a, b in zip(seen_a, seen_b, strict=True)
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_equal_one_process(name, size):
    for dim in (1,) if name in NAMES[:2] else (0, 1, 2):
        if name == "reduce_scatter_fwd_gather_bwd" and SHAPE[dim] % size:
            continue
        assert equal(run_ranks(size, on_ranks, name, dim, frozenset()), expected(name, dim, size)), dim


@pytest.mark.parametrize("name", NAMES)
def test_a_reduction_left_out_is_noticed(name):
    """The control: with its name in `broken`, each of them differs from one process."""
    broken = frozenset(("tp.enter", "sp.enter"))
    assert not equal(run_ranks(2, on_ranks, name, 1, broken), expected(name, 1, 2))


def test_one_rank_makes_every_collective_the_identity():
    axis, x = Mesh.single().tp, numbers(0, torch.float32)
    assert all(call(name, x, axis, 1) is x for name in NAMES)
    assert comm.all_gather(x, axis, 0) is x and comm.own_slice(x, axis, 1) is x


# --- log-probabilities over a split vocabulary ---------------------------------------------------------------------

VOCABULARIES = {2: (10, 11), 3: (11, 12, 13), 4: (9, 10, 11, 4)}


def log_prob_on_ranks(vocab: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of the labels, gradient of this rank's logits, the whole logits gathered)."""
    mesh = Mesh.start(Layout(tp=torch.distributed.get_world_size()))
    logits, labels, grad = problem(vocab, scale)
    begin, end = piece(vocab, mesh.tp.size, mesh.tp.rank)
    mine = logits[..., begin:end].to(dtype).clone().requires_grad_()
    whole, made = gather_logits(mine.detach(), mesh, vocab), mine * 1  # logits that a backward pass may overwrite
    log_prob = label_scores(made, labels, mesh, vocab)["log_prob"]
    log_prob.backward(grad.to(log_prob.dtype))
    assert not torch.equal(made, mine)
    return log_prob.detach(), mine.grad, whole


def test_logits_that_another_keeps_are_not_overwritten_in_silence():
    logits, labels, grad = problem(11, 1.0)
    made = logits.requires_grad_() * 1
    held = made.exp()  # keeps its result
    other = made.square()  # keeps its input
    log_prob = label_scores(made, labels, Mesh.single(), 11)["log_prob"]
    ((log_prob * grad).sum() + held.sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def problem(vocab: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, 7, vocab, generator=draw, dtype=torch.float64) * scale
    labels = torch.randint(vocab, (2, 7), generator=draw)
    labels[0, :2] = torch.tensor([0, vocab - 1])
    return logits, labels, torch.randn(2, 7, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_label_log_prob_equals_log_softmax(size, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for vocab in VOCABULARIES[size]:
        for scale in (1.0, 300.0):  # large logits overflow an exp without the maximum
            logits, labels, grad = problem(vocab, scale)
            leaf = logits.to(dtype).to(torch.float64).clone().requires_grad_()
            wanted = leaf.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
            wanted.backward(grad)
            fine = 4 * torch.finfo(wide).eps * float(logits.abs().max())  # of the sum of exponentials' logarithm
            grad_fine = max(fine, 2 * torch.finfo(dtype).eps)  # the gradient is rounded to the logits' dtype
            for rank, (log_prob, mine, gathered) in enumerate(run_ranks(size, log_prob_on_ranks, vocab, dtype, scale)):
                begin, end = piece(vocab, size, rank)
                assert log_prob.dtype == wide and mine.dtype == dtype
                torch.testing.assert_close(log_prob.double(), wanted.detach(), rtol=fine, atol=fine)
                torch.testing.assert_close(mine.double(), leaf.grad[..., begin:end], rtol=grad_fine, atol=grad_fine)
                assert torch.equal(gathered, logits.to(dtype)), "uneven pieces in order"


@pytest.mark.parametrize("name", ["vocab.max", "vocab.sum", "vocab.label"])
def test_a_reduction_over_the_vocabulary_left_out_is_noticed(name):
    logits, labels, _ = problem(11, 30.0)
    wanted = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    ranks = run_ranks(2, log_prob_without, name)
    assert not all(torch.allclose(log_prob, wanted, rtol=1e-12) for log_prob in ranks)


def log_prob_without(name: str) -> Tensor:
    mesh = Mesh.start(Layout(tp=2), "cpu", frozenset((name,)))
    logits, labels, _ = problem(11, 30.0)
    begin, end = piece(11, 2, mesh.tp.rank)
    return label_scores(logits[..., begin:end], labels, mesh, 11)["log_prob"]
