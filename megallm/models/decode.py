"""One step of decoding through a plain block, in few operations.

With one token a sequence a small model's time goes to the calls, not to the arithmetic. This is
`Block.forward` for the commonest case, written out without modules and with the rotation of queries
and keys in three operations each; the results are those of `Block.forward` to rounding. Anything
else (adapters, biases, FP8, experts, latents, tensor parallelism) takes the modules' way.
"""

from __future__ import annotations

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


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
