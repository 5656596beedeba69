"""What `test_triton_attention` runs in a process of its own: the kernels by Triton's interpreter, which is chosen
when Triton is imported (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from unittest.mock import patch

import torch

from megallm.ops import flash
from megallm.ops import triton_attention as kernels
from megallm.ops.attention import packed_attention
from megallm.ops.tiles import MaskSpec, Span, plan_tiles
from tests.ops.test_attention import dense_mask, gradients, plain_attention, sunk_attention, tensors

CASES = [
    (MaskSpec((0, 100)), 2, 6), (MaskSpec((0, 21, 64, 100), 17), 2, 10), (MaskSpec((0, 40, 100), None, False), 4, 6),
]  # fmt: skip


def values_and_gradients(mask_spec: MaskSpec, kv_heads: int, value_size: int) -> None:
    leaves = tensors(100, 4, kv_heads, value_size=value_size, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, got = plain_attention(*exact, dense_mask(mask_spec)), packed_attention(*leaves, mask_spec)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6)
    for mine, theirs in zip(gradients(got, leaves), gradients(want, exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def sinks_and_a_shared_prefix() -> None:
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


def tiles_of_one_rank_are_one_plan() -> None:
    """A row is one launch; queries that see two runs of keys, as in a ring, are two."""
    cpu = torch.device("cpu")
    row, back = (Span(0, 96),), (Span(0, 24, 0), Span(72, 96, 24))
    for mask_spec in (MaskSpec((0, 30, 96)), MaskSpec((0, 96), 10)):
        assert len(kernels.intervals_of(plan_tiles(row, row, mask_spec, False), 96, 96, cpu)) == 1
        assert len(kernels.intervals_of(plan_tiles(row, row, mask_spec), 96, 96, cpu)) == 1
    tiles = plan_tiles(back, (Span(0, 24, 24), Span(72, 96, 0)), MaskSpec((0, 96)))
    assert len(kernels.intervals_of(tiles, 48, 48, cpu)) == 2


def main() -> None:
    with patch.object(flash, "executor_of", lambda *_: flash.TRITON):
        for case in CASES:
            values_and_gradients(*case)
        sinks_and_a_shared_prefix()
        tiles_of_one_rank_are_one_plan()


if __name__ == "__main__":
    main()
