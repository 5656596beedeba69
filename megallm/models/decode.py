"""One step of decoding through a plain block, in few operations.

With one token a sequence a small model's time goes to the calls, not to the arithmetic. This is
`Block.forward` for the commonest case, written out without modules and with the rotation of queries
and keys in three operations each; the results are those of `Block.forward` to rounding. Anything
else (adapters, biases, FP8, experts, latents, tensor parallelism) takes the modules' way.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.models.attention import Attention, AttentionInputs, LayerCache
from megallm.models.block import Block
from megallm.models.mlp import Mlp
from megallm.ops.activation import swiglu
from megallm.parallel.tensor import Adaptable, Linear, Norm


def is_plain(block: Block) -> bool:
    """Returns whether `plain_step` computes what the block does. Ask anew where adapters may have
    been switched.
    """
    attention, mlp = block.attention, block.mlp
    if not (block.plain and isinstance(attention, Attention) and isinstance(mlp, Mlp)):
        return False
    norms = [block.attention_norm, block.mlp_norm, attention.q_norm, attention.k_norm]
    linears = [module for module in block.modules() if isinstance(module, Linear)]
    return (
        block.mesh.tp.size == 1
        and attention.plain
        and mlp.activation is swiglu
        and block.attention_norm.weight.dtype in (torch.float32, torch.float64)
        and all(
            norm is None or (isinstance(norm, Norm) and norm.kind == "rmsnorm") for norm in norms
        )
        and all(
            linear.bias is None
            and linear.fp8 is None
            and linear.te is None
            and linear.quantized is None
            for linear in linears
        )
        and not any(
            module.is_adapted for module in block.modules() if isinstance(module, Adaptable)
        )
    )


def plain_step(x: Tensor, block: Block, inputs: AttentionInputs, cache: LayerCache) -> Tensor:
    """Runs one token for each sequence, `[n, 1, D]` -> the same."""
    if cache.ops is not None and block.attention.sinks is None:
        return native_step(x, block, inputs, cache, cache.ops)
    attention, mlp = block.attention, block.mlp
    heads, size = attention.heads, attention.head_size
    rows = _norm(block.attention_norm, x)
    q = F.linear(rows, attention.q.weight).view(-1, 1, heads.num_q, size)
    kv = F.linear(rows, attention.kv.weight.flatten(0, -2)).view(-1, 1, 2, heads.num_kv, size)
    k, v = kv.unbind(2)
    if attention.q_norm is not None:
        q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
    cos, sin = inputs.of(attention.plan).whole_tables
    half = size // 2
    k, v = cache.append(torch.addcmul(k * cos, k.roll(half, -1), sin), v)
    q = torch.addcmul(q * cos, q.roll(half, -1), sin)
    out = cache.cached_attention(q, k, v, attention.window, attention.sinks)
    x = x + F.linear(out.flatten(-2), attention.o.weight)
    gate, up = F.linear(
        _norm(block.mlp_norm, x), mlp.gate_up.weight.flatten(0, -2)
    ).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate).mul_(up), mlp.down.weight)


def native_step(
    x: Tensor, block: Block, inputs: AttentionInputs, cache: LayerCache, ops: ModuleType
) -> Tensor:
    """Runs the same with the extension between the matrix multiplies (csrc/ops/decode.cpp)."""
    attention, mlp = block.attention, block.mlp
    heads, size, x = attention.heads, attention.head_size, x.squeeze(1).contiguous()
    rows = _native_norm(ops, block.attention_norm, x)
    q = F.linear(rows, attention.q.weight)
    kv = F.linear(rows, attention.kv.weight.flatten(0, -2))
    if attention.q_norm is not None:
        q = _norm(attention.q_norm, q.view(-1, heads.num_q, size)).flatten(1)
        k, v = kv.view(-1, 2, heads.num_kv, size).unbind(1)
        kv = torch.stack((_norm(attention.k_norm, k), v), 1)
    out = cache.attend(q, kv, inputs, heads, attention.window)
    x = torch.addmm(x, out, attention.o.weight.t())
    both = F.linear(_native_norm(ops, block.mlp_norm, x), mlp.gate_up.weight.flatten(0, -2))
    inner = x.new_empty(len(x), both.shape[-1] // 2)
    ops.swiglu(both.data_ptr(), inner.data_ptr(), *inner.shape, x.dtype == torch.float64)
    return torch.addmm(x, inner, mlp.down.weight.t())[:, None]


def _native_norm(ops: ModuleType, norm: Norm, x: Tensor) -> Tensor:
    out, twice = torch.empty_like(x), x.dtype == torch.float64
    addresses = x.data_ptr(), norm.weight.data_ptr(), out.data_ptr()
    ops.norm(*addresses, *x.shape, norm.eps, twice)
    return out


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
