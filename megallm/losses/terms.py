"""What a loss returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Sums over the tokens, sequences or pairs of one microbatch, each a scalar.

    `losses` are differentiated: the engine divides each by its count over the global batch and adds
    them up. `metrics` are only reported, divided by the count of their own name, or by that of the
    first term where `counts` does not name them; they carry no gradient.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
