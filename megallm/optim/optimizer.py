"""The optimizer of a rank and its optimizer state (what is kept for each element, sharded as ZeRO's
stage says): one updater for each rule in use, over the buckets of that rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megallm.base.heartbeat import HEARTBEAT
from megallm.optim.adafactor import Adafactor
from megallm.optim.config import OptimConfig
from megallm.optim.elementwise import APPLY, Clock, Elementwise
from megallm.optim.flat import FlatBucket
from megallm.optim.muon import Muon
from megallm.optim.rules import RULES
from megallm.optim.zero import ShardedParameters
from megallm.parallel.shard import StateTensor


class Updater(Protocol):
    """Applies one rule; may be collective over the shard group and the axes that split
    parameters.
    """

    def update(self, buckets: list[FlatBucket], lr: float, clock: Clock) -> None: ...


class Optimizer:
    """State lives beside the master weights; each parameter is treated as its `ParamGroup` says.

    `states` has by state name and bucket index this rank's range of state that is shaped like the
    parameters.
    """

    def __init__(self, config: OptimConfig, parameters: ShardedParameters) -> None:
        self.config, self.parameters = config.resolve(), parameters
        home = None if parameters.options.offload else parameters.mesh.device  # None: the host
        self.count = torch.zeros((), dtype=torch.float32, device=home)  # updates applied so far
        self.states: dict[str, dict[int, Tensor]] = {}
        self.updaters: list[tuple[Updater, list[FlatBucket]]] = []
        self.adafactor: Adafactor | None = None
        trainable = parameters.trainable
        rules = dict.fromkeys(bucket.plan.rule for bucket in trainable)
        for rule in [rule for rule in rules if not rule.startswith("adafactor")]:
            buckets = [bucket for bucket in trainable if bucket.plan.rule == rule]
            states = self._allocate(rule, buckets)
            made = (
                Elementwise(rule, self.config, states)
                if rule in APPLY
                else Muon(self.config, parameters, states)
            )
            self.updaters.append((made, buckets))
        if self.config.rule == "adafactor":
            vectors = [bucket for bucket in trainable if bucket.plan.rule == "adafactor.vector"]
            states = self._allocate("adafactor.vector", vectors)
            self.adafactor = Adafactor(self.config, parameters, states["exp_avg_sq"])
            self.updaters.append((self.adafactor, trainable))

    def _allocate(self, rule: str, buckets: list[FlatBucket]) -> dict[str, dict[int, Tensor]]:
        made = {
            name: {bucket.index: torch.zeros_like(bucket.master) for bucket in buckets}
            for name in RULES[rule].like(self.config)
        }
        for name, flats in made.items():
            self.states.setdefault(name, {}).update(flats)
        return made

    @property
    def updates(self) -> int:
        """Updates applied so far; reading it waits for the device."""
        return int(self.count)

    @updates.setter
    def updates(self, count: int) -> None:
        self.count.fill_(count)

    def state(self) -> Iterator[StateTensor]:
        """Yields the state that has a Shard of its own; what is shaped like the parameters lies in
        `states`.
        """
        if self.adafactor is not None:
            mesh, tied = self.parameters.mesh, self.parameters.groups.tie.rank
            for state, name, shard, tensor in self.adafactor.factors():
                later = tied and name == self.parameters.tied_name
                owned, box = (
                    shard.owned(mesh.coords, first_stage=not later),
                    shard.box(mesh.layout, mesh.coords),
                )
                yield StateTensor(
                    f"optim.{state}.{name}", shard, box, tensor, owned, optimizer=True
                )

    def step(self, lr: float, skip: Tensor) -> None:
        """Apply the completed and clipped gradients, unless `skip` (a bool scalar, on the device)
        says not to, and send the new weights on their way."""
        HEARTBEAT.enter("optimizer")
        skip = skip.cpu() if self.parameters.options.offload else skip  # here the host waits
        clock = Clock(self.count, skip.to(self.count.dtype))
        for bucket in self.parameters.trainable:
            bucket.start_home()
        for updater, buckets in self.updaters:
            updater.update(buckets, lr, clock)
        self.count += 1 - clock.skip
        self.parameters.publish(frozen=False)
