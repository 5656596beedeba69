"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437).

Keys and values of all heads are made of one small latent a token, and a rotated key of `R` features
is shared by the heads; queries come from the hidden state or from a latent of their own. Training
makes keys and values and attends as usual; where keys travel over context-parallel ranks it is the
latents that do, and each rank makes keys and values of what arrives. Decoding keeps latents and
rotated keys only, C + R numbers a position, and attends in the latent's own space: `q k = (q W_k)
c` and `sum p v = W_v sum p c`.

Tensor parallelism divides the heads. The matrices down to the latents are whole on every rank and
act on its own tokens, outside the tensor-parallel region; what enters it is the latents, and the
hidden state only where queries are made of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallm.models.attention import AttentionInputs, CacheShape, LayerCache, add_sinks, scaled_init
from megallm.models.config import ModelConfig
from megallm.models.layer_plan import LayerPlan
from megallm.ops.attention import causal_attention
from megallm.ops.rope import apply_rope, score_factor
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runner
from megallm.parallel.shard import normal
from megallm.parallel.tensor import (
    ColumnLinear,
    Norm,
    RowLinear,
    ShardedModule,
    Slot,
    TokenLinear,
    gather_input,
    sequence_partial,
)


class LatentAttention(ShardedModule):
    """`[B, T/cp/tp or T/cp, D]` -> the same.

    N, R and E are the sizes of a head's plain and rotated features and of its values; Q and C those
    of the latents. The rotated features are paired in halves, as everywhere in megallm: conversion
    reorders the rows of checkpoints that pair neighbours.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, sp: bool, recomputes: bool, plan: LayerPlan
    ) -> None:
        super().__init__(mesh, sp)
        mla, d, h, init = config.mla, config.hidden_size, config.num_heads, normal(config.init_std)
        self.window = plan.window
        self.run = runner(recomputes)
        self.num_heads = h // mesh.tp.size
        self.plain, self.rotated, self.value_size = (
            mla.nope_head_size,
            mla.rope_head_size,
            mla.value_head_size,
        )
        self.latent_size, self.factor = mla.kv_lora_dim, score_factor(config.rope_scaling_spec)
        self.q_down = self.q_latent_norm = None
        if mla.q_lora_dim:
            self.q_down = TokenLinear(mesh, (mla.q_lora_dim, d), init, False, sp)
            self.q_latent_norm = self._norm(config, mla.q_lora_dim, sp)
        self.q = ColumnLinear(
            mesh, (h * (self.plain + self.rotated), mla.q_lora_dim or d), init, False
        )
        self.kv_down = TokenLinear(mesh, (mla.kv_lora_dim, d), init, False, sp)
        self.kv_latent_norm = self._norm(config, mla.kv_lora_dim, sp)
        self.k_rope = TokenLinear(mesh, (self.rotated, d), init, False, sp)
        self.k_up = ColumnLinear(mesh, (h * self.plain, mla.kv_lora_dim), init, False)
        self.v_up = ColumnLinear(mesh, (h * self.value_size, mla.kv_lora_dim), init, False)
        self.o = RowLinear(mesh, (d, h * self.value_size), scaled_init(config), config.o_bias, sp)
        self.prefix = Slot(mesh)  # gives keys [P, H/tp, N + R] and values [P, H/tp, E], not latents
        add_sinks(self, config)

    def _norm(self, config: ModelConfig, size: int, sp: bool) -> Norm:
        eps = config.norm_eps if config.mla.norm_eps is None else config.mla.norm_eps
        return Norm(self.mesh, "rmsnorm", size, eps, sequence_partial(self.mesh, sp))

    @property
    def _trains_keys(self) -> bool:
        """Whether the matrices up from the latents have anything to train, adapters included."""
        ups = (self.k_up, self.v_up)
        return any(param.requires_grad for up in ups for param in up.parameters())

    @property
    def cache_shape(self) -> CacheShape:
        """Of a position in the cache, the same on every tp rank: latent and rotated key together,
        no values.
        """
        return (1, self.latent_size + self.rotated), (1, 0)

    def compress(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps `[B, T/tp or T, D]` -> what queries are made of `[B, T, Q or D]`, latents `[B, T,
        C]`, keys `[B, T, R]`.

        One collective over tp for all three.
        """
        source = x if self.q_down is None else self.q_latent_norm(self.q_down(x))
        made = source, self.kv_latent_norm(self.kv_down(x)), self.k_rope(x)
        if self.mesh.tp.size == 1:
            return made
        entered = gather_input(
            torch.cat(made, dim=-1), self.mesh, self.sp, "sp.latents" if self.sp else "tp.latents"
        )
        return entered.split([part.shape[-1] for part in made], dim=-1)

    def core(
        self,
        source: Tensor,
        latent: Tensor,
        key: Tensor,
        inputs: AttentionInputs,
        cache: LayerCache | None,
    ) -> Tensor:
        """Makes queries, keys and values from the latents, and computes attention: `[B, T/cp, H/tp,
        E]`.
        """
        q = self.q(source).unflatten(-1, (self.num_heads, -1))
        if self.factor != 1:
            q = q * self.factor
        plain, rotated = q.split((self.plain, self.rotated), dim=-1)
        rotated, key = (
            apply_rope(part, inputs.cos, inputs.sin) for part in (rotated, key[:, :, None])
        )
        if cache is not None:
            seen, _ = cache.append(
                torch.cat((latent[:, :, None], key), dim=-1), latent.new_empty((*key.shape[:3], 0))
            )
            if seen.shape[1] > q.shape[1] or q.shape[1] == 1:
                return self.absorbed(plain, rotated, seen, cache)
        further = self.window, self.sinks, self.prefix(None)
        spec = inputs.visible(self.window, None, q.shape[1])
        q, latent, context = torch.cat((plain, rotated), dim=-1), latent[:, :, None], inputs.context
        exact = (
            self.k_up.fp8 is None and self.k_up.te is None
        )  # FP8 rounds the gradient of whole keys, not of shares
        if cache is None and exact and context.carries_latents:
            if self._trains_keys and torch.is_grad_enabled() and not latent.requires_grad:
                # The exchange sees tensors, not the matrices: all below may be frozen but these.
                latent = latent.detach().requires_grad_()
            return context.parallel_latent_attention(
                q, latent, key, self.keys_and_values, spec, *further[1:]
            )
        k, v = self.keys_and_values(latent, key)
        if (
            cache is not None
        ):  # a whole prompt: keys and values of its tokens are cheaper than its latents
            return causal_attention(q, k, v, *further)
        return context.parallel_attention(q, k, v, spec, *further)

    def keys_and_values(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns those of all heads, `[B, T, H/tp, N + R or E]`, of latents `[B, T, 1, C]` and
        rotated keys `[B, T, 1, R]`.
        """
        plain, values = (
            up(latent[:, :, 0]).unflatten(-1, (self.num_heads, -1)) for up in (self.k_up, self.v_up)
        )
        return torch.cat((plain, key.expand(-1, -1, self.num_heads, -1)), dim=-1), values

    def absorbed(self, plain: Tensor, rotated: Tensor, seen: Tensor, cache: LayerCache) -> Tensor:
        """Computes the same against the KV cache `[B, T, 1, C + R]`: one key a position for all
        heads, its latent the value.

        Adapters are modules, not matrices, and a prefix is no latent: with one, or with weights in
        4 bit, keys and values of the whole cache are made.
        """
        adapted = any(slot.is_adapted for slot in (self.k_up, self.v_up, self.prefix))
        if adapted or self.k_up.quantized is not None or self.v_up.quantized is not None:
            latent, key = seen.split((self.latent_size, self.rotated), dim=-1)
            k, v = self.keys_and_values(latent, key)
            q = torch.cat((plain, rotated), dim=-1)
            return cache.cached_attention(q, k, v, self.window, self.sinks, self.prefix(None))
        up = self.k_up.weight.unflatten(0, (self.num_heads, -1))
        q = torch.cat((torch.einsum("bthn,hnc->bthc", plain, up), rotated), dim=-1)
        q = q * (q.shape[-1] / (self.plain + self.rotated)) ** 0.5  # the scale is that of the heads
        mixed = cache.cached_attention(
            q, seen, seen[..., : self.latent_size], self.window, self.sinks
        )
        return torch.einsum(
            "bthc,hec->bthe", mixed, self.v_up.weight.unflatten(0, (self.num_heads, -1))
        )

    def forward(
        self, x: Tensor, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> Tensor:
        return self.o(self.run(self.core, *self.compress(x), inputs, cache).flatten(-2))
