"""Kernels on a GPU: time, and the share of the limit that was measured in the same run.

    python setup.py build_ext --inplace && python bench/gpu_kernels.py --json kernels.json

The limit of a kernel that only moves memory is the rate of a large copy, that of one with matrix products the rate of
a bf16 product of 8192 x 8192 matrices. Bytes are those that must move at least: each operand once. Each row is first
compared with the same operation by torch in float64 (at a size that fits), then timed beside torch's form of it: the
median of `--rounds` rounds between CUDA events, after a warm-up. Where values differ the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megallm.ops import fp8
from megallm.ops.activation import swiglu
from megallm.ops.adam import AdamRule, FlatState, adamw_lists_
from megallm.ops.cached_attention import PAGE, Paged, attend_pages
from megallm.ops.cross_entropy import (
    Projection,
    Softmax,
    Targets,
    Upstream,
    linear_gradients,
    linear_statistics,
    logit_gradient_,
)
from megallm.ops.cross_entropy import (
    statistics as token_statistics,
)
from megallm.ops.kernels import KERNELS
from megallm.ops.moe_permute import combine, permute
from megallm.ops.nf4 import MatrixRange, Nf4
from megallm.ops.norm import add_rms_norm, layer_norm, rms_norm
from megallm.ops.rope import apply_rope, norm_rope, rope_tables

EPS, BF16 = 1e-5, torch.bfloat16
TOLERANCE = 2e-2  # of bf16, relative to the largest element


@dataclass(frozen=True)
class Sizes:
    """What the rows are made of: `full` fills an H200, `tiny` is for the emulation on a CPU."""

    tokens: int
    width: int
    ffn: int
    heads: int
    head_size: int
    vocab: int
    logits: int  # tokens of a chunk
    params: int
    experts_per_token: int
    sequences: int
    length: int  # positions in the cache of a sequence


SIZES = {
    "full": Sizes(16384, 4096, 14336, 32, 128, 128256, 1024, 2**28, 8, 64, 8192),
    "tiny": Sizes(5, 64, 24, 2, 16, 100, 3, 100, 2, 2, 40),
}


@dataclass(frozen=True)
class Case:
    """One row: `make(sizes, device, dtype)` returns what is run, and of which results are compared."""

    name: str
    make: Callable[[Sizes, torch.device, torch.dtype], Work]
    exact: bool = True  # compared with float64


@dataclass
class Work:
    """`run` is timed; `results` gives what it makes, of inputs in the dtype asked for."""

    run: Callable[[], object]
    results: Callable[[], Sequence[Tensor]]
    num_bytes: int = 0
    flops: int = 0


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers that are the same in any dtype: those of bf16."""
    draw = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=draw, device=device, dtype=torch.float32).to(BF16).to(dtype)


def forward(function: Callable, shapes: Callable, moved: Callable, s: Sizes, device, dtype) -> Work:
    inputs = [normal(*shape, device=device, dtype=dtype) for shape in shapes(s)]
    run = partial(function, *inputs)
    return Work(torch.no_grad()(run), lambda: _tuple(run()), moved(s) * inputs[0].element_size())


def backward(function: Callable, shapes: Callable, moved: Callable, s: Sizes, device, dtype) -> Work:
    inputs = [normal(*shape, device=device, dtype=dtype).requires_grad_() for shape in shapes(s)]
    made = _tuple(function(*inputs))
    upstream = [normal(*y.shape, device=device, dtype=y.dtype) for y in made]
    run = partial(torch.autograd.grad, made, inputs, upstream, retain_graph=True)
    return Work(run, run, moved(s) * inputs[0].element_size())


def _tuple(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def rows(s: Sizes) -> list[tuple[int, ...]]:
    return [(s.tokens, s.width), (s.width,)]


def heads(s: Sizes) -> list[tuple[int, ...]]:
    return [(1, s.tokens, s.heads, s.head_size)]


def rope_case(normed: bool, gradient: bool, s: Sizes, device, dtype) -> Work:
    """The tables are made before: they serve all layers."""
    positions = torch.arange(s.tokens, device=device)[None]
    cos, sin = rope_tables(positions, s.head_size, 1e4, torch.promote_types(dtype, torch.float32))

    def run(x: Tensor, *weight: Tensor) -> Tensor:
        return norm_rope(x, *weight, EPS, cos, sin) if normed else apply_rope(x, cos, sin)

    shapes = (lambda s: [*heads(s), (s.head_size,)]) if normed else heads
    values = s.tokens * s.heads * s.head_size
    moved = values * ((3 if normed else 2) if gradient else 2)
    return (backward if gradient else forward)(run, shapes, lambda s: moved, s, device, dtype)


def adamw_case(s: Sizes, device, dtype) -> Work:
    wide = torch.promote_types(dtype, torch.float32)
    sizes = [s.params // 4] * 4
    parts = [[normal(n + i, device=device, dtype=wide)[i:].contiguous() for i in range(4)] for n in sizes]
    states = [FlatState(p, g, m, v.square()) for p, g, m, v in parts]
    copies = [p.to(BF16 if dtype != torch.float64 else dtype) for p, *_ in parts]
    count, skip, clip = (torch.tensor(x, device=device) for x in (3.0, 0.0, 0.5))
    rule = AdamRule(1e-3, (0.9, 0.95), 1e-8, 0.1)
    run = partial(adamw_lists_, states, rule, count, skip, clip, copies)

    def results() -> list[Tensor]:
        run()
        return [x for state in states for x in (state.param, state.exp_avg, state.exp_avg_sq)] + copies

    return Work(run, results, 30 * sum(sizes))


def logits_case(gradient: bool, s: Sizes, device, dtype) -> Work:
    logits = normal(s.logits, s.vocab, device=device, dtype=dtype)
    labels = torch.arange(s.logits, device=device) * 7 % s.vocab
    targets, moved = Targets(labels), logits.numel() * logits.element_size()
    if not gradient:
        run = partial(token_statistics, logits, targets)
        return Work(run, lambda: [x for x in run() if x is not None], moved)
    lse = logits.to(torch.promote_types(dtype, torch.float32)).logsumexp(1)
    upstream = Upstream(normal(s.logits, device=device, dtype=lse.dtype))
    run = partial(logit_gradient_, logits, targets, Softmax(lse), upstream)
    return Work(run, lambda: [logit_gradient_(logits.clone(), targets, Softmax(lse), upstream)], 2 * moved)


def linear_case(s: Sizes, device, dtype) -> Work:
    """Forward and backward of the head; the logits are made twice, but counted once: 6 flops a weight and token."""
    hidden = normal(4 * s.logits, s.width, device=device, dtype=dtype)
    weight = (normal(s.vocab, s.width, device=device, dtype=dtype) * s.width**-0.5).requires_grad_()
    labels = torch.arange(len(hidden), device=device) * 7 % s.vocab
    upstream = torch.full((len(hidden),), -1.0, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def run() -> list[Tensor]:
        with torch.no_grad():
            found = linear_statistics(hidden, Projection(weight), Targets(labels))
            lse = found.top + found.total.log()
        made = linear_gradients(hidden, Projection(weight), Targets(labels), Softmax(lse), Upstream(upstream))
        return [lse - found.label, made.hidden, made.weight]

    return Work(run, run, flops=6 * hidden.numel() * s.vocab)


def moe_case(back: bool, gradient: bool, s: Sizes, device, dtype) -> Work:
    k, tokens = s.experts_per_token, max(1, s.tokens // 2)
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(tokens * k, generator=draw).to(device)
    weights = normal(tokens, k, device=device, dtype=torch.promote_types(dtype, torch.float32))
    one, many = tokens * s.width, tokens * k * s.width
    if not back:
        moved = one + many
        shapes, run = (lambda s: [(tokens, s.width)]), lambda x: permute(x, order, k)
    else:
        moved = 2 * many + one if gradient else many + one
        shapes, run = (lambda s: [(tokens * k, s.width)]), lambda y: combine(y, order, weights)
    return (backward if gradient else forward)(run, shapes, lambda s: moved, s, device, dtype)


def fp8_case(scaled: str, transposed: bool, s: Sizes, device, dtype) -> Work:
    """Both sides round the same numbers: compared as float32, without float64."""
    x = normal(s.tokens, s.width, device=device, dtype=BF16)
    scaling = fp8.Quantisation("e4m3", scaled, powers=scaled != "tensor")
    run = partial(fp8.quantised, x, scaling, transposed)
    reads = 2 if scaled == "tensor" else 1
    return Work(
        run,
        lambda: [fp8.dequantise(one, torch.float32) for one in run() if one],
        x.numel() * (2 * reads + 1 + transposed),
    )


def nf4_case(s: Sizes, device, dtype) -> Work:
    shape = (s.width, s.ffn // 64 * 64 or 64)
    stored = Nf4.of(
        normal(*shape, device=device, dtype=torch.float32), MatrixRange((0, shape[0]), (0, shape[1]), shape)
    )
    run = partial(stored.dequantize, BF16)
    return Work(run, lambda: [run()], stored.num_bytes + 2 * shape[0] * shape[1])


def paged_case(s: Sizes, device, dtype) -> Work:
    kv_heads, blocks = max(1, s.heads // 4), -(-s.length // PAGE)
    pools = [
        normal(kv_heads, s.sequences * blocks * PAGE, s.head_size + i, device=device, dtype=dtype)[
            ..., : s.head_size
        ].contiguous()
        for i in range(2)
    ]
    draw = torch.Generator().manual_seed(0)
    table = torch.randperm(s.sequences * blocks, generator=draw).view(s.sequences, blocks).to(device)
    lengths = torch.full((s.sequences,), s.length, device=device)
    q = normal(s.sequences, s.heads, s.head_size, device=device, dtype=dtype)
    run = partial(attend_pages, q, Paged(*pools, table, lengths))
    return Work(run, lambda: [run()], 2 * s.sequences * s.length * kv_heads * s.head_size * q.element_size())


def elementwise(factor: int) -> Callable[[Sizes], int]:
    return lambda s: factor * s.tokens * s.width


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def centred(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, EPS)


def added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return add_rms_norm(x, residual, weight, EPS)


def three(s: Sizes) -> list[tuple[int, ...]]:
    return [(s.tokens, s.width), (s.width,), (s.width,)]


def two_rows(s: Sizes) -> list[tuple[int, ...]]:
    return [(s.tokens, s.width), (s.tokens, s.width), (s.width,)]


def gates(s: Sizes) -> list[tuple[int, ...]]:
    return [(s.tokens // 2 + 1, 2 * s.ffn)]


def of_gates(factor: int) -> Callable[[Sizes], int]:
    return lambda s: factor * (s.tokens // 2 + 1) * s.ffn


CASES = [
    Case("rms_norm", partial(forward, normed, rows, elementwise(2))),
    Case("rms_norm backward", partial(backward, normed, rows, elementwise(3))),
    Case("add + rms_norm", partial(forward, added, two_rows, elementwise(4))),
    Case("add + rms_norm backward", partial(backward, added, two_rows, elementwise(4))),
    Case("layer_norm", partial(forward, centred, three, elementwise(2))),
    Case("layer_norm backward", partial(backward, centred, three, elementwise(3))),
    Case("rope", partial(rope_case, False, False)),
    Case("rope backward", partial(rope_case, False, True)),
    Case("rms_norm + rope", partial(rope_case, True, False)),
    Case("rms_norm + rope backward", partial(rope_case, True, True)),
    Case("swiglu", partial(forward, swiglu, gates, of_gates(3))),
    Case("swiglu backward", partial(backward, swiglu, gates, of_gates(5))),
    Case("adamw + clip + bf16 copy", adamw_case),
    Case("cross entropy statistics", partial(logits_case, False)),
    Case("cross entropy gradient", partial(logits_case, True)),
    Case("linear cross entropy", linear_case),
    Case("moe permute", partial(moe_case, False, False)),
    Case("moe permute backward", partial(moe_case, False, True)),
    Case("moe combine", partial(moe_case, True, False)),
    Case("moe combine backward", partial(moe_case, True, True)),
    Case("fp8 tensor + transpose", partial(fp8_case, "tensor", True), exact=False),
    Case("fp8 rows", partial(fp8_case, "row", False), exact=False),
    Case("fp8 1 x 128", partial(fp8_case, "block", False), exact=False),
    Case("fp8 128 x 128 + transpose", partial(fp8_case, "square", True), exact=False),
    Case("nf4 dequantise", nf4_case, exact=False),
    Case("paged decode attention", paged_case),
]


@contextmanager
def by_torch() -> Iterator[None]:
    mode, KERNELS.mode = KERNELS.mode, "reference"
    try:
        yield
    finally:
        KERNELS.mode = mode


def difference(case: Case, sizes: Sizes, device: torch.device) -> float:
    """Returns the largest difference from torch's form, relative to the largest element."""
    with by_torch():
        wanted = [
            x.detach().double() for x in case.make(sizes, device, torch.float64 if case.exact else BF16).results()
        ]
    found = [x.detach().double() for x in case.make(sizes, device, BF16).results()]
    assert len(found) == len(wanted), case.name
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-20)) for a, b in zip(found, wanted, strict=True))


def seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Returns the median of a call; between events on a GPU, where one round is several calls."""
    for _ in range(3):
        run()
    if device.type == "cpu":
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    calls, times = 5, []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls / 1000)
    return statistics.median(times)


def limits(device: torch.device, rounds: int, full: bool) -> tuple[float, float]:
    """Returns bytes a second of a copy, read and written, and flops a second of a bf16 product."""
    count, n = (2**29, 8192) if full else (2**12, 64)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target, matrix = torch.empty_like(source), torch.ones(n, n, dtype=BF16, device=device)
    copied = 8 * count / seconds(lambda: target.copy_(source), device, rounds)
    return copied, 2 * n**3 / seconds(lambda: matrix @ matrix, device, rounds)


@dataclass
class Row:
    name: str
    error: float
    microseconds: float
    torch_microseconds: float
    rate: float  # GB/s, or TFLOP/s of products
    share: float  # of the limit


def measure(case: Case, size: str, device: torch.device, rounds: int, limit: tuple[float, float]) -> Row:
    found = difference(case, SIZES["tiny"], device)
    work = case.make(SIZES[size], device, BF16)
    ours = seconds(work.run, device, rounds)
    with by_torch():
        theirs = seconds(case.make(SIZES[size], device, BF16).run, device, rounds)
    rate, most = (work.flops, limit[1]) if work.flops else (work.num_bytes, limit[0])
    unit = 1e12 if work.flops else 1e9
    return Row(case.name, found, 1e6 * ours, 1e6 * theirs, rate / ours / unit, rate / ours / most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    device = torch.device("cuda")
    KERNELS.mode = "native"  # without kernels there is nothing to measure: this says why
    limit = limits(device, args.rounds, full=True)
    copied, product = f"{limit[0] / 1e12:.2f} TB/s", f"{limit[1] / 1e12:.0f} TFLOP/s"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copied}, bf16 product {product}")
    print(f"{'':30} {'us':>9} {'torch us':>9} {'GB/s | TF':>10} {'of limit':>8} {'error':>8}")
    found = []
    for case in CASES:
        if args.only and not any(word in case.name for word in args.only):
            continue
        row = measure(case, "full", device, args.rounds, limit)
        found.append(row)
        times = f"{row.microseconds:9.1f} {row.torch_microseconds:9.1f}"
        print(f"{row.name:30} {times} {row.rate:10.0f} {row.share:8.1%} {row.error:8.1e}", flush=True)
        torch.cuda.empty_cache()
    if args.json:
        kept = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": limit[0], "product": limit[1]}
        args.json.write_text(json.dumps(kept | {"rows": [asdict(row) for row in found]}, indent=2))
    wrong = [row.name for row in found if not row.error <= TOLERANCE]
    if wrong:
        raise SystemExit(f"These differ from torch's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
