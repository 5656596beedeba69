"""Cross-entropy of labels, as sums over the tokens that count."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NextToken:
    """`-sum(mask * log_prob)`; the engine divides by the number of unmasked labels of the global batch.

    The same sum is the loss of a masked language model, whose labels are the tokens that were hidden, and of a
    classification head, whose labels are classes and whose mask is True at the tokens that are classified: all of
    them, the first of each sequence, or the last.
    """

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unmasked labels of one microbatch, known before its forward pass."""
        return {"loss": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": -(outputs["log_prob"] * batch["mask"]).sum()}


@dataclass(frozen=True)
class MaskedDiffusion:
    """`-sum(weight * log_prob)` over the tokens that were hidden (LLaDA, Nie et al., arXiv 2502.09992).

    `weight` `[B, T]` is 1 / t where a token was hidden, at the rate t of its text, and 0 elsewhere; `mask` is True at
    every token that could have been hidden, and their number is the divisor: the bound is in nats per token.
    """

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens of one microbatch that are no padding."""
        return {"loss": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": -(outputs["log_prob"] * (batch["weight"] * batch["mask"])).sum()}
