"""Optimizer settings, which rule uses which of them, and their defaults. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that are treated otherwise than the rest, by logical name; the first group that
    matches counts.
    """

    match: str = ""  # a pattern such as *.mlp.down.weight (* and ? as in file names), or /regular expression/
    lr_scale: float = 1.0  # times the learning rate
    weight_decay: float | None = None  # null: optim.weight_decay, and none for norms and biases
    frozen: bool = False  # never updated, and left out of the gradient norm


@dataclass(frozen=True)
class OptimConfig:
    """`null` is the default of the rule or of the schedule (`SETTINGS`, `SCHEDULES`); `resolve`
    fills it in.
    """

    rule: str = "adamw"  # sgd | adagrad | rmsprop | adam | adamw | lion | adafactor | muon (docs/optimizers.md)
    lr: float | None = None  # the highest learning rate; adafactor: an upper bound of its relative step
    min_lr: float = 0.0  # where the schedule ends; inverse_sqrt: a floor
    warmup_steps: int = 0  # the rate rises linearly from 0 over these
    schedule: str = "cosine"  # constant | linear | cosine | inverse_sqrt | wsd, over train.steps after the warm-up
    decay_fraction: float | None = None  # wsd: the last share of the steps, in which the rate falls
    decay_shape: str | None = None  # wsd: how it falls: linear | cosine | sqrt
    betas: tuple[float, float] | None = None  # adam, adamw, lion, and muon for what is not a hidden matrix
    eps: float | None = None  # adagrad, rmsprop, adam, adamw, muon: beside the root; adafactor: beside squares
    weight_decay: float | None = None  # sgd, adagrad, rmsprop, adam: added to the gradient; the others: decoupled
    momentum: float | None = None  # sgd, rmsprop, muon
    nesterov: bool | None = None  # sgd, muon: look one step ahead along the momentum
    smoothing: float | None = None  # rmsprop: what the mean of squares keeps each step
    decay_power: float | None = None  # adafactor: after t steps the mean of squares keeps 1 - t^-decay_power
    update_clip: float | None = None  # adafactor: largest root mean square of an update before the rate
    min_scale: float | None = None  # adafactor: least root mean square of a weight that a step is relative to
    ns_steps: int | None = None  # muon: Newton-Schulz iterations
    ns_precision: str | None = None  # muon: of those iterations: bf16 | fp32; null: fp32 where the run is in fp32
    update_scale: str | None = None  # muon: rms (0.2 sqrt(max(rows, columns)), as AdamW) | original (Jordan's)
    clip: float = 1.0  # the global norm that gradients are scaled down to; 0 switches it off
    groups: tuple[GroupConfig, ...] = ()  # ordered: the first whose pattern matches a name counts

    def resolve(self) -> OptimConfig:
        """Returns the section with the defaults of the rule and the schedule in place of null; a
        key that neither uses stays as it is.
        """
        given = dataclasses.asdict(self)
        wanted = SETTINGS[self.rule] | SCHEDULES[self.schedule]
        return dataclasses.replace(
            self, **{key: value for key, value in wanted.items() if given[key] is None}
        )


@dataclass(frozen=True)
class ZeroConfig:
    """What stays sharded over data-parallel ranks between uses."""

    stage: Literal[0, 1, 2, 3] = 0  # 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights
    shard_size: int | None = None  # ranks of dp x cp that divide the state, replicated across the rest; null: all
    bf16_grads: bool = False  # stages 1 to 3: gradients travel and meet in bf16; accumulation stays wide
    offload: bool = False  # optimizer state and master weights in CPU memory


# The hyperparameters of each rule with the defaults of its paper (AdamW: those usual for language
# models).
_ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": _ADAMW,
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "sgd": {"lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adagrad": {"lr": 0.01, "eps": 1e-10, "weight_decay": 0.0},
    "rmsprop": {"lr": 1e-3, "smoothing": 0.9, "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1.0},
    "adafactor": {
        "lr": 1e-2, "decay_power": 0.8, "update_clip": 1.0, "eps": 1e-30, "min_scale": 1e-3, "weight_decay": 0.0,
    },
    "muon": _ADAMW | {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "ns_precision": None, "update_scale": "rms"},
}  # fmt: skip
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "inverse_sqrt": {},
    "wsd": {"decay_fraction": 0.2, "decay_shape": "linear"},
}
CHOICES: dict[str, tuple[str, ...]] = {
    "rule": tuple(SETTINGS),
    "schedule": tuple(SCHEDULES),
    "decay_shape": ("linear", "cosine", "sqrt"),
    "update_scale": ("rms", "original"),
    "ns_precision": ("bf16", "fp32"),
}


def unused(config: OptimConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns keys that were given and that nothing reads: `(key, "rule muon" or "schedule cosine",
    the keys it reads)`.
    """
    given = dataclasses.asdict(config)
    found = []
    for kind, table in (("rule", SETTINGS), ("schedule", SCHEDULES)):
        reads = table[given[kind]]
        for key in sorted({key for keys in table.values() for key in keys} - set(reads)):
            if given[key] is not None:
                found.append((key, f"{kind} {given[kind]}", tuple(reads)))
    return found
