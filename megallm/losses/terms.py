"""What a loss is, and what it returns: sums and counts, of which the engine makes the mean over the
global batch (loss normalisation). The batch's `mask` is the loss mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Terms:
    """Sums over the tokens, sequences or pairs of one microbatch, each a scalar.

    `losses` are differentiated: the engine divides each by its count over the global batch and adds
    them up. `metrics` are only reported, divided by the count of their own name, or by that of the
    first term where `counts` does not name them; they carry no gradient. Every microbatch returns
    the same names. `largest` are reported as the largest over the global batch, divided by nothing;
    -inf where a microbatch has nothing.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """A pure function from the head's per-token scalars `[B, T]` to sums of one microbatch.

    A loss couples only rows of one microbatch. At tokens whose mask is False the outputs of a head
    over a vocabulary are 0. Pipeline ranks that do not hold the head call a loss once a step on
    outputs that are all 0, to learn the names of its terms: its values decide about no exception.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the scalars it reads (`ModelConfig.scores`): the head computes no others."""
        ...

    @property
    def temperature(self) -> float:
        """What logits are divided by before their softmax, in log-probabilities and entropies."""
        ...

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Returns what each term is divided by, of one microbatch, known before its forward pass.

        Whole numbers or, with soft weights, floats; 0 where nothing counts.
        """
        ...

    def __call__(self, outputs: dict[str, Tensor], batch: Batch) -> Terms: ...
