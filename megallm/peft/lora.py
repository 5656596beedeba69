"""Low-rank adaptation and its kin: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353).

`y + s B A x` beside each matrix `W (out, in)`, with `A (r, in)` and `B (out, r)`; s is alpha / r,
and alpha / sqrt(r) for rsLoRA. A starts uniform in +-1/sqrt(in), B at zero, so the first step is
that of the base. Records follow the base: where `W` is split by rows, B is, and A is whole with a
gradient that is partial over tp; where it is split by columns the other way round, and nothing is
communicated beside what the base does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.models.config import ModelConfig
from megallm.ops.grouped_gemm import Runs, grouped_linear
from megallm.ops.low_rank import LowRankSum, add_low_rank
from megallm.ops.precision import wide
from megallm.parallel import comm
from megallm.parallel.expert import GroupedLinear
from megallm.parallel.linear import linear
from megallm.parallel.shard import Init, Shard, constant, normal, uniform_init
from megallm.parallel.tensor import ColumnLinear, Linear, RowLinear, ShardedModule
from megallm.parallel.vocab import VocabEmbedding
from megallm.peft.config import PeftConfig
from megallm.peft.dropout import Dropout
from megallm.peft.targets import EMBEDDING, EXPERTS, HEAD, Target, pattern_value

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"


class LowRankOptions(NamedTuple):
    """What one matrix gets: the rank, the factor s, the share dropped, and whether DoRA's."""

    dim: int
    scale: float
    dropout: Dropout | None = None
    dora: bool = False

    @staticmethod
    def of(config: PeftConfig, target: Target, dropout: Dropout | None) -> LowRankOptions:
        dim = int(pattern_value(config.rank_pattern, target, config.dim))
        alpha = pattern_value(config.alpha_pattern, target, config.alpha)
        scale = alpha / (dim**0.5 if config.rs else dim)
        return LowRankOptions(dim, scale, dropout, config.dora)


class LowRank(ShardedModule):
    """The adapter of one matrix, `member` of the stack of `base`: `(x, y) -> y'` for its part of
    the output."""

    def __init__(self, base: Linear, member: int, options: LowRankOptions) -> None:
        super().__init__(base.mesh, base.sp)
        self.options, self.member = options, member
        self.base = (base,)  # in a tuple: no child, its parameters are its own
        shard = base.shards["weight"]
        dims = len(shard.full)
        out, width = shard.full[-2:]
        rows, columns = shard.split.get(dims - 2), shard.split.get(dims - 1)
        tp = ("tp",) if base.mesh.tp.size > 1 else ()
        of_a = tp if isinstance(base, ColumnLinear) else shard.partial
        of_b = tp if isinstance(base, RowLinear) else shard.partial
        start = uniform_init(width**-0.5)
        self.add_parameter(A, _record((options.dim, width), 1, columns, of_a, start))
        self.add_parameter(B, _record((out, options.dim), 0, rows, of_b, constant(0.0)))
        if options.dora:
            record = _record((out,), 0, rows, of_b, constant(0.0), decay=False)
            self.add_parameter(MAGNITUDE, record)

    @property
    def is_plain(self) -> bool:
        """Whether it adds `s B A x` and does nothing else."""
        return not self.options.dora and self.options.dropout is None

    def low_rank(self, x: Tensor, rows: slice | None) -> Tensor:
        """Computes `s B A x`, `[..., in] -> [..., out]`, of these rows."""
        queue, dropout = self.weight_grads, self.options.dropout
        x = x if dropout is None else dropout(x, self)
        b = rows_of(self.lora_B, rows)
        return linear(linear(x, self.lora_A, None, queue), b, None, queue) * self.options.scale

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None, rows: slice | None) -> Tensor:
        made = self.low_rank(x, rows)
        if not self.options.dora:
            return y + made
        ratio = rows_of(self.lora_magnitude_vector / self.norm(), rows)
        plain = y if bias is None else y - bias
        return y + (ratio - 1) * plain + ratio * made

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Computes `s B A` of this rank's piece of the matrix, wide."""
        return wide(self.lora_B) @ wide(self.lora_A) * self.options.scale

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Returns the length of each row of `W + s B A` over the whole input, `(out,)` as the
        weights are; collective over tp where that divides the input. No gradient (section 4.3 of
        the paper).
        """
        weight = self.base[0].matrix
        return self._lengths(wide(weight.view(-1, *weight.shape[-2:])[self.member]) + self.delta())

    def _lengths(self, matrix: Tensor) -> Tensor:
        squares = matrix.square().sum(1)
        if isinstance(self.base[0], RowLinear):
            comm.all_reduce_(squares, self.mesh.tp, "dora.norm")
        return squares.sqrt().to(self.lora_B.dtype)

    @torch.no_grad()
    def starts(self) -> dict[str, Tensor]:
        """Returns this rank's pieces of what starts from the base's weights, by parameter."""
        return {MAGNITUDE: self.norm()} if self.options.dora else {}

    @torch.no_grad()
    def add_to(self, matrix: Tensor) -> None:
        """Put the adapter into this rank's piece of the matrix, wide; collective over tp."""
        matrix += self.delta()
        if self.options.dora:
            matrix *= (wide(self.lora_magnitude_vector) / wide(self._lengths(matrix)))[:, None]


def rows_of(values: Tensor, rows: slice | None) -> Tensor:
    """Returns what a rank uses of the rows that it holds: some, where keys and values are
    replicated.
    """
    return values if rows is None else values[rows]


def _record(
    full: tuple[int, ...],
    dim: int,
    axis: str | None,
    partial: tuple[str, ...],
    init: Init,
    decay: bool = True,
) -> Shard:
    """Split as the base is along `dim`, or whole with a gradient that is partial."""
    if axis is None:
        return Shard(full, {}, partial, init, decay)
    return Shard(full, {dim: axis}, (), init, decay)


class LowRankLinear(nn.ModuleDict):
    """The adapters of the matrices of one linear, by their place in its stack."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.stack = (base,), base.shards["weight"].full[:-2]

    def forward(self, x: Tensor, y: Tensor, rows: slice | None) -> Tensor:
        bias = None if isinstance(self.base[0], RowLinear) else self.base[0].bias
        if bias is not None and rows is not None:
            bias = bias[..., rows]
        if all(adapter.is_plain for adapter in self.values()):
            return self._add(x, y, rows)
        if not self.stack:
            return self["0"](x, y, bias, rows)
        parts = list(y.chunk(self.stack[0], dim=-1))
        for member, adapter in self.items():
            at = int(member)
            parts[at] = adapter(x, parts[at], None if bias is None else bias[at], rows)
        return torch.cat(parts, dim=-1)

    def _add(self, x: Tensor, y: Tensor, rows: slice | None) -> Tensor:
        """All members at once, in place of `y`."""
        width = y.shape[-1] // (self.stack[0] if self.stack else 1)
        adapters = {int(member) * width: adapter for member, adapter in self.items()}
        a = [adapter.lora_A for adapter in adapters.values()]
        b = [rows_of(adapter.lora_B, rows) for adapter in adapters.values()]
        one = next(iter(adapters.values()))
        scales = [adapter.options.scale for adapter in adapters.values()]
        return add_low_rank(x, y, LowRankSum(list(adapters), scales, one.weight_grads), a, b)

    def add_to(self, weight: Tensor) -> None:
        """Put the adapters into this rank's piece of the whole weight, wide; collective over tp."""
        matrices = weight.view(-1, *weight.shape[-2:])
        for member, adapter in self.items():
            adapter.add_to(matrices[int(member)])


class LowRankExperts(ShardedModule):
    """The same for all experts of a linear: `A (X, r, in)` and `B (X, *stack, out, r)`."""

    def __init__(self, base: GroupedLinear, options: LowRankOptions) -> None:
        super().__init__(base.mesh)
        self.options = options
        full = base.shards["weight"].full
        a, b = (full[0], options.dim, full[-1]), (*full[:-1], options.dim)
        self.add_parameter(A, Shard(a, {0: "ep"}, (), uniform_init(full[-1] ** -0.5)))
        self.add_parameter(B, Shard(b, {0: "ep"}, (), constant(0.0)))

    def forward(self, x: Tensor, y: Tensor, runs: Runs) -> Tensor:
        inner = grouped_linear(x, self.lora_A, runs, self.weight_grads)
        made = grouped_linear(inner, self.lora_B.flatten(1, -2), runs, self.weight_grads)
        return y + made * self.options.scale

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> None:
        """Put the adapters into this rank's experts `(X, *stack, out, in)`, wide."""
        delta = wide(self.lora_B).flatten(1, -2) @ wide(self.lora_A) * self.options.scale
        weight += delta.view_as(weight)


class LowRankEmbedding(ShardedModule):
    """`E[t] + s B A[:, t]`, with `A (r, V)` split as the embedding is, and `B (D, r)`; here A
    starts at zero, as in PEFT."""

    def __init__(self, base: VocabEmbedding, options: LowRankOptions) -> None:
        super().__init__(base.mesh, base.sp)
        self.options = options
        vocab, size = base.shards["weight"].full
        tp = ("tp",) if base.mesh.tp.size > 1 else ()
        self.add_parameter(
            "lora_embedding_A", Shard((options.dim, vocab), {1: "tp"}, (), constant(0.0))
        )
        self.add_parameter("lora_embedding_B", Shard((size, options.dim), {}, tp, normal(1.0)))

    def forward(self, numbers: Tensor, rows: Tensor, here: Tensor | None) -> Tensor:
        inner = F.embedding(numbers, self.lora_embedding_A.t())
        inner = inner if here is None else inner * here[..., None]
        made = linear(inner, self.lora_embedding_B, None, self.weight_grads)
        return rows + made * self.options.scale

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> None:
        """Put the adapter into this rank's rows of the embedding, wide."""
        delta = wide(self.lora_embedding_B) @ wide(self.lora_embedding_A)
        weight += delta.t() * self.options.scale


class LowRankHead(ShardedModule):
    """The head over the vocabulary as one matrix `[W, B]` of features `[x, s A x]`: so that log-
    probabilities without logits need nothing new, and a tied embedding stays as it is.

    At the start B is zero, and the result that of the base up to the order of sums."""

    def __init__(self, stage: nn.Module, options: LowRankOptions) -> None:
        super().__init__(stage.mesh, stage.sp)
        self.options = options
        vocab, size = stage.config.vocab_size, stage.config.hidden_size
        tp = ("tp",) if self.sp else ()
        self.add_parameter(A, Shard((options.dim, size), {}, tp, uniform_init(size**-0.5)))
        self.add_parameter(B, Shard((vocab, options.dim), {0: "tp"}, (), constant(0.0)))

    def features(self, x: Tensor) -> Tensor:
        """Returns `s A x`, `[..., D] -> [..., r]`."""
        dropout = self.options.dropout
        x = x if dropout is None else dropout(x, self)
        return linear(x, self.lora_A, None, self.weight_grads) * self.options.scale

    def columns(self) -> Tensor:
        """Returns what stands beside this rank's rows of the matrix, `(V/tp, r)`."""
        return self.lora_B

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> None:
        """Put the adapter into this rank's rows of the head's matrix, wide."""
        weight += wide(self.lora_B) @ wide(self.lora_A) * self.options.scale


def low_rank_of(base: Any, members: list[tuple[Target, LowRankOptions]]) -> nn.Module:
    """Returns the adapter of a module on the meta device, for these targets of it."""
    if isinstance(base, GroupedLinear):
        return LowRankExperts(base, members[0][1])
    if isinstance(base, VocabEmbedding):
        return LowRankEmbedding(base, members[0][1])
    made = LowRankLinear(base)
    for target, options in members:
        made[str(target.member)] = LowRank(base, target.member, options)
    return made


def check_targets(config: PeftConfig, model: ModelConfig, chosen: list[Target]) -> None:
    """Raises UsageError for what a kind of target cannot have. A dropped input of experts would be
    another one for each of them; an embedding's adapter would stand on two stages."""
    for target in chosen:
        no_dora, no_dropout = (EXPERTS, EMBEDDING, HEAD), (EXPERTS, EMBEDDING)
        for key, on, kinds in (
            ("dora", config.dora, no_dora),
            ("dropout", config.dropout > 0, no_dropout),
        ):
            if on and target.kind in kinds:
                too = " (nor in PEFT)" if target.kind == EXPERTS else ""
                raise UsageError(
                    f"peft.{key} does not work on {target.names[-1]}{too}: name other targets in "
                    f"peft.targets, or switch peft.{key} off."
                )
        if target.kind in (EMBEDDING, HEAD) and model.mtp.depth:
            raise UsageError(
                f"peft.targets has {target.names[-1]}, which model.mtp.depth {model.mtp.depth} "
                "uses again for further tokens: name other targets, or set model.mtp.depth to 0."
            )
