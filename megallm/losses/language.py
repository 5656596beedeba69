"""Next-token cross-entropy as a sum over the unmasked labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NextToken:
    """`-sum(mask * log_prob)`; the engine divides by the number of unmasked labels of the global batch."""

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unmasked labels of one microbatch, known before its forward pass."""
        return {"loss": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": -(outputs["log_prob"] * batch["mask"]).sum()}
