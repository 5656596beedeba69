"""AdamW over flat buckets, with wide master weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.ops.adam import AdamRule, adamw_
from megallm.optim.config import OptimConfig
from megallm.optim.grads import Buckets

STATES = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Moments live beside the buckets; weight decay skips parameters whose Shard says so (norms, biases)."""

    def __init__(self, config: OptimConfig, buckets: Buckets) -> None:
        self.config, self.buckets, self.step_count = config, buckets, 0
        self.moments = [{name: torch.zeros_like(b.master) for name in STATES} for b in buckets.flat]

    def step(self, lr: float) -> None:
        """Apply the collected, reduced and clipped gradients."""
        self.step_count += 1
        for bucket, moments in zip(self.buckets.flat, self.moments, strict=True):
            decay = self.config.weight_decay if bucket.plan.decay else 0.0
            rule = AdamRule(self.step_count, lr, self.config.betas, self.config.eps, decay)
            adamw_(bucket.master, bucket.grads, moments["exp_avg"], moments["exp_avg_sq"], rule)
        self.buckets.publish()

    def state_views(self) -> dict[str, dict[str, Tensor]]:
        """`{"exp_avg": {logical name: local piece}, ...}`, laid out like the parameters."""
        views: dict[str, dict[str, Tensor]] = {state: {} for state in STATES}
        for bucket, moments in zip(self.buckets.flat, self.moments, strict=True):
            for i, member in enumerate(bucket.plan.members):
                for state in STATES:
                    views[state][member.name] = bucket.view(moments[state], i, self.buckets.shapes[member.name])
        return views
