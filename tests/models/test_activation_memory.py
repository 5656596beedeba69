"""Bytes that a block keeps for its backward pass, counted at the allocator, against the closed form of the literature.

A layer in bf16 with flash attention, SwiGLU and RMSNorm keeps s b h (12 + 4 kv/a + 6 f/h) bytes (arXiv 2205.05198,
without dropout). Beside that we keep two numbers a token of the norms, the log-sum-exp of attention, a copy of the
rotary tables, and k twice: k and v share one tensor, so the k before rotation stays with v.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.base.device import HostCopyStream
from megallm.losses.language import NextToken
from megallm.models.block import Block
from megallm.models.config import ModelConfig
from megallm.ops import native
from megallm.parallel import offload
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runner
from tests.engine.tiny import batches, engine_of, equal, gradients_of, state_of
from tests.ranks import run_ranks

ROWS, TOKENS = 2, 64
SHAPES = {"gqa": (64, 160, 8, 4, 8), "wide": (96, 128, 4, 4, 24)}  # D, F, H, K, E
# Rotary tables in bf16; the kernels for CPUs read those that all layers share.
TABLES = 4 if native.kernels(torch.ones(1)) is None else 0
# Modules made again -> what of the closed form is left, in bytes a token, of D, F, H, K, E.
KEPT: dict[tuple[str, ...], Callable[[int, int, int, int, int], int]] = {
    (): lambda d, f, h, k, e: 12 * d + 4 * k * e + 6 * f + (8 + 4 * h + TABLES * e + 2 * k * e),
    ("core", "activation"): lambda d, f, h, k, e: 12 * d + 4 * k * e + 4 * f + 8,
    ("norm",): lambda d, f, h, k, e: 8 * d + 4 * k * e + 6 * f + (8 + 4 * h + TABLES * e + 2 * k * e),
    ("attention",): lambda d, f, h, k, e: 8 * d + 6 * f + 8,
    ("mlp",): lambda d, f, h, k, e: 12 * d + 4 * k * e + (8 + 4 * h + TABLES * e + 2 * k * e),
    ("attention", "mlp"): lambda d, f, h, k, e: 8 * d + 8,
    ("norm", "attention", "mlp"): lambda d, f, h, k, e: 4 * d + 8,
    ("block",): lambda d, f, h, k, e: 2 * d,
}


def model(shape: tuple[int, ...]) -> ModelConfig:
    d, f, h, k, e = shape
    return ModelConfig(
        family="llama", num_layers=2, hidden_size=d, ffn_hidden_size=f, num_heads=h, num_kv_heads=k, head_size=e,
        vocab_size=61, max_positions=TOKENS, init_std=0.1,
    ).resolve()  # fmt: skip


class Allocated(TorchDispatchMode):
    """Bytes allocated and not given back inside, by the allocator's own reports.

    The profiler sees what its own thread gives back, and gloo's may be the last to hold a buffer of a collective: so
    each tensor made inside is held here until the end.
    """

    def __enter__(self) -> Allocated:
        super().__enter__()
        self.held: list[Any] = []
        self.profile = torch.autograd.profiler.profile(use_device=None, profile_memory=True)
        self.profile.__enter__()
        return self

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.held.append(op(*args, **(kwargs or {})))
        return self.held[-1]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        time.sleep(0.05)  # what gloo's thread needs to let go
        self.held.clear()
        gc.collect()
        self.profile.__exit__(*error)
        events = self.profile.kineto_results.events()
        self.bytes = sum(event.nbytes() for event in events if event.name() == "[memory]")


def kept_by_a_block(shape: tuple[int, ...], layout: Layout, sp: bool, modules: tuple[str, ...]) -> float:
    """Bytes a token that the first block keeps, its output counted in place of its input, which is not its own."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    mode = {(): "none", ("block",): "full"}.get(modules, "selective")
    engine = engine_of(
        mesh, model=model(shape), precision="bf16", sp=sp, recompute=mode, recompute_modules=modules or ("core",)
    )
    stage, pieces = engine.model.stages[0], mesh.tp.size if sp else 1
    places = stage.attention_inputs(torch.arange(TOKENS).repeat(ROWS, 1), torch.float32)
    x = torch.randn(ROWS, TOKENS // pieces, shape[0], dtype=torch.bfloat16).requires_grad_()
    block: Block = stage.layers["0"]
    stage.block(x, block, places, None).sum().backward()
    with Allocated() as kept:
        out = stage.block(x, block, places, None)
    assert out.requires_grad
    return kept.bytes / (ROWS * TOKENS)


@pytest.mark.parametrize("modules", KEPT, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_keeps_what_the_closed_form_says(shape, modules):
    assert kept_by_a_block(SHAPES[shape], Layout(), False, modules) == KEPT[modules](*SHAPES[shape])


def test_sequence_parallelism_divides_what_lies_outside_the_split_region_too():
    """All of the closed form over tp but the two gathered inputs of the column-parallel linears, which stay whole."""
    d, f, h, k, e = SHAPES["gqa"]
    whole = 4 * d + TABLES * e  # and the rotary tables
    for kept in run_ranks(2, kept_by_a_block, SHAPES["gqa"], Layout(tp=2), True, ()):
        assert kept == whole + (KEPT[()](d, f, h, k, e) - whole) / 2
    whole = 8 * d + TABLES * e + 8  # without sequence parallelism the residual stream and the norms' outputs too
    for kept in run_ranks(2, kept_by_a_block, SHAPES["gqa"], Layout(tp=2), False, ()):
        assert kept == whole + (KEPT[()](d, f, h, k, e) - whole) / 2


def test_only_the_first_layers_of_a_stage_are_made_again():
    engine = engine_of(recompute="full", recompute_layers=1)
    blocks = engine.model.stages[0].layers.values()
    assert [block.run is runner(True) for block in blocks] == [True, False]
    engine = engine_of(recompute="selective", recompute_modules=("mlp",))
    blocks = engine.model.stages[0].layers.values()
    assert all(block.run_mlp is runner(True) and block.run is runner(False) for block in blocks)
    assert all(block.run_attention is runner(False) for block in blocks)


# --- offload -------------------------------------------------------------------------------------------------------


def step(**changes: Any) -> tuple[dict[str, Tensor], int]:
    """(gradients of a step in bf16, bytes that went to CPU memory)."""
    engine = engine_of(model=model(SHAPES["gqa"]), precision="bf16", **changes)
    engine.train_step(batches(2, tokens=TOKENS), NextToken(), 0.0)
    away = engine.model.stages[0].offload
    return gradients_of(state_of(engine)), away.bytes_away if away else 0


@contextmanager
def lost_copies() -> Iterator[None]:
    """The control: what comes back is zero."""
    original = HostCopyStream.to_device
    HostCopyStream.to_device = lambda self, host: (torch.zeros_like(host), None)
    try:
        yield
    finally:
        HostCopyStream.to_device = original


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_offload_takes_all_that_blocks_keep_and_changes_no_bit(mode):
    plain, nothing = step(recompute=mode)
    ours, away = step(recompute=mode, offload=True)
    assert nothing == 0 and equal(ours, plain)
    # Of two microbatches of two rows and two layers. What stays: the norms' scales, and k before its rotation (v leaves
    # without it).
    d, f, h, k, e = SHAPES["gqa"]
    kept = {"none": (), "selective": ("core", "activation"), "full": ("block",)}[mode]
    stays = {"none": 8 + 2 * k * e, "selective": 8, "full": 0}[mode]
    assert away == (KEPT[kept](d, f, h, k, e) - stays) * 2 * 2 * 2 * TOKENS
    with lost_copies():
        assert not equal(step(recompute=mode, offload=True)[0], plain)


def test_parameters_tables_and_small_tensors_stay_and_nothing_leaves_twice():
    away = offload.Offload(torch.device("cpu"))
    weight = torch.randn(64, 64, requires_grad=True)
    x, small = torch.randn(32, 64, requires_grad=True), torch.randn(3, requires_grad=True)
    away.begin()
    with away.block([weight]):
        out = (x @ weight).square().sum() + (x * x.detach()).sum() + small.square().sum()
    assert away.bytes_away == 2 * x.nbytes, "x, once, and the product; not weight, not small"
    out.backward()
    expected = 2 * (x @ weight) @ weight.T + x
    torch.testing.assert_close(x.grad, expected.detach())


def test_the_block_before_starts_to_come_back_early(monkeypatch):
    order: list[int] = []
    noted = lambda self, host: order.append(int(host.flatten()[0])) or (host, None)  # noqa: E731
    monkeypatch.setattr(HostCopyStream, "to_device", noted)
    away, x = offload.Offload(torch.device("cpu")), torch.ones(512, requires_grad=True)
    away.begin()
    asked: list[list[int]] = []
    for number in range(3):
        with away.block([]):
            x = x * torch.full((512,), float(number + 2))
        x.register_hook(lambda grad: asked.append(list(order)))  # when the backward pass of this block begins
    x.sum().backward()
    assert asked == [[], [4, 3], [4, 3, 2]], "while one block is under way the one before it is asked for, each once"
