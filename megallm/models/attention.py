"""Grouped-query attention (arXiv 2305.13245) over tensor-parallel heads (query heads are split over
tp, and key/value heads where they divide), and what its relatives share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megallm.models.balance import RoutingInputs
from megallm.models.config import ModelConfig
from megallm.models.layer_plan import LayerPlan
from megallm.ops.attention import Prefix, causal_attention
from megallm.ops.precision import wide
from megallm.ops.rope import apply_rope
from megallm.ops.tiles import MaskSpec
from megallm.parallel import comm
from megallm.parallel.context import Context
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runner
from megallm.parallel.shard import Shard, constant, normal
from megallm.parallel.tensor import ColumnLinear, Norm, RowLinear, ShardedModule, Slot, gather_input

CacheShape = tuple[
    tuple[int, int], tuple[int, int]
]  # local kv heads and size of a key, and of a value


@dataclass
class LayerCache:
    """The KV cache of one layer for decoding in one piece, `[B, capacity, *CacheShape]`: keys and
    values, filled up to `length`.
    """

    keys: Tensor
    values: Tensor
    length: int = 0
    plain: bool = False  # a step for which `decode.plain_step` stands in for the block
    ops: ModuleType | None = None  # the extension, where it computes such steps

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions and return everything so far."""
        end = self.length + k.shape[1]
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]

    def attend(
        self, q: Tensor, kv: Tensor, inputs: AttentionInputs, heads: HeadPlan, window: int | None
    ) -> Tensor:
        """Rotates q `[n, H E]` and the keys of kv `[n, 2 K E]`, stores these and their values, and
        returns attention `[n, H E]` to all that each row holds, by the extension.
        """
        raise NotImplementedError

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        sinks: Tensor | None = None,
        prefix: Prefix | None = None,
        cap: float | None = None,
    ) -> Tensor:
        """Computes attention of new queries, which stand last, to what `append` returned (after
        pairing of heads), and to a prefix.
        """
        return causal_attention(q, k, v, window, sinks, prefix, cap)


@dataclass(frozen=True)
class AttentionInputs:
    """This rank's tokens of a microbatch: rotary tables `[B, T/cp, E/2]` of their positions, what
    they may see, and where those stand that it routes to experts (None without experts, and in
    decoding). `windowed` are those of layers with a window, where their rotary tables differ."""

    cos: Tensor | None
    sin: Tensor | None
    context: Context
    mask_spec: MaskSpec | None = None
    routing: RoutingInputs | None = None
    windowed: AttentionInputs | None = None

    @staticmethod
    def with_tables(tables: list[tuple[Tensor, Tensor]], *rest: Any) -> AttentionInputs:
        """Returns inputs of the tables of all layers, or those of most and of the windowed ones."""
        first, *others = (AttentionInputs(*pair, *rest) for pair in tables)
        return replace(first, windowed=others[0]) if others else first

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        further = () if self.windowed is None else self.windowed.tables
        return self.cos, self.sin, *further

    def of(self, plan: LayerPlan) -> AttentionInputs:
        """Returns those of a layer."""
        return self.windowed if plan.window_rope and self.windowed is not None else self

    def visible(self, window: int | None, cap: float | None, tokens: int) -> MaskSpec | None:
        """Returns what a layer with this window sees of its scores, with their soft cap; None for
        ordinary causal attention on one rank.
        """
        if self.mask_spec is None and cap is None:
            return None
        spec = self.mask_spec or MaskSpec((0, tokens))
        return replace(spec, window=window, cap=cap)

    @cached_property
    def whole_tables(self) -> tuple[Tensor, Tensor]:
        """Returns the tables as `x cos + roll(x, E/2) sin` takes them, `[B, T, 1, E]`."""
        cos, sin = torch.cat((self.cos, self.cos), -1), torch.cat((-self.sin, self.sin), -1)
        return cos[:, :, None], sin[:, :, None]


@dataclass(frozen=True)
class HeadPlan:
    """Which heads a tp rank computes: its query heads, the kv heads they read, and how they pair
    up.

    When tp does not divide the kv heads each rank holds all of kv and projects `kv_rows` of it;
    `pairing` is None when the local query heads divide evenly over the local kv heads in order.
    """

    num_q: int
    kv_begin: int
    num_kv: int
    replicated: bool
    pairing: tuple[int, ...] | None
    kv_shared: int = 0  # the first of them that the rank before projects too

    @staticmethod
    def of(num_heads: int, num_kv_heads: int, tp_size: int, tp_rank: int) -> HeadPlan:
        num_q = num_heads // tp_size
        if num_kv_heads % tp_size == 0:
            num_kv = num_kv_heads // tp_size
            return HeadPlan(num_q, tp_rank * num_kv, num_kv, False, None)
        group = num_heads // num_kv_heads
        reads = [head // group for head in range(tp_rank * num_q, (tp_rank + 1) * num_q)]
        begin, count = reads[0], reads[-1] - reads[0] + 1
        local = tuple(head - begin for head in reads)
        even = num_q % count == 0 and local == tuple(
            head // (num_q // count) for head in range(num_q)
        )
        before = tp_rank * num_q - 1  # the last query head of the rank before
        shared = 0 if before < 0 else max(0, before // group + 1 - begin)
        return HeadPlan(num_q, begin, count, True, None if even else local, shared)


class JointNorm(ShardedModule):
    """RMSNorm over all heads of a layer together, which tp divides (OLMoE, arXiv 2409.02060): `[B,
    T, n, E]` -> same.

    A rank adds the squares of its heads, and the ranks their sums; a key head that several ranks
    project counts once. Its gradient is then the sum over the ranks, since each used the joint
    scale for its own heads.
    """

    def __init__(
        self, mesh: Mesh, config: ModelConfig, heads: int, kv: HeadPlan | None = None
    ) -> None:
        super().__init__(mesh)
        size, whole = config.head_size, kv is not None and kv.replicated
        self.count, self.eps = heads * size, config.norm_eps
        self.shared, self.rows = 0, slice(None)
        if whole:
            self.shared = kv.kv_shared
            self.rows = slice(kv.kv_begin * size, (kv.kv_begin + kv.num_kv) * size)
        split = {} if whole else {0: "tp"}
        shard = Shard((self.count,), split, ("tp",) if whole else (), constant(1.0), decay=False)
        self.add_parameter("weight", shard)

    def forward(self, x: Tensor) -> Tensor:
        values = wide(x)
        squares = values[..., self.shared :, :].square().sum((-2, -1), keepdim=True)
        mean = comm.sum_fwd_sum_bwd(squares, self.mesh.tp, "tp.qk_norm") / self.count
        weight = wide(self.weight)[self.rows].view(x.shape[-2:])
        return (values * (mean + self.eps).rsqrt() * weight).to(x.dtype)


class Attention(ShardedModule):
    """`[B, T/cp/tp or T/cp, D]` -> the same; projections column-parallel over heads, the output
    row-parallel.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, sp: bool, recomputes: bool, plan: LayerPlan
    ) -> None:
        super().__init__(mesh, sp)
        self.run = runner(recomputes)
        self.head_size, self.plan, self.window = config.head_size, plan, plan.window
        self.factor, self.cap = config.query_factor, config.attention_cap
        # What `decode.plain_step` computes.
        self.plain = plan.rope and config.rope_size == config.head_size
        self.plain = self.plain and self.factor == 1 and self.cap is None
        self.heads = HeadPlan.of(config.num_heads, config.num_kv_heads, mesh.tp.size, mesh.tp.rank)
        d, e, init = config.hidden_size, config.head_size, normal(config.init_std)
        self.q = ColumnLinear(mesh, (config.num_heads * e, d), init, config.qkv_bias)
        self.kv = ColumnLinear(
            mesh, (2, config.num_kv_heads * e, d), init, config.qkv_bias, self.heads.replicated
        )
        self.o = RowLinear(mesh, (d, config.num_heads * e), scaled_init(config), config.o_bias, sp)
        self.q_norm = self.k_norm = None
        if config.qk_norm and config.qk_norm_span == "all":
            self.q_norm = JointNorm(mesh, config, config.num_heads)
            self.k_norm = JointNorm(mesh, config, config.num_kv_heads, self.heads)
        elif config.qk_norm:
            partial = ("tp",) if mesh.tp.size > 1 else ()
            kind = "rmsnorm_unit" if config.norm == "rmsnorm_unit" else "rmsnorm"
            self.q_norm = Norm(mesh, kind, e, config.norm_eps, partial)
            self.k_norm = Norm(mesh, kind, e, config.norm_eps, partial)
        self.prefix = Slot(mesh)  # gives keys and values [P, K_local, E] that every query sees
        add_sinks(self, config)

    @property
    def cache_shape(self) -> CacheShape:
        """Of a position in the cache, on this rank."""
        return (self.heads.num_kv, self.head_size), (self.heads.num_kv, self.head_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps `[B, T, D]` -> q `[B, T, H/tp, E]`, k and v `[B, T, K_local, E]`, before position
        embedding.
        """
        plan, e = self.heads, self.head_size
        rows = (
            slice(plan.kv_begin * e, (plan.kv_begin + plan.num_kv) * e) if plan.replicated else None
        )
        q = self.q(x).unflatten(-1, (plan.num_q, e))
        k, v = self.kv(x, rows).unflatten(-1, (2, plan.num_kv, e)).unbind(-3)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, cache: LayerCache | None
    ) -> Tensor:
        """Rotate, attend; `[B, T/cp, H/tp, E]`. Decoding has whole sequences on every cp rank."""
        inputs = inputs.of(self.plan)
        if inputs.cos is not None and self.plan.rope:
            q, k = apply_rope(q, inputs.cos, inputs.sin), apply_rope(k, inputs.cos, inputs.sin)
        if self.factor != 1:
            q = q * self.factor
        if cache is not None:
            k, v = cache.append(k, v)
        prefix = self.prefix(None)
        if self.heads.pairing is not None:
            k, v = self._pair(k, v)
            prefix = prefix and self._pair(*prefix)
        further = self.window, self.sinks, prefix
        if cache is not None:
            return cache.cached_attention(q, k, v, *further, self.cap)
        spec = inputs.visible(self.window, self.cap, q.shape[1])
        return inputs.context.parallel_attention(q, k, v, spec, *further)

    def _pair(self, k: Tensor, v: Tensor) -> Prefix:
        """Keys and values `[..., K_local, E]` -> those of each local query head."""
        return tuple(
            torch.cat([x.split(1, -2)[head] for head in self.heads.pairing], -2) for x in (k, v)
        )

    def forward(
        self, x: Tensor, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> Tensor:
        q, k, v = self.project(gather_input(x, self.mesh, self.sp))
        return self.o(self.run(self.core, q, k, v, inputs, cache).flatten(-2))


def add_sinks(attention: ShardedModule, config: ModelConfig) -> None:
    """Add attention sinks: `sinks (H,)`, split over tp: a score for each head that takes weight and
    gives no value; else None.
    """
    attention.register_parameter("sinks", None)
    if config.attention_sinks:
        shard = Shard((config.num_heads,), {0: "tp"}, (), normal(config.init_std), decay=False)
        attention.add_parameter("sinks", shard)


def scaled_init(config: ModelConfig):
    """Returns the start of output projections, smaller by sqrt(2 L), as in GPT-2; not where each
    sum is normalised (post-norm).
    """
    if config.norm_place == "post":
        return normal(config.init_std)
    return normal(config.init_std / (2 * config.num_layers) ** 0.5)
