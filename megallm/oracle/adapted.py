"""Engines of the oracle's rows that train an adapter: how they start, and what must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megallm.base.rng import key_of
from megallm.engine.engine import Engine
from megallm.models.build import initial_values
from megallm.models.decoder import Stage
from megallm.models.parallel_model import Prepare
from megallm.ops import nf4
from megallm.oracle.reference_adapters import MARK, lengths
from megallm.oracle.table import Row
from megallm.oracle.trainers import ADALORA_STEPS, ADAPTERS
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Box, Shard, constant, normal
from megallm.peft import adalora, dropout, lora
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from megallm.peft.start import start_from_base

START = 0.2  # in place of zeros: at the identity many gradients vanish
MAGNITUDE = ".lora_magnitude_vector"


def prepare_row(row: Row) -> Prepare:
    """Returns what fills the slots of the row's model."""
    adapter = PeftConfig(**ADAPTERS[row.adapter]) if row.adapter else PeftConfig()
    fill = prepare_adapters(adapter, row.config, row.seed)

    def prepare(stage: Stage) -> None:
        fill(stage)
        if row.hidden_dropout:
            dropout.drop_hidden(stage, row.hidden_dropout, row.seed)

    return prepare


def dropout_of(row: Row) -> dict[str, Any]:
    """Returns what `reference_dropout` reads; nothing for a row without dropout."""
    if not row.hidden_dropout:
        return {}

    def key(place: str) -> int:
        return key_of(row.seed, dropout.HIDDEN, place) % 2**64

    return {"dropout": {"rate": row.hidden_dropout, "key": key}}


def start(engine: Engine, row: Row) -> None:
    """Give a new engine's adapters values at which every part of them acts; collective."""
    if row.adapter is None:
        return
    engine.parameters.wait_and_reshard()
    for name, shard, box, tensor in engine.masters():
        tensor.copy_(first_values(name, shard, box, row.seed))
    engine.parameters.publish()
    start_from_base(engine)
    if ADAPTERS[row.adapter]["method"] == "adalora":
        adalora.attach(engine, PeftConfig(**ADAPTERS[row.adapter]), ADALORA_STEPS)


def first_values(name: str, shard: Shard, box: Box, seed: int) -> Tensor:
    """A box of a parameter's start; an adapter that would start at zero does not."""
    if MARK in name and shard.init == constant(0.0):
        shard = replace(shard, init=normal(START))
    return initial_values(name, shard, box.offset, box.shape, seed)


def rounded(matrices: Tensor) -> Tensor:
    """The values `(*stack, R, C)` that a base in 4 bit has."""
    rows, columns = matrices.shape[-2:]
    piece = nf4.MatrixRange((0, rows), (0, columns), (rows, columns))
    flat = matrices.float().view(-1, rows, columns)
    made = [nf4.Nf4.of(one, piece).dequantize(torch.float64) for one in flat]
    return torch.stack(made).view_as(matrices)


def with_magnitudes(row: Row, logical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in which DoRA's magnitudes are the lengths that they start as."""
    if row.adapter is None:
        return dict(logical)
    return dict(logical) | lengths(ADAPTERS[row.adapter], logical)


def equal_start(name: str, mine: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, but for lengths, which ranks sum in another order."""
    if name.endswith(MAGNITUDE):
        return torch.allclose(mine, theirs, rtol=1e-13, atol=0.0)
    return torch.equal(mine.double(), theirs)


def touch_frozen(engine: Engine, trained: frozenset[str]) -> None:
    """The mistake `frozen.touched`: flip the last bit of the first frozen weight of this rank."""
    engine.parameters.wait_and_reshard()
    for name, _, _, tensor in engine.masters():
        if name not in trained and tensor.numel():
            flat = tensor.view(-1)
            flat[0] = torch.nextafter(flat[0], flat[0] + 1)
            break
    engine.parameters.publish()


@contextmanager
def mistakes(broken: frozenset[str]) -> Iterator[None]:
    """Inside, adapters are built with the mistakes of `broken`."""
    right, own_keys = lora._record, dropout.own_keys

    def first_keys(tokens: Tensor, mesh: Mesh) -> Tensor:
        return tokens[:, : tokens.shape[1] // mesh.tp.size]

    def whole(
        full: tuple[int, ...], dim: int, axis: str | None, *further: object, **named: object
    ) -> Shard:
        return replace(right(full, dim, axis, *further, **named), partial=())

    keys = first_keys if "dropout.keys" in broken else own_keys
    with (
        patch.object(lora, "_record", whole if "lora.partial" in broken else right),
        patch.object(dropout, "own_keys", keys),
    ):
        yield
