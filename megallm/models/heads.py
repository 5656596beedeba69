"""Heads turn hidden states into per-token scalars; logits stay inside."""

from __future__ import annotations

from torch import Tensor

from megallm.models.config import ModelConfig
from megallm.parallel.linear import WeightQueue, linear
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, normal
from megallm.parallel.tensor import Norm, ShardedModule, enter, sequence_partial
from megallm.parallel.vocab import gather_logits, label_log_prob


class LmHead(ShardedModule):
    """The untied output matrix `(V, D)`, rows split over tp."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__(mesh)
        shard = Shard((config.vocab_size, config.hidden_size), {0: "tp"}, (), normal(config.init_std))
        self.add_parameter("weight", shard)


def final_norm(config: ModelConfig, mesh: Mesh, sp: bool) -> Norm:
    return Norm(mesh, config.norm, config.hidden_size, config.norm_eps, sequence_partial(mesh, sp))


def local_logits(hidden: Tensor, weight: Tensor, mesh: Mesh, sp: bool, later: WeightQueue | None = None) -> Tensor:
    """`[B, T/tp or T, D]` -> this rank's logits `[B, T, V/tp]`; collective over tp."""
    return linear(enter(hidden, mesh, sp, "vocab.logits"), weight, None, later)


def language_model(logits: Tensor, labels: Tensor, mesh: Mesh, vocab: int) -> dict[str, Tensor]:
    """`{"log_prob": [B, T]}` of the labels, the same on every tp rank."""
    return {"log_prob": label_log_prob(logits, labels, mesh, vocab)}


def next_token_logits(hidden: Tensor, weight: Tensor, mesh: Mesh, vocab: int) -> Tensor:
    """Wide logits `[B, V]` of the last position on every tp rank, for sampling; no gradient."""
    return gather_logits(local_logits(hidden[:, -1:], weight, mesh, sp=False), mesh, vocab)[:, -1]
