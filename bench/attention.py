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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    keep_memory()
    torch.set_num_threads(1)
    print(json.dumps({"command": sys.argv, "kernels": native.use("auto"), **machine()}))
    for dtype in (torch.float32, torch.bfloat16):
        for b, t, h, k_heads, e in SHAPES:
            q, k, v = (torch.randn(b, t, n, e, dtype=dtype).requires_grad_() for n in (h, k_heads, k_heads))
            grad, found = torch.randn(b, t, h, e, dtype=dtype), []

            def seconds(function) -> float:
                begin = time.process_time()
                for _ in range(5):
                    torch.autograd.grad(function(q, k, v), (q, k, v), grad)
                found.append(time.process_time() - begin)
                return found[-1]

            def ours() -> float:
                return seconds(causal_attention)

            ours(), seconds(theirs)
            ratio = paired_ratio(abba(ours, lambda: seconds(theirs), rounds))
            same = statistics.median(abba(ours, ours, 3))
            found.clear()
            speed = 5 * 14 * b * h * t * t / 2 * e / min(ours(), ours()) / 1e9
            print(f"{str(dtype)[6:]:<9} B{b} T{t} H{h} K{k_heads} E{e}: {ratio}, ours {speed:.0f} GFLOP/s, A/A {same:.2f}")


if __name__ == "__main__":
    main()
