"""AdamW over flat buckets: wide master weights and moments of this rank's range."""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.ops.adam import AdamRule, adamw_
from megallm.optim.config import OptimConfig
from megallm.optim.zero import ShardedParameters

STATES = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Moments live beside the master weights; decay skips parameters whose Shard says so (norms, biases)."""

    def __init__(self, config: OptimConfig, parameters: ShardedParameters) -> None:
        self.config, self.parameters, self.step_count = config, parameters, 0
        self.states: dict[str, list[Tensor]] = {
            name: [torch.zeros_like(bucket.master) for bucket in parameters.flat] for name in STATES
        }

    def step(self, lr: float) -> None:
        """Apply the completed and clipped gradients, and send the new weights on their way."""
        self.step_count += 1
        for bucket in self.parameters.flat:
            moments = [self.states[name][bucket.index] for name in STATES]
            grads = bucket.shard_grads.to(bucket.master.device)
            for begin, end, decay in bucket.plan.decay_runs(bucket.begin, bucket.end):
                weight_decay = self.config.weight_decay if decay else 0.0
                rule = AdamRule(self.step_count, lr, self.config.betas, self.config.eps, weight_decay)
                run = slice(begin, end)
                adamw_(bucket.master[run], grads[run], moments[0][run], moments[1][run], rule)
        self.parameters.publish()
