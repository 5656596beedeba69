"""Virtual tokens in front of every text: rows of trained hidden states, or keys and values alone.

Either way the text's own tokens stand at the positions behind them. Keys and values come from
`Attention.prefix` (prefix tuning, arXiv 2101.00190) and move positions only; rows come from
`Stage.prompt` (prompt tuning, arXiv 2104.08691; P-tuning, arXiv 2103.10385), and the row grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.models.config import ModelConfig
from megallm.models.heads import MASK_ON_CPU
from megallm.parallel.pipeline import Batch, LossOf

# What a stage reads of each token, `[B, T]`.
PER_TOKEN = ("tokens", "labels", "positions", "token_types", "mask", MASK_ON_CPU)


class VirtualTokens(nn.Module):
    """Stands in the `virtual` slot of every stage; `count` tokens in front of every text.

    `embedded`: they are rows of hidden states. Raises UsageError for those in a model that is not
    causal, whose tokens would see the padding behind a row.
    """

    def __init__(self, count: int, embedded: bool, config: ModelConfig) -> None:
        super().__init__()
        if embedded and not config.causal:
            raise UsageError(
                "peft.method: virtual tokens in front of the text need a causal model; this one "
                "sees its rows whole. Use lora, ia3 or prefix."
            )
        self.count, self.embedded = count, embedded

    def forward(self, x: None, y: VirtualTokens | None) -> VirtualTokens:
        """Returns itself, as the contents of the slot."""
        return self

    @property
    def rows(self) -> int:
        """Positions that they take in a cache: none where they are keys and values alone."""
        return self.count if self.embedded else 0

    def extend(
        self, batches: Sequence[Batch], loss_of: LossOf, multiple: int
    ) -> tuple[list[Batch], LossOf]:
        """Returns microbatches whose rows hold the virtual tokens, and the loss of their outputs.

        All grow to one length, a multiple of `multiple`, since pipeline stages exchange one shape;
        outputs at virtual tokens and at padding reach no loss. Labels there are 0 and masked.
        """
        if not self.embedded:
            return [b | {"positions": b["positions"] + self.count} for b in batches], loss_of
        places = [self._places(batch) for batch in batches]
        longest = max(
            len(at) + self.count * self._texts(b) for at, b in zip(places, batches, strict=True)
        )
        length = -(-longest // multiple) * multiple
        grown = [self._extend(b, at, length) for b, at in zip(batches, places, strict=True)]
        own = {id(new): (old, at) for new, old, at in zip(grown, batches, places, strict=True)}

        def loss_of_own(outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Any]:
            given, at = own[id(batch)]
            return loss_of({name: x[:, at] for name, x in outputs.items()}, given)

        return grown, loss_of_own

    def _texts(self, batch: Batch) -> int:
        """Texts in a row."""
        return len(batch["cu_seqlens"].unique()) - 1 if "cu_seqlens" in batch else 1

    def _places(self, batch: Batch) -> Tensor:
        """Where each token of a row stands in the longer one, int64 `[T]`."""
        row = torch.arange(batch["tokens"].shape[1])
        if "cu_seqlens" in batch:
            lengths = batch["cu_seqlens"].to(torch.int64).unique().diff()
            row = row + torch.repeat_interleave(lengths) * self.count
        return (row + self.count).to(batch["tokens"].device, non_blocking=True)

    def _extend(self, batch: Batch, places: Tensor, length: int) -> Batch:
        """The batch with rows of `length`, and `virtual` int64 `[B, length]`: which virtual token,
        or -1.
        """
        rows, tokens = batch["tokens"].shape
        grown = dict(batch)
        for name in PER_TOKEN:
            if name in batch:
                grown[name] = batch[name].new_zeros(rows, length)
                grown[name][:, places.to(batch[name].device)] = batch[name]
        ends = torch.tensor([0, tokens])
        if "cu_seqlens" in batch:
            ends = batch["cu_seqlens"].to(torch.int64).unique()
            starts = ends + self.count * torch.arange(len(ends))
            own_end = starts[-1:] if starts[-1] < length else starts[:0]
            longer = torch.cat((starts[:-1], own_end, torch.tensor([length])))
            grown["cu_seqlens"] = longer.to(torch.int32)
        numbers = torch.arange(self.count, device=places.device)
        first = places[ends[:-1].to(places.device)][:, None] - self.count + numbers
        virtual = places.new_full((length,), -1)
        virtual[first] = numbers
        grown["positions"][:, places] += self.count
        grown["positions"][:, first] = numbers.expand_as(first)
        return grown | {"virtual": virtual.expand(rows, length)}
