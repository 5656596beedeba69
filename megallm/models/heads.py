"""Heads turn hidden states into per-token scalars; logits stay inside.

A language model's head gives the log-probability of each token's label, a masked language model's
the same after a transform (BERT, arXiv 1810.04805), and where they are wanted the entropy of the
distribution and whether the label is its likeliest entry. A classification head is one with the
classes for a vocabulary; a value head gives one number a token, for regression, rewards and
critics. Which tokens count (all, the first, the last) is a matter of the batch's mask, not of the
model: a vocabulary is applied to those tokens alone, heads with few outputs to every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.models.config import VOCABULARY_HEADS, ModelConfig
from megallm.ops.activation import ACTIVATIONS
from megallm.ops.cross_entropy import soft_cap
from megallm.ops.precision import wide
from megallm.parallel import comm
from megallm.parallel.linear import WeightGradQueue, linear
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, constant, normal
from megallm.parallel.tensor import (
    SEQUENCE_DIM,
    Adaptable,
    Norm,
    ShardedModule,
    TokenLinear,
    gather_input,
    sequence_partial,
)
from megallm.parallel.vocab import Wanted, gather_logits


class VocabularyHead(Adaptable):
    """What a head over the vocabulary has of its own, rows split over tp: `weight (V, D)` unless
    tied, `bias (V,)`; for mlm also the transform `dense (D, D)`, activation, `norm`.

    An adapter has `features(x)`, which stand beside the features, and `columns()`, which stand
    beside the matrix: `[W, B] [x, A x]`.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool) -> None:
        super().__init__(mesh)
        self.register_parameter("bias", None)
        self.dense = None
        if not config.tie_embeddings:
            shard = Shard(
                (config.vocab_size, config.hidden_size), {0: "tp"}, (), normal(config.init_std)
            )
            self.add_parameter("weight", shard)
        if config.head_bias:
            self.add_parameter(
                "bias", Shard((config.vocab_size,), {0: "tp"}, (), constant(0.0), decay=False)
            )
        if config.head == "mlm":
            self.activation = ACTIVATIONS["gelu" if config.gated else config.activation]
            self.dense = square(config, mesh, sp)
            self.norm = final_norm(config, mesh, sp)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the matrix is applied to, `[B, T/tp or T, D]`."""
        return x if self.dense is None else self.norm(self.activation(self.dense(x)))


    def widened(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features `[..., D]` and matrix `[V/tp, D]` with those of the adapters in use
        beside them.
        """
        if not self.is_adapted:
            return x, weight
        used = list(self.adapter.in_use())
        features = torch.cat([x, *(adapter.features(x) for adapter in used)], dim=-1)
        return features, torch.cat([weight, *(adapter.columns() for adapter in used)], dim=-1)


class TokenHead(ShardedModule):
    """Few numbers a token: `weight (C, D)` and `bias (C,)`, perhaps after `pooler (D, D)` with tanh
    (BERT's).

    C is the number of classes, 1 for a value, 0 for the body alone. Whole on every tp rank, each
    applying it to its own tokens under sequence parallelism, so C may be smaller than tp.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool) -> None:
        super().__init__(mesh, sp)
        self.kind = config.head
        self.pooler = square(config, mesh, sp) if config.pooler else None
        self.register_parameter("bias", None)
        partial, outputs = sequence_partial(mesh, sp), config.head_outputs
        # A value head starts small in any width (Stiennon et al., arXiv 2009.01325, appendix B).
        value = self.kind == "value"
        std = (config.hidden_size + 1) ** -0.5 if value else config.init_std
        if outputs:
            shard = Shard((outputs, config.hidden_size), {}, partial, normal(std))
            self.add_parameter("weight", shard)
        if outputs and config.head_bias:
            self.add_parameter("bias", Shard((outputs,), {}, partial, constant(0.0), decay=False))

    def features(self, x: Tensor) -> Tensor:
        """Returns hidden states `[B, T/tp or T, D]`, pooled."""
        return x if self.pooler is None else self.pooler(x).tanh()

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits `[B, T/tp or T, C]`."""
        return linear(features, self.weight, self.bias, self.weight_grads)

    def outputs(self, logits: Tensor, labels: Tensor | None, wanted: Wanted) -> dict[str, Tensor]:
        """Returns `{"value": [B, T]}`, or for labels `[B, T]` the wanted of `log_prob`, `entropy`
        and `correct`; collective over tp.

        `correct` is 1 where the label's class is the most likely one; it has no gradient.
        """
        if self.kind == "value":
            return {"value": self._whole(wide(logits).squeeze(-1))}
        if self.sp:
            labels = comm.own_slice(labels, self.mesh.tp, SEQUENCE_DIM)
        log_prob = torch.log_softmax(wide(logits) / wanted.temperature, dim=-1)
        made = {
            "log_prob": lambda: log_prob.gather(-1, labels[..., None]).squeeze(-1),
            "entropy": lambda: -(log_prob.exp() * log_prob).sum(-1),
            "correct": lambda: (log_prob.detach().argmax(-1) == labels).to(log_prob.dtype),
        }
        return {name: self._whole(made[name]()) for name in wanted.names}

    def _whole(self, values: Tensor) -> Tensor:
        """The tokens of all tp ranks; each of them computes the identical loss, so the gradient is
        a slice.
        """
        if not self.sp:
            return values
        return comm.gather_fwd_slice_bwd(values, self.mesh.tp, SEQUENCE_DIM, "head.outputs")


def square(config: ModelConfig, mesh: Mesh, sp: bool) -> TokenLinear:
    """Returns a layer `(D, D)` of the head."""
    size = config.hidden_size
    return TokenLinear(mesh, (size, size), normal(config.init_std), config.head_dense_bias, sp)


Head = VocabularyHead | TokenHead


def build_head(config: ModelConfig, mesh: Mesh, sp: bool) -> Head | None:
    """Returns the module of the head; None when a language model's is the tied embedding and
    nothing else.
    """
    if config.head not in VOCABULARY_HEADS:
        return TokenHead(config, mesh, sp)
    if config.head == "lm" and config.tie_embeddings and not config.head_bias:
        return None
    return VocabularyHead(config, mesh, sp)


def final_norm(config: ModelConfig, mesh: Mesh, sp: bool) -> Norm:
    return Norm(mesh, config.norm, config.hidden_size, config.norm_eps, sequence_partial(mesh, sp))


def local_logits(
    hidden: Tensor,
    weight: Tensor,
    mesh: Mesh,
    sp: bool,
    weight_grads: WeightGradQueue | None = None,
    bias: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Maps `[B, T/tp or T, D]` -> this rank's logits `[B, T, V/tp]`, or `[n, V/tp]` of the tokens
    `counted` (`select_counted`); collective over tp.
    """
    rows = select_counted(gather_input(hidden, mesh, sp, "vocab.logits"), counted)
    return linear(rows, weight, bias, weight_grads)


MASK_ON_CPU = "mask_on_cpu"  # in a batch on another device: the mask that need not be waited for


def counted_tokens(mask: Tensor, device: torch.device) -> Tensor | None:
    """Places int64 `[n]` of the True ones among the flattened tokens of a mask; None when all are.

    How many there are is a size, which the host must know. A mask on the CPU tells it without
    waiting: the places are made there and sent, from pinned memory, behind whatever the device has
    to do. One on a GPU makes the host wait for it, once for each microbatch.
    """
    places = mask.flatten().nonzero().squeeze(-1)
    if len(places) == mask.numel():
        return None
    if places.device.type == "cpu" and device.type == "cuda":
        places = places.pin_memory()
    return places.to(device, non_blocking=True)


def select_counted(x: Tensor, counted: Tensor | None) -> Tensor:
    """Maps `[B, T, ...]` -> `[n, ...]`, the tokens that count; as it is when all do."""
    return x if counted is None else x.flatten(0, 1).index_select(0, counted)


def put_back(x: Tensor, counted: Tensor | None, shape: torch.Size) -> Tensor:
    """Maps `[n, ...]` -> `[B, T, ...]` with 0 where tokens do not count."""
    if counted is None:
        return x
    rest = x.shape[1:]
    return x.new_zeros(shape.numel(), *rest).index_copy(0, counted, x).view(*shape, *rest)


def next_token_logits(
    hidden: Tensor,
    weight: Tensor,
    mesh: Mesh,
    vocab: int,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Returns wide logits `[B, V]` of the last position on every tp rank, for sampling, with a soft
    cap; no gradient. `added` `[B, 1, V/tp]` is added to this rank's behind the cap.
    """
    own = soft_cap(local_logits(hidden[:, -1:], weight, mesh, sp=False, bias=bias), cap)
    return gather_logits(own if added is None else own + added, mesh, vocab)[:, -1]
