"""Kernels for CPUs in C++ (csrc/ops), chosen by the CPU's instruction set when the extension is
loaded: AVX-512, AVX2 or portable ones. Each stands in for an operation of this package, whose torch
form is the reference.

They take float32 and bfloat16 tensors on CPUs; float64, which the oracle computes in, is always
left to the reference. Threads are torch's. The environment variable MEGALLM_OPS_ISA (avx512, avx2,
portable or reference) names the kernels to use; `use_kernels` does the same in a running process.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from megallm.base import extension
from megallm.base.errors import UsageError
from megallm.ops.kernels import KERNELS
from megallm.ops.tiles import BAND, CAUSAL, NEAR, Tile

DTYPES = (torch.float32, torch.bfloat16)
MAX_SIZE = 1024  # of a head
FAR = 2**62  # no distance between a query and a key
Mode = Literal["auto", "native", "reference"]


def use_kernels(mode: Mode | str) -> str:
    """Choose the kernels of this process: `auto` the best ones, `reference` none, `native` insists,
    or those of an instruction set by its name. Returns which are used.

    Raises UsageError where what was asked for is not there; that of a GPU's kernels comes when a
    tensor there asks for them.
    """
    KERNELS.mode = mode if mode in ("reference", "native") else "auto"
    module = extension.ops()
    if module is None:
        if mode in ("auto", "reference"):
            return "reference"
        raise UsageError(f"The kernels {mode} are not there: {extension.OPS} was not built.")
    try:
        return module.use("auto" if mode == "native" else mode)
    except ValueError as error:
        raise UsageError(
            f"{error} Accepted are auto, native, reference, avx512, avx2, portable."
        ) from error


def kernels(*tensors: Tensor | None) -> ModuleType | None:
    """Returns the extension where its kernels take such tensors; None: the caller uses torch."""
    module = extension.ops()
    if module is None or module.isa() == "reference" or torch.compiler.is_compiling():
        return None
    return module if all(x is None or _fits(x) for x in tensors) else None


def _fits(x: Tensor) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter)  # no address in what only looks like a tensor
    return plain and x.device.type == "cpu" and x.dtype in DTYPES


def takes_attention(*tensors: Tensor) -> bool:
    """Returns whether the kernels compute attention of q, k and v `[B, T, heads, E or Ev]`."""
    return kernels(*tensors) is not None and all(x.shape[-1] <= MAX_SIZE for x in tensors)


@lru_cache(maxsize=256)
def _described(tiles: tuple[Tile, ...]) -> Tensor:
    """The tiles as the kernels read them: a query sees what is from `low` to less than `high`
    before it.
    """
    rows = []
    for tile in tiles:
        low = 0 if tile.kind in (CAUSAL, BAND) else -FAR
        high = FAR if tile.kind == CAUSAL or tile.window is None else tile.window
        if tile.kind == NEAR:
            low = 1 - tile.window
        elif tile.kind not in (CAUSAL, BAND):
            high = FAR
        place = tile.q_begin, tile.q_end, tile.k_begin, tile.k_end
        shift = 0 if tile.kind == CAUSAL else tile.shift
        rows.append((*place, shift, low, high))
    return torch.tensor(rows, dtype=torch.int64)


def _strided(x: Tensor) -> tuple[int, int, int, int, bool]:
    return (x.data_ptr(), *x.stride()[:3], x.dtype == torch.bfloat16)


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _arguments(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor) -> tuple:
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return sizes, q.shape[-1] ** -0.5, tiles.data_ptr(), len(tiles)


def attend_(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]
) -> None:
    """Merge attention over tiles into the float32 `out` `[B, Tq, H, Ev]` and `lse` `[B, Tq, H]`, in
    place (arXiv 2205.14135).
    """
    q, k, v = _dense(q, k, v)
    tensors = tuple(_strided(x) for x in (q, k, v, out))
    if tiles:
        described = _described(tiles)  # all that an address is taken of is kept by a name
        arguments = _arguments(q, k, v, described)
        extension.ops().attention_forward(*arguments, tensors, lse.data_ptr())


def attend_backward_(
    grads: tuple[Tensor, Tensor, Tensor],
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    tiles: tuple[Tile, ...],
) -> None:
    """Add the gradients of q, k and v through tiles to the float32 `grads`, in place; `given` is q,
    the output and the log-sum-exp of the whole softmax, and the gradient of that output.
    """
    q, out, lse, grad = given
    q, k, v, out, grad = _dense(q, k, v, out, grad)
    tensors, lse = tuple(_strided(x) for x in (q, k, v, out, grad)), lse.contiguous()
    if not tiles:
        return
    sums = [x if x.is_contiguous() else torch.zeros(x.shape) for x in grads]
    described = _described(tiles)
    extension.ops().attention_backward(
        *_arguments(q, k, v, described), tensors, lse.data_ptr(), _addresses(*sums)
    )
    for total, part in zip(grads, sums, strict=True):
        if part is not total:
            total += part


def _half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes RMSNorm of contiguous x `[..., D]`; returns it and the wide factor of each row."""
    out, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    x_at, weight_at, out_at, scale_at = _addresses(x, weight, out, scale)
    extension.ops().rms_norm(
        scale.numel(), x.shape[-1], _half(x), x_at, weight_at, _half(weight), eps, out_at, scale_at
    )
    return out, scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and, wide, of the weight."""
    out, of_weight = torch.empty_like(x), torch.empty(x.shape[-1:], dtype=torch.float32)
    grad = grad.contiguous()  # kept by its name: an address keeps nothing
    given = _addresses(grad, x, weight)
    rest = _addresses(scale, out, of_weight)
    extension.ops().rms_norm_backward(
        scale.numel(), x.shape[-1], _half(x), *given, _half(weight), *rest
    )
    return out, of_weight


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """Computes `silu(gate) * up` for contiguous `[..., 2 F]`."""
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    rows = out.numel() // max(size, 1)
    extension.ops().swiglu_forward(rows, size, _half(out), *_addresses(gate_up, out))
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Returns the gradient of `gate_up`."""
    out, size = torch.empty_like(gate_up), grad.shape[-1]
    grad = grad.contiguous()
    rows = grad.numel() // max(size, 1)
    extension.ops().swiglu_backward(rows, size, _half(out), *_addresses(grad, gate_up, out))
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotates x `[B, T, H, E]` by contiguous float32 tables `[B, T, R/2]`, back with `sign` -1."""
    out = torch.empty(x.shape, dtype=x.dtype)
    (x,) = _dense(x)
    extension.ops().rope(
        _strided(x), (*x.shape, cos.shape[-1]), *_addresses(cos, sin, out), float(sign)
    )
    return out


def softmax_statistics(
    logits: Tensor, targets: tuple[Tensor, int, float], moment: bool, best: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns the fields of `cross_entropy.Statistics` up to `best`, of contiguous logits `[T, V]`;
    targets are labels, the first entry and the temperature.
    """
    rows, size = logits.shape
    made = [logits.new_empty(rows, dtype=torch.float32) for _ in range(3 + moment)]
    top, total, label, moments = (*made, None)[:4]
    places = torch.empty(rows, dtype=torch.int64) if best else None
    labels, begin, temperature = targets
    labels = labels.contiguous()
    extension.ops().softmax_statistics(
        rows,
        size,
        _half(logits),
        logits.data_ptr(),
        (labels.data_ptr(), begin, temperature),
        _addresses(top, total, label, moments, places),
    )
    return top, total, label, moments, places


def softmax_gradient(
    logits: Tensor,
    targets: tuple[Tensor, int, float],
    given: tuple[Tensor | None, ...],
    out: Tensor,
) -> Tensor:
    """Writes the gradient of contiguous logits `[T, V]` into `out`, which may be the logits, and
    returns it. `given`: lse, entropy, the gradients of log-probabilities and of entropies, divided
    by the temperature, and what is added at the label; each wide `[T]` or None.
    """
    rows, size = logits.shape
    labels, begin, temperature = targets
    labels = labels.contiguous()
    given = [x if x is None else x.to(torch.float32).contiguous() for x in given]
    extension.ops().softmax_gradient(
        rows,
        size,
        _half(logits),
        logits.data_ptr(),
        (labels.data_ptr(), begin, temperature),
        _addresses(*given),
        out.data_ptr(),
        _half(out),
    )
    return out


def matrix_product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Computes `a b` of float32 matrices into contiguous `out`, or onto it with `add`; see
    `ops.product`.
    """
    out = torch.empty(a.shape[0], b.shape[1]) if out is None else out
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    sizes = (*out.shape, a.shape[1])
    left, right = ((x.data_ptr(), *x.stride()) for x in (a, b))
    extension.ops().product(sizes, left, right, out.data_ptr(), add)
    return out
