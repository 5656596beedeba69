"""What a rank needs in memory, estimated from the configuration, and settings with which it would
fit. No torch.

Weights, gradients and optimizer state are counted as `engine.footprint` measures them; activations
follow arXiv 2205.05198: of each token and layer 34 bytes times the model's width in 16 bit, of
which 24 are divided by tp, and all of them with sequence parallelism. What a rank was seen to need
scales the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from megallm.base.config import replace
from megallm.run.config import JobConfig
from megallm.training.validate import find_problems

GIB, SHOWN = 2**30, 3
MARGIN = 0.7  # of the limit: the step was not over when memory ran out
SettingChanges = dict[str, Any]


@dataclass(frozen=True)
class Demand:
    """Bytes of one rank."""

    state: float  # weights, gradients, optimizer
    activations: float

    @property
    def total(self) -> float:
        """Returns all of them."""
        return self.state + self.activations

    def scaled(self, factor: float) -> Demand:
        """Returns the same with other activations."""
        return Demand(self.state, self.activations * factor)


def demand_of(config: JobConfig) -> Demand:
    """Returns what the fullest rank of a checked configuration needs, estimated."""
    layout, zero, train, model = config.layout, config.zero, config.train, config.model
    narrow = {"fp64": 8, "fp32": 4}.get(train.precision, 2)
    wide = 8 if narrow == 8 else 4
    params = model.num_params() / (layout.tp * layout.pp)
    shard = zero.shard_size or (layout.dp or 1) * layout.cp
    divided = [1, 1, 1, 1]
    for stage in range(1, zero.stage + 1):
        divided[stage] = shard
    moments = {"sgd": 0, "lion": 1, "muon": 1, "adagrad": 1, "rmsprop": 1}.get(config.optim.rule, 2)
    kept = 0 if zero.offload else wide * (moments + (narrow != wide)) / divided[1]
    state = params * (kept + wide / divided[2] + narrow / divided[3])
    tokens = train.micro_batch * config.data.seq_len / layout.cp
    width, layers = model.hidden_size, model.num_layers
    each = 34 / layout.tp if layout.sp else 10 + 24 / layout.tp
    block = 2.5 * each / max(1, layers)  # of the block whose backward pass runs, with gradients
    if train.recompute == "full" or train.offload:
        each = 2  # the inputs of the blocks
    each += block
    logits = 0 if train.fused_head == "on" else 2 * tokens * (model.vocab_size or 0) / layout.tp
    return Demand(state, tokens * layers * width * each * narrow / 2 + logits * wide)


def advise(
    config: JobConfig, needed: float, limit: float, world: int
) -> list[tuple[SettingChanges, float]]:
    """Returns up to three changes of settings with which a rank fits into `limit` bytes, least
    intrusive first, each with the bytes that it would need; `needed` bytes were not to be had.
    """
    demand = demand_of(config)
    factor = max(1.0, (needed - demand.state) / demand.activations)
    found: list[tuple[SettingChanges, float]] = []
    others: list[tuple[SettingChanges, float]] = []  # more of the same
    options = list(_options(config))
    for count in (1, 2, 3):
        for chosen in combinations(options, count):
            settings: SettingChanges = {key: value for one in chosen for key, value in one.items()}
            keys = [key for one in chosen for key in one]
            if len(keys) != len(set(keys)):
                continue
            wanted = _needed(config, settings, factor, world)
            if wanted is not None and wanted <= MARGIN * limit:
                like = any(one.keys() <= set(keys) for one, _ in found)
                (others if like else found).append((settings, wanted))
    return (found + others)[:SHOWN]


def _needed(
    config: JobConfig, settings: Mapping[str, Any], factor: float, world: int
) -> float | None:
    """Bytes with the settings changed; None where they make no valid configuration."""
    changed = replace(config, dict(settings))
    if find_problems(changed, world):
        return None
    return demand_of(changed).scaled(factor).total


def _options(config: JobConfig) -> Iterator[SettingChanges]:
    """Single changes, those first that change the least about a run."""
    train, layout, zero = config.train, config.layout, config.zero
    if (layout.dp or 1) * layout.cp > 1:
        yield from ({"zero.stage": stage} for stage in range(zero.stage + 1, 4))
    micro = train.micro_batch // 2
    while micro:
        yield {"train.micro_batch": micro}
        micro //= 2
    if train.recompute != "full":
        yield {"train.recompute": "full"}
    if train.fused_head != "on":
        yield {"train.fused_head": "on"}
    dp = layout.dp or 1
    if dp % 2 == 0:
        yield {"layout.tp": 2 * layout.tp, "layout.dp": dp // 2}
        yield {"layout.pp": 2 * layout.pp, "layout.dp": dp // 2}


def explain(config: JobConfig, needed: float, limit: float, world: int, rank: int) -> str:
    """Returns a sentence about a rank that ran out of memory, with the settings that would fit."""
    demand = demand_of(config)
    begin = (
        f"Rank {rank} is out of memory: it needs {needed / GIB:.2f} GiB or more for the model and "
        f"{limit / GIB:.2f} GiB are to be had (estimated: weights, gradients and optimizer "
        f"{demand.state / GIB:.2f} GiB, activations {demand.activations / GIB:.2f} GiB)."
    )
    found = advise(config, needed, limit, world)
    if not found:
        return f"{begin} No change of a few settings fits: use more ranks, or a smaller model."
    rows = [
        f"\n    {' '.join(f'{key}={value}' for key, value in settings.items())}"
        f"   (about {wanted / GIB:.2f} GiB)"
        for settings, wanted in found
    ]
    return f"{begin} These would fit:{''.join(rows)}"
