"""Rules that treat each element by itself, over the flat buckets: SGD, AdaGrad, RMSProp, Adam,
AdamW, Lion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from megallm.ops.adam import AdamRule, FlatState, adamw_
from megallm.ops.updates import Flat, LionRule, ScaleRule, SgdRule, adagrad_, lion_, rmsprop_, sgd_
from megallm.optim.buckets import ParamGroup
from megallm.optim.config import OptimConfig
from megallm.optim.flat import FlatBucket


class Clock(NamedTuple):
    """When an update takes place: scalars on the device of the state, not read by the host."""

    count: Tensor  # float32: updates applied so far
    skip: Tensor  # float32: 1.0 leaves everything as it is


# Elements that an update with temporaries works on at once on a CPU: they stay in its cache.
CHUNK = 2**18


class Elementwise:
    """The buckets of one rule. `states` has for each state name and bucket index this rank's
    range.
    """

    def __init__(
        self, rule: str, config: OptimConfig, states: dict[str, dict[int, Tensor]]
    ) -> None:
        self.apply, self.config, self.states = APPLY[rule], config, states
        self.fused = rule in FUSED

    def update(self, buckets: list[FlatBucket], lr: float, clock: Clock) -> None:
        """Apply the completed and clipped gradients of `buckets`."""
        for bucket in buckets:
            grads = bucket.gradients()
            for begin, end, param_group in bucket.plan.runs(bucket.begin, bucket.end):
                settings = Settings(lr * param_group.lr_scale, param_group, self.config)
                step = (
                    CHUNK if grads.device.type == "cpu" and not self.fused else max(end - begin, 1)
                )
                for first in range(begin, end, step):
                    run = slice(first, min(first + step, end))
                    states = {name: flats[bucket.index][run] for name, flats in self.states.items()}
                    self.apply(Flat(bucket.master[run], grads[run]), states, settings, clock)


class Settings(NamedTuple):
    """What one run of elements is updated with."""

    lr: float
    param_group: ParamGroup
    config: OptimConfig


def _adam(flat: Flat, states: dict[str, Tensor], settings: Settings, clock: Clock) -> None:
    lr, param_group, config = settings
    decoupled = param_group.rule != "adam"
    rule = AdamRule(lr, config.betas, config.eps, param_group.weight_decay, decoupled)
    adamw_(FlatState(*flat, states["exp_avg"], states["exp_avg_sq"]), rule, *clock)


def _sgd(flat: Flat, states: dict[str, Tensor], settings: Settings, clock: Clock) -> None:
    lr, param_group, config = settings
    rule = SgdRule(lr, param_group.weight_decay, config.momentum, config.nesterov)
    sgd_(flat, states.get("momentum"), rule, clock.skip)


def _adagrad(flat: Flat, states: dict[str, Tensor], settings: Settings, clock: Clock) -> None:
    lr, param_group, config = settings
    adagrad_(flat, states["sum"], ScaleRule(lr, param_group.weight_decay, config.eps), clock.skip)


def _rmsprop(flat: Flat, states: dict[str, Tensor], settings: Settings, clock: Clock) -> None:
    lr, param_group, config = settings
    rule = ScaleRule(lr, param_group.weight_decay, config.eps, config.smoothing, config.momentum)
    rmsprop_(flat, states["square_avg"], states.get("momentum"), rule, clock.skip)


def _lion(flat: Flat, states: dict[str, Tensor], settings: Settings, clock: Clock) -> None:
    lr, param_group, config = settings
    lion_(flat, states["exp_avg"], LionRule(lr, param_group.weight_decay, config.betas), clock.skip)


APPLY: dict[str, Callable[[Flat, dict[str, Tensor], Settings, Clock], None]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "lion": _lion,
}
FUSED = ("adamw", "adam", "sgd")  # one pass over the buffers, without temporaries
