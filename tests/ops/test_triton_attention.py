"""Attention in Triton: its values by the interpreter, and that it compiles for the GPUs it is meant for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for GPUs")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megallm.ops import triton_attention as kernels

FIXED = {"E": 64, "EV": 64, "E2": 64, "EV2": 64, "ROWS": kernels.ROWS, "KEYS": kernels.KEYS, "PRECISION": "tf32"}
WIDE, ENDS, NUMBERS = "lse inner grad_q grad_k grad_v", "lows highs firsts lasts", "num_q num_k heads share"
kinds = dict.fromkeys(WIDE.split(), "*fp32") | dict.fromkeys(ENDS.split(), "*i32")
kinds |= {"scale": "fp32"} | dict.fromkeys(NUMBERS.split(), "i32") | dict.fromkeys(FIXED, "constexpr")
for capability in (80, 90, 100):
    for kernel in (kernels._forward, kernels._backward_q, kernels._backward_kv):
        signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, FIXED), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"] and made.metadata.shared < 160 * 1024, (capability, made.metadata.shared)
        print(capability, kernel.__name__, made.metadata.shared)
"""


def run(*arguments: str, **environ: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=kept | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_values_gradients_sinks_and_prefixes() -> None:
    run("-m", "tests.ops.triton_values", TRITON_INTERPRET="1")


def test_it_compiles_for_ampere_hopper_and_blackwell() -> None:
    assert len(run("-c", COMPILE).splitlines()) == 9
