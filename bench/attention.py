"""CPU seconds of causal attention, forward and backward: ours beside torch's scaled_dot_product_attention.

    OMP_NUM_THREADS=1 python bench/attention.py

Rounds run A B B A in one process and thread; a ratio is torch's time over ours. GFLOP/s count what causality leaves:
half of the scores, forward 4 and backward 10 operations a score and feature.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from ratio import abba, machine, paired_ratio  # noqa: E402
from torch import Tensor  # noqa: E402

from megallm.launch.process import keep_memory  # noqa: E402
from megallm.ops import native  # noqa: E402
from megallm.ops.attention import causal_attention  # noqa: E402

SHAPES = ((4, 256, 6, 6, 48), (4, 256, 8, 8, 64), (1, 2048, 8, 2, 64), (1, 2048, 8, 8, 128))  # B, T, H, K, E


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def timer(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], float]:
    """What runs five times forward and backward, and returns CPU seconds."""

    def seconds() -> float:
        begin = time.process_time()
        for _ in range(5):
            torch.autograd.grad(function(*inputs), inputs, grad)
        return time.process_time() - begin

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    keep_memory()
    torch.set_num_threads(1)
    print(json.dumps({"command": sys.argv, "kernels": native.use_kernels("auto"), **machine()}))
    for dtype in (torch.float32, torch.bfloat16):
        for b, t, h, k_heads, e in SHAPES:
            inputs = tuple(torch.randn(b, t, n, e, dtype=dtype).requires_grad_() for n in (h, k_heads, k_heads))
            grad = torch.randn(b, t, h, e, dtype=dtype)
            ours, torchs = (timer(function, inputs, grad) for function in (causal_attention, theirs))
            ours(), torchs()
            ratio, same = paired_ratio(abba(ours, torchs, rounds)), statistics.median(abba(ours, ours, 3))
            speed = 5 * 14 * b * h * t * t / 2 * e / min(ours(), ours()) / 1e9
            name = f"{str(dtype)[6:]:<9} B{b} T{t} H{h} K{k_heads} E{e}"
            print(f"{name}: {ratio}, ours {speed:.0f} GFLOP/s, A/A {same:.2f}", flush=True)


if __name__ == "__main__":
    main()
