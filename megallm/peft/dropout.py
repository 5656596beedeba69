"""Dropout of an adapter's input and of the model's hidden states, the same at every layout: keyed
by sample, token and feature.

The keys of the microbatch that a stage runs lie in a context variable, which recomputation brings
back (`parallel.recompute`). Batches name the `samples`, int64 `[B, T]`, or `[S]` with one for each
sequence, and perhaps the `epochs` `[S]` that they are read in; `number_samples` gives rows their
numbers where the data has none. Without gradients nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.base.rng import key_of
from megallm.models.block import Block
from megallm.models.decoder import Stage
from megallm.ops.dropout import keyed_dropout, token_keys
from megallm.parallel import comm
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import TOKEN_KEYS
from megallm.parallel.tensor import SEQUENCE_DIM, ShardedModule, TokenLinear
from megallm.peft.slots import put

Batch = dict[str, Tensor]
HIDDEN = "hidden_dropout"  # in the slots of a model


class Dropout(NamedTuple):
    """A share of the features of a module's input; `first` is the number of this rank's first one,
    and with `own_tokens` it has only its own under sequence parallelism."""

    rate: float
    key: int
    first: int = 0
    own_tokens: bool = False

    @staticmethod
    def of(rate: float, seed: int, name: str, base: ShardedModule) -> Dropout | None:
        """Returns that of the adapter called `name` at `base`, a stage for its head; None for a
        rate of 0."""
        if not rate:
            return None
        first = 0
        if "weight" in base.shards:
            first = base.shards["weight"].box(base.mesh.layout, base.mesh.coords).offset[-1]
        own = base.sp and isinstance(base, TokenLinear | Stage)
        return Dropout(rate, key_of(seed, "dropout", name) % 2**64, first, own)

    def __call__(self, x: Tensor, module: ShardedModule | HiddenDropout) -> Tensor:
        """Returns `x [B, T, in]` with its share dropped, or as it is without gradients."""
        if not torch.is_grad_enabled():
            return x
        tokens = TOKEN_KEYS.get()
        if tokens is None:
            raise UsageError("Dropout needs the number of each sample in batches: `samples`.")
        if self.own_tokens:
            tokens = own_keys(tokens, module.mesh)
        return keyed_dropout(x, self.rate, self.key, tokens, self.first)


def own_keys(tokens: Tensor, mesh: Mesh) -> Tensor:
    """Returns the keys of this tp rank's part of the tokens, `[B, T] -> [B, T/tp]`."""
    return comm.own_slice(tokens, mesh.tp, SEQUENCE_DIM)


class HiddenDropout(nn.Module):
    """Dropout of what a sublayer adds to the hidden states, or of the embeddings; stands in a
    slot. In the reference model, and without gradients, nothing is dropped.
    """

    def __init__(self, stage: Stage, rate: float, seed: int, name: str) -> None:
        super().__init__()
        self.mesh = stage.mesh
        self.dropout = Dropout(rate, key_of(seed, HIDDEN, name) % 2**64, own_tokens=stage.sp)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Returns `y [B, T/cp/tp or T/cp, D]` with its share dropped."""
        return self.dropout(y, self)


def drop_hidden(stage: Stage, rate: float, seed: int) -> None:
    """Let a stage drop a share `rate` of its embeddings and of the outputs of attention and
    feed-forward layers before they are added to the residual stream, on the meta device; behind
    adapters that stand in the same slots.
    """
    slots = {"embedding": stage.after_embedding} if stage.span.first else {}
    for name, block in stage.named_modules():
        if isinstance(block, Block):
            slots[f"{name}.attention"] = block.after_attention
            slots[f"{name}.mlp"] = block.after_mlp
    for name, slot in slots.items():
        put(slot, HIDDEN, HiddenDropout(stage, rate, seed, name))
    watch_tokens(stage)


def keys_of(batch: Batch) -> Tensor:
    """Returns the keys int64 `[B, T]` of a microbatch's tokens."""
    samples, epochs = at_tokens(batch, "samples", -1), None
    if "epochs" in batch:
        epochs = at_tokens(batch, "epochs", 0)
    return token_keys(samples, batch["positions"], epochs)


def at_tokens(batch: Batch, name: str, padding: int) -> Tensor:
    """Returns numbers of the sequences of a microbatch, `[S]`, at each of their tokens `[B, T]`; as
    they are where they are that already. What follows the last sequence of a row has `padding`.
    """
    values, shape = batch[name], batch["tokens"].shape
    if values.shape == shape:
        return values
    if "cu_seqlens" not in batch:
        return values[:, None].expand(shape)
    lengths = batch["cu_seqlens"].to(torch.int64).diff().to(values.device)
    more = values.new_full((max(0, len(lengths) - len(values)),), padding)
    return torch.cat((values, more)).repeat_interleave(lengths)[None]


def watch_tokens(stage: Stage) -> None:
    """Let a stage note the keys of the tokens of each microbatch that it runs."""

    def note(stage: Stage, inputs: tuple[Any, ...]) -> None:
        batch, keys = inputs[1], None
        if "samples" in batch:
            keys = stage.context.local(keys_of(batch))
        TOKEN_KEYS.set(keys)

    stage.register_forward_pre_hook(note)


def number_samples(batches: Sequence[Batch], first: int) -> list[Batch]:
    """Returns microbatches whose rows have the numbers from `first` on as `samples`, where they
    have none.

    `first` is the number of this data rank's first row, counted over the whole run: then every
    layout that reads the same rows drops the same.
    """
    made = []
    for batch in batches:
        rows = batch["tokens"].shape[0]
        numbers = torch.arange(first, first + rows)
        made.append({"samples": numbers.to(batch["tokens"].device)} | batch)
        first += rows
    return made
