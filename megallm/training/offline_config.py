"""The section and configuration of `megallm offline`. No torch.

The comment beside a field is its documentation (`megallm config --schema` prints it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megallm.data.chat.formats import RowKind
from megallm.training.finetune import FinetuneConfig


@dataclass(frozen=True)
class OfflineOptions:
    """Which way answers with rewards are learned, without sampling any."""

    algorithm: Literal["raft", "awr", "return", "ilql"] = "awr"  # docs/offline_rl.md
    keep: int = 1  # raft: answers of a prompt that are trained, the best by reward
    min_reward: float | None = None  # raft: and only those with at least this reward
    advantage: Literal["prompt", "all", "value"] = "prompt"  # awr: reward less the mean of its prompt, of all, or V
    beta: float = 1.0  # awr: weights are exp(advantage / beta)
    max_weight: float = 20.0  # awr: and at most this
    value_coef: float = 0.5  # awr with advantage value: of (V - reward)^2 / 2
    gamma: float = 0.99  # ilql: discount of a token
    tau: float = 0.7  # ilql: expectile of Q that V is fitted to; towards 1 the largest
    cql: float = 0.1  # ilql: weight of the term that holds down Q of tokens that were not taken
    nll: float = 1.0  # ilql: weight of the answers' likelihood, for the policy that decoding starts from
    polyak: float = 0.005  # ilql: share by which the target's Q moves towards Q after a step; 1 replaces it


@dataclass(frozen=True)
class OfflineConfig(FinetuneConfig):
    """Everything about one run of `megallm offline`."""

    offline: OfflineOptions = field(default_factory=OfflineOptions)

    @property
    def kind(self) -> RowKind:
        """Returns answers with rewards."""
        return "scored"

    @property
    def critic(self) -> str | None:
        """Returns the values that the algorithm needs beside the head."""
        options = self.offline
        with_value = options.algorithm == "awr" and options.advantage == "value"
        return "q" if options.algorithm == "ilql" else "value" if with_value else None
