"""Bytes of what an engine keeps between steps: planned from numbers of parameters, and measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from megallm.base.device import GIB
from megallm.engine.engine import Engine
from megallm.ops.nf4 import BLOCK, OUTER_BLOCK
from megallm.ops.precision import wide_dtype


class Footprint(NamedTuple):
    """Bytes of one rank by kind, and the parameters of its stages that are frozen and trained;
    `quantized` bytes and parameters of the frozen ones are held in 4 bit.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    frozen_params: int
    trained_params: int
    quantized: int = 0
    quantized_params: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return self.frozen + self.trained + self.gradients + self.optimizer

    def lines(self) -> list[str]:
        """Returns a sentence for each kind: what is printed when training starts."""
        rest = self.trained + self.gradients + self.optimizer
        kinds = ("frozen", self.frozen, self.frozen_params), ("trained", rest, self.trained_params)
        found = [
            f"{name}: {params:,} parameters, {_size(count)}, {count / params:.2f} bytes each"
            for name, count, params in kinds
            if params
        ]
        if self.quantized_params:
            found[0] += (
                f" ({self.quantized_params:,} of them in 4 bit, {_size(self.quantized)}, "
                f"{self.quantized / self.quantized_params:.3f} bytes each)"
            )
        if self.trained_params:
            found[-1] += (
                f" (weights {_size(self.trained)}, gradients {_size(self.gradients)}, "
                f"optimizer {_size(self.optimizer)})"
            )
        return found


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def measure_bytes(engine: Engine) -> Footprint:
    """Returns what the storages take that are alive now on this rank, each counted once; at ZeRO
    stage 3 to be called where no weights are gathered.
    """
    buckets, states = engine.parameters.flat, engine.optimizer.states.values()
    frozen = [x for b in buckets if b.frozen for x in (b.params, b.weights)]
    trained = [x for b in buckets if not b.frozen for x in (b.params, b.weights)]
    master = [b.master for b in engine.parameters.trainable if b.master is not b.weights]
    quantized = sum(weight.num_bytes for weight in engine.model.quantized.values())
    return Footprint(
        _bytes(frozen) + quantized,
        _bytes(trained),
        _bytes(b.grads for b in engine.parameters.trainable),
        _bytes(master) + _bytes(x for flats in states for x in flats.values()),
        *_counts(engine),
        quantized,
        _quantized_params(engine),
    )


def plan_bytes(engine: Engine) -> Footprint:
    """Returns the same from numbers of parameters and the settings, without what aligns them.

    bf16 with Adam: 2 bytes frozen, 18 trained (2 weights, 4 gradients, 12 master and moments),
    0.516 in 4 bit; what ZeRO divides is divided.
    """
    narrow, wide = engine.model.dtype.itemsize, wide_dtype(engine.model.dtype).itemsize
    stage = engine.config.zero.stage
    held = {True: 0.0, False: 0.0}  # elements of parameters, whole and divided, by whether frozen
    parts = {True: 0.0, False: 0.0}
    for bucket in engine.parameters.flat:
        numel = sum(member.numel for member in bucket.plan.members)
        held[bucket.frozen] += numel
        parts[bucket.frozen] += numel / bucket.shard.size
    kept = parts if stage == 3 else held
    moments = len(engine.optimizer.states) + (narrow != wide)
    in_bits = _quantized_params(engine)
    each = 0.5 + (1 + 4 / OUTER_BLOCK) / BLOCK
    frozen, trained = _counts(engine)
    return Footprint(
        round(narrow * kept[True] + each * in_bits),
        round(narrow * kept[False]),
        round(wide * (parts if stage >= 2 else held)[False]),
        round(wide * moments * parts[False]),
        frozen,
        trained,
        round(each * in_bits),
        in_bits,
    )


def _quantized_params(engine: Engine) -> int:
    return sum(weight.numel for weight in engine.model.quantized.values())


def _counts(engine: Engine) -> tuple[int, int]:
    shapes, params = engine.parameters.shapes, engine.parameters.params
    trained = sum(shape.numel() for name, shape in shapes.items() if params[name].requires_grad)
    return engine.num_local_params() - trained + _quantized_params(engine), trained


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind tensors, each once."""
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())
