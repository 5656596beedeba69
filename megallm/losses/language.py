"""Cross-entropy of labels, as sums over the tokens that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.losses.terms import Terms

METRICS = {"entropy": "entropy", "mean_token_accuracy": "correct"}  # and what they are means of


@dataclass(frozen=True)
class NextToken:
    """`-sum(mask * log_prob)`; the engine divides by the number of unmasked labels of the global
    batch.

    The same sum is the loss of a masked language model, whose labels are the tokens that were
    hidden, and of a classification head, whose labels are classes and whose mask is True at the
    tokens that are classified: all of them, the first of each sequence, or the last.

    With `depth` there is a term `mtp_k` for every k from 1 on: the same for the token k + 1 places
    ahead, which the model calls `mtp_k` (multi-token prediction, arXiv 2412.19437). Together they
    weigh `weight` beside the first term, each divided by its own number of labels.

    With `dft` a label's term is multiplied by its probability, without a gradient (dynamic
    fine-tuning, arXiv 2508.05629). `measured` are metrics to report, names of METRICS: means over
    the unmasked labels.
    """

    depth: int = 0
    weight: float = 1.0
    dft: bool = False
    measured: tuple[str, ...] = ()
    temperature: ClassVar[float] = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        """The first term's log-probability, those of further tokens, and what is measured."""
        further = tuple(f"mtp_{ahead}" for ahead in range(1, self.depth + 1))
        return "log_prob", *further, *(METRICS[name] for name in self.measured)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the unmasked labels of one microbatch, known before its forward pass."""
        further = {
            f"mtp_{ahead}": shift_mask(batch, ahead).sum() for ahead in range(1, self.depth + 1)
        }
        return {"loss": batch["mask"].sum()} | further

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        mask, log_prob = batch["mask"], outputs["log_prob"]
        weighted = log_prob * log_prob.detach().exp() if self.dft else log_prob
        terms = {"loss": -(weighted * mask).sum()}
        for ahead in range(1, self.depth + 1):
            total = -(outputs[f"mtp_{ahead}"] * shift_mask(batch, ahead)).sum()
            terms[f"mtp_{ahead}"] = total * (self.weight / self.depth)
        metrics = {name: (outputs[METRICS[name]].detach() * mask).sum() for name in self.measured}
        return Terms(terms, metrics)


def shift_mask(batch: dict[str, Tensor], ahead: int) -> Tensor:
    """Returns bool `[B, T]`: tokens for which the label `ahead` places on counts, and lies in the
    same document.

    The documents of a packed row are those of `cu_seqlens`, on the CPU; a row without them is one
    document.
    """
    mask = F.pad(batch["mask"], (0, ahead))[:, ahead:]
    if "cu_seqlens" not in batch:
        return mask
    if "prefix_of" in batch:
        raise ValueError(
            "further labels of a token that several answers share differ between them: train "
            "multi-token prediction on rows of their own, with shared_prefix off."
        )
    ends = batch["cu_seqlens"].to(torch.int64)
    inside = torch.arange(mask.shape[1]) + ahead < ends[1:].repeat_interleave(ends.diff())
    return mask & inside.to(mask.device, non_blocking=True)


@dataclass(frozen=True)
class MaskedDiffusion:
    """`-sum(weight * log_prob)` over the tokens that were hidden (LLaDA, Nie et al., arXiv
    2502.09992).

    `weight` `[B, T]` is 1 / t where a token was hidden, at the rate t of its text, and 0 elsewhere;
    `mask` is True at every token that could have been hidden, and their number is the divisor: the
    bound is in nats per token.
    """

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the tokens of one microbatch that are no padding."""
        return {"loss": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        weight = batch["weight"] * batch["mask"]
        return Terms({"loss": -(outputs["log_prob"] * weight).sum()})


@dataclass(frozen=True)
class Accuracy:
    """How many labels are the likeliest token or class, for `Engine.evaluate`; it has no
    gradient.
    """

    needs: ClassVar[tuple[str, ...]] = ("correct",)
    temperature: ClassVar[float] = 1.0

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts the labels of one microbatch that count."""
        return {"accuracy": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Terms:
        return Terms({}, {"accuracy": (outputs["correct"] * batch["mask"]).sum()})
