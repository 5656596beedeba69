"""The fused head: per-token log-probabilities from hidden states, against torch's logits and log-softmax."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops import cross_entropy
from megallm.ops.cross_entropy import Projection
from megallm.parallel import vocab
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import piece
from megallm.parallel.vocab import Wanted, fused_scores, fuses, label_scores
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
VOCAB, SIZE = 11, 6
EVERYTHING = Wanted(("log_prob", "entropy", "correct"), 0.7)
WIDE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


def problem(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """hidden [2, 7, D], weight [V, D], bias [V], labels, upstream gradient [2, 7]: some of it zero, as where masked."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 7, SIZE, generator=draw, dtype=torch.float64) * scale
    weight = torch.randn(VOCAB, SIZE, generator=draw, dtype=torch.float64)
    bias = torch.randn(VOCAB, generator=draw, dtype=torch.float64)
    labels = torch.randint(VOCAB, (2, 7), generator=draw)
    labels[0, :2] = torch.tensor([0, VOCAB - 1])
    grad = torch.randn(2, 7, generator=draw, dtype=torch.float64) * (torch.rand(2, 7, generator=draw) > 0.3)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels, grad.to(WIDE[dtype])


def expected(dtype: torch.dtype, scale: float = 1.0, with_bias: bool = True) -> tuple[Tensor, ...]:
    """(log-probabilities, gradients of hidden, weight and bias) in float64, from the numbers as `dtype` holds them."""
    hidden, weight, bias, labels, grad = problem(dtype, scale)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(leaves[0], leaves[1], leaves[2] if with_bias else None)
    log_prob = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    log_prob.backward(grad.double())
    return log_prob.detach(), *(x.grad for x in leaves)


def fused(
    mesh: Mesh, dtype: torch.dtype, scale: float = 1.0, with_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same from this rank's piece of the vocabulary, two tokens at a time."""
    hidden, weight, bias, labels, grad = problem(dtype, scale)
    begin, end = piece(VOCAB, mesh.tp.size, mesh.tp.rank)
    hidden, weight = hidden.clone().requires_grad_(), weight[begin:end].clone().requires_grad_()
    bias = bias[begin:end].clone().requires_grad_() if with_bias else None
    with mock.patch.multiple(cross_entropy, MIN_TOKENS=2, CHUNK_BYTES=0):
        log_prob = fused_scores(hidden, Projection(weight, bias), labels, mesh, VOCAB)["log_prob"]
        log_prob.backward(grad)
    return log_prob.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad


def on_ranks(dtype: torch.dtype, scale: float, with_bias: bool, broken: frozenset[str] = frozenset()) -> tuple:
    mesh = Mesh.start(Layout(tp=torch.distributed.get_world_size()), "cpu", broken)
    return fused(mesh, dtype, scale, with_bias)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("scale", [1.0, 200.0])  # large logits overflow an exp without the maximum
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_equal_log_softmax(size, scale, with_bias):
    log_prob, hidden, weight, bias = expected(torch.float64, scale, with_bias)
    ranks = run_ranks(size, on_ranks, torch.float64, scale, with_bias)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for mine, _, _, _ in ranks:
        torch.testing.assert_close(mine, log_prob, **close)
    torch.testing.assert_close(sum(rank[1] for rank in ranks), hidden, **close)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), weight, **close)
    if with_bias:
        torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), bias, **close)


def partly_right() -> tuple[Tensor, ...]:
    """`problem` with labels of which the last seven are the likeliest entries."""
    hidden, weight, bias, labels, grad = problem(torch.float64)
    labels[1] = F.linear(hidden[1], weight, bias).argmax(-1)
    return hidden, weight, bias, labels, grad


def scores_on_ranks(way: str, broken: frozenset[str] = frozenset()) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """All scalars at the temperature 0.7, and the gradients of this rank's pieces where both floats have one."""
    mesh = Mesh.start(Layout(tp=torch.distributed.get_world_size()), "cpu", broken)
    hidden, weight, bias, labels, grad = partly_right()
    begin, end = piece(VOCAB, mesh.tp.size, mesh.tp.rank)
    hidden, weight, bias = (x.clone().requires_grad_() for x in (hidden, weight[begin:end], bias[begin:end]))
    with mock.patch.multiple(cross_entropy, MIN_TOKENS=2, CHUNK_BYTES=0):
        if way == "fused":
            found = fused_scores(hidden, Projection(weight, bias), labels, mesh, VOCAB, EVERYTHING)
        else:
            found = label_scores(F.linear(hidden, weight, bias), labels, mesh, VOCAB, EVERYTHING)
        ((found["log_prob"] - 2 * found["entropy"].square()) * grad).sum().backward()
    assert not found["correct"].requires_grad
    return {name: x.detach() for name, x in found.items()}, hidden.grad, weight.grad, bias.grad


def everything() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The same by torch, whole."""
    *leaves, labels, grad = partly_right()
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    made = torch.distributions.Categorical(logits=F.linear(hidden, weight, bias) / EVERYTHING.temperature)
    found = {"log_prob": made.log_prob(labels), "entropy": made.entropy()}
    ((found["log_prob"] - 2 * found["entropy"].square()) * grad).sum().backward()
    found["correct"] = (made.logits.argmax(-1) == labels).to(torch.float64)
    return {name: x.detach() for name, x in found.items()}, hidden.grad, weight.grad, bias.grad


@pytest.mark.parametrize("way", ["fused", "logits"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_entropy_and_what_is_correct_at_a_temperature(size, way):
    scores, hidden, weight, bias = everything()
    assert 0 < scores["correct"].sum() < scores["correct"].numel()
    ranks = run_ranks(size, scores_on_ranks, way)
    close = {"rtol": 1e-11, "atol": 1e-12}
    for mine, *_ in ranks:
        assert list(mine) == list(scores)
        for name, values in scores.items():
            torch.testing.assert_close(mine[name], values, **close)
    torch.testing.assert_close(sum(rank[1] for rank in ranks), hidden, **close)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), weight, **close)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), bias, **close)


@pytest.mark.parametrize(("name", "shown"), [("vocab.entropy", "entropy"), ("vocab.best", "correct")])
def test_a_further_reduction_left_out_is_noticed(name, shown):
    ranks = run_ranks(2, scores_on_ranks, "fused", frozenset((name,)))
    wrong = {
        key for key, values in everything()[0].items() for mine, *_ in ranks
        if not torch.allclose(mine[key], values, rtol=1e-9)
    }  # fmt: skip
    assert wrong == {shown}


@pytest.mark.parametrize("name", ["vocab.max", "vocab.sum", "vocab.label"])
def test_a_reduction_left_out_is_noticed(name):
    log_prob = expected(torch.float64, 1.0, True)[0]
    ranks = run_ranks(2, on_ranks, torch.float64, 1.0, True, frozenset((name,)))
    assert not all(torch.allclose(mine, log_prob, rtol=1e-9) for mine, *_ in ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_numbers_lose_no_more_than_their_own_rounding(dtype):
    wanted, found = expected(dtype), fused(Mesh.single(), dtype)
    assert found[0].dtype == torch.float32 and all(x.dtype == dtype for x in found[1:])
    for mine, theirs in zip(found, wanted, strict=True):
        error = (mine.double() - theirs).abs().max() / theirs.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps, error


def test_it_equals_the_path_through_logits_and_keeps_no_logits():
    hidden, weight, _, labels, grad = problem(torch.float64)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        x = hidden.clone().requires_grad_()
        trained = Projection(weight.clone().requires_grad_())
        log_prob = fused_scores(x, trained, labels, Mesh.single(), VOCAB)["log_prob"]
    assert max(kept) < 2 * 7 * VOCAB and sum(kept) == hidden.numel() + 2 * labels.numel()
    y = hidden.clone().requires_grad_()
    other = label_scores(F.linear(y, weight), labels, Mesh.single(), VOCAB)["log_prob"]
    log_prob.backward(grad)
    other.backward(grad)
    torch.testing.assert_close(log_prob, other, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-13)


def test_auto_fuses_when_the_logits_would_be_large():
    weight = torch.empty(128_000, 8, device="meta", requires_grad=True)
    tokens = vocab.FUSE_BYTES // (128_000 * 4)
    assert fuses("auto", tokens + 1, weight) and not fuses("auto", tokens, weight)
    assert fuses("on", 1, weight) and not fuses("off", 10**9, weight)
    assert fuses("auto", 1, weight.detach()), "a head that is not trained needs its logits once"


def test_memory_grows_by_one_copy_of_the_logits_or_eight_times_less():
    """In processes of their own, by resident memory; docs/performance.md has the figures of more tokens."""
    sizes = ["--tokens", "1024", "--vocab", "128000", "--hidden", "16", "--ways", "torch", "logits", "fused"]
    command = [sys.executable, "bench/head.py", *sizes, "--json"]
    out = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True, timeout=120, check=True).stdout  # fmt: skip
    found = json.loads(out)
    logits = 1024 * 128_000 * 4 / 2**20
    assert found["torch_mib"] >= 2 * logits, "the control: the measurement sees logits"
    assert logits <= found["logits_mib"] <= 1.2 * logits, found
    assert found["memory_ratio"] >= 8.0, found
    assert found["fused_loss"] == pytest.approx(found["torch_loss"], rel=1e-5)
