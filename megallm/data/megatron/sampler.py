"""Which samples each data-parallel rank reads in each step. Pure: nothing to save but the samples
consumed.
"""

from __future__ import annotations

from megallm.base.errors import UsageError


def rows_after(
    consumed: int,
    global_batch: int,
    micro_batch: int,
    dp_size: int,
    dp_rank: int,
    strided: bool = False,
) -> list[list[int]]:
    """Returns sample numbers of the global batch that follows `consumed` samples, as
    [microbatches][micro_batch].

    Each rank reads a contiguous block of the global batch, so that the order of a tree of sums does
    not depend on dp_size. `strided` is Megatron-LM's order: microbatch m of all ranks is one
    contiguous block.
    """
    if min(global_batch, micro_batch, dp_size) < 1 or global_batch % (micro_batch * dp_size):
        share = max(micro_batch, 1) * max(dp_size, 1)
        nearest = sorted(
            {max(share, global_batch // share * share), (global_batch // share + 1) * share}
        )
        raise UsageError(
            f"train.global_batch {global_batch} must be a multiple of train.micro_batch "
            f"{micro_batch} x dp {dp_size}; nearest: {', '.join(map(str, nearest))}."
        )
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is not in range({dp_size}).")
    micros = global_batch // (micro_batch * dp_size)
    if strided:
        first, stride = consumed + dp_rank * micro_batch, micro_batch * dp_size
    else:
        first, stride = consumed + dp_rank * micros * micro_batch, micro_batch
    return [
        list(range(first + m * stride, first + m * stride + micro_batch)) for m in range(micros)
    ]
