"""Values beside a language model's head, from the hidden states that it reads: V of a state, and
twin Q of every next token in it (ILQL, arXiv 2206.11871).

Q is as wide as the vocabulary and divided like it; what leaves are scalars of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.models.config import CRITIC_SCORES, ModelConfig
from megallm.models.heads import select_counted
from megallm.ops.cross_entropy import Projection
from megallm.ops.precision import wide
from megallm.parallel import comm
from megallm.parallel.linear import linear
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, normal
from megallm.parallel.tensor import (
    SEQUENCE_DIM,
    ShardedModule,
    gather_input,
    sequence_partial,
)
from megallm.parallel.vocab import Wanted, fused_scores, label_scores

TWINS = ("q1", "q2")
_OF_LABEL = Wanted(("logit", "log_prob"))


class CriticHeads(ShardedModule):
    """`value (1, D)`, whole on every tp rank; of `model.critic` q also `q1` and `q2 (V, D)`, rows
    split over tp.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool) -> None:
        super().__init__(mesh, sp)
        self.names, self.vocab = CRITIC_SCORES[config.critic], config.vocab_size
        size = config.hidden_size
        start = normal((size + 1) ** -0.5)  # as a value head's
        self.add_parameter("value", Shard((1, size), {}, sequence_partial(mesh, sp), start))
        for name in TWINS if config.critic == "q" else ():
            shard = Shard((self.vocab, size), {0: "tp"}, (), normal(config.init_std))
            self.add_parameter(name, shard)

    def outputs(
        self,
        features: Tensor,
        labels: Tensor,
        counted: Tensor | None,
        names: tuple[str, ...],
        fused: bool,
    ) -> tuple[Tensor, ...]:
        """Returns the scalars `names` from the head's features `[B, T/tp or T, D]`: values of every
        token `[B, T]`, Q of the `labels` `[n]` and its log-softmax at the tokens that count `[n]`;
        collective over tp.
        """
        made: dict[str, Tensor] = {}
        if "value" in names:
            made["value"] = self._value(features)
        wanted = [twin for twin in TWINS if any(name.startswith(twin) for name in names)]
        if wanted:
            hidden = gather_input(features, self.mesh, self.sp, "vocab.logits")
            hidden = select_counted(hidden, counted)
            for twin in wanted:
                found = self._of_labels(hidden, self.get_parameter(twin), labels, fused)
                made |= {twin: found["logit"], f"{twin}_log_prob": found["log_prob"]}
        return tuple(made[name] for name in names)

    def _value(self, features: Tensor) -> Tensor:
        found = wide(linear(features, self.value, None, self.weight_grads)).squeeze(-1)
        if not self.sp:
            return found
        return comm.gather_fwd_slice_bwd(found, self.mesh.tp, SEQUENCE_DIM, "head.outputs")

    def _of_labels(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, fused: bool
    ) -> dict[str, Tensor]:
        if fused:
            head = Projection(weight)
            return fused_scores(hidden, head, labels, self.mesh, self.vocab, _OF_LABEL)
        logits = linear(hidden, weight, None, self.weight_grads)
        return label_scores(logits, labels, self.mesh, self.vocab, _OF_LABEL)

    def least_q(self, features: Tensor) -> Tensor:
        """Returns the smaller Q of this rank's entries of the vocabulary, wide `[..., V/tp]`, of
        features `[..., D]`; without gradient.
        """
        first, second = (
            wide(linear(features, self.get_parameter(name), None, None)) for name in TWINS
        )
        return torch.minimum(first, second)
