"""The tokens and masks of an oracle row: the global batch, and one data rank's share of it."""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.oracle.table import Row
from megallm.oracle.trainers import DISTILLED, PAIRED, STORED_CLASSES

Batch = dict[str, Tensor]
PER_SEQUENCE = (
    "margin",
    "desirable",
    "reference_point",
    "advantages",
    "returns",
    "samples",
)


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
        if row.loss_name in PAIRED:
            _make_even(starts)
        begin = torch.where(starts, places, 0).cummax(1).values
        batch |= {"documents": starts.cumsum(1), "positions": places - begin}
    if row.trainer != "pretrain":
        return batch | _of_sequences(row, batch, draw)
    return batch | _extras(row, batch, draw)


def _make_even(starts: Tensor) -> None:
    """Take a document away from each row `[T]` that has an odd number, or add one to one."""
    for row in starts:
        if int(row.sum()) % 2:
            places = row.nonzero()[:, 0]
            row[places[-1] if len(places) > 1 else len(row) // 2] = len(places) == 1


def _of_sequences(row: Row, batch: Batch, draw: torch.Generator) -> Batch:
    """Returns what the losses of `trainers` read: log-probs of other policies as data, and, at each
    of its tokens, what belongs to a sequence.
    """
    shape = batch["tokens"].shape
    documents = batch.get("documents", torch.ones_like(batch["tokens"]))
    mask = batch["mask"].clone()
    if row.packed:  # the last label of a document is the first token of the next one
        inside = documents[:, 1:] == documents[:, :-1]
        mask[:, :-1] &= inside if (mask[:, :-1] & inside).any() else True

    def numbers(shift: float) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64) + shift

    def of_sequence(x: Tensor) -> Tensor:
        return x.gather(1, documents - 1)

    if row.loss_name == "bradley_terry":
        mask = _last_tokens(mask, documents)
    dropped = {}
    if row.hidden_dropout:  # not always: virtual tokens would have to have samples too
        dropped["samples"] = documents + 16 * torch.arange(shape[0])[:, None]
    if row.loss_name in DISTILLED and DISTILLED[row.loss_name].teacher == "stored":
        dropped |= stored_top(row.config.vocab_size, shape, draw)
    return dropped | {
        "mask": mask,
        "ref_log_probs": numbers(-4.5),
        "old_log_probs": numbers(-4.5) / 2 - 2,
        "margin": of_sequence(numbers(0.0)),
        "advantages": of_sequence(numbers(0.0)),
        "desirable": of_sequence(numbers(0.0)) > 0,
        "reference_point": torch.full(shape, 0.37, dtype=torch.float64),
        "returns": of_sequence(numbers(0.5)),
        "rewards": numbers(0.0),
        "target_q": numbers(0.0) / 4,
    }


def stored_top(vocab: int, shape: torch.Size, draw: torch.Generator) -> Batch:
    """Ids and log-probs `[B, T, K]` of the likeliest entries of distributions that are drawn, as a
    teacher would have stored them.
    """
    logits = torch.randn(*shape, vocab, generator=draw, dtype=torch.float64)
    top, ids = torch.log_softmax(2 * logits, -1).topk(STORED_CLASSES, -1)
    return {"teacher_ids": ids, "teacher_log_probs": top}


def _last_tokens(mask: Tensor, documents: Tensor) -> Tensor:
    """True at one token of each sequence of a pair of which any token counts: its last one that
    does, or its last one.
    """
    found = [(row, own == n) for row, own in enumerate(documents) for n in own.unique()]
    scored = torch.zeros_like(mask)
    for pair in zip(found[::2], found[1::2], strict=True):
        if any((mask[row] & inside).any() for row, inside in pair):
            for row, inside in pair:
                counted = mask[row] & inside
                scored[row, (counted if counted.any() else inside).nonzero()[-1]] = True
    return scored


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
    if row.mask == "answer":
        places = torch.arange(length)
        begin = torch.randint(0, length // 2, (rows, 1), generator=draw)
        end = torch.randint(length // 2 + 1, length + 1, (rows, 1), generator=draw)
        mask = (places >= begin) & (places < end)
        mask[1:] &= torch.rand(rows - 1, 1, generator=draw) > 0.15  # here and there an empty row
    elif row.mask != "one":
        chance = torch.arange(1, rows + 1)[:, None] / (rows + 1)
        mask = torch.rand(rows, length, generator=draw) < chance
    if row.mask == "rank":
        mask[: rows // row.layout.dp] = False
    if row.mask == "micro":
        mask.view(row.layout.dp, row.micros, -1)[:, -1] = False
    mask[always, length // 2] = True
    return mask


def micro_batches(
    row: Row, step: int, data_rank: int, broken: frozenset[str] = frozenset()
) -> list[Batch]:
    """Returns the micro batches `[micro_batch, T]` of a data rank: a contiguous block of the global
    batch.

    What belongs to a sequence becomes `[S]`, S the rows or documents of a micro batch.
    """
    whole = global_batch(row, step)
    if "pairs.split" in broken:
        whole = {key: value.roll(1, 0) for key, value in whole.items()}
    if "target.sign" in broken:
        whole = whole | {"target_q": -whole["target_q"]}
    share = row.micros * row.micro_batch
    block = {
        key: value[data_rank * share : (data_rank + 1) * share] for key, value in whole.items()
    }
    pieces = {key: value.split(row.micro_batch) for key, value in block.items()}
    micros = [{key: value[micro] for key, value in pieces.items()} for micro in range(row.micros)]
    if row.packed:
        micros = [micro | {"cu_seqlens": _ends(micro["documents"])} for micro in micros]
    return [_by_sequence(micro) for micro in micros]


def _by_sequence(micro: Batch) -> Batch:
    """The micro batch with one number for each sequence of what belongs to a sequence."""
    given = [name for name in PER_SEQUENCE if name in micro]
    if "cu_seqlens" not in micro:
        return micro | {name: micro[name][:, 0] for name in given}
    return micro | {name: micro[name][0, micro["cu_seqlens"][:-1].long()] for name in given}


def _ends(documents: Tensor) -> Tensor:
    """cu_seqlens int32 `[n+1]` of one packed row `[1, T]`."""
    lengths = documents[0].bincount()[1:]
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
