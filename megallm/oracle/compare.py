"""One row of the oracle: train it inside ranks, train the reference here, and say how far apart
they are.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megallm.base.errors import Hang, InternalError, PeerLost
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.engine.state import Piece
from megallm.losses.language import NextToken
from megallm.losses.terms import Loss
from megallm.models.compute import ComputeConfig
from megallm.ops import cross_entropy
from megallm.ops.low_precision import Fp8Options
from megallm.ops.precision import MODEL_DTYPES
from megallm.optim import adafactor, buckets, elementwise
from megallm.optim.config import GroupConfig, OptimConfig, ZeroConfig
from megallm.oracle import adapted, distilled, sampled
from megallm.oracle import reference_rules as rules
from megallm.oracle.feed import global_batch, micro_batches
from megallm.oracle.objectives import LOSSES, Doubled
from megallm.oracle.pool import Pool
from megallm.oracle.reference import Rule, Trainer, masked_loss
from megallm.oracle.reference_adapters import MARK, Budget, adapted_loss
from megallm.oracle.reference_encoder import loss_named
from megallm.oracle.reference_fp8 import Fp8Loss
from megallm.oracle.table import Row
from megallm.oracle.trainers import ADALORA_STEPS, ADAPTERS
from megallm.parallel.config import LayoutConfig
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Box, Shard

# Three steps in fp32 lose up to 5e-5 (seen with SSE, AVX2 and AVX-512); a wrong matrix of an expert
# shows by 3e-3 and more.
TOLERANCES = {"fp64": 1e-9, "fp32": 3e-4}
FLOOR = 1e-6  # some gradients (a key bias's) are zero in exact arithmetic: below this share of the norm, nothing counts
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
ROW_SECONDS = 120.0
SMALL_BUCKET_BYTES = 4096  # several buckets a stage of these models

Pieces = list[tuple[str, Box, Tensor]]  # logical name, and a box of it that one rank holds


@dataclass
class StepRecord:
    """What one rank saw of one step; gradients are reduced and not clipped."""

    loss: float
    grad_norm: float
    grads: Pieces
    drawn: sampled.Drawn = field(default_factory=list)


@dataclass
class RankRecord:
    """What one rank hands back; `state` are the records of tensors that have no gradient and begin
    at zero.
    """

    shards: dict[str, Shard]
    state: dict[str, Shard]
    initial: Pieces
    quantized: tuple[str, ...] = ()  # weights held in 4 bit
    steps: list[StepRecord] = field(default_factory=list)
    final: Pieces = field(default_factory=list)


@dataclass
class Verdict:
    """Errors of one row, each relative to max(max|reference|, FLOOR * grad_norm); infinite where
    not finite.
    """

    row: Row
    initial: bool = False
    touched: list[str] = field(default_factory=list)  # frozen weights that are not what they were
    loss: float = math.inf
    grads: dict[str, float] = field(default_factory=dict)
    grad_norm: float = math.inf
    weights: dict[str, float] = field(default_factory=dict)
    rollout: float = 0.0  # nats between the log-probs of what was sampled
    seconds: float = 0.0
    problem: str | None = None
    device: str = "cpu"

    @property
    def passed(self) -> bool:
        errors = [self.loss, self.grad_norm, *self.grads.values(), *self.weights.values()]
        errors.append(self.rollout)
        return (
            self.problem is None
            and self.initial
            and not self.touched
            and all(error <= self.tolerance for error in errors)
        )

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.row.precision]

    @property
    def failures(self) -> list[str]:
        """Returns what is out of tolerance, the worst first, in words."""
        if self.problem is not None:
            return [self.problem.splitlines()[0]] + [
                line for line in self.problem.splitlines() if "Error: " in line
            ]
        named = {"loss": self.loss, "grad_norm": self.grad_norm}
        named["log-probs of the rollout"] = self.rollout
        named |= {f"gradient of {k}": v for k, v in self.grads.items()}
        named |= {f"weight {k}": v for k, v in self.weights.items()}
        bad = sorted(
            ((error, what) for what, error in named.items() if not error <= self.tolerance),
            reverse=True,
        )
        start = [] if self.initial else ["initial weights differ"]
        start += [f"frozen {name} was touched" for name in self.touched]
        return start + [f"{what} off by {error:.1e}" for error, what in bad]


# Settings under which every term of the update acts; a large eps keeps noise in zero gradients
# small.
_MOMENTS = {"betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.3}
_MUON = {"momentum": 0.7, "nesterov": True, "ns_steps": 5, "update_scale": "rms"}
RULE_SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": _MOMENTS,
    "adam": _MOMENTS,
    "sgd": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.3},
    "adagrad": {"eps": 1e-5, "weight_decay": 0.3},
    "rmsprop": {"smoothing": 0.8, "eps": 1e-5, "momentum": 0.6, "weight_decay": 0.3},
    "lion": {"betas": (0.8, 0.9), "weight_decay": 0.3},
    "adafactor": {
        "decay_power": 0.7,
        "update_clip": 0.8,
        "eps": 1e-8,
        "min_scale": 0.4,
        "weight_decay": 0.3,
    },
    "muon": _MOMENTS | _MUON,
}


def optim_config(row: Row) -> OptimConfig:
    """Returns the settings of a row's update rule."""
    groups = tuple(GroupConfig(pattern, frozen=True) for pattern in row.frozen)
    return OptimConfig(rule=row.rule, clip=row.clip, groups=groups, **RULE_SETTINGS[row.rule])


def reference_rule(row: Row) -> Rule:
    """Returns the independent implementation of a row's update rule."""
    clip, values = row.clip, RULE_SETTINGS[row.rule]
    made = {
        "adamw": lambda: rules.Adam(clip=clip, **values),
        "adam": lambda: rules.Adam(clip=clip, decoupled=False, **values),
        "sgd": lambda: rules.Sgd(clip=clip, **values),
        "adagrad": lambda: rules.Quotient(None, 0.0, clip=clip, **values),
        "rmsprop": lambda: rules.Quotient(clip=clip, **values),
        "lion": lambda: rules.Lion(clip=clip, **values),
        "adafactor": lambda: rules.Adafactor(clip=clip, **values),
        "muon": lambda: rules.Muon(**_MUON, rest=rules.Adam(clip=clip, **_MOMENTS)),
    }
    return made[row.rule]()


def trained_loss(row: Row) -> Loss:
    """Returns the loss of the row's model, with its further tokens."""
    mtp = row.config.mtp
    return NextToken(mtp.depth, mtp.weight) if mtp.depth else LOSSES[row.loss_name]


def compute_config(row: Row) -> ComputeConfig:
    """Returns the row's precision and activation checkpointing."""
    return ComputeConfig(
        precision="fp8" if row.fp8 else row.precision,
        fp8=Fp8Options(row.fp8) if row.fp8 else Fp8Options(),
        recompute=row.recompute,
        recompute_modules=row.recompute_modules,
        recompute_layers=row.recompute_layers,
        offload=row.offload,
        fused_head=row.fused_head,
        determinism="tree" if row.tree else "none",
    )


def engine_config(row: Row) -> EngineConfig:
    """Returns what the row's engine is built from."""
    layout = LayoutConfig(
        sp=row.sp, schedule=row.schedule, chunks=row.chunks, stages=row.stages,
        cp_kind=row.cp_kind, cp_ulysses=row.cp_ulysses,
    )  # fmt: skip
    zero, compute = ZeroConfig(row.zero, row.shard_size), compute_config(row)
    return EngineConfig(row.config, layout, zero, optim_config(row), compute, row.seed)


@contextmanager
def small_pieces() -> Iterator[None]:
    """Inside, the fused head takes 3 tokens at once, each in a block of its own, and updates take
    160 elements.

    The sizes are constants of modules, made for caches and not for users; the models here are far
    below them.
    """
    with (
        patch.multiple(cross_entropy, CHUNK_BYTES=0, MIN_TOKENS=3, BLOCK_BYTES=0),
        patch.multiple(elementwise, CHUNK=160),
        patch.multiple(adafactor, CHUNK=160),
        patch.multiple(buckets, BUCKET_BYTES=SMALL_BUCKET_BYTES),
    ):
        yield


def train_rank(row: Row, broken: frozenset[str], device: str = "cpu") -> RankRecord:
    """Returns the rank's side, run by the pool: build the engine, train, and copy out what this
    rank holds.
    """
    # FP8's rows leave everything but the linears in the row's precision, not in bf16 as runs do.
    with (
        adapted.mistakes(broken),
        small_pieces() if row.small_pieces else nullcontext(),
        patch.dict(MODEL_DTYPES, fp8=DTYPES[row.precision]),
    ):
        return _train(row, broken, device)


def _train(row: Row, broken: frozenset[str], device: str) -> RankRecord:
    critic = "critic.reduce" in broken and row.loss_name == "critic"
    mesh = Mesh.start(row.layout, device, broken | {"grads.data"} if critic else broken)
    engine = Engine.build(engine_config(row), mesh, adapted.prepare_row(row))
    adapted.start(engine, row)
    state = {name: Shard(tuple(bias.shape)) for name, bias in engine.model.selection_biases()}
    held = engine.model.quantized
    shards = dict(engine.parameters.shards) | {name: each.shard for name, each in held.items()}
    in_bits = [(name, each.box, each.dequantize(torch.float64)) for name, each in held.items()]
    teaching = distilled.Teaching(engine, row, engine_config(row))
    record = RankRecord(shards, state, _copies(engine.masters()) + in_bits, tuple(held))
    loss, before = trained_loss(row), None
    loss = Doubled(loss) if "counts.doubled" in broken else loss
    for step in range(row.steps):
        drawn = sampled.draw(engine, row, step) if row.rollout else []
        batches = teaching.taught(micro_batches(row, step, mesh.data.rank, broken))
        stats = engine.train_step(batches, loss, row.rates[step % len(row.rates)])
        scale = min(1.0, row.clip / (stats.grad_norm + 1e-6)) if row.clip > 0 else 1.0
        grads = [(name, box, grad / scale) for name, box, grad in _copies(engine.gradients())]
        told = before or drawn if "rollout.stale" in broken else drawn
        record.steps.append(StepRecord(stats.loss, stats.grad_norm, grads, told))
        before = drawn
        if step == 0 and "frozen.touched" in broken:
            adapted.touch_frozen(engine, frozenset(name for name, _, _ in grads))
    record.final = _copies(engine.masters())
    record.final += [(name, each.box, each.dequantize(torch.float64)) for name, each in held.items()]
    biases, dtype = engine.model.selection_biases(), DTYPES[row.precision]
    record.final += [(k, Box((0,), state[k].full), v.to(dtype).cpu()) for k, v in biases]
    return record


def _copies(held: Iterator[Piece]) -> Pieces:
    return [(piece.name, piece.box, piece.tensor.detach().clone().cpu()) for piece in held]


def run_row(
    pool: Pool, row: Row, broken: frozenset[str] = frozenset(), device: str = "cpu"
) -> Verdict:
    """Train the row on the pool's ranks and compare; a rank that fails or hangs becomes the
    verdict's problem.

    `device` cuda takes a GPU for each rank. The reference always runs on the CPU.
    """
    verdict, started = Verdict(row, device=device), time.monotonic()
    try:
        records = pool.run(
            row.layout.world, train_rank, row, broken,
            "cuda" if device == "cuda" else "cpu", timeout=ROW_SECONDS, device=device,
        )  # fmt: skip
        judge(verdict, records)
    except (InternalError, PeerLost, Hang) as error:
        verdict.problem = str(error)
    verdict.seconds = time.monotonic() - started
    return verdict


def judge(verdict: Verdict, records: list[RankRecord]) -> None:
    """Fill in the verdict: every rank's every number against the reference trained here.

    Raises InternalError when the ranks disagree about a tensor's layout or together do not hold all
    of it.
    """
    row = verdict.row
    shards, state = (
        _logical_shards(held) for held in ([r.shards for r in records], [r.state for r in records])
    )
    logical = _start(row, shards, {name for record in records for name in record.quantized})
    verdict.initial = all(
        adapted.equal_start(name, mine, theirs)
        for name, mine, theirs in _paired([r.initial for r in records], shards, logical)
    )
    zeros = {name: torch.zeros(shard.full, dtype=torch.float64) for name, shard in state.items()}
    fixed = frozen(row, shards)
    trained = {name: shard for name, shard in shards.items() if name not in fixed}
    config, after = dataclasses.asdict(row.config) | adapted.dropout_of(row), None
    if row.adapter is not None and ADAPTERS[row.adapter]["method"] == "adalora":
        after = Budget(ADAPTERS[row.adapter], ADALORA_STEPS)
    rule, loss_of = reference_rule(row), reference_loss(row)
    trainer = Trainer(config, rule, logical | zeros, loss_of, fixed, after)
    verdict.loss = verdict.grad_norm = 0.0
    norm, dtype = 0.0, DTYPES[row.precision]
    for step in range(row.steps):
        seen = [record.steps[step] for record in records]
        gaps = [sampled.difference(config, trainer.weights, one.drawn) for one in seen]
        verdict.rollout = max(verdict.rollout, *gaps)
        batch = distilled.reference_batch(row, global_batch(row, step), shards)
        loss, grads, norm = trainer.step(batch, row.rates[step % len(row.rates)])
        floor = FLOOR * norm
        verdict.loss = max([verdict.loss, *(_relative(s.loss - loss, loss, 0.0) for s in seen)])
        verdict.grad_norm = max(
            [verdict.grad_norm, *(_relative(s.grad_norm - norm, norm, 0.0) for s in seen)]
        )
        _merge(
            verdict.grads,
            _errors(_paired([s.grads for s in seen], trained, grads), grads, floor, dtype),
        )
    final = list(_paired([r.final for r in records], shards | state, trainer.weights))
    verdict.weights = _errors(iter(final), trainer.weights, FLOOR * norm, dtype)
    changed = {name for name, mine, theirs in final if name in fixed and not torch.equal(mine.double(), theirs)}
    verdict.touched = sorted(changed)


def _start(row: Row, shards: Mapping[str, Shard], quantized: set[str]) -> dict[str, Tensor]:
    """The logical weights that a row's engine starts with."""
    logical = {}
    for name, shard in shards.items():
        box = Box((0,) * len(shard.full), shard.full)
        values = adapted.first_values(name, shard, box, row.seed)
        logical[name] = values.to(DTYPES[row.precision]).double()
        if name in quantized:
            logical[name] = adapted.rounded(values)
    return adapted.with_magnitudes(row, logical)


def reference_loss(row: Row) -> Callable[..., Tensor]:
    """Returns the independent loss of a row's model, which `reference.Trainer` differentiates."""
    if row.adapter is not None:
        return adapted_loss(row.loss_name, ADAPTERS[row.adapter])
    if row.fp8:
        tokens = row.layout.tp * row.layout.cp
        sequences = math.lcm(row.layout.ep, tokens) // tokens
        return Fp8Loss(row.fp8, row.layout.dp, row.micros, sequences)
    return masked_loss if row.loss_name == "next_token" else loss_named(row.loss_name)


def frozen(row: Row, names: Iterable[str]) -> frozenset[str]:
    """Returns the parameters that the row does not train."""
    if row.adapter is not None:
        return frozenset(name for name in names if MARK not in name)
    return frozenset(
        name for name in names if any(fnmatchcase(name, pattern) for pattern in row.frozen)
    )


def _logical_shards(held: list[dict[str, Shard]]) -> dict[str, Shard]:
    """Returns the record of every logical tensor, from the ranks that hold a piece of it."""
    shards: dict[str, Shard] = {}
    for records in held:
        for name, shard in records.items():
            if shards.setdefault(name, shard) != shard:
                raise InternalError(f"ranks disagree about {name}: {shards[name]} and {shard}.")
    return shards


def _paired(
    held: list[Pieces], shards: Mapping[str, Shard], logical: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`(name, a rank's piece, the same box of the logical tensor)` for every piece on every rank.

    Together the pieces have to cover each logical tensor, otherwise InternalError.
    """
    covered = {name: torch.zeros(shard.full, dtype=torch.bool) for name, shard in shards.items()}
    for pieces in held:
        for name, box, piece in pieces:
            covered[name][box.slices()] = True
            yield name, piece, logical[name][box.slices()]
    gaps = [name for name, seen in covered.items() if not seen.all()]
    if gaps:
        raise InternalError(f"no rank holds some elements of {', '.join(gaps)}.")


def _errors(
    pairs: Iterator[tuple[str, Tensor, Tensor]],
    logical: Mapping[str, Tensor],
    floor: float,
    dtype: torch.dtype,
) -> dict[str, float]:
    errors: dict[str, float] = {}
    for name, mine, theirs in pairs:
        if mine.shape != theirs.shape or mine.dtype != dtype:
            raise InternalError(
                f"a rank holds {name} as {tuple(mine.shape)} {mine.dtype}, not "
                f"{tuple(theirs.shape)} {dtype}."
            )
        if mine.numel():
            error = _relative(
                (mine - theirs).abs().max().item(), logical[name].abs().max().item(), floor
            )
            _merge(errors, {name: error})
    return errors


def _relative(difference: float, reference: float, floor: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return abs(difference) / max(abs(reference), floor, 1e-300)


def _merge(into: dict[str, float], more: Mapping[str, float]) -> None:
    for name, error in more.items():
        into[name] = max(into.get(name, 0.0), error)
