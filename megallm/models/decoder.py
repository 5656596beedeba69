"""One pipeline stage of a transformer, decoder or encoder; with one stage it is the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.models.attention import AttentionInputs, LayerCache
from megallm.models.balance import RoutingInputs
from megallm.models.block import Block
from megallm.models.compute import ComputeConfig
from megallm.models.config import VOCABULARY_HEADS, ModelConfig
from megallm.models.critic import CriticHeads
from megallm.models.decode import plain_step
from megallm.models.heads import (
    MASK_ON_CPU,
    build_head,
    counted_tokens,
    final_norm,
    local_logits,
    next_token_logits,
    put_back,
    select_counted,
)
from megallm.models.lesson import lesson
from megallm.models.mtp import MtpModule, shift_labels, shift_row_mask
from megallm.models.stages import StageSpan
from megallm.ops.cross_entropy import Projection
from megallm.ops.embedding import look_up
from megallm.ops.precision import wide_dtype
from megallm.ops.rope import rope_tables
from megallm.ops.tiles import MaskSpec
from megallm.parallel import comm
from megallm.parallel.config import LayoutConfig
from megallm.parallel.context import Context
from megallm.parallel.divergence import Teacher, live_divergence, stored_divergence
from megallm.parallel.mesh import Mesh
from megallm.parallel.offload import Offload
from megallm.parallel.shard import Shard, normal
from megallm.parallel.tensor import (
    SEQUENCE_DIM,
    Norm,
    ShardedModule,
    Slot,
    gather_input,
    sequence_partial,
)
from megallm.parallel.units import Units, run_unit
from megallm.parallel.vocab import (
    LOG_PROB,
    VocabEmbedding,
    Wanted,
    fused_scores,
    fuses,
    label_scores,
)

Ready = Callable[[Tensor], Tensor]
DEFAULT_LAYOUT, DEFAULT_COMPUTE = LayoutConfig(), ComputeConfig()


def _as_it_is(x: Tensor) -> Tensor:
    return x


class TokenTable(ShardedModule):
    """Learned vectors `(rows, D)` on every tp rank, looked up for its own tokens: positions, or
    types of tokens.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, rows: int, sp: bool) -> None:
        super().__init__(mesh, sp)
        self.add_parameter(
            "weight",
            Shard(
                (rows, config.hidden_size), {}, sequence_partial(mesh, sp), normal(config.init_std)
            ),
        )

    def forward(self, numbers: Tensor) -> Tensor:
        """Maps `[B, T/cp]` -> `[B, T/cp/tp or T/cp, D]`."""
        here = comm.own_slice(numbers, self.mesh.tp, SEQUENCE_DIM) if self.sp else numbers
        return look_up(here, self.weight)


class Stage(ShardedModule):
    """Layers of one pipeline stage.

    The first stage takes tokens, the others hidden states `[B, T/cp/tp or T/cp, D]`; the last
    returns the head's per-token scalars. With tied embeddings, or tokens that are embedded again to
    predict further ones, the last stage shares the first one's embedding when that is on the same
    rank, and otherwise holds its own piece under the same logical name `embedding.weight`; the
    engine keeps the two equal. `units` is told when the embedding, a block, a depth of multi-token
    prediction or the head is about to be used or done with. `wanted` says which of the head's
    scalars a pass is for.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        span: StageSpan,
        layout: LayoutConfig = DEFAULT_LAYOUT,
        compute: ComputeConfig = DEFAULT_COMPUTE,
        embedding: VocabEmbedding | None = None,
    ) -> None:
        super().__init__(mesh, layout.sp)
        self.config, self.span = config, span
        self.units: Units | None = None
        self.wanted = Wanted(config.scores)
        self.teacher: Teacher | None = None  # what the divergence is one from
        self.offload = Offload(mesh.device) if compute.offload else None
        self.fused_head = compute.fused_head
        self.context = Context(mesh, layout, config.num_heads // mesh.tp.size)
        # Virtual tokens (`models.virtual`), and what changes the embedding's output.
        self.prompt, self.virtual, self.noise = Slot(mesh), Slot(mesh), Slot(mesh)
        self.after_embedding = Slot(mesh)  # called with all that the first block takes
        self.positions = self.token_types = self.embedding_norm = self.final_norm = self.head = None
        self.critic: CriticHeads | None = None
        self.q_beta = 0.0  # of decoding: how much Q weighs beside the logits
        if span.first or (span.last and config.embeds_last):
            self.embedding = embedding or VocabEmbedding(
                mesh, config.vocab_size, config.hidden_size, normal(config.init_std), self.sp
            )
        if span.first and config.positions == "learned":
            rows = config.max_positions + config.position_offset
            self.positions = TokenTable(config, mesh, rows, self.sp)
        if span.first and config.token_types:
            self.token_types = TokenTable(config, mesh, config.token_types, self.sp)
        if span.first and config.embedding_norm:
            partial = sequence_partial(mesh, self.sp)
            self.embedding_norm = Norm(
                mesh, config.norm, config.hidden_size, config.norm_eps, partial
            )
        parts = compute.recomputed  # of each local layer: what activation checkpointing runs again
        self.layers = nn.ModuleDict(
            {
                str(n): Block(config, mesh, self.sp, parts(n - span.begin), config.layer_plan(n))
                for n in range(span.begin, span.end)
            }
        )
        if span.last:
            if config.norm_place != "post":
                self.final_norm = final_norm(config, mesh, self.sp)
            self.head = build_head(config, mesh, self.sp)
            if config.critic is not None:
                self.critic = CriticHeads(config, mesh, self.sp)
        depths = range(config.mtp.depth if span.last else 0)
        self.mtp = nn.ModuleDict(
            {
                str(n): MtpModule(
                    config, mesh, self.sp, parts(span.end + n - span.begin), span.end + n
                )
                for n in depths
            }
        )

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        return None if self.head is None else self.head.bias

    def head_operands(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the head over the vocabulary multiplies: features `[..., D]` and its matrix
        `[V/tp, D]`, both wider with an adapter. What divides logits divides the features.
        """
        if self.config.logits_scaling is not None:
            features = features / self.config.logits_scaling
        if self.head is None:
            return features, self.head_weight
        return self.head.widened(features, self.head_weight)

    def embed(
        self,
        tokens: Tensor,
        positions: Tensor,
        token_types: Tensor | None = None,
        virtual: Tensor | None = None,
    ) -> Tensor:
        """Maps this rank's tokens `[B, T/cp]` -> hidden states `[B, T/cp/tp or T/cp, D]`; without
        types all are 0.

        The norm is a unit of its own: its backward pass needs weights again, a look-up's does not.
        """
        given = tokens, positions, token_types, virtual
        once = not self.embedding.is_adapted
        x = run_unit(self.units, ("embedding",), self.look_up, *given, once=once)
        if self.embedding_norm is not None:
            x = run_unit(self.units, ("embedding_norm",), self.embedding_norm, x)
        return self.after_embedding(x)

    def look_up(
        self,
        tokens: Tensor,
        positions: Tensor,
        token_types: Tensor | None,
        virtual: Tensor | None,
    ) -> Tensor:
        """Returns the sum of the embedding's rows and of the learned positions and types that there
        are.
        """
        x = self.noise(self.scaled(self.embedding(tokens)))
        if virtual is not None:
            here = comm.own_slice(virtual, self.mesh.tp, SEQUENCE_DIM) if self.sp else virtual
            x = run_unit(self.units, ("prompt",), self.prompt, x, here)
        if self.positions is not None:
            x = x + self.positions(positions + self.config.position_offset)
        if self.token_types is not None:
            x = x + self.token_types(
                torch.zeros_like(tokens) if token_types is None else token_types
            )
        return x

    def scaled(self, x: Tensor) -> Tensor:
        """Returns embeddings times their scale, which has their precision (as in Gemma)."""
        scale = self.config.embedding_scale
        return x if scale is None else x * torch.tensor(scale, dtype=x.dtype).item()

    def blocks(
        self, x: Tensor, inputs: AttentionInputs, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """Run this stage's layers on this cp rank's tokens, which are described by `inputs`."""
        if self.offload is not None:
            self.offload.begin()
        for i, (number, block) in enumerate(self.layers.items()):
            cache = caches[i] if caches else None
            x = run_unit(self.units, (f"layers.{number}",), self.block, x, block, inputs, cache)
        return x

    def attention_inputs(
        self,
        positions: Tensor,
        dtype: torch.dtype,
        mask_spec: MaskSpec | None = None,
        routing: RoutingInputs | None = None,
    ) -> AttentionInputs:
        """Returns where this rank's tokens `[B, T/cp]` stand and what they see; rotary tables in
        `dtype`.
        """
        config = self.config
        if config.positions != "rope":
            return AttentionInputs(None, None, self.context, mask_spec, routing)
        longest = positions.shape[1] if mask_spec is None else mask_spec.longest
        made = [
            rope_tables(positions, config.rope_size, theta, dtype, scaling, longest)
            for theta, scaling in config.ropes
        ]
        return AttentionInputs.with_tables(made, self.context, mask_spec, routing)

    def block(
        self, x: Tensor, block: Block, inputs: AttentionInputs, cache: LayerCache | None
    ) -> Tensor:
        """Runs one block; what it saves may wait in CPU memory."""
        if cache is not None and cache.plain:
            return plain_step(x, block, inputs, cache)
        if self.offload is None or not torch.is_grad_enabled():
            return block.run(block, x, inputs, cache)
        with self.offload.block((*block.parameters(), *inputs.tables)):
            return block.run(block, x, inputs, cache)

    def features(self, x: Tensor) -> Tensor:
        """Maps hidden states of the last block to what the head's matrix is applied to, `[B,
        T/cp/tp or T/cp, D]`.
        """
        x = x if self.final_norm is None else self.final_norm(x)
        return x if self.head is None else self.head.features(x)

    def logits(self, x: Tensor, ready: Ready, counted: Tensor | None = None) -> Tensor:
        """Returns this rank's piece of the logits, `[B, T/cp, V/tp]` or of the tokens `counted`
        `[n, V/tp]`; of a head with few outputs `[B, T/cp/tp or T/cp, C]`.
        """
        if self.config.head not in VOCABULARY_HEADS:
            return self.head.logits(ready(x))
        features, weight = self.head_operands(ready(x))
        queue, bias = self.weight_grads, self.head_bias
        return local_logits(features, weight, self.mesh, self.sp, queue, bias, counted)

    def fused_outputs(
        self,
        x: Tensor,
        ready: Ready,
        labels: Tensor,
        counted: Tensor | None,
        wanted: Wanted,
        taught: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Returns what is wanted, straight from hidden states: a head over the vocabulary without
        logits. `taught` is what a teacher says of these tokens.
        """
        features, weight = self.head_operands(ready(x))
        hidden = select_counted(gather_input(features, self.mesh, self.sp, "vocab.logits"), counted)
        head, vocab = Projection(weight, self.head_bias), self.config.vocab_size
        if not taught:
            return tuple(fused_scores(hidden, head, labels, self.mesh, vocab, wanted).values())
        plain = wanted._replace(names=tuple(n for n in wanted.names if n != "divergence"))
        found = fused_scores(hidden, head, labels, self.mesh, vocab, plain) if plain.names else {}
        found["divergence"] = self.divergence(hidden, head, taught, wanted.temperature)
        return tuple(found[name] for name in wanted.names)

    def divergence(
        self, hidden: Tensor, head: Projection, taught: tuple[Tensor, ...], temperature: float
    ) -> Tensor:
        """Returns the divergence from the teacher, of hidden states of tokens that count."""
        teacher = self.teacher
        if len(taught) == 2:
            own = self.mesh, self.config.vocab_size
            return stored_divergence(hidden, head, taught, teacher, temperature, own)
        if teacher.head is None:  # the base of this very model
            teacher = teacher._replace(head=Projection(self.head_weight, self.head_bias))
        return live_divergence(hidden, head, taught[0], teacher, temperature, self.mesh)

    def taught(self, batch: dict[str, Tensor], counted: Tensor | None) -> tuple[Tensor, ...]:
        """Returns what the teacher says of this rank's tokens that count: its hidden states `[n,
        D]`, or ids and log-probs `[n, K]` of those `[B, T, K]` of whole rows.
        """
        if self.teacher is None:
            raise UsageError(
                "The loss needs the divergence from a teacher, and the engine has none: "
                "engine.distillation.compare_with gives it one."
            )
        if "teacher_hidden" in batch:
            return (batch["teacher_hidden"],)
        stored = ("teacher_ids", "teacher_log_probs")
        return tuple(select_counted(self._local(batch, name), counted) for name in stored)

    def forward(self, x: Tensor | None, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Runs one microbatch and returns hidden states to the next stage, or per-token scalars
        such as `{"log_prob": [B, T]}`.

        The batch may name the `token_types` `[B, T]`; `labels` are read by every head but that of
        values.
        """
        positions, token_types, labels, virtual = (
            self._local(batch, name) for name in ("positions", "token_types", "labels", "virtual")
        )
        if self.span.first:
            tokens = self.context.local(batch["tokens"])
            x = self.embed(tokens, positions, token_types, virtual)
        mask_spec = self.context.mask_spec(batch, self.config.sliding_window, self.config.causal)
        routing = (
            RoutingInputs.of(batch, self.context, self.mesh, self.sp)
            if self.config.moe.num_experts
            else None
        )
        inputs = self.attention_inputs(positions, wide_dtype(x.dtype), mask_spec, routing)
        x = self.blocks(x, inputs)
        if not self.span.last:
            return x
        if self.config.head == "none":
            raise UsageError("model.head is none: a body alone computes nothing to train on.")
        if self.wanted.names in (("hidden",), ("whole_hidden",), ("top",)):
            return lesson(self, x, batch)
        outputs = self.own_scores(x, labels, batch)
        if any(name.startswith("mtp_") for name in self.wanted.names):
            outputs |= self.mtp_scores(x, batch, inputs)
        return {name: self.context.whole(values) for name, values in outputs.items()}

    def own_scores(
        self, x: Tensor, labels: Tensor | None, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the wanted scalars `[B, T/cp]` of the next token, of classes or of values."""
        names = tuple(name for name in self.wanted.names if not name.startswith("mtp_"))
        mask = batch.get(MASK_ON_CPU, batch.get("mask"))
        found: dict[str, Tensor] = {}
        if self.critic is not None:
            beside = tuple(name for name in names if name in self.critic.names)
            names = tuple(name for name in names if name not in beside)
            found = self.critic_scores(x, labels, mask, beside) if beside else {}
        if not names:
            return found
        wanted = self.wanted._replace(names=names)
        return found | self.score(x, self.features, labels, mask, wanted, batch)

    def critic_scores(
        self, x: Tensor, labels: Tensor, mask: Tensor | None, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Returns scalars of the values beside the head `[B, T/cp]`, those of Q 0 where the mask is
        False.
        """
        counted = None if mask is None else counted_tokens(self.context.local(mask), x.device)
        own = select_counted(labels, counted)
        fused = self.config.critic == "q" and fuses(self.fused_head, own.numel(), self.critic.q1)

        def outputs(x: Tensor) -> tuple[Tensor, ...]:
            return self.critic.outputs(self.features(x), own, counted, names, fused)

        # The final norm is of the head's unit.
        found = zip(names, run_unit(self.units, ("critic", "head"), outputs, x), strict=True)
        return {
            name: values if name == "value" else put_back(values, counted, labels.shape)
            for name, values in found
        }
    @property
    def head_keys(self) -> tuple[str, ...]:
        """Returns the units that the head is a part of."""
        return ("head", "embedding") if self.config.tie_embeddings else ("head",)

    def score(
        self,
        x: Tensor,
        ready: Ready,
        labels: Tensor | None,
        mask: Tensor | None,
        wanted: Wanted,
        batch: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Returns the wanted scalars of this rank's tokens, 0 where the `mask` `[B, T]` of whole
        rows is False (without one every token counts); `ready` makes of hidden states what the
        head's matrix takes. The `batch` is read for what a teacher says.

        All tp ranks count the same tokens; where none does, the head runs on none, and its weights
        have a gradient of zeros.
        """
        keys = self.head_keys
        if self.config.head not in VOCABULARY_HEADS:
            return self.head.outputs(
                run_unit(self.units, keys, self.logits, x, ready), labels, wanted
            )
        counted = None if mask is None else counted_tokens(self.context.local(mask), x.device)
        shape, own = labels.shape, select_counted(labels, counted)
        wanted = wanted._replace(cap=self.config.logit_cap)
        taught = self.taught(batch, counted) if "divergence" in wanted.names else ()
        if taught or fuses(self.fused_head, own.numel(), self.head_weight):
            given = ready, own, counted, wanted, taught
            found = run_unit(self.units, keys, self.fused_outputs, x, *given)
            scores = dict(zip(wanted.names, found, strict=True))
        else:
            logits = run_unit(self.units, keys, self.logits, x, ready, counted)
            scores = label_scores(logits, own, self.mesh, self.config.vocab_size, wanted)
        return {name: put_back(values, counted, shape) for name, values in scores.items()}

    def mtp_scores(
        self, x: Tensor, batch: dict[str, Tensor], inputs: AttentionInputs
    ) -> dict[str, Tensor]:
        """Returns `{"mtp_k": [B, T/cp]}`: the log-probability of the token k + 1 places ahead, for
        k = 1, 2, ...

        Labels and mask `[B, T]` are those of whole rows: what lies ahead may be on another cp rank.
        """
        labels, mask = batch["labels"], batch.get(MASK_ON_CPU, batch.get("mask"))
        wanted = LOG_PROB._replace(temperature=self.wanted.temperature)
        ready, joins, found = (
            self.features if self.config.mtp.joins else _as_it_is,
            self.config.mtp.joins,
            {},
        )
        for number, depth in self.mtp.items():
            ahead = int(number) + 1
            tokens = self.context.local(shift_labels(labels, ahead - 1)) if joins else None
            keys = (f"mtp.{number}", "embedding", "head") if joins else (f"mtp.{number}",)
            hidden = run_unit(self.units, keys, self.mtp_hidden, x, ready, depth, tokens, inputs)
            own_labels = self.context.local(shift_labels(labels, ahead))
            own_mask = None if mask is None else shift_row_mask(mask, ahead)
            scores = self.score(hidden, _as_it_is, own_labels, own_mask, wanted, batch)
            found[f"mtp_{ahead}"] = scores["log_prob"]
            if joins:
                x, ready = hidden, _as_it_is
        return found

    def mtp_hidden(
        self,
        x: Tensor,
        ready: Ready,
        depth: MtpModule,
        tokens: Tensor | None,
        inputs: AttentionInputs,
    ) -> Tensor:
        """Runs one depth of multi-token prediction."""
        embedded = None if tokens is None else self.scaled(self.embedding(tokens))
        return depth.run(depth, ready(x), embedded, inputs)

    def _local(self, batch: dict[str, Tensor], name: str) -> Tensor | None:
        return self.context.local(batch[name]) if name in batch else None

    def decode(
        self,
        x: Tensor | None,
        tokens: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        inputs: AttentionInputs | None = None,
    ) -> Tensor:
        """Runs new positions against the KV cache and returns hidden states, or the next token's
        logits `[B, V]` on the last stage.

        Built without sequence parallelism, since a step of decoding has a single position.
        With embedded virtual tokens the token -1 - i is the virtual one of number i.
        `inputs` are those of `positions`, where the caller has made them once for many stages.
        """
        virtual, numbers = self.virtual(None), None
        if virtual is not None and not virtual.embedded:
            positions, inputs = positions + virtual.count, None
        if self.span.first:
            if virtual is not None and virtual.embedded:
                numbers, tokens = -1 - tokens, tokens.clamp(min=0)
            x = self.embed(tokens, positions, virtual=numbers)
        if inputs is None:
            inputs = self.attention_inputs(positions, wide_dtype(x.dtype))
        x = self.blocks(x, inputs, caches)
        if not self.span.last:
            return x
        keys = (*self.head_keys, "critic") if self.q_beta else self.head_keys
        return run_unit(self.units, keys, self.last_logits, x)

    def last_logits(self, x: Tensor) -> Tensor:
        """Returns wide logits `[B, V]` of the last position, on every tp rank; with `q_beta` those
        of pi exp(beta (Q - V)), of which V, the same for every token, is left out.
        """
        own = self.features(x[:, -1:])
        features, weight = self.head_operands(own)
        added = self.q_beta * self.critic.least_q(own) if self.q_beta else None
        vocab, cap = self.config.vocab_size, self.config.logit_cap
        return next_token_logits(features, weight, self.mesh, vocab, self.head_bias, added, cap)
