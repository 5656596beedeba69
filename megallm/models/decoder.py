"""One pipeline stage of a decoder-only transformer; with one stage it is the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megallm.models.attention import LayerCache, Places
from megallm.models.block import Block
from megallm.models.config import ModelConfig
from megallm.models.heads import LmHead, final_norm, language_model, local_logits, next_token_logits
from megallm.models.stages import StageSpan
from megallm.ops.precision import wide_dtype
from megallm.ops.rope import rope_tables
from megallm.ops.tiles import Sight
from megallm.parallel import comm
from megallm.parallel.context import Context
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import recompute
from megallm.parallel.shard import Shard, normal
from megallm.parallel.tensor import SEQUENCE_DIM, ShardedModule, sequence_partial
from megallm.parallel.units import Units, run_unit
from megallm.parallel.vocab import VocabEmbedding


@dataclass(frozen=True)
class StageOptions:
    """`sp`: activations outside the tensor-parallel region are split along T. `recompute`: none, selective, full.

    `cp_kind` and `cp_ulysses` say how context-parallel ranks exchange keys (`parallel.context`).
    """

    sp: bool = False
    recompute: str = "none"
    cp_kind: str = "ring"
    cp_ulysses: int | None = None


class PositionEmbedding(ShardedModule):
    """Learned absolute positions `(max_positions, D)`, on every tp rank."""

    def __init__(self, config: ModelConfig, mesh: Mesh, sp: bool) -> None:
        super().__init__(mesh)
        shard = Shard(
            (config.max_positions, config.hidden_size), {}, sequence_partial(mesh, sp), normal(config.init_std)
        )
        self.add_parameter("weight", shard)

    def forward(self, positions: Tensor) -> Tensor:
        return nn.functional.embedding(positions, self.weight)


class Stage(ShardedModule):
    """Layers of one pipeline stage.

    The first stage takes tokens, the others hidden states `[B, T/cp/tp or T/cp, D]`; the last returns the head's
    per-token scalars. With tied embeddings the last stage shares the first one's embedding when that is on the
    same rank, and otherwise holds its own piece under the same logical name `embedding.weight`; the engine keeps
    the two equal. `units` is told when the embedding, a block or the head is about to be used or done with.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, span: StageSpan, options: StageOptions,
        embedding: VocabEmbedding | None = None,
    ) -> None:  # fmt: skip
        super().__init__(mesh, options.sp)
        self.config, self.span = config, span
        self.units: Units | None = None
        self.recompute_blocks = options.recompute == "full"
        self.context = Context(mesh, options.cp_kind, config.num_heads // mesh.tp.size, options.cp_ulysses)
        self.positions = None
        if span.first or (span.last and config.tie_embeddings):
            self.embedding = embedding or VocabEmbedding(
                mesh, config.vocab_size, config.hidden_size, normal(config.init_std), self.sp
            )
        if span.first and config.positions == "learned":
            self.positions = PositionEmbedding(config, mesh, self.sp)
        self.layers = nn.ModuleDict(
            {str(n): Block(config, mesh, self.sp, options.recompute) for n in range(span.begin, span.end)}
        )
        if span.last:
            self.final_norm = final_norm(config, mesh, self.sp)
            if not config.tie_embeddings:
                self.head = LmHead(config, mesh)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """This rank's tokens `[B, T/cp]` -> hidden states `[B, T/cp/tp or T/cp, D]`."""
        x = self.embedding(tokens)
        if self.positions is not None:
            here = comm.own_slice(positions, self.mesh.tp, SEQUENCE_DIM) if self.sp else positions
            x = x + self.positions(here)
        return x

    def blocks(
        self, x: Tensor, positions: Tensor, sight: Sight | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """Run this stage's layers; `positions` `[B, T/cp]` are those of this cp rank's tokens."""
        tables: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.config.positions == "rope":
            config = self.config
            tables = rope_tables(
                positions, config.head_size, config.rope_theta, wide_dtype(x.dtype), config.rope_stretch
            )
        places = Places(*tables, self.context, sight)
        for i, (number, block) in enumerate(self.layers.items()):
            cache = caches[i] if caches else None
            x = run_unit(self.units, (f"layers.{number}",), self.block, x, block, places, cache)
        return x

    def block(self, x: Tensor, block: Block, places: Places, cache: LayerCache | None) -> Tensor:
        """One block, its activations kept or made again."""
        return recompute(self.recompute_blocks, block, x, places, cache)

    def logits(self, x: Tensor) -> Tensor:
        """This rank's piece of the logits, `[B, T/cp, V/tp]`."""
        return local_logits(self.final_norm(x), self.head_weight, self.mesh, self.sp, self.later)

    def forward(self, x: Tensor | None, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """One microbatch: hidden states to the next stage, or `{"log_prob": [B, T]}` on the last."""
        positions = self.context.local(batch["positions"])
        if self.span.first:
            tokens = self.context.local(batch["tokens"])
            x = run_unit(self.units, ("embedding",), self.embed, tokens, positions)
        x = self.blocks(x, positions, self.context.sight(batch, self.config.sliding_window))
        if not self.span.last:
            return x
        keys = ("head", "embedding") if self.config.tie_embeddings else ("head",)
        logits = run_unit(self.units, keys, self.logits, x)
        outputs = language_model(logits, self.context.local(batch["labels"]), self.mesh, self.config.vocab_size)
        return {name: self.context.whole(values) for name, values in outputs.items()}

    def decode(self, x: Tensor | None, tokens: Tensor, positions: Tensor, caches: list[LayerCache]) -> Tensor:
        """New positions against the cache: hidden states, or the next token's logits `[B, V]` on the last stage.

        Built without sequence parallelism, since a step of decoding has a single position.
        """
        if self.span.first:
            x = self.embed(tokens, positions)
        x = self.blocks(x, positions, caches=caches)
        if not self.span.last:
            return x
        return next_token_logits(self.final_norm(x[:, -1:]), self.head_weight, self.mesh, self.config.vocab_size)
