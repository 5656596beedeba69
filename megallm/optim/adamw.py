"""AdamW over flat buckets: wide master weights and moments of this rank's range."""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.ops.adam import AdamRule, FlatState, adamw_
from megallm.optim.config import OptimConfig
from megallm.optim.zero import ShardedParameters

STATES = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Moments live beside the master weights; decay skips parameters whose Shard says so (norms, biases)."""

    def __init__(self, config: OptimConfig, parameters: ShardedParameters) -> None:
        self.config, self.parameters = config, parameters
        home = torch.device("cpu") if parameters.options.offload else parameters.mesh.device
        self.count = torch.zeros((), dtype=torch.float32, device=home)  # updates applied so far
        self.states: dict[str, list[Tensor]] = {
            name: [torch.zeros_like(bucket.master) for bucket in parameters.flat] for name in STATES
        }

    @property
    def updates(self) -> int:
        """Updates applied so far; reading it waits for the device."""
        return int(self.count)

    @updates.setter
    def updates(self, count: int) -> None:
        self.count.fill_(count)

    def step(self, lr: float, skip: Tensor) -> None:
        """Apply the completed and clipped gradients, unless `skip` (a bool scalar, on the device) says not to, and
        send the new weights on their way."""
        skip = skip.to(self.count.device, self.count.dtype)
        for bucket in self.parameters.flat:
            moments = [self.states[name][bucket.index] for name in STATES]
            grads = bucket.shard_grads.to(bucket.master.device)
            for begin, end, decay in bucket.plan.decay_runs(bucket.begin, bucket.end):
                weight_decay = self.config.weight_decay if decay else 0.0
                rule = AdamRule(lr, self.config.betas, self.config.eps, weight_decay)
                run = slice(begin, end)
                state = FlatState(bucket.master[run], grads[run], moments[0][run], moments[1][run])
                adamw_(state, rule, self.count, skip)
        self.count += 1 - skip
        self.parameters.publish()
