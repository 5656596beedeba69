"""Virtual tokens: prefix tuning (Li and Liang, arXiv 2101.00190), prompt tuning (Lester et al.,
arXiv 2104.08691) and P-tuning (Liu et al., arXiv 2103.10385).

Keys of a prefix are not rotated, and the text stands at the positions behind it, as in PEFT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.models.attention import Attention
from megallm.models.decoder import Stage
from megallm.models.mla import LatentAttention
from megallm.models.virtual import VirtualTokens
from megallm.parallel.shard import Init, Shard, normal, uniform_init
from megallm.parallel.tensor import ShardedModule, sequence_partial
from megallm.peft.injection import Injection
from megallm.peft.slots import put

START = 1.0  # standard deviation, that of `torch.nn.Embedding` in PEFT


def fill_prefix(stage: Stage, injection: Injection) -> None:
    """Put a prefix into the attention of each layer of the stage."""
    config = injection.config
    put(stage.virtual, config.name, VirtualTokens(config.virtual_tokens, False, injection.model))
    for block in stage.layers.values():
        keys = PrefixKeys(block.attention, config.virtual_tokens)
        put(block.attention.prefix, config.name, keys)


def fill_prompt(stage: Stage, injection: Injection) -> None:
    """Put virtual tokens in front of every text; the first stage has their rows."""
    config, hidden = injection.config, injection.model.hidden_size
    put(stage.virtual, config.name, VirtualTokens(config.virtual_tokens, True, injection.model))
    if not stage.span.first:
        return
    made = Prompt(stage, config.virtual_tokens, hidden)
    if config.method == "p-tuning":
        made = EncodedPrompt(stage, config.virtual_tokens, hidden, config.hidden)
    put(stage.prompt, config.name, made)


class PrefixKeys(ShardedModule):
    """`keys (P, K E)` and `values (P, K E)` of one layer, divided over tp as its kv heads are; with
    latent attention those of all query heads, `(P, H (N + R))` and `(P, H E)`."""

    def __init__(self, base: Attention | LatentAttention, count: int) -> None:
        super().__init__(base.mesh)
        if isinstance(base, LatentAttention):
            heads, whole = base.num_heads * base.mesh.tp.size, False
            sizes = base.plain + base.rotated, base.value_size
            self.heads = slice(None)
        else:
            plan, size = base.heads, base.head_size
            heads, whole = base.kv.shards["weight"].full[1] // size, plan.replicated
            sizes = size, size
            begin = plan.kv_begin if whole else 0
            self.heads = slice(begin, begin + plan.num_kv)
        split, partial = ({}, ("tp",)) if whole else ({1: "tp"}, ())
        self.sizes = sizes
        for name, size in zip(("keys", "values"), sizes, strict=True):
            shard = Shard((count, heads * size), split, partial, normal(START), False)
            self.add_parameter(name, shard)

    def forward(self, x: None, y: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Returns keys `[P, K_local, E]` and values, behind those of another prefix `y`."""
        made = tuple(
            flat.unflatten(-1, (-1, size))[:, self.heads]
            for flat, size in zip((self.keys, self.values), self.sizes, strict=True)
        )
        return made if y is None else tuple(map(torch.cat, zip(y, made, strict=True)))


class Prompt(ShardedModule):
    """Free rows `(P, D)` on every tp rank (prompt tuning)."""

    def __init__(self, base: ShardedModule, count: int, hidden: int) -> None:
        super().__init__(base.mesh, base.sp)
        self._add("embedding", (count, hidden), normal(START))

    def _add(self, name: str, full: tuple[int, ...], start: Init) -> None:
        partial = sequence_partial(self.mesh, self.sp)
        self.add_parameter(name, Shard(full, {}, partial, start, False))

    def table(self) -> Tensor:
        """Returns the table of virtual tokens `[P, D]`."""
        return self.embedding

    def forward(self, numbers: Tensor, y: Tensor) -> Tensor:
        """Returns hidden states `[B, t, D]` with virtual tokens in place where `numbers` `[B, t]`
        has one.
        """
        rows = F.embedding(numbers.clamp(min=0), self.table())
        return torch.where(numbers[..., None] >= 0, rows.to(y.dtype), y)


class EncodedPrompt(Prompt):
    """Rows made by an MLP of three layers (P-tuning); what is exported is what it makes of them."""

    def __init__(self, base: ShardedModule, count: int, hidden: int, inner: int) -> None:
        super().__init__(base, count, hidden)
        sizes = (hidden, inner, inner, hidden)
        for number, (width, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            self._add(f"weight_{number}", (out, width), uniform_init(width**-0.5))
            self._add(f"bias_{number}", (out,), uniform_init(width**-0.5))

    def table(self) -> Tensor:
        x = F.relu(F.linear(self.embedding, self.weight_0, self.bias_0))
        x = F.relu(F.linear(x, self.weight_1, self.bias_1))
        return F.linear(x, self.weight_2, self.bias_2)
