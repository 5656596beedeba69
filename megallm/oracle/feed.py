"""The tokens and masks of an oracle row: the global batch, and one data rank's share of it."""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.oracle.table import Row

Batch = dict[str, Tensor]


def global_batch(row: Row, step: int) -> Batch:
    """`tokens labels positions mask` of one step, each `[dp * micros * micro_batch, T]`; the same
    everywhere.

    A packed row also has `documents`, the number of each token's document.
    """
    rows, length = row.layout.dp * row.micros * row.micro_batch, row.seq_len
    draw = torch.Generator().manual_seed(row.seed * 1000 + step)
    tokens = torch.randint(row.config.vocab_size, (rows, length + 1), generator=draw)
    places = torch.arange(length).expand(rows, length)
    jumps = (places >= length // 2) * (torch.arange(rows) % 4)[
        :, None
    ]  # so that positions are not just 0, 1, 2, ...
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "positions": places + jumps,
        "mask": _mask(row, rows, length, draw),
    }
    if row.packed:
        starts = torch.rand(rows, length, generator=draw) < 0.3
        starts[:, 0] = True
        begin = torch.where(starts, places, 0).cummax(1).values
        batch |= {"documents": starts.cumsum(1), "positions": places - begin}
    return batch | _extras(row, batch, draw)


def _extras(row: Row, batch: Batch, draw: torch.Generator) -> Batch:
    """Returns what encoders and other heads read besides: types of tokens, classes as labels,
    targets, weights, even masks.
    """
    shape, extras = batch["tokens"].shape, {}
    if row.config.token_types:
        extras["token_types"] = torch.randint(row.config.token_types, shape, generator=draw)
    if row.config.head == "classification":
        extras["labels"] = torch.randint(row.config.num_labels, shape, generator=draw)
    if row.config.head == "value":
        extras["targets"], extras["old_values"] = torch.randn(
            2, *shape, generator=draw, dtype=torch.float64
        )
    if row.loss_name == "diffusion":
        hidden = torch.rand(shape, generator=draw) < 0.6
        extras["weight"] = (
            torch.rand(shape, generator=draw, dtype=torch.float64).add(0.1).reciprocal() * hidden
        )
    if row.loss_name == "reward":
        mask = batch["mask"].clone().view(-1, row.micro_batch * row.seq_len)
        for micro in mask:
            if micro.sum() % 2:
                micro[(~micro).nonzero()[0]] = True
        extras["mask"] = mask.view(shape)
    return extras


def _mask(row: Row, rows: int, length: int, draw: torch.Generator) -> Tensor:
    """Bool `[rows, T]` of the row's kind (`table.MASKS`); at least one token counts."""
    if row.mask == "full":
        return torch.ones(rows, length, dtype=torch.bool)
    always = (row.layout.dp - 1) * row.micros * row.micro_batch  # first row of the last data rank
    mask = torch.zeros(rows, length, dtype=torch.bool)
    if row.mask != "one":
        chance = torch.arange(1, rows + 1)[:, None] / (rows + 1)
        mask = torch.rand(rows, length, generator=draw) < chance
    if row.mask == "rank":
        mask[: rows // row.layout.dp] = False
    if row.mask == "micro":
        mask.view(row.layout.dp, row.micros, -1)[:, -1] = False
    mask[always, length // 2] = True
    return mask


def micro_batches(row: Row, step: int, data_rank: int) -> list[Batch]:
    """Returns the micro batches `[micro_batch, T]` of a data rank: a contiguous block of the global
    batch.
    """
    whole = global_batch(row, step)
    share = row.micros * row.micro_batch
    block = {
        key: value[data_rank * share : (data_rank + 1) * share] for key, value in whole.items()
    }
    pieces = {key: value.split(row.micro_batch) for key, value in block.items()}
    micros = [{key: value[micro] for key, value in pieces.items()} for micro in range(row.micros)]
    return [
        micro | {"cu_seqlens": _ends(micro["documents"])} if row.packed else micro
        for micro in micros
    ]


def _ends(documents: Tensor) -> Tensor:
    """cu_seqlens int32 `[n+1]` of one packed row `[1, T]`."""
    lengths = documents[0].bincount()[1:]
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
