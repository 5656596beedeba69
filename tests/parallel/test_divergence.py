"""A student's divergence from its teacher, from hidden states of both, against torch's softmax over whole logits."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.ops import cross_entropy
from megallm.ops.cross_entropy import CHUNK_BYTES, Projection
from megallm.ops.divergence import generalized_jsd, top_k_divergence
from megallm.parallel.divergence import Teacher, live_divergence, stored_divergence, top_log_probs
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import piece
from tests.ranks import run_ranks

GOLDEN = json.loads((Path(__file__).parents[1] / "peers" / "trl_golden.json").read_text(encoding="utf-8"))
VOCAB, SIZE, WIDER, TOP, HEAT = 11, 6, 9, 4, 0.7
SMALL = {"MIN_TOKENS": 3, "CHUNK_BYTES": 0}
BETAS = (0.0, 0.3, 0.5, 1.0)


def problem() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "hidden": (2, 7, SIZE), "weight": (VOCAB, SIZE), "bias": (VOCAB,), "taught": (2, 7, WIDER),
        "teacher": (VOCAB, WIDER), "grad": (2, 7),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def expected(beta: float, tail: str | None) -> tuple[Tensor, ...]:
    """Value, and gradients of hidden states, matrix and bias, through whole logits; `tail` None: a live teacher."""
    given = problem()
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    student = torch.log_softmax(F.linear(*leaves) / HEAT, -1)
    teacher = torch.log_softmax(F.linear(given["taught"], given["teacher"]) / HEAT, -1)
    if tail is None:
        found = generalized_jsd(student, teacher, beta)
    else:
        top, ids = teacher.topk(TOP, -1)
        found = top_k_divergence(student.gather(-1, ids), top, beta, tail)
    found.backward(given["grad"])
    return found.detach(), *(x.grad for x in leaves)


def on_ranks(beta: float, tail: str | None, broken: frozenset[str] = frozenset()) -> tuple[Tensor, ...]:
    mesh = Mesh.start(Layout(tp=torch.distributed.get_world_size()), "cpu", broken)
    given = problem()
    begin, end = piece(VOCAB, mesh.tp.size, mesh.tp.rank)
    hidden = given["hidden"].requires_grad_()
    weight, bias = (given[name][begin:end].clone().requires_grad_() for name in ("weight", "bias"))
    head, own = Projection(weight, bias), (mesh, VOCAB)
    with mock.patch.multiple(cross_entropy, **SMALL):
        theirs = Projection(given["teacher"][begin:end])
        if tail is None:
            found = live_divergence(hidden, head, given["taught"], Teacher(beta, head=theirs), HEAT, mesh)
        else:
            ids, top = top_log_probs(given["taught"].flatten(0, 1), theirs, TOP, HEAT, own)
            top = ids.view(2, 7, TOP), top.view(2, 7, TOP)
            found = stored_divergence(hidden, head, top, Teacher(beta, tail), HEAT, own)
        found.backward(given["grad"])
    return found.detach(), hidden.grad, weight.grad, bias.grad


@pytest.mark.parametrize("tail", [None, "rest", "renormalize"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [1, 3])
def test_pieces_of_the_vocabulary_equal_whole_logits(size, beta, tail):
    value, *grads = expected(beta, tail)
    ranks = run_ranks(size, on_ranks, beta, tail)
    # What is left of 1 has lost digits where the top k has nearly all.
    close = {"rtol": 1e-9, "atol": 1e-10} if tail == "rest" else {"rtol": 1e-11, "atol": 1e-12}
    for mine in ranks:
        torch.testing.assert_close(mine[0], value, **close)
    torch.testing.assert_close(sum(mine[1] for mine in ranks), grads[0], **close)
    torch.testing.assert_close(torch.cat([mine[2] for mine in ranks]), grads[1], **close)
    torch.testing.assert_close(torch.cat([mine[3] for mine in ranks]), grads[2], **close)


@pytest.mark.parametrize("name", ["vocab.max", "vocab.sum", "vocab.divergence", "distill.temperature"])
def test_what_is_left_out_shows(name):
    value, *_ = expected(0.5, None)
    for mine in run_ranks(3, on_ranks, 0.5, None, frozenset({name})):
        assert not torch.allclose(mine[0], value, rtol=1e-6)


@pytest.mark.parametrize("beta", GOLDEN["distill"])
def test_trl_has_the_same_divergences_and_gradients(beta):
    """TRL 1.16 on logits: the head's matrices are unit matrices."""
    want, inputs = GOLDEN["distill"][beta], GOLDEN["inputs"]
    mask = torch.tensor(inputs["mask"]).bool()
    leaf, taught = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("logits", "teacher_logits"))
    leaf.requires_grad_()
    unit = Projection(torch.eye(leaf.shape[-1], dtype=torch.float64))
    teacher = Teacher(float(beta), head=unit)
    found = live_divergence(leaf[mask], unit, taught[mask], teacher, want["temperature"], Mesh.single())
    loss = found.sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(want["loss"], rel=1e-5)
    theirs = torch.tensor(want["gradient"], dtype=torch.float64)
    assert (leaf.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_no_divergence(beta):
    given = problem()
    hidden, weight = given["hidden"].requires_grad_(), given["weight"]
    head = Projection(weight)
    found = live_divergence(hidden, head, hidden.detach(), Teacher(beta, head=head), HEAT, Mesh.single())
    found.sum().backward()
    assert found.abs().max() < 1e-14 and hidden.grad.abs().max() < 1e-13


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation inside makes."""

    bytes_ = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor):
                self.bytes_ = max(self.bytes_, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("tail", [None, "rest"])
def test_logits_of_all_tokens_never_exist(tail):
    """V = 32k: no storage is larger than a chunk's wide logits, in either pass; those of all tokens are 4 times as
    large."""
    tokens, vocab, size = 4 * CHUNK_BYTES // (32_000 * 4), 32_000, 2
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=draw).requires_grad_()
    weight = torch.randn(vocab, size, generator=draw).requires_grad_()
    theirs, own = Projection(weight.detach().clone()), (Mesh.single(), vocab)
    with Largest() as seen:
        if tail is None:
            given = Teacher(head=theirs)
            found = live_divergence(hidden, Projection(weight), hidden.detach(), given, 1.0, own[0])
        else:
            top = top_log_probs(hidden.detach(), theirs, 8, 1.0, own)
            found = stored_divergence(hidden, Projection(weight), top, Teacher(tail="rest"), 1.0, own)
        found.sum().backward()
    assert CHUNK_BYTES // 2 < seen.bytes_ <= CHUNK_BYTES < tokens * vocab * 4 / 3
