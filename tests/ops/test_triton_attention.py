"""Attention in Triton: its values by the interpreter, and that it compiles for the GPUs it is meant for."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from megallm.ops import attention, flash
from megallm.ops.attention import packed_attention
from megallm.ops.tiles import MaskSpec, Span, plan_tiles
from tests.ops.test_attention import dense_mask, gradients, plain_attention, sunk_attention, tensors

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for GPUs")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels as the interpreter runs them, used for all blocks."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from megallm.ops import triton_attention

    monkeypatch.setattr(attention, "executor", lambda q, v: flash.TRITON)
    return triton_attention


@pytest.mark.parametrize(
    ("mask_spec", "kv_heads", "value_size"),
    [
        (MaskSpec((0, 100)), 2, 6), (MaskSpec((0, 21, 64, 100), 17), 2, 10), (MaskSpec((0, 40, 100), None, False), 4, 6),
    ],
)  # fmt: skip
def test_values_and_gradients(kernels: ModuleType, mask_spec: MaskSpec, kv_heads: int, value_size: int) -> None:
    leaves = tensors(100, 4, kv_heads, value_size=value_size, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, got = plain_attention(*exact, dense_mask(mask_spec)), packed_attention(*leaves, mask_spec)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6)
    for mine, theirs in zip(gradients(got, leaves), gradients(want, exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_sinks_and_a_shared_prefix(kernels: ModuleType) -> None:
    """The prefix is one more interval, which every document sees."""
    mask_spec, sinks = MaskSpec((0, 9, 40), 7), torch.tensor([-1.0, 0.0, 1.5, 3.0], requires_grad=True)
    q, k, v = tensors(40, 4, 2, dtype=torch.float32)
    prefix = [x[0, :5].detach().clone().requires_grad_() for x in (k, v)]
    leaves = [q, k, v, sinks, *prefix]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    joined = [torch.cat((p[None].expand(2, -1, -1, -1), x), 1) for p, x in zip(exact[4:], exact[1:3], strict=True)]
    seen = torch.cat((torch.ones(40, 5, dtype=torch.bool), dense_mask(mask_spec)), 1)
    want = sunk_attention(exact[0], *joined, seen, exact[3])
    got = packed_attention(q, k, v, mask_spec, sinks, tuple(prefix))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6)
    for mine, theirs in zip(gradients(got, leaves), gradients(want, exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_one_rank_s_tiles_are_one_plan(kernels: ModuleType) -> None:
    """A row is one launch; queries that see two runs of keys, as in a ring, are two."""
    cpu = torch.device("cpu")
    row, back = (Span(0, 96),), (Span(0, 24, 0), Span(72, 96, 24))
    for mask_spec in (MaskSpec((0, 30, 96)), MaskSpec((0, 96), 10)):
        assert len(kernels.intervals_of(plan_tiles(row, row, mask_spec, False), 96, 96, cpu)) == 1
        assert len(kernels.intervals_of(plan_tiles(row, row, mask_spec), 96, 96, cpu)) == 1
    tiles = plan_tiles(back, (Span(0, 24, 24), Span(72, 96, 0)), MaskSpec((0, 96)))
    assert len(kernels.intervals_of(tiles, 48, 48, cpu)) == 2


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megallm.ops import triton_attention as kernels

FIXED = {"E": 128, "EV": 128, "E2": 128, "EV2": 128, "ROWS": kernels.ROWS, "KEYS": kernels.KEYS, "PRECISION": "tf32"}
WIDE, ENDS, NUMBERS = "lse inner grad_q grad_k grad_v", "lows highs firsts lasts", "num_q num_k heads share"
kinds = dict.fromkeys(WIDE.split(), "*fp32") | dict.fromkeys(ENDS.split(), "*i32") | dict.fromkeys(NUMBERS.split(), "i32")
kinds |= {"scale": "fp32"} | dict.fromkeys(FIXED, "constexpr")
for capability in (80, 90, 100):
    for kernel in (kernels._forward, kernels._backward_q, kernels._backward_kv):
        signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, FIXED), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"] and made.metadata.shared < 160 * 1024, (capability, made.metadata.shared)
        print(capability, kernel.__name__, made.metadata.shared)
"""


def test_it_compiles_for_ampere_hopper_and_blackwell() -> None:
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 9
