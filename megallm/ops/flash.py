"""FlashAttention of torch on GPUs, for runs of sequences of any lengths, with the log-sum-exp
(arXiv 2307.08691); and who computes an attention block where. The choice is pure.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.ops.tiles import TileRun

HALF = (torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
MAX_HEAD_SIZE = 256
SDPA_DTYPES = (*HALF, torch.float32)

CPU, RUNS, TRITON, WRITTEN_OUT = "torch's kernel of CPUs", "torch's flash", "Triton", "written out"
NATIVE = "the extension's kernel of CPUs"


def executor_of(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int],
    triton: bool = True,
) -> str:
    """Returns who computes attention blocks with keys and values of `sizes`: CPU tile by tile; RUNS
    in few calls on a GPU; there TRITON, where it is installed, for shapes that those do not take;
    or they are WRITTEN_OUT, in pieces.
    """
    head_size, value_size = sizes
    if device == "cpu":
        return CPU if dtype in CPU_DTYPES and value_size <= head_size else WRITTEN_OUT
    if device != "cuda" or capability < (8, 0) or max(sizes) > MAX_HEAD_SIZE:
        return WRITTEN_OUT
    if dtype in HALF and value_size <= head_size and head_size % 8 == 0:
        return RUNS
    return TRITON if triton and dtype in SDPA_DTYPES else WRITTEN_OUT


def sdpa_order(capability: tuple[int, int]) -> list[str]:
    """Returns torch's kernels for one causal sequence a row, the best first: on Hopper and later
    its own FlashAttention runs at half the speed of cuDNN's. None of them makes a matrix of scores.
    """
    kernels = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION"]
    return ["CUDNN_ATTENTION", *kernels] if capability >= (9, 0) else kernels


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability of a GPU; (0, 0) of anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache(maxsize=512)
def _ends(ends: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Cumulative lengths of `batch` rows of the same lengths, one behind the other."""
    whole = [0] + [row * ends[-1] + end for row in range(batch) for end in ends[1:]]
    return torch.tensor(whole, dtype=torch.int32).to(device, non_blocking=True)


def _arguments(run: TileRun, batch: int, device: torch.device) -> tuple:
    q_ends, k_ends = (_ends(ends, batch, device) for ends in (run.q_ends, run.k_ends))
    longest = (max(b - a for a, b in zip(x, x[1:], strict=False)) for x in (run.q_ends, run.k_ends))
    return q_ends, k_ends, *longest, 0.0, run.left is None and run.right == 0


def _window(run: TileRun, size: int) -> dict[str, float | int]:
    left, right = (-1 if side is None else side for side in (run.left, run.right))
    return {"scale": size**-0.5, "window_size_left": left, "window_size_right": right}


def run_forward(q: Tensor, k: Tensor, v: Tensor, run: TileRun) -> tuple[Tensor, Tensor]:
    """Computes the attention of a run: q `[B, Tq, H, E]`, k and v `[B, Tk, K, E or Ev]` are its own
    rows. Returns `[B, Tq, H, Ev]` and the wide log-sum-exp `[B, Tq, H]`.
    """
    batch, tokens, size = len(q), q.shape[1], v.shape[-1]
    flat = [x.flatten(0, 1) for x in (q, k, _padded(v, q))]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *flat, *_arguments(run, batch, q.device), False, **_window(run, q.shape[-1])
    )
    return out.view(batch, tokens, *out.shape[1:])[..., :size], lse.mT.view(batch, tokens, -1)


def run_backward(
    given: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, v: Tensor, run: TileRun
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v through a run, from `given`: q, the output and the
    log-sum-exp of the whole softmax, and the gradient of that output.
    """
    q, out, lse, grad = given
    size = v.shape[-1]
    q_, k_, v_, out, grad = (
        x.flatten(0, 1) for x in (q, k, _padded(v, q), _padded(out, q), _padded(grad, q))
    )
    arguments = _arguments(run, len(q), q.device)
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout, which is 0
    grads = torch.ops.aten._flash_attention_backward(
        grad.to(q.dtype),
        q_,
        k_,
        v_,
        out.to(q.dtype),
        lse.flatten(0, 1).mT.contiguous(),
        *arguments,
        random,
        q.new_empty(0),
        **_window(run, q.shape[-1]),
    )
    shapes = (x.shape[:3] for x in (q, k, v))
    grad_q, grad_k, grad_v = (x.view(*s, -1) for x, s in zip(grads, shapes, strict=True))
    return grad_q, grad_k, grad_v[..., :size]


def _padded(x: Tensor, q: Tensor) -> Tensor:
    missing = q.shape[-1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing > 0 else x
